"""Summing: how sums across devices are taken.

A sum over axes of which some cross a slow network (``mw.Mesh(..., dcn=...)``) is taken in steps, so that of what is
summed only each device's share crosses it:

    batch:(dcn,data)     reduce-scatter over data     each device is left with 1/data of the sums of its slice
                         all-reduce over dcn          of that share alone
                         all-gather over data         everybody has everything again
"""

import functools
from dataclasses import dataclass

Axes = tuple[str, ...]

WORTH_STEPS_BYTES = 64 * 1024
"""From here on a sum is worth three collectives: they start twice more, each some ten microseconds, which is what a
slow wire (some gigabytes a second) takes for this much."""


@dataclass(frozen=True)
class Summing:
    """How a region's sums across devices are taken."""

    dtype: str | None = None
    """The dtype that floating values are added in; None: their own."""
    slow: Axes = ()
    """The axes that cross the slow network."""

    def in_steps(self, axes: Axes, num_bytes: int) -> bool:
        """Whether a sum of arrays of ``num_bytes`` over ``axes`` is taken in steps: axes of both kinds, and enough."""
        crossing = sum(a in self.slow for a in axes)
        return 0 < crossing < len(axes) and num_bytes >= WORTH_STEPS_BYTES

    @functools.cached_property
    def in_one(self) -> "Summing":
        """The same, each sum in one collective."""
        return Summing(self.dtype)

    def fast(self, axes: Axes) -> Axes:
        """Those of ``axes`` that stay within a slice."""
        return tuple(a for a in axes if a not in self.slow)

    def crossing(self, axes: Axes) -> Axes:
        """Those of ``axes`` that cross the slow network."""
        return tuple(a for a in axes if a in self.slow)


PLAIN = Summing()
"""One collective, in the operand's dtype."""
