"""``mw train``: a language model on text, under a layout.

mw train
mw train --devices 8 --mesh "data=4, model=2" --layout "batch:data, heads:model, ff:model, vocab:model"
mw train --data book.txt notes/ --steps 2000 --save runs/book
mw train --resume runs/book --devices 2 --steps 4000
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from rich.console import Console

from ..explain import UNKNOWN
from ..train import (
    Amount,
    Buckets,
    Checkpoints,
    Data,
    Intervals,
    Program,
    Recipe,
    Report,
    Sampling,
    Trainer,
    generate,
    read,
)
from ..train.report import heading, show_count, show_seconds
from .command import PROMPT, Command, model_row, open_console, show_sample
from .place import Where, place_rows

STOPPED = 130
"""The exit status after Ctrl-C, as shells have it."""


@dataclass(frozen=True, kw_only=True)
class Train(Command):
    """Train a decoder-only transformer on text, and let it write some at the end."""

    where: Where = field(default_factory=Where)
    recipe: Recipe = field(default_factory=Recipe)
    intervals: Intervals = field(default_factory=Intervals)
    sampling: Sampling = field(default_factory=Sampling)
    save: Path | None = None
    """A folder for checkpoints; the newest two are kept."""
    resume: Path | None = None
    """A folder of checkpoints: the newest is gone on from, on any devices and layout. What is trained (text, model,
    optimizer, steps …) is as it was where no flag says otherwise. It saves there again unless SAVE names a folder."""
    prompt: str = PROMPT
    """What the text at the end begins with."""

    def defaults(self) -> Self | None:
        """The recipe of the checkpoint to go on from. Reading it starts JAX, so the devices are made first."""
        if self.resume is None:
            return None
        self.where.place()
        with Checkpoints(self.resume) as checkpoints:
            return type(self)(recipe=checkpoints.run()[0])

    def run(self) -> int:
        """Train. The exit status is 130 when the user stopped it."""
        program = Program(self.recipe, self.where.place())
        console = open_console()
        heading(console, place_rows(program.place))
        program.check()
        folder = self.save or self.resume
        with Checkpoints(folder) if folder is not None else nullcontext() as checkpoints:
            trainer = self._prepare(console, program, checkpoints)
            began = time.monotonic()
            trainer.train()
            seconds = time.monotonic() - began
        heading(console, [("done", _summary(trainer, seconds, folder))])
        if trainer.done < self.recipe.steps:
            return STOPPED
        written = generate(
            trainer.state.model,
            trainer.data.tokenizer,
            self.prompt,
            program.place,
            length=self.recipe.length,
            sampling=self.sampling,
            seed=self.recipe.seed,
        )
        console.print()
        show_sample(console, self.prompt, written)
        return 0

    def _prepare(self, console: Console, program: Program, checkpoints: Checkpoints | None) -> Trainer:
        """Read the text, and make the state or restore it."""
        recipe, tokenizer, done = self.recipe, None, 0
        corpus = read(recipe.text)
        heading(console, [("text", str(corpus))])
        if self.resume is not None:
            with Checkpoints(self.resume) as resumed:
                saved, tokenizer = resumed.run()
                recipe.check_continues(saved)
                state, done = resumed.state(program.shapes()), resumed.last
        else:
            state = program.first_state()
        data = Data.prepare(corpus, recipe, tokenizer)
        heading(console, _rows(program, data, done))
        report = Report(console, steps=recipe.steps, done=done, padded=bool(recipe.buckets))
        return Trainer(program, data, state, done, report, self.intervals, checkpoints)


def _rows(program: Program, data: Data, done: int) -> Iterator[tuple[str, str]]:
    recipe = program.recipe
    tokens = f"{show_count(data.training.num_tokens)} to train on, {show_count(data.held_out.num_tokens)} held out"
    yield "tokens", f"{tokens}, of a vocabulary of {data.tokenizer.size}"
    yield model_row(recipe.model)
    going_on = f", going on from step {done}" if done else ""
    sizes = " or ".join(f"batch={recipe.sequences(n)} x length={n}" for n in (*sorted(recipe.buckets), recipe.length))
    yield "steps", f"{recipe.steps} of {sizes} tokens{going_on}"
    if isinstance(data.training, Buckets):
        yield "padding", _padding(data.training.amounts(recipe.batch), data.training.lengths)


def _padding(amounts: Sequence[Amount], lengths: Sequence[int]) -> str:
    """How much of an epoch's places hold no token, of all buckets and of each."""
    whole = Amount(sum(a.tokens for a in amounts), sum(a.places for a in amounts))
    each = ", ".join(f"{a.padding:.0%} of length={n}" for a, n in zip(amounts, lengths, strict=True) if a.places)
    return f"{whole.padding:.0%} of the places: {each}"


def _summary(trainer: Trainer, seconds: float, folder: Path | None) -> str:
    stopped = trainer.done < trainer.recipe.steps
    head = f"stopped after {trainer.done} of {trainer.recipe.steps} steps" if stopped else f"{trainer.done} steps"
    held_out = UNKNOWN if trainer.held_out is None else f"{trainer.held_out:.3f}"
    saved = f"; saved in {folder}" if folder is not None else ""
    return f"{head} in {show_seconds(seconds)}, held-out loss {held_out}{saved}"
