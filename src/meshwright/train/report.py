"""What a run shows: one line per step, in a terminal as a progress bar.

The metrics, always in this order:

``loss``        the mean over the tokens of a step's batch of the negative log-probability of the next token, in nats,
                before the step's update
``tokens/s``    tokens trained on per second of wall time, over the last 20 steps; padding is not among them
``padding``     the share of the places of the last 20 steps' batches that hold no token; shown where there are buckets
``left``        the time that the steps still to do will take at the rate of the last 20
``held-out``    the same loss on text that the run does not train on, averaged over a fixed number of batches

The first step is compiled and counts for no rate; nor does time spent on held-out text or on saving. What is not known
yet is shown as N/A.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from ..explain import UNKNOWN
from .data import Amount

_WINDOW = 20
_PLAIN_LINES = 40


class Meter:
    """Rates over the last steps.

    Args:
        clock: seconds, growing.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=_WINDOW + 1)
        self._amounts: deque[Amount] = deque(maxlen=_WINDOW)

    def step(self, amount: Amount) -> None:
        """A step has ended, whose batch held so much."""
        self._ends.append(self._clock())
        self._amounts.append(amount)

    def skip(self, seconds: float) -> None:
        """Time has passed that belongs to no step."""
        self._ends = deque((end + seconds for end in self._ends), maxlen=self._ends.maxlen)

    @property
    def seconds_per_step(self) -> float | None:
        """None until two steps have ended."""
        steps = len(self._ends) - 1
        return (self._ends[-1] - self._ends[0]) / steps if steps > 0 else None

    @property
    def tokens_per_second(self) -> float | None:
        """None until two steps have ended."""
        seconds = self._ends[-1] - self._ends[0] if self._ends else 0.0
        timed = list(self._amounts)[-(len(self._ends) - 1) :]  # the first end is that of a step before
        return sum(amount.tokens for amount in timed) / seconds if seconds else None

    @property
    def padding(self) -> float:
        """The share of the places of the last batches that hold no token."""
        return Amount(*map(sum, zip(*self._amounts, strict=True))).padding


def show_seconds(seconds: float | None) -> str:
    """``1:02``, ``2:03:04``."""
    if seconds is None:
        return UNKNOWN
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def show_count(number: float | None) -> str:
    """``850``, ``12.3k``, ``4.20M``."""
    if number is None:
        return UNKNOWN
    if number < 1000:
        return f"{number:.0f}"
    for unit, size in (("k", 1e3), ("M", 1e6), ("B", 1e9)):
        if number < 999.5 * size or unit == "B":
            scaled = number / size
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{unit}"
    raise AssertionError


class Report(AbstractContextManager["Report"]):
    """The lines and the progress bar of a run.

    Args:
        console: where to write.
        steps: the number of the run's steps.
        done: those already done, when it goes on from a checkpoint.
        padded: whether batches have padding.
    """

    def __init__(self, console: Console, *, steps: int, done: int, padded: bool = False) -> None:
        self.console = console
        self.meter = Meter()
        self._steps, self._padded = steps, padded
        self._every = max(1, steps // _PLAIN_LINES)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._last = ""
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=None),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("{task.fields[rate]} tokens/s{task.fields[padding]}"),
                TextColumn("{task.fields[left]} left"),
                console=console,
                transient=True,
                expand=True,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task(
                "train", total=steps, completed=done, loss=UNKNOWN, rate=UNKNOWN, left=UNKNOWN, padding=""
            )

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, done: int, loss: float, amount: Amount) -> None:
        """A step has ended: ``done`` are done now, and the last had this loss on a batch that held so much."""
        self.meter.step(amount)
        per_step = self.meter.seconds_per_step
        left = show_seconds(None if per_step is None else per_step * (self._steps - done))
        rate = show_count(self.meter.tokens_per_second)
        padding = f"  padding {self.meter.padding:3.0%}" if self._padded else ""
        self._last = f"loss {loss:6.3f}  {rate:>5} tokens/s{padding}"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, loss=f"{loss:.3f}", rate=rate, left=left, padding=padding)
        elif done in (1, self._steps) or done % self._every == 0:
            self.line(f"{self._count(done)}  {self._last}  {left:>7} left")

    def held_out(self, done: int, loss: float) -> None:
        """The held-out loss after ``done`` steps."""
        last = f"{self._last}  " if self._bar is not None else ""
        self.line(f"{self._count(done)}  {last}held-out loss {loss:.3f}")

    def line(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(Text(text), soft_wrap=True)

    def _count(self, done: int) -> str:
        return f"step {done:{len(str(self._steps))}}/{self._steps}"


def heading(console: Console, rows: Iterable[tuple[str, str]]) -> None:
    """What is about to run: a word and what it is, a line each."""
    for word, what in rows:
        console.print(Text.assemble((f"{word:<10}", "bold"), what), soft_wrap=True)
