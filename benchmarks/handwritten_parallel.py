"""Kinds of parallelism as one writes them by hand: a loss of positional arrays under ``jax.shard_map`` for each.

They are the straightforward versions, short enough to be read at once, on the networks of ``parallel.py``: residual
layers ``x + down(tanh(up(x)))``, and attention. Each takes the mesh and gives a function of whole arrays.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

Loss = Callable[..., jax.Array]


def layer(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    return x + jnp.tanh(x @ up) @ down


def layers(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    return lax.scan(lambda x, w: (layer(x, *w), None), x, (up, down))[0]


def mapped(mesh: Any, specs: Any) -> Callable[[Loss], Loss]:
    def as_mapped(loss: Loss) -> Loss:
        return jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P())

    return as_mapped


def accumulated(mesh: Any, num: int) -> Loss:
    """Gradient accumulation, data-parallel: value and gradients of microbatches in a scan, summed at its end."""

    def value_and_gradients(up: jax.Array, down: jax.Array, x: jax.Array) -> Any:
        weights = lax.pcast((up, down), "data", to="varying")

        def of_part(weights: Any, part: jax.Array) -> jax.Array:
            return jnp.mean(layers(part, *weights) ** 2) / num

        def turn(total: Any, part: jax.Array) -> Any:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(of_part)(weights, part)), None

        parts = x.reshape(num, -1, *x.shape[1:])
        first = lax.pcast(jnp.float32(0), "data", to="varying"), jax.tree.map(jnp.zeros_like, weights)
        total = lax.scan(turn, first, parts)[0]
        return lax.pmean(total, "data")

    specs = P(), P(), P("data")
    return jax.shard_map(value_and_gradients, mesh=mesh, in_specs=specs, out_specs=(P(), (P(), P())))


def pipelined(mesh: Any, num: int) -> Loss:
    """GPipe: in each tick every device does its stage and passes on what comes out; the backward pass is JAX's."""

    def loss(up: jax.Array, down: jax.Array, x: jax.Array) -> jax.Array:
        devices, place = lax.axis_size("pipe"), lax.axis_index("pipe")
        parts = lax.pcast(x.reshape(num, -1, *x.shape[1:]), "pipe", to="varying")
        stage = jax.checkpoint(lambda x: layers(x, up, down))
        onward = [(d, d + 1) for d in range(devices - 1)]

        def tick(arrived: jax.Array, t: jax.Array) -> Any:
            y = stage(jnp.where(place == 0, parts[jnp.minimum(t, num - 1)], arrived))
            return lax.ppermute(y, "pipe", onward), y

        _, every = lax.scan(tick, jnp.zeros_like(parts[0]), jnp.arange(num + devices - 1))
        value = jnp.mean(every[devices - 1 :] ** 2)
        return lax.psum(jnp.where(place == devices - 1, value, 0.0), "pipe")

    return mapped(mesh, (P("pipe"), P("pipe"), P()))(loss)


def sequence(mesh: Any) -> Loss:
    """Tensor parallelism with the residual stream's length split: gather, two products, reduce-scatter, each layer."""

    def loss(up: jax.Array, down: jax.Array, x: jax.Array) -> jax.Array:
        def one(x: jax.Array, w: Any) -> Any:
            whole = lax.all_gather(x, "model", axis=1, tiled=True)
            y = jnp.tanh(whole @ w[0]) @ w[1]
            return x + lax.psum_scatter(y, "model", scatter_dimension=1, tiled=True), None

        x = lax.scan(one, x, (up, down))[0]
        return lax.pmean(jnp.mean(x * x), "model")

    return mapped(mesh, (P(None, None, "model"), P(None, "model"), P(None, "model")))(loss)


