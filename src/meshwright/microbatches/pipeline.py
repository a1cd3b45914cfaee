"""Pipeline: microbatches through the stages of a scan over layers, each device at its own stage.

Devices follow a table (``order.py``): in each tick a device does a pass of one of its stages forward or backward on
some microbatch, or waits; then what comes out goes one device further, activations onwards and their gradients back.
All run one program: which pass it is, is looked up.

    forward    closed over, x, the stage's layers   ->   x of the next stage
    backward   the same again, and the gradient of what came out   ->   gradients of x, of the layers, of all else

A pass backward does the stage's forward pass again: of a microbatch in work a device keeps what went into its stages,
and no more. The first stage makes what goes into it, from the batch; the last one goes on to the results, in its pass
backward where there is one. Gradients are added up where the parameters rest; those of what all stages share (an
embedding, a head) are summed over the pipeline once, at the end, by the transpose of their varying over it.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import collectives
from ..scope import Stages
from .cut import Cut
from .deal import dealt, returned
from .order import BACKWARD, FORWARD, Form, Order, Pass, ordered, slots
from .results import Arrays, Results, Within, added, counted_once, zeros

AGAIN = "mw.again"
"""The name, in a trace, of a stage's pass forward that its pass backward does again."""


class Pipelined:
    """A program that takes microbatches through the stages of a pipeline."""

    def __init__(
        self, parts: Cut, same: Callable[..., Arrays] | None, results: Results, schedule: str, stages: Stages, num: int,
        within: Within,
    ) -> None:  # fmt: skip
        self.within = within
        self.parts, self.results, self.schedule, self.stages, self.num_devices = parts, results, schedule, stages, num
        alone = None if same is None else (lambda arrays, i, _: same(arrays, i))
        self.finish = counted_once(parts.after, alone, results)

    def values(self, arrays: Arrays) -> Arrays:
        """The results on the whole batch."""
        order = ordered(self.schedule, self.num_devices, self.stages.num, self.results.num, False)
        stacks = dealt(self.parts.stacks(arrays), self.stages, self.num_devices)
        work = _Work(self, order, arrays, (), stacks)
        return self._everywhere(work.run().results)

    def values_and_gradients(self, arrays: Arrays, wanted: Sequence[int]) -> tuple[Arrays, Arrays]:
        """The results, and the gradients of the loss in the arguments ``wanted``."""
        order = ordered(self.schedule, self.num_devices, self.stages.num, self.results.num, True)

        def stacked(given: Arrays) -> tuple[Arrays, Arrays]:
            every = self.parts.stacks(_replaced(arrays, wanted, given))
            return _parted(every)[0], every

        _, pull, every = jax.vjp(stacked, [arrays[k] for k in wanted], has_aux=True)
        stacks = dealt(every, self.stages, self.num_devices)
        end = _Work(self, order, arrays, wanted, stacks).run()
        of_stacks = [g.astype(x.dtype) for g, x in zip(end.of_stacks, _parted(stacks)[0], strict=True)]
        (through_stacks,) = pull(returned(of_stacks, self.stages, self.num_devices))
        sums = [added(a, b).astype(b.dtype) for a, b in zip(end.of_arrays, through_stacks, strict=True)]
        return self._everywhere(end.results), sums

    def _everywhere(self, results: Arrays) -> Arrays:
        """The last stage's results on every device."""
        last = collectives.index(self.stages.axes) == self.num_devices - 1
        return [collectives.from_one(x, last, self.stages.axes) for x in self.results.end(results)]


def _parted(values: Sequence[Any]) -> tuple[Arrays, Arrays]:
    """What has gradients, and what has none."""
    inexact = [jnp.issubdtype(x.dtype, jnp.inexact) for x in values]
    return (
        [x for x, i in zip(values, inexact, strict=True) if i],
        [x for x, i in zip(values, inexact, strict=True) if not i],
    )


def _joined(like: Sequence[Any], floating: Arrays, others: Arrays) -> Arrays:
    """The inverse of ``_parted``, in the order of ``like``."""
    given, rest = iter(floating), iter(others)
    return [next(given) if jnp.issubdtype(x.dtype, jnp.inexact) else next(rest) for x in like]


def _replaced(arrays: Arrays, wanted: Sequence[int], given: Arrays) -> Arrays:
    every = list(arrays)
    for k, x in zip(wanted, given, strict=True):
        every[k] = x
    return every


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    """What a device has between two ticks."""

    onward: Arrays
    """What has arrived of a stage before."""
    back: Arrays
    """The gradient that has arrived of a stage after."""
    inputs: Arrays
    """What went into stages whose last use is to come, by slot."""
    cotangents: Arrays
    """Gradients that wait, by slot."""
    of_stacks: Arrays
    of_arrays: Arrays
    """Gradients so far."""
    results: Arrays


