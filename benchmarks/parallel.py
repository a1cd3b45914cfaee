"""Each kind of parallelism: Meshwright beside a straightforward version by hand, alternating in one process.

    python benchmarks/parallel.py

For each kind one program (a loss and its gradients) is built twice: by Meshwright, a layout on a function of named
tensors, and by hand, ``jax.shard_map`` with explicit collectives (``handwritten_*.py``). Loss and gradients are
compared first; then the two run in turn, round after round. What is printed is the median time of each, and the
ratio.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import handwritten_overlap
import handwritten_parallel as by_hand
import handwritten_spatial
import jax
import numpy as np

import meshwright as mw
from meshwright import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import resnet

NUM_DEVICES = 8
BATCH, LENGTH, EMBED, FF, LAYERS = 32, 64, 256, 1024, 8
HEADS, HEAD, CONTEXT = 4, 64, 2048


@dataclass
class Case:
    """One kind: the two programs and what they are given."""

    name: str
    ours: Callable[..., Any]
    arguments: tuple[Any, ...]
    hand: Callable[..., Any]
    positional: tuple[Any, ...]
    seconds: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))

    def check(self) -> None:
        """Loss and gradients agree."""
        found, expected = jax.jit(self.ours)(*self.arguments), jax.jit(self.hand)(*self.positional)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            a, b = np.asarray(a).reshape(-1), np.asarray(b).reshape(-1)
            assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max(), self.name

    def measure(self, rounds: int) -> None:
        sides = [(jax.jit(self.ours), self.arguments), (jax.jit(self.hand), self.positional)]
        for i in range(-2, rounds):
            for k in (0, 1) if i % 2 else (1, 0):
                step, given = sides[k]
                start = time.perf_counter()
                jax.block_until_ready(step(*given))
                if i >= 0:
                    self.seconds[k].append(time.perf_counter() - start)

    def row(self) -> str:
        ours, hand = (statistics.median(s) for s in self.seconds)
        return f"| {self.name} | {ours * 1e3:.0f} ms | {hand * 1e3:.0f} ms | **{ours / hand:.2f}** |"


def residual(up: mw.Tensor, down: mw.Tensor, x: mw.Tensor) -> Any:
    """The network of most cases, its residual stream under its own name."""

    def one(x: mw.Tensor, w: Any) -> mw.Tensor:
        h = x.rename(residual_length="length")
        y = mw.dot(mw.tanh(mw.dot(h, w[0], over="embed")), w[1], over="ff")
        return x + y.rename(length="residual_length")

    x = mw.fold(one, x.rename(length="residual_length"), (up, down), over="layers")
    return mw.mean(x * x)


def attention(causal: bool) -> Callable[..., Any]:
    def loss(q: mw.Tensor, k: mw.Tensor, v: mw.Tensor) -> Any:
        out = mw.attention(q, k, v, over="length", summed="head_dim", causal=causal)
        return mw.mean(out * out)

    return loss


def network() -> tuple[tuple[mw.Tensor, ...], tuple[jax.Array, ...]]:
    """Weights and a batch, with names and without."""
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = (LAYERS, EMBED, FF), (LAYERS, FF, EMBED), (BATCH, LENGTH, EMBED)
    up, down, x = (jax.random.normal(k, s) * 0.02 for k, s in zip(keys, sizes, strict=True))
    x = x * 50.0
    named = mw.param(mw.Tensor(up, "layers embed ff")), mw.param(mw.Tensor(down, "layers ff embed"))
    return (*named, mw.Tensor(x, "batch length embed")), (up, down, x)


def built(
    name: str, mesh: str, layout: mw.Layout, loss: Any, given: Any, hand: Callable[[Any], Any], whole: bool = False,
    argnums: tuple[int, ...] = (0, 1), dcn: str = "",
) -> Case:  # fmt: skip
    """One kind. ``hand`` makes, of the mesh, a loss, or, ``whole``, its value and gradients."""
    named, positional = given
    on = mw.Mesh(mesh, dcn=dcn or ())
    ours = jax.value_and_grad(mw.spmd(loss, on, layout), argnums)
    theirs = hand(on.jax_mesh)
    theirs = theirs if whole else jax.value_and_grad(theirs, argnums)
    return Case(name, ours, mw.shard(named, on, layout), theirs, positional)


def cases() -> Iterator[Case]:
    given = network()
    n = NUM_DEVICES
    yield built(
        "gradient accumulation, 4 microbatches", f"data={n}", mw.Layout("batch:data", microbatches=4), residual,
        given, lambda mesh: by_hand.accumulated(mesh, 4), whole=True,
    )  # fmt: skip
    yield built(
        "multi-slice data", f"dcn=2, data={n // 2}", mw.Layout("batch:(dcn,data)"), residual, given,
        by_hand.hierarchical, whole=True, dcn="dcn",
    )  # fmt: skip
    yield built(
        "sequence", f"model={n}", mw.Layout("ff:model, residual_length:model"), residual, given, by_hand.sequence
    )
    pipe = mw.Layout("layers:pipe", microbatches=8, schedule="gpipe")
    yield built("pipeline, GPipe", f"pipe={n}", pipe, residual, given, lambda mesh: by_hand.pipelined(mesh, 8))
    yield built(
        "pipeline, 1F1B, beside GPipe by hand", f"pipe={n}", pipe.replace(schedule="1f1b"), residual, given,
        lambda mesh: by_hand.pipelined(mesh, 8),
    )  # fmt: skip
    keys = jax.random.split(jax.random.key(1), 3)
    qkv = tuple(jax.random.normal(k, (1, CONTEXT, HEADS, HEAD)) for k in keys)
    named = tuple(mw.Tensor(x, "batch length heads head_dim") for x in qkv)
    for causal in (False, True):
        name = "context, ring" + (", causal" if causal else "")
        yield built(
            name, f"context={n}", mw.Layout("length:context"), attention(causal), (named, qkv),
            lambda mesh, causal=causal: by_hand.ring_attention(mesh, causal), argnums=(0, 1, 2),
        )  # fmt: skip

    yield overlapped()
    yield with_experts()
    yield spatial()


def overlapped() -> Case:
    """One feed-forward layer in rings."""
    keys = jax.random.split(jax.random.key(2), 3)
    sizes = (BATCH, LENGTH, EMBED), (EMBED, FF * 4), (FF * 4, EMBED)
    arrays = tuple(jax.random.normal(k, s) * 0.1 for k, s in zip(keys, sizes, strict=True))
    names = "batch residual_length embed", "embed ff", "ff embed"
    x, up, down = (mw.Tensor(a, n) for a, n in zip(arrays, names, strict=True))

    def loss(x: mw.Tensor, up: mw.Tensor, down: mw.Tensor) -> Any:
        wide = mw.silu(mw.dot(x.rename(residual_length="length"), up, over="embed"))
        return mw.mean((x + mw.dot(wide, down, over="ff").rename(length="residual_length")) ** 2)

    layout = mw.Layout("ff:model, residual_length:model", overlap="model")
    return built(
        "sequence, overlapped", f"model={NUM_DEVICES}", layout, loss, ((x, mw.param(up), mw.param(down)), arrays),
        lambda mesh: handwritten_overlap.mapped_loss(mesh, "model"), argnums=(0, 1, 2),
    )  # fmt: skip


def with_experts() -> Case:
    """A mixture of 16 experts behind a router of one choice, with places for each expert."""
    embed, ff, experts = mw.dims(embed=EMBED, ff=FF // 2, experts=16)
    one, two, three = jax.random.split(jax.random.key(3), 3)
    router = nn.TopKRouter(embed, experts.size, key=one, num_choices=1, normalised=False)
    mixture = nn.MixtureOfExperts(router, nn.GatedExperts(embed, experts, ff, key=two), factor=2.0)
    x = mw.random.normal(three, mw.dims(batch=BATCH, length=LENGTH * 2) + (embed,))

    def loss(mixture: nn.MixtureOfExperts, x: mw.Tensor) -> Any:
        return mw.mean(mixture(x)[0] ** 2)

    weights = tuple(w.array for w in (router.linear.weight, mixture.experts.gate, mixture.experts.up))
    positional = (*weights, mixture.experts.down.array), x.array
    capacity = LENGTH * 2 * 2 // experts.size
    return built(
        "experts", f"data={NUM_DEVICES}", mw.Layout("batch:data, experts:data"), loss, ((mixture, x), positional),
        lambda mesh: by_hand.experts(mesh, capacity), argnums=(0,),
    )  # fmt: skip


def spatial() -> Case:
    """A residual block on images in strips and columns."""
    channels = mw.Dim("channels", 32)
    block = resnet.Block(channels.size, channels.size, 1, jax.random.key(4))
    x = mw.random.normal(jax.random.key(5), (*mw.dims(batch=8, rows=64, columns=64), channels))
    plan = handwritten_spatial.Plan(rows="x", columns="y")
    return built(
        "spatial", f"x={NUM_DEVICES // 2}, y=2", mw.Layout("rows:x, columns:y"), lambda b, x: mw.mean(b(x) ** 2),
        ((block, x), (handwritten_spatial.from_block(block), x.array)),
        lambda mesh: handwritten_spatial.mapped_loss(mesh, plan, resnet.NUM_GROUPS), argnums=(1,),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed runs of each side")
    parser.add_argument("--only", help="a part of the names of the kinds to run")
    given = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"{NUM_DEVICES} devices, {date.today()}, JAX {jax.__version__}, {machine}")
    print("| kind | Meshwright | by hand | ratio |\n| --- | --- | --- | --- |", flush=True)
    for case in cases():
        if given.only is None or given.only in case.name:
            case.check()
            case.measure(given.rounds)
            print(case.row(), flush=True)


if __name__ == "__main__":
    main()
