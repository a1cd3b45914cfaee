"""The scope: what the code inside a region is allowed to know about the mesh.

An operation of the language does not know layouts, meshes or devices. It asks the scope which axes a name is split
over, and how long an axis is; ``mw.spmd`` makes the scope from a layout and a mesh and sets it while the region is
traced. No scope means no region: plain JAX on whole arrays.

The scope lives in a JAX user context, which is part of the key of ``jax.jit``'s caches, so a jitted function that is
called from two regions is traced for each.
"""

import functools
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import jax

from .dims import Dim, Dims, show
from .errors import fail
from .summing import PLAIN, Summing

Axes = tuple[str, ...]
Split = tuple[Axes, ...]
"""For each dim of a tensor, the axes over which it is split, the slowest first."""


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class Scope:
    """What a region's operations see: the axes of each name, and the size of each axis.

    Two scopes are equal when the layout and the mesh behind them are, so tensors made by one trace of a region are
    at home in the next.
    """

    mesh: Any
    """The JAX mesh (hashable); used only to state shardings for the partitioner of XLA."""
    splits: tuple[tuple[str, Axes], ...]
    """The compute rules: axes of size 1 are left out."""
    sizes: tuple[tuple[str, int], ...]
    """Every axis of the mesh and its size."""
    partitioner: str = "names"
    """``names``: slices and collectives by this package. ``xla``: whole arrays with sharding constraints."""
    summing: Summing = PLAIN
    """How sums across devices are taken; operations ask ``sums``."""
    overlap: Axes = ()
    """The axes over which gathers and scatters go on beside the products that they serve."""
    text: str = ""
    """The layout as its user wrote it, for errors."""
    met: set[str] = field(default_factory=set)
    """Names of the dims that the region has met."""
    overlapped: set[str] = field(default_factory=set)
    """Axes over which a product of the region has overlapped with its gather or scatter."""

    @functools.cached_property
    def _key(self) -> tuple[Any, ...]:
        return self.mesh, self.splits, self.sizes, self.partitioner, self.summing, self.overlap

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Scope) and self._hash == other._hash and self._key == other._key)

    @property
    def where(self) -> str:
        """The layout and the mesh, for errors."""
        sizes = ", ".join(f"{axis}={size}" for axis, size in self.sizes)
        return f"{self.text!r} on the mesh ({sizes})"

    @property
    def manual(self) -> bool:
        """Whether tensors are slices here."""
        return self.partitioner == "names"

    @property
    def sums(self) -> Summing:
        """How sums across devices are taken here. Inside ``vmap`` they are not taken in steps: JAX has no rule for what
        that is made of."""
        return self.summing if _mapped.value is None else self.summing.in_one

    @functools.cached_property
    def _axes_by_name(self) -> dict[str, Axes]:
        return dict(self.splits)

    @functools.cached_property
    def _size_by_axis(self) -> dict[str, int]:
        return dict(self.sizes)

    def axes_of(self, name: str) -> Axes:
        """The axes over which the compute layout splits the dim called ``name``."""
        return self._axes_by_name.get(name, ())

    def size(self, axes: Axes) -> int:
        """The number of devices along ``axes`` together."""
        return math.prod(self._size_by_axis[a] for a in axes)

    def split(self, these: Dims, asked: str) -> Split:
        """How the compute layout splits a tensor with these dims.

        Raises:
            ValueError: an axis does not divide a dim's size, or two dims are on one axis.
        """
        self.met.update(d.name for d in these)
        found = tuple(self._axes_by_name.get(d.name, ()) for d in these)
        check_split(self, these, found, asked)
        if taken := vmapped_axes():
            _check_mapped(self, these, found, taken, asked)
        return found

    def local_sizes(self, these: Dims, split: Split) -> tuple[int, ...]:
        """The shape of one device's slice."""
        return tuple(d.size // self.size(axes) for d, axes in zip(these, split, strict=True))


@functools.lru_cache(maxsize=8192)
def check_split(scope: Scope, these: Dims, split: Split, asked: str) -> None:
    """Raise a ``ValueError`` when ``split`` cannot be: see ``Scope.split``."""
    owner: dict[str, Dim] = {}
    for d, axes in zip(these, split, strict=True):
        if d.size % scope.size(axes):
            raise fail(_indivisible(scope, these, d, axes, asked))
        for axis in axes:
            if axis in owner:
                raise fail(_two_on_one(scope, these, owner[axis], d, axis, asked))
            owner[axis] = d


def _indivisible(scope: Scope, these: Dims, d: Dim, axes: Axes, asked: str) -> str:
    n = scope.size(axes)
    axis = " x ".join(f"{a!r} (size {scope.size((a,))})" for a in axes)
    below, above = d.size // n * n, (d.size // n + 1) * n
    good = f"{below} or {above}" if below else f"{above}"
    divisors = ", ".join(str(k) for k in range(1, min(d.size, 64) + 1) if d.size % k == 0)
    return (
        f"{asked}: the dim {d.name!r} of size {d.size} cannot be split over the axis {axis}: "
        f"{d.size} is not a multiple of {n}.\n"
        f"  tensor: ({show(these)})\n"
        f"  layout: {scope.text}\n"
        f"  Make {d.name!r} a multiple of {n} ({good}), use a mesh with an axis that divides {d.size} "
        f"({divisors}), or leave {d.name!r} out of the layout. Nothing is padded silently."
    )


def _two_on_one(scope: Scope, these: Dims, one: Dim, two: Dim, axis: str, asked: str) -> str:
    return (
        f"{asked}: the dims {one.name!r} and {two.name!r} of one tensor are both split over the axis {axis!r}.\n"
        f"  tensor: ({show(these)})\n"
        f"  layout: {scope.text}\n"
        f"  One axis splits at most one dim of a tensor. Rename one of the two where they meet, for instance "
        f".rename({two.name}={two.name + '_whole'!r}), to a name that the layout does not split over {axis!r}."
    )


def _check_mapped(scope: Scope, these: Dims, split: Split, taken: frozenset[str], asked: str) -> None:
    for d, axes in zip(these, split, strict=True):
        if both := taken.intersection(axes):
            raise fail(
                f"{asked}: the dim {d.name!r} is split over the axis {min(both)!r}, inside mw.vmap over a dim that is "
                f"split over it too.\n  tensor: ({show(these)})\n  layout: {scope.text}\n"
                f"  What mw.vmap maps over is a dim of every tensor inside, and one axis splits at most one dim of a "
                f"tensor: rename {d.name!r}, or leave out mw.vmap, for operations broadcast by name."
            )


_ambient = jax.make_user_context(None)
_mapped = jax.make_user_context(None)


@dataclass(frozen=True)
class Stages:
    """A pipeline: one scan, the turns of which are dealt out to the devices along an axis, in stages."""

    dim: str
    """The dim that the scan runs over."""
    axes: Axes
    """The axes that split it."""
    num: int
    """Stages on each device (virtual stages, where there are several)."""


_stages = jax.make_user_context(None)


def current_stages() -> Stages | None:
    """The pipeline whose stages are being traced, or None."""
    return _stages.value  # type: ignore[no-any-return]


def staging(stages: Stages | None) -> AbstractContextManager[None]:
    """A context in which ``current_stages()`` is ``stages``: each device goes its own way along their axes."""
    return _stages(stages)  # type: ignore[no-any-return]


def vmapped_axes() -> frozenset[str]:
    """The axes of the dims that a surrounding ``vmap`` has taken away."""
    return _mapped.value or frozenset()


def mapped_axes() -> frozenset[str]:
    """The axes over which every value may vary: those of a surrounding ``vmap``, and those along which the stages of a
    pipeline each do another thing."""
    stages = current_stages()
    return vmapped_axes() if stages is None else vmapped_axes() | frozenset(stages.axes)


def mapping(axes: Axes) -> AbstractContextManager[None]:
    """A context in which ``axes`` are among ``vmapped_axes()``."""
    return _mapped(vmapped_axes() | frozenset(axes))  # type: ignore[no-any-return]


def current() -> Scope | None:
    """The scope of the region that is being traced, or None outside every region."""
    return _ambient.value  # type: ignore[no-any-return]


def current_manual() -> Scope | None:
    """The scope, when its tensors are slices; None outside a region and under XLA's partitioner."""
    scope = current()
    return scope if scope is not None and scope.manual else None


def entered(scope: Scope | None) -> AbstractContextManager[None]:
    """A context in which ``current()`` is ``scope``."""
    return _ambient(scope)  # type: ignore[no-any-return]


def describe(these: Dims, split: Split) -> str:
    """``batch=8/data, embed=16``: dims and their axes, for errors and pictures."""
    over = (f"/{'x'.join(axes)}" if axes else "" for axes in split)
    return ", ".join(f"{d}{axes}" for d, axes in zip(these, over, strict=True))
