"""The collectives of a compiled program, and its estimated cycles, read from its HLO text.

This is the compiler's word beside the plan's own (``traffic.py``): what is left, and what was added, after every pass
of XLA. The text is ``compiled.as_text()``; the reader knows of it what it needs to count collectives:

- computations and who calls them: loops with their trip counts, branches, calls, fusions and the asynchronous
  wrappers of TPUs, whose ``-start`` runs the collective and whose ``-done`` only waits;
- collectives that a TPU runs in steps beside the computation: the same one stands in the fusion that starts it, in
  those that carry it on and in the one that ends it, and counts once;
- of each collective its operands' shapes and its groups of devices. Devices are counted in the order of the mesh, so
  the axes of a group are the coordinates in which its members differ.

    %all_gather.16 = f32[16,4]{1,0} all-gather(%w), replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}, ...

on a mesh ``x=2, y=4`` is an ``all_gather`` over ``x`` of 256 bytes.
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..scope import Axes
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
_FUSED_SCATTER = "all-reduce-scatter"
"""TPUs fuse an all-reduce with the slice that each device keeps, under this name: it is a reduce-scatter."""

_BITS = {"pred": 8, "token": 0, "bf16": 16, "c64": 64, "c128": 128}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_LISTED = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_GROUPS = re.compile(
    r"replica_groups=(\{(?:\{[\d,]*\},?)*\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|mesh\[[^{]*\{[^}]*\})"
)
_CHAIN = re.compile(r'chain_id="(\d+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_STARTS = 'custom_call_target="AsyncCollectiveStart"'
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)|=)?(\d+)?")
_ORDER = re.compile(r"device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\)")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


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
    """How often it runs in one call of the program."""
    sure: bool
    """False in a loop whose trip count the compiler does not state, counted once, and in a branch."""
    name: str
    """What the compiler calls it."""

    @property
    def total_payload_bytes(self) -> int:
        return self.payload_bytes * self.times


def compiled_collectives(text: str, sizes: Mapping[str, int]) -> tuple[CompiledCollective, ...]:
    """Every collective of a compiled program.

    Args:
        text: the program's HLO, as ``compiled.as_text()`` gives it.
        sizes: every axis of the mesh and its size, in the mesh's order.

    Raises:
        ValueError: the text has no entry, or states groups of devices in a form that is not known.
    """
    module = _Module(text)
    found = module.walk(module.entry, 1, True, False)
    return tuple(row for line, times, sure, fused in found for row in _rows(module, line, sizes, times, sure, fused))


def compiled_cycles(text: str) -> tuple[int | None, bool]:
    """The cycles that the compiler estimates for the computation of a program, waiting for collectives not among them.

    Args:
        text: the program's HLO.

    Returns:
        The cycles of every fusion, loops counted, or None where the compiler states none; and whether that is sure: it
        is not with a loop whose trip count is not stated, counted once, or a branch, where all are counted.
    """
    module = _Module(text)
    found = list(module.estimates(module.entry, 1, True))
    return sum(cycles for cycles, _ in found) if found else None, all(sure for _, sure in found)


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

    def walk(self, name: str, times: int, sure: bool, fused: bool) -> Iterator[tuple[_Line, int, bool, bool]]:
        """Each collective with how often it runs, whether that is sure, and whether it is fused with a scatter."""
        for line in self.computations[name]:
            if self.runs(line):
                yield line, times, sure, fused
                continue
            for callee in filter(self.busy, _callees(line)):
                runs, known = self._turns(line)
                scatters = fused or _FUSED_SCATTER in line.name or _FUSED_SCATTER in callee
                yield from self.walk(callee, times * runs, sure and known, scatters)

    def estimates(self, name: str, times: int, sure: bool) -> Iterator[tuple[int, bool]]:
        """The estimated cycles of each line, all its runs; a fusion's stand on the fusion."""
        for line in self.computations[name]:
            if (stated := _CYCLES.search(line.rest)) is not None:
                yield int(stated[1]) * times, sure
            elif line.opcode in ("while", "conditional", "call"):
                runs, known = self._turns(line)
                for callee in _callees(line):
                    yield from self.estimates(callee, times * runs, sure and known)

    def _turns(self, line: _Line) -> tuple[int, bool]:
        if line.opcode != "while":
            return 1, line.opcode != "conditional"
        stated = _TRIPS.search(line.rest)
        count = int(stated[1]) if stated is not None else self._compared(line)
        return (count, True) if count is not None else (1, False)

    def _compared(self, line: _Line) -> int | None:
        """The trip count of a loop that counts from zero, by ones, up to the one constant of its condition."""
        condition = re.search(r"condition=%?([\w.\-]+)", line.rest)
        lines = self.computations[condition[1]] if condition is not None else []
        constants = [int(m[1]) for x in lines if x.opcode == "constant" and (m := re.match(r"(\d+)\)", x.rest))]
        if len(constants) != 1 or not any("direction=LT" in x.rest for x in self._within(lines)):
            return None
        return constants[0]

    def _within(self, lines: Sequence[_Line]) -> Iterator[_Line]:
        for line in lines:
            yield line
            for callee in _callees(line):
                yield from self._within(self.computations[callee])


