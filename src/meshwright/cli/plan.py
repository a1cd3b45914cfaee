"""``mw plan``: what a training step will do, before it runs and without what it would run on.

mw plan --model 70b --topology tpu:v5p:16x16x16 --mesh "data=512, model=8" --layout "batch:data, heads:model, ff:model"
mw plan --devices 8 --compare "batch:data" "batch:data, ff:model, heads:model, vocab:model"
mw plan --model 10b --topology gpu:h100:64 --json

What is planned is the step of ``mw train`` with the same flags: its model, its optimizer, its layout. No text is read.
"""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from ..errors import fail
from ..explain import show_bytes
from ..models.sizes import sized
from ..plan import Plan
from ..plan.plan import Comparison
from ..train import Checkpoints, Place, Program, Recipe
from ..train.report import heading, show_count
from .command import Command, model_row, open_console
from .described import Anywhere
from .place import place_rows

LENGTH = 2048
"""Tokens in a sequence of a model that is named by its size."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


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
        """The recipe of a run; or a named model, and a batch that described devices can share."""
        if self.resume is not None:
            self.where.place()
            with Checkpoints(self.resume) as checkpoints:
                return type(self)(recipe=checkpoints.run()[0])
        if self.model is None and self.where.topology is None:
            return None
        recipe = Recipe() if self.model is None else Recipe(model=sized(self.model), batch=1, length=LENGTH)
        num = self.where.num_devices
        return type(self)(recipe=dataclasses.replace(recipe, batch=-(-recipe.batch // num) * num))

    def run(self) -> int:
        self._check()
        sides = [self._side(where) for where in self._places()]
        if self.json:
            found = [{"layout": side.layout, **side.data()} for side in sides] if self.compare else sides[0].data()
            print(json.dumps(found, indent=1))
        else:
            self._show(open_console(), sides)
        if self.html is not None:
            sides[0].plan.save(self.html)
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

    def _side(self, where: Anywhere) -> "Side":
        """Plan at one place, and compile there if that is asked for."""
        place = where.place()
        what = place.layout.replace(strict=False).text
        with working(f"tracing {what}"):
            plan = Program(self.recipe, place).plan()
            plan = plan.on(where.hardware) if where.hardware is not None else plan
            plan.summary  # noqa: B018
        if not self.compile:
            return Side(place, plan)
        with working(f"compiling {what}"):
            return Side(place, plan, plan.compile())

    def _show(self, console: Console, sides: "list[Side]") -> None:
        heading(console, self._rows())
        if self.compare:
            names = LETTERS[: len(sides)]
            for name, side in zip(names, sides, strict=True):
                heading(console, [(name, f"{side.layout} on {side.place.mesh.text}{side.lack}")])
            console.print()
            console.print(Comparison(tuple((n, side.plan.summary) for n, side in zip(names, sides, strict=True))))
        else:
            heading(console, [row for row in place_rows(sides[0].place) if row[0] != "mesh"])
            console.print()
            console.print(sides[0].plan)
        for name, side in zip(LETTERS, sides, strict=False):
            if side.compiled is not None:
                console.print()
                if self.compare:
                    console.print(Text(f"{name}  {side.layout}", "bold"))
                console.print(side.compiled)
        console.print()
        heading(console, self._notes(sides))

    def _notes(self, sides: "list[Side]") -> Iterator[tuple[str, str]]:
        if any(side.plan.machine is None for side in sides):
            yield "note", "--hardware h100 (another chip, or a profile of mw.calibrate) tells the time"
        if self.html is not None:
            yield "html", str(self.html)

    def _rows(self) -> Iterator[tuple[str, str]]:
        recipe = self.recipe
        yield model_row(recipe.model)
        tokens = show_count(recipe.batch * recipe.length)
        remat = f", remat={recipe.model.remat}" if recipe.model.remat else ""
        yield "step", f"batch={recipe.batch} x length={recipe.length}: {tokens} tokens{remat}"


@dataclass(frozen=True)
class Side:
    """A plan, where it is for, and what the compiler said."""

    place: Place
    plan: Plan
    compiled: Any = None

    @property
    def layout(self) -> str:
        return self.place.layout.replace(strict=False).text

    @property
    def lack(self) -> str:
        """That the devices have too little memory, where they have."""
        there, needed = self.plan.summary.available_bytes, self.plan.summary.peak_bytes
        return f": does not fit, {show_bytes(needed)} of {show_bytes(there)}" if there and needed > there else ""

    def data(self) -> dict[str, Any]:
        """All of it for a program to read."""
        compiled = {"compiled": json.loads(self.compiled.to_json())} if self.compiled is not None else {}
        return {**json.loads(self.plan.to_json()), **compiled}


@contextmanager
def working(what: str) -> Iterator[None]:
    """A line on a terminal while something takes time; it is not part of what is written."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(what)
        yield
