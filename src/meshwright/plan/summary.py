"""Summary: a plan as plain data, which the report, the JSON and the comparison all show.

Everything is of one device in one call. What needs a machine is None without one.
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .drawn import Cut, Row, Stretch, code_around, code_at, cuts_of, joined_rows, stretches
from .hardware import Hardware
from .memory import Memory, Moment, Saved
from .network import Machine, in_order, show_axes
from .pipeline import Pipeline
from .program import Block, Choice, Loop, Op, Program
from .time import BUBBLE, COMPUTE, HBM, Times
from .traffic import Collective, sent_by_busiest
from .warnings import PlanWarning
from .work import Flops, Work

AT_LEAST, AT_MOST, ABOUT = "at least", "at most", "about"


@dataclass(frozen=True)
class Traffic:
    """The collectives of one kind over the same axes."""

    axes: str
    """``data``, ``pod x data``."""
    kind: str
    runs: int
    """How many run in one call."""
    payload_bytes: int
    sent_bytes: int
    seconds: float | None
    sure: bool
    """False when some run in a loop of unknown length (so many at least), or in a branch (so many at most)."""


@dataclass(frozen=True)
class Line:
    """What one line of the user's costs, in every direction."""

    file: str
    line: int
    code: str
    flops: int
    sent_bytes: int
    seconds: Mapping[str, float] | None
    """By ``compute``, ``HBM`` and the axes; of collectives, what no computation hides."""
    around: Mapping[int, str]
    """The source about it, by line number."""

    @property
    def place(self) -> str:
        """``model.py:12``; "elsewhere" for what no line is known of."""
        return f"{self.file.rpartition('/')[2]}:{self.line}" if self.file else "elsewhere"

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values()) if self.seconds is not None else 0.0


@dataclass(frozen=True)
class Summary:
    """A plan as data."""

    name: str
    """The function's."""
    mesh: Mapping[str, int]
    machine: str | None
    """What it runs on: ``TPU v5p``."""
    paths: Mapping[str, str]
    """What each axis crosses."""
    complete: bool
    """False when XLA's partitioner chooses the communication of some operations: every figure lacks theirs."""
    sure: bool
    """False when a loop of unknown length counts as one turn, or one of several branches runs and it is not known
    which: of a pipeline's it is."""
    bound: str
    """How time, work and traffic are to be read: as they are (""), ``at least`` (incomplete, or a loop of unknown
    length), ``at most`` (branches: that with the most
    work counts, and the traffic of all), ``about`` (both)."""
    seconds: float | None
    compute_seconds: float | None
    hbm_seconds: float | None
    exposed_seconds: float | None
    """While only collectives run."""
    bubble_seconds: float | None
    """While the device waits for others of its pipeline."""
    axis_seconds: Mapping[str, float]
    """How long the network of each axis is busy."""
    axis_exposed_seconds: Mapping[str, float]
    """How much of it no computation hides."""
    parts_seconds: Mapping[str, float]
    """The call's seconds by what they go to, ``compute``, ``HBM``, the axes and the ``bubble``: they add up. While
    several networks run at once and nothing is computed, the time is shared out among them."""
    bottleneck: str | None
    mfu: float | None
    """None as well where time and work are only lower bounds."""
    hfu: float | None
    """As ``mfu``."""
    flops: Mapping[str, int]
    """``total``, ``useful``, ``recomputed``, ``duplicated``, and by kind."""
    traffic: tuple[Traffic, ...]
    held_bytes: Mapping[str, int]
    """What a device holds at the program's peak, by kind."""
    peak_bytes: int
    available_bytes: int | None
    lines: tuple[Line, ...]
    """The most expensive first."""
    warnings: tuple[PlanWarning, ...]
    unverified: tuple[str, ...]
    """Figures of the machine that were assumed, or could not be checked."""
    figures: Mapping[str, float | str]
    """What the machine is taken for."""
    tensors: tuple[Cut, ...]
    """What the program is given."""
    collectives: tuple[Row, ...]
    """Each collective, in the program's order."""
    timeline: tuple[Stretch, ...]
    """Empty without a machine."""
    moments: tuple[Moment, ...]
    """What a device holds over the step, in the program's order."""
    saved: tuple[Saved, ...]
    """What the forward pass leaves for the backward pass, the largest first."""
    pipelines: tuple[Pipeline, ...]
    """Its pipelines, with what each device along one does and when. Work, time and traffic above are those of the
    device that has most."""

    @property
    def sent_bytes(self) -> int:
        """What a device puts on the wire."""
        return sum(t.sent_bytes for t in self.traffic)

    @property
    def held_bound(self) -> str:
        """As ``bound``, of memory."""
        return "" if self.complete else AT_LEAST

    def json(self) -> str:
        """The summary as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1, default=dict)


def summary(
    name: str,
    program: Program,
    machine: Machine | None,
    times: Times | None,
    flops: Flops,
    rows: Sequence[Collective],
    memory: Memory,
    warnings: tuple[PlanWarning, ...],
    pipelines: tuple[Pipeline, ...],
) -> Summary:
    """The summary of a plan's parts."""
    hardware, sizes = machine.hardware if machine is not None else None, program.sizes
    loops, branches = _unsure(program.block)
    least = loops or bool(program.unknown)
    rates = times if not least else None
    sent = sent_by_busiest(rows)
    work = {
        kind: getattr(flops, kind)
        for kind in ("total", "useful", "recomputed", "duplicated", "matmul", "convolution", "elementwise")
    }
    return Summary(
        name=name,
        mesh=dict(sizes),
        machine=hardware.title if hardware is not None else None,
        paths=_paths(sizes, rows, machine),
        complete=not program.unknown,
        sure=not loops and not branches,
        bound=ABOUT if least and branches else AT_LEAST if least else AT_MOST if branches else "",
        seconds=times.seconds if times else None,
        compute_seconds=times.compute_seconds if times else None,
        hbm_seconds=times.hbm_seconds if times else None,
        exposed_seconds=times.exposed_seconds if times else None,
        bubble_seconds=times.bubble_seconds if times else None,
        axis_seconds={axis.axes: axis.seconds for axis in times.axes} if times else {},
        axis_exposed_seconds={axis.axes: axis.exposed_seconds for axis in times.axes} if times else {},
        parts_seconds=_parts(times) if times else {},
        bottleneck=times.bottleneck if times else None,
        mfu=rates.mfu if rates else None,
        hfu=rates.hfu if rates else None,
        flops=work,
        traffic=_traffic(sent, sizes, machine),
        held_bytes=dict(memory.by_kind),
        peak_bytes=memory.peak_bytes,
        available_bytes=hardware.memory_bytes or None if hardware is not None else None,
        lines=_lines(flops.works, sent, times),
        warnings=warnings,
        unverified=tuple(dict.fromkeys((*hardware.unchecked, *hardware.assumed))) if hardware is not None else (),
        figures=_figures(hardware) if hardware is not None else {},
        tensors=cuts_of(program),
        collectives=joined_rows(rows, sizes, machine),
        timeline=stretches(times.spans) if times else (),
        moments=memory.timeline,
        saved=memory.saved,
        pipelines=pipelines,
    )


