"""What an error says, and where in the user's code it points.

Every error of Meshwright names what was asked, what each operand was (names and sizes, never values), and what to
write instead, and it ends with the line of the user's own program that asked. That line is found here: the innermost
frame that belongs neither to this package nor to the libraries that call through it.
"""

import difflib
import linecache
import os
import sys
import sysconfig
from collections.abc import Iterable

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_STDLIB = sysconfig.get_paths()["stdlib"] + os.sep
_SCRIPTS = sysconfig.get_paths()["scripts"] + os.sep
_LIBRARIES = tuple(
    f"{os.sep}{name}{os.sep}" for name in ("jax", "jaxlib", "equinox", "jaxtyping", "beartype", "optax", "tyro")
)


def belongs_to_a_library(filename: str) -> bool:
    """Whether a file is this package's, a library's that calls through it, or Python's own: not the user's program."""
    if filename.startswith((_PACKAGE, _SCRIPTS)) or "<" in filename:
        return True
    if filename.startswith(_STDLIB) and "site-packages" not in filename:
        return True
    return "site-packages" in filename and any(library in filename for library in _LIBRARIES)


def user_frame() -> tuple[str, int] | None:
    """The file and line of the innermost frame of the user's program, or None at an interactive prompt."""
    frame = sys._getframe(1)
    while frame is not None:
        if not belongs_to_a_library(frame.f_code.co_filename):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return None


def at_user_line() -> str:
    """A last line for an error: the user's file, line number and code."""
    place = user_frame()
    if place is None:
        return ""
    filename, line = place
    code = linecache.getline(filename, line).strip()
    shown = os.path.relpath(filename) if filename.startswith(os.getcwd() + os.sep) else filename
    return f"\n  at {shown}:{line}" + (f": {code}" if code else "")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest known one, and all of them when they are few."""
    known = list(dict.fromkeys(known))
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    if not known:
        return hint + " There are none."
    listed = ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
    return f"{hint} Known: {listed}."


def fail(message: str) -> ValueError:
    """A ``ValueError`` for the user, with the user's line at its end. The caller raises it."""
    return ValueError(message + at_user_line())


def fail_type(message: str) -> TypeError:
    """A ``TypeError`` for the user, with the user's line at its end. The caller raises it."""
    return TypeError(message + at_user_line())
