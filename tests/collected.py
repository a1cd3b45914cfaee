"""Every program of the equivalence tests, with every layout, mesh and partitioner: collected, not run.

The tests of each operation hand their programs to ``laws.agree``. Here the same tests are called with something else in
its place, so that another law can be held against the same programs: a new test of ``agree`` is a new test of that law.
"""

import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from .laws import Way, prepared, together

Check = Callable[[Any, tuple[Any, ...], Way], None]
"""What is held against a compiled function, its arguments and the way it was made."""


def collected() -> list[Any]:
    """The tests that call ``agree``, for ``pytest.mark.parametrize``: each a module and a function."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("test_*.py"))
    found = []
    for name in names:
        if "import" in (text := (Path(__file__).parent / f"{name}.py").read_text()) and "agree(" in text:
            module = importlib.import_module(f"tests.{name}")
            found += [pytest.param(module, test, id=f"{name}.{test.__name__}") for test in _tests(module)]
    return found


def _tests(module: Any) -> Iterator[Any]:
    for name, test in vars(module).items():
        if name.startswith("test_") and inspect.isfunction(test) and "agree(" in inspect.getsource(test):
            yield test


def hold(
    check: Check,
    module: Any,
    test: Any,
    monkeypatch: pytest.MonkeyPatch,
    partitioners: Sequence[str] = ("names", "xla"),
) -> None:
    """Call ``check`` with each program that ``test`` hands to ``agree``, on the ways with these partitioners."""

    def instead(fn: Any, *inputs: Any, over: Sequence[Way], grads: bool = True, relative: float = 0) -> None:
        del relative
        for way in (way for way in over if way.partitioner in partitioners):
            check(*prepared(together(fn), inputs, grads, way.region), way)

    monkeypatch.setattr(module, "agree", instead)
    for arguments in _calls(test):
        test(**arguments)


def _calls(test: Any) -> Iterator[dict[str, Any]]:
    """The arguments of a test, from its marks."""
    given = [mark.args for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    tables = [[_named(names, value) for value in values] for names, values in given]
    for chosen in itertools.product(*tables):
        yield {name: value for part in chosen for name, value in part.items()}


def _named(names: str | Sequence[str], value: Any) -> dict[str, Any]:
    listed = names.replace(" ", "").split(",") if isinstance(names, str) else list(names)
    return dict(zip(listed, value if len(listed) > 1 else [value], strict=True))
