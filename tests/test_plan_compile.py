"""The compiler's word: what ``plan.compile`` says of programs compiled for described TPUs and for the devices here.

The TPU compiler itself runs here (libtpu, of the ``tpu-plan`` extra). The oracle for the collectives and the arguments
is the plan, which the trace alone has made; what the TPU compiler rewrites has a test of its own.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshwright as mw
from meshwright.models import DecoderConfig
from meshwright.plan import Compiled, Plan
from meshwright.plan.described import described_devices
from meshwright.plan.exhausted import Allocation, read_exhausted
from meshwright.plan.hardware import Hardware
from meshwright.topology import CHIPS, Topology
from meshwright.train.data import Batch, batch_dims
from meshwright.train.optimizer import OptimizerConfig, make_optimizer
from meshwright.train.step import Place, placed, state_maker, train_step

tpu = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="libtpu is built for Linux on x86-64 only"
)
V5E = mw.Mesh("data=2, model=2", topology="tpu:v5e:2x2")
V3 = mw.Mesh("data=4, model=2", topology="tpu:v3:2x2")
V5P = mw.Mesh("data=4, model=2", topology="tpu:v5p:2x2x2")
HERE = mw.Mesh("data=4, model=2")
MIXED = mw.Layout("batch:data, ff:model", params="embed:data")
NO_MERGING = {"xla_disable_hlo_passes": "cse"}


def feed_forward(params: dict[str, mw.Tensor], x: mw.Tensor) -> jax.Array:
    def layer(x: mw.Tensor, w: dict[str, mw.Tensor]) -> mw.Tensor:
        return mw.dot(mw.relu(mw.dot(x, w["up"], over="embed")), w["down"], over="ff")

    return mw.mean(mw.fold(layer, x, params, over="layers") ** 2).astype("float32")


def shapes(dtype: Any, **sizes: int) -> tuple[dict[str, mw.Tensor], mw.Tensor]:
    """Parameters of several layers and their input; every slice fills whole tiles of a TPU's memory."""
    given = {"layers": 4, "batch": 64, "embed": 1024, "ff": 2048, **sizes}
    layers, batch, embed, ff = mw.dims(**given)

    def make() -> Any:
        up, down = mw.zeros((layers, embed, ff), dtype=dtype), mw.zeros((layers, ff, embed), dtype=dtype)
        return {"up": mw.param(up), "down": mw.param(down)}, mw.zeros((batch, embed), dtype=dtype)

    return jax.eval_shape(make)


def plan_of(mesh: mw.Mesh, layout: mw.Layout, dtype: Any = jnp.bfloat16, **sizes: int) -> Plan:
    step = jax.value_and_grad(mw.spmd(feed_forward, mesh, layout))
    return mw.plan(step, *mw.shard(shapes(dtype, **sizes), mesh, layout))


def planned_bytes(plan: Plan) -> dict[tuple[str, tuple[str, ...]], int]:
    found: dict[tuple[str, tuple[str, ...]], int] = {}
    for row in plan.collectives:
        found[row.kind, row.axes] = found.get((row.kind, row.axes), 0) + row.total_payload_bytes
    return found


@tpu
@pytest.mark.parametrize(
    ("mesh", "layout", "params"),
    [
        (V5E, "batch:data", "embed:data"),
        (V5E, "batch:data, ff:model", None),
        (V5P, "batch:data", None),
        (V5P, "batch:data, ff:model", "embed:data"),
        (V3, "batch:data, ff:model", "ff:data"),
    ],
    ids=["v5e-fsdp", "v5e-tensor", "v5p-data", "v5p-mixed", "v3-mixed"],
)
def test_a_tpu_program_moves_and_holds_what_was_planned(mesh: mw.Mesh, layout: str, params: str | None) -> None:
    plan = plan_of(mesh, mw.Layout(layout, params=params)).on(mesh)
    compiled = plan.compile()
    assert compiled.moved_bytes == planned_bytes(plan)
    assert compiled.memory is not None
    assert compiled.memory.argument_bytes == sum(a.value.num_bytes for a in plan.program.arguments)
    assert compiled.fits
    assert compiled.cycles is not None and compiled.cycles > plan.flops.matmul / (2 * 8 * 128 * 128)


