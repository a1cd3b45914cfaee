"""Accumulate: microbatches one after the other on every device, and gradients added up as they come.

Each microbatch's gradient is taken as soon as its loss is known, so that the activations of one alone are in memory,
and added to the others' where parameters rest: split, if they are.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .results import Arrays, Results, Within, added

Function = Callable[[Arrays, Any], Arrays]
"""The results of a microbatch: of the region's arguments, and its number."""


class Accumulated:
    """A program that takes microbatches in turn."""

    def __init__(self, function: Function, results: Results, within: Within) -> None:
        self.function, self.results, self.within = function, results, within

    def values(self, arrays: Arrays) -> Arrays:
        """The results on the whole batch."""

        def turn(room: Arrays, i: Any) -> tuple[Arrays, None]:
            return self.results.add(room, self.function(arrays, i), i), None

        room, _ = lax.scan(turn, self.results.begin(), jnp.arange(self.results.num, dtype=jnp.int32))
        return self.results.end(room)

    def values_and_gradients(self, arrays: Arrays, wanted: Sequence[int]) -> tuple[Arrays, Arrays]:
        """The results, and the gradients of the loss in the arguments ``wanted``."""
        loss = self.results.loss
        assert loss is not None

        def of_wanted(given: Arrays, i: Any) -> tuple[Any, Arrays]:
            every = list(arrays)
            for k, x in zip(wanted, given, strict=True):
                every[k] = x
            found = self.function(every, i)
            return found[loss], found

        def turn(room: tuple[Arrays, Arrays], i: Any) -> tuple[tuple[Arrays, Arrays], None]:
            results, gradients = room
            with self.within(i):
                (_, found), new = jax.value_and_grad(of_wanted, has_aux=True)([arrays[k] for k in wanted], i)
            so_far = [added(g, n) for g, n in zip(gradients, new, strict=True)]
            return (self.results.add(results, found, i), so_far), None

        first = [self.results.room_like(arrays[k]) for k in wanted]
        numbers = jnp.arange(self.results.num, dtype=jnp.int32)
        room, gradients = lax.scan(turn, (self.results.begin(), first), numbers)[0]
        return self.results.end(room), [g.astype(arrays[k].dtype) for k, g in zip(wanted, gradients, strict=True)]
