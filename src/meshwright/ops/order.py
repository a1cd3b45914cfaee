"""Order along a dim: top_k, sort, argsort.

=============  =====================================  ==================================================
operation      dim not split                          dim split
=============  =====================================  ==================================================
top_k          local                                  k candidates a device are gathered, the best kept
sort, argsort  local                                  the whole dim is gathered; each keeps its slice
=============  =====================================  ==================================================

Equal values keep the order of their positions, on every layout: a device's candidates are in that order, and they are
gathered in the order of the devices.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import collectives
from ..dims import Dim, as_dim, check_unique, find, index_of, show
from ..errors import fail
from ..tensor import make
from .elementwise import stop_gradient
from .lowering import axes_of, check_operand, local_sizes, run, wanted


def top_k(x: Any, name: str, k_dim: Dim) -> tuple[Any, Any]:
    """The greatest values along a dim, in descending order, and their positions.

    Args:
        name: the dim to search; ``k_dim`` takes its place in the results.
        k_dim: its size is how many are wanted: ``values, experts = mw.top_k(scores, "experts", mw.Dim("chosen", 2))``.

    Returns:
        The values, and their positions along ``name`` in the whole tensor (int32). Of equal values the one at the
        lowest position comes first, as in ``jax.lax.top_k``. Gradients flow through the values.

    Raises:
        ValueError: there is no dim ``name``, or ``k_dim`` is longer than it.
    """
    asked = "top_k"
    check_operand(x, asked, scalars=False)
    at, d = index_of(x.dims, name, asked), find(x.dims, name, asked)
    k_dim = as_dim(k_dim, asked)
    if k_dim.size > d.size:
        raise fail(
            f"top_k: {k_dim} values wanted of {d}; {k_dim.size} is more than {d.size}. Tensor: ({show(x.dims)})."
        )
    out = (*x.dims[:at], k_dim, *x.dims[at + 1 :])
    check_unique(out, asked)

    def local(array: Any) -> tuple[Any, Any]:
        found = _candidates(jnp.moveaxis(array, at, -1), d, k_dim.size)
        values, positions = (_own(jnp.moveaxis(a, -1, at), k_dim, at) for a in found)
        return values, positions

    values, positions = run(local, [x], wanted(asked, x.dims, out))
    return make(values, out, asked=asked), make(positions, out, asked=asked)


def _candidates(array: Any, d: Dim, k: int) -> tuple[Any, Any]:
    """The k greatest along the last position, which is ``d``, the same on all devices that share ``d`` out."""
    split = axes_of(d)
    if split is None:
        values, positions = jax.lax.top_k(array, k)
        return values, positions
    _, axes = split
    size = array.shape[-1]
    values, positions = jax.lax.top_k(array, min(k, size))
    positions = positions + collectives.index(axes) * size
    values, positions = (collectives.gather_equal(a, axes, a.ndim - 1) for a in (values, positions))
    values, winners = jax.lax.top_k(values, k)
    return values, jnp.take_along_axis(positions, winners, -1)


def _own(array: Any, d: Dim, at: int) -> Any:
    """This device's slice along ``d`` of an array that all devices hold whole along it."""
    split = axes_of(d)
    if split is None:
        return array
    local_sizes((d,), "order")
    return collectives.own_slice(array, split[1], at, split[0].size(split[1]))


def sort(x: Any, name: str, *, descending: bool = False) -> Any:
    """The values in order along a dim; NaN counts as the greatest.

    Along a split dim this gathers the whole dim on every device that shares it out, and each keeps its slice of the
    result: when a few of the greatest are enough, ``top_k`` moves only those.
    """
    return _ordered("sort", x, name, functools.partial(jnp.sort, descending=descending))


def argsort(x: Any, name: str, *, descending: bool = False) -> Any:
    """The positions (int32) along a dim that put its values in order; along a split dim it gathers, as ``sort`` does.

    It is stable: equal values keep the order of their positions, also when descending.
    """
    check_operand(x, "argsort", scalars=False)
    order = functools.partial(jnp.argsort, descending=descending, stable=True)
    return _ordered("argsort", stop_gradient(x), name, lambda array, axis: order(array, axis=axis).astype(jnp.int32))


def _ordered(asked: str, x: Any, name: str, function: Callable[..., Any]) -> Any:
    check_operand(x, asked, scalars=False)
    at, d = index_of(x.dims, name, asked), find(x.dims, name, asked)
    split = axes_of(d)

    def local(array: Any) -> Any:
        if split is None:
            return function(array, axis=at)
        return _own(function(collectives.gather(array, split[1], at), axis=at), d, at)

    return make(run(local, [x], wanted(asked, x.dims)), x.dims, asked=asked)