@tpu
def test_a_tpu_gathers_float32_weights_as_bfloat16() -> None:
    """A product of float32 rounds its operands to bfloat16 on a TPU, and XLA rounds a weight before it is gathered."""
    plan = plan_of(V5P, MIXED, jnp.float32)
    moved = dict(plan.compile(V5P).moved_bytes)
    planned = planned_bytes(plan)
    assert moved.pop(("all_gather", ("data",))) * 2 == planned.pop(("all_gather", ("data",)))
    assert moved == planned


def test_a_program_is_compiled_for_the_devices_that_are_here() -> None:
    plan = plan_of(HERE, MIXED, jnp.float32)
    compiled = plan.compile(options=NO_MERGING)
    assert compiled.moved_bytes == planned_bytes(plan)
    assert compiled.memory is not None
    assert compiled.memory.argument_bytes == sum(a.value.num_bytes for a in plan.program.arguments)
    text = str(compiled)
    assert text.startswith("feed_forward compiled for cpu, 8 devices: data=4, model=2, in ")
    assert "on a device; how much is there is not known" in text
    assert "cycles  N/A" in text
    assert (compiled.fits, compiled.cycles, compiled.available_bytes) == (None, None, None)


@tpu
def test_a_whole_training_step_uses_its_state_up() -> None:
    layout = mw.Layout("batch:data, heads:model, ff:model, vocab:model", params="embed:data")
    place, optimizer = Place(V3, layout), make_optimizer(OptimizerConfig(), 100)
    config = DecoderConfig(vocab=512, embed=512, layers=2, heads=2, ff=512, dtype="bfloat16", remat="nothing")
    state = placed(jax.eval_shape(state_maker(config, optimizer, place), jax.random.key(0)), place)
    batch = place.shard(Batch.shapes(batch_dims(8, 128)))
    plan = mw.plan(train_step(optimizer, place), state, batch).on(V3)
    compiled = plan.compile()
    memory = compiled.memory
    assert memory is not None
    # The loss is the one output that is not the new state; each small array takes a tile of its own.
    assert 0 <= memory.output_bytes - memory.alias_bytes <= 4096
    held = sum(a.value.num_bytes for a in plan.program.arguments)
    assert held <= memory.argument_bytes <= 1.05 * held
    planned, moved = planned_bytes(plan), compiled.moved_bytes
    assert moved["all_gather", ("data",)] == pytest.approx(planned["all_gather", ("data",)], rel=0.01)
    assert moved["all_reduce", ("model",)] == pytest.approx(planned["all_reduce", ("model",)], rel=0.01)


@tpu
def test_arrays_keys_and_numbers_are_compiled_for_a_tpu_from_their_shapes() -> None:
    """Values are on this machine, and the program is compiled for another: only their shapes go there."""
    (batch,) = mw.dims(batch=4096)

    def noisy(key: jax.Array, x: mw.Tensor, scale: float, shift: jax.Array) -> mw.Tensor:
        return x * scale + mw.random.normal(key, (batch,)) + shift

    x = mw.Tensor(np.ones(4096, np.float32), (batch,))
    plan = mw.plan(mw.spmd(noisy, V5E, "batch:data"), jax.random.key(0), x, 2.0, jnp.float32(1.0))
    compiled = plan.compile(V5E)
    assert compiled.memory is not None and compiled.moved_bytes == {}
    assert compiled.memory.output_bytes == 4096 // 2 * 4


@tpu
def test_a_program_that_does_not_fit_is_a_verdict() -> None:
    plan = plan_of(V5E, mw.Layout("batch:data"), embed=16384, ff=65536).on(V5E)
    compiled = plan.compile()
    assert compiled.fits is False
    needed, there = compiled.needed_bytes, compiled.available_bytes
    assert needed is not None and there is not None
    assert there == Hardware.named("v5e").memory_bytes
    assert needed > sum(a.value.num_bytes for a in plan.program.arguments) > there
    assert compiled.memory is None and compiled.cycles is None and compiled.collectives == ()
    largest = compiled.largest[0]
    assert largest.size_bytes == 4 * 16384 * 65536 * 2
    assert any(x.shape == "bfloat16[layers=4, embed=16384, ff=65536]" for x in compiled.largest)
    text = str(compiled)
    assert "does not fit  " in text and f" of HBM needed on a device, {there / 2**30:.1f} GiB there" in text
    assert "the largest tensors of the trace" in text
    assert "bfloat16[layers=4, embed=16384, ff=65536]" in text and "argument 0.up" in text
    data = json.loads(compiled.to_json())
    assert (data["fits"], data["needed_bytes"], data["memory"]) == (False, needed, None)
    assert data["largest"][0]["size_bytes"] == largest.size_bytes


