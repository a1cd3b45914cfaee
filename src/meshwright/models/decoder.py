"""A decoder-only transformer, written for one device.

RMSNorm before each layer, rotary positions, grouped queries, gated feed-forward layers, the layers scanned. How it is
split is said elsewhere, by the layout; the names that a layout can speak of:

====================  ================================================================
``batch``             sequences
``length``            positions
``residual_length``   positions, in the residual stream between layers
``attention_length``  positions, while tokens look at one another
``embed``             the residual stream
``heads``             key/value heads; ``attention_heads`` while tokens look at one another
``group``             query heads for each; ``attention_group`` likewise
``head_dim``          the size of a head
``ff``                the feed-forward layers' width
``vocab``             tokens
``layers``            layers
====================  ================================================================

A name that says where is split as the plain one unless the layout speaks of it (``inherit.py``).
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax

from ..dims import Dim, dims
from ..errors import fail
from ..nn import Attention, Embedding, ExpertMetrics, GatedMLP, Linear, MixtureOfExperts, RMSNorm, rotation
from ..nn.attention import Rotation
from ..ops.contract import einsum
from ..ops.elementwise import add
from ..ops.indexing import one_hot
from ..ops.loop import fold
from ..ops.making import arange, zeros
from ..ops.random import split
from ..ops.transform import vmap
from ..tensor import Tensor
from .mixture import ExpertsConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The sizes of a decoder."""

    vocab: int = 2048
    """Tokens."""
    embed: int = 256
    """Width of the residual stream."""
    layers: int = 4
    """Layers."""
    heads: int = 4
    """Key/value heads."""
    group: int = 1
    """Query heads for each key/value head; 1 is ordinary multi-head attention."""
    head_dim: int = 64
    """Size of a head; even, for the rotary positions turn pairs."""
    ff: int = 1024
    """Width of the feed-forward layers."""
    window: int | None = None
    """Tokens that a token sees, itself among them: a sliding window. None: all before it."""
    experts: ExpertsConfig = dataclasses.field(default_factory=ExpertsConfig)
    """Experts in place of the feed-forward layers; none by default."""
    rope_base: float = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-6
    """Added to the mean square before its root."""
    dtype: str = "float32"
    """Dtype of the activations; parameters are float32 at rest and cast before they are gathered."""
    remat: str | None = None
    """What each layer's backward pass recomputes: a policy of ``mw.remat``, or None to save what JAX saves."""
    unroll: bool = False
    """Whether the scan over layers is unrolled: faster on CPU, longer to compile."""

    def __post_init__(self) -> None:
        for field in ("vocab", "embed", "layers", "heads", "group", "head_dim", "ff"):
            if getattr(self, field) < 1:
                raise fail(f"DecoderConfig: {field} is {getattr(self, field)}; it must be at least 1.")
        if self.window is not None and self.window < 1:
            raise fail(f"DecoderConfig: window is {self.window}; a token sees itself at least, 1. None is no limit.")
        if self.head_dim % 2:
            raise fail(f"DecoderConfig: head_dim is {self.head_dim}; it must be even, for rotary positions turn pairs.")


class Block(eqx.Module):
    """One layer: attention, then the feed-forward layer or experts, each normed before and added after."""

    attention_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: GatedMLP | MixtureOfExperts

    def __init__(self, config: DecoderConfig, *, key: jax.Array) -> None:
        embed, heads, group, head_dim, ff = dims(
            embed=config.embed, heads=config.heads, group=config.group, head_dim=config.head_dim, ff=config.ff
        )
        attention, mlp = jax.random.split(key)
        scale = 0.5 / config.layers
        self.attention_norm = RMSNorm(embed, epsilon=config.norm_eps)
        self.attention = Attention(embed, heads, group, head_dim, key=attention, window=config.window, scale=scale)
        self.mlp_norm = RMSNorm(embed, epsilon=config.norm_eps)
        sparse = config.experts.num_experts > 0
        make = config.experts.make if sparse else GatedMLP
        self.mlp = make(embed, ff, key=mlp, scale=scale)

    def __call__(
        self, x: Tensor, turn: Rotation, segments: Tensor | None = None, ids: Tensor | None = None
    ) -> tuple[Tensor, ExpertMetrics | None]:
        """(batch, residual_length, embed) to the same, and what the experts tell, if there are any; ``turn`` and
        ``segments`` as for ``Attention``, ``ids`` for routing."""
        h = self.attention_norm(x).rename(residual_length="length")
        x = x + self.attention(h, turn, segments).rename(length="residual_length")
        h = self.mlp_norm(x).rename(residual_length="length")
        y, metrics = self.mlp(h, ids=ids) if isinstance(self.mlp, MixtureOfExperts) else (self.mlp(h), None)
        return x + y.rename(length="residual_length"), metrics


