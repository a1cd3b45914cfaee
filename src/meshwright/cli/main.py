"""``mw``: the command line.

A command is a frozen dataclass whose fields are its flags, with its ``run`` (a small file each); tyro reads them. A
mistake in what was asked for, which this package answers with a ``ValueError`` or ``TypeError``, is printed as its
message alone; any other error is a defect, and keeps its traceback.
"""

import os
import sys
import traceback
from collections.abc import Sequence

import tyro

from .. import errors
from .command import Command
from .generate import Generate
from .plan import PlanStep
from .train import Train

COMMANDS: dict[str, type[Command]] = {"train": Train, "plan": PlanStep, "generate": Generate}
MISTAKE = 2
"""The exit status when what was asked for cannot be done."""
INTERRUPTED = 130
_FLAGS = (tyro.conf.OmitArgPrefixes,)
_PACKAGE = os.path.dirname(os.path.abspath(errors.__file__)) + os.sep


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status.

    Args:
        arguments: the command and its flags; those of the process when None.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return 0 if given else MISTAKE
    name, *flags = given
    if name not in COMMANDS:
        print(f"mw: there is no command {name!r}.{errors.nearest(name, COMMANDS)}", file=sys.stderr)
        return MISTAKE
    return _run(name, flags)


def usage() -> str:
    """What there is to run."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: mw COMMAND [flags]; mw COMMAND --help for its flags", "", *lines])


def _run(name: str, flags: Sequence[str]) -> int:
    debug = "--debug" in flags
    try:
        command = tyro.cli(COMMANDS[name], prog=f"mw {name}", args=flags, config=_FLAGS)
        defaults = command.defaults()
        if defaults is not None:
            command = tyro.cli(COMMANDS[name], prog=f"mw {name}", args=flags, config=_FLAGS, default=defaults)
        return command.run()
    except (ValueError, TypeError) as error:
        if debug or not _is_mistake(error):
            raise
        print(f"mw {name}: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        return INTERRUPTED


def _is_mistake(error: BaseException) -> bool:
    """Whether this package itself raised the error."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and os.path.abspath(frames[-1].filename).startswith(_PACKAGE)
