"""A device's slice of the random stream from which ``jax.random`` draws a whole array.

JAX's threefry, as it is set by default (``jax_threefry_partitionable``), makes each element of an array from the key
and the element's flat index alone: the random bits are a hash of (key, index). A device therefore makes its slice of
the array by hashing the indices of its own elements, and needs nothing of its neighbours.

The code of the distributions stays JAX's own. ``jax.random.normal(key, shape)`` asks its key for bits of that shape;
a *slice key* is a key of another PRNG implementation, which holds the two words of a threefry key and the flat index
at which the slice begins, and which answers with the bits of the slice. So ``jax.random.normal(slice_key, slice
shape)`` is the slice of ``jax.random.normal(key, shape)``, by construction and for every distribution that draws bits
for each element.

    bits of the whole (4, 6), index by index         the second device of a:x=2 starts at index 12
     0  1  2  3  4  5                                 12 13 14 15 16 17
     6  7  8  9 10 11                                 18 19 20 21 22 23
    12 13 14 15 16 17
    18 19 20 21 22 23

Indices are 64 bits in two uint32 words, also where JAX's 64-bit types are switched off.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl, threefry2x32_p

from .. import collectives
from ..dims import Dims, num_elements, show, sizes_of
from ..errors import fail, fail_type
from ..scope import current_manual
from ..tensor import Tensor
from .lowering import local_sizes, split_of

THREEFRY = "threefry2x32"
_WORD = 2**32
Words = tuple[Any, Any]
"""A 64-bit unsigned integer: its high and its low uint32."""


def as_key(key: Any, asked: str) -> Any:
    """A single typed key from a typed or a raw (uint32) one.

    Raises:
        TypeError: it is not a key, or more than one.
    """
    if isinstance(key, Tensor):
        raise fail_type(
            f"{asked}: expected one key, found a tensor of keys ({show(key.dims)}). Take one, or scan over them."
        )
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.ndim == 0:
            return key
        raise fail_type(f"{asked}: expected one key, found an array of keys of shape {key.shape}. Take one of them.")
    if isinstance(key, jax.Array | np.ndarray) and key.dtype == np.uint32 and key.ndim == 1:
        return jax.random.wrap_key_data(jnp.asarray(key))
    kind = f"{key.dtype}{list(key.shape)}" if isinstance(key, jax.Array | np.ndarray) else type(key).__name__
    raise fail_type(f"{asked}: expected a random key, found {kind}. Make one: mw.random.key(seed).")


def sliced(key: Any, these: Dims, asked: str) -> tuple[Any, tuple[int, ...]]:
    """A key and a shape, with which JAX's random functions give this device's slice of a tensor with these dims.

    Where none of the dims is split they are the key itself and the sizes.

    Raises:
        ValueError: a dim is split, and the key is not of JAX's partitionable threefry.
    """
    shape, start = local_sizes(these, asked), slice_start(these, asked)
    if start is None:
        return key, shape
    check_sliceable(key, these, asked)
    if max(shape) > _WORD:
        raise fail(
            f"{asked}: a device's slice {shape} of ({show(these)}) has more than {_WORD} elements along one dim."
        )
    words = collectives.vary(jax.random.key_data(key), collectives.varies_over(start[1]))
    data = jnp.concatenate([words, jnp.stack(start)])
    return jax.random.wrap_key_data(data, impl=implementation(sizes_of(these))), shape


def slice_start(these: Dims, asked: str) -> Words | None:
    """The flat index of the first element of this device's slice; None where each device has the whole."""
    scope = current_manual()
    split = split_of(these, asked)
    if scope is None or not any(split):
        return None
    total: Words = jnp.uint32(0), jnp.uint32(0)
    small = num_elements(these) <= _WORD
    for i, (d, axes) in enumerate(zip(these, split, strict=True)):
        if axes:
            step = d.size // scope.size(axes) * num_elements(these[i + 1 :])
            total = _advance(total, collectives.index(axes).astype(jnp.uint32), step, small)
    return total


