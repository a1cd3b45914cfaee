"""``mw plan``: described models on described devices, layouts side by side, and what it says of mistakes."""

import dataclasses
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

import meshwright as mw
from meshwright.cli import main
from meshwright.cli.described import Anywhere
from meshwright.cli.place import Where
from meshwright.cli.plan import PlanStep, working
from meshwright.explain import show_bytes
from meshwright.models import DecoderConfig
from meshwright.models.decoder import num_parameters
from meshwright.models.sizes import SIZES, sized
from meshwright.plan import Hardware
from meshwright.plan.program import Block, Loop, Op
from meshwright.train import Place, Program, Recipe

from .test_cli import ROOT, TINY, clean, command

SMALL = [flag for flag in TINY if not flag.startswith(("--evaluate", "--tokens", "--max-bytes"))]
MIXED = "batch:data, heads:model, ff:model, vocab:model"
PAGES = ("README.md", "docs/plan.md", "src/meshwright/cli/plan.py")


def written(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What ``mw plan`` writes; it must end well."""
    assert main(["plan", *flags]) == 0
    return capsys.readouterr().out


def as_data(capsys: pytest.CaptureFixture[str], *flags: str) -> Any:
    return json.loads(written(capsys, *flags, "--json"))


@pytest.mark.parametrize("name", SIZES)
def test_a_size_has_the_parameters_of_its_name(name: str) -> None:
    model = sized(name)
    assert num_parameters(model) == pytest.approx(float(name.removesuffix("b")) * 1e9, rel=0.05)
    assert all(getattr(model, dim) % 8 == 0 for dim in ("vocab", "embed", "heads", "ff"))
    assert sized(name.upper()) is model


@pytest.mark.parametrize(
    ("name", "says"), [("7b", "'8b'"), ("13B", "'10b'"), ("1t", "'400b'"), ("350m", "'1b'"), ("large", "Known: 1b, 3b")]
)
def test_the_nearest_size_is_named(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"there is no size '{name}'.*{says}"):
        sized(name)


def test_a_named_model_on_described_devices(capsys: pytest.CaptureFixture[str]) -> None:
    text = written(capsys, "--model=1b", "--topology=tpu:v3:2x2", "--layout=batch:data")
    lines = text.splitlines()
    assert lines[0].startswith("model     1.01B parameters: layers=16, embed=2048, heads=16, ff=6144, bfloat16")
    assert lines[1] == "step      batch=8 x length=2048: 16.4k tokens, remat=nothing"
    assert lines[2:4] == ["mesh      data=8: 8 devices (TPU v3)", "layout    batch:data"]
    assert lines[5].startswith("Plan of step on TPU v3, 8 devices: data=8")
    # Without colours, the parts of a bar differ by their characters.
    assert {"█", "▒"} <= set(next(line for line in lines if line.startswith("time")))
    assert max(map(len, lines)) <= 100
    data = as_data(capsys, "--model=1b", "--topology=tpu:v3:2x2", "--layout=batch:data")
    # Each device has every parameter and Adam's two moments, in float32; a gradient is summed in whole.
    assert given_bytes(data) == pytest.approx(12 * num_parameters(sized("1b")), rel=1e-4)
    sums = sum(t["payload_bytes"] for t in data["traffic"] if (t["axes"], t["kind"]) == ("data", "all_reduce"))
    assert 2 * num_parameters(sized("1b")) <= sums <= 4.01 * num_parameters(sized("1b"))


def test_flags_say_more_than_the_size(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--layers=2", "--batch=16", "--length=512", "--dtype=float32", "--remat=dots", "--group=2"]
    text = written(capsys, "--model=1b", "--topology=gpu:h100:8", *given)
    assert "layers=2, embed=2048, heads=16 x group=2, ff=6144, float32" in text
    assert "batch=16 x length=512: 8.19k tokens, remat=dots" in text
    assert "on H100, 8 devices" in text


def test_described_devices_share_the_batch_of_a_model_without_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert "batch=64 x length=128" in written(capsys, "--topology=tpu:v5p:4x4x4", "--no-unroll")
    assert "batch=16 x length=128" in written(capsys, "--topology=tpu:v3:2x2", "--no-unroll")


def test_layers_of_described_devices_are_a_loop() -> None:
    """Unrolled, 32 layers with experts took 5 GiB more of a v5e, and six times as long to compile."""
    described = PlanStep(where=Anywhere(topology="tpu:v5e:2x4")).defaults()
    assert described is not None and not described.recipe.model.unroll
    assert PlanStep().defaults() is None and Recipe().model.unroll


def test_what_is_planned_is_what_mw_train_runs(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*SMALL, "--mesh=data=4, model=2", f"--layout={MIXED}", "--params=embed:data"]
    here = as_data(capsys, *flags, "--devices=8")
    there = as_data(capsys, *flags, "--topology=tpu:v3:2x2")
    assert here["seconds"] is None and there["seconds"] > 0
    assert (here["mesh"], here["flops"]) == (there["mesh"], there["flops"])
    assert (moved(here), given_bytes(here)) == (moved(there), given_bytes(there))
    model = DecoderConfig(vocab=288, embed=16, layers=1, heads=2, head_dim=8, ff=32)
    layout = mw.Layout(MIXED, params="embed:data")
    program = Program(Recipe(model=model, length=16, batch=8), Place(mw.Mesh("data=4, model=2"), layout))
    compiled = program.step.lower(program.shapes(), program.batch_shapes()).compile()  # type: ignore[attr-defined]
    given = compiled.memory_analysis().argument_size_in_bytes
    assert given_bytes(here) == pytest.approx(given, rel=0.001)


def given_bytes(data: Any) -> int:
    """What a step is given, on one device."""
    return sum(data["held_bytes"][kind] for kind in ("parameters", "optimizer state", "other arguments"))


def moved(data: Any) -> list[tuple[str, str, int, int]]:
    return sorted((t["axes"], t["kind"], t["runs"], t["sent_bytes"]) for t in data["traffic"])


def test_hardware_gives_present_devices_a_speed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = written(capsys, *SMALL, "--devices=8")
    assert "note      --hardware h100 (another chip, or a profile of mw.calibrate) tells the time" in text
    assert "on H100, 8 devices" in written(capsys, *SMALL, "--devices=8", "--hardware=h100")
    profile = tmp_path / "here.toml"
    profile.write_text(Hardware.named("v5e").toml())
    assert "on TPU v5e, 8 devices" in written(capsys, *SMALL, "--devices=8", f"--hardware={profile}")


def test_layouts_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    sides = ["batch:data", f"{MIXED} | params=embed:data", "batch:data | params=data | gather=step | mesh=data=2,x=4"]
    text = written(capsys, *SMALL, "--topology=tpu:v3:2x2", "--compare", *sides)
    lines = text.splitlines()
    assert lines[2] == "A         batch:data on data=8"
    assert lines[3] == f'B         "{MIXED}", params="embed:data" on data=4, model=2'
    assert lines[4] == 'C         "batch:data", params="data", gather="step" on data=2, x=4'
    assert lines[6].split() == ["A", "B", "C"]
    # Each is what it is alone.
    found = as_data(capsys, *SMALL, "--topology=tpu:v3:2x2", "--compare", *sides)
    alone = as_data(capsys, *SMALL, "--topology=tpu:v3:2x2", f"--layout={MIXED}", "--params=embed:data")
    assert found[1].pop("layout") == f'"{MIXED}", params="embed:data"'
    assert (found[1].pop("partitioner"), found[1].pop("dcn")) == ("names", [])
    assert found[1] == alone
    assert found[2]["mesh"] == {"data": 2, "x": 4}
    assert "duplicated" in {warning["kind"] for warning in found[2]["warnings"]}


def test_sides_that_differ_in_how_they_are_lowered_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    same = "batch:(pod,data) | mesh=pod=2,data=8"
    flags = ["--topology=tpu:v5e:2x4*2", "--batch=16", "--dcn=pod"]
    sides = [same, f"{same} | partitioner=xla", f"{same} | dcn=data"]
    lines = written(capsys, *SMALL, *flags, "--compare", *sides).splitlines()
    assert lines[2] == "A         batch:(pod,data) on pod=2, data=8, dcn=pod"
    assert lines[3].startswith("B         batch:(pod,data) on pod=2, data=8, dcn=pod, partitioner=xla: incomplete, XLA")
    assert lines[4] == "C         batch:(pod,data) on pod=2, data=8, dcn=data"
    found = as_data(capsys, *SMALL, *flags, "--compare", *sides)
    assert [(side["partitioner"], side["dcn"]) for side in found] == [
        ("names", ["pod"]), ("xla", ["pod"]), ("names", ["data"]),
    ]  # fmt: skip
    alone = written(capsys, *SMALL, *flags, "--layout=batch:(pod,data)", "--mesh=pod=2,data=8", "--partitioner=xla")
    assert alone.splitlines()[2].endswith(", dcn=pod")
    assert alone.splitlines()[3].endswith(", partitioner=xla")


def test_what_does_not_fit_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model=10b", "--topology=tpu:v3:4x8", "--compare", "batch:data", f"{MIXED} | params=data"]
    data, lines = as_data(capsys, *flags), written(capsys, *flags).splitlines()
    held = data[0]["peak_bytes"]
    assert lines[2] == f"A         batch:data on data=64: does not fit, {show_bytes(held)} of 15.5 GiB"
    assert held > 12 * num_parameters(sized("10b"))
    assert lines[3].endswith("on data=8, model=8")


def test_flags_hold_for_every_side(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_data(
        capsys, *SMALL, "--devices=8", "--compare", "batch:data", MIXED, "--params=data", "--mesh=data=4,model=2"
    )
    assert [side["layout"] for side in found] == ['"batch:data", params="data"', f'"{MIXED}", params="data"']
    assert all(side["mesh"] == {"data": 4, "model": 2} for side in found)


@pytest.mark.parametrize(
    ("num", "sizes"),
    [(1, (1, 1)), (2, (2, 1)), (6, (3, 2)), (8, (4, 2)), (64, (8, 8)), (512, (64, 8)), (4096, (512, 8))],
)
def test_a_mesh_that_is_not_written_has_the_axes_of_the_layout(num: int, sizes: tuple[int, int]) -> None:
    assert Where().axes(num, ("data", "model")) == dict(zip(("data", "model"), sizes, strict=True))
    assert Where().axes(num, ("data", "modell")) == {"data": num}
    assert Where(mesh="data=-1").axes(num, ("data", "model")) == "data=-1"


def test_a_page_for_the_browser_is_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    data = as_data(capsys, *SMALL, "--topology=tpu:v3:2x2", f"--html={page}")
    text = page.read_text()
    assert text.lower().startswith("<!doctype html>") and json.dumps(data["seconds"]) in text
    assert f"html      {page}" in written(capsys, *SMALL, "--topology=tpu:v3:2x2", f"--html={page}")


def test_the_page_is_written_before_the_compiler_fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """There is no compiler for GPUs here."""
    page = tmp_path / "plan.html"
    assert main(["plan", *SMALL, "--topology=gpu:h100:8", "--compile", f"--html={page}"]) == 2
    assert "there is no compiler for gpu:h100:8" in capsys.readouterr().err
    assert "Plan of" in page.read_text()


def test_the_compiler_has_its_word(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*SMALL, "--devices=8", "--compile"]
    data = as_data(capsys, *flags, "--layout=batch:data")
    compiled = data.pop("compiled")
    assert data == as_data(capsys, *SMALL, "--devices=8", "--layout=batch:data")
    assert compiled["memory"]["argument_bytes"] == pytest.approx(given_bytes(data), rel=0.001)
    sides = as_data(capsys, *flags, "--compare", "batch:data", "batch:data | params=data")
    assert sides[0]["compiled"]["memory"] == compiled["memory"]
    lines = written(capsys, *flags, "--compare", "batch:data", "batch:data | params=data").splitlines()
    rows = {line.split("  ")[0].strip(): line for line in lines[lines.index("") :]}
    held = [show_bytes(side["compiled"]["needed_bytes"]) for side in sides]
    assert rows["the compiler"].split()[-2:] == ["A", "B"]
    assert [line for line in lines if line.startswith("memory") and held[0] in line and held[1] in line]
    assert held[0] != held[1]


@pytest.mark.slow
def test_ten_billion_parameters_fit_64_small_devices_when_they_are_split(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("libtpu")
    sides = ["batch:data", f"{MIXED} | params=data"]
    flags = ["--model=10b", "--topology=tpu:v3:4x8", "--compile", "--compare", *sides]
    alone, mixed = (side["compiled"] for side in as_data(capsys, *flags))
    assert (alone["fits"], mixed["fits"]) == (False, True)
    assert alone["needed_bytes"] > 12 * num_parameters(sized("10b")) > 5 * mixed["needed_bytes"]


DESCRIBED = ["--topology=tpu:v3:2x2"]
MISTAKES = {
    "a size": (["--model=7b"], "there is no size '7b'. The nearest is '8b'"),
    "a chip": (["--topology=tpu:v3p:2x2"], "Did you mean 'v3'"),
    "a number of devices": ([*DESCRIBED, "--mesh=data=4"], "the topology tpu:v3:2x2 has 8 devices (4 chips of 2)"),
    "devices twice": ([*DESCRIBED, "--devices=8"], "--topology says what the devices are and how many."),
    "hardware twice": ([*DESCRIBED, "--hardware=h100"], "Leave --hardware h100 out."),
    "unknown hardware": (["--devices=8", "--hardware=h101"], "there is no chip 'h101'. Did you mean 'h100'?"),
    "no profile": (["--devices=8", "--hardware=no.toml"], "there is no file 'no.toml'. mw.calibrate(path='no.toml')"),
    "slices": (["--topology=tpu:v5e:2x2*2", "--batch=8"], "or --dcn data for the commands"),
    "one side": ([*DESCRIBED, "--compare", "batch:data"], "--compare: 1 layouts. Give from 2"),
    "layouts twice": ([*DESCRIBED, "--compare", "", "", "--layout="], "Leave --layout out"),
    "a page of several": ([*DESCRIBED, "--compare", "", "", "--html=x.html"], "--html writes the page of one plan."),
    "no page": ([*DESCRIBED, "--html=plan.json"], "the page is HTML. Write --html plan.html."),
    "no folder": ([*DESCRIBED, "--html=not/there.html"], "there is no folder 'not'"),
    "an option": (
        [*DESCRIBED, "--compare", "", "batch:data | parms=data"],
        "no option 'parms'. Did you mean 'params'?",
    ),
    "no value": ([*DESCRIBED, "--compare", "", "batch:data | params"], "is not an option and its value"),
    "a dim of a side": ([*DESCRIBED, "--compare", "batch:data", "bach:data"], "the rule for 'bach' was not used"),
    "an axis of a side": ([*DESCRIBED, "--compare", "batch:data", "batch:date"], "names the axis 'date'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags, says = MISTAKES[name]
    assert main(["plan", *SMALL, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mw plan: ") and says in error and "Traceback" not in error


def test_the_work_of_planning_grows_with_neither_layers_nor_devices() -> None:
    large = program_of("data=512, model=8", "tpu:v5p:16x16x16", sized("70b"))
    small = program_of("data=4, model=8", "tpu:v5p:2x4x4", dataclasses.replace(sized("70b"), layers=2))
    many, few = large.plan(), small.plan()
    assert many.program.sizes == {"data": 512, "model": 8}
    assert counted(many.program.block) == counted(few.program.block)
    assert len(many.collectives) == len(few.collectives)
    assert len(many.time().spans) == len(few.time().spans)


def program_of(mesh: str, topology: str, model: DecoderConfig) -> Program:
    place = Place(mw.Mesh(mesh, topology=topology), mw.Layout(MIXED, params="embed:data"))
    return Program(Recipe(model=model, batch=place.mesh.size, length=2048), place)


def counted(block: Block) -> int:
    """The operations written down, those of a loop once."""
    nodes = [node for node in block.nodes if not isinstance(node, Op)]
    bodies = [body for node in nodes for body in ([node.body] if isinstance(node, Loop) else node.branches)]
    return len(block.nodes) + sum(map(counted, bodies))


def alone(*flags: str, platforms: str | None = None) -> tuple[int, str, str]:
    """The exit status of ``mw plan`` in a process of its own, and what it writes where."""
    environment = {name: value for name, value in clean().items() if name != "JAX_PLATFORMS"}
    if platforms is not None:
        environment["JAX_PLATFORMS"] = platforms
    arguments = command("plan", *SMALL, *flags)
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_described_devices_start_no_accelerator_and_json_stands_alone() -> None:
    status, out, error = alone("--topology=tpu:v3:2x2", "--json")
    assert (status, error) == (0, "")
    assert json.loads(out)["machine"] == "TPU v3"
    status, out, error = alone("--topology=tpu:v3:2x2")
    assert (status, error) == (0, "")
    assert "on TPU v3, 8 devices" in out


def test_the_command_makes_its_own_devices() -> None:
    status, out, error = alone("--devices=4", platforms="cpu")
    assert (status, error) == (0, "")
    assert "Plan of step on 4 devices: data=4" in out


def test_a_line_on_a_terminal_says_what_takes_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with working("compiling batch:data"):
        pass
    found = capsys.readouterr()
    assert "compiling batch:data" in found.err and not found.out
    monkeypatch.delenv("FORCE_COLOR")
    with working("compiling batch:data"):
        pass
    assert capsys.readouterr() == ("", "")


COMMAND = re.compile(r"^ *(mw plan (?:.*\\\n)*.*)$", re.MULTILINE)
"""A command, which a backslash carries on to the next line."""
LOOP = re.compile(r"^for \w+ in ([^\n]*); do$(.*?)^done$", re.MULTILINE | re.DOTALL)
"""A shell's loop over words in quotes, each of which is a row of arguments: ``set -- $size``."""


def commands_of(text: str) -> list[str]:
    """The commands of a page; those of a loop once for each of its words."""
    found = [line.replace("\\\n", "") for line in COMMAND.findall(LOOP.sub("", text))]
    for words, body in LOOP.findall(text):
        rows = [word.split() for word in shlex.split(words)]
        found += [filled(line.replace("\\\n", ""), row) for line in COMMAND.findall(body) for row in rows]
    return found


def filled(line: str, row: list[str]) -> str:
    """A command with its ``$1`` and ``$2`` written out."""
    return re.sub(r"\$(\d)", lambda number: row[int(number[1]) - 1], line)


COMMANDS = [line for page in PAGES for line in commands_of((ROOT / page).read_text())]
LONG = {line: [pytest.mark.slow] for line in COMMANDS if "--compile" in line}


def test_every_command_of_the_pages_is_found() -> None:
    """Also those of the headline's table, which stand in a loop, over two lines."""
    lines = "".join((ROOT / page).read_text() for page in PAGES).splitlines()
    written = [line for line in lines if line.strip().startswith("mw plan ")]
    assert len(COMMANDS) == len(written) + 2
    assert not [line for line in COMMANDS if "$" in line]
    tables = [shlex.split(line) for line in COMMANDS if "model=2" in line and "residual_length" in line]
    assert [(t[3], t[5]) for t in tables] == [
        ("1b", "tpu:v3:2x2"), ("10b", "tpu:v3:4x8"), ("100b", "tpu:v3:16x16"),
    ]  # fmt: skip
    assert {line for line in COMMANDS if "residual_length" in line} <= set(LONG)


@pytest.mark.parametrize("line", [pytest.param(line, marks=LONG.get(line, [])) for line in COMMANDS])
def test_the_commands_of_the_pages_run(
    line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if line in LONG:
        pytest.importorskip("libtpu")
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
