"""Executed annotations: what fails a test, and what lets a function speak for itself."""

import pytest
from beartype.roar import BeartypeCallHintParamViolation, BeartypeCallHintReturnViolation

from meshwright.dims import without

from .checked import checked


@checked
def doubled(x: int) -> int:
    return 2 * x


@checked
def refusing(x: int) -> int:
    if not isinstance(x, int):
        raise TypeError("refusing: give an int")
    return x


@checked
def misannotated(x: int) -> str:
    return x + 1  # pyright: ignore[reportReturnType]


@checked
def calling_wrongly(x: str) -> int:
    return doubled(x)  # pyright: ignore[reportArgumentType]


def test_a_function_that_takes_what_its_annotation_refuses_fails() -> None:
    with pytest.raises(BeartypeCallHintParamViolation, match=r"doubled\(\) parameter x=1.5"):
        doubled(1.5)  # pyright: ignore[reportArgumentType]


def test_a_function_that_refuses_too_says_so_itself() -> None:
    with pytest.raises(TypeError, match="refusing: give an int"):
        refusing("one")  # pyright: ignore[reportArgumentType]


def test_a_wrong_call_further_in_is_not_the_callers() -> None:
    with pytest.raises(BeartypeCallHintParamViolation, match=r"doubled\(\) parameter x='one'"):
        calling_wrongly("one")


def test_a_wrong_result_fails() -> None:
    with pytest.raises(BeartypeCallHintReturnViolation, match=r"misannotated\(\) return 2"):
        misannotated(1)


def test_the_package_is_under_it() -> None:
    with pytest.raises(BeartypeCallHintParamViolation, match=r"dims\.without\(\) parameter names=1"):
        without((), 1)  # pyright: ignore[reportArgumentType]