class _Work:
    """One order of passes, done."""

    def __init__(self, whole: Pipelined, order: Order, arrays: Arrays, wanted: Sequence[int], stacks: Arrays) -> None:
        self.whole, self.parts, self.order = whole, whole.parts, order
        self.arrays, self.wanted, self.stacks = arrays, wanted, stacks
        self.travelling, (self.floating, _) = self.parts.travelling, _parted(self.parts.travelling)
        self.backward = any(p is not None and p.kind == BACKWARD for row in order.passes for p in row)
        self.slots = {kind: slots(order, kind) for kind in (FORWARD, BACKWARD)}

    def run(self) -> _State:
        state = self._begin()
        for first, last, period in self._segments():
            state = self._segment(state, first, last, period)
        return state

    def _begin(self) -> _State:
        stacks, _ = _parted(self.stacks)

        def room(avals: Sequence[Any], kind: str) -> Arrays:
            return [zeros(a.update(shape=(self.slots[kind].num + 1, *a.shape))) for a in avals]

        return _State(
            [zeros(a) for a in self.travelling],
            [zeros(a) for a in self.floating],
            room(self.travelling, FORWARD),
            room(self.floating, BACKWARD),
            [self.whole.results.room_like(x) for x in stacks] if self.backward else [],
            [self.whole.results.room_like(self.arrays[k]) for k in self.wanted],
            self.whole.results.begin(),
        )

    def _segments(self) -> list[tuple[int, int, int]]:
        """Runs of ticks that one loop does: first tick, last, and how many ticks a turn of the loop has. All passes
        forward and then all passes backward are two runs; where they alternate, a turn is two ticks."""
        rows = self.order.passes
        with_back = [t for t, row in enumerate(rows) if any(p is not None and p.kind == BACKWARD for p in row)]
        with_forward = [t for t, row in enumerate(rows) if any(p is not None and p.kind == FORWARD for p in row)]
        if not with_back:
            return [(0, len(rows), 1)]
        if with_forward[-1] < with_back[0]:
            return [(0, with_back[0], 1), (with_back[0], len(rows), 1)]
        return [(0, len(rows), 2)]

    def _segment(self, state: _State, first: int, last: int, period: int) -> _State:
        ticks = [_Tick(self, range(first + r, last, period)) for r in range(period)]
        place = collectives.index(self.whole.stages.axes)

        def turn(state: _State, tables: list[_Place]) -> tuple[_State, None]:
            for tick, table in zip(ticks, tables, strict=True):
                state = tick.run(state, _Place(*_read(table, place)))
            return state, None

        return lax.scan(turn, state, [tick.tables for tick in ticks])[0]

    def forward(self, state: _State, at: "_Place", first: bool, last: bool) -> tuple[_State, Arrays]:
        """A pass forward; the new state and what goes onward."""
        if last and self.backward:
            return state, [zeros(a) for a in self.travelling]  # done in the pass backward
        i = at.microbatch
        x = self.parts.before(self.arrays, i) if first else _read(state.inputs, at.slot)
        y = self.parts.stage(self.parts.closed_over(self.arrays, i), x, self.stacks, at.run)
        if last:
            results = self.whole.finish(self.arrays, i, y)
            state = replace(state, results=self.whole.results.add(state.results, results, i))
        return state, y

    def back(self, state: _State, at: "_Place", first: bool, last: bool) -> tuple[_State, Arrays]:
        """A pass backward; the new state and the gradient that goes back."""
        i, whole = at.microbatch, self.whole
        floating, others = _parted(_read(state.inputs, at.slot))
        stacks, fixed = _parted(self.stacks)

        def again(given: Arrays, stacks: Arrays, floating: Arrays) -> tuple[Arrays, Arrays]:
            arrays = _replaced(self.arrays, self.wanted, given)
            x = self.parts.before(arrays, i) if first else _joined(self.travelling, floating, others)
            every = _joined(self.stacks, stacks, fixed)
            y = self.parts.stage(self.parts.closed_over(arrays, i), x, every, at.run)
            if not last:
                return _parted(y)[0], []
            results = whole.finish(arrays, i, y)
            assert whole.results.loss is not None
            return [results[whole.results.loss]], results

        with contextlib.nullcontext() if last else jax.named_scope(AGAIN):  # the last stage does it here first
            out, pull, results = jax.vjp(again, [self.arrays[k] for k in self.wanted], stacks, floating, has_aux=True)
        ones = [collectives.vary(jnp.ones(y.shape, y.dtype), collectives.varies_over(y)) for y in out]
        of_arrays, of_stacks, of_inputs = pull(ones if last else _read(state.cotangents, at.back_slot))
        state = replace(
            state,
            of_arrays=[added(a, b) for a, b in zip(state.of_arrays, of_arrays, strict=True)],
            of_stacks=[added(a, b) for a, b in zip(state.of_stacks, of_stacks, strict=True)],
        )
        if last:
            state = replace(state, results=whole.results.add(state.results, results, i))
        return state, of_inputs


