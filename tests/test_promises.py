"""What a tensor promises and has not done yet: sums still to be taken, gathers still to be made, copies still to agree.

A promise changes what is sent and when, never a value. So the programs here carry promises through everything that JAX
does to functions, and are compared with one device; and the collectives of a program are counted by hand, forward and
backward.

    contracted over ff, which x splits      a sum is pending over x (``partial``)
    renamed from a split to a whole dim     a gather is to be made (``rest``)
    a parameter gathered once a step        equal on all devices, and its type does not say so (``copies``)
"""

import functools
import itertools
import operator
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshwright as mw
from meshwright import Tensor

from .laws import Way, agree, tensor, ways
from .stablehlo import communicated

BATCH, FF, EMBED, STEPS = mw.dims(batch=8, ff=16, embed=8, steps=3)
X, E = tensor(BATCH, FF), tensor(BATCH, EMBED, seed=1)
V, W, U = tensor(FF, EMBED, seed=2), tensor(EMBED, FF, seed=3), tensor(EMBED, FF, seed=4)


def _halves(program: Callable[..., Any]) -> Callable[..., Any]:
    """The program on two devices. ``ff`` is contracted, which leaves a sum pending; ``part`` is a name to rename to,
    which stands in a tensor of its own so that the layout has met it."""

    def meeting(*inputs: Any) -> Any:
        mw.zeros(mw.Dim("part", 2))
        return program(*inputs)

    return Way("x=2", "ff:x, part:x").region(meeting)


def _dot(x: Any, v: Any) -> Any:
    return mw.dot(x, v, "ff") * 0.25


def _back(region: Callable[..., Any], *inputs: Any, of: tuple[int, ...] | None = None) -> list[tuple[str, int]]:
    """What a gradient sends beyond the forward pass: that of a weighted sum, taken outside the region."""

    def total(*inputs: Any) -> Any:
        leaves = jax.tree.leaves(region(*inputs), is_leaf=lambda x: isinstance(x, Tensor))
        arrays = [x.array if isinstance(x, Tensor) else x for x in leaves]
        return sum(jnp.sum(jnp.sin(a)) for a in arrays)

    there = communicated(region, *inputs)
    both = communicated(jax.grad(total, of or tuple(range(len(inputs)))), *inputs)
    for c in there:
        both.remove(c)
    return both


# Law 1: promises carried through what JAX does to functions


@mw.custom_vjp
def _scaled_back(x: Any) -> Any:
    return x * 2.0


_scaled_back.defvjp(lambda x: (x * 2.0, None), lambda _, g: (g * 3.0,))


def _in_while(z: Any) -> Any:
    state = (jnp.int32(0), z)
    return mw.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, mw.sin(s[1]) + z), state)[1]


def _summed(x: Any, v: Any, w: Any, e: Any) -> Any:
    return _dot(x, v)


def _gathered(x: Any, v: Any, w: Any, e: Any) -> Any:
    return (e * 0.5).rename(batch="whole").rename(whole="other").rename(other="batch")


def _of_parameters(x: Any, v: Any, w: Any, e: Any) -> Any:
    """Copies, under the layouts that gather parameters once a step."""
    return v.sum("ff") * 0.1 + e


