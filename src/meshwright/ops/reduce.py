"""Reductions: a local reduction, then the matching collective over the axes of the reduced dims.

==============================  ==============================  =======================================
operation                       local                           between devices
==============================  ==============================  =======================================
sum, mean                       sum                             sum, pending until it is used
max, min                        max, min                        all-reduce (max, min; floats as integers)
any, all                        or, and                         all-reduce of int32 (max, min)
prod                            product                         gather of one value a device
var, std                        sums                            two sums
logsumexp, (log_)softmax        max, then sum of exponentials   one max, one sum
argmax, argmin                  best and its global index       gather of one candidate a device
==============================  ==============================  =======================================
"""

import builtins
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import collectives
from ..dims import Names, find, num_elements, show, without
from ..errors import fail, fail_type
from ..scope import Axes, current, current_manual
from ..tensor import Tensor, make, operator
from .elementwise import astype, conj, divide, multiply, real, sqrt, stop_gradient, subtract
from .lowering import axes_of, check_operand, copied, over_names, positions, run, wanted


def _reduce(asked: str, x: Any, over: Names | None, local: Callable[..., Any], join: Callable[..., Any] | None) -> Any:
    """A local reduction over named dims; ``join(array, axes)`` finishes it, None leaves the sum pending."""
    check_operand(x, asked, scalars=False)
    names = over_names(x, over, asked)
    where = positions(x, names, asked)
    wraps = x.pending and not jnp.issubdtype(x.dtype, jnp.inexact)
    if join is None and x.scope is not None and not wraps:
        return _sum_held(asked, x, names, where, local)
    kept, axes = without(x.dims, names), _split_axes(x, names)
    want = wanted(asked, x.dims)
    copies = copied([x], want)
    result = run(lambda array: local(array, where), [x], want.union(copies))
    if join is None:
        return make(result, kept, asked=asked, partial=axes, copies=copies)
    return make(join(result, axes) if axes else result, kept, asked=asked, copies=copies)


def _sum_held(asked: str, x: Tensor, names: Sequence[str], where: Sequence[int], local: Callable[..., Any]) -> Any:
    """A sum of what the devices hold: of addends too (not of integers, whose sums wrap round), and of a tensor at rest,
    which is not gathered for it."""
    rest = x.rest or ((),) * x.ndim
    axes = _split_axes(x, names) + tuple(a for i in where for a in rest[i])
    left = tuple(axes for i, axes in enumerate(rest) if i not in where)
    array = collectives.vary(x.held, wanted(asked, x.dims))
    kept = without(x.dims, names)
    return make(local(array, where), kept, asked=asked, rest=left, partial=x.pending + axes, copies=x.copies)


def _split_axes(x: Tensor, names: Sequence[str]) -> Axes:
    scope = current_manual()
    return tuple(a for name in names for a in scope.axes_of(name)) if scope is not None else ()


@operator("sum")
def sum(x: Any, over: Names | None = None, *, dtype: Any = None) -> Any:
    """The sum over dims: a name, several, or all when None. Integers and booleans add up as in NumPy."""
    if dtype is not None and jnp.dtype(dtype) == jnp.bool_:
        return any(x, over)

    def local(array: Any, where: tuple[int, ...]) -> Any:
        plain = dtype is None and jnp.issubdtype(array.dtype, jnp.inexact)
        return _added(array, where) if plain else jnp.sum(array, where, dtype=dtype)

    return _reduce("sum", x, over, local, None)


def _added(array: Any, where: tuple[int, ...]) -> Any:
    """The sum of floats along positions, computed in float32 at least: ``jnp.sum``, without a trace of its own."""
    total = lax.reduce_sum(lax.convert_element_type(array, _wide(array.dtype)), where)
    return lax.convert_element_type(total, array.dtype)


@operator("mean")
def mean(x: Any, over: Names | None = None, *, dtype: Any = None) -> Any:
    """The mean over dims: a name, several, or all when None. Of integers in float32, of those of 64 bits in float64;
    ``dtype`` is an inexact one."""
    check_operand(x, "mean", scalars=False)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.inexact):
        raise fail_type(f"mean: dtype={jnp.dtype(dtype).name} cannot hold a mean; write mw.mean(x, ...).astype(dtype).")
    count = num_elements(find(x.dims, name, "mean") for name in over_names(x, over, "mean"))

    def local(array: Any, where: tuple[int, ...]) -> Any:
        kind = jnp.dtype(dtype or _inexact(array.dtype))
        wide = _wide(kind)
        total = lax.reduce_sum(lax.convert_element_type(array, wide), where)
        return lax.convert_element_type(lax.div(total, np.asarray(count, wide)), kind)

    return _reduce("mean", x, over, local, None)


