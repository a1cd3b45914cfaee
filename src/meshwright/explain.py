"""Explain: what a layout does to a tree of tensors, before anything is placed.

For each tensor: its dims with the axes that split them, the bytes of the whole, the bytes on each device, and how many
devices hold the same slice. Below the table, a picture for each way in which the tensors are cut.

    >>> import jax, jax.numpy as jnp
    >>> from meshwright import Layout, Mesh, Tensor
    >>> tree = {"x": Tensor(jnp.ones((8, 4)), "batch embed")}
    >>> held = Layout("batch:data").explain(tree, Mesh("data=1", devices=jax.devices()[:1])).tensors[0]
    >>> held.path, held.whole_bytes, held.num_copies
    ('x', 128, 1)
"""

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .devices import counted
from .dims import Dim, Dims
from .errors import nearest
from .mesh import Mesh
from .notation import check_known
from .scope import Axes, Split
from .tensor import Role, Tensor, is_tensor
from .tiles import Tiles

WIDTH = 100
"""The most characters of a line, where the terminal does not say."""
UNKNOWN = "N/A"
"""How a figure is shown that is not known."""
NUM_PICTURES = 4
Place = Callable[[Dims, Role, str], tuple[Split, Split]]
"""From a tensor's dims, its role and its path to the axes of each dim: by compute rules, and further ones at rest."""
Ruled = Mapping[str, set[str]]
"""The names that rules at rest speak of, each with those that lie by its rule."""


@dataclass(frozen=True)
class Held:
    """What the devices hold of one tensor or array of a tree."""

    path: str
    """Where it is in the tree: ``blocks.wq``."""
    dims: Dims
    """Its dims; for an array without names, none."""
    shape: tuple[int, ...]
    dtype: str
    role: Role
    """``activation``, ``parameter``, ``optimizer``; for an array without names, ``array``."""
    compute: Split
    """For each dim the axes of its compute rule."""
    rest: Split
    """For each dim the further axes over which it is split at rest."""
    whole_bytes: int
    device_bytes: int
    num_tiles: int
    """How many different slices there are."""
    num_copies: int
    """How many devices hold each slice."""

    @property
    def split(self) -> Split:
        """For each dim all the axes that split it where the tensor lies, the slowest first."""
        return tuple(a + b for a, b in zip(self.compute, self.rest, strict=True))


@dataclass(frozen=True)
class Explanation:
    """The result of ``Layout.explain``. ``print`` shows it; rich shows it in colour; ``tensors`` has it as data."""

    tensors: tuple[Held, ...]
    mesh: Mesh
    layout: str
    notes: tuple[str, ...] = ()
    """What to know besides: rules that split nothing here."""

    @property
    def whole_bytes(self) -> int:
        """The bytes of the whole tree, once."""
        return sum(held.whole_bytes for held in self.tensors)

    @property
    def device_bytes(self) -> int:
        """The bytes of the tree on each device, as it lies."""
        return sum(held.device_bytes for held in self.tensors)

    def tiles(self, path: str) -> Tiles:
        """The picture of one tensor.

        Raises:
            ValueError: there is no tensor of that path, or it has no names.
        """
        named = {held.path: held for held in self.tensors if held.dims}
        check_known([path], named, "explain: there is no tensor {}.")
        return Tiles.of(named[path].dims, named[path].split, self.mesh.axes, self.mesh.device_ids)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=WIDTH, color_system=None, legacy_windows=False, force_jupyter=False)
        with console.capture() as captured:
            console.print(self)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    def __rich__(self) -> RenderableType:
        notes = "dim=size/axis: split over the axis; /axis*: at rest only. Copies: devices with the same slice."
        parts: list[RenderableType] = [Text(self.layout, "bold"), Text(f"{self.mesh}\n")]
        parts += [self._table(), Text(notes, "dim")]
        parts += [Text(note, "yellow") for note in self.notes]
        patterns = self._patterns()
        for group in patterns[:NUM_PICTURES]:
            parts += [Text(""), *self._picture(group)]
        left = sum(len(group) for group in patterns[NUM_PICTURES:])
        if left:
            parts += [Text(""), Text(f"{counted(left, 'tensor')} cut in other ways: .tiles(path) draws one.", "dim")]
        return Group(*parts)

    def _table(self) -> Table:
        table = Table(show_edge=False, pad_edge=False, box=SIMPLE_HEAD, show_footer=True, footer_style="bold")
        table.add_column("tensor", f"all {len(self.tensors)}", overflow="fold")
        table.add_column("role", "")
        table.add_column("dims", "", overflow="fold")
        table.add_column("whole", show_bytes(self.whole_bytes), justify="right", no_wrap=True)
        table.add_column("a device", show_bytes(self.device_bytes), justify="right", no_wrap=True)
        table.add_column("copies", "", justify="right", no_wrap=True)
        for held in self.tensors:
            copies = Text(str(held.num_copies), "yellow" if held.num_copies > 1 else "green")
            sizes = show_bytes(held.whole_bytes), show_bytes(held.device_bytes)
            table.add_row(held.path or "(the tree)", held.role, _dims_text(held), *sizes, copies)
        return table

    def _patterns(self) -> list[list[Held]]:
        """Tensors with names, grouped by how they are cut; the most bytes first."""
        groups: dict[Any, list[Held]] = {}
        for held in self.tensors:
            if held.dims:
                cuts = tuple((d, axes) for d, axes in zip(held.dims, held.split, strict=True) if axes)
                groups.setdefault(cuts, []).append(held)
        return sorted(groups.values(), key=lambda group: -sum(held.whole_bytes for held in group))

    def _picture(self, group: list[Held]) -> Iterator[RenderableType]:
        paths = [held.path for held in group]
        names = ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
        first = group[0]
        cut = f"{first.num_tiles} tiles" + (f", {first.num_copies} copies of each" if first.num_copies > 1 else "")
        whole = f"whole on each of {counted(self.mesh.size, 'device')}"
        yield Text.assemble((names, "bold"), f": {cut if first.num_tiles > 1 else whole}")
        yield self.tiles(first.path)


