"""Out of memory, as the compiler says it: needed, there, and the largest tensors.

XLA refuses a program that a device cannot hold. The sum alone may tell it so, before anything is placed:

    RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (28.00G) exceeds
    available HBM (15.75G).

or it finds out at the end, and lists what it had placed. Its units are of 1024, and its figures rounded to two digits.
"""

import re
from dataclasses import dataclass

_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
_SIZE = r"([\d.]+)([KMGTP]|B)\b"
_EARLY = re.compile(rf"Ran out of memory on (\w+), .*?\({_SIZE}\) exceeds available \w+ \({_SIZE}\)")
_LATE = re.compile(
    rf"Ran out of memory in memory space (\w+)\. Used {_SIZE} of {_SIZE} \w+\. Exceeded \w+ capacity by {_SIZE}"
)
_ITEM = re.compile(rf"^ *\d+\. Size: {_SIZE}\n(.*?)^ *=+$", re.MULTILINE | re.DOTALL)
_SHAPE = re.compile(r"^ *Shape: (.*?)$", re.MULTILINE)
_NAME = re.compile(r'op_name="([^"]*)"')
_FILE = re.compile(r'source_file="([^"]*)" source_line=(\d+)')
LEAST_SHARE = 0.01
"""Of what is needed: a smaller tensor is not worth a line."""


@dataclass(frozen=True)
class Allocation:
    """One tensor of a program that does not fit."""

    size_bytes: int
    """On one device, with the compiler's padding where the compiler tells it."""
    shape: str
    """``f32[32,4096]``, of one device."""
    operation: str
    """The operation it is the result of; "" where that is not known."""
    place: str = ""
    """The user's line, ``model.py:12``; "" where that is not known."""


@dataclass(frozen=True)
class Exhausted:
    """What a compiler says of a program that a device cannot hold."""

    memory: str
    """Which memory: ``HBM``."""
    needed_bytes: int
    available_bytes: int
    largest: tuple[Allocation, ...]
    """The largest first; empty where the compiler does not list them."""


def read_exhausted(message: str) -> Exhausted | None:
    """What an error of XLA's says of memory; None when it is about something else."""
    if (late := _LATE.search(message)) is not None:
        there = _bytes(*late.group(4, 5))
        needed = max(_bytes(*late.group(2, 3)), there + _bytes(*late.group(6, 7)))
        items = (_allocation(item) for item in _ITEM.finditer(message))
        return Exhausted(late[1].upper(), needed, there, tuple(x for x in items if x.size_bytes > LEAST_SHARE * needed))
    if (early := _EARLY.search(message)) is not None:
        return Exhausted(early[1].upper(), _bytes(*early.group(2, 3)), _bytes(*early.group(4, 5)), ())
    return None


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * _UNITS[unit])


def _allocation(item: re.Match[str]) -> Allocation:
    size, about = _bytes(*item.group(1, 2)), item[3]
    shape, name, file = _SHAPE.search(about), _NAME.search(about), _FILE.search(about)
    return Allocation(
        size,
        re.sub(r"\{[^}]*\}", "", shape[1]) if shape is not None else "",
        name[1] if name is not None else "",
        f"{file[1].rpartition('/')[2]}:{file[2]}" if file is not None else "",
    )
