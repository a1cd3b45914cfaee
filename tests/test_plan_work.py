"""The plan's floating-point operations against counts made by hand.

The transformer's are those of the usual formula: two for each parameter of a matrix and token, and for attention two
products of the heads with each other; the backward pass does twice that. Attention keeps no scores, and makes them
again for its gradient.
"""

import collections
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshwright as mw
from meshwright.models import Decoder, DecoderConfig
from meshwright.nn import cross_entropy
from meshwright.plan.plan import Plan, plan

from .laws import Way, tensor

CONFIG = DecoderConfig(vocab=64, embed=16, layers=3, heads=4, group=2, head_dim=4, ff=32)
BATCH, LENGTH = 8, 16
TENSOR = "heads:model, ff:model, vocab:model"

TOKENS = BATCH * LENGTH
QUERIES, KEYS = CONFIG.heads * CONFIG.group * CONFIG.head_dim, CONFIG.heads * CONFIG.head_dim
LAYER = 2 * TOKENS * CONFIG.embed * (2 * QUERIES + 2 * KEYS + 3 * CONFIG.ff)
"""The matrices of one layer: queries, keys, values, output; gate, up, down."""
ATTENTION = 2 * 2 * BATCH * QUERIES * LENGTH * LENGTH
"""Scores and their use, of one layer; so few tokens are one block, whose causal half is not left out."""
SCORES = CONFIG.layers * ATTENTION // 2
"""Of all layers."""
DRIFT = CONFIG.layers * 2 * TOKENS * QUERIES
"""Attention's results times their gradients, summed over the head: all that its backward pass has beyond the usual."""
HEAD = 2 * TOKENS * CONFIG.embed * CONFIG.vocab
FORWARD = CONFIG.layers * (LAYER + ATTENTION) + HEAD
DOWN = 2 * TOKENS * CONFIG.ff * CONFIG.embed
"""A layer's last product: nothing in its backward pass reads what it gives, so it is not done again."""

LAYOUTS = [
    ("data=1", "", {}, 1),
    ("data=4", "batch:data", {}, 4),
    ("data=4", "batch:data", {"params": "embed:data"}, 4),
    ("data=4", "batch:data", {"params": "data", "gather": "step"}, 4),
    ("model=2", TENSOR, {}, 2),
    ("model=2", f"{TENSOR}, residual_length:model", {}, 2),
    ("data=4,model=2", f"batch:data, {TENSOR}", {"params": "embed:data"}, 8),
    ("x=2", "", {}, 1),
]
"""And over how many devices each divides the products."""


def _loss(model: Decoder, ids: Any, targets: Any) -> Any:
    return mw.mean(cross_entropy(model(ids), targets))


def _decoder(mesh: str, layout: str, options: dict[str, Any], gradient: bool, **changes: Any) -> Plan:
    config = dataclasses.replace(CONFIG, **changes)
    model = jax.eval_shape(lambda key: Decoder(config, key=key), jax.random.key(0))
    ids = mw.Tensor(np.zeros((BATCH, LENGTH), np.int32), "batch length")
    region = Way(mesh, layout, options).region(_loss)
    return plan(jax.value_and_grad(region) if gradient else region, model, ids, ids)


@pytest.mark.parametrize(("mesh", "layout", "options", "parts"), LAYOUTS)
def test_the_forward_pass(mesh: str, layout: str, options: dict[str, Any], parts: int) -> None:
    assert _decoder(mesh, layout, options, gradient=False).flops.matmul == FORWARD // parts


