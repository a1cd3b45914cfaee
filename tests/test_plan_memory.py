"""The memory of a plan against hand counts and against JAX's own residuals."""

import statistics
from typing import Any

import jax
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import meshwright as mw
from benchmarks.memory import LAYOUTS, Case, cases, sums
from meshwright import Tensor
from meshwright.plan import Plan
from meshwright.plan.buffers import Buffer
from meshwright.plan.heap import most_bytes, outside, packed
from meshwright.plan.memory import COPIES, GRADIENTS, OPTIMIZER, OUTPUTS, PARAMETERS, SAVED, TEMPORARIES
from meshwright.plan.origin import Origin

F32, BF16 = 4, 2
MESH = mw.Mesh("data=4, model=2", topology="tpu:v5p:2x2x2")
BATCH, EMBED, FF, LAYERS = mw.dims(batch=4096, embed=512, ff=2048, layers=6)
NOWHERE = Origin("forward", "", (), "", 0)


def shapes(*trees: Any) -> Any:
    return jax.eval_shape(lambda: trees)


def shape(*dims: mw.Dim, param: bool = False) -> Any:
    """The shape of a tensor of float32."""
    return jax.eval_shape(lambda: mw.param(mw.zeros(dims)) if param else mw.zeros(dims))


def plan_of(fn: Any, layout: mw.Layout, *args: Any) -> Plan:
    return mw.plan(fn, *mw.shard(args, MESH, layout))


def feed_forward(up: Tensor, down: Tensor, x: Tensor) -> Any:
    h = mw.relu(mw.dot(x, up, over="embed"))
    return mw.mean((mw.dot(h, down, over="ff") - x) ** 2)


WEIGHTS = shape(EMBED, FF, param=True), shape(FF, EMBED, param=True)
FSDP = mw.Layout("batch:data, ff:model", params="embed:data")


def test_a_step_is_its_arguments_and_what_it_gives_back_in_their_place() -> None:
    loss = mw.spmd(feed_forward, MESH, FSDP)
    optimizer = optax.sgd(1e-3, momentum=0.9)

    def step(params: Any, state: Any, x: Tensor) -> Any:
        value, gradient = jax.value_and_grad(lambda p: loss(*p, x))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state = jax.eval_shape(optimizer.init, WEIGHTS)
    memory = plan_of(jax.jit(step, donate_argnums=(0, 1)), FSDP, WEIGHTS, state, shape(BATCH, EMBED)).memory
    weights, batch = 2 * 512 * 2048 * F32 // 8, 4096 * 512 * F32 // 4
    assert memory.argument_bytes == 2 * weights + batch
    assert memory.alias_bytes == 2 * weights
    assert memory.output_bytes == 2 * weights + F32
    assert memory.by_kind[PARAMETERS] == memory.by_kind[OPTIMIZER] == weights
    assert memory.peak_bytes == 2 * weights + batch + memory.temporary_bytes + F32
    undonated = plan_of(jax.jit(step), FSDP, WEIGHTS, state, shape(BATCH, EMBED)).memory
    assert undonated.alias_bytes == 0
    assert undonated.peak_bytes == memory.peak_bytes + 2 * weights
    assert memory.timeline[-1].by_kind[OUTPUTS] == F32
    assert undonated.timeline[-1].by_kind[OUTPUTS] == 2 * weights + F32


def test_tensors_that_no_pass_reads_are_the_optimizers() -> None:
    """Without any pass there is no optimizer either; a loop around regions is looked into."""
    layout, batch = mw.Layout("batch:data"), shape(BATCH, EMBED)
    forward = plan_of(lambda up, down, x: feed_forward(up, down, x), layout, *WEIGHTS, batch).memory
    assert (forward.by_kind[PARAMETERS], forward.by_kind[OPTIMIZER]) == (2 * 512 * 2048 * F32, 0)
    loss = mw.spmd(feed_forward, MESH, layout)

    def accumulated(params: Any, state: Any, x: Tensor) -> Any:
        def turn(_: Any, total: Any) -> Any:
            gradient = jax.grad(lambda p: loss(*p, x))(params)
            return jax.tree.map(lambda a, b: a + b, total, gradient)

        return jax.lax.fori_loop(0, 4, turn, jax.tree.map(lambda w: w * 0.0, state))

    found = plan_of(accumulated, layout, WEIGHTS, WEIGHTS, batch).memory
    assert found.by_kind[PARAMETERS] == found.by_kind[OPTIMIZER] == 2 * 512 * 2048 * F32


