"""Heap: how much memory buffers take together, each from its first moment to its last.

Buffers that are never there at the same moment share memory. ``packed`` places them one after the other, each into the
smallest hole that is free as long as it is there: what is left over is fragmentation. The largest comes first, as in
XLA's compilers for CPUs and GPUs; its compiler for TPUs places buffers as they are made, which leaves more holes. Some
chips have a scratch memory of their own, large enough for what a layer hands from one operation to the next:
``outside`` keeps there what is there most briefly, as long as it fits.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from .buffers import Buffer

SMALL_BYTES = 64 * 1024
"""Smaller buffers fit into the gaps between others."""
LARGEST_PART = 0.6
"""The part of a scratch memory that one buffer may take. Fitted: of 0.5, 0.6 and 1, the one whose largest error is the
least over ``benchmarks/memory.py``. libtpu itself has been seen to keep one of 64 MiB in a v5e's 112, and some of 32 in
a v5p's 48, which is more."""


def most_bytes(spans: Iterable[tuple[int, int, int]]) -> int:
    """The most that is there at one moment, of (bytes, first moment, last moment)."""
    changes = sorted(change for size, start, end in spans for change in ((start, size), (end + 1, -size)))
    most = held = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def packed(buffers: Iterable[Buffer], as_made: bool = False) -> int:
    """The bytes of a memory that holds the buffers, placed the largest first or, ``as_made``, the earliest."""
    placed: list[tuple[int, int, Buffer]] = []
    small = [b for b in buffers if b.num_bytes < SMALL_BYTES]
    large = [b for b in buffers if b.num_bytes >= SMALL_BYTES]
    for buffer in sorted(large, key=lambda b: (b.start if as_made else 0, -b.num_bytes, b.start - b.end)):
        together = (p for p in placed if p[2].start <= buffer.end and buffer.start <= p[2].end)
        at = _smallest_hole(sorted((start, end) for start, end, _ in together), buffer.num_bytes)
        placed.append((at, at + buffer.num_bytes, buffer))
    highest = max((end for _, end, _ in placed), default=0)
    return highest + most_bytes((b.num_bytes, b.start, b.end) for b in small)


def _smallest_hole(taken: Sequence[tuple[int, int]], size: int) -> int:
    best, best_size, free = -1, 0, 0
    for start, end in taken:
        hole = start - free
        if hole >= size and (best < 0 or hole < best_size):
            best, best_size = free, hole
        free = max(free, end)
    return best if best >= 0 else free


def outside(buffers: Sequence[Buffer], scratch_bytes: int) -> list[Buffer]:
    """The buffers that a scratch memory of ``scratch_bytes`` does not hold."""
    if not scratch_bytes:
        return list(buffers)
    used = np.zeros(1 + max((b.end for b in buffers), default=0), np.int64)
    kept = []
    for buffer in sorted(buffers, key=lambda b: (b.end - b.start, b.num_bytes)):
        there = used[buffer.start : buffer.end + 1]
        fits = not buffer.lasting and buffer.num_bytes <= LARGEST_PART * scratch_bytes
        if fits and there.max(initial=0) + buffer.num_bytes <= scratch_bytes:
            there += buffer.num_bytes
        else:
            kept.append(buffer)
    return kept
