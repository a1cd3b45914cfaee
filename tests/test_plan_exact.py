"""The plan is exact: its collectives are those of the StableHLO that a program lowers to, and of the compiled program.

Three readers that know nothing of one another are compared: the plan reads the trace, ``stablehlo.py`` the lowered
module, ``plan/hlo.py`` the text after XLA's passes. The programs are those of every equivalence test, with their
gradients, on every mesh and layout (``collected.py``), those that hypothesis draws, and the decoder with its training
step.

What XLA's CPU compiler rewrites is stated here, and each rewrite has a test of its own:

- ``cse``: of identical collectives of identical operands it keeps one. This pass is switched off where bytes are
  compared. With it a program moves the same or less.
- ``algsimp``: the gather of a constant is a constant. This one is switched off too where a program gathers constants.
- ``while-loop-invariant-code-motion`` and the expensive kind of it: what each turn of a loop sends alike is sent once
  before it: the numbers of documents round a ring, in each layer's backward pass; the parameters that each microbatch
  gathers. Switched off as well where bytes are compared.
- bfloat16: the CPU has no bfloat16 arithmetic, so it moves such arrays as float32, in twice the bytes.

Under ``partitioner="xla"`` the collectives are XLA's to choose: there the plan says so, or is exact all the same.
"""

import collections
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import meshwright as mw
from meshwright.models import Decoder
from meshwright.plan.hlo import compiled_collectives
from meshwright.plan.plan import Plan, plan
from meshwright.train.data import Batch
from meshwright.train.optimizer import OptimizerConfig, make_optimizer
from meshwright.train.step import Place, state_maker, train_step

from . import test_decoder, test_programs
from .collected import collected, hold
from .laws import Way
from .stablehlo import traffic_of

Counts = collections.Counter[tuple[str, tuple[str, ...], int]]
"""How often a collective of a kind, over these axes, of these bytes, runs in all."""

NO_MERGING = {"xla_disable_hlo_passes": "cse"}
AS_WRITTEN = {
    "xla_disable_hlo_passes": "cse,algsimp,while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion"
}


def _sizes(mesh: str) -> dict[str, int]:
    return {axis: int(size) for axis, size in (part.split("=") for part in mesh.split(","))}


def _planned(p: Plan, sizes: Mapping[str, int], on_cpu: bool = False) -> Counts:
    found: Counts = collections.Counter()
    for row in p.collectives:
        wider = 2 if on_cpu and row.dtype == "bfloat16" else 1
        found[row.kind, tuple(a for a in sizes if a in row.axes and sizes[a] > 1), wider * row.payload_bytes] += (
            row.times
        )
    return +found


def _lowered(p: Plan, sizes: Mapping[str, int]) -> Counts:
    found: Counts = collections.Counter()
    for (kind, axes, num_bytes, times), count in traffic_of(p.program.traced.lower(), sizes).items():
        found[kind, axes, num_bytes] += times * count
    return +found


def _compiled(p: Plan, sizes: Mapping[str, int], options: dict[str, str] = AS_WRITTEN) -> Counts:
    found: Counts = collections.Counter()
    text = p.program.traced.lower().compile(compiler_options=options).as_text()
    for row in compiled_collectives(text, sizes):
        found[row.kind, row.axes, row.payload_bytes] += row.times
    return +found


def _totals(counts: Counts) -> dict[tuple[str, tuple[str, ...]], int]:
    """Bytes by kind and axes: an all-to-all may be compiled as one of each of its parts."""
    found: collections.Counter[tuple[str, tuple[str, ...]]] = collections.Counter()
    for (kind, axes, num_bytes), times in counts.items():
        found[kind, axes] += num_bytes * times
    return {what: num_bytes for what, num_bytes in found.items() if num_bytes}


def _check_lowered(run: Any, arguments: Iterable[Any], way: Way) -> None:
    p, sizes = plan(run, *arguments), _sizes(way.mesh)
    assert _planned(p, sizes) == _lowered(p, sizes), str(way)
    assert not p.program.unknown


def _check_compiled(run: Any, arguments: Iterable[Any], way: Way) -> None:
    p, sizes = plan(run, *arguments), _sizes(way.mesh)
    if p.program.unknown:
        assert way.partitioner == "xla", f"{way}: the plan does not know {p.program.unknown[0]}"
        return
    planned = _totals(_planned(p, sizes, on_cpu=True))
    if planned != _totals(_compiled(p, sizes, NO_MERGING)):
        assert planned == _totals(_compiled(p, sizes, AS_WRITTEN)), str(way)


# Every program of the equivalence tests