def _inexact(dtype: Any) -> Any:
    """The floats that a mean is given in: of integers those of JAX, as wide as the integers and float32 at least."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return dtype
    return jnp.dtype("float64" if jnp.dtype(dtype).itemsize == 8 else "float32")


def _wide(dtype: Any) -> Any:
    """The dtype to sum in on a device: float32 for the floats that are narrower."""
    return dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.dtype(jnp.float32)


@operator("prod")
def prod(x: Any, over: Names | None = None) -> Any:
    """The product over dims: a name, several, or all when None."""
    return _reduce("prod", x, over, jnp.prod, _join_products)


def _join_products(x: Any, axes: Axes) -> Any:
    return jnp.prod(collectives.gather_equal(x[None], axes, 0), 0)


@operator("any")
def any(x: Any, over: Names | None = None) -> Any:
    """Whether any value over the dims is true."""
    return _reduce("any", x, over, jnp.any, lambda a, axes: collectives.all_max(a.astype(jnp.int32), axes) > 0)


@operator("all")
def all(x: Any, over: Names | None = None) -> Any:
    """Whether every value over the dims is true."""
    return _reduce("all", x, over, jnp.all, lambda a, axes: collectives.all_min(a.astype(jnp.int32), axes) > 0)


@operator("max")
def max(x: Any, over: Names | None = None) -> Any:
    """The greatest value over dims, NaN where one is; its gradient is shared equally between ties, as in JAX."""
    return _extreme("max", x, over, jnp.max, collectives.all_max)


@operator("min")
def min(x: Any, over: Names | None = None) -> Any:
    """The least value over dims, NaN where one is; its gradient is shared equally between ties, as in JAX."""
    return _extreme("min", x, over, jnp.min, collectives.all_min)


def _extreme(asked: str, x: Any, over: Names | None, local: Callable[..., Any], join: Callable[..., Any]) -> Any:
    check_operand(x, asked, scalars=False)
    names = over_names(x, over, asked)
    where, axes = positions(x, names, asked), _split_axes(x, names)
    if not names:
        return x
    scope = current()
    if axes:
        function = functools.partial(_joined_extreme, local, join, where, axes)
    elif scope is not None and not scope.manual and builtins.any(scope.axes_of(name) for name in names):
        function = functools.partial(_joined_extreme, local, None, where, ())
    else:
        function = functools.partial(local, axis=where)
    want = wanted(asked, x.dims)
    copies = copied([x], want)
    return make(run(function, [x], want.union(copies)), without(x.dims, names), asked=asked, copies=copies)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _joined_extreme(local: Any, join: Any, where: tuple[int, ...], axes: Axes, array: Any) -> Any:
    """The extreme of a slice joined across devices: by ``join``, or where that is None by XLA's partitioner."""
    left = collectives.varies_over(array) - frozenset(axes)  # JAX forgets it of arrays without elements
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return collectives.vary(join(local(array, where), axes) if join is not None else local(array, where), left)
    beyond = local is jnp.max
    keys = local(_keys(array, beyond), where) if join is None else join(_keys(local(array, where), beyond), axes)
    return collectives.vary(_from_keys(keys, array.dtype), left)


@_joined_extreme.defjvp
def _joined_extreme_jvp(
    local: Any, join: Any, where: tuple[int, ...], axes: Axes, primals: tuple[Any], tangents: tuple[Any]
) -> tuple[Any, Any]:
    """JAX has no derivative for a maximum across devices: the mean of the tangents that attain it."""
    (array,), (tangent,) = primals, tangents
    best = _joined_extreme(local, join, where, axes, array)
    attains = (array == jnp.expand_dims(best, where)).astype(tangent.dtype)
    count, total = jnp.sum(attains, where), jnp.sum(attains * tangent, where)
    if axes:
        count, total = collectives.all_sum(count, axes), collectives.all_sum(total, axes)
    return best, collectives.vary(total / count, collectives.varies_over(best))


def _keys(x: Any, beyond: bool) -> Any:
    """Integers in the order of floats, NaN above them all (``beyond``) or below: backends drop NaN from the maximum of
    floats across devices. A negative float's bits grow with its distance from zero, so those but the sign's turn."""
    wide = x.astype(_wide(x.dtype))
    kind = jnp.iinfo(jnp.int64 if wide.dtype.itemsize == 8 else jnp.int32)
    bits = lax.bitcast_convert_type(wide, kind.dtype)
    keys = jnp.where(bits < 0, bits ^ kind.max, bits)
    return jnp.where(jnp.isnan(wide), kind.max if beyond else kind.min, keys)


def _from_keys(keys: Any, dtype: Any) -> Any:
    """The floats that ``_keys`` made the integers of: what lies beyond infinity is NaN."""
    bits = jnp.where(keys < 0, keys ^ jnp.iinfo(keys.dtype).max, keys)
    return lax.bitcast_convert_type(bits, f"float{8 * keys.dtype.itemsize}").astype(dtype)


