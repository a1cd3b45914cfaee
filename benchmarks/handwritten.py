"""The decoder's training step as an expert writes it by hand, twice.

``jitted``: ``jax.jit`` with sharding constraints, XLA's partitioner making the collectives.
``mapped``: ``jax.shard_map`` with explicit collectives.

Both merge batch and length into one dim for every matrix product and for what is elementwise between them, scan the
layers, sum a column-parallel input's gradient once for all the products that share it, and gather weights at rest
again in the backward pass. The arithmetic is that of ``meshwright.models.Decoder``: the losses agree to rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from meshwright.models import DecoderConfig

Params = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Which mesh axis does what; None for nothing."""

    data: str | None = None
    """Splits the batch."""
    model: str | None = None
    """Splits heads, feed-forward width and vocabulary."""
    rest: str | None = None
    """Splits parameters at rest, along ``embed``."""


def specs(plan: Plan) -> Params:
    """The partition spec of each parameter, at rest."""
    m, r = plan.model, plan.rest
    column, row, vector = P(None, r, m), P(None, m, r), P(None, r)
    return {
        "table": P(m, r), "head": P(r, m), "norm": P(r),
        "attention_norm": vector, "mlp_norm": vector,
        "q": column, "k": column, "v": column, "o": row,
        "gate": column, "up": column, "down": row,
    }  # fmt: skip


LAYERED = ("attention_norm", "mlp_norm", "q", "k", "v", "o", "gate", "up", "down")


def from_decoder(model: Any) -> Params:
    """The parameters of a ``Decoder`` as merged positional arrays."""
    block = model.blocks
    attention, mlp = block.attention, block.mlp

    def columns(w: Any) -> jax.Array:
        return w.raw.reshape(w.raw.shape[0], w.raw.shape[1], -1)

    o = attention.out.weight.raw
    return {
        "table": model.embedding.table.raw, "head": model.head.weight.raw, "norm": model.norm.scale.raw,
        "attention_norm": block.attention_norm.scale.raw, "mlp_norm": block.mlp_norm.scale.raw,
        "q": columns(attention.query.weight), "k": columns(attention.key.weight), "v": columns(attention.value.weight),
        "o": o.reshape(o.shape[0], -1, o.shape[-1]),
        "gate": mlp.gate.weight.raw, "up": mlp.up.weight.raw, "down": mlp.down.weight.raw,
    }  # fmt: skip


def norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + epsilon) * scale


def rope_table(length: int, head_dim: int, base: float) -> tuple[jax.Array, jax.Array]:
    half = head_dim // 2
    place = jnp.arange(head_dim)
    frequency = base ** ((place % half).astype(jnp.float32) * (-1.0 / half))
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency
    return jnp.cos(angles), jnp.where(place < half, -jnp.sin(angles), jnp.sin(angles))


