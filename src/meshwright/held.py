"""What a device holds: slices, whole arrays made of them, and cells.

A cell is one array inside a region, and what was derived from it, each thing once. The sum that three products of one
tensor need, its gathered form, its form that varies over more axes: whoever needs it first makes it, and the others
find it. It is made in the trace in which the array was made, wherever the first use stands, so that a use inside a
loop or a rematerialised function leaves nothing behind that its neighbours cannot see.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.extend.core import set_current_trace, take_current_trace

from . import collectives
from .dims import Dims, names_of
from .scope import Axes, Scope, Split
from .summing import PLAIN


class Cell:
    """One array of a region, and what was derived from it, each thing once."""

    __slots__ = ("came", "derived", "raw", "scatter", "shared", "trace")

    def __init__(self, raw: Any) -> None:
        self.raw = raw
        self.derived: dict[Any, Any] = {}
        self.shared: Callable[[], Any] | None = None
        self.scatter: Callable[[Axes, int], Any] | None = None
        self.came = False  # whether it came into the region, as an argument
        with take_current_trace() as trace:
            self.trace = trace

    @property
    def here(self) -> bool:
        """Whether what is traced now is what made the array."""
        with take_current_trace() as trace:
            return trace is self.trace

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """``make()``, evaluated once and in the trace in which the array was made."""
        if key not in self.derived:
            with set_current_trace(self.trace):
                self.derived[key] = make()
        return self.derived[key]


def told(these: Dims) -> AbstractContextManager[None]:
    """A context in which the program's operations carry the names of a tensor: profilers and the plan show them."""
    return jax.named_scope(f"mw[{' '.join(names_of(these))}]")  # type: ignore[no-any-return]


def merge_runs(array: Any, runs: tuple[int, ...]) -> Any:
    """``array`` with runs of neighbouring dims merged into one: ``runs`` says how many dims each new one is made of."""
    if len(runs) == array.ndim:
        return array
    sizes = iter(array.shape)
    return jax.lax.reshape(array, tuple(math.prod(next(sizes) for _ in range(n)) for n in runs))


def gathered(array: Any, rest: Split | None, want: frozenset[str], scope: Scope | None) -> Any:
    """Join what the devices along ``rest`` hold. Where the use varies over an axis (it is in ``want``), the backward
    pass reduce-scatters; where it does not, every device has the whole gradient and keeps its slice."""
    for i, axes in enumerate(rest or ()):
        if axes and want.issuperset(axes):
            array = collectives.gather(array, axes, i, scope.sums if scope else PLAIN)
        elif axes:
            array = collectives.gather_equal(array, axes, i)
    return array


def slice_own(array: Any, scope: Scope, split: Split) -> Any:
    """A device's slice of a whole array that every device holds."""
    for i, axes in enumerate(split):
        if axes:
            array = collectives.own_slice(array, axes, i, scope.size(axes))
    return array
