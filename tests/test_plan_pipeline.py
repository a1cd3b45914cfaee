"""The plan of a pipeline: counted by hand, and played through by hand.

The program is a stack of MLPs. A microbatch's pass forward through one layer is two products, its pass backward four,
and before that a stage does its layers' forward pass again, the last stage alone for the first time.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import pytest

import meshwright as mw
from benchmarks.memory import sums
from meshwright.microbatches.order import Order, Pass, ordered
from meshwright.models import DecoderConfig
from meshwright.plan import Plan
from meshwright.plan.hlo import compiled_cycles
from meshwright.plan.passes import Passes, passes_in
from meshwright.plan.pipeline import Chosen, Everywhere, Handed, Pipeline, played
from meshwright.plan.work import flops_along
from meshwright.train import Recipe
from meshwright.train.loop import Program
from meshwright.train.step import Place

from .browser import launched
from .test_plan_exact import _compiled, _lowered, _planned, _totals
from .test_plan_page import as_the_report_says, figures, found_at, opened
from .test_plan_warnings import absent, found

F32 = 4
BATCH, EMBED, FF, LAYERS = 64, 32, 128, 8
PRODUCT = 2 * BATCH * EMBED * FF
"""The operations of one product of one layer on the whole batch."""
SCHEDULES = [("1f1b", 1), ("gpipe", 1), ("1f1b", 2), ("gpipe", 2)]


def layer(x: mw.Tensor, weights: tuple[mw.Tensor, mw.Tensor]) -> mw.Tensor:
    up, down = weights
    return x + mw.dot(mw.relu(mw.dot(x, up, over="embed")), down, over="ff")


def loss(weights: tuple[mw.Tensor, mw.Tensor], x: mw.Tensor) -> Any:
    return mw.mean(mw.fold(layer, x, weights, over="layers") ** 2)


def planned(
    mesh: str = "pipe=4",
    rules: str = "layers:pipe",
    microbatches: int = 8,
    gradient: bool = True,
    topology: str | None = None,
    batch: int = BATCH,
    scale: int = 1,
    **options: Any,
) -> Plan:
    """The plan of the stack's gradient (or of its loss) on present devices, or on a described topology's."""
    of_batch, layers, embed, ff = mw.dims(batch=batch, layers=LAYERS, embed=scale * EMBED, ff=scale * FF)
    num = 1
    for part in mesh.split(","):
        num *= int(part.split("=")[1])
    where = mw.Mesh(mesh, topology=topology) if topology else mw.Mesh(mesh, jax.devices()[:num])
    layout = mw.Layout(rules, microbatches=microbatches, **options)

    def inputs() -> Any:
        weights = mw.param(mw.zeros((layers, embed, ff))), mw.param(mw.zeros((layers, ff, embed)))
        return weights, mw.zeros((of_batch, embed))

    run = mw.spmd(loss, where, layout)
    placed = mw.shard(jax.eval_shape(inputs), where, layout)
    plan = mw.plan(jax.value_and_grad(run) if gradient else run, *placed)
    return plan.on(where) if topology else plan


def pipeline_of(plan: Plan) -> Pipeline:
    (pipeline,) = plan.pipelines
    return pipeline


# Passes


def test_a_name_tells_which_branch_runs_when() -> None:
    """GPipe forward, 3 devices, 4 microbatches: in 6 ticks each device does 4 passes and waits twice."""
    order = ordered("gpipe", 3, 1, 4, True)
    passes = passes_in(f"jit(f)/{order.text(range(6))}/cond", 4)
    assert passes is not None
    forms = order.forms(range(6))
    assert [form[0] for form in forms] == ["", "F", "F", "F"]
    found = {form: passes.runs(i, (6, 6, 6)) for i, form in enumerate(forms)}
    assert found == {
        ("", False, False): (2, 2, 2),
        ("F", True, False): (4, 0, 0),
        ("F", False, False): (0, 4, 0),
        ("F", False, True): (0, 0, 4),
    }
    assert passes.runs(0, (18, 18, 18)) == (6, 6, 6), "three times the whole loop"
    assert list(passes.on(2, 12)) == [(0, 4), (forms.index(("F", False, True)), 8)]


def test_a_choice_of_the_users_is_none_of_a_pipeline() -> None:
    name = ordered("1f1b", 4, 1, 4, True).text(range(0, 14, 2))
    assert passes_in(name, 5) is not None
    assert passes_in(name, 4) is None, "another number of branches"
    assert passes_in(f"{name}/cond/branch_1_fun/cond", 5) is None, "a choice within a pass"
    assert passes_in("jit(f)/cond", 2) is None


# Work


@pytest.mark.parametrize(("schedule", "runs"), SCHEDULES)
@pytest.mark.parametrize("microbatches", [4, 8])
def test_all_stages_together_do_what_is_counted_by_hand(schedule: str, runs: int, microbatches: int) -> None:
    plan = planned(microbatches=microbatches, schedule=schedule, virtual_stages=runs)
    stages = flops_along(plan.program)
    per_device = LAYERS // 4
    # A device's layers: forward, forward again, backward; of the last stage's run of layers the first is left out.
    whole = [8 * per_device * PRODUCT] * 3 + [(8 * per_device - 2 * per_device // runs) * PRODUCT]
    assert [flops.matmul for flops in stages] == whole
    again = [2 * per_device * PRODUCT] * 3 + [(2 * per_device - 2 * per_device // runs) * PRODUCT]
    products = [sum(w.flops for w in flops.works if w.recomputed and w.kind == "matmul") for flops in stages]
    assert products == again
    assert sum(whole) - sum(again) == 6 * LAYERS * PRODUCT, "useful work does not depend on the schedule"
    assert plan.flops.total == max(flops.total for flops in stages)
    assert [device.flops for device in pipeline_of(plan).devices] == [flops.total for flops in stages]


def test_the_forward_pass_alone() -> None:
    stages = flops_along(planned(gradient=False).program)
    assert [flops.matmul for flops in stages] == [2 * LAYERS // 4 * PRODUCT] * 4
    assert not any(flops.recomputed for flops in stages)


def test_what_layers_rematerialise_is_done_a_third_time() -> None:
    """A pass backward does the stage's forward pass again, and within it each layer's once more."""

    def total(weights: Any, x: mw.Tensor) -> Any:
        return mw.mean(mw.fold(layer, x, weights, over="layers", remat="nothing") ** 2)

    dims = mw.dims(layers=LAYERS, embed=EMBED, ff=FF, batch=BATCH)
    mesh, layout = mw.Mesh("pipe=4", jax.devices()[:4]), mw.Layout("layers:pipe", microbatches=8)

    def inputs() -> Any:
        return (mw.param(mw.zeros(dims[:3])), mw.param(mw.zeros((dims[0], dims[2], dims[1])))), mw.zeros(dims[3::-2])

    placed = mw.shard(jax.eval_shape(inputs), mesh, layout)
    stages = flops_along(mw.plan(jax.grad(mw.spmd(total, mesh, layout)), *placed).program)
    per_device = LAYERS // 4
    useful, recomputed = 6 * per_device * PRODUCT, [4 * per_device * PRODUCT] * 3 + [2 * per_device * PRODUCT]
    for flops, again in zip(stages, recomputed, strict=True):
        products = [w for w in flops.works if w.kind == "matmul"]
        # Of a rematerialised layer the product that its gradient does not need is not done again.
        assert sum(w.flops for w in products if not w.recomputed) == useful
        assert again - per_device * PRODUCT <= sum(w.flops for w in products if w.recomputed) <= again


# Traffic


def test_permutes_by_hand() -> None:
    """GPipe: a loop of m + P - 1 ticks each way, one permute in each, of one microbatch."""
    plan = planned(schedule="gpipe")
    rows = [row for row in plan.collectives if row.kind == "permute"]
    assert [(row.times, row.runs, row.payload_bytes) for row in rows] == [(11, (11,) * 4, 8 * EMBED * F32)] * 2
    assert all(row.sure for row in plan.collectives) and plan.summary.sure and plan.summary.bound == ""


def test_gathers_run_on_the_devices_whose_stage_has_them() -> None:
    """FSDP beside: a pass forward gathers 2 matrices for each of its 2 layers, a pass backward does twice."""
    plan = planned("pipe=4,data=2", "layers:pipe, batch:data", params="embed:data")
    gathers = [row for row in plan.collectives if row.kind == "all_gather"]
    assert all(row.sure and row.times == max(row.runs) for row in gathers)
    by_device = [sum(row.runs[d] for row in gathers) for d in range(4)]
    assert by_device == [2 * 2 * (8 + 2 * 8)] * 3 + [2 * 2 * 2 * 8]
    (told,) = [t for t in plan.summary.traffic if t.kind == "all_gather"]
    assert (told.runs, told.sure) == (by_device[0], True)
    assert told.payload_bytes == by_device[0] * EMBED * FF * F32


WAYS: list[dict[str, Any]] = [
    {"mesh": "pipe=4"},
    {"mesh": "pipe=4", "schedule": "gpipe"},
    {"mesh": "pipe=2", "virtual_stages": 2, "microbatches": 4},
    {"mesh": "pipe=2", "virtual_stages": 4, "schedule": "gpipe"},
    {"mesh": "pipe=1", "microbatches": 4},
    {"mesh": "pipe=8", "microbatches": 4, "gradient": False},
    {"mesh": "pipe=4,data=2", "rules": "layers:pipe, batch:data", "params": "embed:data"},
    {"mesh": "pipe=2,model=2", "rules": "layers:pipe, ff:model", "virtual_stages": 2},
    {"mesh": "data=2,pipe=2", "rules": "layers:pipe, batch:data", "params": "embed:data", "gather": "step"},
    {"mesh": "a=2,b=2", "rules": "layers:(a,b)", "microbatches": 4},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(map(str, way.values())))
def test_three_readers_count_the_same(way: dict[str, Any]) -> None:
    """The table of branches is read from the lowered module's constants, and from the compiled program's names."""
    plan = planned(**way)
    sizes = plan.program.sizes
    assert _planned(plan, sizes) == _lowered(plan, sizes)
    assert _totals(_planned(plan, sizes)) == _totals(_compiled(plan, sizes))


def test_cycles_are_those_of_the_device_that_has_most() -> None:
    """Three turns of a pass forward and one of nothing, on two devices, of a loop of two passes each."""
    order = ordered("gpipe", 2, 1, 2, False)
    scope = order.text(range(order.num_ticks))
    forms = order.forms(range(order.num_ticks))
    cycles = {"": 1, "F": 100}
    branches = "\n".join(
        f"%b{i} () -> f32[] {{\n  %f{i} = f32[] fusion(), "
        f'backend_config={{"estimated_cycles":"{cycles[form[0]] * (10 if form[2] else 1)}"}}\n}}'
        for i, form in enumerate(forms)
    )
    names = ", ".join(f"%b{i}" for i in range(len(forms)))
    text = (
        f"{branches}\n%body () -> f32[] {{\n  %c = f32[] conditional(%i), branch_computations={{{names}}}, "
        f'metadata={{op_name="jit(f)/while/body/{scope}/cond"}}\n}}\n'
        "ENTRY %main () -> f32[] {\n  %w = f32[] while(%t), body=%body, "
        f'backend_config={{"known_trip_count":{{"n":"{order.num_ticks}"}}}}\n}}\n'
    )
    assert compiled_cycles(text) == (2 * 1000 + 1, True)


# Time


def by_hand(order: Order, forward: float, backward: float, permute: float = 0.0) -> list[Any]:
    """Steps of a loop whose passes take so long, whatever the stage."""
    ticks = range(order.num_ticks)
    seconds = {"": 0.0, "F": forward, "B": backward}
    num = order.num_devices
    onward, back = tuple((d, d + 1) for d in range(num - 1)), tuple((d + 1, d) for d in range(num - 1))
    steps: list[Any] = [Chosen(Passes(order, ticks), tuple(seconds[form[0]] for form in order.forms(ticks)))]
    return [*steps, Handed(onward, permute), Handed(back, permute)]


@pytest.mark.parametrize("num_devices", [2, 4])
@pytest.mark.parametrize("microbatches", [4, 8])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_passes_of_one_length_wait_as_the_formula_says(schedule: str, microbatches: int, num_devices: int) -> None:
    order = ordered(schedule, num_devices, 1, microbatches, True)
    run = played(by_hand(order, 1.0, 1.0), order.num_ticks)
    assert run.seconds == 2 * (microbatches + num_devices - 1)
    assert run.busy_seconds == (2.0 * microbatches,) * num_devices
    assert 1 - sum(run.busy_seconds) / num_devices / run.seconds == pytest.approx(order.bubble)


def test_gpipe_takes_its_forward_and_its_backward_ticks() -> None:
    """3 devices, 4 microbatches: 6 ticks of each kind, with two permutes of 0.5 after each."""
    order = ordered("gpipe", 3, 1, 4, True)
    run = played(by_hand(order, 1.0, 3.0, 0.5), order.num_ticks)
    assert run.seconds == 6 * 1.0 + 6 * 3.0 + 12 * 2 * 0.5
    assert run.handing_seconds == (12.0,) * 3
    assert run.starts[Pass("F", 2, 0)] == (2 * (1.0 + 1.0), 1.0)


def test_a_permute_waits_for_both_of_its_ends_and_for_no_one_else() -> None:
    """Two ticks of two microbatches on 4 devices: the first is busy for 5, and only its neighbour waits."""
    order = ordered("gpipe", 4, 1, 2, False)
    forms = order.forms(range(order.num_ticks))
    seconds = tuple(5.0 if form[1] else 1.0 if form[0] else 0.0 for form in forms)
    first = played([Chosen(Passes(order, range(order.num_ticks)), seconds), Handed(((0, 1),), 0.25)], 1)
    assert first.seconds == 5.25
    assert first.handing_seconds == (0.25, 0.25, 0.0, 0.0)
    run = played([Everywhere(2.0), Chosen(Passes(order, range(order.num_ticks)), seconds)], 2)
    assert run.seconds == 2 * (2.0 + 5.0)
    assert run.busy_seconds == (10.0, 1.0, 0.0, 0.0)


def test_where_neighbours_exchange_in_each_tick_it_takes_the_longer_pass() -> None:
    """1F1B on 2 devices, 8 microbatches, joined in each of 18 ticks (its own program joins them in every second one
    only): one tick of each end's alone, and 16 that both spend together."""
    order = ordered("1f1b", 2, 1, 8, True)
    run = played(by_hand(order, 1.0, 3.0), order.num_ticks)
    mixed = [{p.kind for p in row if p is not None} for row in order.passes]
    assert run.seconds == sum(3.0 if "B" in kinds else float("F" in kinds) for kinds in mixed)
    assert run.busy_seconds == (8 * 4.0, 8 * 4.0)


