"""Attention on one device's arrays, block by block: nothing of the square of the length is ever held.

    softmax(q . k, over the keys) . v

A block of keys at a time, what a query has seen is brought up to date: the greatest score, the sum of exponentials and
that of the values (the online softmax; Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018). For
the backward pass the result is kept and the logarithm of the sum, and the scores are computed again (Dao,
"FlashAttention-2", 2023).

Shapes: queries (batch, heads, group, queries, head), keys and values (batch, heads, keys, head). ``group`` counts the
queries that share a key's head. Queries come scaled. Scores and sums are float32, or float64 where an operand is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = Any
MOST_KEYS = 512
"""Keys of a block, at most, where their number has a divisor between this and ``LEAST_KEYS``."""
LEAST_KEYS = 64
MOST_PARTS = 16
"""Parts of the queries, each with the keys that it can see, at most: each is traced by itself."""
_UNSEEN = -1e30
_LAST = 4
"""The last dim of what has the queries' dims."""
_AGAIN = "rematted_computation"
"""What JAX calls operations that it does again for the backward pass: profilers and the plan tell them by it."""


class Tokens(NamedTuple):
    """Which tokens the rows of an array are."""

    places: Array
    """Their positions in the sequence: (tokens,), int32."""
    segments: Array | None
    """(batch, tokens), int32: a query sees keys of its own segment only. None: there is one."""


class Seen(NamedTuple):
    """What queries have seen so far, in the dtype of scores."""

    most: Array
    """The greatest score: (batch, heads, group, queries)."""
    total: Array
    """The sum of exp(score - most)."""
    weighted: Array
    """The values, weighted with that: (batch, heads, group, queries, head)."""


class Kept(NamedTuple):
    """Of queries, for the backward pass."""

    q: Array
    gradient: Array
    """Of the result."""
    log_total: Array
    """The logarithm of the sum of exponentials: (batch, heads, group, queries)."""
    drift: Array
    """The sum over the head of result times gradient."""


@dataclass(frozen=True)
class Sight:
    """Which keys a query sees, by their places."""

    causal: bool = False
    """Those at its own place and before it."""
    window: int | None = None
    """Those less than so many places away."""

    def mask(self, queries: Tokens, keys: Tokens) -> Array | None:
        """(batch or 1, queries, keys); None: every query sees every key."""
        parts = []
        shape = (1, queries.places.size, keys.places.size)
        here, there = (lax.broadcast_in_dim(x.places, shape, (i,)) for i, x in ((1, queries), (2, keys)))
        if self.causal:
            parts.append(lax.ge(here, there))
        if self.window is not None:
            parts.append(lax.lt(lax.abs(lax.sub(here, there)), jnp.int32(self.window)))
        if queries.segments is not None and keys.segments is not None:
            parts.append(queries.segments[:, :, None] == keys.segments[:, None])
        if not parts:
            return None
        mask = parts[0]
        for part in parts[1:]:
            mask = mask & part
        return mask

    def reach(self, first: int, last: int, num: int) -> tuple[int, int]:
        """The first key, and the one after the last, that any of the queries from ``first`` to before ``last`` sees,
        where keys and queries are the same ``num`` tokens."""
        window = num if self.window is None else self.window
        return max(0, first - window + 1), last if self.causal else min(num, last + window - 1)


def scored_in(*dtypes: Any) -> Any:
    """The dtype of scores and sums of operands of these."""
    return jnp.dtype(jnp.float64 if jnp.dtype("float64") in map(jnp.dtype, dtypes) else jnp.float32)


def nothing(q: Array, k: Array, v: Array) -> Seen:
    """What queries have seen before the first key."""
    zero = jnp.zeros_like(q[..., 0], scored_in(q.dtype, k.dtype, v.dtype))
    return Seen(zero + _UNSEEN, zero, jnp.repeat(zero[..., None], v.shape[-1], -1))


