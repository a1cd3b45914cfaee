"""The page of a plan, in a browser: its figures are those of the JSON, and its pictures agree with what they show."""

import dataclasses
import json
import math
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hatchling.builders.wheel import WheelBuilder
from jax.sharding import NamedSharding

import meshwright as mw
from meshwright.explain import show_bytes
from meshwright.models import Decoder, DecoderConfig
from meshwright.plan import Plan
from meshwright.plan.memory import Moment, Saved
from meshwright.plan.origin import Origin
from meshwright.plan.page import html
from meshwright.plan.report import show_flops, show_seconds
from meshwright.train.data import Batch
from meshwright.train.step import Place, State, placed, train_step

from .browser import Browser, launched
from .test_plan_warnings import LAYER, feed_forward, shapes, weight

ROOT = Path(__file__).parent.parent
CONFIG = DecoderConfig(vocab=256, embed=64, layers=4, heads=8, head_dim=16, ff=256)
LAYOUT = mw.Layout("batch:data, heads:model, ff:model, vocab:model", params="embed:data")
POD = mw.Mesh("data=64, model=8", topology="tpu:v5p:8x8x8")


def training_plan(mesh: mw.Mesh, layout: mw.Layout = LAYOUT) -> Plan:
    """The plan of a small decoder's training step."""
    optimizer, place = optax.adamw(1e-3), Place(mesh, layout)

    def first() -> tuple[State, Batch]:
        model: Any = Decoder(CONFIG, key=jax.random.key(0))
        ids = mw.Tensor(jnp.zeros((64, 32), "int32"), "batch length")
        return State(model, optimizer.init(model)), Batch(ids, ids, ids, ids)

    state, batch = jax.eval_shape(first)
    return mw.plan(train_step(optimizer, place), placed(state, place), place.shard(batch))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return training_plan(POD).on(POD)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as one:
        yield one


def opened(browser: Browser, plan: Plan, tmp_path: Path, **window: Any) -> Browser:
    path = tmp_path / "plan.html"
    plan.save(path)
    browser.open(path, **window)
    return browser


def figures(browser: Browser) -> dict[str, tuple[str, str]]:
    """Each figure of the page, with everything folded out: its place in the JSON, then its value and text."""
    browser.evaluate("document.querySelectorAll('.more').forEach((button) => button.click())")
    listed = "[...document.querySelectorAll('data')].map((d) => [d.dataset.at, d.value, d.textContent])"
    return {at: (value, text) for at, value, text in browser.evaluate(listed)}


def found_at(data: Any, pointer: str) -> Any:
    for part in pointer.split("/")[1:]:
        data = data[int(part)] if isinstance(data, list) else data[part]
    return data


def as_the_report_says(pointer: str, value: Any) -> str:
    """The text of a figure, by the functions of the terminal's page."""
    *_, before, last = pointer.split("/")
    if value is None:
        return "N/A"
    if last.endswith("per_second"):
        return f"{value / 1e9:.{2 if value < 1e10 else 0}f} GB/s"
    if before == "figures" and last.endswith("flops"):
        return f"{show_flops(value)}/s"
    if "seconds" in before + last:
        return show_seconds(value)
    if "bytes" in before + last:
        return show_bytes(value)
    if "flops" in before + last:
        return show_flops(value)
    if last in ("mfu", "hfu", "matmul", "bubble", "ticks_bubble"):
        return f"{value:.0%}"
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def every(data: Any, *lists: str) -> set[str]:
    """The places of the numbers in lists and tables of the JSON."""
    found = set()
    for pointer in lists:
        here = found_at(data, pointer)
        inner = enumerate(here) if isinstance(here, list) else here.items()
        found |= {f"{pointer}/{key}" for key, _ in inner}
    return found