def ring_attention(mesh: Any, causal: bool) -> Loss:
    """Keys and values go round a ring, and each block's scores are added to an online softmax."""

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        devices, place, size = lax.axis_size("context"), lax.axis_index("context"), q.shape[1]
        onward = [(d, (d + 1) % devices) for d in range(devices)]
        mine = place * size + jnp.arange(size)

        @jax.checkpoint
        def block(total: Any, k: jax.Array, v: jax.Array, source: jax.Array) -> Any:
            most, weight, value = total
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
            if causal:
                theirs = source * size + jnp.arange(size)
                scores = jnp.where(mine[:, None] >= theirs, scores, -1e30)
            new = jnp.maximum(most, lax.stop_gradient(scores.max(-1)))
            shrink, p = jnp.exp(most - new), jnp.exp(scores - new[..., None])
            value = value * shrink[..., None] + jnp.einsum("bhqk,bkhd->bhqd", p, v)
            return new, weight * shrink + p.sum(-1), value

        batch, _, heads, head = q.shape
        zero = jnp.zeros_like(q, shape=(batch, heads, size)) + 0.0 * q[:, :, :, 0].swapaxes(1, 2)
        total = zero - 1e30, zero, zero[..., None] * jnp.ones(head)
        for step in range(devices):
            total = block(total, k, v, (place - step) % devices)
            if step < devices - 1:
                k, v = (lax.ppermute(a, "context", onward) for a in (k, v))
        _, weight, value = total
        out = value / weight[..., None]
        return lax.pmean(jnp.mean(out * out), "context")

    spec = P(None, "context")
    return mapped(mesh, (spec, spec, spec))(loss)


def hierarchical(mesh: Any) -> Loss:
    """Data parallelism over slices: gradients are scattered within a slice, summed across, and gathered again."""

    def value_and_gradients(up: jax.Array, down: jax.Array, x: jax.Array) -> Any:
        weights = lax.pcast((up, down), ("dcn", "data"), to="varying")
        value, gradients = jax.value_and_grad(lambda w: jnp.mean(layers(x, *w) ** 2))(weights)
        num = lax.axis_size(("dcn", "data"))

        def summed(g: jax.Array) -> jax.Array:
            part = lax.psum_scatter(g.reshape(-1) / num, "data", tiled=True)
            return lax.all_gather(lax.psum(part, "dcn"), "data", tiled=True, to="invarying").reshape(g.shape)

        return lax.pmean(value, ("dcn", "data")), jax.tree.map(summed, gradients)

    specs = P(), P(), P(("dcn", "data"))
    return jax.shard_map(value_and_gradients, mesh=mesh, in_specs=specs, out_specs=(P(), (P(), P())))


def experts(mesh: Any, capacity: int) -> Loss:
    """A mixture of gated experts, one choice for each token, experts and sequences on one axis: tokens are put into
    places, exchanged, worked on, exchanged again, and taken from their places."""

    def loss(weights: Any, x: jax.Array) -> jax.Array:
        router, gate, up, down = weights
        batch, num, row = x.shape[0], router.shape[1], jnp.arange(x.shape[0])[:, None]
        scores = jax.nn.softmax(x @ router)
        chosen = jnp.argmax(scores, -1)
        counts = jnp.cumsum(jax.nn.one_hot(chosen, num, dtype=jnp.int32), 1)
        place = jnp.take_along_axis(counts, chosen[..., None], 2)[..., 0] - 1
        slot = jnp.where(place < capacity, chosen * capacity + place, num * capacity)
        empty = jnp.zeros_like(x, shape=(batch, num * capacity + 1, x.shape[-1]))
        slots = empty.at[row, slot].add(x)[:, :-1]
        sent = lax.all_to_all(slots.reshape(batch, num, capacity, -1), "data", 1, 0, tiled=True)
        inner = jax.nn.silu(jnp.einsum("bxce,xef->bxcf", sent, gate)) * jnp.einsum("bxce,xef->bxcf", sent, up)
        done = lax.all_to_all(jnp.einsum("bxcf,xfe->bxce", inner, down), "data", 0, 1, tiled=True)
        done = jnp.pad(done.reshape(batch, num * capacity, -1), ((0, 0), (0, 1), (0, 0)))
        y = done[row, slot] * jnp.max(scores, -1)[..., None]
        return lax.pmean(jnp.mean(y * y), "data")

    whole, split = P(), P("data")
    return mapped(mesh, ((whole, split, split, split), split))(loss)