CARRIERS: dict[str, Callable[..., Any]] = {
    # z is the promising tensor; the others are settled
    "jit": lambda z, x, v, e: jax.jit(lambda z: mw.sin(z) + z)(z),
    "jit closing": lambda z, x, v, e: jax.jit(lambda e: mw.sin(z) * e)(e) + z,
    "jit giving": lambda z, x, v, e: jax.jit(_dot)(x, v) + z,
    "checkpoint": lambda z, x, v, e: jax.checkpoint(lambda z: mw.sin(z) * z)(z),
    "checkpoint closing": lambda z, x, v, e: jax.checkpoint(lambda e: mw.sin(z) * e)(e) + z * 2.0,
    "remat": lambda z, x, v, e: mw.remat(lambda z, e: mw.sin(z) * e)(z, e),
    "remat closing and giving": lambda z, x, v, e: mw.remat(lambda x, v: _dot(mw.sin(x), v) + z)(x, v) - z,
    "remat in remat": lambda z, x, v, e: mw.remat(lambda e: mw.remat(lambda e: mw.sin(z) * e)(e) + mw.cos(z))(e),
    "fold": lambda z, x, v, e: mw.fold(lambda c, _: mw.sin(c) + c, z, over=STEPS),
    "fold adding": lambda z, x, v, e: mw.fold(lambda c, _: c * 0.5 + _dot(x, v), z, over=STEPS),
    "fold closing": lambda z, x, v, e: mw.fold(lambda c, _: mw.sin(c) + z, e, over=STEPS) + z,
    "fold closing, used before": lambda z, x, v, e: mw.sin(z) + mw.fold(lambda c, _: mw.sin(c) * z, e, over=STEPS),
    "fold remat": lambda z, x, v, e: mw.fold(lambda c, _: mw.sin(c) + z, e, over=STEPS, remat="nothing"),
    "scan along it": lambda z, x, v, e: mw.scan(lambda c, zi: (c + zi, c * zi), z.sum("batch"), z, over="batch"),
    "scan stacking": lambda z, x, v, e: mw.scan(lambda c, xi: (c + 1.0, _dot(xi, v) + c), 0.0, x, over="batch")[1] + z,
    "jax scan": lambda z, x, v, e: jax.lax.scan(lambda c, s: (c * s + z, c), z, jnp.ones(2) * 0.5)[0],
    "jax scan closing": lambda z, x, v, e: jax.lax.scan(lambda c, _: (mw.sin(c) + z, None), e * 1.0, None, length=2)[0],
    "cond": lambda z, x, v, e: mw.cond(e.sum() > 0, lambda z: z * 2.0, mw.sin, z),
    "cond closing": lambda z, x, v, e: mw.cond(e.sum() < 0, lambda e: e + z, lambda e: mw.sin(z) * e, e) + z,
    "cond giving": lambda z, x, v, e: mw.cond(e.sum() > 0, lambda: _dot(x, v), lambda: z * 0.5 - e),
    "vmap": lambda z, x, v, e: mw.vmap(lambda zi: mw.softmax(zi, "embed"), "batch")(z),
    "vmap giving": lambda z, x, v, e: mw.vmap(lambda xi, ei: _dot(xi, v) + _dot(xi, v) - ei, "batch")(x, e) + z,
    "vmap closing": lambda z, x, v, e: (lambda s: mw.vmap(lambda ei: ei * s, "batch")(e))(z.sum("batch")),
    "vmap over a fold": lambda z, x, v, e: mw.vmap(
        lambda zi: mw.fold(lambda c, _: mw.sin(c), zi, over=STEPS), "batch"
    )(z),
    "grad": lambda z, x, v, e: jax.grad(lambda e: (mw.sin(z) * e * e).sum())(e),
    "grad through": lambda z, x, v, e: jax.grad(lambda x, y: (_dot(x, v) * z * y).sum(), (0, 1))(x, e),
    "grad of it": lambda z, x, v, e: jax.grad(lambda z: (mw.sin(z) * e + z).sum())(z),
    "grad of grad": lambda z, x, v, e: jax.grad(
        lambda x: mw.square(jax.grad(lambda x: mw.sin(_dot(x, v)).sum())(x)).sum()
    )(x * 0.1),
    "jvp": lambda z, x, v, e: jax.jvp(lambda z: mw.sin(z) * z, (z,), (e,)),
    "jvp along it": lambda z, x, v, e: jax.jvp(lambda e: mw.sin(e) * z, (e,), (z,)),
    "linearize": lambda z, x, v, e: jax.linearize(lambda x: _dot(mw.sin(x), v) + z, x)[1](x),
    "vjp": lambda z, x, v, e: jax.vjp(lambda x: _dot(mw.sin(x), v), x)[1](z),
    "custom gradient": lambda z, x, v, e: _scaled_back(z) + _scaled_back(z * 2.0),
    "no gradient": lambda z, x, v, e: mw.stop_gradient(z) * z,
    "tree": lambda z, x, v, e: jax.tree.map(lambda a: a * 2, {"z": z, "e": e}),
    "moved": lambda z, x, v, e: z.rename(embed="ff", batch="b").rename(b="batch") + z.rename(embed="ff"),
    "merged": lambda z, x, v, e: z.merge("embed batch", "batch") + z.merge("batch embed", "batch"),
    "used, then moved": lambda z, x, v, e: [mw.sin(z), z.rename(embed="ff"), z.rename(batch="embed", embed="batch")],
    "mixed": lambda z, x, v, e: (z + 1.0) * (z - e) + (2.0 - z) / 4.0 - z / (1.0 + e * e) + abs(-z) + (+z),
    "summed": lambda z, x, v, e: [z.sum("batch") + e.sum("batch"), z.mean(), z.sum() * z.max("embed")],
    "scaled by scalars": lambda z, x, v, e: z * e.sum() - z.sum() * z / 3.0 + e.mean() * z,
}  # fmt: skip

