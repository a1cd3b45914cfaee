"""Windows along a split dim: the exchange with neighbours that every movement along a dim comes down to.

A dim that is split over axes lies on the devices in contiguous blocks. A slice, a shift, a pad, a concatenation, a
flip or a convolution's halo gives device k another stretch of the same dim, its *window*: a global start and a length.
What of it lies in the device's own block stays; what lies in others' is sent from device to device, only that much,
and what lies beyond the ends is filled.

The plan is made of static integers and kept (``_plan``): the window of each device is cut at the borders of blocks
into pieces, and pieces are dealt into rounds, in each of which a device sends at most one and receives at most one: a
round is one permute. Four devices with blocks of 8, each asking for its block and 2 before and 3 after it (the halo of
a convolution):

    window(array, scope, ("x",), at, starts=[-2, 6, 14, 22], length=13)

    piece      from device    round
    2 before   k - 1          a permute of 2, device 0 receives nothing: zeros
    8          its own        nothing is sent
    3 after    k + 1          a permute of 3, device 3 receives nothing: zeros

Windows that lie alike on every device (``starts`` a block apart) are static slices joined by a concatenation, as here.
Otherwise each device looks up in a table, by its index, where its pieces begin and where they go; a round moves as
much as its largest piece.

The gradient is JAX's own: each permute back, and added up where windows overlap.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import collectives
from ..scope import Axes, Scope

Array = Any


def window(
    array: Array,
    scope: Scope | None,
    axes: Axes,
    at: int,
    starts: Sequence[int],
    length: int,
    *,
    step: int = 1,
    fill: Any = 0,
    wrap: bool = False,
) -> Array:
    """Every device's stretch of a dim: ``length`` elements from its own global start.

    Args:
        array: a device's positional slice. Any dtype; all positions but ``at`` are left alone.
        scope: the region's scope; None outside a region, or where the dim is not split (then ``axes`` is empty too).
        axes: the axes that split position ``at``, the slowest first, in contiguous blocks of ``array.shape[at]``.
        at: the position of the dim in ``array``.
        starts: for each device along ``axes`` jointly, in order (the first axis the slowest), the global position of
            the first element of its window: static ints, one when nothing is split. They may be negative or lie past
            the end, and windows may overlap and be wider than a block.
        length: the number of elements of every window.
        step: element i of a window is at its start + i * step. A negative step reads backwards: ``starts`` of
            ``size - 1 - k * block`` with step -1 reverse the whole dim. Only the elements asked for are sent.
        fill: a scalar, what stands beyond the ends of the dim; zeros cost nothing.
        wrap: the dim goes round: beyond its end is its beginning. Then ``step`` is 1 or -1 and ``fill`` is not used.

    Returns:
        The windows: ``length`` elements along ``at``, varying over ``axes``.

    The communication is a permute for each round of pieces: two for a halo on both sides, one for a halo on one side,
    a shift by less than a block or a reversal. A dim that is not split communicates nothing.
    """
    num = scope.size(axes) if scope is not None and axes else 1
    block = array.shape[at]
    assert len(starts) == num and step != 0 and not (wrap and abs(step) != 1)
    if length == 0 or (wrap and block == 0):
        return jnp.zeros([0 if i == at else size for i, size in enumerate(array.shape)], array.dtype)
    if step < 0:
        firsts = [s + (length - 1) * step for s in starts]
        forwards = window(array, scope, axes, at, firsts, length, step=-step, fill=fill, wrap=wrap)
        return lax.rev(forwards, (at,))
    if wrap and length > num * block:
        once = window(array, scope, axes, at, starts, num * block, wrap=True)
        turns = -(-length // (num * block))
        return lax.slice_in_dim(lax.concatenate([once] * turns, at), 0, length, axis=at)
    array = collectives.vary(array, frozenset(axes)) if num > 1 else array
    plan = _plan(num, block, tuple(starts), length, step, wrap)
    mover = _Mover(array, axes, at, length, step, fill, num)
    return mover.joined(plan) if plan.alike else mover.overlaid(plan)


# The plan: static, made once for each set of windows


@dataclass(frozen=True)
class _Piece:
    """A stretch of one device's window that lies in one block."""

    device: int
    """Whose window it is."""
    hop: int
    """The block it lies in, counted from the device's own; beyond the ends too."""
    source: int | None
    """The device that has it; None beyond the ends."""
    offset: int
    """Where in its block it begins."""
    place: int
    """Where in the window it goes."""
    count: int
    """How many elements of the window it is."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.hop, self.offset, self.place, self.count


_Round = tuple[_Piece, ...]


@dataclass(frozen=True)
class _Plan:
    alike: bool
    """Whether the windows of all devices are cut alike, relative to their own blocks."""
    rounds: tuple[_Round, ...]
    """Where they are alike: the pieces in the window's order, those beyond the ends among them. Otherwise: the pieces
    that exist, each round free of two from one source or for one device."""
    covered: bool
    """Whether no window reaches beyond the ends."""


@functools.lru_cache(maxsize=4096)
def _plan(num: int, block: int, starts: tuple[int, ...], length: int, step: int, wrap: bool) -> _Plan:
    windows = [_cut(num, block, k, start, length, step, wrap) for k, start in enumerate(starts)]
    shapes = [[p.shape for p in pieces] for pieces in windows]
    if all(shape == shapes[0] for shape in shapes):
        return _Plan(True, tuple(zip(*windows, strict=True)), True)
    pieces = [p for w in windows for p in w]
    found = [p for p in pieces if p.source is not None]
    own = _dealt([p for p in found if p.source == p.device], num * block)
    sent = _dealt([p for p in found if p.source != p.device], num * block)
    return _Plan(False, (*own, *sent), len(found) == len(pieces))


def _cut(num: int, block: int, device: int, start: int, length: int, step: int, wrap: bool) -> list[_Piece]:
    """One device's window in the order of its elements, cut at the borders of blocks."""
    pieces = []
    place = 0
    while place < length:
        position = start + place * step
        at = position // block if block else -1
        count = min(-(-((at + 1) * block - position) // step), length - place) if block else length
        source = at % num if wrap else at if 0 <= at < num else None
        pieces.append(_Piece(device, at - device, source, position - at * block, place, count))
        place += count
    return pieces


def _dealt(pieces: list[_Piece], size: int) -> list[_Round]:
    """Pieces dealt into rounds, as few as there are pieces of the busiest device.

    Pieces with one hop always make a round, and where each hop has pieces of one size that is the least to send. But
    the windows of a slice come from few devices, over many hops: dealt in turn along the dim, like cards, the pieces
    of one source, and those of one window, which are side by side, fall into different rounds.
    """
    hops: dict[int, list[_Piece]] = {}
    for p in pieces:
        hops.setdefault(p.hop, []).append(p)
    busiest = max((max(Counter(key(p) for p in pieces).values()) for key in (_source, _device) if pieces), default=0)
    along = sorted(pieces, key=lambda p: ((p.hop + p.device) * size + p.offset, p.device))
    for turns in range(busiest, len(hops)):
        rounds = [tuple(along[first::turns]) for first in range(turns)]
        if all(_free(r) for r in rounds):
            return rounds
    return [tuple(r) for _, r in sorted(hops.items())]


def _source(p: _Piece) -> int | None:
    return p.source


def _device(p: _Piece) -> int | None:
    return p.device


def _free(pieces: _Round) -> bool:
    return all(len({key(p) for p in pieces}) == len(pieces) for key in (_source, _device))


# The movement: one device's part in it


@dataclass
class _Mover:
    """A slice, and what its windows have in common."""

    array: Array
    axes: Axes
    at: int
    length: int
    step: int
    fill: Any
    num: int

    @functools.cached_property
    def index(self) -> Any:
        return collectives.index(self.axes) if self.num > 1 else jnp.int32(0)

    @property
    def filled_with_zeros(self) -> bool:
        """Whether a device that is sent nothing has what it should have."""
        return isinstance(self.fill, int | float | complex | np.generic) and bool(self.fill == 0)

    def joined(self, plan: _Plan) -> Array:
        """Windows that are cut alike: the pieces side by side."""
        parts = [self._arriving(pieces) for pieces in plan.rounds]
        return parts[0] if len(parts) == 1 else lax.concatenate(parts, self.at)

    def _arriving(self, pieces: _Round) -> Array:
        first = pieces[0]
        existing = [p for p in pieces if p.source is not None]
        if not existing:
            return self._filled(first.count)
        span = (first.count - 1) * self.step + 1
        part = lax.slice_in_dim(self.array, first.offset, first.offset + span, self.step, self.at)
        if any(p.source != p.device for p in existing):
            part = collectives.permute(part, self.axes, [(p.source, p.device) for p in existing])  # type: ignore[misc]
        if len(existing) == len(pieces) or self.filled_with_zeros:
            return part
        exists = self._lookup({p.device: 1 for p in existing}, missing=0) == 1
        return jnp.where(exists, part, self._filled(first.count))

    def overlaid(self, plan: _Plan) -> Array:
        """Windows that are cut differently: each round laid over the last, each piece at its place."""
        out: Array | None = None if plan.covered else self._filled(self.length)
        for pieces in plan.rounds:
            placed = self._placed(pieces)
            out = placed if out is None else jnp.where(self._mask(pieces), placed, out)
        return out if out is not None else self._filled(self.length)

    def _placed(self, pieces: _Round) -> Array:
        """A round's pieces sent, and moved to their places in a whole window; the rest of it is arbitrary."""
        count = max(p.count for p in pieces)
        array, block, span = self.array, self.array.shape[self.at], (count - 1) * self.step + 1
        begin = {p.source: p.offset for p in pieces}
        if self.step == 1:
            begin = {source: min(offset, block - span) for source, offset in begin.items()}
        elif (excess := max(begin.values()) + span - block) > 0:
            array = self._padded(array, 0, excess)
        part = lax.dynamic_slice_in_dim(array, self._lookup(begin), span, self.at)  # type: ignore[arg-type]
        part = lax.slice_in_dim(part, 0, span, self.step, self.at)
        if pieces[0].source != pieces[0].device:
            part = collectives.permute(part, self.axes, [(p.source, p.device) for p in pieces])  # type: ignore[misc]
        return self._moved(part, {p.device: p.place - p.offset + begin[p.source] for p in pieces})

    def _moved(self, part: Array, by: dict[int, int]) -> Array:
        """``part`` moved to begin at a device's own place, cut and padded to a window's length."""
        count, least, most = part.shape[self.at], min(by.values()), max(by.values())
        if least == most:
            return self._padded(part, most, self.length - most - count)
        before = max(most, 0)
        part = self._padded(part, before, max(self.length - least - count, 0))
        start = self._lookup({k: before - shift for k, shift in by.items()})
        return lax.dynamic_slice_in_dim(part, start, self.length, self.at)

    def _mask(self, pieces: _Round) -> Any:
        """Where in its window a device's piece of this round lies."""
        shape = [self.length if i == self.at else 1 for i in range(self.array.ndim)]
        place = lax.broadcasted_iota(jnp.int32, shape, self.at)
        first = self._lookup({p.device: p.place for p in pieces})
        end = self._lookup({p.device: p.place + p.count for p in pieces}, missing=-1)
        return (place >= first) & (place < end)

    def _lookup(self, by_device: dict[int, int], missing: int | None = None) -> Any:
        """This device's entry; without ``missing``, a device that has none may get any."""
        other = next(iter(by_device.values())) if missing is None else missing
        table = [by_device.get(k, other) for k in range(self.num)]
        if len(set(table)) == 1:
            return jnp.int32(table[0])
        return lax.dynamic_index_in_dim(jnp.asarray(table, jnp.int32), self.index, keepdims=False)

    def _padded(self, array: Array, before: int, after: int) -> Array:
        if before == after == 0:
            return array
        widths = [(before, after, 0) if i == self.at else (0, 0, 0) for i in range(array.ndim)]
        return lax.pad(array, jnp.zeros((), array.dtype), widths)

    def _filled(self, count: int) -> Array:
        shape = tuple(count if i == self.at else size for i, size in enumerate(self.array.shape))
        return jnp.broadcast_to(jnp.asarray(self.fill).astype(self.array.dtype), shape)