@tpu
def test_memory_that_is_smaller_refuses_sooner() -> None:
    plan = plan_of(V5E, MIXED).on(V5E)
    fitting = plan.compile()
    refused = plan.compile(options={"xla_tpu_max_hbm_size_mib": 8})
    assert fitting.fits and refused.fits is False
    assert refused.available_bytes == 8 * 2**20
    assert refused.needed_bytes is not None and refused.needed_bytes > 8 * 2**20


def test_the_compilers_list_of_tensors_is_read() -> None:
    message = """\
RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 1.79G of 1.79G hbm. \
Exceeded hbm capacity by 600.5K.

Total hbm usage >= 1.83G:
    reserved        258.00M
    program           1.55G

  Largest program allocations in hbm:

  1. Size: 781.25M
     Operator: op_name="jit(narrow)/while/body/reshape" source_file="/home/me/model.py" source_line=12
     Shape: f32[200000,5,7]{2,1,0:T(8,128)}
     Unpadded size: 26.70M
     Extra memory due to padding: 754.55M (29.3x expansion)
     XLA label: reshape.93 = reshape(get-tuple-element.95)
     Allocation type: HLO temp
     ==========================

  2. Size: 26.70M
     Shape: f32[7000000]{0:T(1024)}
     Unpadded size: 26.70M
     XLA label: copy-start.1 = copy-start(get-tuple-element.95)
     Allocation type: HLO temp
     ==========================

  3. Size: 2.43M
     Shape: f32[636928]{0}
     Allocation type: scoped
     ==========================
"""
    found = read_exhausted(message)
    assert found is not None
    there = round(1.79 * 2**30)
    assert (found.memory, found.available_bytes, found.needed_bytes) == ("HBM", there, there + round(600.5 * 1024))
    assert found.largest == (
        Allocation(round(781.25 * 2**20), "f32[200000,5,7]", "jit(narrow)/while/body/reshape", "model.py:12"),
        Allocation(round(26.70 * 2**20), "f32[7000000]", "", ""),
    )
    assert read_exhausted("RESOURCE_EXHAUSTED: out of sockets") is None


@tpu
@pytest.mark.parametrize("chip", CHIPS["tpu"])
def test_every_tpu_is_described_as_it_is_counted(chip: str) -> None:
    dims = CHIPS["tpu"][chip].num_dims
    for shape in ([4] * dims, [1] * dims, [3, *[1] * (dims - 1)]):
        topology = Topology.parse(f"tpu:{chip}:{'x'.join(map(str, shape))}")
        devices = described_devices(topology)
        assert len(devices) == topology.num_devices
        found = Hardware.of_kind(devices[0].device_kind)
        assert found is not None and found.name == chip
    compiled = mw.plan(jnp.sin, jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32)).compile(
        f"tpu:{chip}:{'x'.join(['1'] * dims)}"
    )
    assert compiled.available_bytes == pytest.approx(Hardware.named(chip).memory_bytes, abs=0.011 * 2**30)
    assert compiled.needed_bytes == 2 * 4 * 2**40


@tpu
def test_slices_are_compiled_with_the_axes_that_cross_them() -> None:
    mesh = mw.Mesh("pod=2, data=2, model=2", topology="tpu:v5e:2x2*2", dcn="pod")
    layout = mw.Layout("batch:(pod,data), ff:model", params="embed:data")
    plan = plan_of(mesh, layout)
    compiled = plan.on(mesh).compile()
    assert compiled.target == "tpu:v5e:2x2*2"
    planned, moved = planned_bytes(plan), compiled.moved_bytes
    for key in (("all_gather", ("data",)), ("reduce_scatter", ("data",)), ("all_reduce", ("model",))):
        assert moved[key] == planned[key]
    # The gradients are scattered within a slice before they are summed over the slow network: half of them cross it.
    assert moved["all_reduce", ("pod",)] == pytest.approx(planned["all_reduce", ("pod",)], rel=0.001)
    assert planned["all_reduce", ("pod",)] == pytest.approx(planned["reduce_scatter", ("data",)] / 2, rel=0.001)
    with pytest.raises(ValueError, match="Say which axis crosses the slow network between them"):
        plan.compile("tpu:v5e:2x2*2")


