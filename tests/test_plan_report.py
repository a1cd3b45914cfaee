"""The plan as a page, as JSON and side by side: the figures are those of the plan."""

import io
import json

from rich.console import Console

import meshwright as mw
from meshwright.plan import Plan

from .test_plan_warnings import LAYER, feed_forward, shapes

MESH = mw.Mesh("data=4, model=2", topology="tpu:v5p:2x2x2")
DATA = mw.Layout("batch:data")
MIXED = mw.Layout("batch:data, ff:model", params="embed:data")


def plan_of(layout: mw.Layout) -> Plan:
    return mw.plan(mw.spmd(feed_forward, MESH, layout), *mw.shard(LAYER, MESH, layout))


def test_the_page_has_the_figures_of_the_plan() -> None:
    plan = plan_of(MIXED).on(MESH)
    text = str(plan)
    assert text.startswith("Plan of feed_forward on TPU v5p, 8 devices: data=4, model=2")
    assert max(map(len, text.splitlines())) <= 100
    for kind in {row.kind for row in plan.collectives}:
        assert kind in text
    times = plan.time()
    assert f"{times.seconds * 1e6:.1f} µs" in text
    assert f"MFU {times.mfu:.0%}, HFU {times.hfu:.0%}" in text
    # The line that costs most is one of the two products, with its code.
    assert "test_plan_warnings.py" in text
    assert "mw.dot(" in text
    for warning in plan.warnings:
        assert warning.place in text
        assert warning.remedy.split()[0] in text


def test_bars_are_told_apart_without_colours_and_coloured_with() -> None:
    plan = plan_of(MIXED).on(MESH)
    bar = next(line for line in str(plan).splitlines() if line.startswith("time"))
    assert {"█", "#"} <= set(bar)
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="256")
    with console.capture() as captured:
        console.print(plan)
    bar = next(line for line in captured.get().splitlines() if "time" in line)
    assert "█" in bar
    assert "#" not in bar
    assert "\x1b[38;5;" in bar
    colourless = Console(file=io.StringIO(), width=100, color_system=None)
    with colourless.capture() as captured:
        colourless.print(plan_of(MIXED).on(MESH))
    assert captured.get().split() == str(plan_of(MIXED).on(MESH)).split()


def test_without_a_machine_times_are_not_available() -> None:
    text = str(plan_of(MIXED))
    assert "N/A" in text
    assert "MFLOP" in text or "GFLOP" in text
    assert " ms" not in text


def test_json_is_the_plan() -> None:
    plan = plan_of(MIXED).on(MESH)
    data = json.loads(plan.to_json())
    times = plan.time()
    assert data["mesh"] == {"data": 4, "model": 2}
    assert data["seconds"] == times.seconds
    assert data["axis_seconds"] == {axis.axes: axis.seconds for axis in times.axes}
    assert data["flops"]["total"] == plan.flops.total
    assert sum(t["sent_bytes"] for t in data["traffic"]) == sum(row.total_sent_bytes for row in plan.collectives)
    assert sum(line["sent_bytes"] for line in data["lines"]) == sum(row.total_sent_bytes for row in plan.collectives)
    assert sum(line["flops"] for line in data["lines"]) == plan.flops.total
    assert [w["kind"] for w in data["warnings"]] == [w.kind for w in plan.warnings]
    assert json.loads(plan_of(MIXED).to_json())["seconds"] is None


def test_two_plans_side_by_side() -> None:
    one, other = plan_of(DATA).on(MESH), plan_of(MIXED).on(MESH)
    text = str(one.compare(other, names=("data", "mixed")))
    rows = {line.split("  ")[0].strip(): line for line in text.splitlines()}
    ratio = other.time().seconds / one.time().seconds
    assert rows["time"].endswith(f" {ratio:.2f}")
    assert rows["work"].endswith(" 0.50")
    assert rows["sent"].split()[1:3] == ["0", "B"]
    assert "recomputed" not in text


def left_to_xla() -> Plan:
    """A plan whose communication XLA's partitioner chooses."""
    return mw.plan(mw.spmd(feed_forward, MESH, MIXED, partitioner="xla"), *mw.shard(LAYER, MESH, MIXED)).on(MESH)


