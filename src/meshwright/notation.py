"""Notation: how the small strings that describe meshes and layouts are read.

A mesh is written ``"data=4, model=2"``, a layout ``"batch:(pod,data), heads:model"``. Both are pairs of a name and a
value, separated by ``,`` or ``;`` or a line's end, except inside parentheses. A dict or a sequence of pairs says the
same, so what is read here is always the same tuple of pairs: immutable, in the order written.

    >>> AXES = Notation("Mesh", "axis", "axis=size", "=:", "data=4, model=2")
    >>> AXES.pairs("data=4; model=2")
    (('data', '4'), ('model', '2'))
    >>> AXES.pairs({"data": 4})
    (('data', 4),)
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import fail, fail_type, nearest


@dataclass(frozen=True)
class Notation:
    """One kind of string of pairs, and what its errors say."""

    asked: str
    """Who reads it: the beginning of every error."""
    key: str
    """What the name of a pair names: "dim" or "axis"."""
    form: str
    """A pair as its reader should write it: "axis=size"."""
    separators: str
    """The characters that may stand between name and value."""
    example: str
    """A whole string that is right."""

    def pairs(self, given: Any) -> tuple[tuple[str, Any], ...]:
        """The pairs of a string, a mapping or a sequence of pairs, in order; the values of a string are strings.

        Raises:
            TypeError: ``given`` is none of these.
            ValueError: a part of the string is not a pair, a name is not an identifier, or a name stands twice.
        """
        if isinstance(given, str):
            found = tuple(self._pair(part, given) for part in self.parts(given))
        elif isinstance(given, Mapping):
            found = tuple(given.items())
        else:
            found = self._listed(given)
        for name, _ in found:
            self.check_name(name, self.key, given)
        names = [name for name, _ in found]
        for name in names:
            if names.count(name) > 1:
                raise fail(f"{self.asked}: the {self.key} {name!r} stands twice in {given!r}. Write it once.")
        return found

    def parts(self, text: str) -> list[str]:
        """``text`` cut at each ``,`` and ``;`` and line's end outside parentheses; empty parts are left out."""
        depth, parts = 0, [""]
        for character in text:
            depth += {"(": 1, ")": -1}.get(character, 0)
            if depth not in (0, 1):
                raise fail(f"{self.asked}: the parentheses in {text!r} do not match. {self.advice}")
            if character in ",;\n" and not depth:
                parts.append("")
            else:
                parts[-1] += character
        if depth:
            raise fail(f"{self.asked}: the parentheses in {text!r} do not match. {self.advice}")
        return [part.strip() for part in parts if part.strip()]

    def names(self, value: Any, key: str, given: Any) -> tuple[str, ...]:
        """Several names as one value: ``"data"``, ``"(pod,data)"``, ``("pod", "data")``; ``"()"`` and None are none.

        Raises:
            TypeError: the value is neither a string nor a sequence of strings.
            ValueError: a name is not an identifier, or stands twice; in a string, several stand without parentheses.
        """
        if value is None:
            return ()
        if isinstance(value, str):
            inner = re.fullmatch(r"\s*\((.*)\)\s*", value)
            names = tuple(part.strip() for part in inner[1].split(",") if part.strip()) if inner else (value.strip(),)
        elif isinstance(value, Iterable):
            names = tuple(value)
        else:
            what = article(type(value).__name__)
            raise fail_type(f"{self.asked}: {value!r} in {given!r} is {what}, not {article(key)}. {self.advice}")
        for name in names:
            self.check_name(name, key, given)
            if names.count(name) > 1:
                raise fail(f"{self.asked}: the {key} {name!r} stands twice in the rule {value!r} of {given!r}.")
        return names

    def check_name(self, name: object, key: str, given: Any) -> None:
        if not isinstance(name, str) or not name.isidentifier():
            where = f" in {given!r}" if name != given else ""
            raise fail(f"{self.asked}: {name!r}{where} is not the name of {article(key)}. {self.advice}")

    @property
    def advice(self) -> str:
        return f'Write {self.form}, as in "{self.example}".'

    def _pair(self, part: str, text: str) -> tuple[str, str]:
        found = re.fullmatch(rf"([^{self.separators}]*)[{self.separators}]([^{self.separators}]*)", part)
        if found is None or not found[1].strip() or not found[2].strip():
            where = f" in {text!r}" if part != text.strip() else ""
            raise fail(f"{self.asked}: {part!r}{where} is not a name and its value. {self.advice}")
        return found[1].strip(), found[2].strip()

    def _listed(self, given: Any) -> tuple[tuple[str, Any], ...]:
        if not isinstance(given, Iterable):
            what = article(type(given).__name__)
            raise fail_type(f"{self.asked}: expected a string, a dict or pairs, found {what}. {self.advice}")
        listed = tuple(given)
        for pair in listed:
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise fail_type(f"{self.asked}: {pair!r} is not a pair of a name and a value. {self.advice}")
        return tuple((pair[0], pair[1]) for pair in listed)


def article(word: str) -> str:
    """``a dim``, ``an axis``."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def check_known(names: Iterable[str], known: Iterable[str], message: str) -> None:
    """Raise a ``ValueError`` for the first of ``names`` that is not in ``known``: ``message``, with the name in place
    of ``{}``, and the nearest known name."""
    known = tuple(known)
    for name in names:
        if name not in known:
            raise fail(message.format(repr(name)) + nearest(str(name), known))
