"""Times of a plan against counts by hand: networks, products, passes over memory, the timeline, MFU and HFU."""

import importlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshwright as mw
from meshwright import Tensor
from meshwright.plan import Hardware, Plan
from meshwright.plan.calibrate import line
from meshwright.plan.hardware import Achieved, Rate, table
from meshwright.plan.network import machine
from meshwright.plan.origin import Origin
from meshwright.plan.touched import touched_bytes
from meshwright.plan.traffic import KINDS, Collective
from meshwright.topology import CHIPS

from .test_plan_warnings import attention, feed_forward, shapes, weight

calibrating = importlib.import_module("meshwright.plan.calibrate")
"""The module; the package's name for it is the function."""

S = 64 * 10**6
NOWHERE = Origin("forward", "", (), "", 0)


def seconds(mesh: mw.Mesh, kind: str, axes: str, payload: int = S) -> float:
    """One collective on a mesh."""
    names = tuple(axes.split())
    size = int(np.prod([mesh.axes[a] for a in names]))
    return machine(mesh, mesh.axes).seconds(Collective(kind, names, size, "float32", payload, 1, True, NOWHERE))


US = 1e-6
POD = mw.Mesh("data=64, model=8", topology="tpu:v5p:8x8x8")
SLICE = mw.Mesh("data=4, model=4", topology="tpu:v5e:4x4")
NODES = mw.Mesh("data=2, model=8", topology="gpu:h100:16")
A100 = mw.Mesh("data=2, model=8", topology="gpu:a100:16")
SLICES = mw.Mesh("pod=2, data=16", topology="tpu:v5e:4x4*2", dcn="pod")
SMALL = mw.Mesh("pod=2, data=8", topology="tpu:v5p:2x2x2*2", dcn="pod")
V3 = mw.Mesh("data=16, model=2", topology="tpu:v3:4x4")
V7X = mw.Mesh("data=8, model=2", topology="tpu:v7x:2x2x2")


@pytest.mark.parametrize(
    ("mesh", "kind", "axes", "expected"),
    [
        (POD, "all_gather", "model", S * 7 / 8 / (2 * 90e9) + 4 * US),  # a ring of 8, both ways
        (POD, "reduce_scatter", "model", S * 7 / 8 / (2 * 90e9) + 4 * US),
        (POD, "all_reduce", "model", 2 * (S * 7 / 8 / (2 * 90e9) + 4 * US)),
        (POD, "all_gather", "data", S * 63 / 64 / (4 * 90e9) + 8 * US),  # two rings of 8
        (POD, "all_to_all", "model", 8 * S * 7 / 8 / (2 * 90e9) / 4 + 4 * US),  # S is a slice, an eighth of the whole
        (POD, "permute", "model", S / 90e9 + US),
        (POD, "all_gather", "data model", S * 511 / 512 / (6 * 90e9) + 12 * US),
        (SLICE, "all_gather", "model", S * 3 / 4 / 45e9 + 3 * US),  # a line: v5e closes at 16 only
        (SLICE, "all_to_all", "model", 4 * S * 3 / 4 / 45e9 / 2 + 3 * US),
        (NODES, "all_gather", "model", 29 * US + S * 7 / 8 / 324e9),  # as measured
        (NODES, "all_reduce", "model", 38 * US + 2 * S * 7 / 8 / 354e9),
        (NODES, "all_gather", "data", S / 2 / 50e9 + 30 * US),  # two nodes, one GPU of each
        (NODES, "all_reduce", "data", 2 * S / 2 / 50e9 + 30 * US),
        (NODES, "all_gather", "data model", 29 * US + S * 7 / 8 / 324e9 + 30 * US),  # within a node it takes longer
        # Within the slices (lines of 2, 2 and 2) and then between them, where all eight send.
        (SMALL, "all_gather", "pod data", S * 7 / 8 / (3 * 90e9) + 3 * US + S / 2 / (8 * 6.25e9) + US),
        (SMALL, "all_reduce", "pod data", 2 * (S * 7 / 8 / (3 * 90e9) + 3 * US + S / 2 / (8 * 6.25e9)) + US),
        (A100, "all_reduce", "data model", 2 * S * 15 / 16 / (8 * 25e9) + 38 * US),  # a ring through both nodes
        (A100, "all_gather", "model", S * 7 / 8 / 300e9 + 38 * US),  # nothing measured: the formula of a switch
        (A100, "all_to_all", "model", S * 7 / 8 / 300e9 + 38 * US),
        (SLICES, "all_reduce", "pod", 2 * S / 2 / 3.1e9 + US),
        (SLICES, "all_to_all", "pod", S / 2 / 3.1e9 + US),
        (SLICES, "permute", "pod", S / 3.1e9 + US),
        (V3, "all_gather", "data", S * 15 / 16 / (2 * 82e9 / 2) + 6 * US),  # two lines of 4, shared by two cores
        (V3, "all_reduce", "model", 2 * (S / 2 / 225e9 + US)),  # within a chip, through its memory
        (V3, "all_to_all", "model", S / 2 / 225e9 + US),
        (V3, "permute", "model", S / 225e9 + US),
        (V7X, "all_gather", "model", S / 2 / 1605e9 + US),
    ],
)
def test_collectives_take_what_the_table_says(mesh: mw.Mesh, kind: str, axes: str, expected: float) -> None:
    assert seconds(mesh, kind, axes) == pytest.approx(expected, rel=1e-9)


