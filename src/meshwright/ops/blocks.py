"""Attention on one device's arrays, block by block: nothing of the square of the length is ever held.

    softmax(q . k, over the keys) . v

A block of keys at a time, what a query has seen is brought up to date: the greatest score, the sum of exponentials and
that of the values (the online softmax; Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018). For
the backward pass the result is kept and the logarithm of the sum, and the scores are computed again (Dao,
"FlashAttention-2", 2023).

Shapes: queries (batch, heads, group, queries, head), keys and values (batch, heads, keys, head). ``group`` counts the
queries that share a key's head. Queries come scaled.
"""

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
_AGAIN = "rematted_computation"
"""What JAX calls operations that it does again for the backward pass: profilers and the plan tell them by it."""


class Tokens(NamedTuple):
    """Which tokens the rows of an array are."""

    places: Array
    """Their positions in the sequence: (tokens,), int32."""
    segments: Array | None
    """(batch, tokens), int32: a query sees keys of its own segment only. None: there is one."""


class Seen(NamedTuple):
    """What queries have seen so far, float32."""

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
        """(batch or 1, 1, 1, queries, keys); None: every query sees every key."""
        parts = []
        if self.causal:
            parts.append((queries.places[:, None] >= keys.places[None])[None])
        if self.window is not None:
            parts.append((jnp.abs(queries.places[:, None] - keys.places[None]) < self.window)[None])
        if queries.segments is not None and keys.segments is not None:
            parts.append(queries.segments[:, :, None] == keys.segments[:, None])
        if not parts:
            return None
        mask = parts[0]
        for part in parts[1:]:
            mask = mask & part
        return mask[:, None, None]

    def reach(self, first: int, last: int, num: int) -> tuple[int, int]:
        """The first key, and the one after the last, that any of the queries from ``first`` to before ``last`` sees,
        where keys and queries are the same ``num`` tokens."""
        window = num if self.window is None else self.window
        return max(0, first - window + 1), last if self.causal else min(num, last + window - 1)


def nothing(q: Array, v: Array) -> Seen:
    """What queries have seen before the first key."""
    zero = jnp.zeros_like(q[..., 0], jnp.float32)
    return Seen(zero + _UNSEEN, zero, jnp.repeat(zero[..., None], v.shape[-1], -1))


def see(seen: Seen, q: Array, k: Array, v: Array, queries: Tokens, keys: Tokens, sight: Sight) -> Seen:
    """What queries have seen after these keys."""
    num = _num_blocks(k.shape[2])
    if num == 1:
        return _see_block(seen, q, k, v, sight.mask(queries, keys))

    def step(seen: Seen, block: Any) -> tuple[Seen, None]:
        k, v, *tokens = block
        return _see_block(seen, q, k, v, sight.mask(queries, Tokens(*tokens))), None

    return lax.scan(step, seen, (*(_cut(x, 2, num) for x in (k, v)), *_cut_tokens(keys, num)))[0]


def see_own(seen: Seen, q: Array, k: Array, v: Array, queries: Tokens, keys: Tokens, sight: Sight) -> Seen:
    """``see`` where queries and keys are the same tokens: parts of the queries, each with the keys within its sight."""
    found = []
    for (first, last), ranges in _parts(k.shape[2], sight):
        mine = Seen(*(x[:, :, :, first:last] for x in seen))
        for begin, end, within in ranges:
            theirs = k[:, :, begin:end], v[:, :, begin:end]
            tokens = _range(queries, first, last), _range(keys, begin, end)
            mine = see(mine, q[:, :, :, first:last], *theirs, *tokens, within)
        found.append(mine)
    return Seen(*(jnp.concatenate(each, 3) for each in zip(*found, strict=True)))


