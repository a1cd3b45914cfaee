"""Where an equation of a trace comes from: the user's line, the named operation, and the pass it belongs to.

JAX keeps with each equation the Python frames that made it, up to the function being traced, and a stack of names that
tells transposed and rematerialised equations. An equation inside a loop is completed by the frames of the loop itself.

The user's line is the innermost one outside JAX and outside this package. The models that come with the package are
programs like any other, and their lines are what one wants to read.
"""

import functools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import belongs_to_a_library
from ..microbatches.pipeline import AGAIN
from ..ops.attended import Attended

FORWARD, BACKWARD, RECOMPUTE, UPDATE = "forward", "backward", "recompute", "update"

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_PROGRAMS = tuple(_PACKAGE + room + os.sep for room in ("models", "train"))
_LANGUAGE = (_PACKAGE + "ops" + os.sep, _PACKAGE + "tensor.py")
_DIMS = re.compile(r"mw\[([^\]]*)\]")


@dataclass(frozen=True)
class Origin:
    """What made an equation."""

    direction: str
    """``forward``, ``backward``, ``recompute`` (the forward pass done again for the backward), or ``update``: what is
    neither, outside every region."""
    operation: str
    """The named operation: ``einsum``, ``mean``; the primitive where none was called."""
    dims: tuple[str, ...]
    """The names of the tensor's dims, where the operation told them."""
    file: str
    """The user's file; empty when no line of the user's is known."""
    line: int
    attended: Attended | None = None
    """Of the operation that scales an attention's queries, once for each: what that attention is of."""

    @property
    def place(self) -> str:
        """``model.py:12``, or "" when it is not known."""
        return f"{os.path.basename(self.file)}:{self.line}" if self.file else ""


def origin_of(chain: Sequence[Any], primitive: str, inside: bool) -> Origin:
    """The origin of an equation.

    Args:
        chain: JAX's source information of the equation, then of the equations around it, from the inside out.
        primitive: the equation's primitive.
        inside: whether it belongs to a region.
    """
    stacks = [str(info.name_stack) for info in chain]
    operation, file, line = _called(tuple(info.traceback for info in chain))
    told = next((found for stack in stacks if (found := _DIMS.findall(stack))), None)
    dims = tuple(told[-1].split()) if told else ()
    attended = Attended.read(stacks[0]) if primitive == "mul" else None
    return Origin(_direction(stacks, inside), operation or primitive, dims, file, line, attended)


def _direction(stacks: Sequence[str], inside: bool) -> str:
    if any("rematted_computation" in stack for stack in stacks):
        return RECOMPUTE
    if any("transpose(" in stack for stack in stacks):
        return BACKWARD
    if any(AGAIN in stack for stack in stacks):
        return RECOMPUTE
    if inside or any("jvp(" in stack for stack in stacks):
        return FORWARD
    return UPDATE


@functools.lru_cache(maxsize=65536)
def _called(tracebacks: tuple[Any, ...]) -> tuple[str, str, int]:
    """The outermost operation of the language that was called, and the user's line that called it."""
    operation = ""
    for file, line, function in _frames(tracebacks):
        if file.startswith(_PROGRAMS) or not belongs_to_a_library(file):
            return operation, file, line
        if file.startswith(_LANGUAGE) and "<" not in function:
            operation = function.rpartition(".")[2].strip("_")
    return operation, "", 0


def _frames(tracebacks: Sequence[Any]) -> Iterator[tuple[str, int, str]]:
    for traceback in tracebacks:
        for frame in traceback.frames if traceback is not None else ():
            yield frame.file_name, frame.line_num, frame.function_name
