"""Dims: the names and sizes of a tensor, and the algebra of names.

A dim is a name and a size, ``Dim("batch", 64)``. The dims of a tensor are a tuple of them with unique names. All that
the language knows about an operation it knows from these tuples: which dims are shared, which are summed, which come
out. Sizes are always those of the whole tensor, also inside a region, where a device holds a slice: a program never
sees how its data is split.

    >>> batch, embed = dims(batch=64, embed=512)
    >>> show((batch, embed))
    'batch=64, embed=512'
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import fail, fail_type, nearest


@dataclass(frozen=True, slots=True)
class Dim:
    """A named, sized dimension of a tensor.

    Raises:
        ValueError: the name is not an identifier, or the size is negative.
    """

    name: str
    size: int

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise fail(f"Dim: {self.name!r} is not a name; use a Python identifier such as 'batch' or 'head_dim'.")
        if not isinstance(self.size, int):
            object.__setattr__(self, "size", _whole(self.name, self.size))
        if self.size < 0:
            raise fail(f"Dim: the size of {self.name!r} is {self.size}; it must not be negative.")

    def __repr__(self) -> str:
        return f"{self.name}={self.size}"


Dims = tuple[Dim, ...]
Names = str | Iterable[str]


def _whole(name: str, size: object) -> int:
    try:
        return size.__index__()  # type: ignore[attr-defined, no-any-return]
    except (AttributeError, TypeError):
        raise fail_type(f"Dim: the size of {name!r} is a {type(size).__name__}; it must be an int.") from None


def dims(**sizes: int) -> Dims:
    """Several dims at once: ``batch, embed = mw.dims(batch=64, embed=512)``."""
    return tuple(Dim(name, size) for name, size in sizes.items())


def show(these: Iterable[Dim]) -> str:
    """``batch=64, embed=512``, as errors and printed tensors write dims."""
    return ", ".join(f"{d.name}={d.size}" for d in these)


def names_of(these: Iterable[Dim]) -> tuple[str, ...]:
    return tuple(d.name for d in these)


def sizes_of(these: Iterable[Dim]) -> tuple[int, ...]:
    return tuple(d.size for d in these)


def num_elements(these: Iterable[Dim]) -> int:
    return math.prod(d.size for d in these)


def as_names(names: Names | Dim | Iterable[Dim], asked: str = "A tensor") -> tuple[str, ...]:
    """Names from a string (several are separated by spaces), a Dim, or an iterable of either.

    Raises:
        TypeError: something in it is neither.
    """
    if isinstance(names, str):
        return tuple(names.replace(",", " ").split())
    listed = _listed(names)
    for n in listed:
        if not isinstance(n, str | Dim):
            raise fail_type(
                f"{asked}: expected names of dims, found {_found(n)}. Dims have names, not numbers: write 'embed', or "
                "'batch embed' for several."
            )
    return tuple(n.name if isinstance(n, Dim) else n for n in listed)


def as_dims(these: Dim | Iterable[Dim], asked: str = "A tensor") -> Dims:
    """A tuple of dims with unique names.

    Raises:
        TypeError: something in it is not a Dim.
        ValueError: a name stands twice.
    """
    listed = _listed(these)
    for d in listed:
        if not isinstance(d, Dim):
            raise fail_type(f"{asked}: expected dims, found {_found(d)}; write mw.Dim(name, size).")
    check_unique(listed)
    return listed


def as_dim(d: Dim, asked: str) -> Dim:
    """One dim, or an error that says how to make it."""
    these = as_dims(d, asked)
    if len(these) != 1:
        raise fail_type(f"{asked}: expected one dim, found {len(these)}: ({show(these)}).")
    return these[0]


def _listed(given: Any) -> tuple[Any, ...]:
    """What was given, one thing or several, as a tuple."""
    return tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)


def _found(x: object) -> str:
    """What was found, for an error: never the contents of an array."""
    kind = type(x).__name__
    if x is None:
        return "None"
    return f"{x!r} of type {kind}" if isinstance(x, str | int | float) else f"a {kind}"


def check_unique(these: Dims, asked: str = "A tensor") -> None:
    names = names_of(these)
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise fail(
            f"{asked}: the dim {twice!r} stands twice in ({show(these)}). The names of a tensor's dims are unique: "
            f"rename one of them, for instance to {twice + '_out'!r}."
        )


def index_of(these: Dims, name: str, asked: str = "A tensor") -> int:
    """The position of the dim called ``name``.

    Raises:
        ValueError: there is none; the message proposes the nearest name.
    """
    for i, d in enumerate(these):
        if d.name == name:
            return i
    raise fail(f"{asked}: there is no dim {name!r} in ({show(these)}).{nearest(str(name), names_of(these))}")


def find(these: Dims, name: str, asked: str = "A tensor") -> Dim:
    return these[index_of(these, name, asked)]


def without(these: Dims, names: Sequence[str]) -> Dims:
    return tuple(d for d in these if d.name not in names)


def union(all_dims: Sequence[Dims], asked: str) -> Dims:
    """Every dim of ``all_dims`` once, in the order met.

    Raises:
        ValueError: one name has two sizes.
    """
    sizes: dict[str, Dim] = {}
    for these in all_dims:
        for d in these:
            known = sizes.setdefault(d.name, d)
            if known.size != d.size:
                operands = "; ".join(f"({show(x)})" for x in all_dims)
                raise fail(
                    f"{asked}: the dim {d.name!r} has size {known.size} in one operand and {d.size} in another.\n"
                    f"  operands: {operands}\n"
                    f"  One name has one size: rename one of them, or slice it to the other's size."
                )
    return tuple(sizes.values())
