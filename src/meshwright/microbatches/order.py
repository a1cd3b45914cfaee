"""Order: which stage of a pipeline works on which microbatch, and when.

Stages are numbered along the layers: with P devices and v runs of layers on each, stage ``k`` is run ``k // P`` of
device ``k % P``. Time is counted in ticks; in one a device does one forward pass (F) or one backward pass (B) of one of
its stages on one microbatch, and sends what comes out to its neighbour, who has it in the next.

    1F1B, 3 devices, 4 microbatches             GPipe
    0  F0 .  F1 .  F2 B0 F3 B1 .  B2 .  B3      0  F0 F1 F2 F3 .  .  .  .  B0 B1 B2 B3
    1  .  F0 .  F1 B0 F2 B1 F3 B2 .  B3 .       1  .  F0 F1 F2 F3 .  .  B0 B1 B2 B3 .
    2  .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .       2  .  .  F0 F1 F2 F3 B0 B1 B2 B3 .  .

Each device does its passes in an order of its own, as early as what they need is there. *1F1B* (Narayanan et al., 2019)
has at most as many microbatches in work on a device as there are stages from there on; the two kinds of pass fall on
alternate ticks, so that neighbours exchange at fixed times. *Interleaved* (Narayanan et al., 2021) is the same with
several stages on a device. Then the last device hands on to the first, all wait for each other, and so all do passes
forward in one tick and backward in the next: in a tick with both, a pass forward would wait for one backward, which is
about three times as long. *GPipe* (Huang et al., 2019) does all forward passes first.

What arrives is put into a slot until its last use; slots are dealt out here too.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

FORWARD, BACKWARD = "F", "B"


@dataclass(frozen=True)
class Pass:
    """One device's work in one tick."""

    kind: str
    stage: int
    microbatch: int


Form = tuple[str, bool, bool]
"""What a pass is to a program: its kind, whether at the first stage, whether at the last; no kind is to wait."""


@dataclass(frozen=True)
class Order:
    """Every device's work in every tick."""

    schedule: str
    num_devices: int
    num_stages: int
    """On all devices together."""
    num_microbatches: int
    passes: tuple[tuple[Pass | None, ...], ...]
    """By tick, then by device; None where a device waits."""

    @property
    def num_ticks(self) -> int:
        return len(self.passes)

    @functools.cached_property
    def busy_ticks(self) -> tuple[int, ...]:
        """Those in which any device does a pass. In the others they only exchange zeros."""
        return tuple(t for t, row in enumerate(self.passes) if any(row))

    @property
    def num_runs(self) -> int:
        """Stages on each device."""
        return self.num_stages // self.num_devices

    def form(self, p: Pass | None) -> Form:
        """What kind of program a pass is."""
        return ("", False, False) if p is None else (p.kind, p.stage == 0, p.stage == self.num_stages - 1)

    def forms(self, ticks: Iterable[int]) -> list[Form]:
        """The kinds of passes that any device does in any of these ticks: the branches of a program."""
        return sorted({self.form(p) for t in ticks for p in self.passes[t]})

    def sends(self, p: Pass) -> bool:
        """Whether something goes on to a neighbour from a pass."""
        return p.stage < self.num_stages - 1 if p.kind == FORWARD else p.stage > 0

    def text(self, ticks: range) -> str:
        """This order and some of its ticks, as a name in a trace says them."""
        backward = any(form[0] == BACKWARD for form in self.forms(range(self.num_ticks)))
        sizes = f"{self.schedule} {self.num_devices} {self.num_runs} {self.num_microbatches} {int(backward)}"
        return f"mw.passes[{sizes} {ticks.start}:{ticks.stop}:{ticks.step}]"

    @functools.cached_property
    def at(self) -> dict[Pass, int]:
        """The tick of each pass."""
        return {p: t for t, row in enumerate(self.passes) for p in row if p is not None}

    @property
    def bubble(self) -> float:
        """The part of the busy ticks in which a device waits: (P - 1) / (v m + P - 1), whatever the schedule; more
        where v > 1 and the devices do not divide the microbatches, for the last group leaves holes."""
        whole = self.num_devices * len(self.busy_ticks)
        return (whole - sum(p is not None for row in self.passes for p in row)) / whole

    def arrivals(self, kind: str) -> dict[tuple[int, int], tuple[int, int, int]]:
        """For each (device, tick) at which something arrives to be worked on by passes of ``kind``: the stage and the
        microbatch that it is for, and the tick of its last use."""
        found = {}
        step = 1 if kind == FORWARD else -1
        for p, t in self.at.items():
            to = p.stage + step
            if p.kind == kind and 0 <= to < self.num_stages:
                uses = [self.at[q] for k in (kind, BACKWARD) if (q := Pass(k, to, p.microbatch)) in self.at]
                found[to % self.num_devices, t + 1] = (to, p.microbatch, max(uses))
        return found


