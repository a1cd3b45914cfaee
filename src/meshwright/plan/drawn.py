"""Drawn: what the pictures of a plan are made from, as plain data.

A figure is one number; a picture needs the whole of what it shows. Here are the tensors that the program is given, cut
as they lie; the collectives, like ones together; the timeline, with what one line does without a pause as one stretch;
and the source around a line. All of it goes to the JSON, so whatever is drawn can be read by a program too.
"""

import linecache
import math
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .network import Machine, show_axes
from .program import Argument, Program
from .time import COMPUTE, HBM, Span
from .traffic import Collective

AROUND = 3
"""How many lines of source are shown before and after one."""


@dataclass(frozen=True)
class Cut:
    """A tensor that the program is given, as it lies on the mesh."""

    path: str
    """Where it is among the arguments: ``0.model.head.weight``."""
    role: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    """Of the whole."""
    axes: tuple[tuple[str, ...], ...]
    """For each dim the axes that split it, the slowest first."""
    dtype: str
    whole_bytes: int
    device_bytes: int
    num_copies: int
    """How many devices hold each slice."""


@dataclass(frozen=True)
class Row:
    """Collectives that are alike in everything."""

    kind: str
    axes: str
    group_size: int
    dtype: str
    payload_bytes: int
    """Of one run, as of ``sent_bytes``."""
    sent_bytes: int
    runs: int
    sure: bool
    seconds: float | None
    """All the runs; None without a machine."""
    direction: str
    operation: str
    dims: tuple[str, ...]
    file: str
    line: int


@dataclass(frozen=True)
class Stretch:
    """A stretch of the timeline on one lane, in one turn of the loop it stands in."""

    name: str
    """What takes the longest of it: a primitive, or a kind of collective; ``loop``, ``branch``."""
    stream: str
    """``compute``, ``HBM``, the axes of a network, ``loop``."""
    start_seconds: float
    """From the beginning of what it stands in."""
    seconds: float
    """Of a loop, all its turns."""
    turns: int
    operations: int
    """How many it joins."""
    direction: str
    file: str
    line: int
    inside: tuple["Stretch", ...] = ()
    """One turn of a loop."""


def cuts_of(program: Program) -> tuple[Cut, ...]:
    """The tensors with names among the arguments, in order."""
    return tuple(_cut(argument, program.sizes) for argument in program.arguments if argument.names)


def _cut(argument: Argument, sizes: Mapping[str, int]) -> Cut:
    value, num = argument.value, len(argument.names)
    axes = value.split if len(value.split) == num else ((),) * num
    parts = [math.prod(sizes[a] for a in along) for along in axes]
    tiles = math.prod(parts)
    return Cut(
        argument.path,
        argument.role,
        argument.names,
        tuple(size * n for size, n in zip(value.shape, parts, strict=True)),
        axes,
        value.dtype.name,
        value.num_bytes * tiles,
        value.num_bytes,
        math.prod(sizes.values()) // tiles,
    )


def joined_rows(rows: Sequence[Collective], sizes: Mapping[str, int], machine: Machine | None) -> tuple[Row, ...]:
    """The collectives; those that only stand in several places of the program are one row."""
    times: dict[tuple[object, ...], int] = defaultdict(int)
    first: dict[tuple[object, ...], Collective] = {}
    for row in rows:
        key = (row.kind, row.axes, row.dtype, row.payload_bytes, row.sure, row.origin)
        first.setdefault(key, row)
        times[key] += row.times
    return tuple(_row(first[key], runs, sizes, machine) for key, runs in times.items())


def _row(row: Collective, runs: int, sizes: Mapping[str, int], machine: Machine | None) -> Row:
    origin = row.origin
    return Row(
        row.kind,
        show_axes(row.axes, sizes),
        row.group_size,
        row.dtype,
        row.payload_bytes,
        row.sent_bytes,
        runs,
        row.sure,
        machine.seconds(row) * runs if machine is not None else None,
        origin.direction,
        origin.operation,
        origin.dims,
        origin.file,
        origin.line,
    )


def stretches(spans: Iterable[Span]) -> tuple[Stretch, ...]:
    """A timeline, with neighbours of one line on one unit as one stretch."""
    groups: list[list[Span]] = []
    for span in spans:
        if groups and _goes_on(groups[-1][-1], span):
            groups[-1].append(span)
        else:
            groups.append([span])
    return tuple(map(_stretch, groups))


def _goes_on(last: Span, span: Span) -> bool:
    same = last.stream == span.stream and last.origin.direction == span.origin.direction
    end = last.start_seconds + last.seconds
    touches = math.isclose(end, span.start_seconds, rel_tol=1e-9)
    return span.stream in (COMPUTE, HBM) and same and last.origin.line == span.origin.line and touches


def _stretch(group: list[Span]) -> Stretch:
    longest, origin = max(group, key=lambda span: span.seconds), group[0].origin
    return Stretch(
        longest.name,
        longest.stream,
        group[0].start_seconds,
        sum(span.seconds for span in group),
        longest.turns,
        len(group),
        origin.direction,
        origin.file,
        origin.line,
        stretches(longest.inside),
    )


def code_at(file: str, line: int) -> str:
    """One line of source; "" where there is none."""
    return linecache.getline(file, line).strip() if file else ""


def code_around(file: str, line: int) -> dict[int, str]:
    """A line of source with its neighbours, by number, without the margin that they share."""
    if not file:
        return {}
    first = max(1, line - AROUND)
    lines = linecache.getlines(file)[first - 1 : line + AROUND]
    return dict(enumerate(textwrap.dedent("".join(lines)).splitlines(), first))