@pytest.mark.parametrize(("module", "test"), collected())
def test_every_program_as_it_is_lowered(module: Any, test: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hold(_check_lowered, module, test, monkeypatch, partitioners=("names",))


@pytest.mark.slow
@pytest.mark.parametrize(("module", "test"), collected())
def test_every_program_as_it_is_compiled(module: Any, test: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hold(_check_compiled, module, test, monkeypatch)


SOME = (
    "test_conv.test_kernels_at_rest",
    "test_cumulative.test_cumulative_does_not_depend_on_the_layout",
    "test_indexing.test_a_table_at_rest",
    "test_layout.test_results_do_not_depend_on_what_is_split_at_rest",
    "test_making.test_what_is_made_does_not_depend_on_the_layout",
    "test_move.test_moves_over_three_axes",
    "test_order.test_parameters_at_rest_in_order",
    "test_promises.test_a_sum_round_a_while_loop",
)


@pytest.mark.parametrize(("module", "test"), [case for case in collected() if case.id in SOME])
def test_some_programs_as_they_are_compiled(module: Any, test: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hold(_check_compiled, module, test, monkeypatch)


def test_the_collection_is_whole() -> None:
    """Every module with a table of programs is in it, and the names above are names of tests."""
    found = [case.id for case in collected()]
    assert set(SOME) <= set(found)
    assert len(found) >= 40 and len({name.partition(".")[0] for name in found}) >= 14


# Programs that are drawn


def _drawn(p: test_programs.Program) -> tuple[Any, list[Any]]:
    """The sum of its results, and its gradient."""
    function, inputs = p.function(), test_programs._inputs(p)

    def total(*inputs: Any) -> Any:
        return sum(mw.sum(x) if isinstance(x, mw.Tensor) else x for x in function(*inputs))

    return jax.jit(jax.value_and_grad(p.way.region(total), argnums=tuple(range(len(inputs))))), inputs


@pytest.mark.filterwarnings("ignore:layout:UserWarning")  # a drawn layout has rules that a drawn program never meets
@hypothesis.settings(test_programs.SETTINGS, max_examples=20, derandomize=True)
@hypothesis.given(test_programs.programs())
def test_drawn_programs_as_they_are_lowered(p: test_programs.Program) -> None:
    hypothesis.assume(p.way.partitioner == "names")
    with jax.enable_x64(True):
        _check_lowered(*_drawn(p), p.way)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:layout:UserWarning")  # a drawn layout has rules that a drawn program never meets
@hypothesis.settings(test_programs.SETTINGS, max_examples=200)
@hypothesis.given(test_programs.programs(most_steps=12))
def test_drawn_programs_as_they_are_compiled(p: test_programs.Program) -> None:
    with jax.enable_x64(True):
        _check_compiled(*_drawn(p), p.way)


# The decoder

LAYOUTS = [
    *test_decoder.LAYOUTS,
    ("data=4", "batch:data", {"optimizer": "embed:data"}),
    ("data=2,model=4", f"batch:data, {test_decoder.TENSOR}", {"optimizer": "data"}),
    *test_decoder.CONTEXT,
]
IDS = [f"{mesh} {rules} {options}" for mesh, rules, options in LAYOUTS]
FEW = [LAYOUTS[i] for i in (2, 3, 7, 9, 12, 15, 17, 20, 22)]
"""At rest, gathered once a step, with tensor and sequence parallelism, two axes for one dim, products in rings, ZeRO-1,
a ring with FSDP, and heads split instead of the length."""


def _place(mesh: str, layout: str, options: Mapping[str, Any]) -> Place:
    devices = jax.devices()[: math.prod(_sizes(mesh).values())]
    return Place(mw.Mesh(mesh, devices), mw.Layout(layout, **options))


def _batch() -> Batch:
    ids, targets = test_decoder._batch()
    return Batch(ids, targets, *(mw.Tensor(np.zeros((8, 16), np.int32), "batch length") for _ in range(2)))


def _step(place: Place) -> Plan:
    optimizer = make_optimizer(OptimizerConfig(), 100)
    first = jax.jit(state_maker(test_decoder.CONFIG, optimizer, place))
    state = first.lower(jax.random.key(0)).compile().output_shardings
    shapes = jax.eval_shape(first, jax.random.key(0))
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, state)
    return plan(train_step(optimizer, place), placed, _batch())


@pytest.mark.parametrize(("mesh", "layout", "options"), LAYOUTS, ids=IDS)
def test_the_decoder_as_it_is_lowered(mesh: str, layout: str, options: dict[str, Any]) -> None:
    way = Way(mesh, layout, options)
    model = jax.eval_shape(functools.partial(Decoder, test_decoder.CONFIG), key=jax.random.key(0))
    forward = way.region(test_decoder._loss)
    for program in (forward, jax.value_and_grad(forward)):
        _check_lowered(jax.jit(program), (model, *test_decoder._batch()), way)


def _check_step(mesh: str, layout: str, options: dict[str, Any]) -> None:
    p, sizes = _step(_place(mesh, layout, options)), _sizes(mesh)
    assert not p.program.unknown
    assert _totals(_planned(p, sizes)) == _totals(_compiled(p, sizes))


@pytest.mark.parametrize(("mesh", "layout", "options"), FEW)
def test_some_training_steps_as_they_are_compiled(mesh: str, layout: str, options: dict[str, Any]) -> None:
    """With the update outside the region: the global norm, and what moves between the optimizer's layout and others."""
    _check_step(mesh, layout, options)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "layout", "options"), LAYOUTS, ids=IDS)