def check_sliceable(key: Any, these: Dims, asked: str) -> None:
    """Raise a ``ValueError`` unless each element of an array drawn with ``key`` depends on its own index only."""
    name = jax.random.key_impl(key)
    if name == THREEFRY and jax.config.jax_threefry_partitionable:  # type: ignore[attr-defined]
        return
    what = f"a key of {name!r}" if name != THREEFRY else "jax_threefry_partitionable switched off"
    raise fail(
        f"{asked}: with {what} a device cannot make its slice of ({show(these)}) by itself.\n"
        f"  Use mw.random.key(seed, impl={THREEFRY!r}) with JAX's default settings: then each device makes its slice, "
        f"and the values are those of jax.random on one device. Or draw with dims that the layout does not split."
    )


@functools.lru_cache(maxsize=1024)
def implementation(sizes: tuple[int, ...]) -> Any:
    """The PRNG whose keys give the bits of slices of an array of these sizes.

    The data of a key are four uint32: the two words of a threefry key, then the high and the low word of the flat
    index of the slice's first element. Splitting such a key, and folding numbers into it, does so with the threefry
    key and keeps the place. Bits may be asked for with further leading dims, of which the slice has the whole.
    """

    def random_bits(data: Any, bit_width: int, shape: tuple[int, ...]) -> Any:
        whole = shape[: len(shape) - len(sizes)] + sizes
        high, low = _hash(data, flat_indices((data[2], data[3]), shape, whole))
        kind = jnp.dtype(f"uint{bit_width}")
        if bit_width == 64:
            return (high.astype(kind) << 32) | low.astype(kind)
        return (high ^ low).astype(kind)

    def split(data: Any, shape: tuple[int, ...]) -> Any:
        words = _hash(data, flat_indices((np.uint32(0), np.uint32(0)), shape, shape))
        place = (jnp.broadcast_to(word, shape) for word in (data[2], data[3]))
        return jnp.stack([*words, *place], axis=-1)

    def fold_in(data: Any, number: Any) -> Any:
        return jnp.stack([*_hash(data, (jnp.uint32(0), jnp.asarray(number, jnp.uint32))), data[2], data[3]])

    def seed(_: Any) -> Any:
        raise AssertionError("a slice key is made from a threefry key")

    return define_prng_impl(
        key_shape=(4,), seed=seed, split=split, random_bits=random_bits, fold_in=fold_in,
        name=f"{THREEFRY}, a slice of {list(sizes)}", tag="slice",
    )  # fmt: skip


def _hash(data: Any, count: Words) -> Words:
    high, low = threefry2x32_p.bind(data[0], data[1], *count)
    return high, low


def flat_indices(start: Words, shape: tuple[int, ...], sizes: tuple[int, ...]) -> Words:
    """The row-major index, in an array of ``sizes``, of each element of a slice of ``shape`` from ``start`` on."""
    total: Words = jnp.full(shape, start[0], jnp.uint32), jnp.full(shape, start[1], jnp.uint32)
    stride = 1
    small = math.prod(sizes) <= _WORD
    for i in reversed(range(len(shape))):
        along = tuple(n if j == i else 1 for j, n in enumerate(shape))
        total = _advance(total, jax.lax.iota(jnp.uint32, shape[i]).reshape(along), stride, small)
        stride *= sizes[i]
    return total


def _advance(total: Words, places: Any, stride: int, small: bool) -> Words:
    """``total`` plus ``places`` times ``stride``; ``small`` when one word is enough for every index."""
    if small:
        return total[0], total[1] + places * np.uint32(stride % _WORD)
    high, low = _times(places, stride)
    sum_low = total[1] + low
    return total[0] + high + (sum_low < low).astype(jnp.uint32), sum_low


def _times(x: Any, factor: int) -> Words:
    """A uint32 array times a number below 2**64, in 64 bits: the schoolbook product of halves."""
    most, least = (np.uint32(factor >> shift & (_WORD - 1)) for shift in (32, 0))
    upper, lower = (np.uint32(least >> 16), np.uint32(least & 0xFFFF))
    x_upper, x_lower = x >> 16, x & 0xFFFF
    middle = x_upper * lower + (x_lower * lower >> 16)
    other = x_lower * upper + (middle & 0xFFFF)
    high = x_upper * upper + (middle >> 16) + (other >> 16) + x * most
    return high, x * least
