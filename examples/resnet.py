"""A residual network for images, with rows and columns split over devices if the layout says so.

He et al. (2016), with group norm (Wu and He, 2018) for batch norm, on scikit-learn's 1797 handwritten digits. The
network is written for one device; the layout is one argument, and changes no result:

    python examples/resnet.py
    python examples/resnet.py --devices 4 --mesh data=4 --layout batch:data
    python examples/resnet.py --devices 4 --mesh x=4 --layout rows:x
    python examples/resnet.py --devices 8 --mesh data=2,x=2,y=2 --layout "batch:data, rows:x, columns:y"
    python examples/resnet.py --devices 8 --mesh data=2,x=2,model=2 --layout "batch:data, rows:x, hidden:model" \\
        --params data

Dims: ``channels`` is the residual stream, ``hidden`` what a block's first convolution makes of it for the second.
"""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
import tyro
from sklearn.datasets import load_digits

import meshwright as mw
from meshwright.nn import Conv, GroupNorm, Linear, cross_entropy

OVER = "rows columns"
NUM_GROUPS = 8


class Block(eqx.Module):
    """x + f(x), f being two convolutions of 3 x 3; with a stride both are halved in rows and columns."""

    first: Conv
    first_norm: GroupNorm
    second: Conv
    second_norm: GroupNorm
    shortcut: Conv | None

    def __init__(self, before: int, after: int, stride: int, key: jax.Array) -> None:
        one, two, three = jax.random.split(key, 3)
        hidden, channels = mw.dims(hidden=after, channels=after)
        self.first = Conv(OVER, mw.Dim("channels", before), hidden, strides=stride, key=one, scale=2)
        self.first_norm = GroupNorm(hidden, NUM_GROUPS, OVER)
        self.second = Conv(OVER, hidden, channels, key=two)
        self.second_norm = GroupNorm(channels, NUM_GROUPS, OVER)
        self.shortcut = None
        if stride > 1 or before != after:
            out = mw.Dim("channels_out", after)
            self.shortcut = Conv(OVER, mw.Dim("channels", before), out, size=1, strides=stride, key=three)

    def __call__(self, x: mw.Tensor) -> mw.Tensor:
        """(batch, rows, columns, channels) to the same dims."""
        y = mw.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        x = x if self.shortcut is None else self.shortcut(x).rename(channels_out="channels")
        return mw.relu(x + y)


class ResNet(eqx.Module):
    """A convolution, stages of blocks, the mean over the image, and a linear map to classes."""

    stem: Conv
    stem_norm: GroupNorm
    blocks: list[Block]
    head: Linear

    def __init__(self, widths: tuple[int, ...], num_blocks: int, num_classes: int, key: jax.Array) -> None:
        stem, head, *keys = jax.random.split(key, 2 + len(widths) * num_blocks)
        channels = mw.Dim("channels", widths[0])
        self.stem = Conv(OVER, mw.Dim("colors", 1), channels, key=stem, scale=2)
        self.stem_norm = GroupNorm(channels, NUM_GROUPS, OVER)
        self.blocks = []
        before = widths[0]
        for i, key in enumerate(keys):
            stage, place = divmod(i, num_blocks)
            self.blocks.append(Block(before, widths[stage], 2 if stage and not place else 1, key))
            before = widths[stage]
        self.head = Linear(mw.Dim("channels", before), mw.Dim("classes", num_classes), key=head, bias=True)

    def __call__(self, images: mw.Tensor) -> mw.Tensor:
        """Images (batch, rows, columns, colors) to logits (batch, classes)."""
        x = mw.relu(self.stem_norm(self.stem(images)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(OVER))


def loss(network: ResNet, images: mw.Tensor, digits: mw.Tensor) -> jax.Array:
    return mw.mean(cross_entropy(network(images), digits, over="classes"))


@dataclass(frozen=True, kw_only=True)
class Options:
    """Classify handwritten digits with a residual network."""

    layout: str = "batch:data"
    """Which dims are split: batch, rows, columns, channels, hidden."""
    params: str = ""
    """How parameters are split at rest: an axis, or "hidden:data"."""
    mesh: str = "data=1"
    """Axes and their sizes."""
    devices: int = 1
    """Virtual CPU devices to make where there is no accelerator."""
    steps: int = 100
    """Training steps."""
    batch: int = 64
    """Images in a step."""


def main(options: Options) -> None:
    jax.config.update("jax_num_cpu_devices", options.devices)
    mesh, layout = mw.Mesh(options.mesh), mw.Layout(options.layout, params=options.params, strict=True)

    images, digits = load_digits(return_X_y=True)
    images, digits = (images.reshape(-1, 8, 8, 1) / 16).astype(np.float32), digits.astype(np.int32)
    testing = np.arange(len(images)) % 5 == 0
    order = np.random.default_rng(0)

    def drawn() -> tuple[mw.Tensor, mw.Tensor]:
        chosen = order.choice(np.flatnonzero(~testing), options.batch, replace=False)
        return mw.Tensor(images[chosen], "batch rows columns colors"), mw.Tensor(digits[chosen], "batch")

    network = mw.shard(ResNet((16, 32), 2, 10, jax.random.key(0)), mesh, layout)
    optimizer = optax.sgd(optax.cosine_decay_schedule(0.05, options.steps), momentum=0.9)
    state = mw.shard(optimizer.init(network), mesh, layout, role="optimizer")
    value_and_grad = jax.value_and_grad(mw.spmd(loss, mesh, layout))

    @jax.jit
    def step(network: Any, state: Any, images: mw.Tensor, digits: mw.Tensor) -> tuple[Any, Any, jax.Array]:
        value, gradient = value_and_grad(network, images, digits)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(network, updates), state, value

    print(mw.plan(step, network, state, *drawn()))
    for i in range(options.steps):
        network, state, value = step(network, state, *drawn())
        if i % 20 in (0, 19):
            print(f"step {i + 1}  loss {float(value):.4f}")

    guesses = mw.argmax(mw.unshard(network)(mw.Tensor(images[testing], "batch rows columns colors")), "classes")
    print(f"test accuracy {np.mean(guesses.array == digits[testing]):.1%} on {testing.sum()} images")


if __name__ == "__main__":
    main(tyro.cli(Options))
