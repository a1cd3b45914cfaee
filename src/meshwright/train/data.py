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
from typing import NamedTuple

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
    """Sequences of tokens. Every field is int32, (batch, length)."""

    ids: Tensor
    """The tokens."""
    targets: Tensor
    """The token that follows each."""
    segments: Tensor
    """Which document a token belongs to, counted in its sequence."""
    positions: Tensor
    """A token's place in its document, counted from where that begins in its sequence."""

    @classmethod
    def shapes(cls, dims: Dims) -> "Batch":
        """A batch without values, for tracing."""
        shape = jax.ShapeDtypeStruct(sizes_of(dims), jnp.int32)
        return cls(*[jax.eval_shape(lambda x: Tensor(x, dims), shape) for _ in cls._fields])


def batch_dims(batch: int, length: int) -> Dims:
    """The dims of a batch."""
    return Dim("batch", batch), Dim("length", length)


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
        separator = np.asarray([end], np.int32)
        parts = [part for tokens in documents for part in (separator, tokens)]
        tokens = np.concatenate(parts) if parts else separator
        sizes = [before.size + after.size for before, after in zip(parts[::2], parts[1::2], strict=True)]
        starts = np.repeat(np.cumsum([0, *sizes])[:-1], sizes)
        if tokens.size <= length:
            raise fail(
                f"The text has {tokens.size} tokens: too few for one window of length={length} and the token after it. "
                "Give more text (--data), or make length smaller."
            )
        return cls(tokens, starts, length)

    def __len__(self) -> int:
        return (self.tokens.size - 1) // self.length

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
    """Windows by step, each epoch in another order, placed on a mesh."""

    windows: Windows
    batch: int
    mesh: Mesh
    layout: Layout
    seed: int | None
    """Of the order of the windows; None: the order of the stream."""

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step; steps count from 0."""
        return self.placed(self.windows.rows(self.chosen(step)))

    def chosen(self, step: int) -> np.ndarray:
        """The numbers of a batch's windows, (batch,). A batch may begin in one epoch and end in the next."""
        num = len(self.windows)
        places = [divmod(step * self.batch + row, num) for row in range(self.batch)]
        return np.asarray([order(num, self.seed, epoch)[at] for epoch, at in places])

    def placed(self, rows: tuple[np.ndarray, ...]) -> Batch:
        """Arrays of the whole batch as tensors; each process puts only its own part on its devices."""
        return Batch(*(self._tensor(array) for array in rows))

    def _tensor(self, array: np.ndarray) -> Tensor:
        held = jax.make_array_from_callback(array.shape, self._sharding, lambda index: array[index])
        return Tensor(held, self._dims)

    @functools.cached_property
    def _dims(self) -> Dims:
        return batch_dims(self.batch, self.windows.length)

    @functools.cached_property
    def _sharding(self) -> jax.sharding.Sharding:
        return shard(Batch.shapes(self._dims), self.mesh, self.layout).ids.array.sharding  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=8)
def order(num: int, seed: int | None, epoch: int) -> np.ndarray:
    """The order of ``num`` windows in an epoch."""
    return np.arange(num) if seed is None else np.random.default_rng([seed, epoch]).permutation(num)
