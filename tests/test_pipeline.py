"""A scan over split layers is a pipeline: the same results under every schedule, and only microbatches travel."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshwright as mw
from meshwright import Tensor

from .laws import Way, agree, tensor

B, L, E, F, N = mw.dims(batch=16, length=4, embed=8, ff=16, layers=8)
X = tensor(B, L, E, seed=1) * 0.2
PLACES = tensor(B, L, seed=6)
IN = mw.param(tensor(N, E, F, seed=2) * 0.1)
OUT = mw.param(tensor(N, F, E, seed=3) * 0.1)
HEAD = tensor(E, mw.Dim("vocab", 8), seed=4, role="parameter")
SCALE = tensor(E, seed=5, role="parameter")
GPIPE = {"microbatches": 4, "schedule": "gpipe"}
WAYS = [
    Way("pipe=2", "layers:pipe", {"microbatches": 4}),
    Way("pipe=4", "layers:pipe", GPIPE),
    Way("pipe=4", "layers:pipe", {"microbatches": 8}),
    Way("pipe=4", "layers:pipe", {"microbatches": 2}),
    Way("pipe=8", "layers:pipe", {"microbatches": 1}),
    Way("pipe=2", "layers:pipe", {"microbatches": 4, "virtual_stages": 2}),
    Way("pipe=2", "layers:pipe", {**GPIPE, "virtual_stages": 4}),
    Way("pipe=4", "layers:pipe", {"microbatches": 8, "virtual_stages": 2}),
    Way("p=2,q=2", "layers:(p,q)", {"microbatches": 4}),
    Way("data=2,pipe=2", "batch:data, layers:pipe", {"microbatches": 4, "params": "embed:data"}),
    Way("data=2,pipe=2", "batch:data, layers:pipe", {"microbatches": 4, "params": "data", "gather": "step"}),
    Way("pipe=2,model=2", "layers:pipe, ff:model, vocab:model", {"microbatches": 4}),
    Way("data=2,pipe=2,model=2", "batch:data, layers:pipe, ff:model", {"microbatches": 2, "params": "data"}),
    Way("pipe=2,context=2", "layers:pipe, length:context", {**GPIPE, "virtual_stages": 2}),
    Way("pipe=2", "layers:pipe", {"microbatches": 4}, "xla"),
]


def network(w: Any, x: Tensor, places: Tensor, remat: Any = None) -> Tensor:
    inner, outer, scale, head = w
    turn = mw.cos(places)  # each layer closes over something of the batch

    def layer(h: Tensor, w: Any) -> Tensor:
        return h + mw.dot(mw.tanh(mw.dot(h * turn, w[0], "embed")), w[1], "ff") * scale

    h = mw.fold(layer, x * scale, (inner, outer), over="layers", remat=remat)
    return mw.dot(h, head, "embed")


def program(inner: Tensor, outer: Tensor, scale: Tensor, head: Tensor, x: Tensor, places: Tensor) -> Any:
    logits = network((inner, outer, scale, head), x, places)
    return mw.mean(logits * logits) + 0.01 * mw.sum(scale * scale)


def test_every_schedule_and_layout_gives_the_same_loss_and_gradients() -> None:
    agree(program, IN, OUT, SCALE, HEAD, X, PLACES, over=WAYS)


def test_without_gradients_results_come_out_whole() -> None:
    def outputs(inner: Tensor, outer: Tensor, scale: Tensor, head: Tensor, x: Tensor, places: Tensor) -> Any:
        logits = network((inner, outer, scale, head), x, places)
        key = jax.random.key(1)
        sums = mw.mean(logits), mw.sum(logits, over="batch")
        return logits, sums, scale * 2.0, logits > 0.0, mw.random.split(key, B), jax.random.fold_in(key, 2)

    agree(outputs, IN, OUT, SCALE, HEAD, X, PLACES, over=WAYS[:8], grads=False)


def test_what_goes_round_may_be_several_tensors_of_any_dtype() -> None:
    count = Tensor(jnp.arange(16, dtype=jnp.int32), (B,))

    def carried(inner: Tensor, outer: Tensor, x: Tensor, count: Tensor) -> Any:
        def layer(carry: Any, w: Any) -> Any:
            h, seen, total = carry
            h = h + mw.dot(mw.tanh(mw.dot(h, w[0], "embed")), w[1], "ff")
            return h, seen + 1, total + mw.mean(h * h, over=("length", "embed"))

        h, seen, total = mw.fold(layer, (x, count, mw.zeros(B)), (inner, outer), over="layers", remat="dots")
        return mw.mean(h * h) + mw.mean(total * seen.astype("float32"))

    agree(carried, IN, OUT, X, count, over=WAYS[:9])


def test_each_layer_may_have_a_key_of_its_own() -> None:
    def dropped(inner: Tensor, outer: Tensor, x: Tensor) -> Any:
        def layer(h: Tensor, w: Any) -> Tensor:
            keep = mw.random.bernoulli(w[2], h.dims, 0.5)
            return h + mw.where(keep, mw.dot(mw.tanh(mw.dot(h, w[0], "embed")), w[1], "ff"), 0.0)

        keys = jax.random.split(jax.random.key(3), 8)
        return mw.mean(mw.fold(layer, x, (inner, outer, keys), over="layers") ** 2)

    agree(dropped, IN, OUT, X, over=[WAYS[0], WAYS[2], WAYS[5], WAYS[12]])


def test_a_jitted_function_may_hold_the_pipeline() -> None:
    def jitted(inner: Tensor, outer: Tensor, scale: Tensor, head: Tensor, x: Tensor, places: Tensor) -> Any:
        logits = jax.jit(network)((inner, outer, scale, head), x, places)
        return mw.mean(logits * logits)

    agree(jitted, IN, OUT, SCALE, HEAD, X, PLACES, over=[WAYS[0], WAYS[9]])


# What travels


def loss(w: Any, x: Tensor, places: Tensor) -> Any:
    logits = network(w, x, places)
    return mw.mean(logits * logits)


def compiled(mesh: str, layout: str, x: Tensor = X, **options: Any) -> Any:
    inside = Way(mesh, layout, options).region(loss)
    places = tensor(*x.dims[:2])
    return jax.jit(jax.value_and_grad(inside)).lower((IN, OUT, SCALE, HEAD), x, places).compile()


@pytest.mark.parametrize("options", [{}, {"schedule": "gpipe"}])
def test_only_permutes_of_one_microbatch_travel_along_the_pipeline(options: Any) -> None:
    text = compiled("data=2,pipe=4", "batch:data, layers:pipe", microbatches=4, **options).as_text()
    moved = re.findall(r"= (\S+?)\{?[\d,]*\}? collective-permute", text)
    assert moved and set(moved) == {"f32[2,4,8]"}  # 16 / 2 devices / 4 microbatches, length, embed
    assert not re.search(r"all-gather|all-to-all|reduce-scatter", text)
    # Sums over the pipeline: the loss, and the gradients of what all stages share, once.
    for line in re.findall(r".* all-reduce\(.*", text):
        assert "while" not in line.split("op_name")[-1] or "f32[]" in line, line


def test_1f1b_keeps_fewer_microbatches_than_gpipe() -> None:
    x = tensor(mw.Dim("batch", 64), mw.Dim("length", 64), E)
    by_schedule = {
        schedule: compiled("pipe=4", "layers:pipe", x, microbatches=16, schedule=schedule).memory_analysis()
        for schedule in ("1f1b", "gpipe")
    }
    one, other = (by_schedule[s].temp_size_in_bytes for s in ("1f1b", "gpipe"))
    microbatch = 4 * 64 * 8 * 4
    assert other - one >= (16 - 3) * microbatch * 0.95


# What is refused


def refused(fn: Any, *inputs: Any, mesh: str = "pipe=2", layout: str = "layers:pipe", **options: Any) -> str:
    inside = Way(mesh, layout, {"microbatches": 4, **options}).region(fn)
    with pytest.raises((ValueError, TypeError)) as caught:
        jax.jit(inside)(*inputs)
    return str(caught.value)


def test_layers_that_the_stages_do_not_divide_are_refused_with_counts_that_would_do() -> None:
    message = refused(loss, (IN, OUT, SCALE, HEAD), X, PLACES, virtual_stages=3)
    assert "8 layers cannot be dealt out to 2 devices x virtual_stages=3" in message
    assert "a multiple of 6 (6 or 12), or virtual_stages one of 1, 2, 4" in message
    message = refused(loss, (IN, OUT, SCALE, HEAD), X, PLACES, mesh="pipe=3")
    assert "'layers' of size 8" in message and "8 is not a multiple of 3" in message and "(6 or 9)" in message


def test_what_a_pipeline_cannot_do_is_refused() -> None:
    def stacked(inner: Tensor, x: Tensor) -> Any:
        return mw.mean(mw.scan(lambda h, w: (h, mw.mean(mw.dot(h, w, "embed"))), x, inner, over="layers")[0])

    assert "write mw.fold, and let each layer add its part" in refused(stacked, IN, X)

    def reversed_(inner: Tensor, x: Tensor) -> Any:
        h = mw.fold(lambda h, w: h + mw.mean(mw.dot(h, w, "embed"), over="ff"), x, inner, over="layers", reverse=True)
        return mw.mean(h)

    assert "leave out reverse=True" in refused(reversed_, IN, X)

    def penalty(inner: Tensor, x: Tensor) -> Any:
        h = mw.fold(lambda h, w: h * mw.mean(w), x, inner, over="layers")
        return mw.mean(h) + mw.sum(inner * inner)

    assert "pipeline: a sum along the axis 'pipe'" in refused(penalty, IN, X)

    def penalised(inner: Tensor, x: Tensor) -> Any:
        def layer(carry: Any, w: Tensor) -> Any:
            h = carry[0] * mw.mean(w)
            return h, carry[1] + mw.mean(h * h) + mw.sum(w * w)

        h, total = mw.fold(layer, (x, jnp.float32(0)), inner, over="layers")
        return mw.mean(h) + total

    message = refused(penalised, IN, X)
    assert "layers add something that does not depend on the batch" in message and "beginning with mw.zeros" in message

    def scaled(inner: Tensor, x: Tensor) -> Any:
        return mw.mean(mw.fold(lambda h, w: h * mw.mean(w), x, inner, over="layers"))

    assert "make the weights with mw.param(...)" in refused(scaled, Tensor(IN.array, IN.dims), X)

    def twice(inner: Tensor, x: Tensor) -> Any:
        h = mw.fold(lambda h, w: h * mw.mean(w), x, inner, over="layers")
        return mw.mean(mw.fold(lambda h, w: h * mw.mean(w), h, inner, over="layers"))

    assert "2 scans over layers" in refused(twice, IN, X)

    def whole(inner: Tensor, x: Tensor) -> Any:
        return mw.mean(mw.remat(lambda x: mw.fold(lambda h, w: h * mw.mean(w), x, inner, over="layers"))(x))

    assert "in no other loop or rematerialised function" in refused(whole, IN, X)

    def returned(inner: Tensor, x: Tensor) -> Any:
        return mw.mean(mw.fold(lambda h, w: h * mw.mean(w), x, inner, over="layers")), inner * 2.0

    assert "is split over the axis of the pipeline" in refused(returned, IN, X)

    def per_layer(inner: Tensor, x: Tensor) -> Any:
        seen = mw.mean(x, over=("length",)).broadcast(N)
        return mw.mean(mw.fold(lambda h, w: h * mw.mean(w[0]) + w[1], x, (inner, seen), over="layers"))

    assert "depends on the batch" in refused(per_layer, IN, X)


def test_the_axis_of_a_pipeline_does_nothing_else() -> None:
    with pytest.raises(ValueError, match=r"the axis 'pipe' is that of the pipeline \(layers:pipe\)"):
        Way("pipe=2", "layers:pipe, ff:pipe", {"microbatches": 4}).region(loss)
    with pytest.raises(ValueError, match="the rule for 'params'"):
        Way("pipe=2", "layers:pipe", {"microbatches": 4, "params": "pipe"}).region(loss)
    assert np.isfinite(Way("pipe=2", "layers:pipe", {}).region(loss)((IN, OUT, SCALE, HEAD), X, PLACES))


# Neighbours within a stage


@pytest.mark.parametrize("options", [{"microbatches": 4}, GPIPE, {"microbatches": 2, "virtual_stages": 2}])
def test_neighbours_within_a_stage_exchange_while_other_stages_do_not(options: Any) -> None:
    def program(inner: Tensor, outer: Tensor, x: Tensor) -> Any:
        def layer(h: Tensor, w: Any) -> Tensor:
            near = mw.shift(h, "length", 1) + mw.roll(h, length=-1)
            heads = h.broadcast(mw.Dim("heads", 1)).rename(embed="head_dim")
            seen = mw.attention(heads, heads, heads, causal=True).rename(head_dim="embed").sum("heads")
            return h + mw.dot(mw.tanh(mw.dot(near + seen, w[0], "embed")), w[1], "ff")

        return mw.mean(mw.fold(layer, x, (inner, outer), over="layers") ** 2)

    over = [Way("pipe=2,context=2", "layers:pipe, length:context", options)]
    agree(program, IN, OUT, X, over=[*over, Way("pipe=2,context=4", "layers:pipe, length:context", options)])
