"""The order of a pipeline's passes: every pass once, nothing before what it needs, no more in memory than promised."""

import itertools

import numpy as np
import pytest

from meshwright.microbatches.deal import rounds
from meshwright.microbatches.order import BACKWARD, FORWARD, Order, Pass, order_in, ordered, slots

EVERY = [
    (schedule, devices, runs, num, backward)
    for schedule, devices, runs, num, backward in itertools.product(
        ("1f1b", "gpipe"), (2, 3, 4, 8), (1, 2, 3), (1, 2, 3, 5, 8, 16), (True, False)
    )
]


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_every_pass_is_done_once_on_its_device_after_what_it_needs(schedule: str, backward: bool) -> None:
    for *_, devices, runs, num, _ in (e for e in EVERY if (e[0], e[4]) == (schedule, backward)):
        order = ordered(schedule, devices, runs, num, backward)
        kinds = (FORWARD, BACKWARD) if backward else (FORWARD,)
        passes = [p for row in order.passes for p in row if p is not None]
        every = {Pass(k, s, i) for k in kinds for s in range(devices * runs) for i in range(num)}
        assert len(passes) == len(every) and set(passes) == every
        at = {p: t for t, row in enumerate(order.passes) for p in row if p is not None}
        for t, row in enumerate(order.passes):
            for d, p in enumerate(row):
                if p is None:
                    continue
                assert p.stage % devices == d
                before = Pass(p.kind, p.stage + (-1 if p.kind == FORWARD else 1), p.microbatch)
                assert at.get(before, -1) < t
                if p.kind == BACKWARD:
                    assert at[Pass(FORWARD, p.stage, p.microbatch)] < t


@pytest.mark.parametrize("devices", [2, 3, 4, 8])
@pytest.mark.parametrize("num", [1, 4, 16, 33])
def test_1f1b_takes_as_long_as_gpipe_and_has_a_microbatch_for_each_stage_in_work(devices: int, num: int) -> None:
    one, other = (ordered(schedule, devices, 1, num, True) for schedule in ("1f1b", "gpipe"))
    assert one.num_ticks == other.num_ticks == 2 * (num + devices - 1)
    assert one.bubble == (devices - 1) / (num + devices - 1)
    for d in range(devices):
        assert _most_in_work(one, d) == min(num, devices - d)
        assert _most_in_work(other, d) == num
    assert slots(one, FORWARD).num <= devices - 1 and slots(other, FORWARD).num == num


def _most_in_work(order: Order, device: int) -> int:
    """How many microbatches a device has begun and not finished, at most."""
    now = most = 0
    for row in order.passes:
        p = row[device]
        now += 0 if p is None else 1 if p.kind == FORWARD else -1
        most = max(most, now)
    return most


def test_virtual_stages_make_the_bubble_smaller() -> None:
    for runs, num in [(1, 8), (2, 8), (4, 8)]:
        order = ordered("1f1b", 4, runs, num, True)
        waits = sum(p is None for t in order.busy_ticks for p in order.passes[t])
        assert order.bubble == 3 / (runs * num + 3)
        assert waits / (4 * len(order.busy_ticks)) == pytest.approx(order.bubble)


def test_neighbours_exchange_at_fixed_ticks_under_1f1b() -> None:
    order = ordered("1f1b", 4, 1, 6, True)
    for t, row in enumerate(order.passes):
        assert all((t - d) % 2 == (p.kind == BACKWARD) for d, p in enumerate(row) if p is not None)


@pytest.mark.parametrize("devices", [2, 3, 4, 8])
@pytest.mark.parametrize("runs", [2, 3, 4])
def test_interleaved_no_pass_forward_waits_for_one_backward(devices: int, runs: int) -> None:
    """Each tick takes as long as its longest pass: the bubble in time is the formula's, however much longer a pass
    backward is. In work are the microbatches that Narayanan et al. (2021) have in work."""
    for num in (devices, 2 * devices, 4 * devices):
        order = ordered("1f1b", devices, runs, num, True)
        kinds = [{p.kind for p in row if p is not None} for row in order.passes]
        assert all(k <= {(FORWARD, BACKWARD)[t % 2]} for t, k in enumerate(kinds))
        for back in (1.0, 2.0, 3.5):
            seconds = sum(1.0 if FORWARD in k else back if BACKWARD in k else 0.0 for k in kinds)
            assert 1 - runs * num * (1.0 + back) / seconds == pytest.approx(order.bubble)
        for d in range(devices):
            ahead = 2 * (devices - d - 1) + (runs - 1) * devices
            assert _most_in_work(order, d) == min(runs * num, ahead + 1)


def test_a_last_group_that_is_smaller_leaves_holes() -> None:
    order = ordered("1f1b", 4, 2, 6, True)
    waits = sum(p is None for t in order.busy_ticks for p in order.passes[t])
    assert order.bubble == pytest.approx(waits / (4 * len(order.busy_ticks)))
    assert order.bubble > 3 / (2 * 6 + 3) + 0.05


def test_a_slot_is_free_when_it_is_used_again() -> None:
    for schedule, devices, runs, num, backward in EVERY:
        order = ordered(schedule, devices, runs, num, backward)
        for kind in (FORWARD, BACKWARD)[: 1 + backward]:
            kept = slots(order, kind)
            held: dict[tuple[int, int], int] = {}
            for (d, t), (stage, microbatch, last) in sorted(order.arrivals(kind).items(), key=lambda x: x[0][1]):
                slot = kept.of[stage, microbatch]
                assert kept.store[t, d] == slot < kept.num
                assert held.get((d, slot), -1) < t
                held[d, slot] = last
            assert np.sum(kept.store != kept.num) == len(order.arrivals(kind))


def test_a_name_in_a_trace_tells_the_order_and_the_ticks() -> None:
    order, ticks = ordered("1f1b", 4, 2, 8, True), range(1, 38, 2)
    assert order_in(f"jvp(a)/{order.text(ticks)}/b") == (order, ticks)
    assert order_in("mw[batch embed]") is None


@pytest.mark.parametrize("runs", [2, 3, 4])
@pytest.mark.parametrize("devices", [2, 3, 4, 8])
def test_layers_are_dealt_out_in_as_many_permutes_as_a_device_has_runs(devices: int, runs: int) -> None:
    every = np.arange(devices * runs)
    rest, work = every.reshape(devices, runs), every.reshape(runs, devices).T
    found = rounds(tuple(map(tuple, rest.tolist())), tuple(map(tuple, work.tolist())))
    assert len(found) == runs
    for moves in found:
        assert sorted(a for a, _, _ in moves) == sorted(b for _, b, _ in moves) == list(range(devices))
    moved = {stage: (a, b) for moves in found for a, b, stage in moves}
    assert moved == {stage: (stage // runs, stage % devices) for stage in range(devices * runs)}
