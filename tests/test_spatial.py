"""Networks on split rows, columns and depth: the examples' under many layouts, and what they send.

The modules are compared with JAX's own and NumPy, the networks with one device (law 1); halos are counted by hand, in
the plan and in the compiled program.
"""

import collections
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import meshwright as mw
from meshwright import Tensor
from meshwright.nn import Conv, ConvTranspose, GroupNorm
from meshwright.plan.hlo import compiled_collectives

from .laws import Way, agree, assert_same, tensor, ways

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import handwritten_spatial
import resnet
import unet

KEY = jax.random.key(0)


def parts(module: Any) -> tuple[list[Tensor], Any]:
    """A module's parameters, and what makes them a module again."""
    return jax.tree.flatten(module, is_leaf=lambda x: isinstance(x, Tensor))


def random_parts(module: Any) -> tuple[list[Tensor], Any]:
    """The same with scales and shifts that are not all alike, so that a mix-up shows."""
    leaves, tree = parts(module)
    return [x + 0.1 * tensor(*x.dims, seed=i, role=x.role) if x.ndim == 1 else x for i, x in enumerate(leaves)], tree


# The modules


def test_a_conv_is_jaxs() -> None:
    channels, features = mw.dims(channels=4, features=6)
    x = tensor(*mw.dims(batch=2, rows=9, columns=8), channels)
    layer = Conv("rows columns", channels, features, size={"rows": 3}, strides={"columns": 2}, key=KEY, bias=True)
    assert layer.kernel.dims == mw.dims(kernel_rows=3, kernel_columns=1, channels=4, features=6)
    assert layer.bias is not None and layer.kernel.role == layer.bias.role == "parameter"
    expected = lax.conv_general_dilated(
        x.array, layer.kernel.array, (1, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(layer(x).array, expected, rtol=1e-5, atol=1e-5)
    shifted = Conv("rows", channels, features, key=KEY, padding={"rows": [2, 0]}, bias=True)
    jax.jit(lambda layer, x: layer(x))(shifted, x)  # its structure has a hash
    assert shifted(x).size("rows") == 9


def test_a_transposed_conv_is_jaxs() -> None:
    channels, features = mw.dims(channels=4, features=6)
    x = tensor(*mw.dims(batch=2, rows=5, columns=4), channels)
    layer = ConvTranspose("rows columns", channels, features, size=3, key=KEY)
    numbers = ("NHWC", "HWIO", "NHWC")
    expected = lax.conv_transpose(x.array, layer.kernel.array, (2, 2), "SAME", dimension_numbers=numbers)
    np.testing.assert_allclose(layer(x).array, expected, rtol=1e-5, atol=1e-5)


def test_layers_keep_the_variance() -> None:
    channels, features = mw.dims(channels=64, features=64)
    x = mw.random.normal(KEY, (mw.Dim("batch", 4), *mw.dims(rows=16, columns=16), channels))
    layers = {
        "conv": Conv("rows columns", channels, features, padding="VALID", key=KEY),
        "transposed": ConvTranspose("rows columns", channels, features, key=KEY),
        "overlapping": ConvTranspose("rows columns", channels, features, size=4, key=KEY, padding=1),
        "depthwise": Conv("rows columns", (), channels, padding="VALID", key=KEY),
    }
    for name, layer in layers.items():
        assert float(layer(x).var()) == pytest.approx(1, abs=0.15), name
    assert float(Conv("rows", channels, features, key=KEY, scale=2)(x).var()) == pytest.approx(2, abs=0.3)


def test_a_group_norm_is_numpys() -> None:
    x = tensor(*mw.dims(batch=2, rows=4, channels=6, columns=8)) + 100
    (scale, shift), tree = random_parts(GroupNorm(mw.Dim("channels", 6), 3, "rows columns"))
    found = jax.tree.unflatten(tree, (scale, shift))(x)
    groups = np.asarray(x.array, np.float64).reshape(2, 4, 3, 2, 8)
    mean, variance = (f(groups, axis=(1, 3, 4), keepdims=True) for f in (np.mean, np.var))
    normal = ((groups - mean) / np.sqrt(variance + 1e-5)).reshape(2, 4, 6, 8)
    expected = normal * np.asarray(scale.array)[:, None] + np.asarray(shift.array)[:, None]
    np.testing.assert_allclose(found.array, expected, rtol=1e-3, atol=1e-3)
    assert found.dims == x.dims and jax.tree.unflatten(tree, (scale, shift))(x.astype("bfloat16")).dtype == jnp.bfloat16


def test_what_modules_refuse() -> None:
    channels = mw.Dim("channels", 6)
    with pytest.raises(ValueError, match=r"4 groups do not divide channels=6\. These do: 1, 2, 3, 6"):
        GroupNorm(channels, 4, "rows")
    with pytest.raises(ValueError, match=r"'channels'.*twice"):
        Conv("rows", channels, channels, key=KEY)
    with pytest.raises(ValueError, match=r"Conv: a size for 'row', over which no window moves.*'rows'"):
        Conv("rows", channels, mw.Dim("out", 2), size={"row": 3}, key=KEY)
    with pytest.raises(ValueError, match=r"ConvTranspose: the stride of 'rows' is 0"):
        ConvTranspose("rows", channels, mw.Dim("out", 2), strides=0, key=KEY)


GROUPS = [
    ("x=2,y=2", "rows:x, columns:y"),
    ("x=2,y=4", "rows:x, channels:y"),
    ("x=8", "channels:x"),
    ("x=2,y=2", "batch:y, rows:x"),
]


def test_a_group_norm_sends_means_only() -> None:
    x = tensor(*mw.dims(batch=4, rows=8, columns=8, channels=8))
    leaves, tree = random_parts(GroupNorm(x.dim("channels"), 4, "rows columns"))

    def normed(x: Tensor, *leaves: Tensor) -> Tensor:
        return jax.tree.unflatten(tree, leaves)(x)

    agree(normed, x, *leaves, over=ways(*GROUPS))
    for mesh, layout in GROUPS:
        rows = mw.plan(Way(mesh, layout).region(normed), x, *leaves).collectives
        assert all(row.payload_bytes <= 4 * 8 * 4 for row in rows), layout
    by_rows = mw.plan(Way(*GROUPS[0]).region(normed), x, *leaves).collectives
    assert [(row.kind, row.payload_bytes) for row in by_rows] == [("all_reduce", 4 * 4 * 4)] * 2


# The networks under many layouts


def of_resnet() -> tuple[Any, list[Tensor]]:
    """The loss of the example's network, with a stage of halved rows and columns, and its inputs."""
    leaves, tree = random_parts(resnet.ResNet((8, 16), 1, 4, KEY))
    images = tensor(*mw.dims(batch=4, rows=8, columns=8, colors=1), seed=1)
    digits = Tensor(jnp.arange(4, dtype=jnp.int32), "batch")

    def loss(images: Tensor, digits: Tensor, *leaves: Tensor) -> Any:
        return resnet.loss(jax.tree.unflatten(tree, leaves), images, digits)

    return loss, [images, digits, *leaves]


def of_unet() -> tuple[Any, list[Tensor]]:
    leaves, tree = random_parts(unet.UNet((4, 8), 2, KEY))
    volumes, labels = unet.balls(2, 8, np.random.default_rng(0))

    def loss(volumes: Tensor, labels: Tensor, *leaves: Tensor) -> Any:
        return unet.loss(jax.tree.unflatten(tree, leaves), volumes, labels)

    return loss, [volumes, labels, *leaves]


IMAGES = [
    ("x=2", "rows:x", {}),
    ("x=4", "rows:x", {}),
    ("y=4", "columns:y", {}),
    ("x=2,y=2", "rows:x, columns:y", {}),
    ("x=4,y=2", "rows:x, columns:y", {}),
    ("x=2,y=2", "rows:(x,y)", {}),
    ("x=2,y=2,z=2", "columns:(z,x), rows:y", {}),
    ("data=2,x=4", "batch:data, rows:x", {}),
    ("data=2,x=2,y=2", "batch:data, rows:x, columns:y", {}),
    ("data=2,x=2,model=2", "batch:data, rows:x, hidden:model", {}),
    ("x=2,model=4", "rows:x, channels:model", {}),
    ("x=2,model=2", "rows:x, channels_out:model, hidden:model", {}),
    ("data=4", "batch:data", {"params": "data"}),
    ("data=2,x=2,y=2", "batch:data, rows:x, columns:y", {"params": "(data,x)"}),
    ("data=2,x=2,model=2", "batch:data, columns:x, hidden:model", {"params": "data", "gather": "step"}),
    ("data=2,x=2", "batch:data, rows:x", {"params": "channels:data"}),
]
VOLUMES = [
    ("z=4", "depth:z", {}),
    ("z=2,y=2", "depth:z, rows:y", {}),
    ("z=2,y=2,x=2", "depth:z, rows:y, columns:x", {}),
    ("x=2,y=2", "rows:(x,y)", {}),
    ("x=2,y=2,z=2", "columns:(y,x), depth:z", {}),
    ("data=2,x=4", "batch:data, rows:x", {}),
    ("data=2,z=2,model=2", "batch:data, depth:z, hidden:model", {}),
    ("z=2,model=2", "depth:z, channels:model", {}),
    ("z=2,model=2", "depth:z, channels_out:model", {}),
    ("data=2,y=2", "batch:data, rows:y", {"params": "data"}),
    ("z=2,y=2,x=2", "depth:z, rows:y, columns:x", {"params": "(z,y)", "gather": "step"}),
]
TABLES = {"resnet": (of_resnet, IMAGES), "unet": (of_unet, VOLUMES)}
ALL = [(name, *row) for name, (_, rows) in TABLES.items() for row in rows]


@pytest.mark.parametrize(("name", "mesh", "layout", "options"), ALL, ids=[f"{n} {m} {r} {o}" for n, m, r, o in ALL])
def test_networks_do_not_depend_on_the_layout(name: str, mesh: str, layout: str, options: Mapping[str, Any]) -> None:
    """Loss and gradients, those with respect to the images too."""
    loss, inputs = TABLES[name][0]()
    both = ("x=4,y=2", "z=2,y=2,x=2", "x=2,model=4", "data=2,z=2,model=2")
    partitioners = ("names", "xla") if mesh in both else ("names",)
    agree(loss, *inputs, over=ways((mesh, layout), partitioners=partitioners, **options))


# What is sent


def block() -> tuple[Any, list[Tensor]]:
    """A residual block of the example, without a shortcut."""
    leaves, tree = parts(resnet.Block(8, 8, 1, KEY))
    x = tensor(*mw.dims(batch=2, rows=16, columns=16, channels=8))
    return lambda x, *leaves: jax.tree.unflatten(tree, leaves)(x), [x, *leaves]


def compiled_rows(fn: Any, sizes: Mapping[str, int], *inputs: Any) -> collections.Counter[Any]:
    """The collectives of a compiled program: kind, axes, bytes."""
    text = jax.jit(fn).lower(*inputs).compile(compiler_options={"xla_disable_hlo_passes": "cse"}).as_text()
    rows = compiled_collectives(str(text), sizes)
    return collections.Counter((row.kind, row.axes, row.payload_bytes) for row in rows for _ in range(row.times))


def planned_rows(fn: Any, *inputs: Any) -> collections.Counter[Any]:
    rows = mw.plan(fn, *inputs).collectives
    return collections.Counter((row.kind, row.axes, row.payload_bytes) for row in rows for _ in range(row.times))


def test_a_convs_halos_are_what_a_hand_counts() -> None:
    """16 x 16 pixels over 2 x 2 devices, batch 2, 3 channels, float32: 8 x 8 x 24 bytes on each. A kernel of 5 x 3
    looks at two rows on each side, and at a column on each side of the 8 rows and these four, corners among them."""
    sizes = {"x": 2, "y": 2}
    x = tensor(*mw.dims(batch=2, rows=16, columns=16, channels=3))
    w = tensor(*mw.dims(kernel_rows=5, kernel_columns=3, channels=3, features=4), seed=1)
    region = Way("x=2,y=2", "rows:x, columns:y").region(lambda x, w: mw.conv(x, w, "rows columns", inputs="channels"))
    rows, columns = ("permute", ("x",), 2 * 8 * 24), ("permute", ("y",), (2 + 8 + 2) * 1 * 24)
    expected = collections.Counter({rows: 2, columns: 2})
    assert planned_rows(region, x, w) == compiled_rows(region, sizes, x, w) == expected

    def loss(x: Tensor, w: Tensor) -> Any:
        return jnp.square(region(x, w).array).sum()

    back = jax.grad(loss, (0, 1))
    expected = collections.Counter({rows: 4, columns: 4, ("all_reduce", ("x", "y"), 5 * 3 * 3 * 4 * 4): 1})
    assert planned_rows(back, x, w) == compiled_rows(back, sizes, x, w) == expected


@pytest.mark.parametrize(
    ("taps", "dilation", "stride"),
    [(3, 1, 1), (4, 1, 1), (3, 4, 1), (3, 1, 2), (5, 2, 4), (2, 1, 2), (1, 1, 2), (7, 3, 1)],
)
def test_halos_are_the_span_less_the_stride(taps: int, dilation: int, stride: int) -> None:
    """What docs/spatial.md says, at 8 of 32 rows a device: the last one's halos come from several devices."""
    x = tensor(*mw.dims(batch=2, rows=32, columns=4, channels=3))
    w = tensor(*mw.dims(kernel_rows=taps, channels=3, features=4), seed=1)
    how = {"dilation": dilation, "strides": stride}
    region = Way("x=4", "rows:x").region(lambda x, w: mw.conv(x, w, "rows", inputs="channels", **how))
    rows = mw.plan(region, x, w).collectives
    halo = max((taps - 1) * dilation + 1 - stride, 0)
    assert sum(row.payload_bytes for row in rows) == halo * 2 * 4 * 3 * 4
    assert {row.kind for row in rows} <= {"permute"}


def test_halos_of_a_dim_over_two_axes_and_wider_than_a_slice() -> None:
    """16 rows over 2 x 4 devices are 2 each; a kernel of 3 at dilation 3 looks 3 rows up and down: the nearest
    neighbour's two, and one of the next."""
    x = tensor(*mw.dims(batch=2, rows=16, columns=4, channels=3))
    w = tensor(*mw.dims(kernel_rows=3, channels=3, features=4), seed=1)
    region = Way("x=2,y=4", "rows:(x,y)").region(lambda x, w: mw.conv(x, w, "rows", inputs="channels", dilation=3))
    row = 2 * 4 * 3 * 4
    expected = collections.Counter({("permute", ("x", "y"), 2 * row): 2, ("permute", ("x", "y"), row): 2})
    assert planned_rows(region, x, w) == compiled_rows(region, {"x": 2, "y": 4}, x, w) == expected


def test_a_transposed_conv_as_wide_as_its_stride_sends_nothing() -> None:
    x = tensor(*mw.dims(batch=2, rows=8, columns=8, channels=4))
    layer = ConvTranspose("rows columns", x.dim("channels"), mw.Dim("features", 2), key=KEY)
    region = Way("x=2,y=4", "rows:x, columns:y").region(lambda x, *leaves: layer_of(layer, leaves)(x))
    assert not mw.plan(region, x, *parts(layer)[0]).collectives


def layer_of(layer: Any, leaves: Any) -> Any:
    return jax.tree.unflatten(parts(layer)[1], leaves)


def test_a_residual_block_sends_halos_and_means() -> None:
    """8 x 8 pixels a device, batch 2, 8 channels, two convolutions of 3 x 3 and two norms of 8 groups, each with two
    means; back, the halos of both convolutions again. No activation is gathered, none is summed."""
    sizes = {"x": 2, "y": 2}
    fn, inputs = block()
    region = Way("x=2,y=2", "rows:x, columns:y").region(fn)
    pixel = 2 * 8 * 4
    halos = {("permute", ("x",), 8 * pixel): 4, ("permute", ("y",), 10 * pixel): 4}
    means = {("all_reduce", ("x", "y"), 2 * 8 * 4): 4}
    assert compiled_rows(region, sizes, *inputs) == planned_rows(region, *inputs) == halos | means

    def loss(*inputs: Any) -> Any:
        return jnp.square(region(*inputs).array).sum()

    back = jax.grad(loss, tuple(range(len(inputs))))
    found = compiled_rows(back, sizes, *inputs)
    assert found == planned_rows(back, *inputs)
    assert {row: count for row, count in found.items() if row[0] != "all_reduce"} == {
        row: 2 * count for row, count in halos.items()
    }
    sums = [num_bytes for (kind, _, num_bytes), count in found.items() for _ in range(count) if kind == "all_reduce"]
    kernel = 3 * 3 * 8 * 8 * 4
    assert sums.count(kernel) == 2 and all(num_bytes in (kernel, 8 * 4, 2 * 8 * 4) for num_bytes in sums)


@pytest.mark.parametrize("name", TABLES)
def test_networks_gather_nothing_when_space_is_split(name: str) -> None:
    """All-reduces are of parameters' gradients, means and the loss."""
    loss, inputs = TABLES[name][0]()
    mesh, layout = ("x=4,y=2", "rows:x, columns:y") if name == "resnet" else ("z=2,y=2,x=2", VOLUMES[2][1])
    region = Way(mesh, layout).region(loss)
    sizes = {axis: int(size) for axis, size in (part.split("=") for part in mesh.split(","))}
    step = jax.grad(region, tuple(range(2, len(inputs))))
    found = compiled_rows(step, sizes, *inputs)
    assert {kind for kind, _, _ in found} == {"permute", "all_reduce"}
    largest = max(x.array.size for x in inputs[2:]) * 4
    assert max(num_bytes for kind, _, num_bytes in found if kind == "all_reduce") <= largest


@pytest.mark.parametrize(
    ("mesh", "layout", "plan"),
    [
        ("x=8", "rows:x", handwritten_spatial.Plan(rows="x")),
        ("x=2,y=4", "rows:x, columns:y", handwritten_spatial.Plan(rows="x", columns="y")),
        ("data=2,x=2,y=2", "batch:data, rows:x, columns:y", handwritten_spatial.Plan("data", "x", "y")),
    ],
)
def test_a_residual_block_is_what_an_expert_writes(mesh: str, layout: str, plan: handwritten_spatial.Plan) -> None:
    """The same loss and gradients, and the same collectives, as ``jax.shard_map`` with halos by hand."""
    module = resnet.Block(8, 8, 1, KEY)
    x = tensor(*mw.dims(batch=2, rows=16, columns=16, channels=8))
    ours = jax.value_and_grad(Way(mesh, layout).region(lambda block, x: mw.mean(block(x) ** 2)))
    by_hand = handwritten_spatial.mapped_loss(mw.Mesh(mesh).jax_mesh, plan, resnet.NUM_GROUPS)
    sizes = {axis: int(size) for axis, size in (part.split("=") for part in mesh.split(","))}
    positional = handwritten_spatial.from_block(module), x.array
    with jax.numpy_rank_promotion("allow"):
        expected = jax.jit(jax.value_and_grad(by_hand))(*positional)
        wanted = compiled_rows(jax.value_and_grad(by_hand), sizes, *positional)
    value, gradient = jax.jit(ours)(module, x)
    assert_same((value, handwritten_spatial.from_block(gradient)), expected, "by hand")
    found = compiled_rows(ours, sizes, module, x)
    assert total_bytes(found) == total_bytes(wanted)


def total_bytes(rows: collections.Counter[Any]) -> dict[str, int]:
    """By kind."""
    found: collections.Counter[str] = collections.Counter()
    for (kind, _, num_bytes), count in rows.items():
        found[kind] += num_bytes * count
    return dict(found)


# The examples, as their users run them


def written(name: str, *flags: str) -> str:
    """What an example prints. Its devices are its own; XLA compiles quickly for it too (``conftest.py``)."""
    kept = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    command = [sys.executable, str(Path(__file__).parent.parent / "examples" / f"{name}.py"), *flags]
    environment = {**os.environ, "XLA_FLAGS": " ".join(kept), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"step \d+  loss ([0-9.]+)", text)]


RUNS = {
    "resnet": (
        ("--steps=20", "--batch=32"),
        (
            (),
            ("--devices=8", "--mesh=data=2,x=2,y=2", "--layout=batch:data, rows:x, columns:y", "--params=data"),
        ),
        r"test accuracy [0-9.]+% on 360 images",
    ),
    "unet": (
        ("--steps=20", "--size=8"),
        ((), ("--devices=8", "--mesh=z=2,y=2,x=2", "--layout=depth:z, rows:y, columns:x")),
        r"intersection over union [0-9.]+% on 16 volumes",
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_examples_are_the_same_under_every_layout(name: str) -> None:
    flags, layouts, ends = RUNS[name]
    found = [written(name, *flags, *layout) for layout in layouts]
    first = losses(found[0])
    assert len(first) >= 2 and first[-1] < 0.8 * first[0]
    for text in found:
        assert losses(text) == pytest.approx(first, rel=0.005) and re.search(ends, text)
    for text in found[1:]:
        assert re.search(r"permute +\d+ +[0-9.]+ KiB", text)