class Decoder(eqx.Module):
    """Tokens to logits."""

    embedding: Embedding
    blocks: Block
    norm: RMSNorm
    head: Linear
    config: DecoderConfig = eqx.field(static=True)

    def __init__(self, config: DecoderConfig, *, key: jax.Array) -> None:
        vocab, embed, layers = dims(vocab=config.vocab, embed=config.embed, layers=config.layers)
        table, blocks, head = jax.random.split(key, 3)
        self.embedding = Embedding(vocab, embed, key=table)
        self.blocks = vmap(lambda k: Block(config, key=k), layers)(split(blocks, layers))
        self.norm = RMSNorm(embed, epsilon=config.norm_eps)
        self.head = Linear(embed, vocab, key=head)
        self.config = config

    def __call__(self, ids: Tensor, segments: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Logits (batch, length, vocab) of the next token.

        Args:
            ids: tokens, (batch, length), int32.
            segments: which document each token belongs to, (batch, length); attention stays within one.
            positions: each token's position in its document, (batch, length); 0, 1, 2 … when None.
        """
        return self.with_metrics(ids, segments, positions)[0]

    def with_metrics(
        self, ids: Tensor, segments: Tensor | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, ExpertMetrics | None]:
        """The logits, and what the experts of all layers tell: each of it has a dim ``depth`` for the layers, first.
        None where there are no experts."""
        config = self.config
        x = self.embedding(ids, config.dtype).rename(length="residual_length")
        at = arange(ids.dim("length")) if positions is None else positions
        turn = rotation(at, Dim("head_dim", config.head_dim), config.rope_base)
        if segments is not None:
            segments = segments.rename(length="attention_length")
        depth, told = Dim("depth", config.layers), _blank(config, ids)

        def layer(carry: Any, each: Any) -> Any:
            (x, told), (block, number) = carry, each
            x, metrics = block(x, turn, segments, ids)
            return x, _noted(told, metrics, one_hot(number, depth)) if metrics is not None else None

        numbers = arange(Dim("layers", config.layers)) if told is not None else None
        each = (self.blocks, numbers)
        x, told = fold(layer, (x, told), each, over="layers", remat=config.remat, unroll=config.unroll)
        return self.head(self.norm(x).rename(residual_length="length")), told


def _blank(config: DecoderConfig, ids: Tensor) -> ExpertMetrics | None:
    """Zeros for what the experts of all layers will tell. It goes round with the residual stream, so that layers may
    be the stages of a pipeline, which nothing leaves but at its end."""
    if not config.experts.num_experts:
        return None
    each = (Dim("depth", config.layers), ids.dim("batch"))
    return ExpertMetrics(zeros((*each, Dim("routes", config.experts.num_experts))), *(zeros(each) for _ in range(3)))


def _noted(told: ExpertMetrics, metrics: Iterable[Tensor], here: Tensor) -> ExpertMetrics:
    """``told`` with what one layer tells of a batch, at its place, (depth)."""
    noted = (einsum(here, new, out=("depth", *new.names)) for new in metrics)
    return ExpertMetrics(*(add(old, new) for old, new in zip(told, noted, strict=True)))


def num_parameters(config: DecoderConfig) -> int:
    """How many numbers a decoder of these sizes has."""
    whole = jax.eval_shape(lambda key: Decoder(config, key=key), jax.random.key(0))
    return sum(x.size for x in jax.tree.leaves(whole))
