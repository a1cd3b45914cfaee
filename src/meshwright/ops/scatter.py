"""Writing at integer tensors: scatter_add and scatter_set, the mirror images of ``take``.

    scatter_add(x(vocab, embed), ids(batch, length), updates(batch, length, embed), "vocab")     -> (vocab, embed)

Names meet as in ``indexing.py``. A device writes what falls into its slice. Ids, and the updates with them, are joined
over the axes that split ``x`` too; over the other axes that split them, the devices hold different updates of the same
places, and what they add is summed.

Several ids may name one place. ``scatter_add`` adds them up. ``scatter_set`` keeps the last one, in row-major order of
the dims of the ids, so that the result is one thing on every layout: each id gets a turn, its place in that order; the
greatest turn at each place is found (an all-reduce where ids are split over axes that ``x`` is not), and only winners
write. A negative id counts from the end; an id outside -size … size-1 writes nothing.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .. import collectives
from ..dims import Dims, find, index_of, show, union, without
from ..errors import fail, fail_type
from ..scope import Axes
from ..tensor import Tensor, make
from .elementwise import add, astype, where
from .ids import Ids, Meeting, all_axes, check_ids, dims_of, from_first_held, from_start
from .lowering import align, check_operand, local_sizes, run, wanted
from .making import places


def scatter_add(x: Any, ids: Ids, updates: Any, name: str) -> Any:
    """``x`` with ``updates`` added at ``ids`` along the dim ``name``; what several ids add to one place accumulates.

    Args:
        ids: an integer tensor or scalar. Its dims that ``x`` has too, other than ``name``, are batch dims.
        updates: a scalar or a tensor of the dims of ``take(x, ids, name)``, of which it may lack some: it is the same
            along those.

    Returns:
        A tensor with the dims of ``x``. An id outside the dim adds nothing.

    Raises:
        ValueError: there is no dim ``name``, or ``updates`` has dims that are in neither ``x`` nor ``ids``.
        TypeError: ``ids`` is not of integers, or ``updates`` has another dtype than ``x``.
    """
    asked = "scatter_add"
    meeting, pending = _target(asked, x, ids, updates, name)
    tensors = [t for t in (ids, updates) if isinstance(t, Tensor)]

    def added(array: Any, held: Sequence[Any]) -> Any:
        positions, values = _arguments(meeting, ids, updates, held, array.dtype)
        return meeting.write(lax.scatter_add, array, positions, values)

    want = wanted(asked, x.dims)
    if not pending:
        return make(run(lambda array, *held: added(array, held), [x, *tensors], want), x.dims, asked=asked)
    want |= frozenset(pending)
    result = run(lambda *held: added(_blank(x.dims, 0, x.dtype, want), held), tensors, want)
    return add(x, make(result, x.dims, asked=asked, partial=pending))


def scatter_set(x: Any, ids: Ids, updates: Any, name: str) -> Any:
    """``x`` with ``updates`` in place of its entries at ``ids`` along the dim ``name``.

    Of several ids that name one place the last one counts, in row-major order of the dims of ``ids``, on every layout.
    Gradients flow to the updates that stand in the result, and to the entries of ``x`` that still do.

    Arguments, errors and the result's dims are those of ``scatter_add``; an id outside the dim writes nothing.
    """
    asked = "scatter_set"
    meeting, pending = _target(asked, x, ids, updates, name)
    if x.dtype == jnp.bool_:
        return astype(scatter_set(astype(x, jnp.int32), ids, astype(updates, jnp.int32), name), jnp.bool_)
    tensors = [t for t in (ids, updates) if isinstance(t, Tensor)]
    marked = tuple(d for d in x.dims if d.name == name or d.name in meeting.batch)
    turns_at = Meeting(marked, meeting.names, meeting.picked, meeting.joined)
    want = wanted(asked, x.dims) | frozenset(pending)

    def local(*held: Any) -> tuple[Any, Any]:
        positions, values = _arguments(meeting, ids, updates, held, x.dtype)
        turns = jnp.broadcast_to(_turns(meeting), positions.shape)
        last = turns_at.write(lax.scatter_max, _blank(marked, -1, jnp.int32, want), positions, turns)
        last = collectives.all_max(last, pending) if pending else last
        wins = turns == turns_at.read(collectives.vary(last, want), positions[..., None], -1)
        positions = jnp.where(wins, positions, find(x.dims, name, asked).size)
        return meeting.write(lax.scatter_add, _blank(x.dims, 0, x.dtype, want), positions, values), last >= 0

    values, written = run(local, tensors, want)
    return where(make(written, marked, asked=asked), make(values, x.dims, asked=asked, partial=pending), x)


def _target(asked: str, x: Any, ids: Ids, updates: Any, name: str) -> tuple[Meeting, Axes]:
    """How ids and updates meet ``x``, and the axes over which what they write is still to be summed."""
    check_operand(x, asked, scalars=False)
    index_of(x.dims, name, asked)
    check_ids(ids, asked)
    check_operand(updates, asked)
    picked = dims_of(ids)
    union([without(picked, (name,)), x.dims], asked)
    meeting = Meeting(x.dims, (name,), picked)
    _check_updates(asked, x, meeting, updates)
    own, taken = all_axes(meeting.own), all_axes(x.dims)
    joined = tuple(a for a in own if a in taken)
    return Meeting(x.dims, (name,), picked, joined), tuple(a for a in own if a not in joined)


def _check_updates(asked: str, x: Tensor, meeting: Meeting, updates: Any) -> None:
    expected = meeting.picked + meeting.kept
    these = dims_of(updates)
    union([expected, these], asked)
    for d in these:
        if d not in expected:
            raise fail(
                f"{asked}: updates ({show(these)}) has the dim {d.name!r}, which is not among those of "
                f"take(x, ids, {meeting.names[0]!r}), ({show(expected)}).\n"
                f"  x: ({show(x.dims)})\n  ids: ({show(meeting.picked)})\n"
                f"  Rename it to one of them, or give ids that dim too."
            )
    kind = updates.dtype if isinstance(updates, Tensor | jax.Array) else jnp.result_type(updates)
    if kind != x.dtype and not _fits(updates, x.dtype):
        raise fail_type(f"{asked}: updates of {kind} for a tensor of {x.dtype}; write updates.astype(x.dtype).")


def _fits(number: Any, dtype: Any) -> bool:
    """Whether a number of Python's has no dtype of its own to lose."""
    if isinstance(number, complex):
        return jnp.issubdtype(dtype, jnp.complexfloating)
    if isinstance(number, float):
        return jnp.issubdtype(dtype, jnp.inexact)
    return isinstance(number, int)