MACHINE = "tpu:v5p:2x2x1"


@pytest.mark.parametrize(("schedule", "runs"), SCHEDULES)
def test_the_parts_make_the_whole(schedule: str, runs: int) -> None:
    plan = planned(topology=MACHINE, batch=4096, scale=32, schedule=schedule, virtual_stages=runs)
    times, pipeline = plan.time(), pipeline_of(plan)
    parts = plan.summary.parts_seconds
    assert sum(parts.values()) == pytest.approx(times.seconds)
    assert parts["bubble"] == times.bubble_seconds > 0
    assert pipeline.seconds is not None and pipeline.bubble is not None
    assert pipeline.seconds == pytest.approx(sum(run.seconds for run in times.pipelines))
    assert pipeline.seconds <= times.seconds
    busy = [device.busy_seconds or 0.0 for device in pipeline.devices]
    assert pipeline.bubble == pytest.approx(1 - sum(busy) / 4 / pipeline.seconds)
    assert pipeline.bubble > pipeline.ticks_bubble == pytest.approx(3 / (runs * 8 + 3))
    mean = sum(flops.matmul for flops in flops_along(plan.program)) / 4
    assert times.hfu == pytest.approx(mean / (times.seconds * times.machine.hardware.peak_flops))
    useful = 6 * LAYERS * 2 * 4096 * 32 * EMBED * 32 * FF / 4
    assert times.mfu == pytest.approx(useful / (times.seconds * times.machine.hardware.peak_flops))
    assert times.sure


