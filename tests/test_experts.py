"""A mixture of experts: against a loop in NumPy over tokens and experts, and under layouts.

The oracle sends every token through its experts one by one; it has its own queue for places and its own routers.
"""

import functools
import math
from typing import Any

import jax
import numpy as np
import pytest

import meshwright as mw
from meshwright import nn

from .laws import agree, ways

BATCH, LENGTH, EMBED, EXPERTS, FF = 8, 16, 16, 8, 16
TOKENS = mw.dims(batch=BATCH, length=LENGTH, embed=EMBED)
TABLE = [
    ("data=4", "batch:data"),
    ("data=4", "batch:data, experts:data"),
    ("data=8", "batch:data, experts:data"),
    ("data=2,expert=4", "batch:(data,expert), experts:expert"),
    ("data=2,expert=2", "batch:(expert,data), experts:expert"),
    ("data=2,expert=4", "batch:data, experts:expert"),
    ("data=2,expert=2", "batch:data, experts:(data,expert)"),
    ("data=2,model=2", "batch:data, experts:data, ff:model"),
    ("data=2,expert=2,model=2", "batch:data, experts:expert, ff:model"),
    ("context=4", "length:context"),
    ("data=2,context=2", "batch:data, experts:data, length:context"),
    ("context=2,expert=2", "length:context, experts:expert"),
    ("context=4", "length:context, experts:context"),
    ("data=2,context=2", "batch:data, length:context, experts:(data,context)"),
    ("model=2", "embed:model"),
]
LAYOUTS = [
    *ways(*TABLE),
    *ways(("data=4", "batch:data, experts:data"), ("data=4", "batch:data"), params="data"),
]
ROUTERS = ["top-1", "top-2", "sigmoid", "balanced", "hash", "expert choice"]


def _key(number: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(7), number)


def _router(kind: str) -> Any:
    embed = mw.Dim("embed", EMBED)
    if kind == "hash":
        return nn.HashRouter(EXPERTS, num_choices=2)
    if kind == "expert choice":
        return nn.ExpertChoiceRouter(embed, EXPERTS, key=_key(1))
    options: dict[str, Any] = {
        "top-1": {"num_choices": 1, "normalised": False},
        "top-2": {},
        "sigmoid": {"num_choices": 3, "scores": "sigmoid", "scale": 2.5},
        "balanced": {"scores": "sigmoid", "balanced": True},
    }[kind]
    router = nn.TopKRouter(embed, EXPERTS, key=_key(1), **options)
    if router.bias is not None:
        bias = mw.param(mw.random.normal(_key(2), router.bias.dims))
        router = jax.tree.unflatten(jax.tree.structure(router), [router.linear.weight.array, bias.array])
    return router


def _mixture(kind: str, dispatch: str = "capacity", shared: bool = False, **options: Any) -> nn.MixtureOfExperts:
    embed, experts, ff = mw.dims(embed=EMBED, experts=EXPERTS, ff=FF)
    return nn.MixtureOfExperts(
        _router(kind),
        nn.GatedExperts(embed, experts, ff, key=_key(3)),
        shared=nn.GatedMLP(embed, ff, key=_key(4)) if shared else None,
        dispatch=dispatch,
        **options,
    )


@functools.cache
def _inputs() -> tuple[mw.Tensor, mw.Tensor]:
    x = mw.random.normal(_key(5), TOKENS)
    return x, mw.random.randint(_key(6), TOKENS[:2], 0, 1000)


# The oracle


