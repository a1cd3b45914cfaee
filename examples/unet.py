"""A U-Net for volumes, with depth, rows and columns split over devices if the layout says so.

The 3-d U-Net of Çiçek et al. (2016), small, with group norm (Wu and He, 2018) for batch norm. It finds the balls in
noisy volumes that the program makes itself. The network is written for one device; the layout is one argument, and
changes no result:

    python examples/unet.py
    python examples/unet.py --devices 4 --mesh z=4 --layout depth:z
    python examples/unet.py --devices 8 --mesh z=2,y=2,x=2 --layout "depth:z, rows:y, columns:x"
    python examples/unet.py --devices 8 --mesh data=2,z=2,model=2 --layout "batch:data, depth:z, hidden:model" \\
        --params data

Dims: ``channels`` is what goes from block to block, ``hidden`` what stands between the two convolutions of a block.
"""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
import tyro

import meshwright as mw
from meshwright.nn import Conv, ConvTranspose, GroupNorm, cross_entropy

OVER = "depth rows columns"
NUM_GROUPS = 4


class Twice(eqx.Module):
    """Two convolutions of 3 x 3 x 3, each with its norm and ReLU."""

    first: Conv
    first_norm: GroupNorm
    second: Conv
    second_norm: GroupNorm

    def __init__(self, before: mw.Dim, after: int, key: jax.Array) -> None:
        one, two = jax.random.split(key)
        hidden, channels = mw.dims(hidden=after, channels=after)
        self.first = Conv(OVER, before, hidden, key=one, scale=2)
        self.first_norm = GroupNorm(hidden, NUM_GROUPS, OVER)
        self.second = Conv(OVER, hidden, channels, key=two, scale=2)
        self.second_norm = GroupNorm(channels, NUM_GROUPS, OVER)

    def __call__(self, x: mw.Tensor) -> mw.Tensor:
        x = mw.relu(self.first_norm(self.first(x)))
        return mw.relu(self.second_norm(self.second(x)))


class UNet(eqx.Module):
    """Down to volumes of half the size, up again, and at each size on the way up what was there on the way down."""

    down: list[Twice]
    bottom: Twice
    longer: list[ConvTranspose]
    up: list[Twice]
    last: Conv

    def __init__(self, widths: tuple[int, ...], num_classes: int, key: jax.Array) -> None:
        *sizes, last, bottom = jax.random.split(key, len(widths) + 1)
        self.down, self.longer, self.up = [], [], []
        before = mw.Dim("colors", 1)
        for key, width, below in zip(sizes, widths, widths[1:], strict=False):
            one, two, three = jax.random.split(key, 3)
            self.down.append(Twice(before, width, one))
            self.longer.append(ConvTranspose(OVER, mw.Dim("channels", below), mw.Dim("channels_out", width), key=two))
            self.up.append(Twice(mw.Dim("channels", 2 * width), width, three))
            before = mw.Dim("channels", width)
        self.bottom = Twice(before, widths[-1], bottom)
        classes = mw.Dim("classes", num_classes)
        self.last = Conv(OVER, mw.Dim("channels", widths[0]), classes, size=1, key=last, bias=True)

    def __call__(self, volumes: mw.Tensor) -> mw.Tensor:
        """Volumes (batch, depth, rows, columns, colors) to logits (batch, depth, rows, columns, classes)."""
        x, skipped = volumes, []
        for twice in self.down:
            x = twice(x)
            skipped.append(x)
            x = mw.max_pool(x, {"depth": 2, "rows": 2, "columns": 2})
        x = self.bottom(x)
        for twice, longer, skip in zip(self.up[::-1], self.longer[::-1], skipped[::-1], strict=True):
            x = longer(x).rename(channels_out="channels")
            x = twice(mw.concat((skip, x), "channels"))
        return self.last(x)


def loss(network: UNet, volumes: mw.Tensor, labels: mw.Tensor) -> jax.Array:
    return mw.mean(cross_entropy(network(volumes), labels, over="classes"))


def balls(batch: int, size: int, rng: np.random.Generator) -> tuple[mw.Tensor, mw.Tensor]:
    """Volumes with four balls each, some lighter and some darker than the noise around them, and which voxels are in
    one."""
    places = np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij"), -1)
    volumes, labels = rng.normal(0, 0.4, (batch, size, size, size)), np.zeros((batch, size, size, size), np.int32)
    for volume, label in zip(volumes, labels, strict=True):
        for _ in range(4):
            inside = ((places - rng.uniform(0, size, 3)) ** 2).sum(-1) < rng.uniform(size / 6, size / 3) ** 2
            volume[inside] += rng.choice([-1, 1])
            label[inside] = 1
    dims = "batch depth rows columns"
    return mw.Tensor(volumes[..., None].astype(np.float32), f"{dims} colors"), mw.Tensor(labels, dims)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Find the balls in noisy volumes with a 3-d U-Net."""

    layout: str = "batch:data"
    """Which dims are split: batch, depth, rows, columns, channels, hidden."""
    params: str = ""
    """How parameters are split at rest: an axis, or "hidden:data"."""
    mesh: str = "data=1"
    """Axes and their sizes."""
    devices: int = 1
    """Virtual CPU devices to make where there is no accelerator."""
    steps: int = 40
    """Training steps."""
    batch: int = 4
    """Volumes in a step."""
    size: int = 16
    """Voxels along each side of a volume."""


def main(options: Options) -> None:
    jax.config.update("jax_num_cpu_devices", options.devices)
    mesh, layout = mw.Mesh(options.mesh), mw.Layout(options.layout, params=options.params, strict=True)
    rng = np.random.default_rng(0)

    network = mw.shard(UNet((8, 16, 32), 2, jax.random.key(0)), mesh, layout)
    optimizer = optax.sgd(optax.cosine_decay_schedule(0.1, options.steps), momentum=0.9)
    state = mw.shard(optimizer.init(network), mesh, layout, role="optimizer")
    value_and_grad = jax.value_and_grad(mw.spmd(loss, mesh, layout))

    @jax.jit
    def step(network: Any, state: Any, volumes: mw.Tensor, labels: mw.Tensor) -> tuple[Any, Any, jax.Array]:
        value, gradient = value_and_grad(network, volumes, labels)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(network, updates), state, value

    print(mw.plan(step, network, state, *balls(options.batch, options.size, rng)))
    for i in range(options.steps):
        network, state, value = step(network, state, *balls(options.batch, options.size, rng))
        if i % 20 in (0, 19):
            print(f"step {i + 1}  loss {float(value):.4f}")

    volumes, labels = balls(4 * options.batch, options.size, rng)
    found, true = mw.argmax(mw.unshard(network)(volumes), "classes").array == 1, labels.array == 1
    print(f"intersection over union {(found & true).sum() / (found | true).sum():.1%} on {4 * options.batch} volumes")


if __name__ == "__main__":
    main(tyro.cli(Options))
