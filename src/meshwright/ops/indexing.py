"""Reading by integer tensors: take, gather, take_along, one_hot (writing is in ``scatter.py``).

An index is a tensor of integers, the *ids*, along a named dim. The names say what happens: a dim that ids and tensor
share (other than the indexed one) is a batch dim, each of its positions indexed by itself; the other dims of ids are
new and come first; the other dims of the tensor stay.

    take(table(vocab, embed), ids(batch, length), "vocab")     -> (batch, length, embed)
    take(logits(batch, vocab), labels(batch), "vocab")         -> (batch)

When the indexed dim is split, a device looks up the ids that fall into its slice, zeros stand for the others, and the
sum over the devices is pending in the result. Where ids are split over some of the same axes, their slices are joined
first (ids are small) and the sum is a reduce-scatter back to their split. Gradients are JAX's: a scatter-add into each
device's slice.

A negative id counts from the end, as in NumPy. **An id outside -size … size-1** reads NaN (of integers the least
value, of unsigned ones the greatest, of booleans True) and gives no gradient, as with ``jnp.take``: the same on every
layout, and a mistake does not stay unseen.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import collectives
from ..dims import Dim, as_dim, as_dims, find, index_of, show, union, without
from ..errors import fail, fail_type
from ..scope import Axes, current_manual
from ..summing import PLAIN
from ..tensor import Tensor, make, operator
from .elementwise import astype
from .ids import Ids, Meeting, all_axes, as_int32, check_ids, dims_of, from_first_held, from_start
from .lowering import align, check_operand, run, wanted
from .making import places


@operator("take")
def take(table: Any, ids: Ids, name: str) -> Any:
    """The entries of ``table`` at ``ids`` along the dim ``name``.

    Args:
        table: a tensor; a parameter at rest is gathered for the use.
        ids: an integer tensor or scalar. Its dims that ``table`` has too, other than ``name``, are batch dims.

    Returns:
        A tensor with the dims of ``ids``, then those of ``table`` that are neither ``name`` nor batch dims. An id
        outside the dim reads NaN and gives no gradient (see the module's text).

    Raises:
        ValueError: there is no dim ``name``, or a batch dim has two sizes.
        TypeError: ``ids`` is not of integers.
    """
    return _gathered("take", table, {name: ids})


def gather(x: Any, /, **ids_by_name: Ids) -> Any:
    """The entries of ``x`` at several ids at once: ``mw.gather(image, row=rows, col=cols)``.

    The ids broadcast to each other by name, and are read together: where rows and cols share a dim, element for
    element; along a dim that one lacks, each with each. Dims that ids and ``x`` share, other than the indexed ones,
    are batch dims. An id outside its dim reads NaN, as in ``take``.

    Returns:
        A tensor with the dims of the ids, each once, then those of ``x`` that are neither indexed nor batch dims.

    Raises:
        ValueError: an indexed name is unknown, or one dim has two sizes.
        TypeError: ids are not of integers.
    """
    if not ids_by_name:
        raise fail_type("gather: no ids. Write mw.gather(x, row=rows, col=cols), a keyword for each indexed dim.")
    return _gathered("gather", x, ids_by_name)


def take_along(x: Any, ids: Tensor, name: str) -> Any:
    """Entries picked along a dim, position for position: ``numpy.take_along_axis`` by name.

    ``ids`` has the dim ``name``, of any size, and may have others of ``x``, along which each position picks for itself:
    ``mw.take_along(x, mw.argsort(x, "length"), "length")`` sorts.

    Returns:
        A tensor with the dims of ``x`` in its order; ``name`` has the size it has in ``ids``.

    Raises:
        ValueError: ``ids`` lacks the dim ``name``, or has one that ``x`` lacks (``take`` is for those).
    """
    asked = "take_along"
    for operand in (x, ids):
        check_operand(operand, asked, scalars=False)
        index_of(operand.dims, name, asked)
    for d in ids.dims:
        if d.name not in x.names:
            raise fail(
                f"take_along: ids ({show(ids.dims)}) has the dim {d.name!r}, which the tensor ({show(x.dims)}) lacks.\n"
                f"  For a result with new dims, write mw.take(x, ids, {name!r})."
            )
    return _gathered(asked, x, {name: ids}).reorder(*x.names)


def one_hot(ids: Ids, dim: Dim, dtype: Any = jnp.float32) -> Any:
    """Ones at the ids along a new last dim, zeros elsewhere; an id outside 0 … size-1 gives zeros only.

    Each device makes its slice: nothing is communicated.
    """
    check_ids(ids, "one_hot")
    dim = as_dim(dim, "one_hot")
    these = dims_of(ids)
    out = as_dims((*these, dim), "one_hot")

    def local(held: Any) -> Any:
        here = lax.expand_dims(places(dim, "one_hot"), range(len(these)))
        return (as_int32(held, dim.size)[..., None] == here).astype(dtype)

    want = wanted("one_hot", out)
    result = run(local, [ids], want) if isinstance(ids, Tensor) else local(jnp.asarray(ids))
    return make(result, out, asked="one_hot")


def _gathered(asked: str, x: Any, ids_by_name: dict[str, Ids]) -> Any:
    check_operand(x, asked, scalars=False)
    for name, ids in ids_by_name.items():
        index_of(x.dims, name, asked)
        check_ids(ids, asked)
    tensors = [ids for ids in ids_by_name.values() if isinstance(ids, Tensor)]
    names, picked = tuple(ids_by_name), union([ids.dims for ids in tensors], asked)
    union([without(picked, names), x.dims], asked)
    split = all_axes(find(x.dims, name, asked) for name in names)
    if split and x.dtype == jnp.bool_:
        return astype(_gathered(asked, astype(x, jnp.int32), ids_by_name), jnp.bool_)
    own = all_axes(Meeting(x.dims, names, picked).own)
    meeting = Meeting(x.dims, names, picked, joined=tuple(a for a in split if a in own))
    out = picked + meeting.kept

    def local(array: Any, *held: Any) -> Any:
        given, columns = iter(held), []
        for name, ids in ids_by_name.items():
            these = dims_of(ids)
            part = meeting.join(next(given), these) if isinstance(ids, Tensor) else jnp.asarray(ids)
            columns.append(align(from_start(part, x.size(name)), these, picked))
        return _looked_up(array, columns, meeting, split)

    result = run(local, [x, *tensors], wanted(asked, x.dims, out), linear=True)
    return make(result, out, asked=asked, partial=tuple(a for a in split if a not in meeting.joined))


def _looked_up(array: Any, columns: list[Any], meeting: Meeting, split: Axes) -> Any:
    """The entries at positions in the whole tensor, of which this device holds a slice."""
    shape = jnp.broadcast_shapes(*(c.shape for c in columns))
    columns = [c if c.shape == shape else jnp.broadcast_to(c, shape) for c in columns]
    indexed = [find(meeting.whole, name, "gather") for name in meeting.names]
    held = (from_first_held(c, d, "gather") for c, d in zip(columns, indexed, strict=True))
    here = [lax.expand_dims(c, [c.ndim]) for c in held]
    positions = lax.concatenate(here, here[0].ndim - 1) if len(here) > 1 else here[0]
    missing = _missing(array.dtype)
    if not split:
        return meeting.read(array, positions, missing)
    rows = meeting.read(array, positions, 0)
    outside = functools.reduce(lax.bitwise_or, map(_is_outside, columns, indexed))
    if not jnp.issubdtype(rows.dtype, jnp.inexact):  # NaN may be added up; of these one device alone says it
        outside = lax.bitwise_and(outside, lax.eq(collectives.index(split), np.int32(0)))
    said = lax.select(outside, lax.full(shape, missing, rows.dtype), lax.full(shape, 0, rows.dtype))
    return scattered_back(lax.add(rows, lax.expand_dims(said, range(said.ndim, rows.ndim))), meeting)


def _is_outside(positions: Any, d: Dim) -> Any:
    """Whether positions lie outside ``d``: as an unsigned number, one below zero is beyond every size."""
    return lax.ge(lax.bitcast_convert_type(positions, jnp.uint32), np.uint32(d.size))


def scattered_back(rows: Any, meeting: Meeting) -> Any:
    """The sum over the axes along which ids were joined, each device keeping the rows of its own ids."""
    scope = current_manual()
    for i, d in enumerate(meeting.picked):
        if axes := meeting.joined_of(d):
            rows = collectives.sum_scatter(rows, axes, i, scope.sums if scope is not None else PLAIN)
    return rows


def _missing(dtype: Any) -> Any:
    """What an id outside reads."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.nan
    if dtype == jnp.bool_:
        return True
    info = jnp.iinfo(dtype)
    return int(info.min if info.min < 0 else info.max)