def test_every_training_step_as_it_is_compiled(mesh: str, layout: str, options: dict[str, Any]) -> None:
    _check_step(mesh, layout, options)


# What XLA rewrites


def test_identical_collectives_are_compiled_as_one() -> None:
    """A parameter used twice is gathered twice, as the plan says; the compiler sees that the two are one."""
    way = Way("x=2", "a:x", {"params": "b:x"})
    x, w = mw.Tensor(jnp.ones((4, 8)), "a b"), mw.Tensor(jnp.ones((8, 4)), "b c", role="parameter")
    run = jax.jit(way.region(lambda x, w: mw.dot(mw.sin(x), w, "b") + mw.exp(mw.dot(mw.cos(x), w, "b"))))
    p, sizes = plan(run, x, w), _sizes(way.mesh)
    assert _planned(p, sizes) == {("all_gather", ("x",), 128): 2} == _compiled(p, sizes)
    assert _compiled(p, sizes, {}) == {("all_gather", ("x",), 128): 1}


def test_a_gathered_constant_is_compiled_as_a_constant() -> None:
    """``x * 0 + 1`` is not known to the trace."""
    way = Way("x=2", "a:x")
    x = mw.Tensor(jnp.ones((4, 8), jnp.int32), "a b")
    run = jax.jit(way.region(lambda x: (x * 0 + 1).rename(a="whole")))
    p, sizes = plan(run, x), _sizes(way.mesh)
    assert _planned(p, sizes) == {("all_gather", ("x",), 128): 1} == _compiled(p, sizes)
    assert _compiled(p, sizes, NO_MERGING) == {}


def test_what_each_turn_sends_alike_is_compiled_before_the_loop() -> None:
    way = Way("x=2", "a:x")
    x, turns = mw.Tensor(jnp.ones((4, 8)), "a b"), mw.Tensor(jnp.ones(3), "turns")
    run = jax.jit(way.region(lambda x, turns: mw.fold(lambda c, y: c + mw.flip(x, "a") * y, x, turns, over="turns")))
    p, sizes = plan(run, x, turns), _sizes(way.mesh)
    assert _planned(p, sizes) == {("permute", ("x",), 64): 3} == _compiled(p, sizes)
    assert _compiled(p, sizes, NO_MERGING) == {("permute", ("x",), 64): 1}


@pytest.mark.parametrize("program", ["gather", "sum"])
def test_the_cpu_moves_bfloat16_as_float32(program: str) -> None:
    way = Way("x=2", "a:x")
    x = mw.Tensor(jnp.ones((4, 8), jnp.bfloat16), "a b")
    run = jax.jit(way.region(lambda x: x.rename(a="whole") if program == "gather" else mw.sum(x, "a")))
    p, sizes = plan(run, x), _sizes(way.mesh)
    kind, num_bytes = ("all_gather", 64) if program == "gather" else ("all_reduce", 16)
    assert _planned(p, sizes) == _lowered(p, sizes) == {(kind, ("x",), num_bytes): 1}
    assert _compiled(p, sizes) == {(kind, ("x",), 2 * num_bytes): 1}


# Outside every region

SPECS = [
    PartitionSpec(*entries)
    for entries in ((), ("x",), (None, "x"), ("x", "y"), ("y", "x"), (("x", "y"),), (None, ("x", "y")), ("y",))
]


def _outside(fn: Callable[[jax.Array], Any], spec: PartitionSpec) -> tuple[Plan, dict[str, int]]:
    mesh = mw.Mesh("x=2,y=2", jax.devices()[:4]).jax_mesh
    x = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=NamedSharding(mesh, spec))
    return plan(jax.jit(fn), x), {"x": 2, "y": 2}


@pytest.mark.parametrize("have", SPECS, ids=str)
def test_an_array_that_is_moved_is_known_exactly_or_not_at_all(have: PartitionSpec) -> None:
    mesh = mw.Mesh("x=2,y=2", jax.devices()[:4]).jax_mesh
    known = 0
    for want in SPECS:
        p, sizes = _outside(lambda x, w=want: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, w)), have)
        if not p.program.unknown:
            known += 1
            assert _totals(_planned(p, sizes)) == _totals(_compiled(p, sizes)), f"{have} to {want}"
    assert known >= 2, "at least where nothing moves, and where all is gathered"


@pytest.mark.parametrize("function", [jnp.sum, jnp.max, jnp.prod, jnp.linalg.norm], ids=lambda f: f.__name__)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_reduction_of_a_split_array_sums_dim_by_dim(function: Any, spec: PartitionSpec) -> None:
    p, sizes = _outside(function, spec)
    assert not p.program.unknown
    assert _planned(p, sizes) == _compiled(p, sizes)


@pytest.mark.parametrize(
    "function", [lambda x: x @ x.T, lambda x: jnp.cumsum(x, 0), lambda x: x.reshape(-1), lambda x: jnp.sort(x, axis=0)]
)
def test_what_xla_chooses_is_not_known(function: Any) -> None:
    p, _ = _outside(function, PartitionSpec("x", "y"))
    assert p.program.unknown
