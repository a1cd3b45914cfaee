"""Context: what an attention sends whose length is split, round a ring or with another dim split while it runs.

With Q, K, V and O the bytes of the queries, keys, values and results that a device has, and n devices, a device sends

===============================  ========================================  ============================================
way                              forward                                   backward
===============================  ========================================  ============================================
a ring                           h (K + V)                                 h (K + V) + (h + w) (K + V in float32)
a ring under a causal mask       h (K + V) + Q + K + V + O                 the same, and Q + K + V + O
heads split                      (n - 1) / n (Q + K + V + O)               the same
query heads split, not the keys  (n - 1) / n (Q + O) + (n - 1) (K + V)     the same
===============================  ========================================  ============================================

with h hops in w directions: n - 1 in one, fewer under a window, where halves stay where they are as well (of two
devices, half of them do). Products hide the hops of a ring and nothing else. The numbers of documents are left out.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from ..ops.attended import Attended, Lying
from ..ops.blocks import Sight, scored_in
from ..ops.ring import Ring
from ..scope import Axes
from .known import Known
from .network import Machine
from .origin import BACKWARD, FORWARD, Origin
from .traffic import ALL_GATHER, ALL_TO_ALL, PERMUTE, REDUCE_SCATTER, Collective, rows_of

_PRODUCTS = {False: 2, True: 5}
"""Of queries and keys, in a forward and in a backward pass."""


@dataclass(frozen=True)
class Way:
    """What one device sends for an attention, one way or the other."""

    rows: tuple[Collective, ...]
    seconds: float | None
    """Of what no product hides; None when no machine is known."""

    @property
    def sent_bytes(self) -> int:
        return sum(row.total_sent_bytes for row in self.rows)


@dataclass(frozen=True)
class Context:
    """An attention, all its runs, that may be a ring or have another dim split."""

    of: Attended
    origin: Origin
    axes: Axes
    """Those that split the length, in a ring."""
    dim: str
    """What they split otherwise."""
    around: bool
    """Whether it is a ring."""
    ring: Way
    moved: Way


def contexts_of(known: Known) -> Iterator[Context]:
    """Every attention of a program for which there are two ways."""
    times: dict[tuple[Attended, str], Counter[bool]] = {}
    first: dict[tuple[Attended, str], Origin] = {}
    for ran in known.ran:
        if (of := ran.op.origin.attended) is not None:
            which = of, ran.op.origin.place
            first.setdefault(which, ran.op.origin)
            times.setdefault(which, Counter())[ran.op.origin.direction == BACKWARD] += ran.times
    for (of, place), runs in times.items():
        axes = of.k.axes_of(of.over)
        ways = [(axes, dim) for dim in _could_be_split(of, axes, known.program.sizes)] if axes else _moves(of, known)
        for axes_there, dim in ways[:1]:
            parts = _Parts(of, axes_there, first[of, place], runs, known.program.sizes, known.machine)
            yield Context(of, first[of, place], axes_there, dim, bool(axes), parts.ring(), parts.moved(dim))


def _could_be_split(of: Attended, axes: Axes, sizes: Mapping[str, int]) -> list[str]:
    """The dims of the keys that the axes divide, the last one first. The first dim counts sequences: that is split all
    the time or not at all."""
    num = math.prod(sizes[a] for a in axes)
    free = [d for d in reversed(of.k.dims[1:]) if d.name not in (of.over, of.summed)]
    return [d.name for d in free if d.size // math.prod(sizes[a] for a in of.k.axes_of(d.name)) % num == 0]


def _moves(of: Attended, known: Known) -> list[tuple[Axes, str]]:
    """The all-to-alls of which these queries come, with the length whole: their axes, and the dim that is split."""
    found = []
    for op in (ran.op for ran in known.ran if ran.op.origin.direction == FORWARD):
        row = next(rows_of(op), None)
        if row is not None and row.kind == ALL_TO_ALL and op.origin.dims == of.q.names:
            joined, split = (op.origin.dims[op.params[which]] for which in ("concat_axis", "split_axis"))
            if joined == of.over and op.outs[0].shape == of.q.local_sizes(known.program.sizes):
                found.append((row.axes, split))
    return found


@dataclass(frozen=True)
class _Parts:
    """One device's part in an attention, whichever dim the axes split."""

    of: Attended
    axes: Axes
    origin: Origin
    times: Mapping[bool, int]
    """How often it runs, forward (also again) and backward."""
    sizes: Mapping[str, int]
    machine: Machine | None

    @property
    def num(self) -> int:
        """The devices along the axes."""
        return math.prod(self.sizes[a] for a in self.axes)

    def moved(self, dim: str) -> Way:
        """With ``dim`` split over the axes."""
        of, rows = self.of, []
        for back, times in self.times.items():
            gather = REDUCE_SCATTER if back else ALL_GATHER
            kind, share = (ALL_TO_ALL, 1) if dim in of.k.names else (gather, self.num)
            rows += [self._row(ALL_TO_ALL, x, x.dtype, 1, times) for x in (of.q, of.out)]
            rows += [self._row(kind, x, x.dtype, share, times) for x in (of.k, of.v)]
        return Way(tuple(rows), self._seconds(rows))

    def ring(self) -> Way:
        """With the length split."""
        of, walks, halved = self.of, self._ring.walks(self._length), self._ring.halved(self._length)
        leaving = sum(any(here != there for here, there in self._ring.ways(which)) for which in (0, 1)) * halved
        hops, pieces = sum(far for _, far in walks), 1 + halved
        rows: list[Collective] = []
        hidden = 0.0
        for back, times in self.times.items():
            around = [self._row(PERMUTE, x, x.dtype, 1 / pieces, pieces * hops * times) for x in (of.k, of.v)]
            if back:
                turns = pieces * (hops + len(walks)) * times
                wide = str(scored_in(of.q.dtype, of.k.dtype, of.v.dtype))
                around += [self._row(PERMUTE, x, wide, 1 / pieces, turns) for x in (of.k, of.v)]
            halves = [self._row(PERMUTE, x, x.dtype, 1 / 2, leaving * times) for x in (of.q, of.k, of.v, of.out)]
            rows += [row for row in (*halves, *around) if row.times]
            hidden += min(self._seconds(around) or 0.0, self._multiplying(_PRODUCTS[back], pieces) * hops * times)
        busy = self._seconds(rows)
        return Way(tuple(rows), None if busy is None else busy - hidden)

    @property
    def _length(self) -> int:
        """Tokens on a device."""
        return self.of.k.size(self.of.over) // self.num

    @property
    def _ring(self) -> Ring:
        return Ring(Sight(self.of.causal, self.of.window), self.axes, self.num)

    def _multiplying(self, products: int, pieces: int) -> float:
        """For how many seconds a device multiplies between two hops, at least: all its queries with the keys that came,
        or half of that under a causal mask. Scores that are kept in memory may take longer than the product."""
        hardware = self.machine.hardware if self.machine is not None else None
        if hardware is None or not hardware.overlap:
            return 0.0
        queries, head = self._elements(self.of.q), self.of.q.size(self.of.summed)
        rows = queries // self._elements(self.of.k) * self._length // pieces
        scores = queries // head * self._length // pieces
        multiplying = 2 * scores * head / hardware.matmul_flops((rows, self._length // pieces, head))
        return products * max(multiplying, hardware.pass_seconds(4 * scores, 0, 0))

    def _row(self, kind: str, x: Lying, dtype: str, share: float, times: int) -> Collective:
        num_bytes = round(self._elements(x) * share) * jnp.dtype(dtype).itemsize
        return Collective(kind, self.axes, self.num, dtype, num_bytes, times, True, self.origin)

    def _elements(self, x: Lying) -> int:
        """On a device, where the axes split one of the dims; so many whichever it is."""
        split = {a for axes in x.split for a in axes}
        return math.prod(x.local_sizes(self.sizes)) // math.prod(self.sizes[a] for a in self.axes if a not in split)

    def _seconds(self, rows: Sequence[Collective]) -> float | None:
        return sum(self.machine.seconds(r) * r.times for r in rows) if self.machine is not None else None
