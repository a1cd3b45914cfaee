"""A batch in parts gives what the whole gives; what cannot be put together from parts is refused."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshwright as mw
from meshwright import Tensor

from .laws import Way, agree, assert_same, tensor

B, L, E, F, N = mw.dims(batch=16, length=4, embed=8, ff=16, layers=4)
X = tensor(B, L, E, seed=1)
IDS = Tensor(jnp.asarray(np.random.default_rng(0).integers(0, 8, (16, 4)), jnp.int32), (B, L))
IN = tensor(E, F, seed=2, role="parameter")
OUT = tensor(F, E, seed=3, role="parameter")
SCALE = tensor(E, seed=4, role="parameter")
TABLE = tensor(mw.Dim("vocab", 8), E, seed=5, role="parameter")
MANY = [
    Way("x=1", "", {"microbatches": 4}),
    Way("data=2", "batch:data", {"microbatches": 4}),
    Way("data=2", "batch:data", {"microbatches": 8, "params": "data"}),
    Way("data=2", "batch:data", {"microbatches": 2, "params": "data", "gather": "step"}),
    Way("data=2,model=2", "batch:data, embed:model", {"microbatches": "batch:4"}),
    Way("data=2,model=2", "batch:data, embed:model", {"microbatches": 4, "params": "data"}),
    Way("data=2,model=2", "batch:(data,model)", {"microbatches": 4, "params": "embed:(data,model)"}),
    Way("data=2,context=2", "batch:data, length:context", {"microbatches": 2}),
    Way("context=2", "length:context", {"microbatches": 16}),
    Way("data=2", "batch:data", {"microbatches": 4}, "xla"),
]


def loss(w: Any, x: Tensor, ids: Tensor) -> Any:
    inner, outer, scale, table = w
    h = x * scale + mw.take(table, ids, "vocab")
    h = h + mw.dot(mw.tanh(mw.dot(h, inner, "embed")), outer, "ff")
    return mw.mean((h * scale) ** 2)


def program(inner: Tensor, outer: Tensor, scale: Tensor, table: Tensor, x: Tensor, ids: Tensor) -> Any:
    return loss((inner, outer, scale, table), x, ids)


def test_the_loss_and_every_gradient_are_those_of_the_whole_batch() -> None:
    lookup = Way("data=2,model=2", "batch:data, vocab:model, ff:model", {"microbatches": 2})
    agree(program, IN, OUT, SCALE, TABLE, X * 0.1, IDS, over=[*MANY, lookup])


def results(scale: Tensor, x: Tensor, ids: Tensor) -> dict[str, Any]:
    """Results of each kind: sums, parts, what is the same; numbers and tensors, of integers too."""
    h = x * scale
    return {
        "loss": mw.mean(h * h) + 0.5 * mw.sum(scale * scale) - mw.sum(x[{"batch": 3}]),
        "part": h,
        "named": h.rename(length="positions").reorder("positions", ...),
        "per position": mw.sum(h, over=("batch", "embed")) * 2.0 + 1.0,
        "count": mw.sum(ids == 3),
        "histogram": mw.sum(mw.one_hot(ids, mw.Dim("vocab", 8)), over=("batch", "length")) + 1,
        "same": scale + 1.0,
        "constant": mw.sum(scale),
        "positions": mw.arange(B) + 1,
    }


def test_sums_parts_and_what_is_the_same_are_put_together() -> None:
    agree(results, SCALE, X, IDS, over=MANY, grads=False)


def test_a_penalty_is_counted_once() -> None:
    def penalised(w: Tensor, x: Tensor) -> Any:
        return mw.mean(mw.dot(x, w, "embed") ** 2) + 0.1 * mw.sum(w * w)

    agree(penalised, IN, X, over=MANY[:6])


def test_random_numbers_are_those_of_the_whole_batch() -> None:
    def dropped(key: Any, w: Tensor, x: Tensor) -> Any:
        keep = mw.random.bernoulli(key, x.dims, 0.5)
        return mw.mean(mw.dot(mw.where(keep, x, 0.0), w, "embed") ** 2), mw.random.normal(key, (B, L))

    def drawn(w: Tensor, x: Tensor) -> Any:
        return dropped(jax.random.key(7), w, x)

    agree(drawn, IN, X, over=MANY[:5], grads=False)
    agree(lambda w, x: drawn(w, x)[0], IN, X, over=MANY[:5])


def test_another_dim_can_be_the_batch() -> None:
    examples = X.rename(batch="examples")
    ways = [Way("data=2", "examples:data", {"microbatches": "examples:4"})]
    agree(lambda w, x: mw.mean(mw.dot(x, w, "embed") ** 2), IN, examples, over=ways)


def test_a_scan_over_layers_sums_and_rematerialises_as_ever() -> None:
    stack = tensor(N, E, F, seed=8, role="parameter") * 0.1
    stack = mw.param(stack)

    def layered(stack: Tensor, outer: Tensor, x: Tensor) -> Any:
        def layer(carry: Any, w: Tensor) -> Any:
            h, total = carry
            h = h + mw.dot(mw.tanh(mw.dot(h, w, "embed")), outer, "ff")
            return h, total + mw.mean(h * h)

        h, total = mw.fold(layer, (x, jnp.float32(0)), stack, over="layers", remat="dots")
        return mw.mean(h) + 0.1 * total

    agree(layered, stack, OUT, X * 0.1, over=MANY[:6])


@mw.custom_vjp
def halved(x: Tensor, w: Tensor) -> Tensor:
    """A product with half its gradient."""
    return mw.dot(x, w, "embed")


halved.defvjp(
    lambda x, w: (mw.dot(x, w, "embed"), (x, w)),
    lambda kept, g: (mw.dot(g, kept[1], "ff") * 0.5, mw.einsum(kept[0], g, out=("embed", "ff")) * 0.5),
)


def test_a_gradient_by_a_rule_of_ones_own_is_added_up_too() -> None:
    agree(lambda w, x: mw.mean(mw.tanh(halved(x, w)) ** 2), IN, X * 0.1, over=MANY)


def with_rule(function: Any, backward: Any) -> Any:
    """A function of tensors whose backward rule sees its arguments and the gradient of its result."""
    made = mw.custom_vjp(function)
    made.defvjp(lambda *args: (function(*args), args), backward)
    return made


HEATED = with_rule(lambda x, t: x * t, lambda kept, g: (g * kept[1], mw.sum(g * kept[0]) * 3.0))
SQUARED = with_rule(lambda x: mw.sum(x * x), lambda kept, g: (kept[0] * g * 2.0,))
ROUNDED = with_rule(lambda w: mw.round(w), lambda kept, g: (g,))


@mw.custom_jvp
def tripled(x: Tensor) -> Any:
    return mw.sum(x * x)


@tripled.defjvp
def _tripled(primals: Any, tangents: Any) -> Any:
    return mw.sum(primals[0] * primals[0]), mw.sum(primals[0] * tangents[0]) * 6.0


def test_rules_may_add_to_sums_over_the_batch() -> None:
    def program(w: Tensor, t: Any, x: Tensor) -> Any:
        h = HEATED(mw.dot(x, ROUNDED(w * 3.0), "embed"), t)
        return SQUARED(h) + tripled(h)

    def result(region: Any) -> Any:
        return jax.jit(jax.value_and_grad(region(program), (0, 1, 2)))(IN, jnp.float32(1.5), X * 0.1)

    expected = result(lambda fn: fn)
    for way in (*MANY[:2], MANY[4], MANY[5], MANY[7]):
        assert_same(result(way.region), expected, str(way))


def test_rules_that_take_one_microbatch_for_the_batch_are_refused() -> None:
    def scaled(kept: Any, g: Any) -> Any:
        return (g / mw.sqrt(mw.sum(g * g)),)

    centred = with_rule(lambda x: x * 1.0, lambda kept, g: (g - mw.mean(g, "batch"),))
    per_batch = with_rule(lambda x: x * 1.0, scaled)
    decayed = with_rule(lambda w: w * 1.0, lambda kept, g: (g + kept[0],))

    def message(fn: Callable[[Tensor, Tensor], Any]) -> str:
        region = Way("data=2", "batch:data", {"microbatches": 4}).region(fn)
        with pytest.raises(ValueError, match="microbatches") as caught:
            jax.jit(jax.grad(region))(IN, X)
        return str(caught.value)

    def product(w: Tensor, x: Tensor) -> Tensor:
        return mw.dot(x, w, "embed")

    assert "for the whole sum" in message(lambda w, x: mw.mean(centred(product(w, x)) ** 2))
    assert "before all microbatches are in" in message(lambda w, x: mw.mean(per_batch(product(w, x)) ** 2))
    assert "before all microbatches are in" in message(lambda w, x: mw.mean(product(per_batch(w), x) ** 2))
    assert "for the whole sum" in message(lambda w, x: mw.mean(product(decayed(w), x) ** 2))
    assert "is to be counted once" in message(lambda w, x: SQUARED(product(w, x)) + mw.sum(w * w))


def test_a_scale_beyond_float16_is_no_infinity() -> None:
    w = mw.param(IN.astype("float16"))

    def small(w: Tensor, x: Tensor) -> Any:
        return 1e-3 * mw.mean(mw.dot(x.astype("float16"), w, "embed").astype("float32") ** 2)

    def gradient(region: Any) -> Any:
        return jax.jit(jax.grad(lambda w: 1e5 * region(small)(w, X)))(w).astype("float32")

    assert_same(gradient(MANY[1].region), gradient(lambda fn: fn), "scaled", relative=0.01)


@pytest.mark.parametrize("options", [{}, {"params": "data"}], ids=str)
def test_sums_are_as_wide_over_microbatches_as_over_devices(options: dict[str, str]) -> None:
    many = tensor(mw.Dim("batch", 256), E, seed=1)
    narrow = mw.param(IN.astype("bfloat16"))

    def squares(w: Tensor, x: Tensor) -> Any:
        h = mw.dot(x.astype(w.dtype), w, "embed")
        return mw.mean(h * h)

    way = Way("data=2", "batch:data", {"microbatches": 128, "sums": "float32", **options})
    expected, found = (jax.jit(jax.value_and_grad(f))(narrow, many) for f in (squares, way.region(squares)))
    as_wide = [jax.tree.map(lambda x: x.astype("float32"), given) for given in (found, expected)]
    assert_same(as_wide[0], as_wide[1], "bfloat16", relative=2**-7)


# What it communicates


def test_gradients_are_summed_over_devices_once_for_all_microbatches() -> None:
    w = (IN, OUT, SCALE, TABLE)
    inside = [Way("data=2", "batch:data", options).region(loss) for options in ({}, {"microbatches": 8})]
    plans = [mw.plan(jax.value_and_grad(f), w, X, IDS) for f in inside]
    sums = [[(c.payload_bytes, c.times) for c in p.collectives if c.payload_bytes > 4] for p in plans]
    assert sorted(sums[0]) == sorted(sums[1]) and all(times == 1 for _, times in sums[1])


def test_with_fsdp_gradients_are_scattered_as_they_come_and_kept_at_rest() -> None:
    w = (IN, OUT, SCALE, TABLE)
    inside = Way("data=2", "batch:data", {"microbatches": 8, "params": "data"}).region(loss)
    plan = mw.plan(jax.value_and_grad(inside), w, X, IDS)
    scattered = [c for c in plan.collectives if c.kind == "reduce_scatter"]
    assert {c.payload_bytes for c in scattered} == {4 * x.array.size for x in w}
    assert {c.times for c in scattered} == {8}
    assert not any(c.kind == "all_reduce" and c.payload_bytes > 4 for c in plan.collectives)


def test_only_one_microbatch_is_in_memory() -> None:
    wide = tensor(E, mw.Dim("ff", 256), role="parameter"), tensor(mw.Dim("ff", 256), E, role="parameter")
    x = tensor(mw.Dim("batch", 64), mw.Dim("length", 32), E)

    def deep(w: Any, x: Tensor) -> Any:
        return mw.mean(mw.dot(mw.tanh(mw.dot(x, w[0], "embed")), w[1], "ff") ** 2)

    def temporaries(**options: Any) -> int:
        inside = Way("data=2", "batch:data", options).region(deep)
        compiled: Any = jax.jit(jax.value_and_grad(inside)).lower(wide, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(microbatches=8) < temporaries() / 5


# What is refused


def refused(fn: Callable[..., Any], *inputs: Any, **options: Any) -> str:
    inside = Way("data=2", "batch:data", {"microbatches": 4, **options}).region(fn)
    with pytest.raises((ValueError, TypeError)) as caught:
        jax.jit(inside)(*inputs)
    return str(caught.value)


def test_what_looks_at_several_examples_at_once_is_refused() -> None:
    assert "microbatches: a maximum" in refused(lambda x: mw.max(x), X)
    assert "microbatches: a gather" in refused(lambda x: mw.sort(x, "batch"), X)
    assert "microbatches: an exchange" in refused(lambda x: mw.shift(x, "batch", 1), X)
    assert "microbatches: a gather" in refused(lambda x: x.rename(batch="examples"), X)
    assert "test_microbatches.py" in refused(lambda x: mw.max(x), X)


def test_a_sum_that_is_used_before_it_is_complete_is_refused() -> None:
    assert "before all microbatches are in" in refused(lambda x: x - mw.mean(x, over="batch"), X)
    assert "used by 'log'" in refused(lambda x: jnp.log(mw.mean(x * x)), X)
    assert "used by 'div'" in refused(lambda x: 1.0 / mw.sum(x), X)
    assert "used by 'mul'" in refused(lambda x: mw.sum(x) * mw.sum(x), X)


def test_a_result_that_cannot_be_put_together_is_refused() -> None:
    inside = Way("x=1", "", {"microbatches": 4}).region(lambda x: {"first": x.array[0, 0, 0]})
    with pytest.raises(ValueError, match=r"the output\['first'\] depends on the batch, but is neither a sum"):
        inside(X)


def test_the_microbatches_must_divide_the_batch() -> None:
    message = refused(lambda x: mw.mean(x), X, microbatches=5)
    assert "batch" in message and "'data' (size 2) x 'microbatches' (size 5)" in message


def test_a_gradient_of_anything_but_the_loss_is_refused() -> None:
    inside = Way("data=2", "batch:data", {"microbatches": 4}).region(lambda x: (mw.mean(x), mw.sum(x * x)))
    with pytest.raises(ValueError, match=r"a gradient of the output\[1\] was asked for"):
        jax.grad(lambda x: inside(x)[1])(X)
    assert jax.grad(lambda x: inside(x)[0])(X).dims == X.dims
    parts = Way("data=2", "batch:data", {"microbatches": 4}).region(lambda x: x * 2.0)
    with pytest.raises(ValueError, match="gradients are those of one number"):
        jax.grad(lambda x: mw.sum(parts(x)))(X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"microbatches": 0}, "microbatches=0 is not a number of at least 1"),
        ({"microbatches": 2.5}, "microbatches=2.5 is not a number"),
        ({"microbatches": "batch:4, length:2"}, "names 2 dims; microbatches divide one"),
        ({"microbatches": "batch:x"}, "microbatches='x' is not a number"),
        ({"schedule": "1b1f"}, "Did you mean '1f1b'?"),
        ({"virtual_stages": -1}, "virtual_stages=-1 is not a number of at least 1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        mw.Layout("batch:data", **options)


def test_a_gradient_in_what_a_region_closes_over_is_refused() -> None:
    def closing(t: Any) -> Any:
        inside = Way("data=2", "batch:data", {"microbatches": 4}).region(lambda x: mw.mean(x * t))
        return inside(X)

    assert jax.jit(closing)(2.0) == pytest.approx(2.0 * float(mw.mean(X)))
    with pytest.raises(ValueError, match=r"in a value that the function given to mw\.spmd closes over"):
        jax.jit(jax.grad(closing))(2.0)


def test_a_region_without_a_batch_runs_as_ever() -> None:
    inside = Way("data=2", "embed:data", {"microbatches": 4}).region(lambda w: w * 2.0)
    np.testing.assert_array_equal(inside(IN).array, IN.array * 2.0)


def test_what_is_linear_in_sums_is_put_together_value_by_value() -> None:
    def program(scale: Tensor, x: Tensor) -> Any:
        mean = mw.mean(x * scale, over=("batch", "length"))
        barred = jax.lax.optimization_barrier((mw.mean(x), mw.sum(scale * scale)))
        joined = mw.concat([mean, scale * 1.0], "embed")
        half = mw.where(mw.arange(E) < 4, mean, -jnp.inf)
        return joined, barred, half

    agree(program, SCALE, X, over=MANY[:4], grads=False)


def test_what_would_take_one_microbatch_for_the_batch_is_refused() -> None:
    assert "a gradient taken inside" in refused(lambda x: jax.grad(lambda b: mw.mean(x + b))(jnp.float32(0)), X)
    assert "cannot be put together" in refused(lambda x: mw.broadcast(mw.mean(x), (B,)), X)
    assert "before all microbatches" in refused(lambda x: mw.sum(mw.broadcast(mw.mean(x), (B,))), X)
    assert "used by 'div'" in refused(lambda x: jax.lax.div(mw.sum(x), jnp.int32(40)), IDS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"microbatches": "bach:4"},
            "microbatches= over 'bach' was not used: .* Did you mean 'batch'",
        ),
        ({"microbatches": 4, "pipeline": "blocks"}, "pipeline= was not used: .* a rule for 'blocks'"),
        ({"schedule": "gpipe", "virtual_stages": 2}, "schedule=, virtual_stages= was not used: .*microbatches="),
        (
            {"like": "lenth:length"},
            "like= for 'lenth' was not used: .* Did you mean 'length'",
        ),
        ({"like": "length:bach"}, "like= for 'length' speaks of 'bach', which has no rule.*Did you mean 'batch'"),
    ],
)
def test_an_option_of_no_use_is_told(options: dict[str, Any], message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        Way("data=2", "batch:data", options).region(lambda x: mw.mean(x))(X)
    with pytest.raises(ValueError, match=message):
        Way("data=2", "batch:data", {**options, "strict": True}).region(lambda x: mw.mean(x))(X)


def test_an_option_for_an_axis_of_one_device_is_of_use() -> None:
    options = {"microbatches": 4, "virtual_stages": 2, "schedule": "gpipe", "strict": True}

    def folded(w: Tensor, x: Tensor) -> Any:
        return mw.mean(mw.fold(lambda h, w: h * w, x, w, over="layers"))

    Way("pipe=1", "batch:pipe, layers:pipe", options).region(folded)(tensor(N, E, role="parameter"), X)
