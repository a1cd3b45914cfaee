"""Inherited rules: names that lie as another does unless the layout says otherwise.

A model gives one dim several names, so that a layout can lay out one part of it otherwise: the residual stream's length
is ``residual_length``, and while attention runs, heads and length are ``attention_heads`` and ``attention_length``. A
layout that does not speak of such a name splits it as the name it stands for, so that ``length:context`` splits the
length everywhere and nothing moves at a rename. *Less* takes axes away that another name has taken:

    attention_length: length - attention_heads

With ``length:context`` attention's length is split over ``context`` too (a ring); with ``attention_heads:context``
beside it, the length is not, and the rename from one to the other is one all-to-all.
"""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import fail
from .notation import Notation

Axes = tuple[str, ...]

NOTATION = Notation("Layout: like=", "dim", "name:base or name:base-other", ":", "residual_length:length")

LIKE = (
    "residual_length:length, attention_length:length-attention_heads-attention_group, attention_heads:heads, "
    "attention_group:group, routed_batch:batch-experts, expert_ff:ff-experts"
)
"""What the names that this package's models use inherit."""


@dataclass(frozen=True)
class Inherited:
    """One name's inheritance."""

    base: str
    """The name whose axes it has."""
    less: tuple[str, ...]
    """Names whose axes it has not."""


def read_inherited(given: Any, known: Mapping[str, Inherited] | None = None) -> tuple[tuple[str, Inherited], ...]:
    """From ``"residual_length:length, routed_batch:batch-experts"``, a dict or pairs of the same; ``known`` are
    others that will hold beside them.

    Raises:
        ValueError: an entry cannot be read, or names inherit from each other in a circle.
    """
    found = {name: _entry(value, given) for name, value in NOTATION.pairs(given)}
    for name in found:
        _check_no_circle(name, {**(known or {}), **found})
    return tuple(found.items())


def _entry(value: Any, given: Any) -> Inherited:
    if isinstance(value, Inherited):
        return value
    base, *less = (NOTATION.names(part, "dim", given)[0] for part in str(value).split("-"))
    return Inherited(base, tuple(less))


def _check_no_circle(name: str, found: Mapping[str, Inherited], above: tuple[str, ...] = ()) -> None:
    if name in above:
        circle = " -> ".join((*above[above.index(name) :], name))
        raise fail(f"Layout: like=: names inherit from each other in a circle: {circle}. Leave one of them out.")
    if name in found:
        for other in (found[name].base, *found[name].less):
            _check_no_circle(other, found, (*above, name))


def resolved(name: str, rules: Mapping[str, Axes], inherited: Mapping[str, Inherited]) -> Axes:
    """The axes of ``name``: those of its own rule, or else those it inherits."""
    if name in rules or name not in inherited:
        return rules.get(name, ())
    entry = inherited[name]
    taken = {axis for other in entry.less for axis in resolved(other, rules, inherited)}
    return tuple(axis for axis in resolved(entry.base, rules, inherited) if axis not in taken)


def with_bases(names: Iterable[str], rules: Container[str], inherited: Mapping[str, Inherited]) -> set[str]:
    """These names, and those whose axes they have because no rule speaks of them."""
    found = set(names)
    ahead = list(found)
    while ahead:
        name = ahead.pop()
        if name in inherited and name not in rules and (base := inherited[name].base) not in found:
            found.add(base)
            ahead.append(base)
    return found


def inherited_text(pairs: tuple[tuple[str, Inherited], ...]) -> str:
    """As it is written in a layout."""
    return ", ".join(f"{name}:{'-'.join((entry.base, *entry.less))}" for name, entry in pairs)
