"""Cumulative reductions: position i of the result reduces positions 0 to i of a dim, or i to the last in reverse.

Along a split dim each device reduces its own slice and sends its total, one value for a whole slice, to the devices
that share the dim out; each then joins what the devices before it had to its slice:

    device        0            1            2
    holds         1  2         3  4         5  6
    its slice     1  3         3  7         5  11
    totals        3            7            11            gathered: one value a device
    before it     0            3            10
    result        1  3         6  10        15 21

The gradient of cumsum is JAX's. Those of the others are stated here: JAX's depend at ties on the shape of its tree of
comparisons, and are NaN behind a leading -inf. The rule: position i has the gradient of the whole reduction of its
stretch. So ``cummax`` shares it equally between the ties met so far, as ``max`` does, and ``cumlogsumexp`` hands it out
as a softmax. They are scans too, of each value together with its tangent. A NaN so far is the greatest and the least,
and shares their gradient with no other value; in ``cumprod`` and ``cumlogsumexp`` it makes gradients NaN. An infinity
may too: which ones can depend on the layout.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .. import collectives
from ..dims import Dims, find, index_of
from ..scope import Axes, current
from ..tensor import make
from .elementwise import astype
from .lowering import axes_of, check_operand, run, wanted

Join = Callable[[Any, Any], Any]
Arrays = tuple[Any, ...]


def cumsum(x: Any, name: str, *, reverse: bool = False) -> Any:
    """The sum of the positions so far along a dim. Booleans are counted in int32; other dtypes are kept."""
    return _cumulative("cumsum", x, name, functools.partial(_joined, lax.cumsum, jnp.add, 0), reverse)


def cumprod(x: Any, name: str, *, reverse: bool = False) -> Any:
    """The product of the positions so far along a dim. Booleans count as int32; other dtypes are kept."""
    return _cumulative("cumprod", x, name, functools.partial(_with_tangents, _PRODUCT), reverse)


def cummax(x: Any, name: str, *, reverse: bool = False) -> Any:
    """The greatest so far along a dim; its gradient is shared equally between the ties met so far."""
    return _cumulative("cummax", x, name, functools.partial(_with_tangents, _GREATEST), reverse)


def cummin(x: Any, name: str, *, reverse: bool = False) -> Any:
    """The least so far along a dim; its gradient is shared equally between the ties met so far."""
    return _cumulative("cummin", x, name, functools.partial(_with_tangents, _LEAST), reverse)


def cumlogsumexp(x: Any, name: str, *, reverse: bool = False) -> Any:
    """The logarithm of the sum of exponentials so far along a dim, without overflow.

    Where all so far is -inf the result is -inf and has no gradient.
    """
    check_operand(x, "cumlogsumexp", scalars=False)
    x = x if jnp.issubdtype(x.dtype, jnp.inexact) else astype(x, jnp.float32)
    return _cumulative("cumlogsumexp", x, name, functools.partial(_with_tangents, _LOGARITHM), reverse)


def _cumulative(asked: str, x: Any, name: str, local: Callable[..., Any], reverse: bool) -> Any:
    check_operand(x, asked, scalars=False)
    at, d = index_of(x.dims, name, asked), find(x.dims, name, asked)
    split = axes_of(d)
    axes = split[1] if split is not None else ()

    def function(array: Any) -> Any:
        counted = array.astype(jnp.int32) if array.dtype == jnp.bool_ else array
        return local(_whole_for_xla(counted, x.dims, at), at, axes, reverse)

    return make(run(function, [x], wanted(asked, x.dims)), x.dims, asked=asked)


def _whole_for_xla(array: Any, these: Dims, at: int) -> Any:
    """The array, whole along the dim under XLA's partitioner, whose own scans along a split dim come out wrong where a
    program has several."""
    scope = current()
    if scope is None or scope.manual or not scope.axes_of(these[at].name):
        return array
    split = scope.split(these, "cumulative")
    return collectives.constrain(array, scope.mesh, (*split[:at], (), *split[at + 1 :]))


def _joined(scan: Callable[..., Any], join: Join, start: Any, array: Any, at: int, axes: Axes, reverse: bool) -> Any:
    """A scan of a device's slice, joined to what the devices before it had. ``start`` changes nothing it joins."""
    local = scan(array, axis=at, reverse=reverse)
    if not axes or not local.shape[at]:
        return local
    totals = _totals(local, at, axes, reverse)
    return join(_before(scan(totals, axis=at, reverse=reverse), start, at, axes, reverse), local)