def explain(
    tree: Any, mesh: Mesh, place: Place, layout: str, role: Role | None, at_rest: Mapping[Role, Ruled]
) -> Explanation:
    """The explanation of a tree: see ``Layout.explain``. ``at_rest``: the rules of each role."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_tensor)
    found = (_held(path_text(path), x, mesh, place, role) for path, x in leaves)
    tensors = tuple(held for held in found if held is not None)
    return Explanation(tensors, mesh, layout, tuple(_unmet(tensors, at_rest)))


def _unmet(tensors: Sequence[Held], at_rest: Mapping[Role, Ruled]) -> Iterator[str]:
    """A note for each rule at rest that no tensor of its role has the dim of."""
    for role in dict.fromkeys(held.role for held in tensors):
        met = sorted({d.name for held in tensors if held.role == role for d in held.dims})
        for name, lying in at_rest.get(role, {}).items():
            if lying.isdisjoint(met):
                why = f"no tensor of the role {role!r} has it.{nearest(name, met)}"
                yield f"The rule at rest for {name!r} splits nothing: {why}"


def path_text(path: Any) -> str:
    """A leaf's place in a tree: ``blocks.0.wq``."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _held(path: str, x: Any, mesh: Mesh, place: Place, role: Role | None) -> Held | None:
    if isinstance(x, Tensor):
        compute, rest = place(x.dims, x.role, f"explain: {path or 'the tensor'}")
        axes = [axis for axes in (*compute, *rest) for axis in axes]
        tiles = math.prod(mesh.axes[axis] for axis in axes)
        size, copies = math.prod(x.shape) * x.dtype.itemsize, mesh.size // tiles
        split = compute, rest
        return Held(path, x.dims, x.shape, str(x.dtype), role or x.role, *split, size, size // tiles, tiles, copies)
    if not isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        return None
    size = math.prod(x.shape) * x.dtype.itemsize
    return Held(path, (), tuple(x.shape), str(x.dtype), "array", (), (), size, size, 1, mesh.size)


def _dims_text(held: Held) -> str:
    if not held.dims:
        return f"{held.dtype}{list(held.shape)}"
    return " ".join(_dim_text(*each) for each in zip(held.dims, held.compute, held.rest, strict=True))


def _dim_text(d: Dim, compute: Axes, rest: Axes) -> str:
    return f"{d.name}={d.size}" + "".join(f"/{axis}" for axis in compute) + "".join(f"/{axis}*" for axis in rest)


def show_bytes(num: int) -> str:
    """``512 B``, ``1.50 MiB``: bytes in units of 1024."""
    size, units = float(num), ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    for unit in units:
        if size < 1024 or unit == units[-1]:
            return f"{num} B" if unit == "B" else f"{size:.{2 if size < 10 else 1 if size < 100 else 0}f} {unit}"
        size /= 1024
    raise AssertionError(num)
