"""The loop: batches in, steps done, a line for each, held-out losses and checkpoints at intervals.

A step is dispatched before the loss of the one before it is read, so the devices always have work while Python reports.
Per step the loop makes the next batch and hands over; everything else is one compiled function.
"""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ..errors import fail
from ..plan import Plan, plan
from .buckets import Buckets
from .checkpoint import Checkpoints
from .data import Batch, Batches, Source, Windows, batch_dims
from .interrupt import Stop
from .optimizer import make_optimizer
from .recipe import Recipe
from .report import Report
from .step import Place, State, loss, placed, state_maker, train_step
from .text import Corpus, Document
from .tokenizer import Tokenizer, sample

HELD_OUT_BATCHES = 8
"""How many batches the held-out loss is taken over, at most."""
QUICKLY = {"xla_backend_optimization_level": 1}
"""For a program that runs once: random numbers take XLA long to optimise, and come out the same without."""


@dataclass(frozen=True, eq=False)
class Data:
    """The tokens of a run."""

    tokenizer: Tokenizer
    training: Source
    held_out: Source

    @classmethod
    def prepare(cls, corpus: Corpus, recipe: Recipe, tokenizer: Tokenizer | None = None) -> "Data":
        """Train the tokenizer, unless there is one, and cut the corpus into windows, or put it into buckets."""
        if tokenizer is None:
            texts = (document.text for document in corpus.training)
            tokenizer = Tokenizer.train(sample(texts, recipe.text.tokenizer_bytes), recipe.model.vocab)

        def source(documents: tuple[Document, ...]) -> Source:
            tokens = tokenizer.encode_all([d.text for d in documents])
            if recipe.buckets:
                return Buckets.sort(tokens, tokenizer.end, (*recipe.buckets, recipe.length))
            return Windows.cut(tokens, tokenizer.end, recipe.length)

        return cls(tokenizer, source(corpus.training), source(corpus.held_out))


@dataclass(frozen=True, eq=False)
class Program:
    """What a recipe compiles to at a place."""

    recipe: Recipe
    place: Place

    def make_state(self, key: jax.Array) -> State:
        """The state before the first step: compile it, and each device makes its own slices."""
        optimizer = make_optimizer(self.recipe.optimizer, self.recipe.steps)
        return state_maker(self.recipe.model, optimizer, self.place)(key)

    def first_state(self) -> State:
        """The state before the first step."""
        make = jax.jit(self.make_state, compiler_options=QUICKLY)
        return make(jax.random.key(self.recipe.seed))

    def shapes(self) -> State:
        """The state's shapes and where its slices lie, to restore a checkpoint to."""
        return placed(jax.eval_shape(self.make_state, jax.random.key(0)), self.place)

    @functools.cached_property
    def step(self) -> Callable[[State, Batch], tuple[State, jax.Array]]:
        """The compiled step: see ``train_step``."""
        return train_step(make_optimizer(self.recipe.optimizer, self.recipe.steps), self.place)

    def batches(self, source: Source, seed: int | None) -> Batches:
        """The batches of ``source``: shuffled by ``seed``, or in order where it is None."""
        return Batches(source, self.recipe.batch, self.place.mesh, self.place.layout, seed)

    def batch_shapes(self, length: int | None = None) -> Batch:
        """A batch's shapes and where its slices lie; of the bucket of a length, None: the longest."""
        recipe, length = self.recipe, length or self.recipe.length
        these = batch_dims(recipe.sequences(length), length)
        return self.place.shard(Batch.shapes(these, weighted=bool(recipe.buckets)))

    def check(self) -> None:
        """Trace a step on shapes, of every bucket: whatever is wrong with the layout is an error now, before any work
        is done."""
        for length in (*self.recipe.buckets, self.recipe.length):
            jax.eval_shape(self.step, self.shapes(), self.batch_shapes(length))

    def plan(self) -> Plan:
        """What a step will do, read from its trace; the mesh may be one that is only described."""
        found = plan(self.step, self.shapes(), self.batch_shapes())
        return found.on(self.place.mesh) if self.place.mesh.topology is not None else found

    def evaluator(self, source: Source) -> Callable[[State], float]:
        """A function of a state to the held-out loss, the mean over the tokens of a few batches. Windows that do not
        fill theirs are read again."""
        batches = self.batches(source, None)
        num = min(HELD_OUT_BATCHES, source.num_batches(self.recipe.batch))
        compiled = jax.jit(self.place.region(loss))
        tokens = [batches.amount(i).tokens for i in range(num)]

        def evaluate(state: State) -> float:
            losses = [float(compiled(state.model, batches[i])) for i in range(num)]
            return float(np.average(losses, weights=tokens))

        return evaluate


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """When a run does more than a step. Both are done at its end in any case."""

    evaluate_every: int = 100
    """Steps between two held-out losses."""
    save_every: int = 200
    """Steps between two checkpoints, where there is a folder for them."""

    def __post_init__(self) -> None:
        for field in ("evaluate_every", "save_every"):
            if getattr(self, field) < 1:
                raise fail(f"Intervals: {field} is {getattr(self, field)}; it must be at least 1.")