def attention(config: DecoderConfig, q: jax.Array, k: jax.Array, v: jax.Array, length: int) -> jax.Array:
    """Grouped causal attention; q, k, v are (batch x length, heads x ...), the heads those of this device."""
    d, g = config.head_dim, config.group
    q = q.reshape(-1, length, q.shape[-1] // (g * d), g, d)
    k, v = (t.reshape(-1, length, t.shape[-1] // d, d) for t in (k, v))
    cosine, sine = rope_table(length, d, config.rope_base)

    def turn(t: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return t * cosine.reshape(shape) + jnp.roll(t, d // 2, -1) * sine.reshape(shape)

    q, k = turn(q, (1, length, 1, 1, d)), turn(k, (1, length, 1, d))
    scores = jnp.einsum("blhgd,bmhd->bhglm", q * (d**-0.5), k)
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e30)
    out = jnp.einsum("bhglm,bmhd->blhgd", jax.nn.softmax(scores, -1), v)
    return out.reshape(-1, out.shape[2] * g * d)


# jax.shard_map, collectives by hand


def mapped_loss(config: DecoderConfig, mesh: Mesh, plan: Plan) -> Callable[..., Any]:
    """The loss as a function of (params, ids, targets), through ``jax.shard_map``."""
    m, r, eps = plan.model, plan.rest, config.norm_eps

    def whole(w: jax.Array, at: int) -> jax.Array:
        return lax.all_gather(w, r, axis=at, tiled=True) if r else w

    def shared(x: jax.Array) -> jax.Array:
        return lax.pcast(x, m, to="varying") if m else x

    def summed(x: jax.Array) -> jax.Array:
        return lax.psum(x, m) if m else x

    def loss(params: Params, ids: jax.Array, targets: jax.Array) -> jax.Array:
        length = ids.shape[1]
        x = embed(params["table"], ids.reshape(-1))

        def layer(x: jax.Array, p: Params) -> tuple[jax.Array, None]:
            h = shared(norm(x, whole(p["attention_norm"], 0), eps))
            mixed = attention(config, h @ whole(p["q"], 0), h @ whole(p["k"], 0), h @ whole(p["v"], 0), length)
            x = x + summed(mixed @ whole(p["o"], 1))
            h = shared(norm(x, whole(p["mlp_norm"], 0), eps))
            wide = jax.nn.silu(h @ whole(p["gate"], 0)) * (h @ whole(p["up"], 0))
            return x + summed(wide @ whole(p["down"], 1)), None

        x, _ = lax.scan(again(layer), x, {name: params[name] for name in LAYERED}, unroll=config.unroll or 1)
        logits = again(lambda x, scale, w: shared(norm(x, whole(scale, 0), eps)) @ whole(w, 0))(
            x, params["norm"], params["head"]
        )
        mean = jnp.mean(cross_entropy(logits, targets.reshape(-1)))
        return lax.pmean(mean, plan.data) if plan.data else mean

    def again(f: Callable[..., Any]) -> Callable[..., Any]:
        """Gather again in the backward pass; everything else is kept."""
        return jax.checkpoint(f, policy=lambda p, *_, **__: "all_gather" not in p.name) if r else f

    def embed(table: jax.Array, ids: jax.Array) -> jax.Array:
        table = whole(table, 1)
        if not m:
            return table[ids]
        at = ids - lax.axis_index(m) * table.shape[0]
        mine = (at >= 0) & (at < table.shape[0])
        return lax.psum(jnp.where(mine[:, None], table[jnp.where(mine, at, 0)], 0.0), m)

    def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
        most = jnp.max(lax.stop_gradient(logits), -1)
        most = lax.pmax(most, m) if m else most
        total = summed(jnp.sum(jnp.exp(logits - most[:, None]), -1))
        at = targets - lax.axis_index(m) * logits.shape[-1] if m else targets
        mine = (at >= 0) & (at < logits.shape[-1])
        true = jnp.take_along_axis(logits, jnp.where(mine, at, 0)[:, None], -1)[:, 0]
        return jnp.log(total) + most - summed(jnp.where(mine, true, 0.0))

    batch = P(plan.data)
    return jax.shard_map(loss, mesh=mesh, in_specs=(specs(plan), batch, batch), out_specs=P())


# jax.jit with sharding constraints


def jitted_loss(config: DecoderConfig, mesh: Mesh, plan: Plan) -> Callable[..., Any]:
    """The loss as a function of (params, ids, targets), with sharding constraints for XLA's partitioner."""
    d, m, r, eps = plan.data, plan.model, plan.rest, config.norm_eps

    def put(x: jax.Array, *spec: Any) -> jax.Array:
        return lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))

    def gathered(p: Params) -> Params:
        compute = specs(Plan(d, m, None))
        return {n: put(w, *(compute[n][1:] if n in LAYERED else compute[n])) for n, w in p.items()} if r else p

    def loss(params: Params, ids: jax.Array, targets: jax.Array) -> jax.Array:
        length = ids.shape[1]
        ends = gathered({n: params[n] for n in ("table", "head", "norm")})
        x = put(ends["table"][ids.reshape(-1)], d, None)

        def layer(x: jax.Array, p: Params) -> tuple[jax.Array, None]:
            p = gathered(p)
            h = put(norm(x, p["attention_norm"], eps), d, None)
            q, k, v = (put(h @ p[n], d, m) for n in "qkv")
            x = put(x + put(attention(config, q, k, v, length), d, m) @ p["o"], d, None)
            h = put(norm(x, p["mlp_norm"], eps), d, None)
            return put(x + put(jax.nn.silu(h @ p["gate"]) * (h @ p["up"]), d, m) @ p["down"], d, None), None

        x, _ = lax.scan(layer, x, {name: params[name] for name in LAYERED}, unroll=config.unroll or 1)
        logits = put(norm(x, ends["norm"], eps) @ ends["head"], d, m)
        true = jnp.take_along_axis(logits, targets.reshape(-1)[:, None], -1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, -1) - true)

    return loss