def test_passes_follow_one_another() -> None:
    """What is drawn: on a device no two passes at once, and none before what it needs."""
    plan = planned(topology=MACHINE, batch=4096, scale=32, virtual_stages=2)
    when: dict[tuple[str, int, int], tuple[float, float]] = {}
    for device in pipeline_of(plan).devices:
        now = 0.0
        for p in device.passes:
            assert p.start_seconds is not None and p.seconds is not None
            assert p.start_seconds >= now - 1e-12
            now = p.start_seconds + p.seconds
            when[p.kind, p.stage, p.microbatch] = p.start_seconds, now
    assert len(when) == 2 * 8 * 8
    for (kind, stage, microbatch), (start, _) in when.items():
        before = ("F", stage - 1, microbatch) if kind == "F" else ("B", stage + 1, microbatch)
        assert start >= when.get(before, (0.0, 0.0))[1]


# What stages keep


@pytest.mark.parametrize(
    ("schedule", "in_work", "kept"),
    [("1f1b", [4, 3, 2, 1], [0, 3, 2, 1]), ("gpipe", [8, 8, 8, 8], [0, 8, 8, 8])],
)
def test_microbatches_in_work(schedule: str, in_work: list[int], kept: list[int]) -> None:
    plan = planned(schedule=schedule)
    devices = pipeline_of(plan).devices
    assert [device.in_work for device in devices] == in_work
    assert [device.kept for device in devices] == kept
    assert [device.kept_bytes for device in devices] == [n * 8 * EMBED * F32 for n in kept]
    assert {device.memory_bytes for device in devices} == {plan.memory.peak_bytes}
    assert [device.stages for device in devices] == [(0,), (1,), (2,), (3,)]
    assert all((device.forward, device.backward) == (8, 8) for device in devices)


