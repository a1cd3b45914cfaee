"""Passes: how often the branches of a pipeline run, on each of its devices.

A pipeline (``microbatches/``) is a loop over ticks in which a choice says what a device does: which kind of pass, or
nothing. What is chosen in which tick is a table, whose order the choice's name in the trace tells; so nothing about it
is unsure. It differs from device to device, and so everything that is counted of a program has a number for each
device along the pipeline:

    runs = (8, 8, 8, 0)     on 4 devices a pass forward in the middle: the last does its own with the pass backward

A program without a pipeline has one number. Where it has pipelines of several lengths, devices of a shorter one stand
for several of the longest.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from ..microbatches.order import Order, order_in

Runs = tuple[int, ...]
"""How often something runs in one call, on each device along the pipeline; one number where there is none."""


@dataclass(frozen=True)
class Passes:
    """What a choice in a loop over ticks does."""

    order: Order
    ticks: range
    """Those of the loop's turns, one each."""

    @cached_property
    def chosen(self) -> tuple[tuple[int, ...], ...]:
        """The branch of each device, by turn and then by device."""
        forms = self.order.forms(self.ticks)
        rows = (self.order.passes[t] for t in self.ticks)
        return tuple(tuple(forms.index(self.order.form(p)) for p in row) for row in rows)

    @cached_property
    def _counts(self) -> Mapping[tuple[int, int], int]:
        return Counter((branch, d) for row in self.chosen for d, branch in enumerate(row))

    def runs(self, branch: int, around: Runs) -> Runs:
        """How often a branch runs; ``around``: the loop's turns, all its runs together."""
        turns, num = len(self.ticks), self.order.num_devices
        return tuple(n // turns * self._counts[branch, d % num] for d, n in enumerate(around))

    def on(self, device: int, turns: int) -> Iterator[tuple[int, int]]:
        """The branches that run on one device, and how often; ``turns``: the loop's, all its runs together."""
        for branch in range(len(self.order.forms(self.ticks))):
            if count := self._counts[branch, device % self.order.num_devices]:
                yield branch, turns // len(self.ticks) * count


def passes_in(name: str, num_branches: int) -> Passes | None:
    """The passes of a choice, from its name in a trace or in a compiled program; None of one that is the user's."""
    found = order_in(name)
    if found is None or name.rpartition("]")[2] not in ("", "/cond"):
        return None
    passes = Passes(*found)
    return passes if len(passes.order.forms(passes.ticks)) == num_branches else None
