"""Attention with rotary positions and grouped queries.

Dims: ``heads`` counts the key and value heads and ``group`` the query heads that share one of them, so one rule
(``heads:model``) splits queries, keys and values alike. ``length`` is the queries' length, ``kv_length`` the keys'.
"""

import math

import equinox as eqx
import jax

from ..dims import Dim
from ..ops.along import roll
from ..ops.contract import einsum
from ..ops.elementwise import add, cos, equal, less, logical_and, mod, multiply, negative, sin, where
from ..ops.making import arange, causal_mask
from ..ops.reduce import softmax
from ..tensor import Tensor
from .linear import Linear

Rotation = tuple[Tensor, Tensor]

_MASKED = -1e30


class Attention(eqx.Module):
    """Causal self-attention of a sequence, with grouped queries (Ainslie et al., 2023).

    Args:
        embed: the dim of the residual stream.
        heads, group, head_dim: key/value heads, query heads for each, and the size of a head.
        scale: a factor on the output projection's variance.
    """

    query: Linear
    key: Linear
    value: Linear
    out: Linear

    def __init__(
        self,
        embed: Dim,
        heads: Dim,
        group: Dim,
        head_dim: Dim,
        *,
        key: jax.Array,
        scale: float = 1.0,
    ) -> None:
        q, k, v, o = jax.random.split(key, 4)
        self.query = Linear(embed, (heads, group, head_dim), key=q)
        self.key = Linear(embed, (heads, head_dim), key=k)
        self.value = Linear(embed, (heads, head_dim), key=v)
        self.out = Linear((heads, group, head_dim), embed, key=o, scale=scale)

    def __call__(self, x: Tensor, turn: Rotation | None = None, segments: Tensor | None = None) -> Tensor:
        """(batch, length, embed) to the same.

        Args:
            x: the tokens' vectors.
            turn: the ``rotation`` of their positions, the same for every layer; None for no positions.
            segments: integers; tokens attend to earlier ones of their own segment.
        """
        length = x.dim("length")
        q, k, v = self.query(x), self.key(x), self.value(x)
        if turn is not None:
            q, k = rotary(q, turn), rotary(k, turn)
        k, v = k.rename(length="kv_length"), v.rename(length="kv_length")
        mask = causal_mask(length, k.dim("kv_length"))
        if segments is not None:
            mask = _same(segments, segments.rename(length="kv_length"), mask)
        return self.out(attend(q, k, v, mask))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q . k / sqrt(head_dim)) . v over ``kv_length``, the softmax in float32."""
    q = q * (1.0 / math.sqrt(q.size("head_dim")))
    names = tuple(n for n in q.names if n not in ("length", "head_dim"))
    scores = einsum(q, k, out=(*names, "length", "kv_length"), preferred_element_type="float32")
    weights = softmax(where(mask, scores, _MASKED), "kv_length").astype(v.dtype)
    return einsum(weights, v, out=q.names)


def _same(queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """The mask where query and key are of one segment as well."""
    both = mask.broadcast(queries.dim("batch"))
    return logical_and(both, equal(queries.broadcast(keys.dim("kv_length")), keys.broadcast(queries.dim("length"))))


def rotation(positions: Tensor, head_dim: Dim, base: float) -> Rotation:
    """The cosines and signed sines by which ``rotary`` turns heads at these positions (Su et al., 2021).

    The two halves of a head are the two coordinates of its pairs; pair i turns by position * base^(-2i / head_dim).
    """
    half = head_dim.size // 2
    place = arange(head_dim)
    frequency = base ** (mod(place, half).astype("float32") * (-1.0 / half))
    angles = einsum(positions.astype("float32"), frequency, out=(*positions.names, "head_dim"))
    sine = sin(angles)
    return cos(angles), where(less(place, half), negative(sine), sine)


def rotary(x: Tensor, by: Rotation) -> Tensor:
    """The heads of ``x``, each pair of coordinates turned by its angle."""
    cosine, sine = (t.astype(x.dtype) for t in by)
    return add(multiply(x, cosine), multiply(roll(x, head_dim=x.size("head_dim") // 2), sine))