def test_axes_know_what_they_cross() -> None:
    assert {a: str(p) for a, p in machine(POD, POD.axes).paths.items()} == {
        "data": "ring of 8 x ring of 8",
        "model": "ring of 8",
    }
    assert {a: str(p) for a, p in machine(SLICES, SLICES.axes).paths.items()} == {
        "pod": "2 on the slow network",
        "data": "line of 4 x line of 4",
    }
    assert {a: str(p) for a, p in machine(V3, V3.axes).paths.items()} == {
        "data": "line of 4 x line of 4",
        "model": "2 cores of a chip",
    }
    wide = mw.Mesh("data=16, model=16", topology="tpu:v5e:16x16")
    assert {str(p) for p in machine(wide, wide.axes).paths.values()} == {"ring of 16"}


def test_every_chip_of_a_topology_is_in_the_table() -> None:
    named = {name: platform for platform, chips in CHIPS.items() for name in chips}
    assert {chip.name: chip.platform for chip in table().values()}.items() >= named.items()
    for name, platform in named.items():
        domain = CHIPS[platform][name].domain
        assert table()[name].domain == (domain or 0)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v3", "v3"), ("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"), ("TPU7x", "v7x"), ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA GB200", "gb200"), ("NVIDIA B200", "b200"),
    ],
)  # fmt: skip
def test_devices_are_known_by_their_kind(kind: str, name: str) -> None:
    found = Hardware.of_kind(kind)
    assert found is not None
    assert found.name == name
    assert Hardware.of_kind("cpu") is None


def test_errors_name_what_is_known() -> None:
    with pytest.raises(ValueError, match=r"there is no chip 'v5q'\. Did you mean 'v5"):
        Hardware.named("v5q")
    with pytest.raises(ValueError, match="has 512 devices; tpu:v5p:2x2x2 has 8"):
        machine("tpu:v5p:2x2x2", {"data": 512})
    with pytest.raises(ValueError, match="nothing is known of the speed of this machine"):
        plan_of(lambda x: x + x, shapes("batch=8 embed=8")).time()
    with pytest.raises(ValueError, match="TPU v3 has no slow_bytes_per_second"):
        seconds(mw.Mesh("pod=2, data=8", topology="tpu:v3:2x2*2", dcn="pod"), "all_reduce", "pod")


