"""Run: a region's function on a batch, one microbatch after the other.

    loss(model, batch)   ->   sum over i of loss(model, microbatch i)

The function is traced on one microbatch, a slice of each argument that has the dim; its dims keep the sizes of the
whole, as everywhere in a region, so that a mean over the batch divides by its whole size and the microbatches' results
add up. The trace says what the results are (``sums.py``). Then it is run in turns, on every device
(``accumulate.py``), or through the stages of a pipeline (``pipeline.py``), and gradients are added up on the way: what
``jax.grad`` makes of the region outside is a scale on what was computed here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import jaxpr_as_fun

from .. import collectives
from ..collectives import TIME, Turn, taking
from ..errors import fail
from ..scope import Axes, Split, Stages, staging
from ..summing import Summing
from .accumulate import Accumulated, Function
from .cut import cut, has_stages, leads_through_stages
from .pipeline import Pipelined
from .results import Arrays, Results, Within, counted_once
from .sums import PART, SAME, SHIFTED, check_rule, kinds, sums_under_rules, waits_over


@dataclass(frozen=True)
class Microbatches:
    """How a batch is worked on."""

    num: int
    schedule: str
    stages: Stages | None
    num_devices: int
    """Along the pipeline; 1 without one."""
    sums: Summing
    """How sums across devices are taken."""
    in_step: bool
    """Whether a permute waits for every device (``collectives.Turn``)."""

    def run(
        self,
        function: Callable[[Arrays], tuple[Arrays, list[Split]]],
        arrays: Sequence[Any],
        places: Sequence[int | None],
        names: Callable[[int], str],
    ) -> Arrays:
        """The results of ``function`` on the whole batch.

        Args:
            function: of the arrays of one microbatch, to its results and, for each, the axes of its dims.
            arrays: one device's slices of the arguments, of the whole batch.
            places: for each the position of the dim that microbatches divide, None where it has none.
            names: what an error calls a result, by its number.
        """
        once = _Once(function, places, self.num, self.in_step)
        arrays, stages = list(arrays), self.stages
        first = once.traced(arrays, stages)
        if stages is not None and not has_stages(first.jaxpr):
            stages = None
            first = once.traced(arrays, None)
        told = zip(kinds(first.jaxpr, [*(SAME for _ in arrays), PART]), once.out_places, strict=True)
        found = [PART if kind == SAME and at is not None else kind for kind, at in told]  # zeros that have the dim
        for k, (kind, at) in enumerate(zip(found, once.out_places, strict=True)):
            if (at is None) == (kind == PART) and kind != SAME:
                raise fail(_not_put_together(names(k)))
            if once.split_apart[k]:
                raise fail(
                    f"pipeline: {names(k)} is split over the axis of the pipeline. What layers hold stays with their "
                    "stages: return it from a region without microbatches=."
                )
        ready = self._varied(arrays, first, stages)
        as_before = all(a is b for a, b in zip(ready, arrays, strict=True))
        trace = first if as_before else once.traced(ready, stages)
        results = Results([v.aval for v in trace.jaxpr.outvars], found, once.out_places, self.num, self.sums)
        program = self._program(once, trace, ready, results, stages)
        closed_over = [x for x in trace.consts if isinstance(x, Tracer)]
        return _differentiable(program, results, names, len(ready))(*ready, *closed_over)

    def _varied(self, arrays: Arrays, trace: Any, stages: Stages | None) -> Arrays:
        """The arguments, varying already over the axes over which every use of them varies: the sums of their gradients
        are then taken once for all microbatches."""
        alone = frozenset(_apart(stages))

        def one(x: Any, v: Any) -> Any:
            inexact = jnp.issubdtype(x.dtype, jnp.inexact)
            axes = (waits_over(trace.jaxpr, v) or frozenset()) if inexact else frozenset()
            return collectives.vary(x, axes | alone, self.sums)

        return [one(x, v) for x, v in zip(arrays, trace.jaxpr.invars[:-1], strict=True)]

    def _program(self, once: "_Once", trace: Any, arrays: Arrays, results: Results, stages: Stages | None) -> Any:
        same = None
        if SHIFTED in results.kinds:
            if sums_under_rules(trace.jaxpr):
                raise fail(
                    "microbatches: a function with a custom gradient sums over the dim that microbatches divide, and "
                    "something that does not depend on the batch (a penalty) is added to a sum: it is to be counted "
                    "once.\n  Let that function keep the dim and sum what it returns, or add the rest outside the "
                    "region."
                )
            alone = once.traced(arrays, stages, without_sums=True)
            if stages is not None and leads_through_stages(alone, [k == SHIFTED for k in results.kinds]):
                raise fail(
                    "pipeline: layers add something that does not depend on the batch (a penalty on their weights, or "
                    "the 0.0 that a sum begins with) to a sum over it. Each device has some of the layers only.\n  Let "
                    "what goes round the scan keep the dim that microbatches divide, beginning with mw.zeros of it, "
                    "and sum it after the scan; add a penalty outside the region."
                )
            same = once.function_of(alone)
        if stages is None:
            return Accumulated(counted_once(once.function_of(trace), same, results), results, once.within(None))
        return Pipelined(cut(trace), same, results, self.schedule, stages, self.num_devices, once.within(stages))


class _Once:
    """A function on one microbatch."""

    def __init__(self, function: Callable[..., Any], places: Sequence[int | None], num: int, in_step: bool) -> None:
        self.function, self.places, self.num, self.in_step = function, places, num, in_step
        self.out_places: list[int | None] = []
        self.split_apart: list[bool] = []

    def within(self, stages: Stages | None, without_sums: bool = False, first: bool = False) -> Within:
        """What gives, for a microbatch's number, the context in which it is worked on: rules of gradients, which JAX
        calls late, need it too."""

        @contextmanager
        def on(i: Any) -> Iterator[None]:
            turn = Turn(i, self.num, without_sums, _apart(stages), first, self.in_step, judge=check_rule)
            with taking(turn), staging(stages):
                yield

        return on

    def traced(self, arrays: Arrays, stages: Stages | None, without_sums: bool = False) -> Any:
        """Its trace: a function of the whole batch's arrays and the microbatch's number."""

        def run(arrays: Arrays, i: Any) -> Arrays:
            slices = [self._slice(x, at, i) for x, at in zip(arrays, self.places, strict=True)]
            with self.within(stages, without_sums, first=True)(i):
                results, splits = self.function(slices)
            self.out_places = [next((k for k, axes in enumerate(s) if TIME in axes), None) for s in splits]
            self.split_apart = [any(set(axes).intersection(_apart(stages)) for axes in s) for s in splits]
            return results

        number = collectives.vary(jnp.int32(0), frozenset(_apart(stages)))
        return jax.make_jaxpr(run)(arrays, number)

    def _slice(self, x: Any, at: int | None, i: Any) -> Any:
        if at is None:
            return x
        size = x.shape[at] // self.num
        return lax.dynamic_slice_in_dim(x, i * size, size, at)

    @staticmethod
    def function_of(trace: Any) -> Function:
        run = jaxpr_as_fun(trace)
        return lambda arrays, i: run(*arrays, i)


def _apart(stages: Stages | None) -> Axes:
    """The axes along which devices are at different stages."""
    return stages.axes if stages is not None else ()


def _differentiable(program: Any, results: Results, names: Callable[[int], str], num: int) -> Callable[..., Arrays]:
    """The program as a function of its ``num`` arguments, and of what it closes over, whose gradient is computed with
    its values."""

    @jax.custom_vjp
    def run(*arrays: Any) -> Arrays:
        return program.values(list(arrays[:num]))

    def forward(*every: Any) -> tuple[Arrays, Any]:
        if any(x.perturbed for x in every[num:]):
            raise fail(
                "microbatches: a gradient was asked for in a value that the function given to mw.spmd closes over. "
                "Pass it as an argument."
            )
        given = every[:num]
        arrays = [x.value for x in given]
        wanted = [k for k, x in enumerate(given) if x.perturbed and jnp.issubdtype(x.value.dtype, jnp.inexact)]
        if not wanted:
            return program.values(arrays), ({}, len(every))
        if results.loss is None:
            raise fail(
                "microbatches: gradients are those of one number, a sum or mean over the batch, and the region returns "
                "none. Return the loss from the function given to mw.spmd."
            )
        found, gradients = program.values_and_gradients(arrays, wanted)
        return found, (dict(zip(wanted, gradients, strict=True)), len(every))

    def backward(kept: Any, cotangents: Any) -> tuple[Any, ...]:
        gradients, num_given = kept
        for k, c in enumerate(cotangents):
            if k != results.loss and not isinstance(c, SymbolicZero):
                raise fail(
                    f"microbatches: a gradient of {names(k)} was asked for; with microbatches= the region's gradients "
                    f"are those of {names(results.loss or 0)}, computed while each microbatch is at hand. Return the "
                    "number to be differentiated first."
                )
        scale = cotangents[results.loss] if results.loss is not None else None
        if isinstance(scale, SymbolicZero) or scale is None:
            gradients = {}
        return tuple(_scaled(gradients[k], scale) if k in gradients else None for k in range(num_given))

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run


def _scaled(gradient: Any, by: Any) -> Any:
    """In the wider of both dtypes: a scale for float16 gradients may be beyond what float16 holds."""
    by = collectives.vary(by, collectives.varies_over(gradient))
    with jax.numpy_dtype_promotion("standard"):
        wide = jnp.promote_types(gradient.dtype, by.dtype)
    return (gradient.astype(wide) * by.astype(wide)).astype(gradient.dtype)


def _not_put_together(name: str) -> str:
    return (
        f"microbatches: {name} depends on the batch, but is neither a sum (or mean) over the dim that microbatches "
        "divide nor has that dim, so that those of the microbatches cannot be put together.\n  Return sums, means or "
        "tensors with that dim; take gradients outside the region; or leave microbatches= out of the layout."
    )