@pytest.mark.parametrize("timed", [True, False])
def test_every_figure_is_that_of_the_json(browser: Browser, plan: Plan, tmp_path: Path, timed: bool) -> None:
    plan = plan if timed else training_plan(POD)
    data = json.loads(plan.to_json())
    shown = figures(opened(browser, plan, tmp_path))
    for pointer, (value, text) in shown.items():
        expected = found_at(data, pointer)
        number = isinstance(expected, int | float) and not isinstance(expected, bool)
        assert (float(value) == expected) if number else (value == ("" if expected is None else str(expected).lower()))
        assert text == as_the_report_says(pointer, expected), pointer
    names = "runs", "payload_bytes", "sent_bytes", "seconds"
    rows = {f"{row}/{name}" for row in every(data, "/traffic", "/collectives") for name in names}
    lines = {f"{line}/flops" for line in every(data, "/lines")}
    lines |= {pointer for line in every(data, "/lines") if timed for pointer in every(data, f"{line}/seconds")}
    tables = every(data, "/held_bytes", "/parts_seconds", "/axis_seconds", "/mesh", "/figures")
    costs = {f"{row}/num_bytes" for row in every(data, "/warnings", "/saved")}
    head = {"/seconds", "/mfu", "/hfu", "/flops/total", "/peak_bytes"}
    assert rows | lines | tables | costs | head <= set(shown)
    assert bool(tables & every(data, "/parts_seconds")) == timed


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True), (320, False)])
def test_nothing_is_wrong_or_cut_off(browser: Browser, plan: Plan, tmp_path: Path, width: int, dark: bool) -> None:
    opened(browser, plan, tmp_path, width=width, dark=dark)
    press = "document.querySelectorAll('button, summary').forEach((each) => each.click())"
    browser.evaluate(press)
    browser.evaluate("document.querySelectorAll('svg').forEach((each) => { each.dispatchEvent("
                     "new KeyboardEvent('keydown', { key: 'ArrowRight' })); })")  # fmt: skip
    assert browser.complaints == []
    assert browser.requests == [(tmp_path / "plan.html").as_uri()]
    wide, visible = browser.evaluate("['scrollWidth', 'clientWidth'].map((name) => document.documentElement[name])")
    assert wide <= visible <= width
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(17, 19, 22)") == dark


def test_a_complaint_is_heard(browser: Browser, tmp_path: Path) -> None:
    """The test above can fail: an error, and a picture that the page's policy refuses."""
    path = tmp_path / "bad.html"
    path.write_text("<script>setTimeout(() => missing())</script><img src='missing.png'>")
    browser.open(path)
    assert any("missing is not defined" in complaint for complaint in browser.complaints)
    assert len(browser.requests) == 2


def test_numbers_are_written_as_in_python(browser: Browser, plan: Plan, tmp_path: Path) -> None:
    opened(browser, plan, tmp_path)
    draw = random.Random(0)
    # What lies in the middle of two is rounded to the even one: 1.125 MiB, 12.25 MiB.
    middles = [int(n * 1024**2) for n in (1.125, 1.375, 2.625, 12.25, 12.75, 100.5, 101.5)]
    sizes = [0, 1, 1023, 1024, *middles, *(int(10 ** draw.uniform(0, 17)) for _ in range(500))]
    seconds = [0.0, 1.0, 0.5e-6, 1.125, *(10 ** draw.uniform(-8, 3) for _ in range(500))]
    assert browser.evaluate(f"{json.dumps(sizes)}.map(showBytes)") == [show_bytes(size) for size in sizes]
    assert browser.evaluate(f"{json.dumps(sizes)}.map(showFlops)") == [show_flops(size) for size in sizes]
    assert browser.evaluate(f"{json.dumps(seconds)}.map(showSeconds)") == [show_seconds(each) for each in seconds]


UNITS = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}


