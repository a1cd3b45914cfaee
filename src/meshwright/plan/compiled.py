"""Compiled: the real compiler's word on a program, beside the plan's own.

A plan is read from a trace, before XLA has seen the program. ``plan.compile()`` hands the program to XLA, and this is
what comes back: the memory of a device, the collectives that are left, the cycles that the compiler estimates, or its
refusal of a program that a device cannot hold. A refusal is a verdict and no error: how much is needed, how much is
there, and which tensors are the largest.

    train_step compiled for tpu:v5e:2x2, 4 devices: data=4, in 2.1 s
    fits    1.92 GiB of 15.8 GiB on a device
"""

import dataclasses
import functools
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..devices import counted, show_sizes
from ..explain import UNKNOWN, show_bytes
from ..scope import Axes
from .exhausted import LEAST_SHARE, Allocation, Exhausted
from .hlo import CompiledCollective
from .report import as_text, new_table, show_seconds
from .traffic import Collective

_MOST_RATIO = 100
"""A larger one says no more than the two figures."""
_PARTS = {
    "arguments": "argument_bytes",
    "outputs": "output_bytes",
    "of them, in arguments": "alias_bytes",
    "temporaries": "temporary_bytes",
}
Moved = Mapping[tuple[str, Axes], int]
"""Bytes of all runs, by the kind of the collective and its axes."""


@dataclass(frozen=True)
class CompiledMemory:
    """What the compiled program holds of one device's memory, in bytes."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    """Of the outputs, what lies where a donated argument did."""
    temporary_bytes: int
    code_bytes: int
    """The program itself, which the total leaves out."""

    @property
    def total_bytes(self) -> int:
        """Arguments, temporaries and outputs, what they share counted once. TPUs' compiler counts the fragmentation of
        temporaries twice, so that this can be more than a program needs."""
        return self.argument_bytes + self.temporary_bytes + self.output_bytes - self.alias_bytes


@dataclass(frozen=True)
class Planned:
    """The plan's own figures, to set beside the compiler's."""

    name: str
    """The function's."""
    sizes: Mapping[str, int]
    """Every axis of the mesh and its size."""
    memory: Mapping[str, int]
    """Bytes by the names of ``CompiledMemory``, and ``peak_bytes``, what a device needs; what the plan does not know is
    not there."""
    collectives: Sequence[Collective]
    largest: Sequence[Allocation]
    """The largest tensors of the trace."""


@dataclass(frozen=True)
class Difference:
    """One figure of the plan and the compiler's."""

    part: str
    """``arguments``, or ``all_gather over data``."""
    planned_bytes: int | None
    compiled_bytes: int | None

    @property
    def ratio(self) -> float | None:
        """The compiler's over the plan's."""
        if not self.planned_bytes or self.compiled_bytes is None:
            return None
        return self.compiled_bytes / self.planned_bytes


