"""shard and unshard: values, shapes and traced values; parameters and the optimizer's state; two processes."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import meshwright as mw
from meshwright import Layout, Mesh, Tensor

from . import two_processes
from .laws import tensor

BATCH, EMBED, FF = mw.dims(batch=8, embed=8, ff=16)
LAYOUT = Layout("batch:data, ff:model", params="embed:data", optimizer="ff:data")
MESH = Mesh("data=4, model=2")


def refused(make: Callable[[], Any], kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        make()
    message = str(caught.value)
    assert "test_placing.py" in message.splitlines()[-1], message
    return message


def params() -> dict[str, Any]:
    return {"up": tensor(EMBED, FF, role="parameter"), "norm": tensor(EMBED, seed=1, role="parameter")}


def spec(x: Any) -> PartitionSpec:
    where = (x.raw if isinstance(x, Tensor) else x).sharding
    assert isinstance(where, NamedSharding)
    return where.spec


def everything() -> dict[str, Any]:
    return {
        **params(),
        "x": tensor(BATCH, EMBED, seed=2),
        "host": jax.tree.map(np.asarray, tensor(BATCH, FF, seed=3)),
        "small": tensor(FF, seed=4, dtype=jnp.bfloat16),
        "loose": np.arange(3.0),
        "key": jax.random.key(5),
        "count": 7,
        "function": jnp.tanh,
        "nothing": None,
    }


def test_every_tensor_goes_where_its_names_and_role_say() -> None:
    placed = mw.shard(everything(), MESH, LAYOUT)
    assert spec(placed["up"]) == PartitionSpec("data", "model") and spec(placed["norm"]) == PartitionSpec("data")
    assert spec(placed["x"]) == PartitionSpec("data", None)
    assert spec(placed["host"]) == PartitionSpec("data", "model") and spec(placed["small"]) == PartitionSpec("model")
    assert spec(placed["loose"]) == spec(placed["key"]) == PartitionSpec()
    assert placed["count"] == 7 and placed["function"] is jnp.tanh and placed["nothing"] is None
    assert jax.tree.structure(placed) == jax.tree.structure(everything())
    assert placed["up"].role == "parameter" and placed["x"].role == "activation"
    again = mw.shard(placed, "data=4, model=2", LAYOUT)
    assert again["up"].raw.sharding == placed["up"].raw.sharding


def test_unshard_gives_the_values_back_on_the_host() -> None:
    before = everything()
    after = mw.unshard(mw.shard(before, MESH, LAYOUT))
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for name in ("up", "norm", "x", "host", "small"):
        assert isinstance(after[name].raw, np.ndarray) and after[name].raw.dtype == before[name].raw.dtype
        np.testing.assert_array_equal(after[name].raw, before[name].raw)
    np.testing.assert_array_equal(after["loose"], before["loose"])
    assert jax.random.bits(after["key"]) == jax.random.bits(before["key"])
    assert (mw.sum(after["up"] * 2.0)) == mw.sum(before["up"] * 2.0)


def test_shapes_get_the_sharding_and_lose_it() -> None:
    described = Mesh("data=64, model=8", topology="tpu:v5p:8x8x8")
    wide = jax.eval_shape(lambda: {"w": Tensor(jnp.zeros((64, 16)), "embed ff", "parameter"), "n": jnp.zeros(3)})
    placed = mw.shard(wide, described, LAYOUT)
    assert spec(placed["w"]) == PartitionSpec("data", "model") and placed["w"].shape == (64, 16)
    assert placed["w"].raw.sharding.mesh == described.jax_mesh and spec(placed["n"]) == PartitionSpec()
    bare = mw.unshard(placed)
    assert jax.tree.leaves(bare) == jax.tree.leaves(wide) and jax.tree.structure(bare) == jax.tree.structure(wide)
    message = refused(lambda: mw.shard({"w": tensor(EMBED, FF), "v": wide["w"]}, described, Layout("ff:model")))
    assert "Mesh('data=64, model=8', topology='tpu:v5p:8x8x8') is only described" in message


def test_under_jit_it_is_a_constraint() -> None:
    @jax.jit
    def program(x: Tensor) -> Any:
        y = mw.shard(x * 2.0, MESH, LAYOUT)
        return y, mw.shard(mw.rename(y, batch="rows"), MESH, LAYOUT), mw.shard(mw.sum(y), MESH, LAYOUT)

    x = tensor(BATCH, FF)
    split, joined, total = program(x)
    assert spec(split) == PartitionSpec("data", "model") and spec(joined) == PartitionSpec(None, "model")
    np.testing.assert_array_equal(split.array, np.asarray(x.array) * 2)
    np.testing.assert_allclose(total, np.asarray(x.array).sum() * 2, rtol=1e-6)
    gradient = jax.grad(lambda x: mw.sum(mw.shard(x * x, MESH, LAYOUT)))(x)
    np.testing.assert_array_equal(gradient.array, np.asarray(x.array) * 2)


def test_the_optimizers_state_is_placed_by_its_own_rules_and_keeps_its_roles() -> None:
    here = mw.shard(params(), MESH, LAYOUT)
    optimizer = optax.adam(1e-2)
    state = mw.shard(optimizer.init(here), MESH, LAYOUT, role="optimizer")
    moments = state[0].mu
    assert spec(moments["up"]) == PartitionSpec(None, ("model", "data"))
    assert spec(moments["norm"]) == PartitionSpec(None)
    assert moments["up"].role == "parameter" and jax.tree.structure(moments) == jax.tree.structure(here)
    with jax.numpy_dtype_promotion("standard"):  # Optax raises a float to an integer power
        updates, _ = jax.jit(optimizer.update)(here, state, here)
        expected: Any = optimizer.update(params(), optimizer.init(params()), params())[0]
    np.testing.assert_allclose(updates["up"].array, expected["up"].array, rtol=1e-6)


def test_nothing_is_placed_when_something_does_not_fit() -> None:
    tree = {"a": tensor(EMBED, role="parameter"), "b": tensor(mw.Dim("embed", 6), role="parameter")}
    message = refused(lambda: mw.shard(tree, MESH, LAYOUT))
    assert "shard: b: the dim 'embed' of size 6 cannot be split at rest over 'data' (size 4)" in message
    message = refused(lambda: mw.shard({"x": [tensor(mw.Dim("batch", 6))]}, MESH, LAYOUT))
    assert "shard: x.0: the dim 'batch' of size 6 cannot be split over the axis 'data' (size 4)" in message
    assert "names the axis 'dta'" in refused(lambda: mw.shard(tree, MESH, "embed:dta"))
    message = refused(lambda: mw.shard(tensor(EMBED), MESH, LAYOUT, role="params"))
    assert "shard: the tensor: a tensor has the role 'params'. Did you mean 'parameter'?" in message


def test_what_has_no_place() -> None:
    x = tensor(BATCH, EMBED)
    inside = mw.spmd(lambda x: mw.shard(x, MESH, LAYOUT), MESH, Layout("batch:data"))
    assert "shard: inside a region tensors are placed by their names already" in refused(lambda: inside(x))
    message = refused(lambda: jax.jit(lambda t: mw.unshard(t))({"x": x}))
    assert "unshard: x is traced (under jax.jit or jax.grad): it has no values yet" in message


# Two processes


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_twice(folder: Path, port: int) -> list[str]:
    """Run the program in two processes of two devices each; what they printed, unless both succeed. Both are ended."""
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parent.parent
    logs = [folder / f"log{i}.txt" for i in range(2)]
    children: list[subprocess.Popen[bytes]] = []
    try:
        for i, log in enumerate(logs):
            command = [sys.executable, "-m", "tests.two_processes", str(port), str(i), str(folder / f"{i}.npz")]
            with log.open("wb") as out:
                children.append(subprocess.Popen(command, env=env, cwd=root, stdout=out, stderr=subprocess.STDOUT))
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and all(child.poll() in (None, 0) for child in children):
            if all(child.poll() == 0 for child in children):
                return []
            time.sleep(0.05)
    finally:
        for child in children:
            child.kill()
            child.wait()
    return [log.read_text() for log in logs]


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    failed = run_twice(tmp_path, free_port())
    if any("Failed to start RPC server" in text for text in failed):  # another program took the port meanwhile
        failed = run_twice(tmp_path, free_port())
    assert not failed, "\n\n".join(failed)
    expected = two_processes.train(Mesh(two_processes.MESH, jax.devices()[:4]))
    found = [dict(np.load(tmp_path / f"{i}.npz")) for i in range(2)]
    assert expected["losses"][-1] < expected["losses"][0]
    for name, value in expected.items():
        np.testing.assert_array_equal(found[0][name], found[1][name])
        np.testing.assert_allclose(found[0][name], value, rtol=1e-5, atol=1e-6)
    check_places(found)
    for name, value in two_processes.gradient(None).items():  # summed in steps, the second one between the processes
        np.testing.assert_array_equal(found[0][name], found[1][name])
        np.testing.assert_allclose(found[0][name], value, rtol=1e-5, atol=1e-5 * np.abs(value).max())


def check_places(found: list[dict[str, np.ndarray]]) -> None:
    """Each process's devices lie together, and across the slow axis where there is one; each keeps its own slices."""
    whole = np.asarray(two_processes.whole(0, two_processes.EMBED, two_processes.FF).array)
    for i, results in enumerate(found):
        assert results["owners"].tolist() == [[0, 0], [1, 1]] and results["slow.owners"].tolist() == [[0, 1], [0, 1]]
        np.testing.assert_array_equal(results["slice"], np.stack(np.split(whole[2 * i : 2 * i + 2], 2, axis=1)))
        np.testing.assert_array_equal(results["slow.slice"], results["slice"])
        np.testing.assert_array_equal(results["moved"], whole)
        np.testing.assert_array_equal(results["key"], jax.random.key_data(jax.random.key(7)))
