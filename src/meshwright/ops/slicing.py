"""slice and index: fewer positions of a dim, or one.

=====================  =========================================================================
operation, dim split   between devices
=====================  =========================================================================
slice                  permutes of what a device lacks of its share (``window.py``)
slice, start traced    permutes of all that the share may need, then a local slice; where that
                       is more than the result, a reduce-scatter of the result's size
index by an integer    the owner's value: a sum of one position, pending until it is used
index by a slice       as slice; only the elements that a step reads are sent
index by a tensor      as ``take``
=====================  =========================================================================

A slice keeps the dim's name, and so its axes, which must divide its new size.
"""

import builtins
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .. import collectives
from ..dims import Dim, find, index_of, show, without
from ..errors import fail, fail_type
from ..scope import Axes
from ..summing import PLAIN
from ..tensor import OPS, PARAMETER, Tensor, operator
from .along import along, read, resized, shared_out, whole
from .lowering import axes_of, check_operand, wanted
from .window import window


@operator("slice")
def slice(x: Any, name: str, start: Any, size: int) -> Any:
    """``size`` elements of the dim ``name`` from ``start`` on.

    Args:
        start: an int, or a traced integer scalar, the same on every device. As with ``jax.lax.dynamic_slice``, a traced
            start below zero counts from the end, and one too near the end is moved so that ``size`` elements are left.
        size: a static int.

    Returns:
        The tensor with that dim of that size, which the axes that split the dim must divide.

    Raises:
        ValueError: there is no such dim, or a static start and size reach beyond it.
        TypeError: start or size is not an integer.
    """
    check_operand(x, "slice", scalars=False)
    old = find(x.dims, name, "slice")
    size = whole(size, "the size", "slice")
    traced = isinstance(start, jax.Array)
    first = 0 if traced else whole(start, "the start", "slice")
    if first < 0 or size < 0 or first + size > old.size:
        raise fail(
            f"slice: {size} elements from {first} on are not all in the dim {name!r} of size {old.size}.\n"
            f"  tensor: ({show(x.dims)})\n"
            f"  The start must be at least 0, and start plus size at most {old.size}. "
            f"To go beyond the ends, pad first: mw.pad(x, {name}=(before, after))."
        )
    return _slice_from(x, name, start, size) if traced else read(x, name, first, size, "slice")


def _slice_from(x: Tensor, name: str, start: Any, size: int) -> Any:
    """A slice from a traced start."""
    at = index_of(x.dims, name, "slice")
    old = x.dims[at]
    after = resized(x.dims, at, size)
    wanted("slice", after)
    first = jnp.minimum(_from_start(start, old, "slice"), old.size - size)
    scope, axes, num = shared_out(old)
    spare, length = old.size - size, size // num

    def local(array: Any) -> Any:
        if num == 1:
            return lax.dynamic_slice_in_dim(array, first, size, at)
        if spare + length > size:
            return _scattered(array, axes, at, first, size)
        every = window(array, scope, axes, at, [k * length for k in range(num)], length + spare)
        return lax.dynamic_slice_in_dim(every, first, length, at)

    return along(x, (name,), local, after, "slice")


def _scattered(array: Any, axes: Axes, at: int, first: Any, size: int) -> Any:
    """Each device puts what it has of the slice at its place among zeros; their sum is shared out at once."""
    block = array.shape[at]
    count = min(size, block)
    own = collectives.index(axes) * block
    begin = jnp.clip(first - own, 0, block - count)
    part = lax.dynamic_slice_in_dim(array, begin, count, at)
    part = part.astype(jnp.uint8) if array.dtype == bool else part
    room = jnp.zeros([size + 2 * count if i == at else n for i, n in enumerate(array.shape)], part.dtype)
    place = jnp.clip(own + begin - first, -count, size) + count
    placed = lax.dynamic_update_slice_in_dim(room, part, place, at)
    placed = lax.slice_in_dim(placed, count, count + size, axis=at)
    return collectives.sum_scatter(placed, axes, at).astype(array.dtype)


def _from_start(position: Any, d: Dim, asked: str) -> Any:
    """A traced position as an int32 counted from the start of ``d`` and kept within it."""
    if position.ndim or not jnp.issubdtype(position.dtype, jnp.integer):
        raise fail_type(
            f"{asked}: a position along {d.name!r} is an integer scalar, found {position.dtype}{list(position.shape)}. "
            f"To read many positions, name their dim: mw.take(x, mw.Tensor(positions, 'picked'), {d.name!r})."
        )
    position = position.astype(jnp.int32)
    return jnp.clip(jnp.where(position < 0, position + d.size, position), 0, max(d.size - 1, 0))