@operator("var")
def var(x: Any, over: Names | None = None, *, ddof: int = 0) -> Any:
    """The variance over dims: squared distances from the mean, summed and divided by the count less ``ddof``. It is
    computed in float32 at least."""
    check_operand(x, "var", scalars=False)
    names = over_names(x, over, "var")
    count = num_elements(find(x.dims, name, "var") for name in names)
    if count <= ddof:
        raise fail(f"var: {count} values less ddof={ddof} leaves none to divide by.")
    kind = _inexact(x.dtype)
    wide = astype(x, _wide(kind))
    centred = subtract(wide, mean(wide, names))
    if jnp.issubdtype(kind, jnp.complexfloating):
        return divide(sum(real(multiply(centred, conj(centred))), names), float(count - ddof))
    return astype(divide(sum(multiply(centred, centred), names), float(count - ddof)), kind)


@operator("std")
def std(x: Any, over: Names | None = None, *, ddof: int = 0) -> Any:
    """The standard deviation over dims: the square root of ``var``."""
    return sqrt(var(x, over, ddof=ddof))


def logsumexp(x: Any, over: Names | None = None) -> Any:
    """The logarithm of the sum of exponentials over dims, without overflow."""

    def local(array: Any, where: tuple[int, ...], axes: Axes) -> Any:
        most = _greatest(array, where, axes)
        info = jnp.finfo(array.dtype)
        most = lax.clamp(np.asarray(info.min, most.dtype), most, np.asarray(info.max, most.dtype))
        total = _total(lax.exp(lax.sub(array, most)), where, axes)
        return lax.squeeze(lax.add(lax.log(total), most), where)

    return _normalise("logsumexp", x, over, local, keep=False)


def softmax(x: Any, over: Names) -> Any:
    """exp(x) divided by its sum over dims, without overflow; the dims stay."""

    def local(array: Any, where: tuple[int, ...], axes: Axes) -> Any:
        powers = lax.exp(lax.sub(array, _greatest(array, where, axes)))
        return lax.div(powers, _total(powers, where, axes))

    return _normalise("softmax", x, over, local, keep=True)


def log_softmax(x: Any, over: Names) -> Any:
    """The logarithm of ``softmax``, computed without taking a logarithm of a small number."""

    def local(array: Any, where: tuple[int, ...], axes: Axes) -> Any:
        shifted = lax.sub(array, _greatest(array, where, axes))
        return lax.sub(shifted, lax.log(_total(lax.exp(shifted), where, axes)))

    return _normalise("log_softmax", x, over, local, keep=True)


def _normalise(asked: str, x: Any, over: Names | None, local: Callable[..., Any], keep: bool) -> Any:
    check_operand(x, asked, scalars=False)
    names = over_names(x, over, asked)
    x = astype(x, _inexact(x.dtype))
    where, axes = positions(x, names, asked), _split_axes(x, names)
    want = wanted(asked, x.dims)
    copies = copied([x], want)
    result = run(lambda array: local(array, where, axes), [x], want.union(copies))
    return make(result, x.dims if keep else without(x.dims, names), asked=asked, copies=copies)


def _greatest(array: Any, where: tuple[int, ...], axes: Axes) -> Any:
    """The maximum to shift by. It cancels out of the result, so no gradient flows through it."""
    most = lax.expand_dims(lax.reduce_max(lax.stop_gradient(array), where), where)
    return collectives.all_max(most, axes) if axes else most


def _total(array: Any, where: tuple[int, ...], axes: Axes) -> Any:
    total = lax.expand_dims(_added(array, where), where)
    scope = current_manual()
    return collectives.all_sum(total, axes, scope.sums) if scope is not None and axes else total


def argmax(x: Any, over: Names | None = None) -> Any:
    """The position along a dim of its greatest value, the first one of equals: int32."""
    return _arg("argmax", x, over, jnp.argmax)


def argmin(x: Any, over: Names | None = None) -> Any:
    """The position along a dim of its least value, the first one of equals: int32."""
    return _arg("argmin", x, over, jnp.argmin)


def _arg(asked: str, x: Any, over: Names | None, best: Callable[..., Any]) -> Any:
    check_operand(x, asked, scalars=False)
    names = over_names(x, over, asked)
    if len(names) != 1:
        raise fail(
            f"{asked}: a position is counted along one dim, asked for {len(names)} of ({show(x.dims)}).\n"
            f"  Name one, or merge them first: {asked}(x.merge({names!r}, 'flat'), 'flat')."
        )
    (where,), d = positions(x, names, asked), find(x.dims, names[0], asked)
    split = axes_of(d)

    def local(array: Any) -> Any:
        place = best(array, where).astype(jnp.int32)
        if split is None:
            return place
        scope, axes = split
        value = jnp.take_along_axis(array, jnp.expand_dims(place, where), where)
        place = jnp.expand_dims(place, where) + collectives.index(axes) * (d.size // scope.size(axes))
        values, places = (collectives.gather_equal(a, axes, where) for a in (value, place))
        winner = jnp.expand_dims(best(values, where), where)
        return jnp.squeeze(jnp.take_along_axis(places, winner, where), where)

    want = wanted(asked, x.dims)
    copies = copied([x], want)
    result = run(local, [stop_gradient(x)], want.union(copies))
    return make(result, without(x.dims, names), asked=asked, copies=copies)
