"""Each warning of a plan: a program with the fault, and the same program mended, where the warning goes away."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import meshwright as mw
from meshwright import Tensor
from meshwright.plan import Hardware, Plan, PlanWarning
from meshwright.plan.known import Known
from meshwright.plan.lineage import Lineage
from meshwright.plan.warnings import warnings_of

F32 = 4
BF16 = 2


def shapes(text: str, dtype: str = "float32", role: str = "activation") -> Tensor:
    """A tensor without values: ``shapes("batch=64 embed=512")``."""
    pairs = [part.split("=") for part in text.split()]
    these = mw.dims(**{name: int(size) for name, size in pairs})
    return jax.eval_shape(lambda: Tensor(jnp.zeros([d.size for d in these], dtype), these, role))


def weight(text: str, dtype: str = "float32") -> Tensor:
    return shapes(text, dtype, "parameter")


def planned(fn: Any, args: tuple[Any, ...], mesh: mw.Mesh, layout: mw.Layout) -> Plan:
    """The plan of a region on the mesh's own machine, its arguments placed."""
    placed = mw.shard(args, mesh, layout)
    return mw.plan(mw.spmd(fn, mesh, layout), *placed).on(mesh)


def found(kind: str, plan: Plan) -> PlanWarning:
    """The one warning of a kind; its line is in this file unless no line is to blame."""
    (warning,) = [w for w in plan.warnings if w.kind == kind]
    assert warning.line == 0 or warning.file == __file__
    assert warning.message.endswith(".")
    assert warning.remedy.endswith(".")
    return warning


def absent(kind: str, plan: Plan) -> None:
    assert kind not in [w.kind for w in plan.warnings]


MESH = mw.Mesh("data=4, model=2", topology="tpu:v5p:2x2x2")


