"""Sides: plans that stand beside one another, each at its place, and what the compiler said of each."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from ..devices import counted
from ..explain import UNKNOWN, show_bytes
from ..plan import Plan
from ..plan.compiled import Compiled
from ..plan.plan import Comparison
from ..plan.report import new_table
from ..plan.summary import Summary
from ..train import Place
from .place import layout_text, lowered_text, slow_text

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""The names of sides: layouts are too long to stand over a column."""


@dataclass(frozen=True)
class Side:
    """A plan, where it is for, and what the compiler said."""

    place: Place
    plan: Plan
    summary: Summary
    compiled: Compiled | None = None

    @property
    def layout(self) -> str:
        """As the user wrote it."""
        return layout_text(self.place)

    def __str__(self) -> str:
        """The layout on its mesh, and what is to be known of it: how it is lowered, and that the devices have too
        little memory, or that the figures lack what XLA chooses."""
        there, needed = self.summary.available_bytes, self.summary.peak_bytes
        lack = f": does not fit, {show_bytes(needed)} of {show_bytes(there)}" if there and needed > there else ""
        num = len(self.plan.program.unknown)
        chosen = f": incomplete, XLA chooses what {counted(num, 'operation')} will send" if num else ""
        where = f"{self.place.mesh.text}{slow_text(self.place)}{lowered_text(self.place)}"
        return f"{self.layout} on {where}{chosen}{lack}"

    def place_data(self) -> dict[str, Any]:
        """What tells it from other sides, besides the mesh."""
        return {"layout": self.layout, "partitioner": self.place.partitioner, "dcn": self.place.mesh.dcn}

    def data(self) -> dict[str, Any]:
        """All of it for a program to read."""
        compiled = {"compiled": json.loads(self.compiled.to_json())} if self.compiled is not None else {}
        return {**json.loads(self.plan.to_json()), **compiled}


def side_by_side(sides: Sequence[Side]) -> Comparison:
    """The plans' figures."""
    return Comparison(tuple((name, side.summary) for name, side in zip(LETTERS, sides, strict=False)))


def compiled_side_by_side(sides: Sequence[Side]) -> Table:
    """What the compiler said of each side."""
    found = [side.compiled for side in sides if side.compiled is not None]
    table = new_table("the compiler", *LETTERS[: len(found)])
    rows = {
        "fits": [_fits(c) for c in found],
        "memory": [Text(_bytes(c.needed_bytes)) for c in found],
        "  by the plan, counted so": [Text(_bytes(c.planned_bytes)) for c in found],
        "  there": [Text(_bytes(c.available_bytes)) for c in found],
        "payload of collectives": [Text(_bytes(sum(c.moved_bytes.values()) if c.memory else None)) for c in found],
        "cycles of computation": [Text(f"{c.cycles / 1e6:,.0f} M" if c.cycles else UNKNOWN) for c in found],
        "took": [Text(f"{c.seconds:.1f} s") for c in found],
    }
    for label, cells in rows.items():
        table.add_row(Text(label, "dim" * label.startswith(" ")), *cells)
    return table


def _fits(compiled: Compiled) -> Text:
    if compiled.fits is None:
        return Text(UNKNOWN)
    return Text("yes", "green") if compiled.fits else Text("no", "bold red")


def _bytes(num: int | None) -> str:
    return show_bytes(num) if num is not None else UNKNOWN
