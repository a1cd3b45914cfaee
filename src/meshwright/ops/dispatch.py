"""Dispatch: what lies by groups and routes, moved to where it lies by experts, and back.

    to_experts(x(routes, batch, capacity, embed))       ->   (experts, routed_batch, capacity, embed)
    from_experts(y(experts, routed_batch, …))            ->   (routes, batch, …)

These are the renames that their dims say, with one freedom more: ``routed_batch`` holds the groups in any order, for
experts do not mind, and ``from_experts`` puts them back. So an axis that splits both the groups and the experts goes
from one dim to the other in one all-to-all wherever it stands among the axes of ``batch``.

===================================  ==========================================================================
an axis of ``experts``               between devices, there and back
===================================  ==========================================================================
that splits ``batch`` too            all-to-all; all-to-all
over which a sum is to be taken      reduce-scatter; the shares stay, and ``from_slots`` adds them up
any other                            nothing, each keeps its own; the shares stay, and ``from_slots`` adds them up
===================================  ==========================================================================
"""

import itertools
from collections.abc import Iterator

from .. import collectives
from ..dims import Dim, Dims
from ..scope import Axes
from ..tensor import Tensor, make
from .lowering import check_operand

_NAMES = {"routes": "experts", "batch": "routed_batch"}


def to_experts(x: Tensor) -> Tensor:
    """``x`` with ``routes`` renamed to ``experts`` and ``batch``, if it has one, to ``routed_batch``."""
    asked = "to_experts"
    check_operand(x, asked, scalars=False)
    names = {old: new for old, new in _NAMES.items() if old in x.names}
    if _in_general(x, x.dims) or x.rest or x.copies:
        return x.rename(**names)
    assert x.scope is not None
    array, pending, at = x.held, x.pending, x.position("routes", asked)
    for axes, exchanged in _runs(x, x.dims):
        if exchanged:
            array = collectives.exchange(array, axes, at, x.position("batch", asked))
        elif set(axes) <= set(pending):
            array = collectives.sum_scatter(array, axes, at, x.scope.sums)
            pending = tuple(a for a in pending if a not in axes)
        else:
            array = collectives.own_slice(array, axes, at, x.scope.size(axes))
    return make(array, _renamed(x.dims, names), asked=asked, partial=pending)  # type: ignore[no-any-return]


def from_experts(x: Tensor) -> Tensor:
    """The inverse of ``to_experts``."""
    asked = "from_experts"
    check_operand(x, asked, scalars=False)
    names = {new: old for old, new in _NAMES.items() if new in x.names}
    after = _renamed(x.dims, names)
    if _in_general(x, after) or x.rest or x.copies:
        return x.rename(**names)
    array, at = x.held, x.position("experts", asked)
    rest: list[Axes] = [()] * x.ndim
    runs = list(_runs(x, after))
    for i, (axes, exchanged) in reversed(list(enumerate(runs))):
        if exchanged:
            array = collectives.exchange(array, axes, x.position("routed_batch", asked), at)
        elif any(earlier for _, earlier in runs[:i]):  # what is left would not be one stretch of the routes
            array = collectives.gather_equal(array, axes, at)
        else:
            rest[at] = (*axes, *rest[at])
    return make(array, after, asked=asked, rest=tuple(rest), partial=x.pending)  # type: ignore[no-any-return]


def _renamed(these: Dims, names: dict[str, str]) -> Dims:
    return tuple(Dim(names.get(d.name, d.name), d.size) for d in these)


def _in_general(x: Tensor, grouped: Dims) -> bool:
    """Whether this is a rename like any other: there are no slices, routes are split, or the layout has a rule of its
    own for ``routed_batch``."""
    if x.scope is None or x.scope.axes_of("routes"):
        return True
    if not any(d.name == "batch" for d in grouped):
        return False
    experts = x.scope.axes_of("experts")
    return x.scope.axes_of("routed_batch") != tuple(a for a in x.scope.axes_of("batch") if a not in experts)


def _runs(x: Tensor, grouped: Dims) -> Iterator[tuple[Axes, bool]]:
    """The axes of ``experts``, those side by side that go the same way together, and whether they split groups too."""
    assert x.scope is not None
    experts, batch = x.scope.axes_of("experts"), x.scope.axes_of("batch")
    groups = any(d.name == "batch" for d in grouped)

    def way(axis: str) -> tuple[bool, bool]:
        return groups and axis in batch, axis in x.pending

    for (exchanged, _), axes in itertools.groupby(experts, way):
        yield tuple(axes), exchanged