@dataclass(frozen=True)
class Compiled:
    """What a compiler makes of a program; ``print`` shows it. Everything is of one device in one call."""

    name: str
    """The function's."""
    mesh: Mapping[str, int]
    target: str
    """What it is compiled for: ``tpu:v5p:8x8x8``, ``cpu``."""
    seconds: float
    """How long the compiler took."""
    fits: bool | None
    """Whether a device can hold it: TPUs' compiler knows. For other devices the table of hardware decides; None where
    it does not have them."""
    available_bytes: int | None
    """The device's memory, as the compiler says it, or else the table of hardware."""
    memory: CompiledMemory | None
    """None of a program that the compiler refused."""
    exhausted: Exhausted | None
    """Why it refused the program, when it did."""
    collectives: tuple[CompiledCollective, ...]
    """What is left of them, and what XLA added; none of a program that was refused."""
    cycles: int | None
    """Of computation, as the compiler estimates them, loops counted; what waits for collectives is not among them.
    None where it estimates none."""
    cycles_sure: bool
    """False with a loop of unknown length, whose turns count once, or with branches, which all count."""
    planned: Planned = dataclasses.field(repr=False)

    @property
    def needed_bytes(self) -> int | None:
        """What a device must hold, whether it can or not."""
        if self.exhausted is not None:
            return self.exhausted.needed_bytes
        return self.memory.total_bytes if self.memory is not None else None

    @property
    def planned_bytes(self) -> int | None:
        """The same by the plan, counted as the compiler counts what it says."""
        return self.planned.memory.get("total_bytes" if self.memory is not None else "peak_bytes")

    @property
    def largest(self) -> tuple[Allocation, ...]:
        """Of a program that does not fit, the largest tensors: the compiler's, or where it lists none, the trace's."""
        if self.fits is not False:
            return ()
        listed = self.exhausted.largest if self.exhausted is not None else ()
        least = (self.needed_bytes or 0) * LEAST_SHARE
        return listed or tuple(x for x in self.planned.largest if x.size_bytes > least)

    @functools.cached_property
    def moved_bytes(self) -> Moved:
        """The payload of all collectives, by kind and axes."""
        return _moved(self.collectives, self.mesh)

    @functools.cached_property
    def differences(self) -> tuple[Difference, ...]:
        """The plan's figures beside the compiler's: the parts of memory, then the bytes by kind and axes."""
        return (*self._memory_differences(), *self._moved_differences())

    def _memory_differences(self) -> Iterator[Difference]:
        planned = self.planned.memory
        if self.memory is not None:
            for part, name in _PARTS.items():
                yield Difference(part, planned.get(name), getattr(self.memory, name))
        yield Difference("memory", self.planned_bytes, self.needed_bytes)

    def _moved_differences(self) -> Iterator[Difference]:
        if self.memory is None:
            return
        planned, compiled = _moved(self.planned.collectives, self.mesh), self.moved_bytes
        for kind, axes in sorted({**planned, **compiled}, key=lambda key: (key[1], key[0])):
            over = " x ".join(axes) or "parts of axes"
            yield Difference(f"{kind} over {over}", planned.get((kind, axes), 0), compiled.get((kind, axes), 0))

    def to_json(self) -> str:
        """All of it as JSON: sizes in bytes, ``null`` for what is not known."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "planned"}
        parts = {"differences": self.differences, "needed_bytes": self.needed_bytes, "largest": self.largest}
        return json.dumps(data | parts, indent=1, default=_plain)

    def __rich__(self) -> RenderableType:
        return Group(*_page(self))

    def __str__(self) -> str:
        return as_text(Group(*_page(self)))


def _moved(rows: Sequence[Collective] | Sequence[CompiledCollective], sizes: Mapping[str, int]) -> Moved:
    found: dict[tuple[str, Axes], int] = defaultdict(int)
    for row in rows:
        found[row.kind, tuple(a for a in sizes if a in row.axes and sizes[a] > 1)] += row.total_payload_bytes
    return found


def _plain(x: Any) -> Any:
    return dict(x) if isinstance(x, Mapping) else dataclasses.asdict(x)


def _page(compiled: Compiled) -> Iterator[RenderableType]:
    num = math.prod(compiled.mesh.values())
    where = f"{counted(num, 'device')}{': ' + show_sizes(compiled.mesh) if compiled.mesh else ''}"
    yield Text.assemble(
        (f"{compiled.name} compiled", "bold"),
        f" for {compiled.target}, {where}, in {show_seconds(compiled.seconds)}",
    )
    yield Text.assemble(*_verdict(compiled))
    if compiled.memory is not None:
        least = "" if compiled.cycles_sure else "about "
        cycles = UNKNOWN if compiled.cycles is None else f"{least}{compiled.cycles:,} estimated, collectives apart"
        yield Text.assemble(("cycles  ", "bold"), cycles)
        yield Text.assemble(("code    ", "bold"), show_bytes(compiled.memory.code_bytes))
    if compiled.largest:
        yield Text("")
        yield _largest(compiled)
    yield Text("")
    yield _differences(compiled.differences)


def _verdict(compiled: Compiled) -> Iterator[tuple[str, str]]:
    needed, there = compiled.needed_bytes, compiled.available_bytes
    held = show_bytes(needed) if needed is not None else UNKNOWN
    of = f" of {show_bytes(there)}" if there else ""
    if compiled.fits is None:
        yield "memory  ", "bold"
        yield f"{held} on a device; how much is there is not known", ""
    elif compiled.fits:
        yield "fits    ", "bold green"
        twice = ", the fragmentation of temporaries counted twice" if there and (needed or 0) > there else ""
        yield f"{held}{of} on a device{twice}", ""
    else:
        memory = compiled.exhausted.memory if compiled.exhausted is not None else "memory"
        yield "does not fit  ", "bold red"
        yield f"{held} of {memory} needed on a device, {show_bytes(there or 0)} there", ""


def _largest(compiled: Compiled) -> Table:
    listed = compiled.exhausted is not None and compiled.exhausted.largest
    table = new_table(
        "the largest tensors" + ("" if listed else " of the trace"), "", "operation", "line", left=(0, 2, 3)
    )
    for i in (0, 2):
        table.columns[i].no_wrap = False
    for x in compiled.largest:
        table.add_row(*map(Text, (x.shape, show_bytes(x.size_bytes), x.operation, x.place)))
    return table


def _differences(rows: Sequence[Difference]) -> Table:
    table = new_table("a device, a call", "plan", "compiler", "ratio")
    for row in rows:
        figures = (UNKNOWN if n is None else show_bytes(n) for n in (row.planned_bytes, row.compiled_bytes))
        ratio = row.ratio if row.ratio is not None and row.ratio < _MOST_RATIO else None
        table.add_row(row.part, *figures, "" if ratio is None else f"{ratio:.2f}")
    return table
