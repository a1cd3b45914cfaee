"""split and merge: one dim into several, several into one.

Both are row-major reshapes. In a region a device's slice can be reshaped in place as far as its axes can pass from
the whole dim to its parts, or back: slices are contiguous, so the axes go to the first part until it is split down to
single elements, then to the next. Axes that cannot pass are gathered before the reshape; where the names of the
result are split otherwise, the data moves after it.
"""

import math
from typing import Any

from ..dims import Dim, Dims, Names, as_names, check_unique, find, index_of, num_elements, show
from ..errors import fail
from ..scope import Axes, Scope, Split
from ..tensor import Tensor, make, operator
from .lowering import check_operand
from .relayout import held_split, join_now, moved_to, relayout


@operator("split")
def split(x: Any, name: str, **sizes: int) -> Any:
    """One dim into several, the slowest first: ``x.split("embed", heads=8, head_dim=64)``; one size may be -1.

    Raises:
        ValueError: the sizes do not multiply to the dim's, or a name stands twice.
    """
    check_operand(x, "split", scalars=False)
    at = index_of(x.dims, name, "split")
    parts = _parts(x.dims[at], sizes)
    after = x.dims[:at] + parts + x.dims[at + 1 :]
    check_unique(after, "split")
    return _reshaped(x, after, at, 1, len(parts), "split")


@operator("merge")
def merge(x: Any, names: Names, into: str) -> Any:
    """Several dims into one, the slowest first: ``x.merge(("heads", "head_dim"), "embed")``.

    The dims are brought side by side where the first of them stands.

    Raises:
        ValueError: a name is missing, or ``into`` stands already.
    """
    check_operand(x, "merge", scalars=False)
    listed = as_names(names, "merge")
    if not listed:
        raise fail(f"merge: name the dims of ({show(x.dims)}) to merge into {into!r}.")
    parts = tuple(find(x.dims, n, "merge") for n in listed)
    check_unique(parts, "merge")
    at = index_of(x.dims, listed[0], "merge")
    at -= sum(x.names.index(n) < at for n in listed)
    others = [n for n in x.names if n not in listed]
    x = x.reorder(*others[:at], *listed, *others[at:])
    after = x.dims[:at] + (Dim(into, num_elements(parts)),) + x.dims[at + len(parts) :]
    check_unique(after, "merge")
    return _reshaped(x, after, at, len(parts), 1, "merge")


def _reshaped(x: Tensor, after: Dims, at: int, num_old: int, num_new: int, asked: str) -> Any:
    """Reshape ``num_old`` dims of ``x`` from position ``at`` on into ``num_new``."""
    scope = x.scope
    if scope is None:
        return make(x.raw.reshape([d.size for d in after]), after, asked=asked, role=x.role)
    held, new = held_split(x, asked), scope.split(after, asked)
    array, partial = x.held, x.pending
    kept, between = _passing(held, x.dims, after, at, num_old, num_new, scope)
    if kept != held:
        whole, before = _passing(new, after, x.dims, at, num_new, num_old, scope)
        if whole == new:  # all of the new split can be had before the reshape: move to it first, with one collective
            kept, between = before, new
        array, rest, partial = relayout(array, held, kept, partial, scope)
        end = at + num_old
        array = join_now(array, tuple(axes if at <= i < end else () for i, axes in enumerate(rest)))
        rest = rest[:at] + ((),) * num_new + rest[end:]
        between = tuple(a + b for a, b in zip(between, rest, strict=True))
    array = array.reshape(scope.local_sizes(after, between))
    array, rest, partial = relayout(array, between, new, partial, scope)
    return moved_to(array, after, x, asked, rest, partial)


def _passing(
    held: Split, before: Dims, after: Dims, at: int, num_old: int, num_new: int, scope: Scope
) -> tuple[Split, Split]:
    """The part of a split that a reshape in place allows: as the old dims have it, and as the new dims do."""
    old_dims, new_dims = before[at : at + num_old], after[at : at + num_new]
    flowing = _contiguous(old_dims, held[at : at + num_old], scope)
    passed = _distributed(new_dims, tuple(a for axes in flowing for a in axes), scope)
    flowing = _first(flowing, sum(map(len, passed)))
    kept = held[:at] + flowing + held[at + num_old :]
    return kept, held[:at] + passed + held[at + num_old :]


def _contiguous(these: Dims, split: Split, scope: Scope) -> Split:
    """The axes that cut the merged dim into contiguous slices: all dims before the one cut must be cut to ones."""
    out: list[Axes] = []
    through = True
    for d, axes in zip(these, split, strict=True):
        out.append(axes if through else ())
        through = through and scope.size(axes) == d.size
    return tuple(out)


def _distributed(these: Dims, axes: Axes, scope: Scope) -> Split:
    """How axes that cut a whole dim into contiguous slices cut its parts; as many axes as can."""
    out: list[Axes] = []
    left = axes
    for d in these:
        taken: Axes = ()
        while left and d.size % scope.size((*taken, left[0])) == 0:
            taken, left = (*taken, left[0]), left[1:]
        out.append(taken)
        if scope.size(taken) != d.size:
            left = ()
    return tuple(out)


def _first(split: Split, count: int) -> Split:
    """The first ``count`` axes of a split, dim for dim."""
    out: list[Axes] = []
    for axes in split:
        out.append(axes[:count])
        count -= len(out[-1])
    return tuple(out)


def _parts(whole: Dim, sizes: dict[str, int]) -> Dims:
    unknown = [n for n, s in sizes.items() if s == -1]
    known = math.prod(s for s in sizes.values() if s != -1)
    if len(unknown) > 1 or not sizes:
        raise fail(f"split: give the sizes of the parts of {whole.name!r}; one of them may be -1. Found {sizes}.")
    if unknown and known and whole.size % known == 0:
        sizes = {**sizes, unknown[0]: whole.size // known}
        known = whole.size
    if (unknown and -1 in sizes.values()) or known != whole.size:
        product = " x ".join(f"{n}={s}" for n, s in sizes.items())
        reason = (
            f"{whole.size} is not a multiple of {known}" if -1 in sizes.values() else f"{known} is not {whole.size}"
        )
        raise fail(f"split: {product} does not make {whole.name}={whole.size}: {reason}.")
    return tuple(Dim(n, s) for n, s in sizes.items())