@pytest.mark.parametrize(("mesh", "layout", "options", "parts"), LAYOUTS)
def test_the_backward_pass_is_twice_the_forward(mesh: str, layout: str, options: dict[str, Any], parts: int) -> None:
    flops = _decoder(mesh, layout, options, gradient=True).flops
    assert flops.matmul == (3 * FORWARD + SCORES + DRIFT) // parts
    by_direction: collections.Counter[str] = collections.Counter()
    for work in flops.works:
        if work.kind == "matmul":
            by_direction[str(work.origin.direction)] += work.flops
    expected = {"forward": FORWARD, "backward": 2 * FORWARD + DRIFT, "recompute": SCORES}
    assert by_direction == {direction: num // parts for direction, num in expected.items()}


@pytest.mark.parametrize(("mesh", "layout", "options", "parts"), LAYOUTS)
@pytest.mark.parametrize("remat", ["nothing", "dots"])
def test_rematerialised_layers(mesh: str, layout: str, options: dict[str, Any], parts: int, remat: str) -> None:
    flops = _decoder(mesh, layout, options, gradient=True, remat=remat).flops
    again = SCORES + (CONFIG.layers * (LAYER + ATTENTION - DOWN) if remat == "nothing" else 0)
    assert sum(w.flops for w in flops.works if w.recomputed and w.kind == "matmul") == again // parts
    assert flops.matmul == (3 * FORWARD + DRIFT + again) // parts
    assert flops.useful + flops.recomputed == flops.total


def test_work_over_an_axis_that_splits_nothing_is_duplicated() -> None:
    """Two devices do the same: a half of what each does was not needed."""
    alone, twice = (_decoder(mesh, "", {}, gradient=True).flops for mesh in ("x=1", "x=2"))
    assert alone.duplicated == 0
    assert twice.total == alone.total
    assert (
        sum(w.flops - w.flops // w.copies for w in twice.works if w.kind == "matmul")
        == (3 * FORWARD + SCORES + DRIFT) // 2
    )
    split = _decoder("data=4,x=2", "batch:data", {}, gradient=True).flops
    assert all(w.copies in (2, 8) for w in split.works), "the axis x splits nothing; data not the scalars"


def test_an_axis_that_splits_only_some_of_the_work() -> None:
    """Without a rule for the vocabulary, its product is done by every device along the axis."""
    flops = _decoder("model=2", "heads:model, ff:model", {}, gradient=False).flops
    assert flops.matmul == CONFIG.layers * (LAYER + ATTENTION) // 2 + HEAD
    assert sum(w.flops - w.flops // w.copies for w in flops.works if w.kind == "matmul") == HEAD // 2


# Convolutions


def _flops(fn: Any, *inputs: Any, mesh: str = "x=1", layout: str = "") -> Any:
    return plan(Way(mesh, layout).region(fn), *inputs).flops


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_a_convolution_and_its_gradients(strides: int, dilation: int) -> None:
    """Three times the forward pass: a tap meets an element as often in each gradient, whatever zeros lie between."""
    x, kernel = tensor(*mw.dims(batch=2, rows=12, channels=3)), tensor(*mw.dims(taps=3, channels=3, features=5), seed=1)

    def program(x: Any, kernel: Any) -> Any:
        y = mw.conv(x, kernel.rename(taps="kernel_rows"), "rows", inputs="channels", strides=strides, dilation=dilation)
        return mw.sum(y * y)

    first = -_before(12, strides, dilation)
    starts = [first + strides * i for i in range(-(-12 // strides))]
    ends = sum(0 <= start + dilation * tap < 12 for start in starts for tap in range(3))
    once = 2 * 2 * 3 * 5 * ends
    assert _flops(program, x, kernel).convolution == once
    gradient = plan(jax.grad(Way("x=1", "").region(program), argnums=(0, 1)), x, kernel).flops
    assert gradient.convolution == 3 * once


def _before(size: int, stride: int, reach: int) -> int:
    """The zeros before the first element that give ceil(size / stride) results, the odd one after the last."""
    results = -(-size // stride)
    return max((results - 1) * stride + 2 * reach + 1 - size, 0) // 2


def test_a_convolution_without_padding() -> None:
    """Two for each of 2 x 10 results of 5 features, 3 taps and 3 channels; a part for each device that has a part."""
    x, kernel = tensor(*mw.dims(batch=2, rows=12, channels=3)), tensor(*mw.dims(kernel_rows=3, channels=3, features=5))

    def program(x: Any, kernel: Any) -> Any:
        return mw.conv(x, kernel, "rows", inputs="channels", padding="VALID")

    assert _flops(program, x, kernel).convolution == 2 * (2 * 10 * 5) * (3 * 3)
    assert _flops(program, x, kernel, mesh="x=2", layout="batch:x").convolution == 2 * (10 * 5) * (3 * 3)


# Everything else


def test_elementwise_work_and_reductions() -> None:
    """One for each element of a result; one for each element that a reduction reads; nothing for what moves data."""
    x = tensor(*mw.dims(a=8, b=4))
    assert _flops(lambda x: mw.exp(x) * 2.0 + x, x).elementwise == 3 * 32
    assert _flops(lambda x: mw.sum(x, "a"), x).elementwise == 32
    assert _flops(lambda x: x.reorder("b a").merge(("b", "a"), "c").astype(jnp.bfloat16), x).total == 0
    assert _flops(lambda x: mw.exp(x), x, mesh="x=2", layout="a:x").elementwise == 16


def test_an_outer_product_adds_nothing_up() -> None:
    x, y = tensor(*mw.dims(a=8)), tensor(*mw.dims(b=4))
    flops = _flops(lambda x, y: mw.einsum(x, y, out=("a", "b")), x, y)
    assert (flops.matmul, flops.elementwise) == (0, 32)


def test_loops_count_their_turns() -> None:
    x, w = tensor(*mw.dims(a=8, b=4)), tensor(*mw.dims(b=4, c=4), seed=1)

    def program(x: Any, w: Any) -> Any:
        return jax.lax.scan(lambda c, _: (mw.dot(c, w, "b").rename(c="b"), None), x, None, length=7)[0]

    assert _flops(program, x, w).matmul == 7 * 2 * math.prod((8, 4, 4))


@pytest.mark.parametrize("turns", [1, 3])
def test_of_branches_the_one_with_the_most_work_counts(turns: int) -> None:
    """One of them runs, in each turn; the collectives of all are listed."""
    x, w = tensor(*mw.dims(a=8, b=4)), tensor(*mw.dims(b=4, c=4), seed=1)

    def program(x: Any, w: Any) -> Any:
        def product(x: Any) -> Any:
            return mw.dot(x, w, "b").rename(c="b")

        def turn(x: Any, i: Any) -> Any:
            return jax.lax.switch(i, [lambda x: x, lambda x: product(product(x)), product], x), None

        return jax.lax.scan(turn, x, jnp.arange(turns))[0]

    assert _flops(program, x, w).matmul == turns * 2 * 2 * math.prod((8, 4, 4))
    p = plan(Way("x=2", "b:x").region(program), x, w)
    assert p.flops.matmul == turns * 2 * 2 * math.prod((8, 4, 4)) // 2
    assert [(row.times, row.sure) for row in p.collectives] == [(turns, False)] * 3


GROUPS, ROWS, WIDTH, FEATURES = 4, 64, 8, 16


@pytest.mark.parametrize("wanted", ["result", "rows", "matrices"])
def test_a_product_by_groups_and_its_gradients(wanted: str) -> None:
    """Each row meets one matrix: as many multiplications as one product of all rows has, in each gradient as well."""
    rows, matrices = jnp.ones((ROWS, WIDTH)), jnp.ones((GROUPS, WIDTH, FEATURES))

    def program(rows: Any, matrices: Any) -> Any:
        return jnp.sum(jax.lax.ragged_dot(rows, matrices, jnp.full(GROUPS, ROWS // GROUPS, jnp.int32)))

    gradients = {"rows": jax.grad(program, 0), "matrices": jax.grad(program, 1)}
    assert plan(gradients.get(wanted, program), rows, matrices).flops.matmul == 2 * ROWS * WIDTH * FEATURES