def test_parameters_gathered_once_a_step_are_no_activations() -> None:
    layout = mw.Layout("batch:data", params="embed:data", gather="step")
    loss = jax.value_and_grad(mw.spmd(feed_forward, MESH, layout), argnums=(0, 1))
    memory = plan_of(loss, layout, *WEIGHTS, shape(BATCH, EMBED)).memory
    assert max(moment.by_kind[COPIES] for moment in memory.timeline) == 2 * 512 * 2048 * F32
    hidden, out = 1024 * 2048 * F32, 1024 * 512 * F32
    assert max(moment.by_kind[SAVED] for moment in memory.timeline) == pytest.approx(2 * hidden + out, rel=1e-5)


def layer(h: Tensor, w: Tensor) -> Tensor:
    return mw.sin(mw.dot(h, w, over="embed").rename(embed_out="embed"))


def stacked(w: Tensor, x: Tensor, remat: str | None = None) -> Any:
    return (mw.fold(layer, x, w, over="layers", remat=remat) ** 2).mean()


STACK = shape(LAYERS, EMBED, mw.Dim("embed_out", 512), param=True)


def test_what_is_saved_is_what_jax_saves() -> None:
    """The oracle is the pytree of ``jax.vjp``'s residuals, less the arguments among them."""
    layout = mw.Layout("batch:data")
    memory = plan_of(jax.value_and_grad(mw.spmd(stacked, MESH, layout)), layout, STACK, shape(BATCH, EMBED)).memory

    def residuals(w: Tensor, x: Tensor) -> Any:
        return jax.vjp(stacked, w, x)[1]

    kept = jax.tree.leaves(jax.eval_shape(residuals, STACK, shape(BATCH, EMBED)))
    of_batch = [x for x in kept if BATCH.size in x.shape]
    assert len(of_batch) == 3  # what each layer is handed, the cosine, and what comes out last
    assert sum(x.size * x.dtype.itemsize for x in of_batch) // 4 == sum(s.num_bytes for s in memory.saved)
    assert {s.origin.place.partition(":")[0] for s in memory.saved} == {"test_plan_memory.py"}


@pytest.mark.parametrize("layout", ["batch:data", "batch:(data,model)"])
def test_a_rematerialised_loop_saves_what_its_turns_are_handed(layout: str) -> None:
    given = mw.Layout(layout)
    loss = mw.spmd(lambda w, x: stacked(w, x, "nothing"), MESH, given)
    memory = plan_of(jax.value_and_grad(loss), given, STACK, shape(BATCH, EMBED)).memory
    carry = 4096 * 512 * F32 // (8 if "model" in layout else 4)
    assert [s.num_bytes for s in memory.saved] == [(6 + 1) * carry]  # and what comes out last
    gradient = 6 * 512 * 512 * F32
    assert memory.output_bytes == gradient + F32


def test_parameters_cast_in_a_loop_are_cast_before_it() -> None:
    layout = mw.Layout("batch:data")

    def loss(w: Tensor, x: Tensor) -> Any:
        def half(h: Tensor, one: Tensor) -> Tensor:
            return layer(h, one.astype("bfloat16"))

        return mw.fold(half, x.astype("bfloat16"), w, over="layers").astype("float32").mean()

    plan = plan_of(mw.spmd(loss, MESH, layout), layout, STACK, shape(mw.Dim("batch", 64), EMBED))
    cast, activation = 6 * 512 * 512 * BF16, 16 * 512 * BF16
    assert cast <= plan.memory.temporary_bytes <= cast + 4 * activation