def test_rates_of_products() -> None:
    chip = Hardware.named("v7x")
    assert chip.matmul_flops((1024,) * 3) == pytest.approx(0.30 * 1153e12)
    assert chip.matmul_flops((8192,) * 3) == pytest.approx(0.83 * 1153e12)
    assert chip.matmul_flops((16384,) * 3) == pytest.approx(0.83 * 1153e12)
    assert 0.30 * 1153e12 < chip.matmul_flops((4096,) * 3) < 0.83 * 1153e12
    # Half of a matrix unit's side takes as long as the whole: half of the rate.
    whole, half = (chip.matmul_flops((8192, 8192, n)) for n in (256, 128))
    assert half == pytest.approx(whole / 2)


FLAT = Hardware(
    name="flat",
    title="a machine of round numbers",
    platform="test",
    peak_flops=1e12,
    hbm_bytes=10**9,
    hbm_bytes_per_second=1e30,
    network="measured",
    matmul=(Rate(size=1, fraction=1.0),),
    tile=1,
    achieved=tuple(Achieved(kind=k, group_size=4, alpha_seconds=1e-3, bytes_per_second=1e9) for k in KINDS),
)


def plan_of(fn: Any, *args: Any, mesh: str = "data=2, model=4", layout: Any = "") -> Plan:
    described = mw.Mesh(mesh, topology="tpu:v5p:2x2x2")
    layout = layout if isinstance(layout, mw.Layout) else mw.Layout(layout)
    return mw.plan(mw.spmd(fn, described, layout), *mw.shard(args, described, layout))


LAYER = shapes("batch=64 length=128 embed=512"), weight("embed=512 ff=2048"), weight("ff=2048 embed=512")
PRODUCT = 2 * 32 * 128 * 512 * 512 / 1e12
"""Seconds of one of the layer's two products on a device: half of the batch, a quarter of ff."""
SUM = 1e-3 + 2 * 3 / 4 * (32 * 128 * 512 * 4) / 1e9
"""Seconds of the all-reduce after them, in groups of 4."""


def test_what_depends_on_a_collective_waits() -> None:
    times = plan_of(feed_forward, *LAYER, layout="batch:data, ff:model").time(FLAT)
    assert times.compute_seconds == pytest.approx(2 * PRODUCT)
    assert times.exposed_seconds == pytest.approx(SUM)
    assert times.seconds == pytest.approx(2 * PRODUCT + SUM)
    (axis,) = times.axes
    assert (axis.axes, axis.path) == ("model", "switch of 4")
    assert axis.seconds == axis.exposed_seconds == pytest.approx(SUM)
    assert times.bottleneck == "model"


def test_what_does_not_depend_on_a_collective_hides_it() -> None:
    """The second weight is gathered while the first product runs."""
    plan = plan_of(feed_forward, *LAYER, mesh="data=4, model=2", layout=mw.Layout("batch:data", params="embed:data"))
    gather = 1e-3 + 3 / 4 * (512 * 2048 * 4) / 1e9
    product = 2 * 16 * 128 * 512 * 2048 / 1e12
    times = plan.time(FLAT)
    assert [row.kind for row in plan.collectives] == ["all_gather"] * 2
    assert product > gather or times.exposed_seconds == pytest.approx(2 * gather - product)
    assert times.seconds == pytest.approx(gather + max(product, gather) + product)
    alone = plan.time(Hardware(**{**vars(FLAT), "overlap": False}))
    assert alone.seconds == pytest.approx(2 * (gather + product))