def _unsure(block: Block) -> tuple[bool, bool]:
    """Whether there is a loop of unknown length, and whether there are branches."""
    loops = branches = False
    for node in block.nodes:
        if not isinstance(node, Op):
            inner = [_unsure(b) for b in ([node.body] if isinstance(node, Loop) else node.branches)]
            loops |= (isinstance(node, Loop) and node.length is None) or any(loop for loop, _ in inner)
            branches |= (isinstance(node, Choice) and node.passes is None) or any(branch for _, branch in inner)
    return loops, branches


def _parts(times: Times) -> dict[str, float]:
    alone = sum(axis.exposed_seconds for axis in times.axes) or 1.0
    shared = {axis.axes: axis.exposed_seconds / alone * times.exposed_seconds for axis in times.axes}
    waits = {BUBBLE: times.bubble_seconds} if times.pipelines else {}
    return {COMPUTE: times.compute_seconds, HBM: times.hbm_seconds, **shared, **waits}


def _figures(hardware: Hardware) -> dict[str, float | str]:
    """The figures of a machine, less those that it has not; of the rates of products the best."""
    every = {f.name: getattr(hardware, f.name) for f in dataclasses.fields(hardware) if f.name not in ("name", "title")}
    plain = {name: value for name, value in every.items() if isinstance(value, int | float | str) and value}
    return {**plain, "matmul": max(rate.fraction for rate in hardware.matmul)}


def _paths(sizes: Mapping[str, int], rows: Sequence[Collective], machine: Machine | None) -> dict[str, str]:
    """What each axis crosses, and each group of axes that speak as one."""
    groups = dict.fromkeys([*((axis,) for axis in sizes), *(in_order(row.axes, sizes) for row in rows)])
    return {" x ".join(axes): str(machine.path(axes)) for axes in groups} if machine is not None else {}


def _traffic(rows: Sequence[Collective], sizes: Mapping[str, int], machine: Machine | None) -> tuple[Traffic, ...]:
    groups: dict[tuple[str, str], list[Collective]] = defaultdict(list)
    for row in rows:
        groups[show_axes(row.axes, sizes), row.kind].append(row)
    found = (
        Traffic(
            axes,
            kind,
            sum(r.times for r in same),
            sum(r.total_payload_bytes for r in same),
            sum(r.total_sent_bytes for r in same),
            sum(machine.seconds(r) * r.times for r in same) if machine is not None else None,
            all(r.sure for r in same),
        )
        for (axes, kind), same in groups.items()
    )
    return tuple(sorted(found, key=lambda t: (-(t.seconds or 0.0), -t.sent_bytes)))


def _lines(works: Sequence[Work], rows: Sequence[Collective], times: Times | None) -> tuple[Line, ...]:
    flops: dict[tuple[str, int], int] = defaultdict(int)
    sent: dict[tuple[str, int], int] = defaultdict(int)
    for work in works:
        flops[work.origin.file, work.origin.line] += work.flops
    for row in rows:
        sent[row.origin.file, row.origin.line] += row.total_sent_bytes
    seconds = times.lines() if times is not None else {}
    places = dict.fromkeys((*flops, *sent, *seconds))
    most = max(flops.values(), default=0) or 1, max(sent.values(), default=0) or 1

    def cost(line: Line) -> tuple[float, float]:
        return line.total_seconds, line.flops / most[0] + line.sent_bytes / most[1]

    lines = (
        Line(
            file,
            number,
            code_at(file, number),
            flops[file, number],
            sent[file, number],
            _ordered(seconds.get((file, number), {})) if times is not None else None,
            code_around(file, number),
        )
        for file, number in places
    )
    return tuple(sorted(lines, key=cost, reverse=True))


def _ordered(parts: Mapping[str, float]) -> dict[str, float]:
    first = [name for name in (COMPUTE, HBM) if name in parts]
    return {name: parts[name] for name in (*first, *(n for n in parts if n not in first)) if parts[name] > 0}
