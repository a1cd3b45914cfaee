"""Meshes: how they are written, what they are made of, and what they refuse."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import meshwright as mw
from meshwright.mesh import fitting_sizes
from meshwright.topology import Topology

AUTO = (AxisType.Auto, AxisType.Auto)


@pytest.mark.parametrize(
    "axes",
    [
        "data=4, model=2",
        "data:4;model:2",
        " data = 4 ,\n model = 2,",
        "data=-1, model=2",
        {"data": 4, "model": 2},
        {"data": np.int64(4), "model": -1},
        [("data", 4), ("model", 2)],
        (["data", "4"], ["model", 2]),
    ],
)
def test_every_form_is_the_same_mesh(axes: Any) -> None:
    mesh = mw.Mesh(axes)
    assert mesh == mw.Mesh("data=4, model=2") and hash(mesh) == hash(mw.Mesh("data=4, model=2"))
    assert mesh.axes == {"data": 4, "model": 2} and mesh.size == 8 and mesh.text == "data=4, model=2"
    assert mesh.jax_mesh.axis_types == AUTO
    assert mesh.jax_mesh.devices.tolist() == np.reshape(jax.devices(), (4, 2)).tolist()


def test_a_mesh_of_jax_becomes_auto() -> None:
    explicit = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Explicit, AxisType.Explicit))
    assert mw.Mesh(explicit) == mw.Mesh("data=4, model=2")
    abstract = mw.Mesh(AbstractMesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2))
    assert abstract.described and abstract.jax_mesh.axis_types == AUTO and abstract.kind == "abstract"


def test_devices_given_keep_their_order() -> None:
    last = jax.devices()[:3:-1]
    assert mw.Mesh("x=2, y=2", last).jax_mesh.devices.tolist() == [last[:2], last[2:]]
    assert mw.Mesh("x=-1", np.reshape(last, (2, 2))).devices == tuple(last)
    assert mw.Mesh("x=4", last) != mw.Mesh("x=4", last[::-1])
    assert mw.Mesh("x=4", jax.devices()[:4]).over(last) == mw.Mesh("x=4", last)


def test_a_mesh_does_not_change() -> None:
    mesh = mw.Mesh("data=8")
    with pytest.raises(dataclasses.FrozenInstanceError):
        mesh.dcn = ("data",)  # type: ignore[misc]
    mesh.axes["data"] = 3
    assert mesh.axes == {"data": 8}
    with pytest.raises(ValueError, match="read-only"):
        mesh.device_ids[0] = 1


def test_printing() -> None:
    assert repr(mw.Mesh("data=4, model=2", dcn="data")) == "Mesh('data=4, model=2', dcn=('data',))"
    assert str(mw.Mesh("data=4, model=2", dcn="data")) == (
        "Mesh of 8 devices: cpu\n  data   4  devices 0, 2, 4, 6, crosses the slow network\n  model  2  devices 0, 1"
    )
    assert str(mw.Mesh("data=64, model=8", topology="TPU:v5p:8x8x8")) == (
        "Mesh of 512 devices: TPU v5p, tpu:v5p:8x8x8\n"
        "  data   64  devices 0, 8, 16, …, 504\n"
        "  model   8  devices 0, 1, 2, 3, 4, 5, 6, 7"
    )
    described = mw.Mesh("pod=2, data=256", topology="tpu:v5e:16x16*2", dcn="pod")
    assert repr(described) == "Mesh('pod=2, data=256', topology='tpu:v5e:16x16*2', dcn=('pod',))"
    assert eval(repr(described), {"Mesh": mw.Mesh}) == described


# What does not fit


def refused(make: Callable[[], Any], kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        make()
    message = str(caught.value)
    assert "test_mesh.py" in message.splitlines()[-1], message
    return message


def test_larger_than_the_devices() -> None:
    assert refused(lambda: mw.Mesh("data=4, model=4")).startswith(
        "Mesh: 'data=4, model=4' needs 16 devices; there are 8 devices (cpu).\n"
        "  Sizes that fit 8 devices: data=2, model=4; data=4, model=2; data=1, model=8; data=8, model=1.\n"
        "  To try it without the hardware, make virtual CPU devices: --devices 16 for the commands, or set "
        "XLA_FLAGS=--xla_force_host_platform_device_count=16 before JAX starts.\n"
    )


def test_smaller_than_the_devices() -> None:
    message = refused(lambda: mw.Mesh("data=2, model=2"))
    assert "needs 4 devices; there are 8" in message
    assert "mw.Mesh('data=2, model=2', devices=jax.devices()[:4])" in message
    assert mw.Mesh("data=2, model=2", devices=jax.devices()[:4]).size == 4
    message = refused(lambda: mw.Mesh("data=-1, model=3"))
    assert "needs a multiple of 3 devices; there are 8 devices" in message and "devices=jax.devices()[:6]" in message
    message = refused(lambda: mw.Mesh("data=2", jax.devices()[:1]))
    assert "needs 2 devices; 1 device was given." in message and "Sizes that fit 1 device: data=1." in message


def test_a_topology_of_another_size() -> None:
    message = refused(lambda: mw.Mesh("data=4, model=2", topology="tpu:v3:4x4"))
    assert "the topology tpu:v3:4x4 has 32 devices (16 chips of 2)" in message
    assert "data=4, model=8; data=16, model=2;" in message
    message = refused(lambda: mw.Mesh("x=512", jax.devices(), topology="tpu:v5p:8x8x8"))
    assert "8 devices for the topology tpu:v5p:8x8x8, which has 512" in message


@pytest.mark.parametrize(
    ("axes", "kind", "says"),
    [
        (
            "data 4",
            ValueError,
            "Mesh: 'data 4' is not a name and its value. Write axis=size, as in \"data=4, model=2\".",
        ),
        ("data=4, model", ValueError, "'model' in 'data=4, model' is not a name and its value"),
        ("data=4, =2", ValueError, "'=2' in"),
        ("data=4, data=2", ValueError, "the axis 'data' stands twice in"),
        ("da-ta=8", ValueError, "'da-ta' in 'da-ta=8' is not the name of an axis"),
        ({3: 8}, ValueError, "3 in {3: 8} is not the name of an axis"),
        ("data=four", TypeError, "the size 'four' of the axis 'data' in 'data=four' is not an integer"),
        ({"data": 8.0}, TypeError, "the size 8.0 of the axis 'data'"),
        ({"data": True}, ValueError, "the axis 'data' in {'data': True} has size True"),
        ("data=0", ValueError, "the axis 'data' in 'data=0' has size 0; write a positive one, or -1 for the rest"),
        ("data=-2", ValueError, "has size -2"),
        ("a=-1, b=-1", ValueError, "leaves two sizes open"),
        ("", ValueError, "names no axis"),
        ("(data=8", ValueError, "parentheses"),
        (8, TypeError, "expected a string, a dict or pairs, found an int"),
        (["data"], TypeError, "'data' is not a pair of a name and a value"),
    ],
)
def test_what_is_not_a_mesh(axes: Any, kind: type[Exception], says: str) -> None:
    assert says in refused(lambda: mw.Mesh(axes), kind)


def test_devices_are_checked() -> None:
    device = jax.devices()[0]
    assert "stands twice in devices=" in refused(lambda: mw.Mesh("x=2", [device, device]))
    assert "devices= holds 3" in refused(lambda: mw.Mesh("x=2", [3, 4]), TypeError)
    assert "leave devices= and topology= out" in refused(lambda: mw.Mesh(mw.Mesh("x=8").jax_mesh, jax.devices()))


@given(
    sizes=st.lists(st.one_of(st.integers(1, 64), st.just(-1)), min_size=1, max_size=3),
    num=st.integers(1, 96),
)
def test_fitting_sizes_fit(sizes: list[int], num: int) -> None:
    asked = dict(zip("abc", sizes, strict=False))
    found = fitting_sizes(asked, num, limit=10**6)
    divisors = [n for n in range(1, num + 1) if num % n == 0]
    every = {fit for fit in itertools.product(divisors, repeat=len(sizes)) if math.prod(fit) == num}
    assert {tuple(fit.values()) for fit in found} == every and len(found) == len(every)
    changed = [sum(n not in (s, -1) for n, s in zip(asked.values(), fit.values(), strict=True)) for fit in found]
    assert changed == sorted(changed)


# Described devices


@pytest.mark.parametrize(
    ("text", "chips", "devices", "slices"),
    [
        ("tpu:v2:4x4", 16, 32, 1),
        ("tpu:v3:16x16", 256, 512, 1),
        ("tpu:v4:2x2x1", 4, 4, 1),
        ("tpu:v5e:16x16", 256, 256, 1),
        ("tpu:v5p:8x8x8", 512, 512, 1),
        ("tpu:v6e:4x8", 32, 32, 1),
        ("tpu:v7x:4x4x4", 64, 128, 1),
        ("tpu:v5e:16x16*4", 1024, 1024, 4),
        ("gpu:h100:4", 4, 4, 1),
        ("gpu:h100:64", 64, 64, 8),
        ("gpu:gb200:144", 144, 144, 2),
    ],
)
def test_topologies_count_what_jax_would_show(text: str, chips: int, devices: int, slices: int) -> None:
    found = Topology.parse(text)
    assert (found.num_chips, found.num_devices, found.num_slices) == (chips, devices, slices)
    assert str(found) == text and Topology.parse(str(found)) == found
    mesh = mw.Mesh({"data": -1}, topology=text, dcn="data" if slices > 1 else ())
    assert mesh.size == devices and mesh.described and mesh.num_processes == 1
    assert mesh == mw.Mesh({"data": devices}, topology=found, dcn=mesh.dcn)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("v5p:8x8x8", "has 2 of 3 fields. Write tpu:v5p:8x8x8."),
        ("H100:8", "has 2 of 3 fields. Write gpu:h100:8."),
        ("v9:8x8x8", "has 2 of 3 fields. Write platform:chip:size"),
        ("npu:v5p:8x8x8", "the platform 'npu' is unknown. Did you mean 'tpu'?"),
        ("tpu:v5q:8x8x8", "the TPU 'v5q' is unknown. Did you mean 'v5p'?"),
        ("gpu:h1000:8", "the GPU 'h1000' is unknown. Did you mean 'h100'?"),
        ("tpu:v5p:8x8", "the size '8x8' in 'tpu:v5p:8x8' does not suit v5p: it has 3 positive sizes"),
        ("tpu:v5e:0x8", "as 'tpu:v5e:8x8'"),
        ("tpu:v5e:8x8*0", "does not suit v5e"),
        ("gpu:h100:eight", "it has a count, as 'gpu:h100:8'"),
        (
            "gpu:h100:12",
            "12 GPUs in 'gpu:h100:12' do not fill domains of 8, which one fast network joins.\n  Write 8, 16",
        ),
    ],
)
def test_what_is_not_a_topology(text: str, says: str) -> None:
    assert says in refused(lambda: mw.Mesh("data=8", topology=text))


def test_a_program_is_traced_for_devices_that_are_not_there() -> None:
    batch, embed, ff = mw.dims(batch=4096, embed=1024, ff=8192)
    mesh = mw.Mesh("data=64, model=8", topology="tpu:v5p:8x8x8")

    def loss(w: mw.Tensor, x: mw.Tensor) -> Any:
        return mw.mean(mw.dot(x, w, over="embed"))

    w = jax.eval_shape(lambda: mw.Tensor(jnp.zeros((1024, 8192)), (embed, ff), "parameter"))
    x = jax.eval_shape(lambda: mw.Tensor(jnp.zeros((4096, 1024)), (batch, embed)))
    for partitioner in ("names", "xla"):
        step = jax.value_and_grad(
            mw.spmd(loss, mesh, mw.Layout("batch:data, ff:model", params="embed:data"), partitioner=partitioner)
        )
        value, gradient = jax.eval_shape(step, w, x)
        assert value.shape == () and gradient.dims == w.dims and gradient.role == "parameter"
        if partitioner == "names":
            text = str(jax.make_jaxpr(step)(w, x))
            assert text.count("all_gather[") and text.count("reduce_scatter[")


def test_a_program_does_not_run_where_there_are_no_devices() -> None:
    mesh = mw.Mesh("data=64, model=8", topology="tpu:v5p:8x8x8")
    x = mw.Tensor(jnp.ones((64, 2)), "batch embed")
    for partitioner in ("names", "xla"):
        total = mw.spmd(lambda x: mw.sum(x), mesh, "batch:data", partitioner=partitioner)
        message = refused(lambda total=total: total(x))
        assert "spmd: the mesh (data=64, model=8) is only described: it has no devices to run on" in message
        assert jax.eval_shape(lambda total=total: total(x)).shape == ()


# Axes across the slow network


def test_slow_axes() -> None:
    mesh = mw.Mesh("pod=2, data=2, model=2", dcn="pod")
    assert mesh.dcn == ("pod",) and mesh != mw.Mesh("pod=2, data=2, model=2")
    assert mw.Mesh("pod=2, data=4", dcn=("pod",)) == mw.Mesh("pod=2, data=4", dcn="(pod)")
    assert mw.Mesh("pod=2, data=4", dcn="pod, data").dcn == ("pod", "data")
    assert mw.Mesh("data=16, model=4", topology="gpu:h100:64", dcn="data").dcn == ("data",)


def test_slow_axes_that_do_not_fit() -> None:
    message = refused(lambda: mw.Mesh("pod=2, data=4", dcn="pods"))
    assert "dcn= names the axis 'pods', which the mesh (pod=2, data=4) lacks. Did you mean 'pod'?" in message
    message = refused(lambda: mw.Mesh("data=256, model=2", topology="tpu:v5e:16x16*2"))
    assert "the devices are in 2 slices. Say which axis crosses" in message
    message = refused(lambda: mw.Mesh("pod=2, data=256", topology="tpu:v5p:8x8x8", dcn="pod"))
    assert "dcn= says that pod=2 crosses the slow network, but the 512 devices are not in several slices" in message
    message = refused(lambda: mw.Mesh("data=32, model=2", topology="gpu:h100:64", dcn="model"))
    assert "in 8 slices, and the axes that cross them (dcn=, model=2) cannot hold them" in message
    assert "'p' stands twice" in refused(lambda: mw.Mesh("p=8", dcn=("p", "p")))


def test_shardings_of_the_mesh_are_jaxs_own() -> None:
    mesh = mw.Mesh("data=4, model=2")
    rows = NamedSharding(mesh.jax_mesh, PartitionSpec("data")).devices_indices_map((4,))
    for device, (index,) in rows.items():
        assert np.argwhere(mesh.device_ids == device.id)[0][0] == index.start
