"""Slots: tokens laid into places of a fixed number, and what is there brought back to the tokens.

A slot holds one token of its sequence or nothing. ``source`` says which: a position along the tokens' dim, or one
outside of it for nothing.

    to_slots(x(batch, length, embed), source(routes, batch, capacity), "length")   -> (routes, batch, capacity, embed)
    from_slots(y(routes, batch, capacity, embed), source, weights, length)          -> (batch, length, embed)

``from_slots`` adds up, at each token, the slots that hold it, each times its weight. It is linear in what the slots
hold, and what comes out is smaller than what goes in (a token lies in several slots, and slots are empty). So promises
wait until after it: a sum over devices that a contraction has left, and slots that are split over devices although
their name is not, of which each device adds up its own.

==============================================  ===========================================================
split                                           between devices
==============================================  ===========================================================
the tokens' dim, into slots                     the sum over the devices is pending (each has tokens of its own)
the tokens' dim, from slots                     nothing; where slots are held in shares over its axes, a
                                                reduce-scatter
slots, by name or in shares, from slots         the sum over the devices is pending
the tokens' dim and slots by name, on one axis  slots are joined along it, and what they read reduce-scattered
==============================================  ===========================================================
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from .. import collectives
from ..dims import Dim, Dims, find, names_of, without
from ..scope import Axes, Split
from ..summing import PLAIN
from ..tensor import Tensor, make
from .ids import Meeting, all_axes, from_first_held
from .indexing import scattered_back
from .lowering import align, local_sizes, run, wanted

ASKED = "from_slots"


def to_slots(x: Tensor, source: Tensor, name: str) -> Tensor:
    """The tokens that slots hold, zeros where they hold nothing.

    Args:
        x: has the dim ``name``.
        source: int32; for each slot a position along ``name``, its size for none. Dims that ``x`` has are batch dims.

    Returns:
        The dims of ``source``, then those of ``x`` that are left.
    """
    asked = "to_slots"
    over = find(x.dims, name, asked)
    meeting = Meeting(x.dims, (name,), source.dims, joined=_on_both(over, source.dims))

    def local(array: Any, ids: Any) -> Any:
        ids = from_first_held(meeting.join(ids, source.dims), over, asked)
        return scattered_back(meeting.read(array, ids[..., None], 0), meeting)

    out = meeting.picked + meeting.kept
    result = run(local, [x, source], wanted(asked, x.dims, out), linear=True)
    partial = tuple(a for a in all_axes((over,)) if a not in meeting.joined)
    return make(result, out, asked=asked, partial=partial)  # type: ignore[no-any-return]


def from_slots(x: Tensor, source: Tensor, weights: Tensor, over: Dim) -> Tensor:
    """For each token the sum of the slots that hold it, each times its weight.

    Args:
        x: what the slots hold: the dims of ``source``, and more.
        source: int32; for each slot a position along ``over``, its size for none.
        weights: floating, with the dims of ``source``.
        over: the tokens' dim.

    Returns:
        The dims of ``source`` that are neither ``routes`` nor ``capacity``, then ``over``, then those of ``x`` alone.
    """
    groups = without(source.dims, SLOTS)
    kept = without(x.dims, names_of(source.dims))
    out = (*groups, over, *kept)
    how = _How.of(x, over)
    want = wanted(ASKED, x.dims, out).union(how.pending, how.shares, how.joined)
    values = collectives.vary(x.held, want) if how.waits else x.local(want)
    meeting = Meeting(out, (over.name,), source.dims, joined=_on_both(over, source.dims))
    ids, gates = (meeting.join(how.own(t.local(want), t.dims, x), t.dims) for t in (source, weights))
    values = meeting.join(values, x.dims)
    weighted = values * align(gates, source.dims, x.dims).astype(x.dtype)
    updates = align(weighted, x.dims, meeting.picked + meeting.kept)
    shape = local_sizes(out, ASKED)
    if how.joined:
        shape = tuple(over.size if d == over else n for d, n in zip(out, shape, strict=True))
    else:
        ids = from_first_held(ids, over, ASKED)
    blank = collectives.vary(jnp.zeros(shape, x.dtype), want)
    result = meeting.write(lax.scatter_add, blank, ids, updates)
    if how.joined:
        sums = x.scope.sums if x.scope is not None else PLAIN
        result = collectives.sum_scatter(result, how.joined, out.index(over), sums)
    named = tuple(a for a in all_axes(_slots(source.dims)) if a not in meeting.joined)
    return make(result, out, asked=ASKED, partial=how.pending + how.shares + named)  # type: ignore[no-any-return]


SLOTS = ("routes", "capacity")


def _slots(these: Dims) -> Dims:
    return tuple(d for d in these if d.name in SLOTS)


def _on_both(over: Dim, these: Dims) -> Axes:
    """The axes that split both the tokens and, by their names, the slots."""
    across = all_axes((over,))
    return tuple(a for a in all_axes(_slots(these)) if a in across)


@dataclass(frozen=True)
class _How:
    """What waits until the slots have been added up."""

    waits: bool = False
    rest: Split = ()
    """For each dim of what the slots hold, the axes over which devices have shares that its name does not tell."""
    pending: Axes = ()
    """A sum that was still to be taken."""
    shares: Axes = ()
    """The sum of what each device has of the slots."""
    joined: Axes = ()
    """The same over the axes of the tokens: a reduce-scatter."""

    @classmethod
    def of(cls, x: Tensor, over: Dim) -> "_How":
        rest: Split = x.rest or ((),) * x.ndim
        at_slots = all(not axes or d.name in SLOTS for d, axes in zip(x.dims, rest, strict=True))
        if x.scope is None or x.copies or not at_slots:
            return cls()
        held = tuple(a for axes in rest for a in axes)
        across = all_axes((over,))
        joined = across if set(across) & set(held) else ()
        if set(across) & set(x.pending) or not set(joined) <= set(held):
            return cls()
        return cls(True, rest, x.pending, tuple(a for a in held if a not in joined), joined)

    def own(self, array: Any, these: Dims, x: Tensor) -> Any:
        """Of an array for all slots, what belongs to those that this device has."""
        for d, axes in zip(x.dims, self.rest, strict=True) if any(self.rest) else ():
            if axes and x.scope is not None:
                array = collectives.own_slice(array, axes, names_of(these).index(d.name), x.scope.size(axes))
        return array