def test_the_timeline_is_to_scale(browser: Browser, plan: Plan, tmp_path: Path) -> None:
    """A loop is one turn stretched over all: so the bars of a lane cover the share of the time that it is busy."""
    opened(browser, plan, tmp_path)
    widths = "Object.groupBy([...document.querySelectorAll('#timeline svg rect[style]')], (bar) => bar.style.fill)"
    found = browser.evaluate(
        f"Object.fromEntries(Object.entries({widths}).map(([fill, bars]) => "
        "[fill, bars.reduce((all, bar) => all + bar.width.baseVal.value, 0) / bars[0].ownerSVGElement.clientWidth]))"
    )
    times = plan.time()
    assert found["var(--compute)"] == pytest.approx(times.compute_seconds / times.seconds, abs=0.03)
    assert found["var(--hbm)"] == pytest.approx(times.hbm_seconds / times.seconds, abs=0.03)
    busy = {axis.axes: axis.seconds for axis in times.axes}
    assert found["var(--axis-1)"] == pytest.approx(busy["model"] / times.seconds, abs=0.03)
    ticks = browser.evaluate("[...document.querySelectorAll('#timeline line.line + text')].map((t) => t.textContent)")
    places = browser.evaluate("[...document.querySelectorAll('#timeline line.line')].map((t) => t.x1.baseVal.value)")
    whole = browser.evaluate("document.querySelector('#timeline svg').clientWidth")
    for text, place in zip(ticks[1:], places[1:], strict=True):
        number, unit = text.split()
        assert float(number) * UNITS[unit] / times.seconds == pytest.approx(place / whole, abs=1e-3)
    loops = browser.evaluate(texts_of("#timeline .loop-text"))
    assert [text.split()[1] for text in loops] == ["4", "4"]


def test_memory_is_drawn_to_scale_under_its_limit(browser: Browser, plan: Plan, tmp_path: Path) -> None:
    held = [{"parameters": 400, "saved activations": 50 * i, "temporaries": 30 * (i % 3)} for i in range(10)]
    at_line = [Origin("forward" if i < 6 else "recompute", "dot", ("batch", "ff"), "model.py", 12) for i in range(10)]
    moments = tuple(map(Moment, held, at_line))
    limit, most = 1000, max(sum(each.values()) for each in held)
    kept = Saved("dot", ("batch", "ff"), 50, at_line[0])
    summary = dataclasses.replace(
        plan.summary, moments=moments, saved=(kept,), held_bytes=held[-1], peak_bytes=most, available_bytes=limit
    )
    path = tmp_path / "plan.html"
    path.write_text(html(summary.json()))
    browser.open(path, width=390)
    drawn = browser.evaluate(texts_of("#memory path").replace("textContent", "getAttribute('d')"))
    at = float(browser.evaluate("document.querySelector('#memory .limit').getAttribute('y1')"))
    floor = max(corner for d in drawn for corner in heights(d))
    assert (floor - min(heights(drawn[-1]))) / (floor - at) == pytest.approx(most / limit, abs=0.01)
    assert (floor - min(heights(drawn[0]))) / (floor - at) == pytest.approx(0.4, abs=0.01)
    words = browser.evaluate("document.querySelector('#memory .readout').textContent")
    assert words.startswith(f"{most} B in the recompute pass")
    assert browser.evaluate(texts_of("#memory .phase + text")) == ["forward", "backward"]
    assert "batch, ff" in browser.evaluate("document.querySelector('#memory').textContent")
    assert browser.complaints == []


def heights(d: str) -> list[float]:
    """The corners of a path."""
    return [float(corner.split(",")[1]) for corner in d.strip("MZ").split("L")]


MESHES = ["data=4, model=2", "pod=2, data=2, model=2"]


