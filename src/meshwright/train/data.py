"""Batches: a stream of documents cut into windows.

Documents stand one after the other, each with the token between documents before it:

    tokens     <end> a b c <end> d e <end> f g h i
    windows    |-------------|
                           |-------------|           of length 4: the last token of one is the first of the next
    positions  0     1 2 3   0 1 ...                 from the start of the document, or of the window within it
    segments   0     0 0 0   1 1 ...

A window has ``length`` tokens and, for each, the one to predict, so every token of the stream but the first is
predicted once in an epoch. The last token of a document predicts that it ends; the token between documents knows
nothing of the document before it, for attention stays within a segment. Fewer than ``length`` tokens at the end of the
stream fill no window and are not used.

Which windows make a batch is a function of the seed and the step alone: a run can stop and go on, and every process
knows what the others read.

Dims: batch, length.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from ..dims import Dim, Dims, sizes_of
from ..errors import fail
from ..layout import Layout
from ..mesh import Mesh
from ..placing import shard
from ..tensor import Tensor


class Batch(NamedTuple):
    """Sequences of tokens. Every field is (batch, length), int32 but for the weights."""

    ids: Tensor
    """The tokens."""
    targets: Tensor
    """The token that follows each."""
    segments: Tensor
    """Which document a token belongs to, counted in its sequence."""
    positions: Tensor
    """A token's place in its document, counted from where that begins in its sequence."""
    weights: Tensor | None = None
    """Each token's share in the loss, float32: those of the whole batch add up to 1, a place without a token has 0.
    None: all tokens count alike."""

    @classmethod
    def shapes(cls, dims: Dims, weighted: bool = False) -> "Batch":
        """A batch without values, for tracing; with weights where it is ``weighted``."""
        dtypes = [jnp.int32] * 4 + [jnp.float32] * weighted
        shapes = [jax.ShapeDtypeStruct(sizes_of(dims), dtype) for dtype in dtypes]
        return cls(*[jax.eval_shape(lambda x: Tensor(x, dims), shape) for shape in shapes])


def num_sequences(batch: int, longest: int, length: int) -> int:
    """How many sequences of ``length`` a batch has where it has ``batch`` of the longest length: as often ``batch`` as
    they fit into that. So steps work on about as many tokens, and what divides ``batch`` divides the sequences."""
    return batch * (longest // length)


def batch_dims(batch: int, length: int) -> Dims:
    """The dims of a batch."""
    return Dim("batch", batch), Dim("length", length)


class Amount(NamedTuple):
    """How much a batch, or several, hold."""

    tokens: int
    """Tokens that are trained on."""
    places: int
    """Places for tokens: batch x length."""

    @property
    def padding(self) -> float:
        """The share of the places that hold no token."""
        return 1 - self.tokens / self.places if self.places else 0.0


@runtime_checkable
class Source(Protocol):
    """Where batches come from."""

    @property
    def num_tokens(self) -> int:
        """How many tokens there are to train on."""
        ...

    def num_batches(self, batch: int) -> int:
        """How many batches an epoch has, the last of which may not be full."""
        ...

    def arrays(self, step: int, batch: int, seed: int | None) -> tuple[np.ndarray, ...]:
        """The batch of a step as the fields of a ``Batch``; without a seed in the order of the stream."""
        ...

    def amount(self, step: int, batch: int, seed: int | None) -> Amount:
        """How much the batch of a step holds."""
        ...


def stream(documents: Iterable[np.ndarray], end: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of documents, ``end`` before each, and for each how many that makes."""
    separator = np.asarray([end], np.int32)
    parts = [part for tokens in documents for part in (separator, tokens)]
    sizes = [1 + tokens.size for tokens in parts[1::2]]
    return np.concatenate(parts) if parts else separator, np.asarray(sizes, np.int64)


@dataclass(frozen=True, eq=False)
class Windows:
    """A stream of documents, cut."""

    tokens: np.ndarray
    """The stream, int32, (tokens,)."""
    starts: np.ndarray
    """For each token, where in the stream its document begins."""
    length: int

    @classmethod
    def cut(cls, documents: Iterable[np.ndarray], end: int, length: int) -> "Windows":
        """Windows of documents' tokens; ``end`` is the token between documents.

        Raises:
            ValueError: there are too few tokens for one window.
        """
        tokens, sizes = stream(documents, end)
        starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
        if tokens.size <= length:
            raise fail(
                f"The text has {tokens.size} tokens: too few for one window of length={length} and the token after it. "
                "Give more text (--data), or make length smaller."
            )
        return cls(tokens, starts, length)

    def __len__(self) -> int:
        return (self.tokens.size - 1) // self.length

    @property
    def num_tokens(self) -> int:
        """How many tokens there are to train on."""
        return self.tokens.size

    def num_batches(self, batch: int) -> int:
        """How many batches an epoch has."""
        return -(-len(self) // batch)

    def chosen(self, step: int, batch: int, seed: int | None) -> np.ndarray:
        """The numbers of a batch's windows, (batch,). A batch may begin in one epoch and end in the next."""
        places = [divmod(step * batch + row, len(self)) for row in range(batch)]
        return np.asarray([order(len(self), seed, epoch)[at] for epoch, at in places])

    def arrays(self, step: int, batch: int, seed: int | None) -> tuple[np.ndarray, ...]:
        """The batch of a step as the fields of a ``Batch``."""
        return self.rows(self.chosen(step, batch, seed))

    def amount(self, step: int, batch: int, seed: int | None) -> Amount:
        """How much the batch of a step holds: every place a token."""
        return Amount(batch * self.length, batch * self.length)

    def rows(self, chosen: np.ndarray) -> tuple[np.ndarray, ...]:
        """The windows with these numbers, as the fields of a ``Batch``: four arrays (batch, length)."""
        first = chosen[:, None] * self.length
        at = first + np.arange(self.length)
        begins = self.starts[at]
        new = (begins == at) & (at > first)
        return (
            self.tokens[at],
            self.tokens[at + 1],
            np.cumsum(new, axis=1, dtype=np.int32),
            (at - np.maximum(begins, first)).astype(np.int32),
        )


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches by step, each epoch in another order, placed on a mesh."""

    source: Source
    batch: int
    """How many sequences a batch has (of buckets: of the longest length)."""
    mesh: Mesh
    layout: Layout
    seed: int | None
    """Of the order; None: that of the source."""

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step; steps count from 0. Each process puts only its own part on its devices."""
        return Batch(*(self._tensor(array) for array in self.source.arrays(step, self.batch, self.seed)))

    def amount(self, step: int) -> Amount:
        """How much the batch of a step holds."""
        return self.source.amount(step, self.batch, self.seed)

    def _tensor(self, array: np.ndarray) -> Tensor:
        these = batch_dims(*array.shape)
        where = _sharding(these, self.mesh, self.layout)
        return Tensor(jax.make_array_from_callback(array.shape, where, lambda index: array[index]), these)


@functools.lru_cache(maxsize=64)
def _sharding(these: Dims, mesh: Mesh, layout: Layout) -> jax.sharding.Sharding:
    return shard(Batch.shapes(these), mesh, layout).ids.array.sharding  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=64)
def order(num: int, seed: int | None, epoch: int) -> np.ndarray:
    """The order of ``num`` windows in an epoch."""
    return np.arange(num) if seed is None else np.random.default_rng([seed, epoch]).permutation(num)
