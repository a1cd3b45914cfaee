"""A feed-forward layer in rings as an expert writes it by hand: ``jax.shard_map``, permutes, and JAX's own gradients.

Tokens lie along ``length`` over the ``model`` axis (sequence parallelism), the weights' ``ff`` along the same axis. The
first product takes the place of a gather and a product, the second that of a product and a reduce-scatter. Slices go
round in one direction. The arithmetic is that of ``loss`` in ``tests/test_overlap.py``.

x (batch, length, embed)   up (embed, ff)   down (ff, embed)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P


def gather_multiply(x: jax.Array, w: jax.Array, axis: str) -> jax.Array:
    """``all_gather(x, axis, axis=1) @ w``: each device multiplies what it has while the next slice comes in."""
    num, here = lax.axis_size(axis), lax.axis_index(axis)
    batch, rows, _ = x.shape
    out = jnp.zeros((batch, rows * num, w.shape[1]), x.dtype)
    for hop in range(num):
        following = lax.ppermute(x, axis, _onward(num)) if hop < num - 1 else x
        out = lax.dynamic_update_slice_in_dim(out, x @ w, (here - hop) % num * rows, 1)
        x = following
    return out


def multiply_scatter(x: jax.Array, w: jax.Array, axis: str) -> jax.Array:
    """``psum_scatter(x @ w, axis, scatter_dimension=1)``: each sum goes round, and every device adds its addend."""
    num, here = lax.axis_size(axis), lax.axis_index(axis)
    rows = x.shape[1] // num

    def addend(hop: int) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, (here - hop) % num * rows, rows, 1) @ w

    total = addend(1)
    for hop in range(2, num + 1):
        total = lax.ppermute(total, axis, _onward(num)) + addend(hop)
    return total


def _onward(num: int) -> list[tuple[int, int]]:
    return [(device, (device + 1) % num) for device in range(num)]


def mapped_loss(mesh: Mesh, model: str, data: str | None = None) -> Callable[..., jax.Array]:
    """The mean square of what the layer adds to the residual stream, a function of (x, up, down)."""
    over = (model,) if data is None else (data, model)

    def loss(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        wide = jax.nn.silu(gather_multiply(x, up, model))
        return lax.pmean(jnp.mean(jnp.square(x + multiply_scatter(wide, down, model))), over)

    specs = P(data, model, None), P(None, model), P(model, None)
    return jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P())