@tpu
def test_a_sum_in_steps_is_compiled_as_it_is_planned() -> None:
    """Within a slice it is scattered and gathered as the plan says, and half of it crosses the slow network."""
    mesh = mw.Mesh("pod=2, data=2, model=2", topology="tpu:v5e:2x2*2", dcn="pod")
    plan = plan_of(mesh, mw.Layout("batch:(pod,data), ff:model"))
    planned, moved = planned_bytes(plan), plan.on(mesh).compile().moved_bytes
    for key in (("reduce_scatter", ("data",)), ("all_reduce", ("pod",)), ("all_gather", ("data",))):
        assert moved[key] == pytest.approx(planned[key], rel=0.001)
    assert planned["all_reduce", ("pod",)] == planned["reduce_scatter", ("data",)] / 2


@tpu
def test_the_difference_is_a_table_and_json() -> None:
    plan = plan_of(V5E, MIXED).on(V5E)
    compiled = plan.compile()
    memory = compiled.memory
    assert memory is not None
    total = memory.argument_bytes + memory.temporary_bytes + memory.output_bytes - memory.alias_bytes
    assert compiled.needed_bytes == memory.total_bytes == total
    rows = {row.part: row for row in compiled.differences}
    assert rows["arguments"].ratio == 1.0
    assert rows["outputs"].planned_bytes == plan.memory.output_bytes
    assert rows["temporaries"].planned_bytes == plan.memory.reported_temporary_bytes
    assert rows["memory"].compiled_bytes == total
    gathers = rows["all_gather over data"]
    assert gathers.planned_bytes == planned_bytes(plan)["all_gather", ("data",)]
    assert gathers.compiled_bytes == compiled.moved_bytes["all_gather", ("data",)]
    lines = str(compiled).splitlines()
    assert lines[1].startswith("fits    ") and lines[1].endswith(" of 15.8 GiB on a device")
    assert next(line for line in lines if line.startswith("all_gather over data")).endswith(" 1.00")
    assert max(map(len, lines)) <= 100
    data = json.loads(compiled.to_json())
    assert data["cycles"] == compiled.cycles and data["fits"] is True
    assert [row["part"] for row in data["differences"]] == list(rows)
    assert data["memory"]["temporary_bytes"] == memory.temporary_bytes


REFUSALS: dict[str, tuple[Callable[[Plan], Compiled], str]] = {
    "described": (lambda plan: plan.compile(), r"is only described: which .* Write plan\.compile\('tpu"),
    "chip": (lambda plan: plan.on("v5p").compile(), "the program's mesh is only described"),
    "gpu": (
        lambda plan: plan.compile("gpu:h100:8"),
        r"no compiler for gpu:h100:8 on this machine(?s:.*)plan\.on\(mesh\)",
    ),
    "present": (lambda plan: plan.compile(HERE), "has no topology that could be compiled for"),
    "unknown": (lambda plan: plan.compile("tpu:v5q:2x2x2"), "the TPU 'v5q' is unknown. Did you mean 'v5"),
    "moved": (lambda _: plan_of(HERE, MIXED).compile(V5P), r"devices of its own \(cpu\), and is compiled for those"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_compiled_says_what_to_do(case: str) -> None:
    compile_it, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        compile_it(plan_of(V5P, MIXED))


@tpu
def test_a_topology_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 8 devices; the topology tpu:v5e:2x2 has 4 devices"):
        plan_of(V5P, MIXED).compile("tpu:v5e:2x2")


def test_without_the_compiler_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'meshwright\[tpu-plan\]'"):
        plan_of(V5P, MIXED).compile(V5P)


QUIET = """
import jax, meshwright as mw
here = mw.Mesh("data=-1")
described = mw.Mesh("data=4", topology="tpu:v5e:2x2")
batch, = mw.dims(batch=4096)
x = mw.shard(jax.eval_shape(lambda: mw.zeros(batch)), described, "batch:data")
compiled = mw.plan(mw.spmd(mw.sum, described, "batch:data"), x).compile("tpu:v5e:2x2")
print(here.kind, compiled.fits)
"""


@tpu
def test_a_machine_without_a_tpu_hears_nothing_of_one() -> None:
    """Beside this process, which holds the library too; JAX is free to look for a TPU first, as it does by default."""
    described_devices(Topology.parse("tpu:v5e:2x2"))
    ours = ("JAX_PLATFORMS", "XLA_FLAGS", "ALLOW_MULTIPLE_LIBTPU_LOAD", "TPU_SKIP_MDS_QUERY")
    clean = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith("TPU_")}
    done = subprocess.run([sys.executable, "-c", QUIET], env=clean, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "cpu True\n", "")