def test_what_is_left_to_xla_is_said_everywhere() -> None:
    plan = left_to_xla()
    (warning,) = [w for w in plan.warnings if w.kind == "unknown"]
    assert plan.warnings[0] is warning
    assert (warning.num_bytes, warning.seconds) == (None, None)
    num = len(plan.program.unknown)
    assert num > 0
    assert f"What {num} operation" in warning.message
    assert "dot_general at test_plan_warnings.py:" in warning.message
    assert 'partitioner="names"' in warning.remedy
    data = json.loads(plan.to_json())
    assert (data["complete"], data["bound"], data["mfu"]) == (False, "at least", None)
    assert data["warnings"][0]["kind"] == "unknown"
    rows = {line.split(" ")[0]: line for line in str(plan).splitlines()}
    assert all("at least " in rows[name] for name in ("time", "work", "memory"))
    assert "MFU N/A, HFU N/A" in rows["work"]
    assert plan_of(MIXED).summary.complete


def test_a_bound_is_no_part_of_a_comparison() -> None:
    text = str(plan_of(MIXED).on(MESH).compare(left_to_xla(), names=("names", "xla")))
    rows = {line.split("  ")[0].strip(): line for line in text.splitlines()}
    for name in ("time", "work", "memory", "sent"):
        assert rows[name].count("at least") == 1
        assert rows[name].rstrip()[-1] not in "0123456789"
    assert rows["MFU"].split()[-1] == "N/A"


def test_loops_of_unknown_length_and_branches_are_bounds() -> None:
    def turning(x: mw.Tensor) -> mw.Tensor:
        return mw.while_loop(lambda x: mw.sum(x) < 10.0, lambda x: x * mw.sum(x, "batch"), x)

    def branching(x: mw.Tensor) -> mw.Tensor:
        return mw.cond(mw.sum(x) > 0, lambda x: x * mw.sum(x, "batch"), lambda x: x, x)

    says = {
        "at least": "+ in a loop of unknown length: at least",
        "at most": "+ in a branch, of which one runs: at most",
    }
    for fn, bound in ((turning, "at least"), (branching, "at most")):
        mesh, layout = mw.Mesh("data=8", topology="tpu:v5p:2x2x2"), mw.Layout("batch:data")
        plan = mw.plan(mw.spmd(fn, mesh, layout), *mw.shard(LAYER[:1], mesh, layout)).on(mesh)
        assert (plan.summary.sure, plan.summary.bound, plan.summary.complete) == (False, bound, True)
        assert (plan.summary.mfu is None) == (bound == "at least")
        lines = str(plan).splitlines()
        assert any(line.startswith("time") and line.endswith(" µs") and f" {bound} " in line for line in lines)
        assert says[bound] in lines
    assert plan_of(MIXED).summary.bound == ""


def test_axes_have_one_order() -> None:
    """The order of a rule is that of the slices; a group of devices is the same either way."""

    def both(x: mw.Tensor, y: mw.Tensor) -> mw.Tensor:
        return mw.sum(x, "batch") + mw.sum(y, "rows")

    layout = mw.Layout("batch:(data,model), rows:(model,data)")
    args = mw.shard((shapes("batch=64 embed=512"), shapes("rows=64 embed=512")), MESH, layout)
    plan = mw.plan(mw.spmd(both, MESH, layout), *args).on(MESH)
    assert {row.axes for row in plan.collectives} == {("data", "model"), ("model", "data")}
    data = json.loads(plan.to_json())
    assert [t["axes"] for t in data["traffic"]] == ["data x model"]
    assert {row["axes"] for row in data["collectives"]} == set(data["axis_seconds"]) == {"data x model"}
    assert set(data["paths"]) == {"data", "model", "data x model"}
    assert "model x data" not in str(plan)


def test_a_figure_stays_on_one_line_in_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    with console.capture() as captured:
        console.print(plan_of(MIXED).on(MESH))
    lines = captured.get().splitlines()
    units = ("GiB", "MiB", "KiB", "B ", "ms", "µs", "of ")
    assert not [line for line in lines if line.strip().startswith(units)]
    assert any(line.startswith("memory") and line.rstrip().endswith("of 95.7 GiB") for line in lines)