MAKERS = {"a sum": _summed, "a gather": _gathered, "a parameter's": _of_parameters}


def _program(make: Callable[..., Any], part: int, num: int) -> dict[str, Callable[..., Any]]:
    def carried(carry: Callable[..., Any], x: Any, v: Any, w: Any, e: Any) -> Any:
        return carry(make(x, v, w, e), x, v, e)

    chosen = [n for n in CARRIERS if n != "vmap giving" or make is not _of_parameters][part::num]
    return {name: functools.partial(carried, CARRIERS[name]) for name in chosen}


LAYOUTS = [
    *ways(("x=2", "ff:x"), ("x=2,y=4", "ff:(y,x)"), ("x=2,y=2,z=2", "ff:(z,x), batch:y"), partitioners=("names",)),
    Way("x=2,y=2", "ff:x, batch:y", {"params": "embed:x", "gather": "use"}),
    Way("x=2,y=2", "ff:x, batch:y", {"params": "embed:y", "gather": "step"}),
    Way("x=2,y=2", "batch:(x,y)", {"params": "ff:(x,y)", "gather": "step"}),
]
XLA = ways(("x=1", "ff:x"), ("x=2,y=2", "ff:x, batch:y"), partitioners=("xla",))


@pytest.mark.parametrize("part", range(2))
@pytest.mark.parametrize("name", MAKERS)
def test_promises_are_carried_through_everything(name: str, part: int) -> None:
    """A sum pending meets the layouts that contract over an axis, a gather those that split the batch."""
    over = {"a sum": [*LAYOUTS[1:4], XLA[1]], "a gather": [*LAYOUTS[2:4], XLA[0]], "a parameter's": LAYOUTS[3:]}[name]
    agree(
        _program(MAKERS[name], part, 2), X * 0.5, Tensor(V.array * 0.5, V.dims, "parameter"), W, E * 0.5,
        over=over, relative=2e-5,
    )  # fmt: skip


INSIDE: dict[str, Callable[..., Any]] = {
    "grad": lambda x, v: jax.grad(lambda v: mw.sin(_dot(x, v)).sum())(v),
    "vjp": lambda x, v: jax.vjp(lambda v: _dot(x, v), v)[1](_dot(x, v))[0],
    "step": lambda x, v: v - 0.1 * jax.grad(lambda v: mw.sin(_dot(x, v)).sum())(v),
}


@pytest.mark.parametrize("gather", ["use", "step"])
def test_gradients_of_parameters_inside_the_region(gather: str) -> None:
    v = Tensor(V.array, V.dims, "parameter")
    for layout, params in (("batch:x", "embed:x"), ("batch:x, ff:y", "embed:x"), ("ff:x", "(x,y)")):
        agree(INSIDE, X, v, over=[Way("x=2,y=2", layout, {"params": params, "gather": gather})], grads=False)


POSITIONS: dict[str, Callable[..., Any]] = {
    "gradients": lambda x, v: mw.vmap(lambda xi: jax.grad(lambda v: mw.sin(_dot(xi, v)).sum())(v), "batch")(x),
    "gradients by argument": lambda x, v: mw.vmap(jax.grad(lambda v, xi: mw.sin(_dot(xi, v)).sum()), "batch")(v, x),
    "products": lambda x, v: mw.vmap(lambda xi: _dot(xi, v), "batch")(x),
}
MAPPED = [
    Way("x=2", "batch:x"),
    *(
        Way("x=2", "batch:x", {"params": params, "gather": g})
        for params in ("embed:x", "ff:x")
        for g in ("use", "step")
    ),
]


