"""Pooling: the greatest, the mean or the sum of a window that moves over dims.

    max_pool(x, {"rows": 2, "cols": 2})     (batch, rows=32, cols=32, channels) -> (batch, rows=16, cols=16, channels)

Where a dim of the window is split, the halo is exchanged with the neighbours (``strides.py``), and nothing at all where
no window lies across the border of two slices. Padding is never greater than an element and adds nothing to a sum; a
mean is that of the elements that exist, unless the padding is to be counted.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import collectives
from ..dims import Dim, Dims, find, index_of, show
from ..errors import fail, fail_type
from ..tensor import Tensor, make
from .along import along, shared_out, whole
from .lowering import check_operand, run, wanted
from .strides import (
    ByName,
    Padding,
    Reach,
    Stretch,
    make_reaches,
    resized_dims,
    stretch,
    summed_in,
    whole_for_xla,
)


def max_pool(
    x: Tensor,
    over: Mapping[str, int],
    *,
    strides: ByName | None = None,
    dilation: ByName = 1,
    padding: Padding = "VALID",
) -> Any:
    """The greatest element of each window. Its gradient goes to the first of those that attain it, as in JAX.

    Args:
        over: the dims that the window moves over, and its size along each: ``{"rows": 2, "cols": 2}``.
        strides: how far the window moves between outputs: an int for all dims, or by name. Its own size, where none is
            given.
        dilation: how far apart the elements of a window lie, in the same form (otherwise 1).
        padding: ``"VALID"`` leaves out windows that reach beyond the dim; ``"SAME"`` makes size / stride outputs
            (rounded up); or ``(before, after)``, or an int for both; for all dims, or for each by name. What is beyond
            the dim counts as less than everything.

    Returns:
        The dims of ``x``, those of ``over`` with the number of windows for their sizes.

    Raises:
        ValueError: a name is unknown, a number is not positive, the window is wider than the padded dim; or the axes
            that split a dim do not divide its new size.
        TypeError: a number is not a static int, or the dtype has no order.
    """
    reaches, at = _checked(x, over, strides, dilation, padding, "max_pool")
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise fail_type(f"max_pool: {x.dtype} has no order; take its mw.abs or mw.real first.")
    least = _least(x.dtype)
    after = resized_dims(x.dims, reaches)
    want = wanted("max_pool", x.dims, after)

    def local(array: Any) -> Any:
        reached = stretch(_together(array, x.dims, reaches), reaches, at, least)
        return _together(_reduced(reached.array, _placed(reached, reaches, at), least, lax.max), after, reaches)

    return make(run(local, [x], want), after, asked="max_pool")


def sum_pool(
    x: Tensor,
    over: Mapping[str, int],
    *,
    strides: ByName | None = None,
    dilation: ByName = 1,
    padding: Padding = "VALID",
) -> Any:
    """The sum of each window; integers and booleans add up as in ``mw.sum``. The arguments are ``max_pool``'s."""
    reaches, at = _checked(x, over, strides, dilation, padding, "sum_pool")
    dtype = jax.eval_shape(jnp.sum, jax.ShapeDtypeStruct((1,), x.dtype)).dtype
    return _summed(x, reaches, at, dtype, "sum_pool", lambda array: array)


def mean_pool(
    x: Tensor,
    over: Mapping[str, int],
    *,
    strides: ByName | None = None,
    dilation: ByName = 1,
    padding: Padding = "VALID",
    count_include_pad: bool = False,
) -> Any:
    """The mean of each window; of integers in float32.

    Args:
        count_include_pad: whether padding counts as zeros, so that every sum is divided by the size of the window;
            otherwise the mean is that of the elements that exist. (Flax and PyTorch have True, Keras has False.)

    The other arguments are ``max_pool``'s.

    Raises:
        ValueError: as ``max_pool``; or a window lies in the padding alone: nothing to take the mean of.
    """
    reaches, at = _checked(x, over, strides, dilation, padding, "mean_pool")
    dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.dtype(jnp.float32)
    counts = [np.full(r.num_outputs, r.taps) if count_include_pad else r.num_real() for r in reaches]
    for reach, count in zip(reaches, counts, strict=True):
        if not count.all():
            raise fail(
                f"mean_pool: window {int(np.argmin(count))} along {reach.name!r} (size {reach.size}) lies in the "
                f"padding {(reach.before, reach.after)} alone.\n  tensor: ({show(x.dims)})\n"
                f"  Use less padding, or count it: count_include_pad=True."
            )

    def divided(array: Any) -> Any:
        for reach, position, count in zip(reaches, at, counts, strict=True):
            array = array / _own(count.astype(array.dtype), reach, array.ndim, position)
        return array

    return _summed(x, reaches, at, dtype, "mean_pool", divided)