def _see_block(seen: Seen, q: Array, k: Array, v: Array, mask: Array | None) -> Seen:
    scores = _scores(q, k, mask)
    most = jnp.maximum(seen.most, jnp.max(scores, -1))
    weights = _weights(scores, most, mask)
    fade = jnp.exp(seen.most - most)
    added = jnp.einsum("bhgnm,bhme->bhgne", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return Seen(most, seen.total * fade + jnp.sum(weights, -1), seen.weighted * fade[..., None] + added)


def result(seen: Seen, dtype: Any) -> tuple[Array, Array]:
    """What queries get, zeros where they saw no key, and the logarithm of the sum of exponentials."""
    total = jnp.where(seen.total > 0, seen.total, 1.0)
    return (seen.weighted / total[..., None]).astype(dtype), seen.most + jnp.log(total)


def kept(q: Array, out: Array, log_total: Array, gradient: Array) -> Kept:
    """What the backward pass of queries needs."""
    return Kept(
        q, gradient, log_total, jnp.einsum("bhgne,bhgne->bhgn", out, gradient, preferred_element_type="float32")
    )


def see_back(of: Kept, k: Array, v: Array, queries: Tokens, keys: Tokens, sight: Sight) -> tuple[Array, Array, Array]:
    """The gradients of queries, keys and values from these keys alone, float32."""
    num = _num_blocks(k.shape[2])
    if num == 1:
        return _see_block_back(of, k, v, sight.mask(queries, keys))

    def step(to_q: Array, block: Any) -> tuple[Array, tuple[Array, Array]]:
        k, v, *tokens = block
        more, to_k, to_v = _see_block_back(of, k, v, sight.mask(queries, Tokens(*tokens)))
        return to_q + more, (to_k, to_v)

    blocks = (*(_cut(x, 2, num) for x in (k, v)), *_cut_tokens(keys, num))
    to_q, (to_k, to_v) = lax.scan(step, jnp.zeros_like(of.q, jnp.float32), blocks)
    return to_q, _joined(to_k, 2), _joined(to_v, 2)


def see_own_back(
    of: Kept, k: Array, v: Array, queries: Tokens, keys: Tokens, sight: Sight
) -> tuple[Array, Array, Array]:
    """``see_back`` where queries and keys are the same tokens."""
    to_q, to_k, to_v = (jnp.zeros_like(x, jnp.float32) for x in (of.q, k, v))
    for (first, last), ranges in _parts(k.shape[2], sight):
        mine = Kept(*(x[:, :, :, first:last] for x in of))
        for begin, end, within in ranges:
            theirs = k[:, :, begin:end], v[:, :, begin:end]
            tokens = _range(queries, first, last), _range(keys, begin, end)
            more = see_back(mine, *theirs, *tokens, within)
            to_q = to_q.at[:, :, :, first:last].add(more[0])
            to_k, to_v = (x.at[:, :, begin:end].add(y) for x, y in zip((to_k, to_v), more[1:], strict=True))
    return to_q, to_k, to_v


def _range(tokens: Tokens, first: int, last: int) -> Tokens:
    segments = None if tokens.segments is None else tokens.segments[:, first:last]
    return Tokens(tokens.places[first:last], segments)


def _see_block_back(of: Kept, k: Array, v: Array, mask: Array | None) -> tuple[Array, Array, Array]:
    q, gradient = of.q, of.gradient
    with jax.named_scope(_AGAIN):
        weights = _weights(_scores(q, k, mask), of.log_total, mask)
    wide: Any = {"preferred_element_type": jnp.float32}
    to_v = jnp.einsum("bhgnm,bhgne->bhme", weights.astype(gradient.dtype), gradient, **wide)
    slope = jnp.einsum("bhgne,bhme->bhgnm", gradient, v, **wide)
    slope = (weights * (slope - of.drift[..., None])).astype(q.dtype)
    to_q = jnp.einsum("bhgnm,bhmd->bhgnd", slope, k, **wide)
    return to_q, jnp.einsum("bhgnm,bhgnd->bhmd", slope, q, **wide), to_v


def _scores(q: Array, k: Array, mask: Array | None) -> Array:
    scores = jnp.einsum("bhgnd,bhmd->bhgnm", q, k, preferred_element_type=jnp.float32)
    return scores if mask is None else jnp.where(mask, scores, _UNSEEN)


def _weights(scores: Array, less: Array, mask: Array | None) -> Array:
    weights = jnp.exp(scores - less[..., None])
    return weights if mask is None else jnp.where(mask, weights, 0.0)


def _parts(num: int, sight: Sight) -> list[tuple[tuple[int, int], list[tuple[int, int, Sight]]]]:
    """Of ``num`` tokens that look at themselves: ranges of queries, each with ranges of keys and how it sees those."""
    fitting = (n for n in range(MOST_PARTS, 0, -1) if num % n == 0 and num // n >= MOST_KEYS)
    size = num // next(fitting, 1) if sight != Sight() else num
    found = []
    for first in range(0, num, size):
        last = first + size
        begin, end = sight.reach(first, last, num)
        begin, end = begin // size * size, -(-end // size) * size
        if sight == Sight(causal=True) and first:  # all of those before, and half of its own
            found.append(((first, last), [(0, first, Sight()), (first, last, sight)]))
        else:
            found.append(((first, last), [(begin, end, sight)]))
    return found


def _num_blocks(keys: int) -> int:
    if keys <= MOST_KEYS:
        return 1
    return next((keys // n for n in range(MOST_KEYS, LEAST_KEYS - 1, -1) if keys % n == 0), 1)


def _cut(x: Array, dim: int, num: int) -> Array:
    """``num`` pieces along a dim, along a new first one."""
    return jnp.moveaxis(x.reshape(*x.shape[:dim], num, -1, *x.shape[dim + 1 :]), dim, 0)


def _cut_tokens(tokens: Tokens, num: int) -> tuple[Array, Array | None]:
    return _cut(tokens.places, 0, num), None if tokens.segments is None else _cut(tokens.segments, 1, num)


def _joined(x: Array, dim: int) -> Array:
    x = jnp.moveaxis(x, 0, dim)
    return x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2 :])
