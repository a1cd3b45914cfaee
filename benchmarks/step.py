"""One training step of the decoder: Meshwright beside hand-written JAX, alternating in one process.

    python benchmarks/step.py --devices 2
    python benchmarks/step.py --devices 8

For each layout the same step (forward, backward, AdamW, donated state) is built three times: by Meshwright from names,
and twice by hand (``handwritten.py``): ``jax.jit`` with sharding constraints, and ``jax.shard_map``. The three run in
turn, round after round, and what is printed are ratios to the better of the two by hand: the median step time, the
temporary memory of the compiled program, and the time to trace and lower. The losses of all three are compared first.
"""

import argparse
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import handwritten
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import meshwright as mw
from meshwright.models import Decoder, DecoderConfig
from meshwright.nn import cross_entropy

TENSOR = "heads:model, ff:model, vocab:model"
Step = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One layout, as Meshwright's line and as the hand-written side's plan."""

    name: str
    mesh: str
    layout: mw.Layout
    plan: handwritten.Plan


@dataclass
class Side:
    """One of the three ways, built: its step and state, and what was measured."""

    step: Step
    state: Any
    batch: Any
    trace_and_lower: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    temporary_bytes: int = 0
    loss: float = 0.0


def cases(num_devices: int) -> list[Case]:
    plan = handwritten.Plan
    data, model = f"data={num_devices}", f"model={num_devices}"
    pure = [
        Case("data", data, mw.Layout("batch:data"), plan(data="data")),
        Case("FSDP", data, mw.Layout("batch:data", params="embed:data"), plan(data="data", rest="data")),
        Case("tensor", model, mw.Layout(TENSOR), plan(model="model")),
    ]
    if num_devices < 4:
        return pure
    mesh, both = f"data={num_devices // 2}, model=2", "batch:data, " + TENSOR
    return [
        *pure,
        Case("data x tensor", mesh, mw.Layout(both), plan(data="data", model="model")),
        Case("FSDP x tensor", mesh, mw.Layout(both, params="embed:data"), plan("data", "model", "data")),
    ]


def loss_of(model: Decoder, ids: Any, targets: Any) -> jax.Array:
    return mw.mean(cross_entropy(model(ids), targets))


def step_of(loss: Step, optimizer: optax.GradientTransformation) -> Step:
    """The training step, the same for all three: state and batch to state and loss."""

    def step(state: Any, batch: Any) -> Any:
        params, moments = state
        value, gradient = jax.value_and_grad(loss)(params, *batch)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    return jax.jit(step, donate_argnums=0)


def build(case: Case, config: DecoderConfig, batch: int, length: int) -> dict[str, Side]:
    """The three sides, each with its own copy of one state."""
    mesh = mw.Mesh(case.mesh)
    optimizer = optax.adamw(1e-3, weight_decay=0.01)
    model = Decoder(config, key=jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, config.vocab, (batch, length + 1))
    ids, targets = (jnp.asarray(t, jnp.int32) for t in (tokens[:, :-1], tokens[:, 1:]))
    named = tuple(mw.Tensor(t, "batch length") for t in (ids, targets))

    placed = mw.shard(model, mesh, case.layout)
    ours = mw.spmd(loss_of, mesh, case.layout)
    sides = {"meshwright": Side(step_of(ours, optimizer), state(placed, optimizer), mw.shard(named, mesh, case.layout))}

    specs = handwritten.specs(case.plan)
    by_hand = {
        n: jax.device_put(w, NamedSharding(mesh.jax_mesh, specs[n])) for n, w in handwritten.from_decoder(model).items()
    }
    split = tuple(jax.device_put(t, NamedSharding(mesh.jax_mesh, P(case.plan.data))) for t in (ids, targets))
    for name, make in (("jit", handwritten.jitted_loss), ("shard_map", handwritten.mapped_loss)):
        loss = make(config, mesh.jax_mesh, case.plan)
        sides[name] = Side(step_of(loss, optimizer), state(by_hand, optimizer), split)
    return sides


def state(params: Any, optimizer: optax.GradientTransformation) -> Any:
    params = jax.tree.map(jnp.copy, params)
    return params, jax.tree.map(jnp.copy, optimizer.init(params))


def measure(sides: dict[str, Side], rounds: int) -> None:
    for i in range(10):
        for side in list(sides.values())[:: 1 if i % 2 else -1]:
            jax.clear_caches()
            gc.collect()  # each begins with the same heap
            start = time.perf_counter()
            side.step.lower(side.state, side.batch)
            side.trace_and_lower.append(time.perf_counter() - start)
    for side in sides.values():
        compiled = side.step.lower(side.state, side.batch).compile()
        side.temporary_bytes = compiled.memory_analysis().temp_size_in_bytes
        side.state, loss = side.step(side.state, side.batch)
        side.loss = float(loss)
    for i in range(rounds):
        order = list(sides.values()) if i % 2 else list(sides.values())[::-1]
        for side in order:
            start = time.perf_counter()
            side.state, loss = side.step(side.state, side.batch)
            jax.block_until_ready((side.state, loss))
            side.seconds.append(time.perf_counter() - start)


def row(case: Case, sides: dict[str, Side]) -> str:
    ours, hand = sides["meshwright"], [sides["jit"], sides["shard_map"]]
    median = statistics.median
    best = min(median(s.seconds) for s in hand)
    memory = min(s.temporary_bytes for s in hand)
    lower = min(median(s.trace_and_lower) for s in hand)
    cells = [
        f"{case.name}",
        f"{median(ours.seconds) * 1e3:.0f} ms",
        *(f"{median(s.seconds) * 1e3:.0f} ms" for s in hand),
        f"**{median(ours.seconds) / best:.2f}**",
        *(f"{s.temporary_bytes / 1e6:.1f}" for s in (ours, *hand)),
        f"**{ours.temporary_bytes / memory:.2f}**",
        f"**{median(ours.trace_and_lower) / lower:.2f}**",
    ]
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| layout | Meshwright | `jit` by hand | `shard_map` by hand | time ratio | MB | MB | MB | memory ratio "
    "| trace and lower ratio |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2, help="virtual CPU devices")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each side")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--unroll", action="store_true", help="unroll the scan over layers, on every side")
    parser.add_argument("--only", help="the name of one layout")
    given = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", given.devices)
    heads = max(4, given.devices)
    config = DecoderConfig(
        vocab=2048, embed=256, layers=4, heads=heads, group=1, head_dim=256 // heads, ff=1024, unroll=given.unroll
    )
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"{given.devices} devices, {date.today()}, JAX {jax.__version__}, {machine}")
    print(HEAD, flush=True)
    for case in cases(given.devices):
        if given.only and case.name != given.only:
            continue
        sides = build(case, config, given.batch, given.length)
        measure(sides, given.rounds)
        losses = [s.loss for s in sides.values()]
        assert max(losses) - min(losses) < 2e-5 * losses[0], f"{case.name}: the losses differ: {losses}"
        print(row(case, sides), flush=True)


if __name__ == "__main__":
    main()
