"""Several slices: sums over a slow axis and fast ones are taken in steps, and give what one device gives.

Dims: batch, embed and ff in products; the sizes are such that gradients are large enough for steps.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import meshwright as mw
from meshwright import Tensor
from meshwright.plan import Hardware, Plan
from meshwright.plan.hlo import compiled_collectives
from meshwright.plan.network import machine
from meshwright.summing import WORTH_STEPS_BYTES

from .laws import agree, assert_same, tensor, ways

BATCH, EMBED, FF = mw.dims(batch=16, embed=128, ff=256)
PRODUCT = EMBED.size * FF.size * 4
"""Bytes of either weight."""
SLICES = "dcn=2,data=4"
CUBE = "dcn=2,data=2,model=2"


UP = tensor(EMBED, FF, seed=1, role="parameter") * 0.1
DOWN = tensor(FF, EMBED, seed=2, role="parameter") * 0.1
BIAS = tensor(FF, seed=3, role="parameter")
X = tensor(BATCH, EMBED)
INPUTS = (UP, DOWN, BIAS, X)


def feed_forward(up: Tensor, down: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return mw.dot(mw.tanh(mw.dot(x, up, over="embed") + bias), down, over="ff")


def loss(up: Tensor, down: Tensor, bias: Tensor, x: Tensor) -> Any:
    return mw.mean((feed_forward(up, down, bias, x) - x) ** 2)


def same(found: Any, expected: Any, relative: float = 1e-5) -> None:
    """Every array agrees to ``relative`` of its largest value."""
    assert_same(found, expected, "over slices", relative)


def mesh(text: str = SLICES, dcn: str = "dcn") -> mw.Mesh:
    sizes = [int(part.split("=")[1]) for part in text.split(",")]
    return mw.Mesh(text, jax.devices()[: math.prod(sizes)], dcn=dcn)


def gradient_plan(layout: Any, over: mw.Mesh, fn: Any = loss, args: Sequence[Tensor] = INPUTS) -> Plan:
    """Of the gradient in every argument but the last."""
    layout = layout if isinstance(layout, mw.Layout) else mw.Layout(layout)
    gradient = jax.value_and_grad(mw.spmd(fn, over, layout), argnums=tuple(range(len(args) - 1)))
    return mw.plan(gradient, *mw.shard(jax.eval_shape(lambda: tuple(args)), over, layout))


Rows = dict[tuple[str, tuple[str, ...], int], int]


def planned(p: Plan) -> Rows:
    """How often each collective runs, by its kind, axes and bytes."""
    found: collections.Counter[Any] = collections.Counter()
    for row in p.collectives:
        found[row.kind, row.axes, row.payload_bytes] += row.times
    return dict(found)


def compiled(p: Plan) -> Rows:
    """The same of the program after XLA's passes."""
    found: collections.Counter[Any] = collections.Counter()
    program = p.program.traced.lower().compile(
        compiler_options={"xla_disable_hlo_passes": "cse"}
    )  # merges equal gathers
    for row in compiled_collectives(program.as_text(), p.program.sizes):
        found[row.kind, row.axes, row.payload_bytes] += row.times
    return dict(found)


# Results


def test_sums_over_slices_do_not_depend_on_the_layout() -> None:
    agree(
        {"loss": loss, "out": feed_forward},
        *INPUTS,
        over=[
            *ways((SLICES, "batch:(dcn,data)"), (SLICES, "batch:(data,dcn)"), (SLICES, "ff:(dcn,data)"), dcn="dcn"),
            *ways((CUBE, "batch:(dcn,data), ff:model"), (CUBE, "batch:dcn, ff:(data,model)"), dcn="dcn"),
            *ways((CUBE, "batch:(dcn,data), ff:model"), (CUBE, "batch:(dcn,data,model)"), dcn="dcn,data"),
            *ways((SLICES, "batch:(dcn,data)"), (SLICES, "embed:(dcn,data)"), params="embed:data", dcn="dcn"),
        ],
    )


@pytest.mark.parametrize("gather", ["use", "step"])
def test_parameters_at_rest_over_slices_do_not_depend_on_the_layout(gather: str) -> None:
    places = (SLICES, "batch:(dcn,data)"), (CUBE, "batch:(dcn,data), ff:model"), (CUBE, "batch:data, ff:model")
    rests = ("embed:data", "embed:(dcn,data)", "(data,dcn)")
    over = [way for rest in rests for way in ways(*places, params=rest, gather=gather, dcn="dcn")]
    agree(loss, *INPUTS, over=over)