def test_position_by_position_of_a_mapped_dim_that_is_split() -> None:
    """Parameters stay out of what vmap maps over, but their gradients, and products with copies of them, do not."""
    agree(POSITIONS, X, Tensor(V.array, V.dims, "parameter"), over=MAPPED, grads=False)


def test_a_mapped_dim_and_a_contracted_one_cannot_be_split_over_one_axis() -> None:
    region = Way("x=2", "batch:x, ff:x").region(
        lambda e, w, v: mw.vmap(lambda ei: mw.dot(mw.dot(ei, w, "embed"), v, "ff"), "batch")(e)
    )
    with pytest.raises(ValueError, match="split over the axis 'x'"):
        region(E, W, V)


def test_a_sum_round_a_while_loop() -> None:
    """It has no gradient; its state and what it closes over are promises."""
    agree(lambda x, v: _in_while(_dot(x, v)), X, V, over=LAYOUTS[:3] + XLA[1:], grads=False)


def test_integer_sums_that_wrap_round_stay_sums() -> None:
    """Addends of bytes may not be scaled or summed again in a wider type before their own sum."""

    def program(x: Any, v: Any) -> Any:
        z = mw.dot(x, v, "ff")
        wide = z.astype(jnp.int32) * 3
        return z, z + z, z * 3, z // 2, z.sum("batch"), wide, z.rename(embed="ff"), z.mean()

    x, v = ((t * 60).astype(jnp.int8) for t in (X, V))
    agree(program, x, v, over=ways(("x=2", "ff:x"), ("x=2,y=4", "ff:(x,y)"), partitioners=("names",)), grads=False)


def test_a_sum_is_taken_before_a_number_makes_infinities_of_it() -> None:
    """Infinities of either sign among the addends would add up to NaN."""
    numbers = (float("inf"), -np.inf, jnp.float32(jnp.inf))

    def program(x: Any, v: Any) -> Any:
        divided = [_dot(x, v) / zero for zero in (0.0, 1e-46, jnp.zeros(()))]
        return [(by * _dot(x, v)).rename(embed="part") for by in numbers], divided

    over = ways(("x=2", "ff:x"), ("x=2,y=4", "ff:(x,y)"), ("x=2", "ff:x, part:x"), partitioners=("names",))
    agree(program, X, V, over=over, grads=False)
    assert (X * 10**30).dtype == jnp.float32


USES: dict[str, Callable[..., Any]] = {
    "take": lambda w, x, ids: mw.mean(mw.take(w, ids, "vocab") * x),
    "sort": lambda w, x, ids: mw.sum(mw.sort(w, "vocab") ** 2),
    "dot": lambda w, x, ids: mw.mean(mw.dot(x, w, over="embed") ** 2),
    "inner gradient": lambda w, x, ids: mw.sum(
        jax.grad(lambda w: mw.mean(mw.take(w, ids, "vocab") * x) + mw.sum(mw.sort(w, "vocab") ** 2) * mw.mean(x))(w)
        ** 2
    ),
}


@pytest.mark.parametrize(
    "pair", [*itertools.permutations(["take", "sort", "dot"], 2), ("inner gradient", "take")], ids="+".join
)
def test_uses_of_one_parameter_do_not_see_one_another(pair: tuple[str, str]) -> None:
    """What one use makes of a parameter is shared with the next only where that wants the same."""
    vocab, embed, batch = mw.dims(vocab=8, embed=8, batch=16)
    w, x = tensor(vocab, embed, role="parameter"), tensor(batch, embed, seed=1)
    ids = Tensor(np.arange(16) * 3 % 8, (batch,))
    options = [{"params": "embed:data"}, {"params": "embed:data", "gather": "step"}]
    meshes = ("pod=2,data=2", "batch:pod"), ("pod=2,data=2,model=2", "batch:(pod,data), vocab:model")
    over = [way for each in options for way in ways(*meshes, partitioners=("names",), **each)]
    agree(lambda w, x, ids: [USES[name](w, x, ids) for name in pair], w, x, ids, over=over)


# What is sent