def _arguments(meeting: Meeting, ids: Ids, updates: Any, held: Sequence[Any], dtype: Any) -> tuple[Any, Any]:
    """The positions in this device's slice, and a value for each, with the dims that stay."""
    given = iter(held)
    d = find(meeting.whole, meeting.names[0], "scatter")
    part = meeting.join(next(given), meeting.picked) if isinstance(ids, Tensor) else jnp.asarray(ids)
    positions = from_first_held(from_start(part, d.size), d, "scatter")
    if isinstance(updates, Tensor):
        values = align(meeting.join(next(given), updates.dims), updates.dims, meeting.picked + meeting.kept)
    else:
        values = jnp.asarray(updates, dtype)
    return positions, jnp.broadcast_to(values, positions.shape + local_sizes(meeting.kept, "scatter"))


def _turns(meeting: Meeting) -> Any:
    """For each id its turn to write: its place in row-major order among the ids of its batch position."""
    turns, stride = jnp.zeros((1,) * len(meeting.picked), jnp.int32), 1
    for d in reversed(meeting.own):
        turns = turns + align(places(d, "scatter", meeting.joined_of(d)) * stride, (d,), meeting.picked)
        stride *= d.size
    return turns


def _blank(these: Dims, value: Any, dtype: Any, want: frozenset[str]) -> Any:
    """A device's slice of a constant, which varies over ``want``."""
    return collectives.vary(jnp.full(local_sizes(these, "scatter"), value, dtype), want)