def test_sums_that_end_split_do_not_depend_on_the_layout() -> None:
    """A pending sum goes to another dim, over a slow axis and fast ones in either order, or over three."""
    x, y = tensor(mw.Dim("a", 16), EMBED, seed=4), tensor(mw.Dim("a", 16), FF, seed=5)

    def moved(x: Tensor, y: Tensor) -> Tensor:
        return mw.dot(x, y, over="a").rename(embed="out") * 0.01

    agree(
        moved,
        x,
        y,
        over=[
            *ways((SLICES, "a:(dcn,data), out:(dcn,data)"), (SLICES, "a:(data,dcn), out:(data,dcn)"), dcn="dcn"),
            *ways((SLICES, "a:(dcn,data), out:(data,dcn)"), dcn="dcn"),
            *ways((CUBE, "a:(data,dcn,model), out:(data,dcn,model)"), (CUBE, "a:(dcn,data), ff:model"), dcn="dcn"),
        ],
    )


@pytest.mark.parametrize("sums", [None, "float32"])
def test_steps_in_a_wider_dtype_do_not_depend_on_the_layout(sums: str | None) -> None:
    """bfloat16 operands; with ``sums`` every step adds in float32."""
    x, w = tensor(BATCH, EMBED, dtype=jnp.bfloat16), tensor(EMBED, FF, seed=1, role="parameter")

    def narrow(w: Tensor, x: Tensor) -> Tensor:
        return mw.dot(x, w.astype("bfloat16"), over="embed").astype("float32")

    over = ways((SLICES, "batch:(dcn,data)"), (SLICES, "embed:(dcn,data)"), dcn="dcn", sums=sums)
    agree(narrow, w, x, over=over, relative=0.02)


def test_integers_and_odd_shapes_are_summed_too() -> None:
    """A dim that the fast axes do not divide: another is dealt out, or the elements, or nothing."""
    ids = Tensor(jnp.arange(16 * 3 * 8192, dtype=jnp.int32).reshape(16, 3, 8192) % 97, "batch three wide")
    flat = tensor(BATCH, *mw.dims(nine=9, odd=2 * 1111, six=6), seed=6)
    prime = tensor(BATCH, *mw.dims(prime=16411), seed=7)
    functions = {"ids": lambda i, f, p: mw.sum(i, "batch"), "flat": lambda i, f, p: mw.sum(f, "batch")}
    agree(
        {**functions, "prime": lambda i, f, p: mw.sum(p, "batch")},
        ids,
        flat,
        prime,
        over=ways((SLICES, "batch:(dcn,data)"), dcn="dcn"),
    )


@pytest.mark.parametrize("microbatches", [1, 2])
def test_microbatches_over_slices_do_not_depend_on_the_layout(microbatches: int) -> None:
    layout = mw.Layout("batch:(dcn,data)", microbatches=microbatches)
    gradient = jax.value_and_grad(mw.spmd(loss, mesh(), layout), argnums=(0, 1, 2))
    same(jax.jit(gradient)(*INPUTS), jax.value_and_grad(loss, argnums=(0, 1, 2))(*INPUTS))


def test_derivatives_of_every_order_and_mode() -> None:
    region = mw.spmd(loss, mesh(), "batch:(dcn,data)")
    point, along = (UP, DOWN, BIAS), (UP * 0.3, DOWN * 0.2, BIAS)

    def gradient(fn: Any, *params: Tensor) -> Any:
        return jax.grad(fn, argnums=(0, 1, 2))(*params, X)

    def forward(fn: Any) -> Any:
        return jax.jvp(lambda *params: fn(*params, X), point, along)[1]

    def curvature(fn: Any) -> Any:
        return jax.jvp(lambda *params: gradient(fn, *params), point, along)[1]

    def twice(fn: Any) -> Any:
        return jax.grad(lambda *params: sum(mw.sum(g * g) for g in gradient(fn, *params)), argnums=(0, 1, 2))(*point)

    for derivative in (forward, curvature, twice):
        compiled_one = jax.jit(derivative, static_argnums=0)
        same(compiled_one(region), compiled_one(loss), 2e-5)


