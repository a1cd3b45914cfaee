"""Traffic: the collectives of a program, a row for each.

``payload`` is the whole buffer that one group of devices reduces, gathers or exchanges, as one device holds it:

==================  ============================  ==========================
kind                payload                       sent by a device
==================  ============================  ==========================
``all_reduce``      the array reduced             2 (n - 1) / n of it
``all_gather``      the array gathered            (n - 1) / n of it
``reduce_scatter``  the array before the scatter  (n - 1) / n of it
``all_to_all``      the slice exchanged           (n - 1) / n of it
``permute``         the slice passed on           all of it
==================  ============================  ==========================

for a group of n devices: what the ring algorithms send, which is the least that is possible (Thakur et al., 2005).
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..scope import Axes
from .origin import Origin
from .passes import Runs
from .program import Op, Program, devices_along, each

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL, PERMUTE = KINDS = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "permute",
)

_KIND = {
    "psum": ALL_REDUCE, "psum_invariant": ALL_REDUCE, "pmax": ALL_REDUCE, "pmin": ALL_REDUCE,
    "all_reduce": ALL_REDUCE, "unreduced_psum": ALL_REDUCE,
    "all_gather": ALL_GATHER, "all_gather_invariant": ALL_GATHER, "all_gather_reduced": ALL_GATHER,
    "reduce_scatter": REDUCE_SCATTER, "unreduced_reduce_scatter": REDUCE_SCATTER,
    "all_to_all": ALL_TO_ALL, "ragged_all_to_all": ALL_TO_ALL,
    "ppermute": PERMUTE,
}  # fmt: skip


@dataclass(frozen=True)
class Collective:
    """One collective of a program."""

    kind: str
    """``all_reduce``, ``all_gather``, ``reduce_scatter``, ``all_to_all`` or ``permute``."""
    axes: Axes
    """The mesh axes it speaks over; several act as one long axis."""
    group_size: int
    """The number of devices that take part together."""
    dtype: str
    """Of the elements."""
    payload_bytes: int
    """The whole buffer, as the module's table says, on one device, each time it runs."""
    times: int
    """How often it runs in one call of the program; in a pipeline, on the device where that is most often."""
    sure: bool
    """False when it may run otherwise: in a while loop, whose turns count once, or in a branch."""
    origin: Origin
    """The user's line and the named operation."""
    runs: Runs = ()
    """How often on each device along the pipeline; of a program without one, ``times`` alone."""

    @property
    def sent_bytes(self) -> int:
        """What one device puts on the wire, each time it runs."""
        n = self.group_size
        if self.kind == PERMUTE:
            return self.payload_bytes
        shares = 2 * (n - 1) if self.kind == ALL_REDUCE else n - 1
        return -(-self.payload_bytes * shares // n)

    @property
    def total_payload_bytes(self) -> int:
        return self.payload_bytes * self.times

    @property
    def total_sent_bytes(self) -> int:
        return self.sent_bytes * self.times


def collectives_of(program: Program) -> tuple[Collective, ...]:
    """Every collective of a program, in its order."""
    once = (1,) * devices_along(program.block)
    return tuple(row for op, runs, sure in each(program.block, once) for row in rows_of(op, runs, sure))


def sent_by_busiest(rows: Sequence[Collective]) -> tuple[Collective, ...]:
    """The collectives as that device along the pipeline runs them which sends the most."""
    num = max((len(row.runs) for row in rows), default=0)
    if num <= 1:
        return tuple(rows)
    busiest = max(range(num), key=lambda d: sum(row.sent_bytes * row.runs[d] for row in rows))
    mine = (dataclasses.replace(row, times=row.runs[busiest]) for row in rows)
    return tuple(row for row in mine if row.times)


def is_collective(op: Op) -> bool:
    """Whether an operation sends anything."""
    return next(rows_of(op), None) is not None


def rows_of(op: Op, runs: Runs = (1,), sure: bool = True) -> Iterator[Collective]:
    """The collectives that one operation is: none, or one for each of its operands."""
    kind = _KIND.get(op.name)
    if kind is None:
        return
    axes = op.params.get("axes", op.params.get("axis_name", ()))
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    if kind == PERMUTE:
        axes = _moved_along(axes, op)
    size = math.prod(op.sizes[a] for a in axes)
    if size == 1:
        return
    for given, result in zip(op.ins, op.outs, strict=False):
        moved = result if kind == ALL_GATHER or given is None else given
        yield Collective(kind, axes, size, moved.dtype.name, moved.num_bytes, max(runs), sure, op.origin, runs)


def _moved_along(axes: Axes, op: Op) -> Axes:
    """The axes along which any device sends: neighbours along two axes may differ in one alone."""
    shape = [op.sizes[a] for a in axes]
    ends = [np.unravel_index([pair[i] for pair in op.params["perm"]], shape) for i in (0, 1)]
    return tuple(a for a, here, there in zip(axes, *ends, strict=True) if (here != there).any())
