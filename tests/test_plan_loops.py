"""The plan's loops and branches, inside regions and outside, against the program that XLA compiles."""

import collections
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import meshwright as mw
from meshwright.plan.hlo import compiled_collectives
from meshwright.plan.plan import Plan, plan
from meshwright.plan.program import Loop

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


# Loops outside every region

SPECS = [
    PartitionSpec(*entries)
    for entries in (("x",), (None, "x"), ("x", "y"), (("x", "y"),), ("x", None, "y"), ("y", "x"))
]
SHAPE = (8, 16, 4)


def _outside(fn: Callable[..., Any], *specs: PartitionSpec) -> Plan:
    mesh = mw.Mesh("x=2,y=2", jax.devices()[:4]).jax_mesh
    return plan(fn, *(jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=NamedSharding(mesh, s)) for s in specs))


def _sum_of_rows(x: jax.Array) -> Any:
    return jax.lax.scan(lambda c, row: (c + row, None), jnp.zeros(SHAPE[1:]), x)[0]


def _rows_by_their_norms(x: jax.Array) -> Any:
    return jax.lax.map(lambda row: row / jnp.sqrt(jnp.sum(row * row)), jnp.sin(x))


def _from_the_end(x: jax.Array) -> Any:
    return jax.lax.scan(lambda c, row: (c + row, row * c), jnp.ones(SHAPE[1:]), x, reverse=True)


@pytest.mark.parametrize("program", [_sum_of_rows, _rows_by_their_norms, _from_the_end])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_stack_whose_first_dim_is_split_is_gathered(program: Callable[..., Any], spec: PartitionSpec) -> None:
    p = _outside(program, spec)
    assert not p.program.unknown
    assert _planned(p) == _compiled(p)
    if spec[0]:
        assert "all_gather" in {row.kind for row in p.collectives}, "every device takes every turn"


def test_each_stack_is_gathered_that_a_turn_reads() -> None:
    """In an update layer by layer, the parameters and their gradients; what no turn reads stays."""

    def update(w: jax.Array, g: jax.Array, other: jax.Array) -> Any:
        return jax.lax.map(lambda row: row[0] - 0.1 * row[1] / jnp.sqrt(jnp.sum(row[1] ** 2)), (w, g, other))

    p = _outside(update, *[PartitionSpec("x")] * 3)
    assert not p.program.unknown
    assert _planned(p) == {("all_gather", ("x",)): 2 * 4 * 8 * 16 * 4} == _compiled(p)


@pytest.mark.parametrize("stack", [PartitionSpec(), *SPECS], ids=str)
def test_regions_that_read_rows_are_known_exactly_or_not_at_all(stack: PartitionSpec) -> None:
    """XLA may exchange a stack where the plan would gather it and have the region take its slice of each row."""
    mesh, row = mw.Mesh("x=2,y=2", jax.devices()[:4]), mw.dims(a=16, b=4)
    total = mw.spmd(lambda x: mw.sum(x * x), mesh, mw.Layout("a:x"))

    def program(xs: jax.Array) -> Any:
        return jax.lax.scan(lambda c, x: (c + total(mw.Tensor(x, row)), None), 0.0, xs)[0]

    p = _outside(program, stack)
    if stack == PartitionSpec() or not stack[0]:
        assert not p.program.unknown
    assert p.program.unknown or _planned(p) == _compiled(p)


def _added_up(b: jax.Array) -> Any:
    return jax.lax.scan(lambda c, _: (c + b, None), jnp.zeros_like(b), None, length=3)[0]


def _added_while_small(b: jax.Array) -> Any:
    return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] + b), (0, jnp.zeros_like(b)))[1]


def _handed_round(b: jax.Array) -> Any:
    """The second value's split arrives at the first one turn later."""
    first = jnp.zeros_like(b), jnp.zeros_like(b)
    return jax.lax.scan(lambda c, _: ((c[1], c[0] + b), None), first, None, length=3)[0][0]


def _added_up_in_turns(b: jax.Array) -> Any:
    def turn(c: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.lax.scan(lambda d, _: (d + b, None), c, None, length=2)[0], None

    return jax.lax.scan(turn, jnp.zeros_like(b), None, length=3)[0]


@pytest.mark.parametrize("program", [_added_up, _added_while_small, _handed_round, _added_up_in_turns])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_carry_that_begins_as_zeros_is_held_as_turns_return_it(
    program: Callable[..., Any], spec: PartitionSpec
) -> None:
    p = _outside(program, spec)
    assert not p.program.unknown
    assert _planned(p) == {} == _compiled(p)
    loops = [node for node in p.program.block.nodes if isinstance(node, Loop)]
    lies = p.program.traced.lower().compile().output_shardings
    assert [loop.body.ins[-1].shape for loop in loops] == [lies.shard_shape(SHAPE)]


@pytest.mark.parametrize("first", [PartitionSpec(), *SPECS], ids=str)
@pytest.mark.parametrize("returned", [PartitionSpec(), *SPECS], ids=str)
def test_a_carry_is_known_exactly_or_not_at_all(first: PartitionSpec, returned: PartitionSpec) -> None:
    def program(a: jax.Array, b: jax.Array) -> Any:
        return jax.lax.scan(lambda c, _: (b * 2 + jnp.sum(c), None), a, None, length=3)[0]

    p = _outside(program, first, returned)
    if first in (PartitionSpec(), returned):
        assert not p.program.unknown
    assert p.program.unknown or _planned(p) == _compiled(p)


# Branches outside every region


@pytest.mark.parametrize("first", [PartitionSpec(), *SPECS], ids=str)
@pytest.mark.parametrize("second", [PartitionSpec(), *SPECS], ids=str)
def test_what_branches_give_is_known_exactly_or_not_at_all(first: PartitionSpec, second: PartitionSpec) -> None:
    """The two give arrays that are split as these specs say; the sum of what was chosen tells how it lies."""

    def program(a: jax.Array, b: jax.Array, asked: jax.Array) -> Any:
        return jnp.sum(jax.lax.cond(jnp.all(asked > 0), lambda a, _: a * 2, lambda _, b: b * 3, a, b))

    p = _outside(program, first, second, PartitionSpec())
    if PartitionSpec() in (first, second) or first == second:
        assert not p.program.unknown
    assert p.program.unknown or _planned(p) == _compiled(p)
