"""The plan's loops and branches, inside regions and outside, against the program that XLA compiles."""

import collections
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import meshwright as mw
from meshwright.plan.hlo import compiled_collectives
from meshwright.plan.plan import Plan, plan

from .laws import Way, tensor

Totals = Mapping[tuple[str, tuple[str, ...]], int]
"""Bytes by kind and axes."""


def _planned(p: Plan) -> Totals:
    found: collections.Counter[tuple[str, tuple[str, ...]]] = collections.Counter()
    for row in p.collectives:
        found[row.kind, row.axes] += row.total_payload_bytes
    return found


def _compiled(p: Plan) -> Totals:
    found: collections.Counter[tuple[str, tuple[str, ...]]] = collections.Counter()
    options = {"xla_disable_hlo_passes": "cse"}
    text = p.program.traced.lower().compile(compiler_options=options).as_text()
    for row in compiled_collectives(text, p.program.sizes):
        found[row.kind, row.axes] += row.payload_bytes * row.times
    return found


# While loops


def _until_the_mean(x: mw.Tensor) -> Any:
    """Only the condition reads what is summed before the loop."""
    most = mw.mean(x * x)
    return jax.lax.while_loop(
        lambda c: c[0] < most * 1000.0, lambda c: (c[0] + 1.0, c[1] * 2.0), (jnp.float32(0), jnp.float32(1))
    )[1]


def _until_it_is_large(x: mw.Tensor) -> Any:
    """The condition sums over devices itself."""
    return mw.sum(jax.lax.while_loop(lambda y: mw.sum(y * y) < 1e3, lambda y: y * 2.0, x), "b")


@pytest.mark.parametrize("program", [_until_the_mean, _until_it_is_large])
def test_what_only_a_condition_reads_is_made(program: Callable[[Any], Any]) -> None:
    p = plan(Way("x=2", "a:x").region(program), tensor(*mw.dims(a=8, b=4)))
    assert _planned(p) == {("all_reduce", ("x",)): 4} == _compiled(p)
