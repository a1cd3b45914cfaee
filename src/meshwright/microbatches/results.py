"""Results: how those of the microbatches become that of the batch."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .. import collectives
from ..summing import Summing
from .sums import PART, SAME, SHIFTED, SUM

Arrays = list[Any]
Within = Callable[[Any], AbstractContextManager[None]]
"""Of a microbatch's number: the context in which it is worked on."""


def zeros(aval: Any) -> Any:
    """Zeros of a type, varying as it says."""
    return collectives.vary(jnp.zeros(aval.shape, aval.dtype), aval.manual_axis_type.varying)


def added(room: Any, more: Any) -> Any:
    """``room`` with an addend, in the dtype of the room."""
    return room + more.astype(room.dtype)


@dataclass(frozen=True)
class Results:
    """What the results of one microbatch are, and how they are put together."""

    avals: Sequence[Any]
    """Their types."""
    kinds: Sequence[str]
    places: Sequence[int | None]
    """The position of the dim that the microbatches divide."""
    num: int
    """How many microbatches there are."""
    sums: Summing
    """How sums are taken."""

    def begin(self) -> Arrays:
        """Room for the whole batch's results."""
        return [zeros(self._whole(*group)) for group in zip(self.avals, self.kinds, self.places, strict=True)]

    def end(self, room: Arrays) -> Arrays:
        """The results, when those of all microbatches are in it."""
        return [x.astype(a.dtype) if x.dtype != a.dtype else x for x, a in zip(room, self.avals, strict=True)]

    def room_like(self, x: Any) -> Any:
        """Room for the sum of what microbatches add to ``x``."""
        return zeros(jax.typeof(x).update(dtype=self.sums.wide(x.dtype)))

    def _whole(self, aval: Any, kind: str, at: int | None) -> Any:
        if kind in (SUM, SHIFTED):
            return aval.update(dtype=self.sums.wide(aval.dtype))
        if kind != PART or at is None:
            return aval
        return aval.update(shape=tuple(n * self.num if k == at else n for k, n in enumerate(aval.shape)))

    def add(self, room: Arrays, results: Sequence[Any], i: Any) -> Arrays:
        """``room`` with the results of microbatch ``i``."""
        return [self._add(*group, i) for group in zip(room, results, self.kinds, self.places, strict=True)]

    @staticmethod
    def _add(room: Any, result: Any, kind: str, at: int | None, i: Any) -> Any:
        if kind in (SUM, SHIFTED):
            return added(room, result)
        if kind == SAME or at is None:
            return result
        return lax.dynamic_update_slice_in_dim(room, result, i * result.shape[at], at)

    @property
    def loss(self) -> int | None:
        """Which result gradients are of: the first that is a number and a sum."""
        sums = (
            k
            for k, (aval, kind) in enumerate(zip(self.avals, self.kinds, strict=True))
            if kind in (SUM, SHIFTED) and not aval.shape and jnp.issubdtype(aval.dtype, jnp.floating)
        )
        return next(sums, None)


def counted_once(function: Callable[..., Arrays], same: Callable[..., Arrays] | None, results: Results) -> Any:
    """``function(arrays, i, …)``, with what is the same in every microbatch's sum counted in the first alone. ``same``
    says what that is."""
    if same is None:
        return function

    def run(arrays: Arrays, i: Any, *more: Any) -> Arrays:
        found, always = function(arrays, i, *more), same(arrays, i, *more)
        return [
            jnp.where(i == 0, x, _less(x, a)) if kind == SHIFTED else x
            for x, a, kind in zip(found, always, results.kinds, strict=True)
        ]

    return run


def _less(x: Any, always: Any) -> Any:
    """``x`` less what is the same in every microbatch; infinities were counted in the first."""
    if not jnp.issubdtype(always.dtype, jnp.inexact):
        return x - always
    finite = jnp.isfinite(always)
    return jnp.where(finite, x - jnp.where(finite, always, 0), 0)