def _totals(local: Any, at: int, axes: Axes, reverse: bool) -> Any:
    """The last of every device's slice, side by side."""
    last = 0 if reverse else local.shape[at] - 1
    return collectives.gather(lax.slice_in_dim(local, last, last + 1, axis=at), axes, at)


def _before(scanned: Any, start: Any, at: int, axes: Axes, reverse: bool) -> Any:
    """What stands before this device's slice in a scan of the devices' totals; ``start`` on the first device."""
    place, num = collectives.index(axes), scanned.shape[at]
    neighbour = place + 1 if reverse else place - 1
    found = lax.dynamic_slice_in_dim(scanned, jnp.clip(neighbour, 0, num - 1), 1, at)
    first = place == (num - 1 if reverse else 0)
    return jnp.where(first, jnp.asarray(start, scanned.dtype), found)


# Scans of values together with their tangents


@dataclass(frozen=True)
class _Kind:
    """A cumulative reduction, and the same of values that carry their tangents."""

    scan: Callable[..., Any]
    """JAX's own, of values."""
    join: Join
    start: Callable[[Any], Any]
    """For a dtype, the value that changes nothing it is joined to."""
    carry: Callable[[Any, Any], Arrays]
    """From a value and its tangent to what is scanned: the value first."""
    join_carried: Callable[[Arrays, Arrays], Arrays]
    tangent: Callable[[Arrays], Any]
    """From what was scanned to the result's tangent."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 2, 3, 4))
def _with_tangents(kind: _Kind, array: Any, at: int, axes: Axes, reverse: bool) -> Any:
    return _joined(kind.scan, kind.join, kind.start(array.dtype), array, at, axes, reverse)


@_with_tangents.defjvp
def _with_tangents_jvp(
    kind: _Kind, at: int, axes: Axes, reverse: bool, primals: tuple[Any], tangents: tuple[Any]
) -> tuple[Any, Any]:
    carried = kind.carry(*primals, *tangents)
    local = _tree(kind.join_carried, carried, at, reverse)
    if axes and local[0].shape[at]:
        starts = (kind.start(carried[0].dtype), *(0 for _ in carried[1:]))
        totals = tuple(_totals(x, at, axes, reverse) for x in local)
        before = tuple(_others_nothing(x, start, at, axes, reverse) for x, start in zip(totals, starts, strict=True))
        local = kind.join_carried(_whole(kind.join_carried, before, at), local)
    own = collectives.varies_over(primals[0])  # JAX forgets it of arrays without elements
    return collectives.vary(local[0], own), collectives.vary(kind.tangent(local), own)


def _others_nothing(totals: Any, start: Any, at: int, axes: Axes, reverse: bool) -> Any:
    """The totals of the devices before this one; for the others ``start``, through which no NaN of theirs, times a
    gradient of zero, comes back."""
    place = lax.broadcasted_iota(jnp.int32, [n if i == at else 1 for i, n in enumerate(totals.shape)], at)
    own = collectives.index(axes)
    return jnp.where(place > own if reverse else place < own, totals, jnp.asarray(start, totals.dtype))


def _whole(join: Callable[[Arrays, Arrays], Arrays], arrays: Arrays, at: int) -> Arrays:
    """All positions joined to one; the joins do not mind the order."""
    while (size := arrays[0].shape[at]) > 1:
        parts = [
            tuple(lax.slice_in_dim(x, first, stop, axis=at) for x in arrays)
            for first, stop in ((0, size // 2), (size // 2, size // 2 * 2), (size // 2 * 2, size))
        ]
        joined = join(parts[0], parts[1])
        arrays = tuple(jnp.concatenate(pair, at) for pair in zip(joined, parts[2], strict=True)) if size % 2 else joined
    return arrays


def _tree(join: Callable[[Arrays, Arrays], Arrays], arrays: Arrays, at: int, reverse: bool) -> Arrays:
    """Each position joined with those before it, or after it: neighbours are joined, the half as long scanned, and
    what lies between filled in. ``lax.associative_scan`` does the same through arrays of size 0, which XLA's compiler
    of jaxlib 0.11 does not survive as residuals of a ``shard_map``.
    """
    if reverse:
        return tuple(jnp.flip(x, at) for x in _tree(join, tuple(jnp.flip(x, at) for x in arrays), at, False))
    size = arrays[0].shape[at]
    if size < 2:
        return arrays

    def every_second(start: int, stop: int) -> Arrays:
        return tuple(lax.slice_in_dim(x, start, stop, 2, at) for x in arrays)

    odd = _tree(join, join(every_second(0, size - 1), every_second(1, size)), at, False)
    even = tuple(lax.slice_in_dim(x, 0, 1, axis=at) for x in arrays)
    if size > 2:
        before = tuple(lax.slice_in_dim(x, 0, (size - 1) // 2, axis=at) for x in odd)
        filled = join(before, every_second(2, size))
        even = tuple(jnp.concatenate(pair, at) for pair in zip(even, filled, strict=True))
    return tuple(_interleaved(x, y, at) for x, y in zip(even, odd, strict=True))


def _interleaved(even: Any, odd: Any, at: int) -> Any:
    """One of ``even``, one of ``odd``, and so on; ``even`` may have one more."""
    num = odd.shape[at]
    pairs = jnp.stack([lax.slice_in_dim(even, 0, num, axis=at), odd], at + 1)
    joined = pairs.reshape((*odd.shape[:at], 2 * num, *odd.shape[at + 1 :]))
    if even.shape[at] == num:
        return joined
    return jnp.concatenate([joined, lax.slice_in_dim(even, num, num + 1, axis=at)], at)


def _join_products(one: Arrays, two: Arrays) -> Arrays:
    return one[0] * two[0], one[1] * two[0] + one[0] * two[1]


def _join_extremes(pick: Join, one: Arrays, two: Arrays) -> Arrays:
    """Of the ties for the extreme, the tangents are added up and the places counted. NaN ties with NaN."""
    best = pick(one[0], two[0])
    keeps = [((x[0] == best) | (x[0] != x[0])).astype(x[1].dtype) for x in (one, two)]
    added, counted = (keeps[0] * one[i] + keeps[1] * two[i] for i in (1, 2))
    return best, added, counted


def _join_logarithms(one: Arrays, two: Arrays) -> Arrays:
    """The tangents are averaged, weighted by the exponentials."""
    whole = jnp.logaddexp(one[0], two[0])
    nothing = jnp.isneginf(whole)
    shares = [jnp.where(nothing, 0, jnp.exp(x[0] - jnp.where(nothing, 0, whole))) for x in (one, two)]
    return whole, shares[0] * one[1] + shares[1] * two[1]


def _limit(least: bool, dtype: Any) -> Any:
    """The least value of a dtype, or the greatest one."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return -jnp.inf if least else jnp.inf
    return jnp.iinfo(dtype).min if least else jnp.iinfo(dtype).max


def _extreme(scan: Callable[..., Any], pick: Join, beyond: Callable[[Any], Any]) -> _Kind:
    return _Kind(
        scan,
        pick,
        beyond,
        lambda x, t: (x, t, jnp.ones_like(t)),
        functools.partial(_join_extremes, pick),
        lambda carried: carried[1] / carried[2],
    )


_PRODUCT = _Kind(
    lax.cumprod, jnp.multiply, lambda dtype: 1, lambda x, t: (x, t), _join_products, lambda carried: carried[1]
)
_GREATEST = _extreme(lax.cummax, jnp.maximum, functools.partial(_limit, True))
_LEAST = _extreme(lax.cummin, jnp.minimum, functools.partial(_limit, False))
_LOGARITHM = _Kind(
    lax.cumlogsumexp,
    jnp.logaddexp,
    lambda dtype: -jnp.inf,
    lambda x, t: (x, jnp.where(jnp.isneginf(x), 0, t)),
    _join_logarithms,
    lambda carried: carried[1],
)
