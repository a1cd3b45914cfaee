"""Outside every region: how arrays lie there, and what XLA's partitioner adds.

The optimizer's update runs on whole arrays that are split alike. XLA's partitioner carries their shardings through
elementwise operations, which need no communication; it adds an all-reduce for each split dim that is summed (a global
norm), and moves an array where a sharding is asked for that it does not have. These few rules are all that a training
step needs. Of any other operation on a split array the plan says that it does not know.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from jax.sharding import PartitionSpec

from ..scope import Axes, Split
from .primitives import ELEMENTWISE, REDUCTIONS

_SILENT = frozenset({"broadcast_in_dim", "iota", "optimization_barrier", "transpose"})
KNOWN = ELEMENTWISE | REDUCTIONS | _SILENT | {"shard_map", "sharding_constraint"}
"""The operations on split arrays, and on what is made from them, of which it is known what XLA does."""
Added = tuple[str, Axes, tuple[int, ...]]
"""A collective that XLA adds: its kind, its axes, and the shape of the buffer that it reduces, gathers or exchanges."""
Sizes = dict[str, int]


def splits(name: str, params: dict[str, Any], ins: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> list[Split]:
    """How the results of an equation, of these whole shapes, lie when its operands are ``ins``."""
    if name == "sharding_constraint":
        return [_of_sharding(params["sharding"], len(shapes[0]))]
    known = [v.split for v in ins if v is not None and any(v.split)]
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
    if name in REDUCTIONS:
        gone = params["axes"]
        return [tuple(axes for i, axes in enumerate(first) if i not in gone)] * len(shapes)
    if name == "optimization_barrier":
        return [v.split if v is not None else () for v in ins]
    if name in ELEMENTWISE:
        return [_joined([s for s in known if len(s) == len(shape)]) or () for shape in shapes]
    return [()] * len(shapes)


def _joined(known: Sequence[Split]) -> Split | None:
    """The finest of several splits of one shape, of which the others are coarser; None when there is none."""
    if not known:
        return None
    joined: list[Axes] = []
    for axes in zip(*known, strict=True):
        finest = max(axes, key=len)
        if any(finest[: len(a)] != a for a in axes):
            return None
        joined.append(finest)
    used = [a for axes in joined for a in axes]
    return tuple(joined) if len(set(used)) == len(used) else None


def finest(*values: Any) -> Split | None:
    """The split of values of one shape that XLA must lay one way; None when no split is as fine as each one's, () when
    all are whole."""
    known = [v.split for v in values if v is not None and any(v.split)]
    return _joined(known) if known else ()


def _of_sharding(sharding: Any, ndim: int) -> Split:
    entries = [() if _is_open(e) else (e,) if isinstance(e, str) else tuple(e) for e in getattr(sharding, "spec", ())]
    return tuple(entries + [()] * (ndim - len(entries)))


def _is_open(entry: Any) -> bool:
    """Whether an entry of a spec names no axes: the dim is whole, or left to XLA."""
    return entry is None or entry is PartitionSpec.UNCONSTRAINED


def communication(
    name: str, params: dict[str, Any], ins: Sequence[Any], outs: Sequence[Any], sizes: Sizes
) -> tuple[list[Added], bool]:
    """The collectives that XLA adds to an operation, and whether that is all it does."""
    split = [v for v in ins if v is not None and any(v.split)]
    if name == "sharding_constraint":
        if PartitionSpec.UNCONSTRAINED in getattr(params["sharding"], "spec", ()):
            return [], False
        return moved(ins[0], outs[0], sizes) if split else ([], True)
    if not split or name in _SILENT:
        return [], True
    if name in REDUCTIONS:
        summed = [axes for i, axes in enumerate(split[0].split) if i in params["axes"] and axes]
        return [("all_reduce", axes, outs[0].shape) for axes in summed], not (summed and name.startswith("arg"))
    return [], name in ELEMENTWISE and _joined([v.split for v in split]) is not None


def moved(have: Any, want: Any, sizes: Sizes) -> tuple[list[Added], bool]:
    """From one sharding to another: what leaves a dim is gathered there or, where it arrives at another, exchanged;
    what only arrives is sliced without communication."""
    mine = have.split if any(have.split) else ((),) * len(want.shape)
    asked = want.split if any(want.split) else ((),) * len(want.shape)
    leaving, arriving = (tuple(_beyond(a, b)) for a, b in ((mine, asked), (asked, mine)))
    gone, come = (tuple(axis for axes in side for axis in axes) for side in (leaving, arriving))
    if not gone:
        return [], _kept(mine, asked)
    if not set(gone) & set(come):
        return list(_gathers(want, leaving, sizes)), not come and _kept(mine, asked)
    exchanged = [axes for axes in leaving if axes] == [axes for axes in arriving if axes] and sum(
        map(bool, leaving)
    ) == 1
    return [("all_to_all", gone, have.shape)], exchanged and _kept(mine, asked)


def _beyond(these: Split, others: Split) -> Iterator[Axes]:
    for a, b in zip(these, others, strict=True):
        yield tuple(axis for axis in a if axis not in b)


def _kept(mine: Split, asked: Split) -> bool:
    """Whether in each dim the one's axes begin with the other's: what stays need not move."""
    return all(a[: len(b)] == b or b[: len(a)] == a for a, b in zip(mine, asked, strict=True))


def _gathers(want: Any, leaving: Split, sizes: Sizes) -> Iterator[Added]:
    """A gather for each dim that axes leave, the last dim first; the buffer grows from one to the next."""
    parts = [math.prod(sizes[a] for a in axes) for axes in leaving]
    shape = [size // n for size, n in zip(want.shape, parts, strict=True)]
    for i, axes in reversed(list(enumerate(leaving))):
        if axes:
            shape[i] = want.shape[i]
            yield "all_gather", axes, tuple(shape)
