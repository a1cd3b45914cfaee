"""``mw plan``: what a training step will do, before it runs and without what it would run on.

mw plan --model 70b --topology tpu:v5p:16x16x16 --mesh "data=512, model=8" --layout "batch:data, heads:model, ff:model"
mw plan --devices 8 --compare "batch:data" "batch:data, ff:model, heads:model, vocab:model"
mw plan --model 10b --topology gpu:h100:64 --json

What is planned is the step of ``mw train`` with the same flags: its model, its optimizer, its layout. No text is read.
On described devices the layers are one loop, which ``mw train`` unrolls for CPUs; ``--unroll`` does so here.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..errors import fail
from ..models.sizes import sized
from ..train import Checkpoints, Program, Recipe
from ..train.report import heading, show_count
from .command import Command, model_row, open_console
from .described import Anywhere
from .place import layout_text, place_rows
from .sides import LETTERS, Side, compiled_side_by_side, side_by_side

LENGTH = 2048
"""Tokens in a sequence of a model that is named by its size."""


@dataclass(frozen=True, kw_only=True)
class PlanStep(Command):
    """Say what a training step will communicate, compute and hold, before it runs."""

    where: Anywhere = field(default_factory=Anywhere)
    model: str | None = None
    """A model by its size: 1b, 3b, 8b, 10b, 30b, 70b, 100b or 400b, in bfloat16, a sequence of 2048 tokens for each
    device. Any flag of a size, of the batch or the length says otherwise. None: that of mw train."""
    recipe: Recipe = field(default_factory=Recipe)
    resume: Path | None = None
    """A folder of checkpoints of mw train: what is not given otherwise is as that run has it."""
    compare: tuple[str, ...] = ()
    """Layouts to set side by side. What else is different about one stands behind it:
    "batch:data, ff:model | mesh=data=64, model=8 | params=data"."""
    compile: bool = False
    """Ask the compiler as well, of a described TPU too: its memory, its collectives, whether it fits."""
    html: Path | None = None
    """A file for the plan as a page with pictures."""
    json: bool = False
    """Write the plan as JSON, and nothing else."""

    def defaults(self) -> Self | None:
        """The recipe of a run; or a named model, and a batch that described devices can share. Its layers are one loop:
        mw train unrolls them because a CPU is faster so."""
        if self.resume is not None:
            self.where.place()
            with Checkpoints(self.resume) as checkpoints:
                return type(self)(recipe=checkpoints.run()[0])
        if self.model is None and self.where.topology is None:
            return None
        recipe = Recipe() if self.model is None else Recipe(model=sized(self.model), batch=1, length=LENGTH)
        num = self.where.num_devices
        looped = dataclasses.replace(recipe.model, unroll=False)
        return type(self)(recipe=dataclasses.replace(recipe, model=looped, batch=-(-recipe.batch // num) * num))

    def run(self) -> int:
        self._check()
        sides = [self._traced(where) for where in self._places()]
        console = Console(quiet=True) if self.json else open_console()
        self._show(console, sides)
        if self.html is not None:  # Before the compiler, which may fail.
            sides[0].plan.save(self.html)
        if self.compile:
            sides = [_compiled(side) for side in sides]
            self._show_compiled(console, sides)
        heading(console, self._notes(sides))
        if self.json:
            found = [{**side.place_data(), **side.data()} for side in sides] if self.compare else sides[0].data()
            print(json.dumps(found, indent=1))
        return 0

    def _check(self) -> None:
        if self.resume is not None and self.model is not None:
            raise fail(f"--resume has a model of its own. Leave --model {self.model} out; its fields may be given.")
        if self.compare and self.where.layout is not None:
            raise fail("--compare has the layouts. Leave --layout out, or give it as one of them.")
        if len(self.compare) == 1 or len(self.compare) > len(LETTERS):
            raise fail(f"--compare: {len(self.compare)} layouts. Give from 2 to {len(LETTERS)}, each in quotes.")
        if self.compare and self.html is not None:
            raise fail("--html writes the page of one plan. Leave --compare out, and give the layout as --layout.")
        if self.html is not None and self.html.suffix != ".html":
            raise fail(f"--html {self.html}: the page is HTML. Write --html {self.html.with_suffix('.html')}.")
        if self.html is not None and not self.html.parent.is_dir():
            raise fail(f"--html {self.html}: there is no folder {str(self.html.parent)!r}.")

    def _places(self) -> list[Anywhere]:
        return [self.where.side(text) for text in self.compare] or [self.where]

    def _traced(self, where: Anywhere) -> Side:
        place = where.place()
        with working(f"tracing {layout_text(place)}"):
            plan = Program(self.recipe, place).plan()
            plan = plan.on(where.hardware) if where.hardware is not None else plan
            return Side(place, plan, plan.summary)

    def _show(self, console: Console, sides: Sequence[Side]) -> None:
        heading(console, self._rows())
        if self.compare:
            heading(console, [(name, str(side)) for name, side in zip(LETTERS, sides, strict=False)])
            console.print()
            console.print(side_by_side(sides))
        else:
            heading(console, place_rows(sides[0].place))
            console.print()
            console.print(sides[0].plan)
        console.print()

    def _show_compiled(self, console: Console, sides: Sequence[Side]) -> None:
        console.print(compiled_side_by_side(sides) if self.compare else sides[0].compiled)
        console.print()

    def _notes(self, sides: Sequence[Side]) -> Iterator[tuple[str, str]]:
        if any(side.plan.machine is None for side in sides):
            yield "note", "--hardware h100 (another chip, or a profile of mw.calibrate) tells the time"
        if self.html is not None:
            yield "html", str(self.html)

    def _rows(self) -> Iterator[tuple[str, str]]:
        recipe = self.recipe
        yield model_row(recipe.model)
        tokens = show_count(recipe.batch * recipe.length)
        remat = f", remat={recipe.model.remat}" if recipe.model.remat else ""
        unrolled = ", layers unrolled" if recipe.model.unroll else ""
        yield "step", f"batch={recipe.batch} x length={recipe.length}: {tokens} tokens{remat}{unrolled}"


def _compiled(side: Side) -> Side:
    with working(f"compiling {side.layout}"):
        return dataclasses.replace(side, compiled=side.plan.compile())


@contextmanager
def working(what: str) -> Iterator[None]:
    """A line on a terminal while something takes time; it is not part of what is written."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(what)
        yield