def feed_forward(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    h = mw.relu(mw.dot(x, up, over="embed"))
    return x + mw.dot(h, down, over="ff")


LAYER = shapes("batch=64 length=128 embed=512"), weight("embed=512 ff=2048"), weight("ff=2048 embed=512")


def test_work_that_an_axis_duplicates() -> None:
    warning = found("duplicated", planned(feed_forward, LAYER, MESH, mw.Layout("batch:data")))
    assert "model=2" in warning.message
    assert "model" in warning.remedy
    # Two products of 16 x 128 rows on each device, 2048 and 512 wide: half of what they make is made twice.
    assert warning.num_bytes == 16 * 128 * (2048 + 512) * F32 // 2
    flops = 2 * 2 * 16 * 128 * 512 * 2048
    assert warning.seconds == pytest.approx(flops / 2 / (0.83 * 459e12), rel=1e-6)
    absent("duplicated", planned(feed_forward, LAYER, MESH, mw.Layout("batch:data, ff:model")))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k.rename(length="kv_length"), v.rename(length="kv_length")
    scores = mw.einsum(q, k, out="batch heads length kv_length")
    return mw.einsum(mw.softmax(scores, "kv_length"), v, out=q.names)


def test_an_activation_gathered_whole() -> None:
    args = (shapes("batch=16 length=2048 heads=8 head_dim=64"),) * 3
    warning = found("gathered", planned(attention, args, MESH, mw.Layout("batch:data, length:model")))
    # Keys and values: each gathered whole in a group of 2, so a device sends half of it.
    assert warning.num_bytes == 2 * (4 * 2048 * 8 * 64 * F32) // 2
    assert "model=2" in warning.message
    absent("gathered", planned(attention, args, MESH, mw.Layout("batch:data, heads:model")))


def test_a_gather_before_a_split_product_is_meant() -> None:
    """Sequence parallelism gathers activations for weights that are split: that is no mistake."""

    def program(x: Tensor, up: Tensor) -> Tensor:
        return mw.dot(mw.exp(x.rename(residual_length="length")), up, over="embed")

    args = shapes("batch=64 residual_length=128 embed=512"), weight("embed=512 ff=2048")
    plan = planned(program, args, MESH, mw.Layout("batch:data, ff:model, residual_length:model"))
    assert [row.kind for row in plan.collectives] == ["all_gather"]
    absent("gathered", plan)


def test_a_gathered_parameter_is_no_activation() -> None:
    plan = planned(feed_forward, LAYER, MESH, mw.Layout("batch:data, ff:model", params="embed:data"))
    assert {row.kind for row in plan.collectives} == {"all_gather", "all_reduce"}
    absent("gathered", plan)


def residual(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    h = mw.relu(mw.dot(x.rename(residual_length="length"), up, over="embed"))
    return mw.tanh(x + mw.dot(h, down, over="ff").rename(length="residual_length"))


def test_a_sum_that_a_rename_would_scatter() -> None:
    args = shapes("batch=64 residual_length=128 embed=512"), *LAYER[1:]
    warning = found("summed", planned(residual, args, MESH, mw.Layout("batch:data, ff:model")))
    # An all-reduce of S bytes in a group of 2 sends S; a reduce-scatter S / 2.
    assert warning.num_bytes == 16 * 128 * 512 * F32 // 2
    assert "residual_length" in warning.message
    mended = planned(residual, args, MESH, mw.Layout("batch:data, ff:model, residual_length:model"))
    assert {row.kind for row in mended.collectives} == {"all_gather", "reduce_scatter"}
    absent("summed", mended)


def test_parameters_that_could_be_split_at_rest() -> None:
    warning = found("replicated", planned(feed_forward, LAYER, MESH, mw.Layout("batch:data, ff:model")))
    # Each device has half of two matrices, 3/4 of which three others have too.
    assert warning.num_bytes == 2 * 512 * 2048 * F32 // 2 * 3 // 4
    assert warning.seconds == 0
    assert 'params="data"' in warning.remedy
    absent("replicated", planned(feed_forward, LAYER, MESH, mw.Layout("batch:data, ff:model", params="data")))


def test_a_small_batch_a_device() -> None:
    few = shapes("batch=64 embed=512"), *LAYER[1:]
    layout = mw.Layout("batch:data, ff:model", params="data")
    warning = found("small_batch", planned(feed_forward, few, MESH, layout))
    assert "16 rows" in warning.message
    # Both matrices are read, as they are used: half of each.
    assert warning.num_bytes == 2 * 512 * 2048 * F32 // 2
    many = shapes("batch=4096 embed=512"), *LAYER[1:]
    absent("small_batch", planned(feed_forward, many, MESH, layout))


def layers(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return mw.fold(lambda x, w: feed_forward(x, *w), x, (up, down), over="layers")


def test_a_collective_of_every_layer_over_the_slow_network() -> None:
    mesh = mw.Mesh("pod=2, data=16", topology="tpu:v5e:4x4*2", dcn="pod")
    up, down = weight("layers=4 embed=512 ff=2048"), weight("layers=4 ff=2048 embed=512")
    args = shapes("batch=64 length=128 embed=512"), up, down
    warning = found("slow_network", planned(layers, args, mesh, mw.Layout("batch:(pod,data)", params="embed:pod")))
    # Two gathers a layer, in groups of 2: half of each matrix is sent.
    assert warning.num_bytes == 4 * 2 * 512 * 2048 * F32 // 2
    assert warning.seconds == pytest.approx(8 * (512 * 2048 * F32 / 2 / 3.1e9 + 1e-6), rel=1e-6)
    absent("slow_network", planned(layers, args, mesh, mw.Layout("batch:(pod,data)", params="embed:data")))


def test_sums_of_gradients_over_the_slow_network_are_no_fault() -> None:
    """Each layer's is summed once a step: in steps, at once, or with the parameters at rest within a slice."""
    up, down = weight("layers=4 embed=512 ff=2048"), weight("layers=4 ff=2048 embed=512")
    args = shapes("batch=64 length=128 embed=512"), up, down
    for dcn in ("pod", ""):
        mesh = mw.Mesh("pod=2, data=8", topology="gpu:h100:16", dcn=dcn)
        for params in ("", "embed:data"):
            layout = mw.Layout("batch:(pod,data)", params=params)
            plan = gradients(lambda x, *w: mw.mean(layers(x, *w) ** 2), args, mesh, layout)
            assert any("pod" in row.axes and row.times == 4 for row in plan.collectives)
            absent("slow_network", plan)


def test_the_last_step_of_a_sum_is_no_gather_of_an_activation() -> None:
    mesh = mw.Mesh("pod=2, data=16", topology="tpu:v5e:4x4*2", dcn="pod")
    plan = planned(feed_forward, LAYER, mesh, mw.Layout("ff:(pod,data)"))
    assert [row.kind for row in plan.collectives] == ["reduce_scatter", "all_reduce", "all_gather"]
    absent("gathered", plan)


def uneven(vocab: int) -> tuple[Any, ...]:
    return shapes("batch=64 length=128 embed=512"), *LAYER[1:], weight(f"embed=512 vocab={vocab}")


def with_logits(x: Tensor, up: Tensor, down: Tensor, head: Tensor) -> Tensor:
    return mw.dot(feed_forward(x, up, down), head, over="embed")


def test_a_vocabulary_that_no_axis_divides() -> None:
    layout = mw.Layout("batch:data, ff:model", params="embed:data")
    warning = found("uneven", planned(with_logits, uneven(50257), MESH, layout))
    assert "vocab=50257 is no multiple of model=2" in warning.message
    assert "50258" in warning.remedy
    assert "50304" in warning.remedy
    assert warning.num_bytes == 512 // 4 * 50257 * F32 // 2
    mended = mw.Layout("batch:data, ff:model, vocab:model", params="embed:data")
    absent("uneven", planned(with_logits, uneven(50304), MESH, mended))


def test_a_parameter_with_a_dim_that_fits_is_not_uneven() -> None:
    """The vocabulary does not divide, but the layout can split embed over model too."""
    layout = mw.Layout("batch:data, ff:model")
    absent("uneven", planned(with_logits, uneven(50257), MESH, layout))
    odd = shapes("batch=64 length=128 embed=511"), weight("embed=511 ff=2048"), weight("ff=2048 embed=511")
    warning = found("uneven", planned(with_logits, (*odd, weight("embed=511 vocab=50257")), MESH, layout))
    assert "so argument 3 cannot be split there" in warning.message
    assert "vocab=50257" in warning.message


def test_nothing_is_blamed_on_an_axis_that_splits_no_parameter() -> None:
    """In a gradient, whole parameters differ in type over the axis of the batch: they are not split over it."""
    mesh = mw.Mesh("data=8", topology="tpu:v5p:2x2x2")
    narrow = shapes("batch=4096 embed=64"), weight("embed=64 ff=64"), weight("ff=64 embed=64")
    for layout, whole in ((mw.Layout("batch:data"), True), (mw.Layout("batch:data", params="data"), False)):
        plan = gradients(lambda x, *w: mw.mean(feed_forward(x, *w) ** 2), narrow, mesh, layout)
        products = [r.op for r in known(plan).ran if r.op.name == "dot_general" and r.op.origin.direction == "forward"]
        weights = [v for op in products for v in op.ins if known(plan).lineage.parameter(v) is not None]
        assert any(v is not None and "data" in v.varying for v in weights) or not whole
        absent("thin", plan)


def gradients(fn: Any, args: tuple[Any, ...], mesh: mw.Mesh, layout: mw.Layout) -> Plan:
    """The plan of the gradient by every parameter."""
    placed = mw.shard(args, mesh, layout)
    where = tuple(i for i, x in enumerate(args) if x.role == "parameter")
    return mw.plan(jax.grad(mw.spmd(fn, mesh, layout), argnums=where), *placed).on(mesh)


def known(plan: Plan) -> Known:
    return Known.of(plan.program, Lineage.of(plan.program), plan.machine, 0)


class Counted(list[Any]):
    """A list that counts how often it is walked."""

    walks = 0

    def __iter__(self) -> Iterator[Any]:
        type(self).walks += 1
        return super().__iter__()


def test_long_programs_are_walked_as_often_as_short_ones() -> None:
    """Layers written as a Python loop make one long block."""

    def walks(layers: int) -> int:
        def program(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
            for _ in range(layers):
                x = feed_forward(x, up, down)
            return x

        plan = planned(program, LAYER, MESH, mw.Layout("batch:data, ff:model"))
        block = plan.program.block
        block.nodes = Counted(block.nodes)
        Counted.walks = 0
        assert "summed" in {w.kind for w in warnings_of(known(plan))}
        return Counted.walks

    assert walks(2) == walks(8) > 0


def test_a_split_that_makes_a_product_thin() -> None:
    mesh = mw.Mesh("data=1, model=8", topology="tpu:v5p:2x2x2")
    layout = mw.Layout("ff:model")
    narrow = shapes("batch=4096 embed=512"), weight("embed=512 ff=256"), weight("ff=256 embed=512")
    warning = found("thin", planned(feed_forward, narrow, mesh, layout))
    assert "only 32 wide" in warning.message
    assert "75%" in warning.message
    wide = shapes("batch=4096 embed=512"), weight("embed=512 ff=2048"), weight("ff=2048 embed=512")
    absent("thin", planned(feed_forward, wide, mesh, layout))


def test_more_memory_than_the_chip_has() -> None:
    mesh = mw.Mesh("data=4", topology="tpu:v5e:2x2")
    large = shapes("batch=4096 embed=32768"), weight("embed=32768 ff=65536"), weight("ff=65536 embed=32768")
    plan = planned(feed_forward, large, mesh, mw.Layout("batch:data"))
    warning = found("memory", plan)
    assert warning.num_bytes is not None
    assert warning.num_bytes >= 2 * 32768 * 65536 * F32 - Hardware.named("v5e").memory_bytes
    assert "TPU v5e" in warning.message
    assert plan.warnings[0] is warning
    absent("memory", planned(feed_forward, large, mesh, mw.Layout("batch:data", params="data")))


def test_costs_in_time_need_a_machine() -> None:
    mesh = mw.Mesh("data=4, model=2", topology="tpu:v5p:2x2x2")
    layout = mw.Layout("batch:data")
    plan = mw.plan(mw.spmd(feed_forward, mesh, layout), *mw.shard(LAYER, mesh, layout))
    assert plan.warnings
    assert all(w.seconds is None for w in plan.warnings)
    assert {w.kind for w in plan.warnings} <= {w.kind for w in plan.on(mesh).warnings}