def test_virtual_stages_lie_apart() -> None:
    devices = pipeline_of(planned("pipe=2", virtual_stages=2, microbatches=4)).devices
    assert [device.stages for device in devices] == [(0, 2), (1, 3)]
    assert all((device.forward, device.backward) == (8, 8) for device in devices)
    alone = pipeline_of(planned(gradient=False)).devices
    assert [(device.forward, device.backward, device.in_work) for device in alone] == [(8, 0, 1)] * 4


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_what_passes_change_in_place_is_held_once(schedule: str) -> None:
    """Sums of gradients go through the choice of each tick: the CPU's compiler holds them once."""
    plan = planned(batch=256 * BATCH, scale=16, schedule=schedule)
    compiled = plan.compile().memory
    assert compiled is not None
    assert abs(plan.memory.temporary_bytes / compiled.temporary_bytes - 1) < 0.10
    few = planned(scale=16, schedule=schedule)
    gradients = LAYERS // 4 * 2 * (16 * EMBED) * (16 * FF) * F32
    assert gradients * 2 < few.memory.temporary_bytes < gradients * 3.1, "sums, one microbatch's, and a product's"


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_a_decoder_in_stages_takes_what_the_tpu_compiler_says(schedule: str) -> None:
    mesh = mw.Mesh("pipe=4, data=2", topology="tpu:v5e:2x4")
    layout = mw.Layout("layers:pipe, batch:data", params="embed:data", microbatches=8, schedule=schedule)
    model = DecoderConfig(
        vocab=32768, embed=1024, layers=8, heads=8, head_dim=128, ff=4096, dtype="bfloat16", remat="nothing"
    )
    plan = Program(Recipe(model=model, batch=32, length=1024), Place(mesh, layout)).plan().on(mesh)
    planned_bytes, reported = sums(plan, plan.compile())
    assert abs(planned_bytes / reported - 1) < 0.10