@functools.lru_cache(maxsize=64)
def ordered(schedule: str, num_devices: int, num_runs: int, num_microbatches: int, backward: bool) -> Order:
    """The order of a schedule.

    Args:
        schedule: "1f1b" or "gpipe".
        num_devices: along the pipeline.
        num_runs: stages on each device.
        backward: whether there are backward passes at all.
    """
    work = [_Device(schedule, d, num_devices, num_runs, num_microbatches, backward) for d in range(num_devices)]
    alternate = backward and schedule == "1f1b"
    done: dict[Pass, int] = {}
    rows: list[tuple[Pass | None, ...]] = []
    while any(device.left for device in work):
        t = len(rows)
        at = [t - d if num_runs == 1 else t for d in range(num_devices)]
        kinds = [((FORWARD, BACKWARD)[i % 2],) if alternate else (FORWARD, BACKWARD) for i in at]
        row = tuple(device.next(done, kind) for device, kind in zip(work, kinds, strict=True))
        done.update({p: t for p in row if p is not None})
        rows.append(row)
        assert any(any(row) for row in rows[-1 - alternate :]), "no device can go on"
    if alternate and len(rows) % 2:
        rows.append((None,) * num_devices)
    return Order(schedule, num_devices, num_devices * num_runs, num_microbatches, tuple(rows))


class _Device:
    """What one device has still to do: its passes forward and backward, each in order. Microbatches go through its runs
    of layers in groups as large as the pipeline."""

    def __init__(self, schedule: str, device: int, num_devices: int, num_runs: int, num: int, backward: bool) -> None:
        groups = [range(first, min(first + num_devices, num)) for first in range(0, num, num_devices)]
        stages = [run * num_devices + device for run in range(num_runs)]

        def passes(kind: str, stages: Sequence[int]) -> list[Pass]:
            return [Pass(kind, stage, i) for group in groups for stage in stages for i in group]

        self.num_stages, self.backward = num_devices * num_runs, backward
        self.forward, self.back = passes(FORWARD, stages), passes(BACKWARD, stages[::-1]) if backward else []
        behind = num_devices - device - 1
        ahead = behind if num_runs == 1 else 2 * behind + (num_runs - 1) * num_devices
        self.most = ahead + 1 if backward and schedule == "1f1b" else len(self.forward)
        self.all_first = schedule == "gpipe"
        self.in_work = 0

    @property
    def left(self) -> bool:
        return bool(self.forward or self.back)

    def next(self, done: Mapping[Pass, int], kinds: Sequence[str]) -> Pass | None:
        """The pass to do now, of one of these kinds; None to wait."""
        for kind in kinds:
            queue = self.forward if kind == FORWARD else self.back
            may = self.in_work < self.most if kind == FORWARD else not (self.all_first and self.forward)
            if queue and may and all(p in done for p in self._needed(queue[0])):
                self.in_work += 1 if kind == FORWARD else -1
                return queue.pop(0)
        return None

    def _needed(self, p: Pass) -> list[Pass]:
        """What must be done before a pass."""
        if p.kind == FORWARD:
            return [Pass(FORWARD, p.stage - 1, p.microbatch)] if p.stage else []
        after = [Pass(BACKWARD, p.stage + 1, p.microbatch)] if p.stage + 1 < self.num_stages else []
        return [Pass(FORWARD, p.stage, p.microbatch), *after]


def order_in(text: str) -> tuple[Order, range] | None:
    """The order and the ticks of which a name in a trace speaks (``Order.text``)."""
    found = re.search(r"mw\.passes\[(\S+) (\d+) (\d+) (\d+) ([01]) (\d+):(\d+):(\d+)\]", text)
    if found is None:
        return None
    num_devices, num_runs, num_microbatches, backward, *ticks = map(int, found.groups()[1:])
    return ordered(found[1], num_devices, num_runs, num_microbatches, bool(backward)), range(*ticks)


@dataclass(frozen=True)
class Slots:
    """Where each device keeps what arrives."""

    num: int
    store: np.ndarray
    """(tick, device): the slot into which what arrives goes; ``num`` where nothing does."""
    of: dict[tuple[int, int], int]
    """The slot of a stage's microbatch."""


def slots(order: Order, kind: str) -> Slots:
    """Slots for what arrives for passes of ``kind``, each free again after its last use."""
    store = np.full((order.num_ticks + 1, order.num_devices), -1)
    of: dict[tuple[int, int], int] = {}
    busy: dict[int, list[int]] = {d: [] for d in range(order.num_devices)}
    for (device, t), (stage, microbatch, last) in sorted(order.arrivals(kind).items(), key=lambda item: item[0][1]):
        until = busy[device]
        slot = next((i for i, end in enumerate(until) if end < t), len(until))
        until[slot : slot + 1] = [last]
        store[t, device] = of[stage, microbatch] = slot
    num = max((len(until) for until in busy.values()), default=0)
    return Slots(num, np.where(store < 0, num, store)[: order.num_ticks], of)
