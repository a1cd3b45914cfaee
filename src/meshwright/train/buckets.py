"""Buckets: documents of unequal lengths, each in a sequence of its own, with little padding.

A document goes into the shortest of a few lengths that holds it. A batch has one bucket's length, and the more
sequences the shorter that is, so that every step works on about as many tokens; the step is compiled once for each.

    lengths    4, 8
    documents  a b c    d e    f g h i j k
    of 4       <end> a b c    <end> d e .      predicting   a b c <end>    d e <end> .
    of 8       <end> f g h i j k .                          f g h i j k <end> .

What is longer than the longest length is cut into pieces of that length; positions begin anew in each, as they do in
windows (``data.py``). In an epoch every token is predicted once. A place without a token (``.``) counts for nothing in
the loss, by the weights of its batch; where a bucket's last batch of an epoch is not full, whole sequences are such.

Which documents make a batch, and which bucket's turn it is, are functions of the seed and the step alone.

Dims: batch, length.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..errors import fail
from .data import Amount, num_sequences, order, stream


@dataclass(frozen=True, eq=False)
class Buckets:
    """Documents in buckets."""

    tokens: np.ndarray
    """The documents end to end, the token between documents before each and at the end; int32, (tokens,)."""
    lengths: tuple[int, ...]
    """Of the buckets, the shortest first."""
    pieces: tuple[np.ndarray, ...]
    """For each bucket its documents, or pieces of them: the first token of each, and the number of tokens; (num, 2)."""

    @classmethod
    def sort(cls, documents: Iterable[np.ndarray], end: int, lengths: Iterable[int]) -> "Buckets":
        """Documents' tokens in buckets; ``end`` is the token between documents.

        Raises:
            ValueError: there is no length, or one is not positive or stands twice; there is no document.
        """
        lengths = _checked(lengths)
        tokens, sizes = stream(documents, end)
        if not sizes.size:
            raise fail("Buckets: there are no documents.")
        begins = np.cumsum(sizes) - sizes
        num_parts = -(-sizes // lengths[-1])
        part = np.arange(num_parts.sum()) - np.repeat(np.cumsum(num_parts) - num_parts, num_parts)
        left = np.repeat(sizes, num_parts) - part * lengths[-1]
        firsts = np.repeat(begins, num_parts) + part * lengths[-1]
        pieces = np.stack([firsts, np.minimum(left, lengths[-1])], axis=1)
        bucket = np.searchsorted(lengths, pieces[:, 1])
        of_each = tuple(pieces[bucket == b] for b in range(len(lengths)))
        return cls(np.append(tokens, np.int32(end)), lengths, of_each)

    @property
    def num_tokens(self) -> int:
        """How many tokens there are to train on."""
        return self.tokens.size - 1

    def sequences(self, batch: int) -> tuple[int, ...]:
        """How many sequences a batch of each bucket has, of which there are ``batch`` in the last."""
        return tuple(num_sequences(batch, self.lengths[-1], length) for length in self.lengths)

    def counts(self, batch: int) -> tuple[int, ...]:
        """How many batches an epoch has of each bucket."""
        num = zip(self.pieces, self.sequences(batch), strict=True)
        return tuple(-(-len(pieces) // sequences) for pieces, sequences in num)

    def num_batches(self, batch: int) -> int:
        """How many batches an epoch has."""
        return sum(self.counts(batch))

    def arrays(self, step: int, batch: int, seed: int | None) -> tuple[np.ndarray, ...]:
        """The batch of a step as the fields of a ``Batch``, the weights too."""
        bucket, chosen = self._chosen(step, batch, seed)
        length, at = self.lengths[bucket], np.arange(self.lengths[bucket])
        first, size = np.zeros((2, self.sequences(batch)[bucket], 1), np.int64)
        first[: len(chosen), 0], size[: len(chosen), 0] = chosen.T
        there = at < size
        places = np.minimum(first + at, self.tokens.size - 2)
        end = self.tokens[-1]
        weights = there / np.float32(size.sum())
        return (
            np.where(there, self.tokens[places], end),
            np.where(there, self.tokens[places + 1], end),
            np.where(there, 0, 1).astype(np.int32),
            np.broadcast_to(at, (len(first), length)).astype(np.int32),
            weights.astype(np.float32),
        )

    def amount(self, step: int, batch: int, seed: int | None) -> Amount:
        """How much the batch of a step holds."""
        bucket, chosen = self._chosen(step, batch, seed)
        return Amount(int(chosen[:, 1].sum()), self.sequences(batch)[bucket] * self.lengths[bucket])

    def amounts(self, batch: int) -> tuple[Amount, ...]:
        """How much an epoch's batches of each bucket hold."""
        every = zip(self.pieces, self.counts(batch), self.sequences(batch), self.lengths, strict=True)
        return tuple(Amount(int(pieces[:, 1].sum()), num * rows * length) for pieces, num, rows, length in every)

    def _chosen(self, step: int, batch: int, seed: int | None) -> tuple[int, np.ndarray]:
        """A batch's bucket, and its pieces, (num, 2)."""
        epoch, at = divmod(step, self.num_batches(batch))
        bucket, turn = turns(self.counts(batch), seed, epoch)[at]
        rows = self.sequences(batch)[bucket]
        mixed = order(len(self.pieces[bucket]), seed, epoch)
        return int(bucket), self.pieces[bucket][mixed[turn * rows : (turn + 1) * rows]]


@functools.lru_cache(maxsize=8)
def turns(counts: tuple[int, ...], seed: int | None, epoch: int) -> np.ndarray:
    """The order of an epoch's batches: for each its bucket, and the number of the batch in it; (batches, 2). Without a
    seed those of each bucket are spread evenly."""
    every = np.asarray([(b, turn) for b, num in enumerate(counts) for turn in range(num)])
    if seed is not None:
        return every[np.random.default_rng([seed, epoch, len(every)]).permutation(len(every))]
    return every[np.argsort((every[:, 1] + 0.5) / np.asarray(counts)[every[:, 0]], kind="stable")]


def _checked(lengths: Iterable[int]) -> tuple[int, ...]:
    found = tuple(sorted(lengths))
    if not found or found[0] < 1 or len(set(found)) != len(found):
        raise fail(f"Buckets: the lengths {list(found)} must be different and at least 1, as in (64, 128, 256).")
    return found