def test_inside_vmap_a_sum_is_one_collective() -> None:
    runs = mw.Dim("runs", 3)

    def several(up: Tensor, down: Tensor, bias: Tensor, x: Tensor) -> Any:
        return mw.sum(mw.vmap(lambda x: loss(up, down, bias, x), runs.name)(x))

    args = (UP, DOWN, BIAS, tensor(runs, BATCH, EMBED))
    rows = planned(gradient_plan("batch:(dcn,data)", mesh(), several, args))
    assert {kind for kind, _, _ in rows} == {"all_reduce"}
    found = jax.jit(jax.grad(mw.spmd(several, mesh(), "batch:(dcn,data)"), argnums=(0, 1, 2)))(*args)
    same(found, jax.grad(several, argnums=(0, 1, 2))(*args))


# What is communicated


def test_gradients_cross_the_slow_axis_in_shares() -> None:
    """A weight's gradient is scattered over data, a quarter of it is summed over dcn, and all is gathered again. The
    loss and the bias are one all-reduce each: they are small."""
    p = gradient_plan("batch:(dcn,data)", mesh())
    expected = {
        ("all_reduce", ("dcn", "data"), 4): 1,
        ("all_reduce", ("dcn", "data"), FF.size * 4): 1,
        ("reduce_scatter", ("data",), PRODUCT): 2,
        ("all_reduce", ("dcn",), PRODUCT // 4): 2,
        ("all_gather", ("data",), PRODUCT): 2,
    }
    assert planned(p) == expected
    assert compiled(p) == expected


def test_a_mesh_without_a_slow_axis_takes_one_sum() -> None:
    p = gradient_plan("batch:(dcn,data)", mesh(dcn=""))
    assert {(kind, axes) for kind, axes, _ in planned(p)} == {("all_reduce", ("dcn", "data"))}
    assert PRODUCT >= WORTH_STEPS_BYTES


def test_with_tensor_parallelism_each_device_sums_its_part() -> None:
    p = gradient_plan("batch:(dcn,data), ff:model", mesh(CUBE))
    rows = planned(p)
    assert rows == compiled(p)
    # Half of each weight is on a device; half of that half crosses.
    assert rows["reduce_scatter", ("data",), PRODUCT // 2] == rows["all_gather", ("data",), PRODUCT // 2] == 2
    assert rows["all_reduce", ("dcn",), PRODUCT // 4] == 2


def test_fsdp_scatters_first_and_sums_its_shares() -> None:
    """Nothing is added there: the gradient is reduce-scattered over data and what is left summed over dcn."""
    p = gradient_plan(mw.Layout("batch:(dcn,data)", params="embed:data"), mesh())
    rows = planned(p)
    assert rows == compiled(p)
    assert rows["reduce_scatter", ("data",), PRODUCT] == rows["all_reduce", ("dcn",), PRODUCT // 4] == 2
    assert rows["all_gather", ("data",), PRODUCT] == 3  # up once, for x has no gradient; down once each way
    assert {(kind, axes) for kind, axes, num in rows if num > FF.size * 4} == {
        ("reduce_scatter", ("data",)), ("all_reduce", ("dcn",)), ("all_gather", ("data",)),
    }  # fmt: skip


def test_parameters_at_rest_over_both_are_gathered_and_scattered_in_steps() -> None:
    """What crosses the slow network is joined there before it is joined inside, and the other way for gradients."""
    p = gradient_plan(mw.Layout("batch:(dcn,data)", params="embed:(dcn,data)"), mesh())
    rows = planned(p)
    assert rows == compiled(p)
    kinds = {(kind, axes, num) for kind, axes, num in rows if num > FF.size * 4}
    assert kinds == {
        ("all_gather", ("dcn",), PRODUCT // 4), ("all_gather", ("data",), PRODUCT),
        ("reduce_scatter", ("data",), PRODUCT), ("reduce_scatter", ("dcn",), PRODUCT // 4),
    }  # fmt: skip


def test_a_forward_sum_is_taken_in_steps_and_its_gradient_moves_nothing() -> None:
    many = mw.Dim("batch", 1024)
    x, w = tensor(many, EMBED), tensor(EMBED, mw.Dim("out", 64), seed=1, role="parameter")

    def total(x: Tensor, w: Tensor) -> Any:
        return mw.sum(mw.tanh(mw.dot(x, w, over="embed")))

    p = mw.plan(jax.grad(mw.spmd(total, mesh(), "embed:(dcn,data)"), argnums=(0, 1)), x, w)
    size = 1024 * 64 * 4
    expected = {
        ("reduce_scatter", ("data",), size): 1,
        ("all_reduce", ("dcn",), size // 4): 1,
        ("all_gather", ("data",), size): 1,
    }
    assert planned(p) == compiled(p) == expected


def test_elements_are_dealt_out_where_no_dim_divides() -> None:
    x = tensor(BATCH, *mw.dims(two=2, odd=8193, ten=10))

    def summed(over: mw.Mesh) -> Rows:
        return planned(mw.plan(mw.spmd(lambda x: mw.sum(x, "batch"), over, "batch:(dcn,data)"), x))

    size = 2 * 8193 * 10 * 4
    assert summed(mesh())["reduce_scatter", ("data",), size] == 1
    indivisible = tensor(BATCH, *mw.dims(prime=16411))
    p = mw.plan(mw.spmd(lambda x: mw.sum(x, "batch"), mesh(), "batch:(dcn,data)"), indivisible)
    assert planned(p) == {("all_reduce", ("dcn", "data"), 16411 * 4): 1}


# What it costs


def across(p: Plan, slow: str = "dcn") -> int:
    """The bytes that one device sends in collectives that cross the slow network."""
    return sum(row.total_sent_bytes for row in p.collectives if slow in row.axes)


def test_the_slow_network_carries_a_share_of_the_bytes() -> None:
    steps, flat = (gradient_plan("batch:(dcn,data)", mesh(dcn=dcn)) for dcn in ("dcn", ""))
    small = 2 * (FF.size * 4 + 4) * 7 // 8
    assert across(flat) == 2 * (2 * PRODUCT * 7 // 8) + small
    assert across(steps) == 2 * (2 * PRODUCT // 4 // 2) + small


def seconds(p: Plan, on: Any) -> float:
    """How long the network is busy with gradients."""
    return sum(machine(on, p.program.sizes).seconds(row) for row in p.collectives if row.payload_bytes > 4)


def product(w: Tensor, x: Tensor) -> Any:
    return mw.mean(mw.dot(x, w, over="embed") ** 2)


def described(topology: str, dcn: str) -> tuple[Plan, mw.Mesh]:
    """The gradient of one product over 16 described devices, eight in each part."""
    over = mw.Mesh("dcn=2, data=8", topology=topology, dcn=dcn)
    w, x = tensor(*mw.dims(embed=1024, ff=4096), role="parameter"), tensor(BATCH, mw.Dim("embed", 1024))
    return gradient_plan("batch:(dcn,data)", over, product, (w, x)), over


def test_steps_cost_less_where_the_network_between_nodes_is_slow() -> None:
    """Eight GPUs on one switch, and wires of 3 GB/s from each to those of another node: what crosses decides."""
    (steps, _), (flat, _) = described("gpu:a100:16", "dcn"), described("gpu:a100:16", "")
    chip = dataclasses.replace(Hardware.named("a100"), slow_bytes_per_second=3e9)
    size, wire, alpha = 1024 * 4096 * 4, 3e9, chip.alpha_seconds
    by_ring = 2 * size * 15 / 16 / (8 * wire) + alpha
    within = size * 7 / 8 / chip.link_bytes_per_second + alpha
    assert seconds(flat, chip) == pytest.approx(by_ring)
    assert seconds(steps, chip) == pytest.approx(2 * within + 2 * size / 8 / 2 / wire + alpha)
    assert seconds(steps, chip) < 0.7 * seconds(flat, chip)


def test_steps_cost_what_tpus_make_of_one_collective() -> None:
    """Their compiler takes an all-reduce over several slices in the same three steps."""
    steps, over = described("tpu:v5e:2x4*2", "dcn")
    (scattered,) = (row for row in steps.collectives if row.kind == "reduce_scatter")
    flat = dataclasses.replace(scattered, kind="all_reduce", axes=("dcn", "data"), group_size=16)
    assert seconds(steps, over) == pytest.approx(machine(over, over.axes).seconds(flat), rel=1e-6)