Part = tuple[tuple[int, int], list[tuple[range, Sight]]]
"""Of queries: the first one and the one after the last, and which blocks of keys they see, and how."""


class Blocks(NamedTuple):
    """Keys cut into blocks, along a new first dim. Parts of the queries see ranges of these, and loops read them here:
    a copy of each part's own range would take memory with the square of the length."""

    k: Array
    v: Array
    places: Array
    segments: Array | None

    @classmethod
    def of(cls, k: Array, v: Array, keys: Tokens, num: int) -> "Blocks":
        segments = None if keys.segments is None else _cut(keys.segments, 1, num)
        return cls(_cut(k, 2, num), _cut(v, 2, num), _cut(keys.places, 0, num), segments)

    def at(self, i: Any) -> tuple[Array, Array, Tokens]:
        """The keys and values of a block, and which tokens they are."""
        index = lax.index_in_dim if isinstance(i, int) else lax.dynamic_index_in_dim
        k, v, places, segments = (None if x is None else index(x, i, 0, False) for x in self)
        return k, v, Tokens(places, segments)


def see(seen: Seen | None, q: Array, k: Array, v: Array, queries: Tokens, keys: Tokens, sight: Sight) -> Seen:
    """What queries have seen after these keys. (None: they have seen nothing yet.)"""
    num = _num_blocks(k.shape[2])
    return _see_blocks(seen, q, Blocks.of(k, v, keys, num), range(num), queries, sight)


def see_own(seen: Seen | None, q: Array, k: Array, v: Array, queries: Tokens, keys: Tokens, sight: Sight) -> Seen:
    """``see`` where queries and keys are the same tokens: parts of the queries, each with the keys within its sight."""
    found, parts, num = [], *_parts(k.shape[2], sight)
    blocks = Blocks.of(k, v, keys, num)
    if seen is None and not q.size:
        seen = nothing(q, k, v)
    for (first, last), ranges in parts:
        mine, asking, tokens = _rows(seen, first, last), _rows(q, first, last), _range(queries, first, last)
        for which, within in ranges:
            mine = _see_blocks(mine, asking, blocks, which, tokens, within)
        found.append(mine)
    return jax.tree.map(lambda *each: _concatenated(each, 3), *found)  # type: ignore[no-any-return]


def _see_blocks(seen: Seen | None, q: Array, blocks: Blocks, which: range, queries: Tokens, sight: Sight) -> Seen:
    def step(seen: Seen | None, i: Any) -> tuple[Seen, None]:
        k, v, keys = blocks.at(i)
        return _see_block(seen, q, k, v, sight.mask(queries, keys)), None

    if seen is None and len(which) > 1:
        seen = nothing(q, blocks.k, blocks.v)
    return _over(which, step, seen)  # type: ignore[no-any-return]


def _over(which: range, step: Any, state: Any) -> Any:
    """``step`` for each of these, in a loop where there are several."""
    if len(which) == 1:
        return step(state, which[0])[0]
    return lax.scan(step, state, jnp.arange(which.start, which.stop, dtype=jnp.int32))[0]


def _see_block(seen: Seen | None, q: Array, k: Array, v: Array, mask: Array | None) -> Seen:
    wide = scored_in(q.dtype, k.dtype, v.dtype)
    scores = _scores(q, k, mask, wide)
    most = lax.reduce_max(scores, (_LAST,))
    if seen is not None:
        most = lax.max(seen.most, most)
    weights = _weights(scores, most, mask)
    total = lax.reduce_sum(weights, (_LAST,))
    weighted = _product(lax.convert_element_type(weights, v.dtype), v, (_LAST,), (2,), wide)
    if seen is None:
        return Seen(most, total, weighted)
    fade = lax.exp(lax.sub(seen.most, most))
    faded = lax.mul(seen.weighted, _along(fade, seen.weighted))
    return Seen(most, lax.add(lax.mul(seen.total, fade), total), lax.add(faded, weighted))