def _checked(
    x: Any, over: Mapping[str, int], strides: ByName | None, dilation: ByName, padding: Padding, asked: str
) -> tuple[tuple[Reach, ...], list[int]]:
    """The reaches, and the positions of their dims."""
    check_operand(x, asked, scalars=False)
    if not isinstance(over, Mapping) or not over:
        raise fail_type(
            f"{asked}: over is {over!r}; give the size of the window along each dim that it moves over: "
            f"{asked}(x, {{{x.names[-1]!r}: 2}})."
        )
    if not (jnp.issubdtype(x.dtype, jnp.number) or jnp.issubdtype(x.dtype, jnp.bool_)):
        raise fail_type(f"{asked}: a tensor of {x.dtype} is not of numbers.")
    taps = {name: _size(x, name, size, asked) for name, size in over.items()}
    given = {} if strides is None else strides
    reaches = make_reaches(x, taps, given, dilation, padding, asked, step=taps)
    return reaches, [index_of(x.dims, reach.name, asked) for reach in reaches]


def _size(x: Tensor, name: str, size: Any, asked: str) -> int:
    find(x.dims, name, asked)
    return whole(size, f"the window along {name!r}", asked)


def _least(dtype: Any) -> Any:
    """What is not greater than any value of a dtype, as a NumPy scalar."""
    if jnp.issubdtype(dtype, jnp.bool_):
        return np.False_
    least = -np.inf if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype).min
    return np.asarray(least, dtype)[()]


def _together(array: Any, these: Dims, reaches: Sequence[Reach]) -> Any:
    """Under XLA's partitioner: overlapping windows on one device. Split, it loses gradients of their maxima where one
    element has several (select-and-scatter, in JAX 0.10 and 0.11)."""
    return whole_for_xla(array, these, [reach.name for reach in reaches if reach.span > reach.stride])


def _summed(
    x: Tensor, reaches: Sequence[Reach], at: Sequence[int], dtype: Any, asked: str, finish: Callable[[Any], Any]
) -> Any:
    """Sums of windows, taken in float32 at least. Linear, so a sum that is still to be taken can wait."""
    after = resized_dims(x.dims, reaches)
    wanted(asked, after)
    wide = summed_in(dtype)
    single = all(r.num_outputs == shared_out(Dim(r.name, r.size))[2] for r in reaches)

    def local(array: Any) -> Any:
        reached = stretch(array, reaches, at)
        placed = _placed(reached, reaches, at)
        sums = _reduced(reached.array.astype(wide), placed, np.zeros((), wide)[()], lax.add)
        # Where a device has one window, XLA turns the gradient's padding into a reshape. If that is of the program's
        # argument, it keeps the argument's sharding, of another rank, and XLA refuses its work (JAX 0.10 and 0.11).
        return finish(lax.optimization_barrier(sums) if single else sums).astype(dtype)

    return along(x, [reach.name for reach in reaches], local, after, asked)


def _own(counts: np.ndarray, reach: Reach, ndim: int, position: int) -> Any:
    """A number for each output along one dim, of which a device keeps its own; a scalar where they are equal."""
    if (counts == counts[0]).all():
        return counts[0]
    _, axes, num = shared_out(Dim(reach.name, reach.size))
    own = collectives.own_slice(jnp.asarray(counts), axes, 0, num) if num > 1 else jnp.asarray(counts)
    return jnp.expand_dims(own, [i for i in range(ndim) if i != position])


Placed = Mapping[int, tuple[Reach, tuple[int, int]]]
"""The reach at a position of an array, and the padding to do there."""


def _placed(reached: Stretch, reaches: Sequence[Reach], at: Sequence[int]) -> Placed:
    return dict(zip(at, zip(reaches, reached.ends, strict=True), strict=True))


def _reduced(array: Any, placed: Placed, nothing: Any, join: Callable[..., Any]) -> Any:
    """The windows of a local array joined, each to one; ``nothing`` is the padding and changes no result."""
    for position, (reach, _) in placed.items():
        if reach.dilation > 1:
            return _by_phases(array, placed, position, nothing, join)
    where = range(array.ndim)
    taps = [placed[i][0].taps if i in placed else 1 for i in where]
    strides = [placed[i][0].stride if i in placed else 1 for i in where]
    ends = [placed[i][1] if i in placed else (0, 0) for i in where]
    return lax.reduce_window(array, nothing, join, taps, strides, ends)


def _by_phases(array: Any, placed: Placed, at: int, nothing: Any, join: Callable[..., Any]) -> Any:
    """One dilated dim, for which JAX's maximum has no gradient.

    At dilation d a window's elements are of one phase, which is every d-th element of the dim. The phases, made a
    position of their own, hold the windows of stride 1 without dilation.
    """
    reach, (before, after) = placed[at]
    dilation, total = reach.dilation, array.shape[at] + before + after
    rest = -total % dilation
    array = lax.pad(array, nothing, [(before, after + rest, 0) if i == at else (0, 0, 0) for i in range(array.ndim)])
    shape = array.shape
    phases = array.reshape(*shape[:at], shape[at] // dilation, dilation, *shape[at + 1 :])
    others = {i + 1 if i > at else i: given for i, given in placed.items() if i != at}
    out = _reduced(phases, {at: (replace(reach, stride=1, dilation=1), (0, 0)), **others}, nothing, join)
    out = out.reshape(*out.shape[:at], out.shape[at] * dilation, *out.shape[at + 2 :])
    last = (total - reach.span) // reach.stride * reach.stride
    return lax.slice_in_dim(out, 0, last + 1, reach.stride, axis=at)
