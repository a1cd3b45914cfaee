"""Ctrl-C as a wish: the first ends a loop after its step, the second at once.

An interrupt in the middle of a step could leave a state that is half used up. So while ``Stop`` is open the signal sets
a flag, which the loop asks for.
"""

import signal
import threading
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import Any, Self


class Stop(AbstractContextManager["Stop"]):
    """Whether the user has asked to stop."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._before)