def result(seen: Seen, dtype: Any) -> tuple[Array, Array]:
    """What queries get, zeros where they saw no key, and the logarithm of the sum of exponentials."""
    total = lax.select(lax.gt(seen.total, 0.0), seen.total, lax.full_like(seen.total, 1.0))
    mean = lax.div(seen.weighted, _along(total, seen.weighted))
    return lax.convert_element_type(mean, dtype), lax.add(seen.most, lax.log(total))


def kept(q: Array, out: Array, log_total: Array, gradient: Array) -> Kept:
    """What the backward pass of queries needs."""
    q, gradient = lax.optimization_barrier((q, gradient))  # else XLA takes scores from a forward pass that is near
    each = ((_LAST,), (_LAST,)), ((0, 1, 2, 3), (0, 1, 2, 3))
    drift = lax.dot_general(out, gradient, each, preferred_element_type=log_total.dtype)
    return Kept(q, gradient, log_total, drift)


Gradients = tuple[Array, Array, Array]
"""Of queries, keys and values, in the dtype of scores."""


def see_back(of: Kept, k: Array, v: Array, queries: Tokens, keys: Tokens, sight: Sight) -> Gradients:
    """The gradients of queries, keys and values from these keys alone."""
    num = _num_blocks(k.shape[2])
    return _back(of, k, v, queries, keys, [((0, of.q.shape[3]), [(range(num), sight)])], num)


def see_own_back(of: Kept, k: Array, v: Array, queries: Tokens, keys: Tokens, sight: Sight) -> Gradients:
    """``see_back`` where queries and keys are the same tokens."""
    return _back(of, k, v, queries, keys, *_parts(k.shape[2], sight))


def _back(of: Kept, k: Array, v: Array, queries: Tokens, keys: Tokens, parts: list[Part], num: int) -> Gradients:
    blocks = Blocks.of(k, v, keys, num)
    wide = of.log_total.dtype
    to_blocks = lax.full_like(blocks.k, 0, wide), lax.full_like(blocks.v, 0, wide)
    found = []
    for (first, last), ranges in parts:
        mine, tokens = _rows(of, first, last), _range(queries, first, last)
        state: Any = lax.full_like(mine.q, 0, wide), to_blocks
        for which, within in ranges:
            state = _see_blocks_back(state, mine, blocks, which, tokens, within)
        to_q, to_blocks = state
        found.append(to_q)
    to_k, to_v = (_joined(x, 2) for x in to_blocks)
    return _concatenated(found, 3), to_k, to_v


def _see_blocks_back(state: Any, of: Kept, blocks: Blocks, which: range, queries: Tokens, sight: Sight) -> Any:
    def step(state: Any, i: Any) -> tuple[Any, None]:
        to_q, to_blocks = state
        k, v, keys = blocks.at(i)
        more, *to_block = _see_block_back(of, k, v, sight.mask(queries, keys))
        return (lax.add(to_q, more), tuple(_added_at(i, *pair) for pair in zip(to_blocks, to_block, strict=True))), None

    return _over(which, step, state)


def _added_at(i: Any, blocks: Array, more: Array) -> Array:
    if blocks.shape[0] == 1:
        return lax.add(blocks, lax.expand_dims(more, (0,)))
    return blocks.at[i].add(more)


def _rows(x: Any, first: int, last: int) -> Any:
    """Of queries, or of what is held of each: those from ``first`` to before ``last``."""
    return jax.tree.map(lambda each: lax.slice_in_dim(each, first, last, axis=3), x)


def _range(tokens: Tokens, first: int, last: int) -> Tokens:
    segments = None if tokens.segments is None else lax.slice_in_dim(tokens.segments, first, last, axis=1)
    return Tokens(lax.slice_in_dim(tokens.places, first, last), segments)


def _concatenated(found: Sequence[Array], dim: int) -> Array:
    return found[0] if len(found) == 1 else lax.concatenate(found, dim)


