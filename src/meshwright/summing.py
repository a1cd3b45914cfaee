"""Summing: how sums across devices are taken.

A sum over axes of which some cross a slow network (``mw.Mesh(..., dcn=...)``) is taken in steps, so that of what is
summed only each device's share crosses it:

    batch:(dcn,data)     reduce-scatter over data     each device is left with 1/data of the sums of its slice
                         all-reduce over dcn          of that share alone
                         all-gather over data         everybody has everything again
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

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

    def wide(self, dtype: Any) -> Any:
        """The dtype in which addends of ``dtype`` are added up in memory: the wider of both, of floating ones."""
        if self.dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            return dtype
        return max(dtype, jnp.dtype(self.dtype), key=lambda d: jnp.finfo(d).bits)

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
