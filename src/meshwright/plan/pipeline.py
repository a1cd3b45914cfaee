"""Pipeline: what each device along a pipeline does, when, and how long it waits.

In each turn of a pipeline's loop a device does a pass, chosen from a table (``passes.py``), between operations that all
devices do, and hands its result on. The turns are played through, one after the other, with a clock for each device:

    all devices do it        every clock goes on by its seconds
    a pass                   each clock by those of the device's own branch: none where it waits
    a permute                two devices that it joins wait for each other, then both clocks go on by its seconds

Which devices a permute joins is written into the program: those that hand something on in any turn, so that they also
wait for each other in the turns in which nothing is handed on. Where the one does a pass forward and the other one
backward, which takes longer, the first waits: along a line of devices under 1F1B once only, until later ones have run
ahead by the difference.

    bubble = 1 - (mean over devices of the seconds in passes) / seconds of the loops
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from ..microbatches.order import BACKWARD, FORWARD, Order, Pass, slots
from .passes import Passes
from .program import Block, Choice, Loop, Op, Program, Value


@dataclass(frozen=True)
class Everywhere:
    """What every device does between two passes."""

    seconds: float


@dataclass(frozen=True)
class Chosen:
    """A pass, a branch for each kind."""

    passes: Passes
    seconds: tuple[float, ...]
    """Of each branch."""


@dataclass(frozen=True)
class Handed:
    """What devices hand to their neighbours."""

    pairs: tuple[tuple[int, int], ...]
    seconds: float


Step = Everywhere | Chosen | Handed


@dataclass(frozen=True)
class Played:
    """A loop over ticks as it runs."""

    order: Order
    seconds: float
    """Until the last device is done."""
    busy_seconds: tuple[float, ...]
    """In passes, by device."""
    handing_seconds: tuple[float, ...]
    """In permutes, by device, without the wait for the other end."""
    starts: dict[Pass, tuple[float, float]] = field(repr=False)
    """When each pass begins, and how long it takes."""


def played(steps: Sequence[Step], num_turns: int) -> Played:
    """How a loop runs whose turns are made of these steps, at least one of them a pass."""
    order = next(step.passes.order for step in steps if isinstance(step, Chosen))
    num = order.num_devices
    clock, busy, handing = np.zeros(num), np.zeros(num), np.zeros(num)
    starts: dict[Pass, tuple[float, float]] = {}
    for turn in range(num_turns):
        for step in steps:
            if isinstance(step, Everywhere):
                clock += step.seconds
            elif isinstance(step, Handed):
                joined = np.array(step.pairs)
                ready = clock.copy()
                for ends in (joined, joined[:, ::-1]):
                    np.maximum.at(ready, ends[:, 0], clock[ends[:, 1]])
                ready[np.unique(joined)] += step.seconds
                handing[np.unique(joined)] += step.seconds
                clock = ready
            else:
                took = np.array([step.seconds[branch] for branch in step.passes.chosen[turn]])
                row = order.passes[step.passes.ticks[turn]]
                starts.update((p, (clock[d], took[d])) for d, p in enumerate(row) if p is not None)
                clock, busy = clock + took, busy + took
    return Played(order, float(clock.max()), tuple(busy.tolist()), tuple(handing.tolist()), starts)


@dataclass(frozen=True)
class Drawn:
    """One pass on one device."""

    kind: str
    """``F`` or ``B``."""
    stage: int
    microbatch: int
    tick: int
    start_seconds: float | None
    """From the beginning of the pipeline; None without a machine, as of ``seconds``."""
    seconds: float | None


@dataclass(frozen=True)
class StageDevice:
    """One device along a pipeline."""

    stages: tuple[int, ...]
    """Those that it has, each a run of layers, of all ``num_devices x num_runs``."""
    forward: int
    """Passes forward in one call."""
    backward: int
    busy_seconds: float | None
    """In passes; None without a machine."""
    flops: int
    """Of the whole program on this device."""
    in_work: int
    """The largest number of microbatches, counted once for each of its stages, whose pass forward is done and whose
    pass backward is not."""
    kept: int
    """How many inputs of stages it keeps at once, of microbatches in work and of those that have arrived: the first
    stage keeps none, and makes them of the batch again."""
    kept_bytes: int
    """What they take. Every device makes room for as many as the one that keeps most."""
    memory_bytes: int
    """What a device must have: one program runs on all, so it is the same on each."""
    passes: tuple[Drawn, ...]
    """What it does, in order."""


@dataclass(frozen=True)
class Pipeline:
    """A pipeline of a program."""

    schedule: str
    num_devices: int
    num_runs: int
    """Stages on each device."""
    num_microbatches: int
    num_ticks: int
    """Those in which any device does a pass."""
    seconds: float | None
    """Of its loops; None without a machine, as of ``bubble``."""
    bubble: float | None
    """The part of ``seconds`` in which a device does no pass, the mean over devices."""
    ticks_bubble: float
    """The part of the ticks in which it does none where all passes take one: (P - 1) / (v m + P - 1); more where v > 1
    and the devices do not divide the microbatches."""
    devices: tuple[StageDevice, ...]


def pipelines_of(
    program: Program, flops: Sequence[int], memory_bytes: int, runs: Iterable[Played]
) -> tuple[Pipeline, ...]:
    """The pipelines of a program.

    Args:
        flops: of each device along the pipeline.
        memory_bytes: what a device must have.
        runs: their loops as they run on the machine; none without one.
    """
    by_order: dict[Order, list[Played]] = {}
    for run in runs:
        by_order.setdefault(run.order, []).append(run)
    found = {}
    for order, num_bytes in _orders(program.block):
        found[order] = max(found.get(order, 0), num_bytes)
    return tuple(_pipeline(o, size, flops, memory_bytes, by_order.get(o, [])) for o, size in found.items())


def _pipeline(
    order: Order, input_bytes: int, flops: Sequence[int], memory_bytes: int, runs: Sequence[Played]
) -> Pipeline:
    seconds = sum(run.seconds for run in runs) if runs else None
    busy = [sum(run.busy_seconds[d] for run in runs) for d in range(order.num_devices)]
    starts: dict[Pass, tuple[float, float]] = {}
    before = 0.0
    for run in runs:
        starts.update((p, (before + start, took)) for p, (start, took) in run.starts.items())
        before += run.seconds
    devices = tuple(
        _device(order, d, busy[d] if runs else None, flops[d % len(flops)], input_bytes, memory_bytes, starts)
        for d in range(order.num_devices)
    )
    return Pipeline(
        order.schedule,
        order.num_devices,
        order.num_runs,
        order.num_microbatches,
        len(order.busy_ticks),
        seconds,
        1 - sum(busy) / len(busy) / seconds if seconds else None,
        order.bubble,
        devices,
    )


def _device(
    order: Order,
    d: int,
    busy_seconds: float | None,
    flops: int,
    input_bytes: int,
    memory_bytes: int,
    starts: dict[Pass, tuple[float, float]],
) -> StageDevice:
    mine = [(i, p) for i, t in enumerate(order.busy_ticks) if (p := order.passes[t][d]) is not None]
    unknown = (None, None)
    places = slots(order, FORWARD).of
    kept = len({slot for (stage, _), slot in places.items() if stage % order.num_devices == d})
    return StageDevice(
        stages=tuple(range(d, order.num_stages, order.num_devices)),
        forward=sum(p.kind == FORWARD for _, p in mine),
        backward=sum(p.kind == BACKWARD for _, p in mine),
        busy_seconds=busy_seconds,
        flops=flops,
        in_work=_in_work([p for _, p in mine]),
        kept=kept,
        kept_bytes=kept * input_bytes,
        memory_bytes=memory_bytes,
        passes=tuple(Drawn(p.kind, p.stage, p.microbatch, i, *starts.get(p, unknown)) for i, p in mine),
    )


def _in_work(mine: Sequence[Pass]) -> int:
    """The most passes forward at once that wait for their passes backward."""
    most = now = 0
    for p in mine:
        now += 1 if p.kind == FORWARD else -1
        most = max(most, now)
    return most if any(p.kind == BACKWARD for p in mine) else min(most, 1)


def _orders(block: Block) -> Iterator[tuple[Order, int]]:
    """The orders of a program's pipelines, each with the bytes that go into a stage."""
    for node in block.nodes:
        if isinstance(node, Choice) and node.passes is not None:
            yield node.passes.order, _onward_bytes(node, node.passes, block)
        inner = (node.body,) if isinstance(node, Loop) else node.branches if isinstance(node, Choice) else ()
        for each in inner:
            yield from _orders(each)


def _onward_bytes(choice: Choice, passes: Passes, block: Block) -> int:
    """What a pass forward hands on. A choice's last results are what goes onward, and then the gradients of that part
    of it which has any; what is handed on of them is permuted."""
    place = {id(v): i for i, v in enumerate(choice.outs)}
    handed: dict[int, Value] = {}
    for op in (node for node in block.nodes if isinstance(node, Op) and node.name == "ppermute"):
        if op.ins and op.ins[0] is not None and id(op.ins[0]) in place:
            handed[place[id(op.ins[0])]] = op.ins[0]
    values = [handed[i] for i in sorted(handed)]
    kinds = {p.kind for t in passes.ticks for p in passes.order.passes[t] if p is not None and passes.order.sends(p)}
    whole = sum(not jnp.issubdtype(v.dtype, jnp.inexact) for v in values)
    num = (len(values) + whole) // 2 if len(kinds) == 2 else len(values) if FORWARD in kinds else 0
    return sum(v.num_bytes for v in values[:num])