# What is shown


def test_print_and_json() -> None:
    plan = planned(topology=MACHINE, batch=4096, scale=32)
    text, told = str(plan), json.loads(plan.to_json())
    assert "1f1b, microbatches=8, 4 devices, 22 ticks; bubble 27% of the ticks" in text
    (pipeline,) = told["pipelines"]
    assert pipeline["num_ticks"] == 22
    assert f"{pipeline['bubble']:.0%} of " in text
    assert len(pipeline["devices"]) == 4
    assert sum(len(device["passes"]) for device in pipeline["devices"]) == 4 * 16
    assert told["sure"] and told["bound"] == ""
    untimed = planned()
    assert "bubble 27% of the ticks\n" in str(untimed)
    assert pipeline_of(untimed).bubble is None
    assert json.loads(untimed.to_json())["pipelines"][0]["devices"][0]["busy_seconds"] is None
    assert "░ bubble" in text and "bubble" in str(plan.compare(plan))


@pytest.mark.parametrize("timed", [True, False])
def test_the_page_draws_every_pass(tmp_path: Path, timed: bool) -> None:
    where: dict[str, Any] = {"topology": MACHINE, "batch": 4096, "scale": 32} if timed else {}
    plan = planned(**where, virtual_stages=2)
    data = json.loads(plan.to_json())
    with launched() as browser:
        for width, dark in ((390, True), (1280, False)):
            opened(browser, plan, tmp_path, width=width, dark=dark)
            assert not browser.complaints
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
        shown = figures(browser)
        for pointer, (value, text) in shown.items():
            expected = found_at(data, pointer)
            assert text == as_the_report_says(pointer, expected), pointer
            assert isinstance(expected, str | bool) or (value == "" if expected is None else float(value) == expected)
        rows = {f"/pipelines/0/devices/{d}/{name}" for d in range(4) for name in ("busy_seconds", "flops", "kept")}
        assert rows | {"/pipelines/0/ticks_bubble", "/pipelines/0/num_ticks"} <= set(shown)
        assert ("/pipelines/0/bubble" in shown) == timed
        boxes = "[...document.querySelectorAll('#pipeline .pass')].map((p) => p.getAttribute('d'))"
        drawn = [shape.split("M")[1:] for shape in browser.evaluate(boxes)]
    assert [len(boxes) for boxes in drawn] == [8] * 4 * 2 * 2, "device by device, two kinds, two runs"
    pipeline = pipeline_of(plan)
    first = [p for p in pipeline.devices[1].passes if p.kind == "B" and p.stage == 1]
    starts = [float(box.split()[0]) for box in drawn[4 + 2]]
    whole = pipeline.seconds if timed else pipeline.num_ticks
    expected_starts = [(p.start_seconds if timed else p.tick) / whole for p in first]  # type: ignore[operator]
    scale = (starts[-1] - starts[0]) / (expected_starts[-1] - expected_starts[0])
    assert starts == pytest.approx([starts[0] + scale * (x - expected_starts[0]) for x in expected_starts], abs=0.02)


