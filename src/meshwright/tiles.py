"""Tiles: a picture of which device holds which part of a tensor.

The two most split dims span a grid, one down and one across. Each box is a tile of the tensor and names the devices
that hold it; devices named together hold the same values, those apart by ``╎`` hold parts of the box along a third dim.

    >>> import numpy as np
    >>> these = Dim("batch", 8), Dim("heads", 4), Dim("head_dim", 2)
    >>> print(Tiles.of(these, (("data",), ("model",), ()), {"data": 2, "model": 2}, np.array([[0, 1], [2, 3]])))
    ↓ batch over data   → heads over model
           0:2   2:4
         ┌─────┬─────┐
     0:4 │  0  │  1  │
         ├─────┼─────┤
     4:8 │  2  │  3  │
         └─────┴─────┘
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.text import Text

from .dims import Dim, Dims
from .scope import Axes, Split

WIDTH = 96
MOST = 8
"""The most rows and columns to draw: of more, the first ones and the last."""
LABEL = 22
"""The longest list of devices in a box, in characters."""
_COLOURS = (24, 22, 90, 30, 94, 88, 60, 240)
"""Of the terminal's 256: dark ones, on which white is easy to read under any theme."""
_GAP = -1
"""Stands for the rows or columns that are left out."""


@dataclass(frozen=True)
class Cut:
    """A dim cut into equal parts by axes."""

    dim: Dim
    axes: Axes
    num: int

    def part(self, i: int) -> str:
        """The positions of part ``i``, as a Python slice is written."""
        size = self.dim.size // self.num
        return f"{i * size}:{(i + 1) * size}"

    def __str__(self) -> str:
        return f"{self.dim.name} over {' x '.join(self.axes)}"


@dataclass(frozen=True)
class Tiles:
    """The boxes of one tensor: ``owners[row][column]`` lists the ids of devices, a list for each part of the box."""

    down: Cut | None
    across: Cut | None
    further: tuple[Cut, ...]
    owners: tuple[tuple[tuple[tuple[int, ...], ...], ...], ...]

    @classmethod
    def of(cls, these: Dims, split: Split, sizes: Mapping[str, int], device_ids: np.ndarray) -> "Tiles":
        """The tiles of a tensor.

        Args:
            these, split: the dims and the axes of each.
            sizes: the mesh's axes, in order.
            device_ids: the id of the device at each place of the mesh.
        """
        nums = [math.prod(sizes[a] for a in axes) for axes in split]
        cuts = [Cut(d, axes, n) for d, axes, n in zip(these, split, nums, strict=True) if n > 1]
        chosen = sorted(sorted(cuts, key=lambda cut: -cut.num)[:2], key=cuts.index)
        across = chosen[-1] if chosen else None
        down = chosen[0] if len(chosen) == 2 else None
        further = tuple(cut for cut in cuts if cut not in chosen)
        places: dict[str, np.ndarray] = dict(zip(sizes, np.asarray(np.indices(device_ids.shape)), strict=True))
        row, column = (_position(cut.axes if cut else (), sizes, places, device_ids) for cut in (down, across))
        part = _position(tuple(a for cut in further for a in cut.axes), sizes, places, device_ids)

        def held(i: int, j: int, k: int) -> tuple[int, ...]:
            return tuple(sorted(device_ids[(row == i) & (column == j) & (part == k)].tolist()))

        rows, columns = range(down.num if down else 1), range(across.num if across else 1)
        parts = range(math.prod(cut.num for cut in further))
        owners = tuple(tuple(tuple(held(i, j, k) for k in parts) for j in columns) for i in rows)
        return cls(down, across, further, owners)

    @property
    def num_boxes(self) -> int:
        return len(self.owners) * len(self.owners[0])

    def __str__(self) -> str:
        return self.__rich__().plain

    def __rich__(self) -> Text:
        """The picture in colour: a colour for each tile."""
        rows = _shown(len(self.owners))
        heads = [self.down.part(i) if self.down and i != _GAP else "" for i in rows]
        margin = max(map(len, heads))
        labels = [[_label(parts) for parts in row] for row in self.owners]
        names = [self.across.part(j) if self.across else "" for j in range(len(self.owners[0]))]
        width = max(len(label) for label in (*names, *(label for row in labels for label in row))) + 2
        columns = _shown(len(names), (WIDTH - margin - 4) // (width + 1))

        def rule(left: str, middle: str, right: str) -> str:
            return " " * (margin + 2) + left + middle.join("─" * width for _ in columns) + right + "\n"

        picture = Text(self._header())
        if self.across:
            over = " ".join(f"{names[j] if j != _GAP else '⋯':^{width}}" for j in columns)
            picture.append(" " * (margin + 3) + over.rstrip() + "\n")
        picture.append(rule("┌", "┬", "┐"))
        for n, (i, head) in enumerate(zip(rows, heads, strict=True)):
            picture.append(rule("├", "┼", "┤") if n else "")
            picture.append(f" {head:>{margin}} │")
            for j in columns:
                text, style = ("⋮" if i == _GAP else "⋯", "") if _GAP in (i, j) else (labels[i][j], self._colour(i, j))
                picture.append(f"{text:^{width}}", style)
                picture.append("│")
            picture.append("\n")
        picture.append(rule("└", "┴", "┘").rstrip("\n"))
        return picture

    def _header(self) -> str:
        if not self.across:
            return ""
        header = f"↓ {self.down}   → {self.across}" if self.down else f"→ {self.across}"
        further = ", ".join(map(str, self.further))
        return header + (f"   ╎ {further}" if further else "") + "\n"

    def _colour(self, i: int, j: int) -> str:
        if not self.across:
            return ""
        few = self.num_boxes <= len(_COLOURS)
        index = i * len(self.owners[0]) + j if few else 3 * i + j
        return f"color(255) on color({_COLOURS[index % len(_COLOURS)]})"


def _position(axes: Axes, sizes: Mapping[str, int], places: Mapping[str, np.ndarray], like: np.ndarray) -> np.ndarray:
    """For each device which part it holds of a dim that is cut by ``axes``, the first the slowest."""
    position = np.zeros(like.shape, int)
    for axis in axes:
        position = position * sizes[axis] + places[axis]
    return position


def _shown(num: int, fit: int = MOST) -> list[int]:
    """Which of ``num`` rows or columns to show; the gap stands for the others."""
    if num <= min(fit, MOST):
        return list(range(num))
    return [*range(max(1, min(fit, 5) - 2)), _GAP, num - 1]


def _label(parts: Sequence[Sequence[int]]) -> str:
    text = "╎".join(show_ids(ids) for ids in parts)
    return text if len(text) <= LABEL else f"{parts[0][0]} … {parts[-1][-1]}"


def show_ids(ids: Sequence[int]) -> str:
    """``0-7``, ``0,2``, ``0,8,…,56``: ids in order, neighbours joined, shortened where they are many."""
    runs: list[list[int]] = []
    for i in ids:
        if runs and runs[-1][-1] == i - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    return ",".join(texts if len(texts) <= 4 else [*texts[:2], "…", texts[-1]])