def _kind(line: _Line) -> str | None:
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
    module: _Module, line: _Line, sizes: Mapping[str, int], times: int, sure: bool, fused: bool
) -> Iterator[CompiledCollective]:
    kind = _kind(line)
    assert kind is not None
    axes, group_size = _spoken_over(line, tuple(sizes.items()))
    if group_size == 1:
        return
    types = module.types(line.home)
    for operand in _operands(line.rest):
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


def _spoken_over(line: _Line, sizes: tuple[tuple[str, int], ...]) -> tuple[Axes, int]:
    pairs = _PAIRS.search(line.rest)
    if pairs is not None:
        numbers = re.findall(r"\{(\d+),(\d+)\}", pairs[1])
        return axes_of_pairs([(int(a), int(b)) for a, b in numbers], sizes)
    groups = _GROUPS.search(line.rest)
    if groups is None:
        raise ValueError(
            f"compiled_collectives: {line.opcode} {line.name!r} states its groups of devices in a form that is not "
            f"known: {line.rest[-700:]}"
        )
    return axes_of_groups(_groups(groups[1], math.prod(size for _, size in sizes)), sizes)


def _groups(text: str, num_devices: int) -> tuple[tuple[int, ...], ...]:
    if text.startswith("mesh"):
        return _groups_along(text)
    if (iota := _IOTA.match(text)) is not None:
        shape, reshaped = _numbers(iota[1]), _numbers(iota[2])
        devices = np.arange(math.prod(reshaped)).reshape(reshaped)
        devices = devices.transpose(_numbers(iota[3])) if iota[3] else devices
        return tuple(map(tuple, devices.reshape(shape).tolist()))
    groups = tuple(tuple(_numbers(g)) for g in re.findall(r"\{([\d,]+)\}", text))
    return groups or (tuple(range(num_devices)),)


def _groups_along(text: str) -> tuple[tuple[int, ...], ...]:
    """From ``mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a':(2)2}``: along the axes in braces, of which ``(2)2`` is
    the part of size 2 that has 2 slower places before it. The mesh is XLA's own; without ``device_ids`` its devices
    stand in order."""
    mesh, along = text.split("{")
    sizes = {name: int(size) for name, _, size in _AXIS.findall(mesh.split("]")[0])}
    chosen = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in _AXIS.findall(along)}
    parts: list[tuple[str, int]] = []
    for name, size in sizes.items():
        before, length = chosen.get(name, (size, 1))
        parts += [(f"{name} before", before), (name, length), (f"{name} after", size // (before * length))]
    groups = np.array(_groups_of(tuple(chosen), tuple(parts)))
    return tuple(map(tuple, _devices_in_order(mesh, math.prod(sizes.values()))[groups].tolist()))


def _devices_in_order(text: str, num_devices: int) -> Any:
    order = _ORDER.search(text)
    if order is None:
        return np.arange(num_devices)
    if order[3]:
        return np.array(_numbers(order[3]))
    shape = _numbers(order[1])
    devices = np.arange(math.prod(shape)).reshape(shape)
    return (devices.transpose(_numbers(order[2])) if order[2] else devices).ravel()


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


@functools.lru_cache(maxsize=4096)
def axes_of_groups(groups: tuple[tuple[int, ...], ...], sizes: tuple[tuple[str, int], ...]) -> tuple[Axes, int]:
    """The axes along which the members of each group differ, () when no axes make these groups; the group's size."""
    shape = [size for _, size in sizes]
    places = np.array(np.unravel_index(groups[0], shape)).T
    axes = tuple(axis for (axis, _), column in zip(sizes, places.T, strict=True) if len(set(column.tolist())) > 1)
    made = frozenset(frozenset(group) for group in _groups_of(axes, sizes))
    return axes if made == frozenset(map(frozenset, groups)) else (), len(groups[0])


def _groups_of(axes: Axes, sizes: tuple[tuple[str, int], ...]) -> list[list[int]]:
    names = [axis for axis, _ in sizes]
    devices = np.arange(math.prod(size for _, size in sizes)).reshape([size for _, size in sizes])
    order = sorted(range(len(names)), key=lambda i: names[i] in axes)
    length = math.prod(size for axis, size in sizes if axis in axes)
    return devices.transpose(order).reshape(-1, length).tolist()  # type: ignore[no-any-return]


def axes_of_pairs(pairs: Sequence[tuple[int, int]], sizes: tuple[tuple[str, int], ...]) -> tuple[Axes, int]:
    """The axes along which any device sends, and the number of devices along them."""
    shape = [size for _, size in sizes]
    ends = [np.array(np.unravel_index(list(side), shape)) for side in zip(*pairs, strict=True)]
    moves = (ends[0] != ends[1]).any(axis=1).tolist() if pairs else [False] * len(sizes)
    axes = tuple(axis for (axis, _), moved in zip(sizes, moves, strict=True) if moved)
    return axes, math.prod(size for axis, size in sizes if axis in axes)
