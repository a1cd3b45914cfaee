"""Stages: a scan whose turns are dealt out to devices, as the call that a pipeline is made of.

In the trace of one microbatch such a scan is one call of a function named ``STAGE``: a device's own turns, on what goes
round. ``microbatches/`` cuts the trace there and lets the devices take their turns one after the other.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .. import collectives
from ..dims import Dim
from ..errors import fail
from ..scope import Stages, current

STAGE = "meshwright_stage_"
"""How the call's name begins in a trace; the number of stacked arrays follows."""

Step = Callable[[Sequence[Any], Sequence[Any]], list[Any]]


def run_stages(
    step: Step, carry: Sequence[Any], stacks: Sequence[Any], d: Dim, stages: Stages, unroll: int | bool
) -> list[Any]:
    """``step(carry, slices) -> carry`` for this device's turns.

    Args:
        carry: the arrays that go round.
        stacks: this device's slices of what is scanned, the scanned dim first.
        d: the dim that the scan runs over.

    Raises:
        ValueError: the stages do not divide the dim.
    """
    scope = current()
    assert scope is not None
    num_devices = scope.size(stages.axes)
    num_stages = num_devices * stages.num
    if d.size % num_stages:
        raise fail(_indivisible(d, num_devices, stages.num))
    length = d.size // num_stages

    def stage(carry: list[Any], stacks: list[Any], run: Any) -> list[Any]:
        own = stacks if stages.num == 1 else [lax.dynamic_slice_in_dim(x, run * length, length) for x in stacks]
        return lax.scan(lambda c, x: (step(c, x), None), carry, own, length=length, unroll=unroll)[0]

    stage.__name__ = f"{STAGE}{len(stacks)}"
    first = collectives.vary(jnp.int32(0), frozenset(stages.axes))
    return jax.jit(stage)(list(carry), list(stacks), first)


def _indivisible(d: Dim, num_devices: int, num_runs: int) -> str:
    n = num_devices * num_runs
    below, above = d.size // n * n, (d.size // n + 1) * n
    good = f"{below} or {above}" if below else f"{above}"
    fitting = ", ".join(str(v) for v in range(1, d.size // num_devices + 1) if d.size % (num_devices * v) == 0)
    return (
        f"scan: {d.size} {d.name} cannot be dealt out to {num_devices} devices x virtual_stages={num_runs}: "
        f"{d.size} is not a multiple of {n}.\n"
        f"  Make {d.name!r} a multiple of {n} ({good}), or virtual_stages one of {fitting}."
    )
