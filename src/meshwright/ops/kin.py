"""Kin: what ``jax.lax`` has for functions of ``jax.numpy``.

Most functions of ``jax.numpy`` are jitted: inside the trace of a training step each new shape is traced by itself,
only to promote dtypes and ranks that agree already. Where the operands are floats of one dtype, a function's kin in
``jax.lax`` has the same values and the same gradients, and is traced several times as fast.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def applied(function: Callable[..., Any], operands: Sequence[Any]) -> Any:
    """``function(*operands)``, by its kin where nothing is to be promoted. The arrays have one rank, or none."""
    if function is jnp.where:
        return _where(*operands)
    kin = next((k for f, k in KIN if f is function), None)
    dtype = _one_dtype(operands) if kin is not None else None
    if kin is None or dtype is None:
        return function(*operands)
    return kin(*(np.asarray(x, dtype) if _is_number(x) else x for x in operands))


def _one_dtype(operands: Sequence[Any]) -> Any:
    """The floating dtype of all operands, which Python's numbers take on; None where there is no such."""
    arrays = [x for x in operands if not _is_number(x)]
    if not arrays or not all(isinstance(x, jax.Array) and not x.weak_type for x in arrays):
        return None
    dtype = arrays[0].dtype
    return dtype if jnp.issubdtype(dtype, jnp.floating) and all(x.dtype == dtype for x in arrays) else None


def _is_number(x: Any) -> bool:
    return type(x) in (int, float)  # a boolean or a number of NumPy's has a dtype of its own


def _where(condition: Any, x: Any, y: Any) -> Any:
    dtype = _one_dtype([x, y])
    if dtype is None or not isinstance(condition, jax.Array) or condition.dtype != jnp.bool_:
        return jnp.where(condition, x, y)
    shape = jnp.broadcast_shapes(*(np.shape(a) for a in (condition, x, y)))
    cases = (lax.full(shape, a, dtype) if _is_number(a) else _spread(a, shape) for a in (x, y))
    return lax.select(_spread(condition, shape), *cases)


def _spread(array: Any, shape: tuple[int, ...]) -> Any:
    places = range(len(shape) - array.ndim, len(shape))
    return array if array.shape == shape else lax.broadcast_in_dim(array, shape, places)


def _silu(x: Any) -> Any:
    return lax.mul(x, lax.logistic(x))


KIN: tuple[tuple[Callable[..., Any], Callable[..., Any]], ...] = (
    (jnp.add, lax.add),
    (jnp.subtract, lax.sub),
    (jnp.multiply, lax.mul),
    (jnp.divide, lax.div),
    (jnp.negative, lax.neg),
    (jnp.maximum, lax.max),
    (jnp.minimum, lax.min),
    (jnp.exp, lax.exp),
    (jnp.log, lax.log),
    (jnp.sqrt, lax.sqrt),
    (jnp.cos, lax.cos),
    (jnp.sin, lax.sin),
    (jnp.tanh, lax.tanh),
    (jax.nn.sigmoid, lax.logistic),
    (jax.nn.silu, _silu),
)
"""Functions and their kin. (``where`` has ``lax.select``, which broadcasts nothing.)"""