def test_elementwise_operations_run_together_and_keep_nothing() -> None:
    layout = mw.Layout("batch:data")
    fused = plan_of(mw.spmd(lambda x: (mw.tanh(x * 2.0 + 1.0) * x).sum(), MESH, layout), layout, shape(BATCH, EMBED))
    assert fused.memory.temporary_bytes <= 64

    def narrow(w: Tensor, x: Tensor) -> Any:
        """What every reader casts is written in the dtype in which it is read."""
        h = mw.dot(x, w, over="embed").astype("bfloat16")
        return mw.dot(h, w.astype("bfloat16"), over="ff", preferred_element_type="float32").sum()

    plan = plan_of(mw.spmd(narrow, MESH, layout), layout, shape(EMBED, FF, param=True), shape(BATCH, EMBED))
    h, out = 1024 * 2048 * BF16, 1024 * 512 * F32
    assert plan.memory.temporary_bytes == pytest.approx(h + out, rel=1e-5)


def test_gathered_parameters_are_there_while_they_are_used() -> None:
    layout = mw.Layout("batch:data", params="embed:data")

    def loss(up: Tensor, x: Tensor) -> Any:
        return mw.dot(x, up, over="embed").sum()

    plan = plan_of(mw.spmd(loss, MESH, layout), layout, WEIGHTS[0], shape(BATCH, EMBED))
    assert plan.memory.argument_bytes == (512 * 2048 + 4096 * 512) * F32 // 4
    gathered, product = 512 * 2048 * F32, 1024 * 2048 * F32
    assert plan.memory.temporary_bytes == pytest.approx(gathered + product, rel=1e-5)


def test_the_timeline_reaches_the_peak_and_begins_with_the_arguments() -> None:
    layout = mw.Layout("batch:data", params="embed:data")
    plan = plan_of(jax.value_and_grad(mw.spmd(stacked, MESH, layout)), layout, STACK, shape(BATCH, EMBED))
    totals = [sum(moment.by_kind.values()) for moment in plan.memory.timeline]
    assert max(totals) == sum(plan.memory.by_kind.values())
    assert all(moment.by_kind[PARAMETERS] == plan.memory.by_kind[PARAMETERS] for moment in plan.memory.timeline)
    saved = [moment.by_kind[SAVED] for moment in plan.memory.timeline]
    assert saved[-1] < max(saved) == saved[0]  # a loop's stacks are there from its beginning
    assert {m.origin.direction for m in plan.memory.timeline} >= {"forward", "backward"}
    assert set(plan.memory.by_kind) >= {GRADIENTS, TEMPORARIES}


# Heaps


def buffer(size: int, start: int, end: int, lasting: bool = False, of_collective: bool = False) -> Buffer:
    return Buffer(size, start, end, NOWHERE, lasting=lasting, of_collective=of_collective)


MIB = 1 << 20


def test_buffers_that_never_meet_share_memory() -> None:
    assert packed([buffer(3 * MIB, 0, 1), buffer(2 * MIB, 2, 3), buffer(MIB, 4, 5)]) == 3 * MIB
    assert packed([buffer(3 * MIB, 0, 2), buffer(2 * MIB, 2, 3), buffer(MIB, 4, 5)]) == 5 * MIB
    assert packed([]) == 0
    # Into the smallest hole that is large enough: 1 MiB lies beside 2 while 3 is free below.
    assert packed([buffer(4 * MIB, 0, 9), buffer(2 * MIB, 0, 3), buffer(2 * MIB, 4, 9), buffer(MIB, 0, 1)]) == 7 * MIB
    # As they are made, 2 MiB lie beside what is gone when 3 come, for which the hole is too small.
    in_turn = [buffer(2 * MIB, 0, 1), buffer(3 * MIB, 1, 2), buffer(3 * MIB, 2, 3)]
    assert (packed(in_turn), packed(in_turn, as_made=True)) == (6 * MIB, 8 * MIB)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 20), st.integers(0, 8)), max_size=12))