@operator("index")
def index(x: Any, where: Any) -> Any:
    """``x[{"length": 3}]``: positions by name.

    Each value is one of

    - an int, negative from the end: the dim disappears. A traced integer scalar too; it is kept within the dim;
    - a Python slice of static ints, with any step: the dim keeps its name;
    - an integer tensor: its dims take the place of the dim, as ``mw.take`` has it.

    Several names are indexed independently; the integers and slices first, then the tensors in the order given.

    Raises:
        ValueError: a name is unknown, or a static position is not in its dim.
        TypeError: the index is not a mapping of names, or a value is none of these.
    """
    check_operand(x, "index", scalars=False)
    if not isinstance(where, Mapping):
        raise fail_type(
            f"index: a tensor ({show(x.dims)}) is indexed by names, found {where!r}: write x[{{{x.names[0]!r}: 3}}]."
        )
    for name in where:
        index_of(x.dims, name, "index")
    spans = {n: v for n, v in where.items() if isinstance(v, builtins.slice)}
    tensors = {n: v for n, v in where.items() if isinstance(v, Tensor)}
    picks = {n: _position(x, n, v) for n, v in where.items() if n not in spans and n not in tensors}
    for name, ids in tensors.items():
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise fail_type(
                f"index: the tensor ({show(ids.dims)}) for {name!r} is of {ids.dtype}; positions are integers. "
                "The size of what a mask leaves is not known when tracing: use mw.where(mask, x, 0)."
            )
    split = {n: v for n, v in picks.items() if axes_of(x.dim(n)) is not None}
    x = _picked(x, {n: v for n, v in picks.items() if n not in split})
    for name, span in spans.items():
        x = _spanned(x, name, span)
    x = _picked(x, split)
    for name, ids in tensors.items():
        x = OPS["take"](x, ids, name)
    return x


def _position(x: Tensor, name: str, value: Any) -> Any:
    d = x.dim(name)
    if isinstance(value, jax.Array):
        return _from_start(value, d, "index")
    instead = f" x[{{{name!r}: …}}] takes an int, a slice or an integer tensor: mw.Tensor(positions, 'picked')."
    position = whole(value, f"the position along {name!r}", "index", instead)
    if not -d.size <= position < d.size:
        raise fail(f"index: there is no position {position} along {name!r} of size {d.size} in ({show(x.dims)}).")
    return position % d.size


def _spanned(x: Tensor, name: str, span: Any) -> Any:
    """The positions that a Python slice names."""
    instead = f" For a traced start, write x.slice({name!r}, start, size)."
    for what, value in (("start", span.start), ("stop", span.stop), ("step", span.step)):
        if value is not None:
            whole(value, f"the {what} of the slice of {name!r}", "index", instead)
    if span.step == 0:
        raise fail(f"index: the step of the slice of {name!r} is 0.")
    taken = range(*span.indices(x.size(name)))
    return read(x, name, taken.start, len(taken), "index", step=taken.step)


def _picked(x: Any, positions: Mapping[str, Any]) -> Any:
    """One position of each of these dims, which disappear. Along a split dim only the owner has it: the others add
    zeros. The sum waits for its use, but a parameter's slice is summed at once and stays a parameter."""
    if not positions:
        return x
    after = without(x.dims, tuple(positions))
    places = [(index_of(x.dims, n, "index"), *shared_out(x.dim(n))[1:], positions[n]) for n in positions]
    axes = tuple(axis for _, axes, _, _ in places for axis in axes)
    sums = x.scope.sums if x.scope is not None else PLAIN
    at_once = bool(axes) and (x.role == PARAMETER or bool(x.copies) or not jnp.issubdtype(x.dtype, jnp.number))

    def local(array: Any) -> Any:
        return collectives.all_sum(owned(array), axes, sums).astype(array.dtype) if at_once else owned(array)

    def owned(array: Any) -> Any:
        mine: Any = None
        for at, over, num, position in sorted(places, key=lambda p: -p[0]):
            if num > 1:
                block = array.shape[at]
                here = collectives.index(over) == position // block
                mine, position = here if mine is None else mine & here, position % block
            static = isinstance(position, int)
            array = (lax.index_in_dim if static else lax.dynamic_index_in_dim)(array, position, at, keepdims=False)
        array = array.astype(jnp.uint8) if at_once and array.dtype == bool else array
        return array if mine is None else jnp.where(mine, array, jnp.zeros_like(array))

    return along(x, tuple(positions), local, after, "index", () if at_once else axes)