class Trainer:
    """A run under way.

    Args:
        program: the recipe at its place.
        data: its tokens.
        state: where it is, after ``done`` steps; used up by the first step.
        report: what shows it.
        intervals: when it does more than a step.
        checkpoints: where it is saved; None: nowhere.
    """

    def __init__(
        self,
        program: Program,
        data: Data,
        state: State,
        done: int,
        report: Report,
        intervals: Intervals,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.recipe, self.data = program.recipe, data
        self.state, self.done = state, done
        self.held_out: float | None = None
        """The held-out loss after ``done`` steps; None when it was not taken there."""
        self._report, self._intervals, self._checkpoints = report, intervals, checkpoints
        self._step = program.step
        self._batches = program.batches(data.training, self.recipe.seed)
        self._evaluate = program.evaluator(data.held_out)
        self._pending: Any = None
        self._saved = done

    def train(self) -> None:
        """Do the steps that are left, or those until Ctrl-C.

        Raises:
            ValueError: the loss is no longer finite.
        """
        with self._report, Stop() as stop:
            while self.done < self.recipe.steps and not stop.asked:
                self._advance()
                if self._due(self._intervals.evaluate_every):
                    self._aside(self._hold_out)
                if self._due(self._intervals.save_every):
                    self._aside(self._save)
            self._aside(self._save)

    def _advance(self) -> None:
        self.state, found = self._step(self.state, self._batches[self.done])
        self._settle()
        self._pending, self.held_out = found, None
        self.done += 1

    def _settle(self) -> None:
        """Wait for the last step dispatched, and report it."""
        if self._pending is not None:
            amount = self._batches.amount(self.done - 1)
            self._report.step(self.done, finite(self._pending, self.done), amount)
            self._pending = None

    def _due(self, every: int) -> bool:
        return self.done % every == 0 or self.done == self.recipe.steps

    def _aside(self, action: Callable[[], None]) -> None:
        """Something that belongs to no step."""
        self._settle()
        began = time.monotonic()
        action()
        self._report.meter.skip(time.monotonic() - began)

    def _hold_out(self) -> None:
        self.held_out = self._evaluate(self.state)
        self._report.held_out(self.done, self.held_out)

    def _save(self) -> None:
        if self._checkpoints is not None and self._saved != self.done:
            self._checkpoints.save(self.done, self.state, self.recipe, self.data.tokenizer)
            self._saved = self.done


def finite(loss: Any, step: int) -> float:
    """The loss of the ``step``-th step as a number.

    Raises:
        ValueError: it is not finite.
    """
    value = float(loss)
    if math.isfinite(value):
        return value
    raise fail(
        f"The loss of step {step} is {value}: the run has diverged, and stops here. A smaller learning rate "
        "(--learning-rate), a longer warm-up (--warmup-steps) or float32 (--dtype float32) may help."
    )