def test_a_program_without_a_pipeline_has_no_section_of_it(tmp_path: Path) -> None:
    with launched() as browser:
        opened(browser, planned("data=4", "batch:data", topology=MACHINE), tmp_path)
        assert not browser.complaints
        assert browser.evaluate("document.getElementById('pipeline')") is None
        assert browser.evaluate("document.querySelectorAll('nav a').length") == 8


# A large bubble


def test_few_microbatches_for_many_stages() -> None:
    warning = found("bubble", planned(topology=MACHINE, microbatches=4))
    assert "4 microbatches are few for 4 stages on 4 devices: for 43% of the ticks" in warning.message
    assert "3 / 7" in warning.message
    assert warning.remedy.startswith("microbatches=32 leaves 9%; virtual_stages=8 leaves 9%")
    assert warning.seconds is not None and warning.seconds > 0
    absent("bubble", planned(topology=MACHINE, microbatches=32))
    untimed = found("bubble", planned(microbatches=4))
    assert untimed.seconds is None and dataclasses.replace(untimed, message=warning.message).remedy == warning.remedy


def test_virtual_stages_mend_it_too() -> None:
    warning = found("bubble", planned("pipe=2", microbatches=4))
    assert "virtual_stages=4 leaves 6%, where the layers are a multiple of 8" in warning.remedy
    absent("bubble", planned("pipe=2", microbatches=4, virtual_stages=4))


def test_microbatches_that_the_devices_do_not_divide_leave_holes() -> None:
    """By hand, 4 devices, 2 stages on each, 6 microbatches: 24 passes of a device in 34 ticks."""
    warning = found("bubble", planned(microbatches=6, virtual_stages=2, batch=24))
    assert "for 29% of the ticks a device waits: 4 devices do not divide 6 microbatches" in warning.message
    assert warning.remedy == "microbatches=16 leaves 9%."
