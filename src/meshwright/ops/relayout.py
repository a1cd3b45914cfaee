"""Moving a tensor from one split to another: the one place where a change of names becomes communication.

A dim is split over a sequence of axes, the slowest first. Between the old and the new sequence of one dim, a common
beginning stays where it is; what follows is joined or cut:

=============================================  ============================
an axis leaves one dim and ends on another     one all-to-all
an axis leaves                                 all-gather
an axis arrives                                slice (each keeps its own)
an axis arrives along which sums are pending   reduce-scatter
=============================================  ============================

Gathers are left to the first use of the result, whose kind decides the gradient (``rest`` in ``tensor.py``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .. import collectives
from ..dims import Dims
from ..scope import Axes, Scope, Split
from ..tensor import Tensor, make, told

Scattered = Callable[[Axes, int], Any]


def relayout(
    array: Any, old: Split, new: Split, partial: Axes, scope: Scope, scattered: Scattered | None = None
) -> tuple[Any, Split, Axes]:
    """Move a device's slice towards the split ``new``.

    Args:
        array: the slice, split as ``old``, with sums pending over the axes ``partial``.
        old, new: the axes of each dim, dim for dim.
        scattered: another way to a sum of ``array`` that ends split, where there is one (``Tensor.scattered``).

    Returns:
        The slice, the axes of each dim still to be gathered (always the last ones of that dim), and the axes whose
        sums are still pending.
    """
    state = _State(array, [list(axes) for axes in old], list(partial), scope, scattered, array)
    for i, axes in enumerate(new):
        state.arrive(i, axes)
    for i, axes in enumerate(new):
        if _common(state.have[i], axes) < len(axes):
            state.join(i, _common(state.have[i], axes))
            state.arrive(i, axes)
        for j, wanted in enumerate(new):
            if _common(state.have[i], axes) == len(axes):
                break
            leaving = state.have[j][_common(state.have[j], wanted) :]
            if any(axis in leaving for axis in axes):
                state.join(j, _common(state.have[j], wanted))
                state.arrive(i, axes)
    rest = tuple(tuple(have[len(axes) :]) for have, axes in zip(state.have, new, strict=True))
    return state.array, rest, tuple(state.pending)


def move(x: Tensor, after: Dims, asked: str) -> Any:
    """``x`` under the dims ``after``, dim for dim of the same sizes, split as these are.

    The move begins with what is held: axes at rest are axes over which a dim is split, and go where it goes.
    """
    scope = here(x)
    split = scope.split(after, asked)
    with told(after):
        array, rest, partial = relayout(x.held, held_split(x, asked), split, x.pending, scope, x.scattered)
    return moved_to(array, after, x, asked, rest, partial)


def moved_to(array: Any, after: Dims, x: Tensor, asked: str, rest: Split, partial: Axes) -> Any:
    """The tensor that a move of ``x`` ends with. It is no longer a copy along an axis that splits it now."""
    splits = {axis for axes in here(x).split(after, asked) for axis in axes}
    copies = tuple(axis for axis in x.copies if axis not in splits)
    return make(array, after, asked=asked, role=x.role, rest=rest, partial=partial, copies=copies)


def here(x: Tensor) -> Scope:
    assert x.scope is not None
    return x.scope


def held_split(x: Tensor, asked: str) -> Split:
    """The axes over which each dim of ``x`` is split as it is held: those of its name, then those at rest."""
    compute = here(x).split(x.dims, asked)
    return tuple(a + b for a, b in zip(compute, x.rest or ((),) * x.ndim, strict=True))


def _common(have: Sequence[str], want: Sequence[str]) -> int:
    """How long the common beginning of two sequences of axes is."""
    kept = 0
    while kept < min(len(have), len(want)) and have[kept] == want[kept]:
        kept += 1
    return kept


@dataclass
class _State:
    """A slice on its way: what each dim is split over now, and the sums still pending."""

    array: Any
    have: list[list[str]]
    pending: list[str]
    scope: Scope
    scattered: Scattered | None
    first: Any
    """The array as it set out."""

    def arrive(self, i: int, want: Axes) -> None:
        """Add axes to dim ``i``, as many at a time as one collective can bring."""
        while len(self.have[i]) < len(want) and _common(self.have[i], want) == len(self.have[i]):
            missing = want[len(self.have[i]) :]
            taken = next((n for n in range(len(missing), 0, -1) if self.bring(i, missing[:n])), 0)
            if not taken:
                return

    def bring(self, i: int, axes: Axes) -> bool:
        """Split dim ``i`` over ``axes`` too, if one collective (or a slice) does it."""
        if all(axis in self.pending for axis in axes):
            other = self.scattered(axes, i) if self.scattered is not None and self.array is self.first else None
            self.array = collectives.sum_scatter(self.array, axes, i, self.scope.sums) if other is None else other
            self.pending = [axis for axis in self.pending if axis not in axes]
        elif any(axis in self.pending for axis in axes):
            return False
        elif (source := self._ending_with(axes)) is not None:
            self.array = collectives.exchange(self.array, axes, i, source)
            del self.have[source][-len(axes) :]
        elif any(axis in have for have in self.have for axis in axes):
            return False
        else:
            self.array = collectives.own_slice(self.array, axes, i, self.scope.size(axes))
        self.have[i].extend(axes)
        return True

    def _ending_with(self, axes: Axes) -> int | None:
        return next((j for j, have in enumerate(self.have) if tuple(have[-len(axes) :]) == axes), None)

    def join(self, i: int, kept: int) -> None:
        """Gather the axes of dim ``i`` beyond the first ``kept``."""
        leaving = tuple(self.have[i][kept:])
        if leaving:
            self.array = collectives.gather_equal(self.array, leaving, i)
            del self.have[i][kept:]


def join_now(array: Any, rest: Split) -> Any:
    """Keep the promise of a gather at once."""
    for i, axes in enumerate(rest):
        if axes:
            array = collectives.gather_equal(array, axes, i)
    return array
