"""Making tensors from dims: ranges, constants, and the masks that positions give.

A tensor made here is a function of positions, so each device makes its own slice of it and nothing is communicated.
``places`` is the whole idea: which positions of a dim a device holds. A mask over two dims compares the places of one
with the places of the other:

    >>> from meshwright.dims import dims
    >>> queries, keys = dims(queries=2, keys=3)
    >>> causal_mask(queries, keys, start=1).array.tolist()
    [[True, True, False], [True, True, True]]
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import collectives
from ..dims import Dim, as_dim, as_dims, show
from ..errors import fail, fail_type
from ..scope import Axes
from ..tensor import PARAMETER, Tensor, make
from .lowering import axes_of, check_operand, is_scalar, local_sizes


def places(d: Dim, asked: str, joined: Axes = ()) -> jax.Array:
    """The positions along ``d`` that this device holds, an int32 vector; all of them outside a region.

    ``joined`` are axes over which the slices have been gathered already, in the order in which they split ``d``.
    """
    split = axes_of(d)
    if split is None:
        return lax.iota(jnp.int32, d.size)
    scope, axes = split
    stride = local_sizes((d,), asked)[0]
    held = lax.iota(jnp.int32, stride)
    for axis in reversed(axes):
        size = scope.size((axis,))
        if axis in joined:
            held = (lax.iota(jnp.int32, size)[:, None] * stride + held[None, :]).reshape(-1)
        else:
            held = lax.add(held, lax.mul(collectives.index((axis,)), np.int32(stride)))
        stride *= size
    return held


def arange(dim: Dim, start: Any = 0, step: Any = 1, dtype: Any = None) -> Any:
    """``start``, ``start + step``, … along one dim; its size says how many. ``arange(dim)`` is the positions.

    Args:
        start, step: numbers; ``start`` may be a traced scalar, such as the position of a decoder.
        dtype: the result's; that of ``start`` and ``step`` when None, so int32 for ints and float32 for floats.
    """
    dim = as_dim(dim, "arange")
    _check_scalars("arange", start=start, step=step)
    kind = jnp.result_type(start, step) if dtype is None else dtype
    held = lax.convert_element_type(places(dim, "arange"), kind)
    if not _is_number(step, 1):
        held = jnp.asarray(step, kind) * held
    return make(held if _is_number(start, 0) else jnp.asarray(start, kind) + held, (dim,), asked="arange")


def _is_number(x: Any, number: int) -> bool:
    return isinstance(x, int) and x == number


def linspace(dim: Dim, start: Any, stop: Any, *, endpoint: bool = True, dtype: Any = jnp.float32) -> Any:
    """``dim.size`` numbers evenly from ``start`` to ``stop``, which is the last one unless ``endpoint`` is False; of an
    integer dtype, rounded down."""
    dim = as_dim(dim, "linspace")
    _check_scalars("linspace", start=start, stop=stop)
    num_steps = max(dim.size - 1 if endpoint else dim.size, 1)
    real = dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.float32
    share = places(dim, "linspace").astype(real) / num_steps
    held = jnp.asarray(start, real) * (1 - share) + jnp.asarray(stop, real) * share
    return make(held if real is dtype else jnp.floor(held).astype(dtype), (dim,), asked="linspace")


def full(dims: Dim | Iterable[Dim], value: Any, dtype: Any = None) -> Any:
    """One value everywhere, a scalar, which may be traced. ``dtype`` is that of the value when None."""
    these = as_dims(dims, "full")
    _check_scalars("full", value=value)
    return make(jnp.full(local_sizes(these, "full"), value, dtype), these, asked="full")


def zeros(dims: Dim | Iterable[Dim], dtype: Any = jnp.float32) -> Any:
    """Zeros: ``mw.zeros((batch, embed))``."""
    return full(as_dims(dims, "zeros"), 0, dtype)


def ones(dims: Dim | Iterable[Dim], dtype: Any = jnp.float32) -> Any:
    """Ones: ``mw.ones((batch, embed))``."""
    return full(as_dims(dims, "ones"), 1, dtype)


def full_like(x: Any, value: Any, dtype: Any = None) -> Any:
    """One value on the dims of ``x``, in its dtype when ``dtype`` is None. Like a parameter, it lies at rest."""
    check_operand(x, "full_like")
    _check_scalars("full_like", value=value)
    if not isinstance(x, Tensor):
        return jnp.full_like(x, value, dtype)
    kind = x.dtype if dtype is None else dtype
    rest = x.rest if x.role == PARAMETER else None
    sizes = x.raw.shape if rest is not None else local_sizes(x.dims, "full_like")
    return make(jnp.full(sizes, value, kind), x.dims, asked="full_like", role=x.role, rest=rest)


def zeros_like(x: Any, dtype: Any = None) -> Any:
    """Zeros on the dims of ``x``, in its dtype when ``dtype`` is None."""
    return full_like(x, 0, dtype)


def ones_like(x: Any, dtype: Any = None) -> Any:
    """Ones on the dims of ``x``, in its dtype when ``dtype`` is None."""
    return full_like(x, 1, dtype)


def eye(rows: Dim, cols: Dim, k: int = 0, dtype: Any = jnp.float32) -> Any:
    """Ones where the column is the row plus ``k``, zeros elsewhere."""
    return _compare("eye", rows, cols, lambda row, col: (col == row + k).astype(dtype))


def tri(rows: Dim, cols: Dim, k: int = 0) -> Any:
    """Whether the column is at most the row plus ``k``: booleans, true on the diagonal and below it for ``k=0``."""
    return _compare("tri", rows, cols, lambda row, col: col <= row + k)


def causal_mask(queries: Dim, keys: Dim, *, start: Any = 0, window: int | None = None) -> Any:
    """Which keys a query may see: those at its own position and before it. Booleans of dims (queries, keys).

    Args:
        start: the position, among the keys, of the first query; a traced integer when decoding into a cache.
        window: how many keys a query sees at most, the latest ones; all when None.
    """
    _check_scalars("causal_mask", start=start)
    if window is not None and window < 1:
        raise fail(f"causal_mask: window={window}; a query sees at least 1 key, its own. None is no limit.")

    def visible(query: jax.Array, key: jax.Array) -> jax.Array:
        first = query if _is_number(start, 0) else query + jnp.asarray(start, jnp.int32)
        seen = lax.ge(first, key)
        return seen if window is None else seen & (first - key < window)

    return _compare("causal_mask", queries, keys, visible)


def _compare(asked: str, rows: Dim, cols: Dim, function: Any) -> Any:
    """A function of the row and the column of each place of a two-dimensional tensor."""
    these = as_dims((rows, cols), asked)
    local_sizes(these, asked)
    row, col = lax.expand_dims(places(rows, asked), [1]), lax.expand_dims(places(cols, asked), [0])
    return make(function(row, col), these, asked=asked)


def _check_scalars(asked: str, **values: Any) -> None:
    for name, value in values.items():
        if not is_scalar(value):
            kind = f"a tensor ({show(value.dims)})" if isinstance(value, Tensor) else type(value).__name__
            raise fail_type(f"{asked}: {name} must be a scalar, found {kind}.")