HALF = ("reduce_scatter", 64)
SUM, GATHER, REST = ("all_reduce", 64), ("all_gather", 32), ("all_gather", 32)
Sent = list[tuple[str, int]]
SUMS: dict[str, tuple[Callable[..., Any], Sent, Sent]] = {
    # of x (batch, ff), v (ff, embed), e (batch, embed); 64 elements are the whole of a result
    "one": (lambda x, v, e: _dot(x, v), [SUM], []),
    "two added": (lambda x, v, e: _dot(x, v) + _dot(x * 2.0, v), [SUM], []),
    "three, scaled": (
        lambda x, v, e: -(_dot(x, v) - _dot(mw.sin(x), v) * 0.5) / 2.0 + 3 * _dot(x, mw.cos(v)), [SUM], []
    ),
    "added in another order": (lambda x, v, e: _dot(x, v) + _dot(x * x, v).reorder("embed batch"), [SUM], []),
    "added to a whole one": (lambda x, v, e: _dot(x, v) + e, [SUM], []),
    "used twice": (lambda x, v, e: (lambda z: (mw.sin(z), mw.cos(z)))(_dot(x, v)), [SUM], []),
    "used under two names": (
        lambda x, v, e: (lambda z: (mw.sin(z.rename(embed="k")), mw.cos(z)))(_dot(x, v)), [SUM], []
    ),
    "summed further": (lambda x, v, e: _dot(x, v).sum("batch"), [("all_reduce", 8)], []),
    "summed to a scalar": (lambda x, v, e: (_dot(x, v) * 3.0).mean(), [("all_reduce", 1)], []),
    "split and merged": (
        lambda x, v, e: _dot(x, v).split("embed", p=2, q=4).merge("q p", "embed") * 2.0, [SUM], []
    ),
    "renamed onto a split dim": (lambda x, v, e: _dot(x, v).rename(embed="part"), [HALF], [GATHER]),
    "the other dim": (lambda x, v, e: _dot(x, v).rename(batch="part"), [HALF], [GATHER]),
    "two added, then renamed": (
        lambda x, v, e: (_dot(x, v) + _dot(x * 2.0, v)).rename(embed="part"), [HALF], [GATHER]
    ),
    "renamed, then two added": (
        lambda x, v, e: _dot(x, v).rename(embed="part") + _dot(x * x, v).rename(embed="part"), [HALF] * 2, [GATHER] * 2
    ),
    "merged onto a split dim": (lambda x, v, e: _dot(x, v).merge("batch embed", "part"), [HALF], [GATHER]),
    "split onto a split dim": (lambda x, v, e: _dot(x, v).split("embed", q=2, part=4), [HALF], [GATHER]),
    "renamed there and back": (
        lambda x, v, e: _dot(x, v).rename(embed="part").rename(part="embed"), [HALF, REST], [GATHER]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SUMS)
def test_what_a_pending_sum_costs(name: str) -> None:
    program, forward, backward = SUMS[name]
    region = _halves(program)
    assert communicated(region, X, V, E) == forward
    assert _back(region, X, V, E) == backward


SHARED: dict[str, Callable[[Any], Any]] = {
    "scaled and plain": lambda h: mw.sin(h * 0.5) + mw.cos(h),
    "negative": lambda h: h / (1.0 + mw.exp(-h)),
    "scaled twice": lambda h: (mw.softmax(h / 0.7, "embed"), mw.argmax(h * 2.0 * 3.0, "embed")),
    "in another order": lambda h: (mw.exp(h.reorder("embed", ...)), mw.sin(h)),
    "sliced after": lambda h: (mw.sin(h), [h[{"embed": i}] for i in range(4)], h.slice("batch", 0, 2)),
}


@pytest.mark.parametrize("name", SHARED)
def test_what_is_linear_in_one_sum_shares_it(name: str) -> None:
    program = SHARED[name]
    assert communicated(_halves(lambda x, v: program(_dot(x, v))), X, V) == [SUM]
    agree(lambda x, v: program(_dot(x, v)), X, V, over=LAYOUTS[:4])


@pytest.mark.parametrize("gather", ["use", "step"])
def test_parameters_that_are_joined_stay_at_rest(gather: str) -> None:
    """As one product for queries, keys and values: gathered as its parts are, and its gradient scattered, not summed
    whole."""
    w, u = (Tensor(t.array, t.dims, "parameter") for t in (W, U))
    joins = {
        "concat": lambda e, w, u: mw.sin(mw.dot(e, mw.concat([w, u], "ff"), "embed")),
        "stack": lambda e, w, u: mw.sin(mw.dot(e, mw.stack([w, u], "two"), "embed")),
    }
    for join in joins.values():
        region = Way("x=2", "batch:x", {"params": "embed:x", "gather": gather}).region(join)
        sent = _back(region, E, w, u, of=(1, 2))
        assert {kind for kind, _ in sent} == {"reduce_scatter"}, sent
        assert sum(size for _, size in sent) == 2 * 16 * 8
    for layout, params in (("batch:x", "embed:x"), ("batch:y, ff:x", "embed:y"), ("batch:x, two:y", "ff:x")):
        agree(joins, E, w, u, over=[Way("x=2,y=2", layout, {"params": params, "gather": gather})])


def test_sums_over_two_axes_are_scattered_over_those_that_split_the_result() -> None:
    region = Way("x=2,y=2", "ff:(x,y), part:x").region(lambda x, v: _dot(x, v).rename(embed="part"))
    assert communicated(region, X, V) == [("reduce_scatter", 64), ("all_reduce", 32)]
    assert _back(region, X, V) == [("all_gather", 32)]
    both = Way("x=2,y=2", "ff:(x,y), part:(x,y)").region(lambda x, v: _dot(x, v).rename(embed="part"))
    assert communicated(both, X, V) == [("reduce_scatter", 64)]
    one = Way("x=2,y=2", "ff:(x,y), batch:y").region
    with pytest.raises(ValueError, match=r"the dims 'ff' and 'batch' of one tensor|'batch' and 'ff' of one tensor"):
        communicated(one(_dot), X, V)


@pytest.mark.parametrize(
    "program",
    [
        lambda e, w, u: (mw.dot(e, w, "embed"), mw.dot(e, u, "embed")),
        lambda e, w, u: mw.silu(mw.dot(e, w, "embed")) * mw.dot(e, u, "embed"),
        lambda e, w, u: (mw.dot(e, w, "embed"), mw.dot(e.rename(embed="k"), u.rename(embed="k"), "k")),
        lambda e, w, u: (mw.dot(e, w, "embed"), mw.dot(e, u, "embed"), e.broadcast(mw.Dim("part", 2)) * 3.0),
        lambda e, w, u: [mw.dot(e, w * s, "embed") for s in (1.0, 2.0, 3.0)],
        lambda e, w, u: jax.checkpoint(lambda e: mw.sin(mw.dot(e, w, "embed")) * mw.dot(e, u, "embed"))(e),
        lambda e, w, u: jax.checkpoint(lambda w: mw.sin(mw.dot(e, w, "embed")))(w) * mw.dot(e, u, "embed"),
        lambda e, w, u: mw.fold(lambda c, _: c * mw.dot(e, w, "embed"), mw.dot(e, u, "embed"), over=STEPS),
    ],
    ids=["two", "gated", "renamed", "broadcast too", "three", "inside remat", "closed over by remat", "in a loop"],
)
def test_products_of_one_input_share_one_all_reduce_backward(program: Callable[..., Any]) -> None:
    region = _halves(program)
    assert communicated(region, E, W, U) == []
    assert _back(region, E, W, U, of=(0,)) == [("all_reduce", 64)]


def test_a_feed_forward_block_is_one_sum_each_way_and_its_sequence_parallel_form_two_halves() -> None:
    def block(h: Any, w: Any, u: Any, v: Any) -> Any:
        return mw.dot(mw.silu(mw.dot(h, w, "embed")) * mw.dot(h, u, "embed"), v, "ff")

    tensor_parallel = _halves(lambda e, w, u, v: e + block(e, w, u, v))
    assert communicated(tensor_parallel, E, W, U, V) == [SUM]
    assert _back(tensor_parallel, E, W, U, V) == [SUM]
    sequence_parallel = _halves(lambda e, w, u, v: e + block(e.rename(part="batch"), w, u, v).rename(batch="part"))
    parts = E.rename(batch="part")
    assert communicated(sequence_parallel, parts, W, U, V) == [GATHER, HALF]
    assert _back(sequence_parallel, parts, W, U, V) == [GATHER, HALF]


CARRIED: dict[str, tuple[Callable[..., Any], int, int]] = {
    # how many all-reduces of the whole result: forward, and more of them backward. A loop's body stands once.
    "jit": (lambda x, v, e: jax.jit(lambda z: z * 2.0)(_dot(x, v)), 1, 0),
    "jit closing": (lambda x, v, e: (lambda z: jax.jit(lambda: mw.sin(z))() + mw.cos(z))(_dot(x, v)), 1, 0),
    "checkpoint": (lambda x, v, e: jax.checkpoint(mw.sin)(_dot(x, v)), 1, 0),
    "checkpoint closing": (lambda x, v, e: (lambda z: jax.checkpoint(lambda: mw.sin(z))() + z)(_dot(x, v)), 1, 0),
    "remat of the product": (lambda x, v, e: mw.remat(lambda x, v: mw.sin(_dot(x, v)))(x, v), 1, 1),
    "remat that keeps dots": (lambda x, v, e: mw.remat(lambda x, v: mw.sin(_dot(x, v)), save="everything")(x, v), 1, 0),
    "fold": (lambda x, v, e: mw.fold(lambda c, _: mw.sin(c), _dot(x, v), over=STEPS), 1, 0),
    "fold adding": (
        lambda x, v, e: mw.fold(lambda c, _: c * 0.5 + (_dot(x, v) + _dot(x * x, v)), e, over=STEPS), 1, 0
    ),
    "fold closing": (lambda x, v, e: (lambda z: mw.fold(lambda c, _: mw.sin(c) + z, e, over=STEPS))(_dot(x, v)), 1, 0),
    "cond": (lambda x, v, e: mw.cond(e.sum() > 0, lambda z: z * 2.0, mw.sin, _dot(x, v)), 1, 0),
    "grad": (lambda x, v, e: jax.grad(lambda e: (mw.sin(_dot(x, v)) * e * e).sum())(e), 1, 0),
    "vmap": (lambda x, v, e: mw.vmap(lambda xi: _dot(xi, v) + _dot(xi * xi, v), "batch")(x), 1, 0),
    "custom gradient": (lambda x, v, e: _scaled_back(_dot(x, v)), 1, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CARRIED)
def test_a_carried_sum_is_taken_once(name: str) -> None:
    program, forward, backward = CARRIED[name]
    region = _halves(program)
    assert communicated(region, X, V, E) == [SUM] * forward
    assert _back(region, X, V, E) == [SUM] * backward


def test_a_while_loop_takes_the_sum_before_it_starts() -> None:
    assert communicated(_halves(lambda x, v: _in_while(_dot(x, v))), X, V) == [SUM]


Linear = tuple[str, float]


@hypothesis.settings(max_examples=12, deadline=None)
@hypothesis.given(
    st.lists(
        st.tuples(st.sampled_from(["+", "-", "r", "s", "m"]), st.sampled_from([0.5, -2.0, 3.0])), min_size=1, max_size=6
    ),
    st.booleans(),
)
def test_any_linear_combination_of_contractions_is_one_collective(terms: list[Linear], scattered: bool) -> None:
    """Added, subtracted, scaled, transposed and reshaped contractions: the sum waits until the end."""

    def program(x: Any, v: Any) -> Any:
        total = _dot(x, v)
        for kind, factor in terms:
            term = _dot(x * factor, v)
            if kind == "r":
                term = (term.reorder("embed batch") / factor).reorder("batch", ...)
            if kind == "s":
                term = term.split("batch", p=2, q=4).merge("p q", "batch")
            if kind == "m":
                term = term.merge("batch embed", "m").split("m", batch=8, embed=8)
            total = {"-": operator.sub}.get(kind, operator.add)(total, term) * factor
        return total.rename(embed="part") if scattered else total

    region = _halves(program)
    assert communicated(region, X, V) == [HALF if scattered else SUM]
    expected = np.asarray(program(X, V).array, np.float64)
    found = np.asarray(jax.jit(region)(X, V).array, np.float64)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