def test_loops_take_all_their_turns() -> None:
    up, down = weight("layers=5 embed=512 ff=2048"), weight("layers=5 ff=2048 embed=512")

    def layers(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return mw.fold(lambda x, w: feed_forward(x, *w), x, (up, down), over="layers")

    times = plan_of(layers, LAYER[0], up, down, layout="batch:data, ff:model").time(FLAT)
    assert times.seconds == pytest.approx(5 * (2 * PRODUCT + SUM))
    assert times.sure
    (loop,) = times.spans
    assert (loop.name, loop.turns) == ("loop", 5)
    assert [span.stream for span in loop.inside if span.seconds > 1e-9] == ["compute", "compute", "model"]


def test_the_parts_make_the_whole() -> None:
    plan = plan_of(feed_forward, *LAYER, layout=mw.Layout("batch:data, ff:model", params="embed:data"))
    for chip in ("v5p", "h100", "a100"):
        times = plan.time(chip)
        assert times.compute_seconds + times.hbm_seconds + times.exposed_seconds == pytest.approx(times.seconds)
        by_line = sum(sum(parts.values()) for parts in times.lines().values())
        assert by_line >= times.seconds * 0.999


def test_mfu_counts_once_and_hfu_all() -> None:
    plan = plan_of(feed_forward, *LAYER, layout="batch:data")  # four devices along model do the same
    times = plan.time(FLAT)
    assert times.hfu == pytest.approx(1.0)
    assert times.mfu == pytest.approx(1 / 4)


def test_hfu_counts_what_is_recomputed() -> None:
    def loss(x: Tensor, up: Tensor, down: Tensor) -> jax.Array:
        return mw.mean(mw.remat(feed_forward)(x, up, down))

    mesh = mw.Mesh("data=8", topology="tpu:v5p:2x2x2")
    placed = mw.shard(LAYER, mesh, mw.Layout("batch:data"))
    gradient = jax.value_and_grad(mw.spmd(loss, mesh, mw.Layout("batch:data")), argnums=(0, 1, 2))
    times = mw.plan(gradient, *placed).time(FLAT)
    product = 2 * 8 * 128 * 512 * 2048
    # Two products forward and four backward; the first one again, whose result the second's gradient needs.
    assert times.mfu * times.seconds * 1e12 == pytest.approx(6 * product)
    assert times.hfu * times.seconds * 1e12 == pytest.approx(7 * product)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k.rename(length="kv_length"), v.rename(length="kv_length")
    scores = mw.einsum(q, k, out="batch heads length kv_length")
    scores = mw.where(mw.causal_mask(q.dim("length"), k.dim("kv_length")), scores, -1e30)
    return mw.einsum(mw.softmax(scores, "kv_length"), v, out=q.names)


def test_attention_under_a_causal_mask_counts_half() -> None:
    args = (shapes("batch=16 length=256 heads=8 head_dim=64"),) * 3
    flops = 2 * 2 * 8 * 256 * 256 * 2 * 64
    for fn, share in ((attention, 1.0), (causal, 0.5)):
        times = plan_of(fn, *args, layout="batch:data, heads:model").time(FLAT)
        assert times.mfu * times.seconds * 1e12 == pytest.approx(share * flops)


@pytest.mark.parametrize("layout", ["batch:data, heads:model", "batch:data, length:model"])
@pytest.mark.parametrize("length", [256, 1024, 4096])
def test_attention_by_blocks_counts_half(layout: str, length: int) -> None:
    """The same half whether a block is whole, or queries are parts that leave out the keys after them, or turns of a
    ring. Scores made again are no part of the model's."""
    args = (shapes(f"batch=16 length={length} heads=8 head_dim=64"),) * 3
    half = 2 * (16 * 8 // 8) * length**2 * 64 // 2  # of scores, or of their use, on one of eight devices
    drift = 2 * (16 * 8 // 8) * length * 64  # results times their gradients

    def loss(q: Tensor, k: Tensor, v: Tensor) -> jax.Array:
        return mw.sum(mw.attention(q, k, v, causal=True))

    mesh = mw.Mesh("data=4, model=2", topology="tpu:v5p:2x2x2")
    region, placed = mw.spmd(loss, mesh, mw.Layout(layout)), mw.shard(args, mesh, mw.Layout(layout))
    times = mw.plan(region, *placed).time(FLAT)
    assert times.mfu * times.seconds * 1e12 == pytest.approx(2 * half)
    times = mw.plan(jax.grad(region, (0, 1, 2)), *placed).time(FLAT)
    assert times.mfu * times.seconds * 1e12 == pytest.approx(6 * half + drift)
    assert times.hfu * times.seconds * 1e12 == pytest.approx(7 * half + drift)


def test_the_gradient_of_attention_counts_half_and_that_of_experts_whole() -> None:
    """Experts' gradients are products of two activations with a batch dim as well."""

    def loss(q: Tensor, k: Tensor, v: Tensor, up: Tensor, down: Tensor) -> jax.Array:
        x = causal(q, k, v).merge(("heads", "head_dim"), "embed")
        x = mw.einsum(x, mw.ones(up.dim("experts")), out="experts batch length embed")
        h = mw.relu(mw.einsum(x, up, out="experts batch length ff"))
        return mw.mean(mw.einsum(h, down, out="experts batch length embed") ** 2)

    args = (shapes("batch=16 length=256 heads=8 head_dim=64"),) * 3
    experts = weight("experts=4 embed=512 ff=128"), weight("experts=4 ff=128 embed=512")
    mesh, layout = mw.Mesh("data=8", topology="tpu:v5p:2x2x2"), mw.Layout("batch:data")
    gradient = jax.grad(mw.spmd(loss, mesh, layout), argnums=(0, 1, 2, 3, 4))
    times = mw.plan(gradient, *mw.shard((*args, *experts), mesh, layout)).time(FLAT)
    scores, expert = 2 * 2 * 8 * 256 * 256 * 64, 2 * 4 * 2 * 256 * 512 * 128
    copies = 2 * 4 * 2 * 256 * 512  # the gradients of what the experts are given, added up
    # Each product, and two for its gradients.
    assert times.hfu * times.seconds * 1e12 == pytest.approx(3 * 2 * scores / 2 + 3 * 2 * expert + copies)


def test_passes_over_memory() -> None:
    """A chain of elementwise operations is one pass; a reduction ends it; a product stands alone."""
    n = 32 * 512 * 4

    def touched(fn: Any) -> int:
        plan = plan_of(fn, shapes("batch=64 embed=512"), layout="batch:data")
        return sum(moved.memory_bytes for moved in touched_bytes(plan.program.block).values())

    assert touched(lambda x: mw.tanh(x * x + x)) == 2 * n
    assert touched(lambda x: mw.sum(mw.tanh(x), "embed")) == n + 32 * 4
    assert touched(lambda x: mw.dot(x, x.rename(batch="rows"), over="embed")) >= 2 * n


def test_a_cache_holds_what_was_moved_last() -> None:
    n = 32 * 512 * 4

    def moved(fn: Any, cache_bytes: int) -> tuple[int, int]:
        block = plan_of(fn, shapes("batch=64 embed=512"), layout="batch:data").program.block
        found = touched_bytes(block, cache_bytes).values()
        return sum(m.memory_bytes for m in found), sum(m.cache_bytes for m in found)

    def scaled(x: Tensor) -> Tensor:
        return x / mw.sum(x, "embed")  # two passes: the sum reads x, then the quotient does again

    small = 32 * 4
    assert moved(scaled, 0) == (3 * n + 2 * small, 0)
    assert moved(scaled, n // 2) == (3 * n + 2 * small, 0)  # x has no room, and pushes the sums out
    assert moved(scaled, 2 * n) == (2 * n, n + 2 * small)  # what comes in and what leaves goes through memory
    assert FLAT.pass_seconds(10**9, 0, 0) == pytest.approx(1e-21)
    cached = Hardware(**{**vars(FLAT), "hbm_bytes_per_second": 1e9, "cache_bytes_per_second": 4e9})
    assert cached.pass_seconds(1000, 1000, 0) == pytest.approx(1.25e-6)


def test_a_profile_is_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "flat.toml"
    path.write_text(FLAT.toml())
    assert Hardware.load(path) == FLAT
    plan = plan_of(feed_forward, *LAYER, layout="batch:data, ff:model")
    assert plan.time(str(path)).seconds == plan.time(FLAT).seconds
    path.write_text(FLAT.toml() + "colour = 1\n")
    with pytest.raises(ValueError, match="has the field 'colour'"):
        Hardware.load(path)


MINE = Hardware.named("v3").toml()
BAD_PROFILES = {
    "a field of a rate": (MINE.replace("size = ", "siz = "), r"chip 'v3', matmul has the field 'siz'\. Did you mean"),
    "a rate without a size": (MINE.replace("size = 8192, ", ""), "chip 'v3', matmul: .*'size'"),
    "a rate that is no table": (MINE.replace("{ size = 8192, fraction = 0.83 }", "3"), "matmul: 3 is no table"),
    "a word for a number": (MINE.replace("tile = 128", 'tile = "128"'), "tile is '128', which is no number"),
    "a word for yes or no": (f'{MINE}\noverlap = "false"', "overlap is 'false'; it is true or false"),
    "a switch of none": (MINE.replace('"torus"', '"switch"'), "network is a switch, so domain must be positive"),
    "no link": (MINE.replace("link_bytes_per_second = ", "link_bytes_per_second = -"), "so link_bytes_per_second must"),
    "another name": (MINE.replace('name = "v3"', 'name = "v33"'), r"'v33' is none \(TPU v3\)\. Did you mean 'v3'"),
    "no torus": (MINE.replace('platform = "tpu"', 'platform = "cpu"'), "no platform 'cpu' with a torus"),
}


@pytest.mark.parametrize("name", BAD_PROFILES)
def test_a_profile_that_is_wrong_is_one_message(name: str, tmp_path: Path) -> None:
    text, says = BAD_PROFILES[name]
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        Hardware.load(path)


def test_what_is_no_machine_and_no_plan_is_said() -> None:
    plan = plan_of(feed_forward, *LAYER, layout="batch:data")
    wrong: Any = 3
    with pytest.raises(TypeError, match=r"time: int is no machine\. Write a chip, 'v5p'"):
        plan.on(wrong)
    with pytest.raises(TypeError, match=r"plan\.compare: expected a plan, found int\."):
        plan.compare(wrong)
    with pytest.raises(ValueError, match="there is no folder"):
        plan.save("no/such/folder/plan.html")


def test_a_line_through_measurements() -> None:
    points = [(size, 5e-6 + size / 2e9) for size in (1e3, 1e5, 1e7)]
    alpha, rate = line(points)
    assert alpha == pytest.approx(5e-6)
    assert rate == pytest.approx(2e9)
    assert line([(1e3, 1e-6), (1e5, 5e-4), (1e7, 6e-2)])[0] >= 0  # steeper and steeper: no alpha below zero
    assert line([(1e3, 2e-3), (1e5, 1e-3), (1e7, 1e-3)])[1] > 0


def test_calibrating_measures_every_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {
        "MATMUL_SIZES": (32,),
        "PASS_BYTES": 65536,
        "PAYLOADS": (4096, 65536),
        "NUM_RUNS": 1,
        "TURN_SECONDS": 1e-4,
    }.items():
        monkeypatch.setattr(calibrating, name, value)
    mesh = mw.Mesh("data=2, model=2", devices=jax.devices()[:4])
    profile = mw.calibrate(mesh, tmp_path / "here.toml")
    assert {(a.kind, a.axis, a.group_size) for a in profile.achieved} == {(k, a, 2) for k in KINDS for a in mesh.axes}
    assert all(a.alpha_seconds >= 0 and a.bytes_per_second > 0 for a in profile.achieved)
    assert min(profile.peak_flops, profile.hbm_bytes_per_second, profile.launch_seconds) > 0
    assert not profile.overlap
    read = Hardware.load(tmp_path / "here.toml")
    x = Tensor(jnp.ones((8, 8)), "batch embed")
    plan = mw.plan(mw.spmd(lambda x: mw.sum(x, "batch"), mesh, "batch:data"), x)
    assert plan.time(read).seconds == pytest.approx(plan.time(profile).seconds, rel=1e-4)


def test_only_present_devices_can_be_measured() -> None:
    with pytest.raises(ValueError, match="only described"):
        mw.calibrate(POD)
