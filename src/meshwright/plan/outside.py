"""Outside every region: how arrays lie there, and what XLA's partitioner adds.

The optimizer's update runs on whole arrays that are split alike. XLA's partitioner carries their shardings through
elementwise operations, which need no communication, and adds an all-reduce where a split dim is summed (a global norm)
and moves an array where a sharding is asked for that it does not have. These few rules are all that a training step
needs; of any other operation on a split array the plan says that it does not know.
"""

from collections.abc import Sequence
from typing import Any

from ..scope import Axes, Split

_REDUCTIONS = frozenset({
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin",
})  # fmt: skip
_SILENT = frozenset({
    "iota", "copy", "copy_p", "optimization_barrier", "random_bits", "random_wrap", "random_unwrap", "random_seed",
    "random_fold_in", "random_split", "sharding_constraint", "broadcast_in_dim", "transpose", "convert_element_type",
    "shard_map",
})  # fmt: skip
Added = tuple[str, Axes, Any]
"""A collective that XLA adds: its kind, its axes, and the value that it moves."""


def splits(eqn: Any, ins: Sequence[Split]) -> list[Split]:
    """How the results of an equation lie when its operands lie as ``ins`` says."""
    name, params = eqn.primitive.name, eqn.params
    shapes = [tuple(getattr(v.aval, "shape", ())) for v in eqn.outvars]
    known = [s for s in ins if any(s)]
    if name == "sharding_constraint":
        return [_of_sharding(params["sharding"], len(shapes[0]))]
    if not known:
        return [()] * len(shapes)
    first = known[0]
    if name == "transpose":
        return [tuple(first[i] for i in params["permutation"])]
    if name == "broadcast_in_dim":
        placed: list[Axes] = [()] * len(shapes[0])
        for i, target in enumerate(params["broadcast_dimensions"]):
            placed[target] = first[i]
        return [tuple(placed)]
    if name in _REDUCTIONS:
        gone = params["axes"]
        return [tuple(axes for i, axes in enumerate(first) if i not in gone)] * len(shapes)
    whole = next((tuple(v.aval.shape) for v, s in zip(eqn.invars, ins, strict=True) if any(s)), ())
    return [first if shape == whole else () for shape in shapes]


def _of_sharding(sharding: Any, ndim: int) -> Split:
    spec = getattr(sharding, "spec", ())
    entries = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec]
    return tuple(entries + [()] * (ndim - len(entries)))


def communication(
    name: str, params: dict[str, Any], ins: Sequence[Any], outs: Sequence[Any]
) -> tuple[list[Added], bool]:
    """The collectives that XLA adds to an operation, and whether that is all it does."""
    split = [v for v in ins if v is not None and any(v.split)]
    if not split:
        return [], True
    if name == "sharding_constraint":
        return _moved(split[0], outs[0]), True
    if name in _REDUCTIONS:
        axes = tuple(a for i in params["axes"] for a in split[0].split[i])
        return ([("all_reduce", axes, outs[0])] if axes else []), not (axes and name.startswith("arg"))
    alike = all(v.split == split[0].split for v in split if v.shape == split[0].shape)
    same_shape = all(o.shape == split[0].shape for o in outs)
    return [], name in _SILENT or (alike and same_shape)


def _moved(have: Any, want: Any) -> list[Added]:
    """From one sharding to another: what leaves a dim is gathered; what arrives is sliced without communication."""
    pairs = list(zip(have.split, want.split, strict=True))
    leaving = tuple(a for mine, asked in pairs for a in mine if a not in asked)
    arriving = {a for mine, asked in pairs for a in asked if a not in mine}
    if not leaving:
        return []
    if set(leaving) <= arriving:
        return [("all_to_all", leaving, have)]
    return [("all_gather", leaving, want)]
