"""The command line and the examples, as their users run them."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from meshwright.cli import main

ROOT = Path(__file__).parent.parent
TINY = [
    "--max-bytes=60000", "--vocab=288", "--embed=16", "--layers=1", "--heads=2", "--head-dim=8", "--ff=32",
    "--length=16", "--batch=8", "--evaluate-every=10", "--tokens=5", "--no-unroll",
]  # fmt: skip


def command(*arguments: str, python: tuple[str, ...] = ("-m", "meshwright")) -> list[str]:
    return [sys.executable, *python, *arguments]


def clean() -> dict[str, str]:
    """The environment without the tests' own flags: devices are what the command asks for."""
    return {**{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}, "JAX_PLATFORMS": "cpu"}


def run(*arguments: str, **options: tuple[str, ...]) -> str:
    """What a command writes; it must end well."""
    done = subprocess.run(command(*arguments, **options), env=clean(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(written: str) -> list[float]:
    return [float(x) for x in re.findall(r"  loss +([0-9.]+)", written)]


def test_a_run_saves_goes_on_elsewhere_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "run")
    mesh = ["--devices=4", "--mesh=data=2, model=2", "--layout=batch:data, heads:model, ff:model, vocab:model"]
    assert main(["train", *TINY, *mesh, "--params=embed:data", "--steps=12", f"--save={folder}", "--save-every=5"]) == 0
    written = capsys.readouterr().out
    assert "mesh      data=2, model=2: 4 devices" in written
    assert "documents, 0.1 MB, the rest left out, 1 held out" in written
    assert "step 12/12  loss" in written and "step 12/12  held-out loss" in written
    assert re.search(r"done      12 steps in 0:\d\d, held-out loss \d\.\d+; saved in ", written)
    assert "\ndef __init__(self" in written
    assert losses(written)[-1] < losses(written)[0]
    assert sorted(int(p.name) for p in Path(folder).iterdir()) == [10, 12]

    assert (
        main(
            [
                "train",
                f"--resume={folder}",
                "--steps=14",
                "--devices=8",
                "--tokens=2",
                "--gather=step",
                "--sums=float32",
            ]
        )
        == 0
    )
    written = capsys.readouterr().out
    assert "mesh      data=8: 8 devices" in written and "going on from step 12" in written
    assert "layers=1, embed=16, heads=2, ff=32" in written and "step 14/14" in written

    assert main(["plan", f"--resume={folder}", "--topology=tpu:v3:2x2", "--ff=64", "--layout=batch:data"]) == 0
    written = capsys.readouterr().out
    assert "layers=1, embed=16, heads=2, ff=64" in written and "batch=8 x length=16" in written
    assert main(["plan", f"--resume={folder}", "--topology=tpu:v3:2x2", "--model=1b"]) == 2
    assert "Leave --model 1b out" in capsys.readouterr().err

    assert main(["generate", f"--from={folder}", "--prompt=import ", "--tokens=3", "--devices=2"]) == 0
    assert capsys.readouterr().out.startswith("import ")

    assert main(["train", f"--resume={folder}", "--embed=32", "--devices=8"]) == 2
    assert "The checkpoint's model has embed=16, and embed=32 is asked for." in capsys.readouterr().err


MISTAKES = {
    "an axis too many": (["--mesh=data=3"], "'data=3' needs 3 devices"),
    "a dim that is not there": (["--layout=batch:data, head:data"], "the rule for 'head' was not used"),
    "an axis that is not there": (["--layout=batch:date"], "'date'"),
    "a batch that does not divide": (["--batch=6"], "'batch' of size 6 cannot be split over the axis 'data'"),
    "more devices than there are": (["--devices=9"], "--devices 9: there are 8 devices"),
    "no such file": (["--data=missing.txt"], "there is no file or folder 'missing.txt'"),
    "nothing to go on from": (["--resume=missing"], "There is no checkpoint in"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags, says = MISTAKES[name]
    assert main(["train", *TINY, "--devices=8", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mw train: ") and says in error and "Traceback" not in error


def test_debug_shows_where_a_mistake_was_found() -> None:
    with pytest.raises(ValueError, match="needs 3 devices"):
        main(["train", *TINY, "--devices=8", "--mesh=data=3", "--debug"])


def test_a_value_that_cannot_be_is_refused_with_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, says in ((["--steps=0"], "steps is 0; it must be"), (["--stepss=3"], "--steps"), (["--steps=a"], "INT")):
        with pytest.raises(SystemExit) as ended:
            main(["train", *flags])
        assert ended.value.code == 2
        assert says in capsys.readouterr().err


def test_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    written = capsys.readouterr().out
    assert "  train     Train a decoder-only transformer" in written and "  generate  " in written
    assert main([]) == 2
    assert main(["trian"]) == 2
    assert "there is no command 'trian'. Did you mean 'train'?" in capsys.readouterr().err


def test_help_says_what_each_flag_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0
    written = capsys.readouterr().out
    for flag in ("--layout", "--params", "--mesh", "--devices", "--data", "--dtype", "--learning-rate", "--resume"):
        assert re.search(rf"{flag}\b", written), flag
    assert "Which dims are split over which axes" in " ".join(written.replace("│", " ").split())


def test_the_command_makes_its_own_devices_and_stops_when_asked(tmp_path: Path) -> None:
    flags = [*TINY, "--devices=2", "--steps=100000", "--dtype=bfloat16", f"--save={tmp_path}"]
    environment = {**clean(), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command("train", *flags), env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = ""
        for line in process.stdout:
            seen += line
            if line.startswith("step ") and "held-out" in line:
                process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130
    assert "data=2: 2 devices (cpu)" in seen and "bfloat16" in seen
    assert re.search(r"done      stopped after \d+ of 100000 steps in .*; saved in", seen)
    assert any(path.name.isdigit() for path in tmp_path.iterdir())


def test_digits_are_the_same_under_every_layout() -> None:
    script = (str(ROOT / "examples" / "digits.py"),)
    layouts = (
        ("--devices=4", "--mesh=data=2,model=2", "--layout=batch:data, hidden:model"),
        ("--devices=4", "--mesh=x=2,y=2", "--layout=rows:x, cols:y", "--params=x"),
    )
    found = []
    for flags in layouts:
        value, accuracy = re.findall(r"loss ([0-9.]+), test accuracy ([0-9.]+)%", run(*flags, python=script))[0]
        found.append((float(value), float(accuracy)))
    assert all(accuracy > 95 for _, accuracy in found)
    for value, accuracy in found[1:]:
        assert value == pytest.approx(found[0][0], rel=0.02) and accuracy == pytest.approx(found[0][1], abs=0.3)
