"""The plan's memory beside the TPU compiler's, for one training step under many configurations.

    python benchmarks/memory.py
    python benchmarks/memory.py --only v5e

The training step of a decoder (8 layers, batch 16 x 1024, vocabulary 32768, bfloat16, AdamW, donated state) in two
widths, under three layouts, with and without rematerialisation, is planned and then compiled for eight described TPUs
of two kinds. Needs ``pip install 'meshwright[tpu-plan]'``; a compilation takes 10 to 30 s.

What is compared is what a device holds: arguments + temporaries + outputs - aliases. ``needed`` is the sum that the
compiler itself holds against the device's memory; ``reported`` the one of its ``memory_analysis()``, in which the
fragmentation of temporaries counts twice (docs/plan.md).
"""

import argparse
import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any

import jax

import meshwright as mw
from meshwright.models import DecoderConfig
from meshwright.plan import Compiled, Plan
from meshwright.train import Recipe
from meshwright.train.loop import Program
from meshwright.train.step import Place

TENSOR = "heads:model, ff:model, vocab:model"
LAYOUTS = {
    "data": ("data=8", mw.Layout("batch:data")),
    "FSDP": ("data=8", mw.Layout("batch:data", params="embed:data")),
    "FSDP x tensor": ("data=4, model=2", mw.Layout("batch:data, " + TENSOR, params="embed:data")),
}
WIDTHS = (1024, 2048)
REMATS = (None, "nothing")
TOPOLOGIES = ("tpu:v5e:2x4", "tpu:v5p:2x4x1")


@dataclass(frozen=True)
class Case:
    """One configuration on one kind of chip."""

    topology: str
    width: int
    layout: str
    remat: str | None

    def plan(self) -> Plan:
        """The plan of the step."""
        axes, layout = LAYOUTS[self.layout]
        mesh = mw.Mesh(axes, topology=self.topology)
        model = DecoderConfig(
            vocab=32768, embed=self.width, layers=8, heads=self.width // 128, head_dim=128, ff=4 * self.width,
            dtype="bfloat16", remat=self.remat,
        )  # fmt: skip
        return Program(Recipe(model=model, batch=16, length=1024), Place(mesh, layout)).plan().on(mesh)

    @property
    def name(self) -> str:
        saved = "remat" if self.remat else "no remat"
        return f"{self.topology.split(':')[1]} | {self.width} | {self.layout} | {saved}"


def cases(only: str = "") -> Iterator[Case]:
    """Every configuration on every chip, or those whose topology has ``only`` in its name."""
    for chosen in itertools.product(TOPOLOGIES, WIDTHS, LAYOUTS, REMATS):
        if only in chosen[0]:
            yield Case(*chosen)


def sums(plan: Plan, compiled: Compiled) -> tuple[int, int]:
    """What ``memory_analysis()`` reports, by the plan and by the compiler, in bytes."""
    memory = plan.memory
    assert compiled.memory is not None, compiled
    planned = memory.peak_bytes - memory.temporary_bytes + memory.reported_temporary_bytes
    return planned, compiled.memory.total_bytes


def row(case: Case, plan: Plan, planned: int, reported: int) -> str:
    mib = 2**20
    figures: list[Any] = [
        f"{plan.memory.argument_bytes / mib:.0f}",
        f"{plan.memory.peak_bytes / mib:.0f}",
        f"{planned / mib:.0f}",
        f"{reported / mib:.0f}",
        f"{planned / reported:.3f}",
    ]
    return f"| {case.name} | " + " | ".join(figures) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a chip, v5e or v5p")
    given = parser.parse_args()
    print(f"{date.today()}, JAX {jax.__version__}, MiB a device")
    print("| chip | width | layout | saved | arguments | needed, plan | reported, plan | reported, compiler | ratio |")
    print("|" + " --- |" * 9, flush=True)
    ratios = []
    for case in cases(given.only):
        plan = case.plan()
        planned, reported = sums(plan, plan.compile())
        ratios.append(planned / reported)
        print(row(case, plan, planned, reported), flush=True)
    errors = [abs(ratio - 1) for ratio in ratios]
    print(f"\n{len(ratios)} cases: the largest error {max(errors):.1%}, the median {statistics.median(errors):.1%}")


if __name__ == "__main__":
    main()
