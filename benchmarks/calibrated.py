"""Predicted and measured step times of one model under many layouts, after ``mw.calibrate``.

    python benchmarks/calibrated.py

The machine is measured first; then the training step of one decoder is planned, compiled and timed under every layout.
The layouts take turns, round after round, and each one's fastest step counts: on a shared machine, whatever else runs
only adds. Last comes Spearman's rank correlation of the predicted and the measured times: how well the plan orders
layouts by speed.

The memory that XLA takes for each step and gives back after it stays with the process: otherwise the kernel hands out
new pages every step, which takes a quarter of the time here and is no part of any device.
"""

import argparse
import ctypes
import os
import platform
import time
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import meshwright as mw
from meshwright.models import Decoder, DecoderConfig
from meshwright.train.data import Batch
from meshwright.train.step import Place, State, placed, train_step

NUM_DEVICES = 8
CONFIG = DecoderConfig(vocab=2048, embed=256, layers=4, heads=8, head_dim=32, ff=1024)
BATCH, LENGTH = 16, 128
OPTIMIZER = optax.adamw(1e-3)


@dataclass
class Case:
    """One layout, and what was predicted and measured."""

    mesh: str
    rules: str
    params: str | None
    gather: str
    predicted: float = 0.0
    seconds: list[float] = field(default_factory=list)
    place: Any = None
    step: Any = None

    @property
    def measured(self) -> float:
        return min(self.seconds)

    def build(self, profile: Any, state: State, batch: Batch) -> None:
        """Plan and compile the step."""
        self.place = Place(mw.Mesh(self.mesh), mw.Layout(self.rules, params=self.params, gather=self.gather))
        step = train_step(OPTIMIZER, self.place)
        given = placed(state, self.place), self.place.shard(batch)
        self.predicted = mw.plan(step, *given).time(profile).seconds
        self.step = step.lower(*given).compile()

    def run(self, state: State, batch: Batch, num_steps: int) -> None:
        """Time some steps from the first state, after one that is not counted. Nothing stays on the devices."""
        state, batch = jax.tree.map(jnp.copy, placed(state, self.place)), self.place.shard(batch)
        for i in range(num_steps + 1):
            start = time.perf_counter()
            state, loss = self.step(state, batch)
            jax.block_until_ready((state, loss))
            if i:
                self.seconds.append(time.perf_counter() - start)


def first() -> tuple[State, Batch]:
    """The state and the batch that every layout begins with."""
    model: Any = Decoder(CONFIG, key=jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab, (BATCH, LENGTH + 1))
    places = np.broadcast_to(np.arange(LENGTH), (BATCH, LENGTH))
    fields = tokens[:, :-1], tokens[:, 1:], np.zeros_like(places), places
    return State(model, OPTIMIZER.init(model)), Batch(
        *(mw.Tensor(jnp.asarray(x, jnp.int32), "batch length") for x in fields)
    )


def cases() -> list[Case]:
    """Layouts from the best to the worst: data, FSDP, tensor, mixed, and some that leave an axis idle."""
    found = [Case("data=8", "batch:data", params, "use") for params in (None, "embed:data")]
    found.append(Case("data=8", "batch:data", "embed:data", "step"))
    for mesh in ("data=4, model=2", "data=2, model=4"):
        rules = ["", "ff:model", "heads:model", "ff:model, heads:model", "ff:model, heads:model, vocab:model"]
        rules = [", ".join(filter(None, ("batch:data", rule))) for rule in rules]
        found += [Case(mesh, rule, None, "use") for rule in rules]
        found += [Case(mesh, rules[-1], "embed:data", "use"), Case(mesh, rules[1], "embed:data", "use")]
        found.append(Case(mesh, rules[-1] + ", residual_length:model", None, "use"))
        found.append(Case(mesh, "batch:(data,model)", "embed:data", "use"))
    found += [
        Case("data=1, model=8", rule, None, "use")
        for rule in ("ff:model", "ff:model, heads:model", "ff:model, heads:model, vocab:model")
    ]
    return found


def keep_memory() -> None:
    """Tell the C library, where it is GNU's, not to give memory back to the kernel."""
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max, arena_max = -1, -4, -8  # of malloc.h
        for option, value in ((trim_threshold, 2**31 - 1), (mmap_max, 0), (arena_max, 1)):
            ctypes.CDLL(None).mallopt(option, value)


def spearman(one: list[float], other: list[float]) -> float:
    """The correlation of ranks."""
    ranks = np.argsort(np.argsort(np.array([one, other]), axis=1), axis=1)
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="how often each layout has its turn")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a turn")
    parser.add_argument("--profile", help="where to write the machine's profile")
    given = parser.parse_args()
    keep_memory()
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    profile = mw.calibrate(path=given.profile)
    every = cases()
    begin = first()
    for case in every:
        case.build(profile, *begin)
    for _ in range(given.rounds):
        for case in every:
            case.run(*begin, given.steps)
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"{NUM_DEVICES} devices, {date.today()}, JAX {jax.__version__}, {machine}")
    print("| mesh | layout | params | gather | predicted | measured | ratio |\n| " + "--- | " * 7)
    for case in sorted(every, key=lambda case: case.measured):
        times = f"{case.predicted * 1e3:.0f} ms | {case.measured * 1e3:.0f} ms | {case.predicted / case.measured:.2f}"
        print(f"| {case.mesh} | {case.rules} | {case.params or ''} | {case.gather} | {times} |")
    rank = spearman([case.predicted for case in every], [case.measured for case in every])
    print(f"\n{len(every)} layouts: Spearman's rank correlation of predicted and measured {rank:.3f}")


if __name__ == "__main__":
    main()
