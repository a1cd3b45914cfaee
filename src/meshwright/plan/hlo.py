"""The collectives of a compiled program, and its estimated cycles, read from its HLO text.

This is the compiler's word beside the plan's own (``traffic.py``): what is left, and what was added, after every pass
of XLA. The text is ``compiled.as_text()``; the reader knows of it what it needs to count collectives:

- computations and who calls them: loops with their trip counts, branches, calls, fusions and the asynchronous
  wrappers of TPUs, whose ``-start`` runs the collective and whose ``-done`` only waits;
- collectives that a TPU runs in steps beside the computation: the same one stands in the fusion that starts it, in
  those that carry it on and in the one that ends it, and counts once;
- of each collective its operands' shapes and its groups of devices (``groups.py``);
- between slices of TPUs, what devices hand to the runtime that speaks over the slow network. A collective over more
  than a slice is one within each slice and one of these.

    %all_gather.16 = f32[16,4]{1,0} all-gather(%w), replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}, ...

on a mesh ``x=2, y=4`` is an ``all_gather`` over ``x`` of 256 bytes.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..scope import Axes
from .groups import spoken_over
from .passes import Passes, Runs, passes_in
from .traffic import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, PERMUTE, REDUCE_SCATTER

_KINDS = {
    "all-reduce": ALL_REDUCE,
    "all-gather": ALL_GATHER,
    "reduce-scatter": REDUCE_SCATTER,
    "all-to-all": ALL_TO_ALL,
    "ragged-all-to-all": ALL_TO_ALL,
    "collective-permute": PERMUTE,
    "collective-broadcast": PERMUTE,
}
_BETWEEN_SLICES = {
    "ALL_REDUCE": ALL_REDUCE,
    "ALL_GATHER": ALL_GATHER,
    "REDUCE_SCATTER": REDUCE_SCATTER,
    "ALL_TO_ALL": ALL_TO_ALL,
    "ONE_TO_ONE": PERMUTE,
}
_FUSED_SCATTER = "all-reduce-scatter"
"""TPUs fuse an all-reduce with the slice that each device keeps, under this name: it is a reduce-scatter."""

_BITS = {"pred": 8, "token": 0, "bf16": 16, "c64": 64, "c128": 128}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_LISTED = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_COUNTER = re.compile(r"[su]\d+\[\]")
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_CHAIN = re.compile(r'chain_id="(\d+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NAME = re.compile(r'op_name="([^"]*)"')
_STARTS = 'custom_call_target="AsyncCollectiveStart"'


@dataclass(frozen=True)
class CompiledCollective:
    """One collective of a compiled program; one of several operands is a row for each."""

    kind: str
    """As in the plan: ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``all_to_all`` or ``permute``."""
    axes: Axes
    """The mesh axes it speaks over, in the mesh's order; () when its groups are not those of whole axes."""
    group_size: int
    """The number of devices that take part together."""
    dtype: str
    """XLA's name of the elements' type: ``f32``."""
    payload_bytes: int
    """The whole buffer, as the table of ``traffic.py`` says, on one device, each time it runs."""
    times: int
    """How often it runs in one call of the program; in a pipeline, on the device where that is most often."""
    sure: bool
    """False in a loop whose trip count the compiler does not state, counted once, and in a branch, unless it is a
    pipeline's."""
    name: str
    """What the compiler calls it."""

    @property
    def total_payload_bytes(self) -> int:
        return self.payload_bytes * self.times


def compiled_collectives(
    text: str, sizes: Mapping[str, int], slices: Mapping[str, int] | None = None
) -> tuple[CompiledCollective, ...]:
    """Every collective of a compiled program.

    Args:
        text: the program's HLO, as ``compiled.as_text()`` gives it.
        sizes: every axis of the mesh and its size, in the mesh's order.
        slices: over how many slices an axis is dealt out, of those that the slow network joins; None: there is one.

    Raises:
        ValueError: the text has no entry, or states groups of devices in a form that is not known.
    """
    module = _Module(text)
    found = module.walk(module.entry, module.once, True, False)
    mesh = _Sliced.of(sizes, slices or {})
    return tuple(row for line, runs, sure, fused in found for row in _rows(module, line, mesh, max(runs), sure, fused))


def compiled_cycles(text: str) -> tuple[int | None, bool]:
    """The cycles that the compiler estimates for the computation of a program, waiting for collectives not among them.

    Args:
        text: the program's HLO.

    Returns:
        The cycles of every fusion, loops counted, or None where the compiler states none (along a pipeline, on the
        device that has most); and whether that is sure: it is not with a loop whose trip count is not stated, counted
        once, or a branch that is not a pipeline's, where all are counted.
    """
    module = _Module(text)
    found = list(module.estimates(module.entry, module.once, True))
    sums = (sum(cycles[d] for cycles, _ in found) for d in range(len(module.once)))
    return max(sums) if found else None, all(sure for _, sure in found)