@pytest.mark.parametrize("sizes", MESHES)
def test_tiles_are_those_of_the_sharding(browser: Browser, tmp_path: Path, sizes: str) -> None:
    """For each device, the slice that the page names is the one that JAX gives it."""
    mesh = mw.Mesh(sizes)
    batch = mw.Layout("batch:(pod,data), ff:model" if "pod" in sizes else "batch:data, ff:model", params="embed:data")
    args = mw.shard(LAYER, mesh, batch)
    browser = opened(browser, mw.plan(mw.spmd(feed_forward, mesh, batch), *args), tmp_path)
    for i, tensor in enumerate(args):
        where = NamedSharding(mesh.jax_mesh, tensor.raw.sharding.spec)
        indices = where.devices_indices_map(tensor.raw.shape)
        order = list(mesh.devices)
        for device in (0, 5):
            browser.evaluate(chosen(i, device))
            words = browser.evaluate("document.querySelector('#mesh .readout').textContent")
            for dim, index in zip(tensor.dims, indices[order[device]], strict=True):
                part = f"{dim.name} {index.start}:{index.stop}" if index.start is not None else f"all of {dim.name}"
                assert part in words
            same = [n for n, other in enumerate(order) if indices[other] == indices[order[device]]]
            marked = browser.evaluate(texts_of(".same[data-of^=device]"))
            assert [int(text) for text in marked] == same
            (tile,) = browser.evaluate(texts_of(".same[data-of^=tile]"))
            assert tile.startswith(str(same[0]))
            assert tile.endswith(str(same[-1]))


def texts_of(selector: str) -> str:
    return f"[...document.querySelectorAll('{selector}')].map((each) => each.textContent)"


def chosen(tensor: int, device: int) -> str:
    """What a person does to see a tensor and a device."""
    return f"""
        (() => {{
            const choice = document.querySelector("#mesh select"), number = document.querySelector("#mesh input");
            choice.value = "{tensor}";
            choice.dispatchEvent(new Event("change"));
            number.value = "{device}";
            number.dispatchEvent(new Event("input"));
        }})()"""


def test_thousands_of_devices_are_a_small_picture(browser: Browser, tmp_path: Path) -> None:
    mesh = mw.Mesh("pod=4, data=64, model=16", topology="tpu:v5p:8x8x16*4", dcn="pod")
    layout = mw.Layout("batch:(pod,data), ff:model", params="embed:data")
    wide = shapes("batch=512 embed=512"), weight("embed=512 ff=2048"), weight("ff=2048 embed=512")
    plan = mw.plan(mw.spmd(feed_forward, mesh, layout), *mw.shard(wide, mesh, layout)).on(mesh)
    opened(browser, plan, tmp_path)
    browser.evaluate(chosen(1, 4095 - 1024))
    assert browser.evaluate("document.querySelectorAll('#mesh .grid button').length") < 200
    words = browser.evaluate("document.querySelector('#mesh .readout').textContent")
    assert "pod=2, data=63, model=15" in words
    assert "3 other devices, along pod: 1023,2047,4095" in words
    # The chosen device is among those that are drawn, wherever it stands.
    assert browser.evaluate("document.querySelector('[aria-pressed=true][data-of^=device]').textContent") == "3071"


def test_what_is_embedded_cannot_break_the_page(browser: Browser, tmp_path: Path) -> None:
    """The code of the program and its names stand on the page as text."""

    def hurt(x: mw.Tensor) -> mw.Tensor:
        return x * len("</script><script>document.title = 'broken'</script><!--")

    mesh = mw.Mesh("data=8")
    plan = mw.plan(mw.spmd(hurt, mesh, mw.Layout("batch:data")), LAYER[0]).on("v5p")
    opened(browser, plan, tmp_path)
    assert browser.evaluate("document.title") == "Plan of hurt"
    assert "</script><!--" in browser.evaluate("document.getElementById('source').textContent")
    assert browser.complaints == []


