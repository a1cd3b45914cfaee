"""A small training run that a test starts in two processes at once, and in its own: the same program, on one mesh.

python -m tests.two_processes PORT INDEX FILE
"""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import meshwright as mw
from meshwright import Tensor

MESH = "data=2, model=2"
LAYOUT = mw.Layout("batch:data, ff:model", params="embed:data", optimizer="data")
BATCH, EMBED, FF = mw.dims(batch=8, embed=4, ff=6)
NUM_STEPS = 3
SLICES = "pod=2, data=2"
WIDE = mw.dims(embed=128, ff=256)
"""Dims of a weight whose gradient is large enough to be summed in steps."""


def whole(seed: int, *dims: mw.Dim, role: str = "activation") -> Tensor:
    """A tensor that every process makes alike."""
    values = np.random.default_rng(seed).normal(size=[d.size for d in dims]).astype(np.float32)
    return Tensor(values, dims, role)


def loss(params: dict[str, Tensor], x: Tensor) -> Any:
    hidden = mw.tanh(mw.dot(x, params["up"], over="embed") + params["bias"])
    y = mw.dot(hidden, params["down"], over="ff")
    return mw.mean((y - x) * (y - x))


def train(mesh: mw.Mesh) -> dict[str, np.ndarray]:
    """A few steps of gradient descent with momentum on ``mesh``; the losses and all that was learnt, on the host."""
    params = {
        "up": whole(0, EMBED, FF, role="parameter"),
        "bias": whole(1, FF, role="parameter"),
        "down": whole(2, FF, EMBED, role="parameter"),
    }
    params = mw.shard(params, mesh, LAYOUT)
    momentum = mw.shard(jax.tree.map(jnp.zeros_like, params), mesh, LAYOUT, role="optimizer")
    gradient = jax.value_and_grad(mw.spmd(loss, mesh, LAYOUT))

    @jax.jit
    def step(params: Any, momentum: Any, x: Tensor) -> Any:
        value, grads = gradient(params, x)
        momentum = jax.tree.map(lambda m, g: 0.5 * m + g, momentum, grads)
        params = jax.tree.map(lambda p, m: p - 0.1 * m, params, momentum)
        return value, mw.shard(params, mesh, LAYOUT), mw.shard(momentum, mesh, LAYOUT, role="optimizer")

    losses = []
    for i in range(NUM_STEPS):
        x = mw.shard(whole(10 + i, BATCH, EMBED), mesh, LAYOUT)
        value, params, momentum = step(params, momentum, x)
        losses.append(mw.unshard(value))
    found = mw.unshard({"params": params, "momentum": momentum})
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="."): a
        for path, a in jax.tree_util.tree_leaves_with_path(found)
    }
    return {"losses": np.asarray(losses), **arrays}


def fit(up: Tensor, x: Tensor) -> Any:
    return mw.mean(mw.tanh(mw.dot(x, up, over="embed")) ** 2)


def gradient(mesh: mw.Mesh | None) -> dict[str, np.ndarray]:
    """A loss and its gradient, the batch split over both axes of ``mesh``; on one device where there is none."""
    given = whole(3, *WIDE, role="parameter"), whole(4, BATCH, WIDE[0])
    if mesh is None:
        value, found = jax.value_and_grad(fit)(*given)
    else:
        layout = mw.Layout("batch:(pod,data)")
        region = jax.jit(jax.value_and_grad(mw.spmd(fit, mesh, layout)))
        value, found = mw.unshard(region(*mw.shard(given, mesh, layout)))
    return {"fit": np.asarray(value), "gradient": np.asarray(found.array)}


def placement(mesh: mw.Mesh) -> dict[str, np.ndarray]:
    """What only a mesh over several processes can show: whose devices stand where, and what lies on this process's."""
    owners = np.vectorize(lambda d: d.process_index)(mesh.jax_mesh.devices)
    placed = mw.shard({"w": whole(0, EMBED, FF, role="parameter"), "key": jax.random.key(7)}, mesh, LAYOUT)
    kept = [s.data for s in placed["w"].raw.addressable_shards]
    again = mw.shard(placed, mesh, mw.Layout("ff:data"))
    return {
        "owners": owners,
        "slice": np.stack([np.asarray(k) for k in kept]),
        "moved": mw.unshard(again)["w"].raw,
        "key": np.asarray(jax.random.key_data(mw.unshard(placed)["key"])),
    }


def main(port: str, index: str, file: str) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index), initialization_timeout=60)
    plain, slow = mw.Mesh(MESH), mw.Mesh("model=2, data=2", dcn="data")
    assert "2 processes" in str(plain), str(plain)
    results: Any = {**train(plain), **{f"slow.{name}": a for name, a in placement(slow).items()}, **placement(plain)}
    results.update(gradient(mw.Mesh(SLICES, dcn="pod")))
    np.savez(Path(file), **results)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