@dataclass(frozen=True)
class _Line:
    """One instruction."""

    name: str
    type: str
    opcode: str
    rest: str
    """Its operands and attributes."""
    home: str
    """The computation it stands in."""


@dataclass(frozen=True)
class _Sliced:
    """The axes of a mesh, within a slice of TPUs and across slices."""

    within: tuple[tuple[str, int], ...]
    """The devices along each axis in one slice, which are counted from 0 in each."""
    across: tuple[tuple[str, int], ...]
    """The slices along each axis that the slow network joins."""

    @classmethod
    def of(cls, sizes: Mapping[str, int], slices: Mapping[str, int]) -> "_Sliced":
        within = tuple((axis, size // slices.get(axis, 1)) for axis, size in sizes.items())
        return cls(within, tuple((axis, slices[axis]) for axis in sizes if slices.get(axis, 1) > 1))

    def spoken_over(self, line: _Line) -> tuple[Axes, int]:
        """The axes of a collective and the size of its groups."""
        if line.opcode == "send":
            return tuple(axis for axis, _ in self.across), math.prod(num for _, num in self.across)
        return spoken_over(line.rest, self.within, f"compiled_collectives: {line.opcode} {line.name!r}")


class _Module:
    """The computations of a program, by name."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[_Line]] = {}
        self.entry, name = "", ""
        for raw in text.splitlines():
            if raw[:1] == " ":
                if (m := _LINE.match(raw)) is not None:
                    self.computations[name].append(_Line(m[2], m[3], m[4], m[5], name))
            elif (head := _HEAD.match(raw)) is not None:
                name = head[2]
                self.computations[name] = []
                self.entry = name if head[1] else self.entry
        if not self.entry:
            raise ValueError("compiled_collectives: expected the HLO text of a module, found no ENTRY computation.")
        starting = (lines for lines in self.computations.values() if any(_STARTS in x.rest for x in lines))
        self._started = {(_chain(x), x.home) for lines in starting for x in lines if _kind(x) is not None}
        conditionals = (x for lines in self.computations.values() for x in lines if x.opcode == "conditional")
        pipelines = [passes for x in conditionals if (passes := _passes(x)) is not None]
        self.once: Runs = (1,) * max((passes.order.num_devices for passes in pipelines), default=1)
        """The entry's runs, for each device along a pipeline."""
        self._busy: dict[str, bool] = {}
        self._types: dict[str, dict[str, str]] = {}

    def types(self, name: str) -> dict[str, str]:
        """The type of each value of a computation."""
        if name not in self._types:
            self._types[name] = {line.name: line.type for line in self.computations[name]}
        return self._types[name]

    def busy(self, name: str) -> bool:
        """Whether a computation holds a collective, itself or in what it calls."""
        if name not in self._busy:
            lines = self.computations[name]
            self._busy[name] = any(self.runs(x) or any(map(self.busy, _callees(x))) for x in lines)
        return self._busy[name]

    def runs(self, line: _Line) -> bool:
        """Whether a line is a collective, and no later step of one that was started elsewhere."""
        chain = _chain(line)
        later = chain and (chain, line.home) not in self._started and any(chain == c for c, _ in self._started)
        return _kind(line) is not None and not later

    def walk(self, name: str, runs: Runs, sure: bool, fused: bool) -> Iterator[tuple[_Line, Runs, bool, bool]]:
        """Each collective with how often it runs, whether that is sure, and whether it is fused with a scatter."""
        for line in self.computations[name]:
            if self.runs(line):
                yield line, runs, sure, fused
                continue
            for callee, within, known in self._calls(line, runs):
                if not self.busy(callee):
                    continue
                scatters = fused or _FUSED_SCATTER in line.name or _FUSED_SCATTER in callee
                yield from self.walk(callee, within, sure and known, scatters)

    def estimates(self, name: str, runs: Runs, sure: bool) -> Iterator[tuple[Runs, bool]]:
        """The estimated cycles of each line, all its runs; a fusion's stand on the fusion."""
        for line in self.computations[name]:
            if (stated := _CYCLES.search(line.rest)) is not None:
                yield tuple(int(stated[1]) * n for n in runs), sure
            elif line.opcode in ("while", "conditional", "call"):
                for callee, within, known in self._calls(line, runs):
                    yield from self.estimates(callee, within, sure and known)

    def _calls(self, line: _Line, runs: Runs) -> Iterator[tuple[str, Runs, bool]]:
        """What a line calls, how often, and whether that is sure."""
        passes = _passes(line) if line.opcode == "conditional" else None
        turns, known = self._turns(line)
        for i, callee in enumerate(_callees(line)):
            if passes is not None and all(n % len(passes.ticks) == 0 for n in runs):
                yield callee, passes.runs(i, runs), True
            else:
                yield callee, tuple(n * turns for n in runs), known

    def _turns(self, line: _Line) -> tuple[int, bool]:
        if line.opcode != "while":
            return 1, line.opcode != "conditional"
        stated = _TRIPS.search(line.rest)
        count = int(stated[1]) if stated is not None else self._compared(line)
        return (count, True) if count is not None else (1, False)

    def _compared(self, line: _Line) -> int | None:
        """The trip count of a loop that counts by ones up to the one constant of its condition."""
        condition = re.search(r"condition=%?([\w.\-]+)", line.rest)
        lines = self.computations[condition[1]] if condition is not None else []
        constants = [number for x in lines if (number := _constant(x)) is not None]
        if len(constants) != 1 or not any("direction=LT" in x.rest for x in self._within(lines)):
            return None
        return constants[0] - self._first(line, lines)

    def _first(self, loop: _Line, condition: Sequence[_Line]) -> int:
        """What the counter of a loop begins with: not 0 where XLA has taken turns out of it. Where that is no constant
        that can be seen, 0."""
        lines = {x.name: x for x in self.computations[loop.home]}
        begin = lines.get(_operands(loop.rest)[0])
        counters = [m[1] for x in condition if _COUNTER.match(x.type) and (m := re.search(r"index=(\d+)", x.rest))]
        if begin is None or begin.opcode != "tuple" or not counters:
            return 0
        value = lines.get(_operands(begin.rest)[int(counters[0])])
        while value is not None and value.opcode in ("copy", "bitcast"):
            value = lines.get(_operands(value.rest)[0])
        return (_constant(value) or 0) if value is not None else 0

    def _within(self, lines: Sequence[_Line]) -> Iterator[_Line]:
        for line in lines:
            yield line
            for callee in _callees(line):
                yield from self._within(self.computations[callee])


def _constant(line: _Line) -> int | None:
    whole = line.opcode == "constant" and _COUNTER.match(line.type)
    found = re.match(r"(\d+)\)", line.rest) if whole else None
    return int(found[1]) if found is not None else None


def _passes(line: _Line) -> Passes | None:
    """The passes of a pipeline among which a conditional chooses."""
    name = _NAME.search(line.rest)
    return passes_in(name[1], len(_callees(line))) if name is not None else None


def _kind(line: _Line) -> str | None:
    if line.opcode == "send":
        handed = _TRANSFER.search(line.rest)
        return _BETWEEN_SLICES.get(handed[1]) if handed is not None else None
    return _KINDS.get(line.opcode.removesuffix("-start"))


def _chain(line: _Line) -> str:
    """The number that the steps of one collective share; "" of one that runs in a single step."""
    found = _CHAIN.search(line.rest)
    return found[1] if found is not None else ""


def _callees(line: _Line) -> list[str]:
    if line.opcode.endswith(("-done", "-update")) or "=" not in line.rest:
        return []
    listed = [name.strip().lstrip("%") for m in _LISTED.findall(line.rest) for name in m.split(",") if name.strip()]
    return [*_CALLED.findall(line.rest), *listed]


def _rows(
    module: _Module, line: _Line, mesh: _Sliced, times: int, sure: bool, fused: bool
) -> Iterator[CompiledCollective]:
    kind = _kind(line)
    assert kind is not None
    axes, group_size = mesh.spoken_over(line)
    if group_size == 1:
        return
    types = module.types(line.home)
    for operand in _operands(line.rest)[: 1 if line.opcode == "send" else None]:
        for dtype, num_bytes in _arrays(types.get(operand, operand)):
            payload = num_bytes * group_size if kind == ALL_GATHER else num_bytes
            made = REDUCE_SCATTER if fused and kind == ALL_REDUCE else kind
            yield CompiledCollective(made, axes, group_size, dtype, payload, times, sure, line.name)


def _operands(rest: str) -> list[str]:
    """The names between an instruction's parentheses."""
    depth = 1
    for i, c in enumerate(rest):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return re.findall(r"%([\w.\-]+)", rest[:i]) or [x.strip() for x in rest[:i].split(",")]
    return []


def _arrays(text: str) -> Iterator[tuple[str, int]]:
    """The arrays of a type, a tuple's one after another: each with its dtype and bytes."""
    for dtype, dims in _SHAPE.findall(text):
        bits = _BITS.get(dtype) or int(re.sub(r"^[a-z]+(\d+).*$", r"\1", dtype))
        yield dtype, -(-math.prod(int(d) for d in dims.split(",") if d) * bits // 8)