class _Place(NamedTuple):
    """What a device looks up of a tick: numbers, int32 scalars."""

    form: Any
    """Which kind of pass it does."""
    microbatch: Any
    run: Any
    """Which of its stages."""
    slot: Any
    """Where what goes into the stage is kept."""
    back_slot: Any
    """Where the gradient of what comes out of it is."""
    arrived: Any
    """The slot for what has arrived from the stage before."""
    arrived_back: Any
    """The slot for what has arrived from the stage after."""


class _Tick:
    """A tick of a loop over passes: what each device does in it in each turn, and who then sends to whom."""

    def __init__(self, work: _Work, ticks: range) -> None:
        self.work, self.ticks = work, ticks
        order, num = work.order, work.order.num_devices
        rows = [order.passes[t] for t in ticks]
        self.forms = order.forms(ticks)
        forward, back = work.slots[FORWARD], work.slots[BACKWARD]

        def table(value: Callable[[Pass], int]) -> np.ndarray:
            return np.array([[0 if p is None else value(p) for p in row] for row in rows], np.int32)

        self.tables = _Place(
            np.array([[self.forms.index(order.form(p)) for p in row] for row in rows], np.int32),
            table(lambda p: p.microbatch),
            table(lambda p: p.stage // num),
            table(lambda p: forward.of.get((p.stage, p.microbatch), forward.num)),
            table(lambda p: back.of.get((p.stage, p.microbatch), back.num)),
            *(np.asarray(kept.store[[*ticks]], np.int32) for kept in (forward, back)),
        )
        sent = [(p.kind, d) for row in rows for d, p in enumerate(row) if p is not None and order.sends(p)]
        self.onward = sorted({(d, (d + 1) % num) for kind, d in sent if kind == FORWARD})
        self.backward = sorted({(d, (d - 1) % num) for kind, d in sent if kind == BACKWARD})

    def run(self, state: _State, at: _Place) -> _State:
        state = replace(
            state,
            inputs=_stored(state.inputs, state.onward, at.arrived),
            cotangents=_stored(state.cotangents, state.back, at.arrived_back),
        )
        with jax.named_scope(self.work.order.text(self.ticks)):
            state, onward, back = lax.switch(at.form, [self._branch(form) for form in self.forms], state, at)
        axes = self.work.whole.stages.axes
        onward = [collectives.permute(x, axes, self.onward) for x in onward] if self.onward else onward
        back = [collectives.permute(x, axes, self.backward) for x in back] if self.backward else back
        return replace(state, onward=onward, back=back)

    def _branch(self, form: Form) -> Callable[..., Any]:
        work, (kind, first, last) = self.work, form

        def branch(before: _State, at: _Place) -> tuple[_State, Arrays, Arrays]:
            state, onward, back = before, [zeros(a) for a in work.travelling], [zeros(a) for a in work.floating]
            with work.whole.within(at.microbatch):
                if kind == FORWARD:
                    state, onward = work.forward(state, at, first, last)
                elif kind == BACKWARD:
                    state, back = work.back(state, at, first, last)
            return jax.tree.map(_typed_as, state, before), _typed(onward, work.travelling), _typed(back, work.floating)

        return branch


def _read(room: Sequence[Any], at: Any) -> Arrays:
    return [lax.dynamic_index_in_dim(b, at, 0, keepdims=False) for b in room]


def _stored(room: Arrays, arrived: Arrays, slot: Any) -> Arrays:
    return [lax.dynamic_update_index_in_dim(b, x, slot, 0) for b, x in zip(room, arrived, strict=True)]


def _typed_as(x: Any, like: Any) -> Any:
    return collectives.vary(x, collectives.varies_over(like))


def _typed(values: Arrays, avals: Sequence[Any]) -> Arrays:
    return [collectives.vary(x, a.manual_axis_type.varying) for x, a in zip(values, avals, strict=True)]
