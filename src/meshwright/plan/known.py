"""Known: what warnings are drawn from.

A program as a list of what runs, with who makes and who reads each value, so that a check asks in one step what
otherwise takes a walk through the blocks. It is made once, in one walk.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..scope import Axes
from .lineage import Lineage
from .network import Machine
from .passes import Runs
from .pipeline import Pipeline
from .program import Block, Choice, Loop, Op, Program, Value, devices_along
from .touched import VIEWS
from .traffic import ALL_GATHER, Collective, rows_of

TILE = 128
"""The side of the matrix unit of a machine that is not known."""


@dataclass(frozen=True)
class Ran:
    """An operation where it stands."""

    op: Op
    times: int
    """In a pipeline, the mean over its devices, rounded up: so that branches that run on different ones add up."""
    looped: bool


@dataclass(frozen=True)
class Known:
    """What warnings are drawn from."""

    program: Program
    lineage: Lineage
    machine: Machine | None
    peak_bytes: int
    """The most that a device holds, or at least its arguments."""
    ran: tuple[Ran, ...] = field(repr=False)
    users: dict[int, list[Op]] = field(repr=False)
    """Who reads a value, by its id, beyond views of it."""
    makers: dict[int, Op] = field(repr=False)
    """What makes a value, by its id."""
    gathered: dict[int, set[str]] = field(repr=False)
    """The axes over which a value is gathered, by its id."""
    given: dict[int, Value] = field(repr=False)
    """What a loop gives its body for a value of the body, by its id."""
    pipelines: tuple[Pipeline, ...] = ()

    @classmethod
    def of(
        cls,
        program: Program,
        lineage: Lineage,
        machine: Machine | None,
        peak_bytes: int,
        pipelines: tuple[Pipeline, ...] = (),
    ) -> "Known":
        ran = tuple(_ran(program.block, (1,) * devices_along(program.block), False))
        users: dict[int, list[Op]] = defaultdict(list)
        for each in ran:
            for v in each.op.ins:
                users[id(v)].append(each.op)
        makers = {id(v): each.op for each in ran for v in each.op.outs}
        gathered: dict[int, set[str]] = defaultdict(set)
        for each in ran:
            for row in (row for row in rows_of(each.op) if row.kind == ALL_GATHER):
                for v in each.op.outs:
                    gathered[id(v)].update(row.axes)
        given = dict(_given(program.block))
        return cls(program, lineage, machine, peak_bytes, ran, users, makers, gathered, given, pipelines)

    def seconds(self, rows: Sequence[Collective]) -> float | None:
        """What collectives take, all their runs."""
        return sum(self.machine.seconds(r) * r.times for r in rows) if self.machine is not None else None

    def read_by(self, value: Value) -> Iterator[Op]:
        """What reads a value, or a view of it, in its block."""
        for op in self.users.get(id(value), ()):
            if op.name in VIEWS:
                for out in op.outs:
                    yield from self.read_by(out)
            else:
                yield op

    def splitting(self, parameter: Value) -> Axes:
        """The axes that split a parameter where it is used: those of its layout at rest, less what gathers it.

        Its own ``varying`` says less: whole parameters vary as well, where each device makes its own gradient.
        """
        split: set[str] = set()
        gathered: set[str] = set()
        value: Value | None = parameter
        while value is not None and (argument := self.lineage.parameter(value)) is not None:
            split = axes_of(argument.value)
            gathered |= self.gathered.get(id(value), set())
            maker = self.makers.get(id(value))
            value = maker.ins[0] if maker is not None else self.given.get(id(value))
        split -= gathered
        return tuple(a for a in self.program.sizes if a in split)

    @property
    def tile(self) -> int:
        return self.machine.hardware.tile if self.machine is not None else TILE


def _ran(block: Block, runs: Runs, looped: bool) -> Iterator[Ran]:
    for node in block.nodes:
        if isinstance(node, Op):
            yield Ran(node, -(-sum(runs) // len(runs)), looped)
        elif isinstance(node, Loop):
            turns = node.length if node.length is not None else 1
            yield from _ran(node.body, tuple(n * turns for n in runs), True)
        else:
            for i, branch in enumerate(node.branches):
                yield from _ran(branch, node.passes.runs(i, runs) if node.passes is not None else runs, looped)


def _given(block: Block) -> Iterator[tuple[int, Value]]:
    for node in block.nodes:
        if isinstance(node, Loop):
            reads = (*node.consts, *node.carry, *node.scanned)
            inner = node.body.ins[len(node.body.ins) - len(reads) :]
            yield from ((id(v), x) for v, x in zip(inner, reads, strict=True) if x is not None)
            yield from _given(node.body)
        elif isinstance(node, Choice):
            for branch in node.branches:
                yield from _given(branch)


def axes_of(value: Value) -> set[str]:
    """The axes that split a value."""
    return {a for axes in value.split for a in axes}
