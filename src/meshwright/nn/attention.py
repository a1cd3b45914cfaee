"""Attention with rotary positions and grouped queries.

Dims: ``heads`` counts the key and value heads and ``group`` the query heads that share one of them, so one rule
(``heads:model``) splits queries, keys and values alike.

While tokens look at one another, ``length``, ``heads`` and ``group`` are called ``attention_length``,
``attention_heads`` and ``attention_group``, which lie as they do unless the layout speaks of them (``inherit.py``). So
the layout alone says how attention runs where the length is split:

===================================================  ==========================================================
``length:context``                                   keys and values go round a ring; the renames move nothing
``length:context, attention_heads:context``          the renames are all-to-alls, from the length to heads and back
                                                     (DeepSpeed-Ulysses: Jacobs et al., 2023)
``length:context, attention_group:context``          the same for queries where there are too few key heads; keys
                                                     and values are gathered along the length
===================================================  ==========================================================
"""

import equinox as eqx
import jax

from ..dims import Dim
from ..ops.along import roll
from ..ops.attention import attention
from ..ops.contract import einsum
from ..ops.elementwise import add, cos, less, mod, multiply, negative, sin, where
from ..ops.making import arange
from ..tensor import Tensor
from .linear import Linear

Rotation = tuple[Tensor, Tensor]

_QUERIES = {"length": "attention_length", "heads": "attention_heads", "group": "attention_group"}
_KEYS = {"length": "attention_length", "heads": "attention_heads"}
_BACK = {new: old for old, new in _QUERIES.items()}


class Attention(eqx.Module):
    """Causal self-attention of a sequence, with grouped queries (Ainslie et al., 2023).

    Args:
        embed: the dim of the residual stream.
        heads, group, head_dim: key/value heads, query heads for each, and the size of a head.
        window: how many tokens a token sees, itself among them; None: all before it.
        scale: a factor on the output projection's variance.
    """

    query: Linear
    key: Linear
    value: Linear
    out: Linear
    window: int | None = eqx.field(static=True)

    def __init__(
        self,
        embed: Dim,
        heads: Dim,
        group: Dim,
        head_dim: Dim,
        *,
        key: jax.Array,
        window: int | None = None,
        scale: float = 1.0,
    ) -> None:
        q, k, v, o = jax.random.split(key, 4)
        self.query = Linear(embed, (heads, group, head_dim), key=q)
        self.key = Linear(embed, (heads, head_dim), key=k)
        self.value = Linear(embed, (heads, head_dim), key=v)
        self.out = Linear((heads, group, head_dim), embed, key=o, scale=scale)
        self.window = window

    def __call__(self, x: Tensor, turn: Rotation | None = None, segments: Tensor | None = None) -> Tensor:
        """(batch, length, embed) to the same.

        Args:
            x: the tokens' vectors.
            turn: the ``rotation`` of their positions, the same for every layer; None for no positions.
            segments: integers, (batch, attention_length); tokens attend to earlier ones of their own segment.
        """
        q, k, v = self.query(x), self.key(x), self.value(x)
        if turn is not None:
            q, k = rotary(q, turn), rotary(k, turn)
        q, k, v = q.rename(**_QUERIES), k.rename(**_KEYS), v.rename(**_KEYS)
        out = attention(q, k, v, over="attention_length", causal=True, window=self.window, segments=segments)
        return self.out(out.rename(**_BACK))


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