def test_bounds_are_marked(browser: Browser, tmp_path: Path) -> None:
    """What XLA will choose is in no figure: each of them is a lower bound, and the warning is the first."""
    mesh = mw.Mesh("data=4, model=2", topology="tpu:v5p:2x2x2")
    layout = mw.Layout("batch:data, ff:model", params="embed:data")
    args = mw.shard(LAYER, mesh, layout)
    chosen = mw.plan(mw.spmd(feed_forward, mesh, layout, partitioner="xla"), *args).on(mesh)
    opened(browser, chosen, tmp_path, width=320)
    wide, visible = browser.evaluate("['scrollWidth', 'clientWidth'].map((name) => document.documentElement[name])")
    assert wide <= visible
    head = browser.evaluate(texts_of("#headline dd"))
    assert [text.startswith("at least ") for text in head] == [True, False, True, True, True, False]
    assert head[1].startswith("N/A")
    assert browser.evaluate(texts_of("#warnings .severe b"))[0] == "unknown"
    assert browser.complaints == []

    def turning(x: mw.Tensor) -> mw.Tensor:
        return mw.while_loop(lambda x: mw.sum(x) < 10.0, lambda x: x * mw.sum(x, "batch"), x)

    batch = mw.Layout("batch:data")
    opened(browser, mw.plan(mw.spmd(turning, mesh, batch), *mw.shard(LAYER[:1], mesh, batch)).on(mesh), tmp_path)
    notes = browser.evaluate(texts_of("#communication .note"))
    assert notes[-1] == "+ in a loop of unknown length: at least."


def test_one_device_and_nothing_sent(browser: Browser, tmp_path: Path) -> None:
    opened(browser, mw.plan(lambda x: x @ x, jnp.ones((8, 8))).on("v5p"), tmp_path)
    assert browser.complaints == []
    text = browser.evaluate("document.body.innerText")
    assert "No device sends anything." in text
    assert "1 device" in text


def test_save_writes_by_the_ending(plan: Plan, tmp_path: Path) -> None:
    plan.save(str(tmp_path / "plan.json"))
    assert (tmp_path / "plan.json").read_text() == plan.to_json()
    for name, found in (("plan.pdf", "ends in '.pdf'"), ("plan", "has no ending")):
        with pytest.raises(ValueError, match=rf"plan\.save: .*{name}' {found}\. Write plan\.save\('plan\.html'\)"):
            plan.save(tmp_path / name)
    assert not (tmp_path / "plan.pdf").exists()


def test_the_json_tells_the_pictures_too(plan: Plan) -> None:
    data = json.loads(plan.to_json())
    assert sum(row["sent_bytes"] * row["runs"] for row in data["collectives"]) == sum(
        row.total_sent_bytes for row in plan.collectives
    )
    assert math.isclose(sum(data["parts_seconds"].values()), data["seconds"])

    def busy(stretches: list[dict[str, Any]], stream: str, turns: int = 1) -> float:
        return sum(
            busy(each["inside"], stream, turns * each["turns"]) if each["inside"]
            else each["seconds"] * turns * (each["stream"] == stream) for each in stretches
        )  # fmt: skip

    assert math.isclose(busy(data["timeline"], "compute"), data["compute_seconds"])
    assert math.isclose(busy(data["timeline"], "model"), data["axis_seconds"]["model"])
    held = sum(tensor["device_bytes"] for tensor in data["tensors"])
    scalars = sum(a.value.num_bytes for a in plan.program.arguments if not a.names)
    assert held + scalars == sum(a.value.num_bytes for a in plan.program.arguments)
    for tensor in data["tensors"]:
        assert tensor["whole_bytes"] == np.prod(tensor["shape"]) * np.dtype(tensor["dtype"]).itemsize
        assert tensor["whole_bytes"] * tensor["num_copies"] == tensor["device_bytes"] * 512
    hit = [line for line in data["lines"] if line["file"]]
    assert all(line["around"][str(line["line"])].strip() == line["code"] for line in hit)


def test_the_wheel_holds_the_page(tmp_path: Path) -> None:
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    folder = ROOT / "src" / "meshwright" / "plan" / "page"
    with zipfile.ZipFile(wheel) as archive:
        for path in folder.iterdir():
            if path.suffix in (".html", ".css", ".js"):
                assert archive.read(f"meshwright/plan/page/{path.name}") == path.read_bytes()
    # What the page refers to is there, and all of it is referred to.
    named = {path.name for path in folder.iterdir() if path.suffix in (".css", ".js")}
    page = (folder / "page.html").read_text()
    assert {name for name in named if f'"{name}"' in page} == named
