"""A mixture of experts: against a loop in NumPy over tokens and experts, and under layouts.

The oracle sends every token through its experts one by one; it has its own queue for places and its own routers.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshwright as mw
from meshwright import nn
from meshwright.nn.experts import places
from meshwright.plan.hlo import compiled_collectives

from .laws import Way, agree, assert_same, outcome, ways
from .stablehlo import counted

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


def _biased(router: nn.TopKRouter, bias: mw.Tensor) -> nn.TopKRouter:
    changed: nn.TopKRouter = eqx.tree_at(lambda r: r.bias, router, bias, is_leaf=lambda t: isinstance(t, mw.Tensor))
    return changed


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
        router = _biased(router, bias)
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


def _close(found: mw.Tensor | jax.Array, expected: Any) -> None:
    assert isinstance(found, mw.Tensor)
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


def _leaves(module: Any, fn: Callable[..., Any] = _program) -> tuple[list[Any], Any]:
    """The parameters of a module, and ``fn`` of it as a function of the inputs and of these."""
    leaves, tree = jax.tree.flatten(module, is_leaf=lambda t: isinstance(t, mw.Tensor))

    def program(x: mw.Tensor, ids: mw.Tensor, *leaves: Any) -> Any:
        return fn(jax.tree.unflatten(tree, leaves), x, ids)

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


def _decisions(mixture: nn.MixtureOfExperts, x: mw.Tensor, ids: mw.Tensor) -> Any:
    """Integers: who goes where, and what is dropped. (And the result, for which layouts have their rules.)"""
    y, metrics = mixture(x, ids=ids)
    num_dropped = metrics.num_dropped.astype("int32")
    if isinstance(mixture.router, nn.ExpertChoiceRouter):
        return mixture.router(x, mw.Dim("capacity", 4)).source, num_dropped, y
    chosen = mixture.router(x, ids)
    slots, _ = places(chosen, EXPERTS, mw.Dim("capacity", 3))
    return chosen.experts, slots.source, num_dropped, y


@pytest.mark.parametrize("kind", ROUTERS)
def test_decisions_are_the_same_to_the_last_one(kind: str) -> None:
    """``agree`` compares integers exactly."""
    leaves, program = _leaves(_mixture(kind, factor=0.75), _decisions)
    over = LAYOUTS if kind == "balanced" else LAYOUTS[::3]
    agree(program, *_inputs(), *leaves, over=over, grads=False)


@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
def test_microbatches_and_no_batch_change_nothing(dispatch: str) -> None:
    mixture = _mixture("top-2", dispatch, factor=0.5)
    leaves, program = _leaves(mixture)
    inputs = (*_inputs(), *leaves)
    expected = outcome(program, inputs, None, grads=False)
    found = outcome(program, inputs, Way("data=2", "batch:data, experts:data", {"microbatches": 2}), grads=False)
    assert_same(found, expected, "microbatches")
    first = tuple(t[{"batch": 3}] for t in _inputs())
    for way in (Way("expert=4", "experts:expert"), Way("context=4", "length:context, experts:context")):
        alone = outcome(program, (*first, *leaves), way, grads=False)
        np.testing.assert_allclose(alone["y"].array, expected["y"].array[3], rtol=1e-5, atol=1e-5)
        assert alone["num_dropped"] == expected["num_dropped"].array[3]


def test_bfloat16_is_routed_in_float32() -> None:
    x, ids = _inputs()
    for dispatch in ("capacity", "dropless"):
        y, metrics = _mixture("top-2", dispatch)(x.astype("bfloat16"), ids=ids)
        assert y.dtype == jnp.bfloat16 and {m.dtype for m in metrics} == {jnp.dtype("float32")}


# What it communicates


def _totals(rows: Any) -> dict[str, int]:
    """Bytes by kind."""
    found: dict[str, int] = {}
    for row in rows:
        found[row.kind] = found.get(row.kind, 0) + row.times * row.payload_bytes
    return found


ALL_TO_ALL = [
    ("data=4", "batch:data, experts:data", 4, 1),
    ("data=2,expert=4", "batch:(data,expert), experts:expert", 4, 2),
    ("data=2,expert=2", "batch:(expert,data), experts:expert", 2, 2),
    ("data=2,expert=2", "batch:(data,expert), experts:(data,expert)", 4, 1),
]


@pytest.mark.parametrize(("mesh", "layout", "num_devices", "num_others"), ALL_TO_ALL)
@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
def test_dispatch_is_one_all_to_all_each_way(
    dispatch: str, mesh: str, layout: str, num_devices: int, num_others: int
) -> None:
    """In the compiled program, whose bytes are the plan's: the tokens there and back, and dropless the counts of rows.
    ``num_others``: devices along the axes of the batch that are not the experts'."""
    mixture = _mixture("top-2", dispatch)
    leaves, program = _leaves(mixture)
    run = jax.jit(Way(mesh, layout).region(lambda *inputs: program(*inputs)["y"]))
    sizes = {axis: int(size) for axis, size in (part.split("=") for part in mesh.split(","))}
    text = str(run.lower(*_inputs(), *leaves).compile().as_text())
    found = _totals(mw.plan(run, *_inputs(), *leaves).collectives)
    assert found == _totals(compiled_collectives(text, sizes))
    assert counted(run, *_inputs(), *leaves) == {"all_to_all": 2 if dispatch == "capacity" else 3}
    groups = BATCH // num_others // num_devices  # on a device
    capacity = math.ceil(1.25 * LENGTH * 2 / EXPERTS)
    if dispatch == "capacity":
        expected = 2 * groups * EXPERTS * capacity * EMBED * 4
    else:
        rows = num_devices * groups * LENGTH * min(2, EXPERTS // num_devices)
        expected = 2 * rows * EMBED * 4 + EXPERTS * 4
    assert found == {"all_to_all": expected}


@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
@pytest.mark.parametrize(
    ("mesh", "layout", "expected"),
    [
        ("data=2,expert=2", "batch:data, experts:expert", {"all_reduce": 1}),
        ("data=2,model=2", "batch:data, experts:data, ff:model", {"all_reduce": 1}),
        ("expert=2,model=2", "experts:expert, ff:model", {"all_reduce": 1}),
    ],
)
def test_sums_wait_until_tokens_are_whole(dispatch: str, mesh: str, layout: str, expected: dict[str, int]) -> None:
    """One all-reduce of the tokens, not of the places, for shares of experts and of widths together, and for the
    shared layer as well."""
    leaves, program = _leaves(_mixture("top-2", dispatch, shared="batch" in layout))
    run = Way(mesh, layout).region(lambda *inputs: program(*inputs)["y"])
    found = {k: n for k, n in counted(run, *_inputs(), *leaves).items() if k != "all_to_all"}
    assert found == expected
    p = mw.plan(jax.jit(run), *_inputs(), *leaves)
    (sum_bytes,) = [row.payload_bytes for row in p.collectives if row.kind == "all_reduce"]
    assert sum_bytes == BATCH * LENGTH * EMBED * 4 // (2 if "batch" in layout else 1)


def test_a_split_length_gathers_no_tokens() -> None:
    leaves, program = _leaves(_mixture("top-2"))
    run = jax.jit(Way("context=4", "length:context, experts:context").region(lambda *a: program(*a)["y"]))
    rows = mw.plan(run, *_inputs(), *leaves).collectives
    gathered = [row.payload_bytes for row in rows if row.kind == "all_gather"]
    assert gathered and max(gathered) < BATCH * LENGTH * EMBED * 4
    assert sum(row.kind == "reduce_scatter" for row in rows) == 2


def _sizes_in(jaxpr: Any) -> list[int]:
    found = []
    for eqn in jaxpr.eqns:
        found += [math.prod(v.aval.shape) for v in eqn.outvars]
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if (body := getattr(inner, "jaxpr", inner)) is not inner or type(inner).__name__ == "Jaxpr":
                    found += _sizes_in(getattr(body, "jaxpr", body))
    return found


@pytest.mark.parametrize(
    ("dispatch", "rules"),
    [
        ("capacity", "batch:data, ff:data"),
        ("capacity", "batch:data, ff:(model,data)"),
        ("dropless", "batch:data, ff:data"),
        ("dropless", "batch:data, ff:(model,data)"),
        ("dropless", "choices:data, ff:data"),
        ("dropless", "choices:data, embed:data"),
    ],
)
def test_an_axis_of_the_tokens_does_not_split_an_expert(dispatch: str, rules: str) -> None:
    """Each device along it has other rows: a sum over the width would add up those of different tokens."""
    leaves, program = _leaves(_mixture("top-2", dispatch))
    inside = mw.spmd(program, mw.Mesh("data=2, model=4"), mw.Layout(rules))
    with pytest.raises(ValueError, match="both split over the axis 'data'"):
        inside(*_inputs(), *leaves)


@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
def test_nothing_is_of_tokens_by_experts_by_places(dispatch: str) -> None:
    length, capacity = 256, math.ceil(1.25 * 256 * 2 / EXPERTS)
    x = mw.random.normal(_key(8), mw.dims(batch=2, length=length, embed=EMBED))
    leaves, program = _leaves(_mixture("top-2", dispatch))

    def total(leaves: Any) -> Any:
        return mw.sum(program(x, mw.zeros(x.dims[:2], "int32"), *leaves)["y"])

    sizes = _sizes_in(jax.make_jaxpr(jax.grad(total))(leaves).jaxpr)
    places_with_tokens, picks_with_tokens = 2 * EXPERTS * capacity * EMBED, 2 * length * 2 * EMBED
    assert max(sizes) == (places_with_tokens if dispatch == "capacity" else picks_with_tokens)
    assert max(sizes) * 8 < 2 * length * EXPERTS * capacity


def test_dropless_counts_the_work_of_the_rows() -> None:
    leaves, program = _leaves(_mixture("top-2", "dropless"))
    p = mw.plan(jax.jit(lambda *inputs: program(*inputs)["y"]), *_inputs(), *leaves)
    rows = BATCH * LENGTH * 2
    assert p.flops.matmul == 2 * BATCH * LENGTH * EMBED * EXPERTS + 3 * 2 * rows * EMBED * FF


# Bounds and mistakes


def test_a_bound_keeps_what_it_has_room_for_and_counts_the_rest() -> None:
    """Every token wants expert 0: of the rows for its device, a bound of 1 keeps as many as an even share is."""
    router = nn.HashRouter(EXPERTS)
    embed, experts, ff = mw.dims(embed=EMBED, experts=EXPERTS, ff=FF)
    gated = nn.GatedExperts(embed, experts, ff, key=_key(3))
    x, ids = _inputs()
    same = mw.zeros_like(ids)
    for mesh, layout, num_kept in (
        ("data=4", "batch:data, experts:data", 4 * (BATCH // 4 * LENGTH // 4)),
        ("expert=4", "experts:expert", BATCH * LENGTH // 4),
    ):
        leaves, program = _leaves(
            nn.MixtureOfExperts(router, gated, dispatch="dropless", bound=1.0), lambda m, x, ids: m(x, ids=ids)
        )
        run = jax.jit(Way(mesh, layout).region(program))
        for these, num in ((ids, None), (same, num_kept)):
            y, metrics = run(x, these, *leaves)
            whole, _ = nn.MixtureOfExperts(router, gated, dispatch="dropless")(x, ids=these)
            kept = np.abs(np.asarray(y.array)).sum(-1) > 0
            assert (~kept).sum() == np.asarray(metrics.num_dropped.array).sum()
            assert num is None or kept.sum() == num
            np.testing.assert_allclose(y.array[kept], whole.array[kept], rtol=1e-5, atol=1e-5)


def test_mistakes_are_told() -> None:
    embed, experts, ff = mw.dims(embed=EMBED, experts=EXPERTS, ff=FF)
    gated, router = nn.GatedExperts(embed, experts, ff, key=_key(3)), _router("top-2")
    with pytest.raises(ValueError, match=r"there is no dispatch 'dropfree'. Did you mean 'dropless'"):
        nn.MixtureOfExperts(router, gated, dispatch="dropfree")
    with pytest.raises(ValueError, match='Write dispatch="capacity" with an ExpertChoiceRouter'):
        nn.MixtureOfExperts(_router("expert choice"), gated, dispatch="dropless")
    with pytest.raises(ValueError, match=r"factor=0; it must be positive. 1 is the even share"):
        nn.MixtureOfExperts(router, gated, factor=0)
    with pytest.raises(ValueError, match=r"chooses by the tokens' ids. Write experts\(x, ids=ids\)"):
        nn.MixtureOfExperts(nn.HashRouter(EXPERTS), gated)(_inputs()[0])
    with pytest.raises(ValueError, match="num_choices=9; a token chooses from 1 to num_experts=8"):
        nn.TopKRouter(embed, EXPERTS, key=_key(1), num_choices=9)
    with pytest.raises(ValueError, match=r"there are no scores 'sigmod'. Did you mean 'sigmoid'"):
        nn.TopKRouter(embed, EXPERTS, key=_key(1), scores="sigmod")


# Routers' own


def test_jitter_is_the_same_under_every_layout_and_needs_a_key() -> None:
    router = nn.TopKRouter(mw.Dim("embed", EMBED), EXPERTS, key=_key(1), jitter=0.3)
    key = _key(9)
    plain, shaken = (router(_inputs()[0], key=k).weights.array for k in (None, key))
    assert np.abs(plain - shaken).max() > 1e-3
    noise = np.asarray(jax.random.uniform(key, (BATCH, LENGTH, EMBED), minval=0.7, maxval=1.3))
    by_hand = router(mw.Tensor(_inputs()[0].array * noise, TOKENS))
    np.testing.assert_allclose(by_hand.weights.array, shaken, rtol=1e-5)
    leaves, program = _leaves(router, lambda router, x, ids: tuple(router(x, ids, key)[:2]))
    over = ways(
        ("data=4", "batch:data"), ("context=2", "length:context"), ("data=2,model=2", "batch:data, embed:model")
    )
    agree(program, *_inputs(), *leaves, over=over, grads=False)


def test_the_bias_evens_the_load_and_changes_no_weight() -> None:
    router: Any = _router("balanced")
    bias, x = router.bias * 0.0, _inputs()[0]
    spread = []
    for _ in range(60):
        router = _biased(router, mw.param(bias))
        load = nn.routing.load_of(router(x).experts, EXPERTS)
        spread.append(float(mw.max(mw.mean(load, "batch"))))
        bias = nn.next_bias(bias, load, rate=0.01)
    assert spread[-1] < 1.2 / EXPERTS < spread[0]
    load = mw.Tensor(np.array([[0.5, 0.25, 0.25, 0.0], [0.5, 0.25, 0.25, 0.0]], np.float32), "batch routes")
    moved = nn.next_bias(mw.zeros(mw.Dim("routes", 4)), load, rate=0.5)
    np.testing.assert_array_equal(moved.array, [-0.5, 0.0, 0.0, 0.5])


def _second(**options: Any) -> nn.TopKRouter:
    return nn.TopKRouter(mw.Dim("embed", EMBED), EXPERTS, key=_key(1), random_second=True, **options)


def test_a_second_choice_is_drawn_by_its_weight() -> None:
    """GShard, algorithm 1: where 2 x g2 > a number drawn from 0 to 1. Without a key all are used."""
    router, plain, (x, _), key = _second(), _router("top-2"), _inputs(), _key(9)
    always, drawn = plain(x), router(x, key=key)
    np.testing.assert_array_equal(router(x).experts.array, always.experts.array)
    np.testing.assert_array_equal(drawn.weights.array, always.weights.array)
    number = np.asarray(jax.random.uniform(jax.random.fold_in(key, 1), (BATCH, LENGTH)))
    used = number < 2 * np.asarray(always.weights.array)[..., 1]
    assert 0.2 < used.mean() < 0.98
    first, second = np.moveaxis(np.asarray(drawn.experts.array), -1, 0)
    np.testing.assert_array_equal(first, always.experts.array[..., 0])
    np.testing.assert_array_equal(second, np.where(used, always.experts.array[..., 1], EXPERTS))
    shares = [float(nn.routing.load_of(c.experts, EXPERTS).array.sum()) for c in (always, drawn)]
    np.testing.assert_allclose(shares, BATCH, rtol=1e-6)


def test_the_chance_of_a_second_choice_is_twice_its_share() -> None:
    router, (x, _) = _second(normalised=False, scores="sigmoid", scale=2.5), _inputs()
    weights = router(x).weights.array
    used = np.mean([router(x, key=_key(i)).experts.array[..., 1] < EXPERTS for i in range(200)], 0)
    chance = np.minimum(1.0, 2 * weights[..., 1] / weights.sum(-1))
    assert np.abs(used - chance).max() < 0.2 and abs(used.mean() - chance.mean()) < 0.01


def _drawn(mixture: nn.MixtureOfExperts, x: mw.Tensor, ids: mw.Tensor) -> Any:
    y, metrics = mixture(x, key=_key(9))
    return {"y": y, **metrics._asdict()}


@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
def test_a_second_choice_not_drawn_goes_nowhere_under_every_layout(dispatch: str) -> None:
    embed, experts, ff = mw.dims(embed=EMBED, experts=EXPERTS, ff=FF)
    gated, router = nn.GatedExperts(embed, experts, ff, key=_key(3)), _second(jitter=0.1)
    mixture = nn.MixtureOfExperts(router, gated, dispatch=dispatch, factor=0.75)
    leaves, program = _leaves(mixture, _drawn)
    over = [*LAYOUTS[::4], Way("data=2", "batch:data, experts:data", {"microbatches": 2})]
    agree(program, *_inputs(), *leaves, over=over)
    chosen = router(_inputs()[0], key=_key(9))
    each = np.ndenumerate(np.asarray(chosen.experts.array))
    whom = [(*at, int(e), float(chosen.weights.array[at])) for at, e in each if e < EXPERTS]
    capacity = math.ceil(0.75 * LENGTH * 2 / EXPERTS) if dispatch == "capacity" else LENGTH
    kept, num_dropped = _placed(whom, capacity)
    found = program(*_inputs(), *leaves)
    assert len(whom) < 2 * BATCH * LENGTH and (num_dropped.sum() > 0) == (dispatch == "capacity")
    _close(found["y"], _dense(gated, kept))
    _close(found["num_dropped"], num_dropped)


def test_a_random_second_is_of_two() -> None:
    with pytest.raises(ValueError, match=r"random_second is of two choices; num_choices=3. Write num_choices=2"):
        _second(num_choices=3)
