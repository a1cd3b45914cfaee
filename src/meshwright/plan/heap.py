"""Heap: how much memory buffers take together, each from its first moment to its last.

Buffers that are never there at the same moment share memory. ``packed`` places them one after the other, each into the
smallest hole that is free as long as it is there: what is left over is fragmentation. The largest comes first, as in
XLA's compilers for CPUs and GPUs; its compiler for TPUs places buffers as they are made, which leaves more holes. Some
chips have a scratch memory of their own, large enough for what a layer hands from one operation to the next:
``outside`` places there what is there most briefly, as long as there is a hole for it.
"""

from collections.abc import Iterable, Sequence

from .buffers import Buffer

SMALL_BYTES = 64 * 1024
"""Smaller buffers fit into the gaps between others."""

_Placed = tuple[int, Buffer]
"""Where a buffer begins, and the buffer."""


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
    placed: list[_Placed] = []
    small = [b for b in buffers if b.num_bytes < SMALL_BYTES]
    large = [b for b in buffers if b.num_bytes >= SMALL_BYTES]
    for buffer in sorted(large, key=lambda b: (b.start if as_made else 0, -b.num_bytes, b.start - b.end)):
        placed.append((_place(buffer, placed), buffer))
    highest = max((at + b.num_bytes for at, b in placed), default=0)
    return highest + most_bytes((b.num_bytes, b.start, b.end) for b in small)


def outside(buffers: Sequence[Buffer], scratch_bytes: int, of_collectives: bool = True) -> list[Buffer]:
    """The buffers that a scratch memory of ``scratch_bytes`` does not hold; results of collectives are held there only
    if ``of_collectives``."""
    placed: list[_Placed] = []
    for buffer in sorted(buffers, key=lambda b: (b.end - b.start, b.num_bytes)):
        may = not buffer.lasting and (of_collectives or not buffer.of_collective)
        if may and (at := _place(buffer, placed)) + buffer.num_bytes <= scratch_bytes:
            placed.append((at, buffer))
    inside = {id(buffer) for _, buffer in placed}
    return [b for b in buffers if id(b) not in inside]


def _place(buffer: Buffer, placed: Iterable[_Placed]) -> int:
    """Where the smallest hole begins that is large enough while the buffer is there."""
    together = sorted((at, at + b.num_bytes) for at, b in placed if b.start <= buffer.end and buffer.start <= b.end)
    best, best_size, free = -1, 0, 0
    for start, end in together:
        hole = start - free
        if hole >= buffer.num_bytes and (best < 0 or hole < best_size):
            best, best_size = free, hole
        free = max(free, end)
    return best if best >= 0 else free
