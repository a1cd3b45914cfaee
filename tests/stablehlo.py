"""What a program communicates, read from its StableHLO.

``traffic_of`` walks the module as MLIR: it knows nothing of the trace that the plan is read from, nor of XLA's passes.
"""

import collections
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

KINDS = {
    "stablehlo.all_reduce": "all_reduce",
    "stablehlo.all_gather": "all_gather",
    "stablehlo.reduce_scatter": "reduce_scatter",
    "stablehlo.all_to_all": "all_to_all",
    "stablehlo.collective_permute": "permute",
}

Row = tuple[str, tuple[str, ...], int, int]
"""Kind, axes in the mesh's order, bytes of the whole buffer in one group, and how often it runs."""


def communicated(fn: Callable[..., Any], *inputs: Any) -> list[tuple[str, int]]:
    """Each collective of ``fn`` in the order of the module's text: its kind, and how many elements a device puts in.

    A loop's body and a function called from several places stand once.
    """
    found = []
    module: Any = jax.jit(fn).lower(*inputs).compiler_ir("stablehlo")
    for op in _every(module.operation):
        if op.name in KINDS:
            kind = op.name.removeprefix("stablehlo.")
            found += [(kind, math.prod(x.type.shape)) for x in op.operands]
    return found


def counted(fn: Callable[..., Any], *inputs: Any) -> dict[str, int]:
    """How many collectives of each kind ``fn`` holds; kinds that it has none of are left out."""
    return dict(collections.Counter(kind for kind, _ in communicated(fn, *inputs)))


def _every(op: Any) -> Iterator[Any]:
    yield op
    for inner in _inside(op):
        yield from _every(inner)


def _inside(op: Any) -> list[Any]:
    return [inner.operation for region in op.regions for block in region for inner in block]


# With axes and counts


def traffic_of(lowered: Any, sizes: Mapping[str, int]) -> collections.Counter[Row]:
    """The collectives of a lowered program, as a device meets them.

    Args:
        lowered: what ``jax.jit(fn).lower(...)`` returns.
        sizes: every axis of the mesh and its size, in the mesh's order.
    """
    module = lowered.compiler_ir("stablehlo").operation
    functions = {op.attributes["sym_name"].value: op for op in _inside(module) if op.name == "func.func"}
    walk = _Walk(functions, dict(sizes))
    walk.inside(functions["main"], 1, ())
    return walk.found


Calls = tuple[Any, ...]
"""The calls that lead to where one is, the last innermost."""


class _Walk:
    def __init__(self, functions: dict[str, Any], sizes: dict[str, int]) -> None:
        self.functions, self.sizes = functions, sizes
        self.found: collections.Counter[Row] = collections.Counter()

    def inside(self, op: Any, times: int, calls: Calls) -> None:
        """What stands within an operation that runs ``times``."""
        for inner in _inside(op):
            if inner.name in KINDS:
                self.found.update(_rows(inner, self.sizes, times))
            elif inner.name == "func.call":
                self.inside(self.callee(inner), times, (*calls, inner))
            elif inner.name == "stablehlo.while":
                self.inside(inner, times * _turns(inner), calls)
            elif inner.name == "stablehlo.case":
                self.branches(inner, times, calls)
            else:
                self.inside(inner, times, calls)

    def callee(self, call: Any) -> Any:
        return self.functions[call.attributes["callee"].value]

    def branches(self, case: Any, times: int, calls: Calls) -> None:
        """The branches of a choice: each as often as a constant table of (turn, device) has its number, on the device
        where it has it most often; where there is no such table, every time."""
        table = self.constant(case.operands[0], calls)
        for i, region in enumerate(case.regions):
            runs = times
            if table is not None and table.ndim == 2:
                runs = times // len(table) * int((table == i).sum(0).max())
            self.inside(_Branch([region]), runs, calls)

    def constant(self, value: Any, calls: Calls) -> Any:
        """The constant that a value is an element of, through slices, loops that hand it on and calls."""
        owner = value.owner
        if hasattr(value, "arg_number"):
            around, i = owner.owner.operation, value.arg_number
            if around.name == "func.func":
                return self.constant(calls[-1].operands[i], calls[:-1]) if calls else None
            return self.constant(around.operands[i], calls)
        if owner.name == "stablehlo.constant":
            return np.array(owner.attributes["value"])
        if owner.name in ("stablehlo.dynamic_slice", "stablehlo.reshape", "stablehlo.convert", "stablehlo.clamp"):
            return self.constant(owner.operands[int(owner.name == "stablehlo.clamp")], calls)
        if owner.name == "func.call":
            *_, last = _inside(self.callee(owner))
            return self.constant(last.operands[value.result_number], (*calls, owner))
        return None


class _Branch(NamedTuple):
    """One branch of a choice, as an operation that has no other."""

    regions: list[Any]


def _turns(loop: Any) -> int:
    """How often a loop's body runs: known where its counter starts at a constant and is compared with one and no more
    is asked, as ``lax.scan`` lowers; a loop of unknown length counts once."""
    asked = [op.operation for op in loop.regions[0].blocks[0]]
    if [op.name for op in asked] != ["stablehlo.constant", "stablehlo.compare", "stablehlo.return"]:
        return 1
    constant, compare, _ = asked
    counter = compare.operands[0]
    first: Any = loop.operands[counter.arg_number].owner if hasattr(counter, "arg_number") else None
    if getattr(first, "name", "") != "stablehlo.constant":
        return 1
    return _integer(constant) - _integer(first)


def _integer(constant: Any) -> int:
    return int(np.array(constant.attributes["value"]).item())


def _rows(op: Any, sizes: dict[str, int], times: int) -> Iterator[Row]:
    kind = KINDS[op.name]
    groups = np.array(op.attributes["source_target_pairs" if kind == "permute" else "replica_groups"])
    axes = _axes(groups, sizes, kind)
    if axes:
        for x in op.results if kind == "all_gather" else op.operands:
            yield kind, axes, math.prod(x.type.shape) * _bytes(str(x.type.element_type)), times


def _bytes(element: str) -> int:
    if element.startswith("complex"):
        return 2 * _bytes(element[8:-1])
    return max(int(element.lstrip("abcdefghijklmnopqrstuvwxyz").split("E")[0]) // 8, 1)


def _axes(groups: np.ndarray[Any, Any], sizes: dict[str, int], kind: str) -> tuple[str, ...]:
    """The axes along which the devices of a group differ: of the whole group, which must be all devices that agree on
    the other axes; for a permute, between any device and the one that it sends to."""
    coordinates = np.stack(np.unravel_index(groups, tuple(sizes.values())), axis=-1)
    differs = (coordinates != coordinates[:, :1]).any(axis=(0, 1))
    axes = tuple(axis for axis, d in zip(sizes, differs.tolist(), strict=True) if d)
    if kind != "permute":
        assert groups.shape[1] == math.prod(sizes[a] for a in axes), f"groups {groups} are not along {axes}"
        assert sorted(groups.ravel().tolist()) == list(range(math.prod(sizes.values())))
    return axes