def _see_block_back(of: Kept, k: Array, v: Array, mask: Array | None) -> tuple[Array, Array, Array]:
    q, gradient = of.q, of.gradient
    wide = of.log_total.dtype
    with jax.named_scope(_AGAIN):
        weights = _weights(_scores(q, k, mask, wide), of.log_total, mask)
    to_v = _product(lax.convert_element_type(weights, gradient.dtype), gradient, (2, 3), (2, 3), wide)
    slope = _product(gradient, v, (_LAST,), (3,), wide)
    slope = lax.mul(weights, lax.sub(slope, _along(of.drift, slope)))
    slope = lax.convert_element_type(slope, q.dtype)
    to_q = _product(slope, k, (_LAST,), (2,), wide)
    return to_q, _product(slope, q, (2, 3), (2, 3), wide), to_v


# These are traced once for each part of each attention, so they speak in jax.lax (see kin.py).


def _product(a: Array, b: Array, summed_a: tuple[int, ...], summed_b: tuple[int, ...], dtype: Any) -> Array:
    """For each of the batch and each head: the product along these dims of each, summed in this dtype."""
    common = jnp.promote_types(a.dtype, b.dtype)
    a, b = (lax.convert_element_type(x, common) for x in (a, b))
    return lax.dot_general(a, b, ((summed_a, summed_b), ((0, 1), (0, 1))), preferred_element_type=dtype)


def _along(x: Array, like: Array) -> Array:
    """(batch, heads, group, queries), repeated along the last dim of ``like``."""
    return lax.broadcast_in_dim(x, like.shape, (0, 1, 2, 3))


def _scores(q: Array, k: Array, mask: Array | None, dtype: Any) -> Array:
    return _masked(mask, _product(q, k, (_LAST,), (3,), dtype), _UNSEEN)


def _weights(scores: Array, less: Array, mask: Array | None) -> Array:
    return _masked(mask, lax.exp(lax.sub(scores, _along(less, scores))), 0.0)


def _masked(mask: Array | None, x: Array, otherwise: float) -> Array:
    if mask is None:
        return x
    seen = lax.broadcast_in_dim(mask, x.shape, (0, 3, 4))
    return lax.select(seen, x, lax.full_like(x, otherwise))


def _parts(num: int, sight: Sight) -> tuple[list[Part], int]:
    """Of ``num`` tokens that look at themselves: the parts of the queries, and the number of blocks of the keys."""
    if not num:
        return [((0, 0), [])], 1
    fitting = (n for n in range(MOST_PARTS, 0, -1) if num % n == 0 and num // n >= MOST_KEYS)
    size = num // next(fitting, 1) if sight != Sight() else num
    each = _num_blocks(size)
    found: list[Part] = []
    for first in range(0, num, size):
        part = first // size
        begin, end = sight.reach(first, first + size, num)
        ranges = [(begin // size, -(-end // size), sight)]
        if sight == Sight(causal=True) and first:  # all of those before, and half of its own
            ranges = [(0, part, Sight()), (part, part + 1, sight)]
        found.append(((first, first + size), [(range(a * each, b * each), how) for a, b, how in ranges]))
    return found, num // size * each


def _num_blocks(keys: int) -> int:
    if keys <= MOST_KEYS:
        return 1
    return next((keys // n for n in range(MOST_KEYS, LEAST_KEYS - 1, -1) if keys % n == 0), 1)


def _cut(x: Array, dim: int, num: int) -> Array:
    """``num`` pieces along a dim, along a new first one."""
    x = lax.reshape(x, (*x.shape[:dim], num, x.shape[dim] // num, *x.shape[dim + 1 :]))
    return lax.transpose(x, (dim, *(d for d in range(x.ndim) if d != dim)))


def _joined(x: Array, dim: int) -> Array:
    x = lax.transpose(x, (*range(1, dim + 1), 0, *range(dim + 1, x.ndim)))
    return lax.reshape(x, (*x.shape[:dim], x.shape[dim] * x.shape[dim + 1], *x.shape[dim + 2 :]))