def test_a_heap_holds_what_is_there_at_once_and_no_more_than_everything(drawn: list[tuple[int, int, int]]) -> None:
    buffers = [buffer(size * MIB, start, start + length) for size, start, length in drawn]
    at_once = [sum(b.num_bytes for b in buffers if b.start <= t <= b.end) for t in range(30)]
    assert most_bytes((b.num_bytes, b.start, b.end) for b in buffers) == max(at_once)
    assert max(at_once) <= packed(buffers) <= sum(b.num_bytes for b in buffers)


def test_a_scratch_memory_holds_what_is_there_briefly() -> None:
    brief, long, large, handed_on = (
        buffer(8 * MIB, 3, 4), buffer(8 * MIB, 0, 9), buffer(20 * MIB, 3, 3), buffer(MIB, 5, 6, lasting=True),
    )  # fmt: skip
    assert outside([brief, long, large, handed_on], 0) == [brief, long, large, handed_on]
    kept = outside([brief, long, large, handed_on], 16 * MIB)
    assert set(map(id, kept)) == {id(large), id(handed_on)}
    assert outside([brief, long], int(15.5 * MIB)) == [long]
    assert outside([brief, long], int(7.5 * MIB)) == [brief, long]
    assert outside([brief, buffer(4 * MIB, 0, 9)], 16 * MIB) == []


def test_a_scratch_memory_holds_what_there_is_a_hole_for() -> None:
    # 4 and 3 MiB lie one above the other; when 4 are gone, 6 find no hole below 3, though 9 of 12 MiB are free.
    below, above, third = buffer(4 * MIB, 0, 1), buffer(3 * MIB, 1, 3), buffer(6 * MIB, 2, 6)
    assert outside([below, above, third], 12 * MIB) == [third]
    assert outside([below, above, third], 13 * MIB) == []


def test_results_of_collectives_are_in_a_scratch_memory_on_some_chips_only() -> None:
    gathered, product = buffer(MIB, 0, 1, of_collective=True), buffer(MIB, 1, 2)
    assert outside([gathered, product], 4 * MIB) == []
    assert outside([gathered, product], 4 * MIB, of_collectives=False) == [gathered]


def test_what_a_collective_gives_stays_in_the_memory_of_a_chip_whose_scratch_does_not_take_it() -> None:
    """Gathered parameters, the same program for two chips; by hand: the gathered ones alone."""

    def loss(up: Tensor, x: Tensor) -> Any:
        return mw.dot(x, up, over="embed").sum()

    layout = mw.Layout("batch:data", params="embed:data")
    plan = plan_of(mw.spmd(loss, MESH, layout), layout, WEIGHTS[0], shape(BATCH, EMBED))
    held = [
        plan.on(mw.Mesh("data=4, model=2", topology=chips)).memory.temporary_bytes
        for chips in ("tpu:v5e:2x4", "tpu:v5p:2x4x1")
    ]
    assert held == [0, 512 * 2048 * F32]


# The TPU compiler


def error_of(case: Case) -> float:
    """How far the plan's sum is from that of the compiler's ``memory_analysis()``."""
    plan = case.plan()
    planned, reported = sums(plan, plan.compile())
    return abs(planned / reported - 1)


def test_a_training_step_takes_what_the_tpu_compiler_says() -> None:
    assert error_of(Case("tpu:v5e:2x4", 1024, "FSDP x tensor", "nothing")) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["tpu:v3:2x2", "tpu:v6e:2x4", "tpu:v7x:2x2x1"])
def test_a_training_step_takes_what_the_compiler_says_for_other_chips(topology: str) -> None:
    assert error_of(Case(topology, 1024, "FSDP x tensor", "nothing")) < 0.05


@pytest.mark.slow
def test_every_configuration_takes_what_the_tpu_compiler_says() -> None:
    """Each of the benchmark's configurations on one of the two chips, in turn."""
    errors = {case.name: error_of(case) for i, case in enumerate(cases()) if i % 2 == (i >= len(LAYOUTS) * 4)}
    assert len(errors) == 12
    assert max(errors.values()) < 0.10, errors
    assert statistics.median(errors.values()) < 0.05, errors
