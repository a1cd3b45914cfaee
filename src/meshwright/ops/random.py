"""Random tensors: ``mw.random.normal(key, dims)`` is ``jax.random.normal(key, sizes)`` bit for bit, on every layout.

Nothing is communicated: each device makes its slice of JAX's stream (``stream.py`` says how), and the functions here
only give names to positions. Keys are JAX's: ``mw.random.key(seed)``, or a raw uint32 key. A program splits its keys
as it would on one device, by position, by name (``split(key, dim)`` is a tensor of keys, one for each layer, to scan
over) or by folding numbers in.

    >>> from meshwright.dims import dims
    >>> batch, embed = dims(batch=2, embed=3)
    >>> first, second = split(key(0))
    >>> x = normal(first, (batch, embed))
    >>> bool((x.array == jax.random.normal(first, (2, 3))).all())
    True

Parameters of a distribution (``minval``, ``p``, ``mean`` …) are scalars or tensors, which broadcast by name. ``dims``
may be empty: then the result is a scalar. In a region, where a dim is split, keys must be of threefry (JAX's default).

What is the same to the bit is what is drawn: bits, integers, booleans, and floating values before rounding. Their
formula (a logarithm, an inverse error function) is JAX's on every layout; XLA rounds it alike unless it fuses it with
other work, such as a second draw from the same key.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from .. import collectives
from ..dims import Dim, Dims, Names, as_dims, show, sizes_of, union
from ..errors import fail, fail_type
from ..held import slice_own
from ..tensor import Tensor, make
from .elementwise import add
from .lowering import align, axes_of, check_operand, local_sizes, over_names, positions, run, wanted
from .reduce import argmax
from .stream import as_key, check_sliceable, flat_indices, slice_start, sliced

DimsLike = Dim | Iterable[Dim]


# Keys


def key(seed: Any, *, impl: str | None = None) -> jax.Array:
    """A random key from an integer seed: ``jax.random.key``."""
    return jax.random.key(seed, impl=impl)


def split(key: Any, num: int | DimsLike = 2) -> Any:
    """Several keys from one.

    Args:
        key: a key.
        num: how many, or dims.

    Returns:
        An array of ``num`` keys, as ``jax.random.split`` gives them; for dims, a tensor of typed keys, each device
        making its slice: ``mw.random.split(key, layers)``.
    """
    if isinstance(num, int):
        return jax.random.split(key, num)
    one, these = as_key(key, "split"), as_dims(num, "split")
    start = slice_start(these, "split")
    if start is None:
        return make(jax.random.split(one, local_sizes(these, "split")), these, asked="split")
    check_sliceable(one, these, "split")
    # With the partitionable threefry, splitting is folding in each key's own index.
    _, index = flat_indices(start, local_sizes(these, "split"), sizes_of(these))
    return make(_fold_in_each(one, index), these, asked="split")


def fold_in(key: Any, number: Any) -> Any:
    """A new key from a key and an integer; from a tensor of integers, a tensor of keys."""
    if not isinstance(number, Tensor):
        return jax.random.fold_in(key, number)
    check_operand(number, "fold_in")
    one = as_key(key, "fold_in")
    folded = run(lambda array: _fold_in_each(one, array), [number], wanted("fold_in", number.dims))
    return make(folded, number.dims, asked="fold_in")


def _fold_in_each(key: Any, numbers: Any) -> Any:
    each = functools.partial(jax.random.fold_in, key)
    for _ in range(numbers.ndim):
        each = jax.vmap(each)
    return each(numbers)


# Distributions


def bits(key: Any, dims: DimsLike, dtype: Any = None) -> Any:
    """Uniform random bits: unsigned integers of 8, 16, 32 (when None) or 64 bits. ``jax.random.bits``."""
    return _draw("bits", key, dims, lambda k, shape: jax.random.bits(k, shape, dtype))


def normal(key: Any, dims: DimsLike, dtype: Any = None, *, mean: Any = 0.0, std: Any = 1.0) -> Any:
    """Normal values. ``jax.random.normal``, times ``std``, plus ``mean``.

    Args:
        key: a key.
        dims: the dims of the result.
        dtype: a floating dtype; float32 when None (float64 where JAX's 64-bit types are on).
        mean, std: scalars or tensors, which broadcast by name.
    """

    def sample(k: Any, shape: tuple[int, ...], mean: Any, std: Any) -> Any:
        x = jax.random.normal(k, shape, dtype)
        x = x if _is(std, 1) else x * _as(std, x.dtype)
        return x if _is(mean, 0) else x + _as(mean, x.dtype)

    return _draw("normal", key, dims, sample, mean=mean, std=std)


def truncated_normal(key: Any, dims: DimsLike, lower: Any = -2.0, upper: Any = 2.0, dtype: Any = None) -> Any:
    """Standard normal values between ``lower`` and ``upper``. ``jax.random.truncated_normal``."""

    def sample(k: Any, shape: tuple[int, ...], lower: Any, upper: Any) -> Any:
        return jax.random.truncated_normal(k, lower, upper, shape, dtype)

    return _draw("truncated_normal", key, dims, sample, lower=lower, upper=upper)


def uniform(key: Any, dims: DimsLike, dtype: Any = None, minval: Any = 0.0, maxval: Any = 1.0) -> Any:
    """Uniform values from ``minval`` up to, but not including, ``maxval``. ``jax.random.uniform``."""

    def sample(k: Any, shape: tuple[int, ...], minval: Any, maxval: Any) -> Any:
        return jax.random.uniform(k, shape, dtype, minval, maxval)

    return _draw("uniform", key, dims, sample, minval=minval, maxval=maxval)


def bernoulli(key: Any, dims: DimsLike, p: Any = 0.5, *, mode: str = "low") -> Any:
    """True with probability ``p``. ``jax.random.bernoulli``; ``mode="high"`` draws twice the bits, for small ``p``."""
    return _draw("bernoulli", key, dims, lambda k, shape, p: jax.random.bernoulli(k, p, shape, mode), p=p)


def randint(key: Any, dims: DimsLike, minval: Any, maxval: Any, dtype: Any = None) -> Any:
    """Uniform integers from ``minval`` up to, but not including, ``maxval``. ``jax.random.randint``."""

    def sample(k: Any, shape: tuple[int, ...], minval: Any, maxval: Any) -> Any:
        return jax.random.randint(k, shape, minval, maxval, dtype)

    return _draw("randint", key, dims, sample, minval=minval, maxval=maxval)


def rademacher(key: Any, dims: DimsLike, dtype: Any = None) -> Any:
    """-1 or 1, each half of the time. ``jax.random.rademacher``."""
    return _draw("rademacher", key, dims, lambda k, shape: jax.random.rademacher(k, shape, dtype))


def gumbel(key: Any, dims: DimsLike, dtype: Any = None, *, mode: str | None = None) -> Any:
    """Standard Gumbel values. ``jax.random.gumbel``; ``mode="high"`` draws twice the bits, for the far tail."""
    return _draw("gumbel", key, dims, lambda k, shape: jax.random.gumbel(k, shape, dtype, mode))


def exponential(key: Any, dims: DimsLike, dtype: Any = None) -> Any:
    """Exponential values of mean 1. ``jax.random.exponential``."""
    return _draw("exponential", key, dims, lambda k, shape: jax.random.exponential(k, shape, dtype))


def laplace(key: Any, dims: DimsLike, dtype: Any = None) -> Any:
    """Standard Laplace values. ``jax.random.laplace``."""
    return _draw("laplace", key, dims, lambda k, shape: jax.random.laplace(k, shape, dtype))


def logistic(key: Any, dims: DimsLike, dtype: Any = None) -> Any:
    """Standard logistic values. ``jax.random.logistic``."""
    return _draw("logistic", key, dims, lambda k, shape: jax.random.logistic(k, shape, dtype))


def cauchy(key: Any, dims: DimsLike, dtype: Any = None) -> Any:
    """Standard Cauchy values. ``jax.random.cauchy``."""
    return _draw("cauchy", key, dims, lambda k, shape: jax.random.cauchy(k, shape, dtype))


def _draw(asked: str, key: Any, dims: DimsLike, sample: Callable[..., Any], **parameters: Any) -> Any:
    """A tensor of what ``sample(key, shape, **parameters)`` draws; its parameters are broadcast to ``dims`` by name."""
    one, these = as_key(key, asked), as_dims(dims, asked)
    for name, x in parameters.items():
        check_operand(x, f"{asked}: {name}")
        _check_contained(x, these, asked, name)
    part, shape = sliced(one, these, asked)
    named = {name: x for name, x in parameters.items() if isinstance(x, Tensor)}

    def on_arrays(*arrays: Any) -> Any:
        aligned = {n: align(a, x.dims, these) for (n, x), a in zip(named.items(), arrays, strict=True)}
        return _as_drawn(sample(part, shape, **{**parameters, **aligned}))

    return make(run(on_arrays, list(named.values()), wanted(asked, these)), these, asked=asked)


def _as_drawn(values: Any) -> Any:
    """Floating values keep the bits they were drawn with: compiled together with what uses them, XLA may round the last
    bit otherwise, and otherwise on a slice than on the whole."""
    return jax.lax.optimization_barrier(values) if jnp.issubdtype(values.dtype, jnp.floating) else values


def _check_contained(x: Any, these: Dims, asked: str, name: str) -> None:
    if isinstance(x, Tensor) and len(union([these, x.dims], f"{asked}: {name}")) > len(these):
        raise fail(
            f"{asked}: {name} has dims ({show(x.dims)}) that the result ({show(these)}) lacks.\n"
            f"  Parameters broadcast to the dims that are asked for: add the missing ones to dims."
        )


def _is(parameter: Any, value: int) -> bool:
    return isinstance(parameter, int | float) and parameter == value


def _as(parameter: Any, dtype: Any) -> Any:
    return parameter.astype(dtype) if isinstance(parameter, jax.Array) else parameter


# Choices


def categorical(key: Any, logits: Any, over: Names, *, dims: DimsLike = (), mode: str | None = None) -> Any:
    """A position along a dim of ``logits``, drawn with probabilities ``softmax(logits, over)``.

    Args:
        key: a key.
        logits: a floating tensor: unnormalised logarithms of probabilities.
        over: the name of the dim to draw from; it may be split.
        dims: new dims, which come first: further independent draws.
        mode: as in ``gumbel``.

    Returns:
        int32 positions, with the new dims and those of ``logits`` but ``over``. The same as ``jax.random.categorical``
        draws: the greatest of logits plus Gumbel noise.
    """
    check_operand(logits, "categorical", scalars=False)
    names, new = over_names(logits, over, "categorical"), as_dims(dims, "categorical")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise fail_type(f"categorical: logits are floating, found {logits.dtype} ({show(logits.dims)}).")
    noise = gumbel(key, new + logits.dims, logits.dtype, mode=mode)
    return argmax(add(noise, logits), names)


def permutation(key: Any, x: Dim | Tensor, over: Names | None = None) -> Any:
    """The positions of a dim in random order, or a tensor shuffled along a dim. ``jax.random.permutation``.

    Args:
        key: a key.
        x: a dim, for a tensor of its positions 0 to size - 1; or a tensor.
        over: the name of the dim to shuffle along; all other dims keep together.

    The order is drawn whole on every device (a sort of one integer for each position). Shuffling along a split dim
    gathers the tensor along that dim, from which each device takes its new slice.
    """
    one = as_key(key, "permutation")
    if isinstance(x, Dim):
        return Tensor(jax.random.permutation(one, x.size), (x,))
    check_operand(x, "permutation", scalars=False)
    names = over_names(x, over, "permutation")
    if len(names) != 1:
        raise fail(f"permutation: name the one dim of ({show(x.dims)}) to shuffle along: over={x.names[0]!r}.")
    (where,), split = positions(x, names, "permutation"), axes_of(x.dim(names[0]))
    order = jax.random.permutation(one, x.size(names[0]))

    def local(array: Any) -> Any:
        if split is None:
            return jnp.take(array, order, where, unique_indices=True)
        scope, axes = split
        array = collectives.gather(array, axes, where, scope.sums)
        return jnp.take(array, slice_own(order, scope, (axes,)), where, unique_indices=True)

    return make(run(local, [x], wanted("permutation", x.dims)), x.dims, asked="permutation")