def _softmax(a: np.ndarray) -> np.ndarray:
    e = np.exp(a - a.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _murmur(ids: np.ndarray) -> np.ndarray:
    h = [int(i) & 0xFFFFFFFF for i in ids.reshape(-1)]
    out = []
    for v in h:
        v ^= v >> 16
        v = v * 0x85EBCA6B & 0xFFFFFFFF
        v ^= v >> 13
        v = v * 0xC2B2AE35 & 0xFFFFFFFF
        out.append(v ^ v >> 16)
    return np.array(out, np.uint32).reshape(ids.shape)


def _chosen(kind: str, mixture: nn.MixtureOfExperts) -> list[tuple[int, int, int, int, float]]:
    """Every (sequence, token, choice, expert, weight), by hand."""
    x, ids = (np.asarray(t.array) for t in _inputs())
    found = []
    if kind == "hash":
        first = _murmur(ids) % EXPERTS
        for b, t, c in np.ndindex(BATCH, LENGTH, 2):
            found.append((b, t, c, (int(first[b, t]) + c) % EXPERTS, 0.5))
        return found
    router: Any = mixture.router
    logits = x.astype(np.float64) @ np.asarray(router.linear.weight.array, np.float64)
    if kind == "expert choice":
        scores, capacity = _softmax(logits), math.ceil(mixture.factor * LENGTH * mixture.num_choices / EXPERTS)
        for b, e in np.ndindex(BATCH, EXPERTS):
            found += [(b, int(t), 0, e, scores[b, t, e]) for t in np.argsort(-scores[b, :, e])[:capacity]]
        return found
    scores = _softmax(logits) if router.scores == "softmax" else 1 / (1 + np.exp(-logits))
    bias = 0 if router.bias is None else np.asarray(router.bias.array)
    for b, t in np.ndindex(BATCH, LENGTH):
        best = np.argsort(-(scores[b, t] + bias))[: router.num_choices]
        weights = scores[b, t, best]
        weights = router.scale * (weights / weights.sum() if router.normalised else weights)
        found += [(b, t, c, int(e), w) for c, (e, w) in enumerate(zip(best, weights, strict=True))]
    return found


def _placed(chosen: list[Any], capacity: int) -> tuple[list[Any], np.ndarray]:
    """Those for which there is a place, and how many in each sequence found none."""
    taken: dict[tuple[int, int], int] = {}
    kept, dropped = [], np.zeros(BATCH)
    for each in sorted(chosen, key=lambda c: (c[0], c[2], c[1])):
        b, _, _, e, _ = each
        taken[b, e] = taken.get((b, e), 0) + 1
        if taken[b, e] <= capacity:
            kept.append(each)
        else:
            dropped[b] += 1
    return kept, dropped


def _dense(experts: nn.GatedExperts, chosen: list[Any]) -> np.ndarray:
    """Every token through every expert, and what was chosen of it."""
    x = np.asarray(_inputs()[0].array, np.float64)
    gate, up, down = (np.asarray(w.array, np.float64) for w in (experts.gate, experts.up, experts.down))
    every = []
    for e in range(EXPERTS):
        h = x @ gate[e]
        every.append((h / (1 + np.exp(-h)) * (x @ up[e])) @ down[e])
    y = np.zeros_like(x)
    for b, t, _, e, w in chosen:
        y[b, t] += w * every[e][b, t]
    return y


def _close(found: mw.Tensor, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(found.array), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("factor", [0.5, 1.25, 8.0])
@pytest.mark.parametrize("kind", ROUTERS)
def test_capacity_against_a_loop_over_experts(kind: str, factor: float) -> None:
    mixture = _mixture(kind, factor=factor)
    x, ids = _inputs()
    y, metrics = jax.jit(lambda x, ids: mixture(x, ids=ids))(x, ids)
    chosen = _chosen(kind, mixture)
    if kind == "expert choice":
        seen = {(b, t) for b, t, _, _, _ in chosen}
        kept, dropped = chosen, np.array([LENGTH - sum(b == g for g, _ in seen) for b in range(BATCH)])
    else:
        capacity = min(LENGTH, math.ceil(factor * LENGTH * mixture.num_choices / EXPERTS))
        kept, dropped = _placed(chosen, capacity)
        assert (dropped.sum() > 0) == (factor < 8)
    _close(y, _dense(mixture.experts, kept))
    _close(metrics.num_dropped, dropped)


@pytest.mark.parametrize("kind", [k for k in ROUTERS if k != "expert choice"])
def test_dropless_against_a_loop_over_experts(kind: str) -> None:
    mixture = _mixture(kind, "dropless")
    x, ids = _inputs()
    y, metrics = jax.jit(lambda x, ids: mixture(x, ids=ids))(x, ids)
    _close(y, _dense(mixture.experts, _chosen(kind, mixture)))
    _close(metrics.num_dropped, np.zeros(BATCH))


def test_metrics_against_numpy() -> None:
    mixture = _mixture("top-2")
    x, _ = _inputs()
    _, metrics = mixture(x)
    load = np.zeros((BATCH, EXPERTS))
    for b, _, _, e, _ in _chosen("top-2", mixture):
        load[b, e] += 1 / (2 * LENGTH)
    router: Any = mixture.router
    logits = np.asarray(x.array, np.float64) @ np.asarray(router.linear.weight.array, np.float64)
    _close(metrics.load, load)
    _close(metrics.balance_loss, EXPERTS * (load * _softmax(logits).mean(1)).sum(-1))
    _close(metrics.z_loss, (np.log(np.exp(logits).sum(-1)) ** 2).mean(1))


def test_shared_experts_are_added() -> None:
    x, ids = _inputs()
    with_shared, without = _mixture("hash", shared=True), _mixture("hash")
    assert with_shared.shared is not None
    _close(with_shared(x, ids=ids)[0], np.asarray((without(x, ids=ids)[0] + with_shared.shared(x)).array))


# Layouts


def _program(mixture: nn.MixtureOfExperts, x: mw.Tensor, ids: mw.Tensor) -> Any:
    y, metrics = mixture(x, ids=ids)
    return {"y": y, **metrics._asdict()}


def _leaves(mixture: nn.MixtureOfExperts) -> tuple[list[Any], Any]:
    leaves, tree = jax.tree.flatten(mixture, is_leaf=lambda t: isinstance(t, mw.Tensor))

    def program(x: mw.Tensor, ids: mw.Tensor, *leaves: Any) -> Any:
        return _program(jax.tree.unflatten(tree, leaves), x, ids)

    return leaves, program


@pytest.mark.parametrize("kind", ROUTERS)
def test_capacity_does_not_depend_on_the_layout(kind: str) -> None:
    leaves, program = _leaves(_mixture(kind, shared=True, factor=1.0))
    over = LAYOUTS if kind in ("top-2", "expert choice") else [w for w in LAYOUTS if w.partitioner == "names"][::3]
    agree(program, *_inputs(), *leaves, over=over)


@pytest.mark.parametrize("kind", ["top-2", "hash"])
def test_dropless_does_not_depend_on_the_layout(kind: str) -> None:
    leaves, program = _leaves(_mixture(kind, "dropless", shared=kind == "top-2"))
    agree(program, *_inputs(), *leaves, over=LAYOUTS if kind == "top-2" else LAYOUTS[::4])
