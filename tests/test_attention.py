"""Attention: its arithmetic against the softmax of whole scores, on every layout, and what it sends and keeps.

The whole scores are written with the language's own products and softmax, whose arithmetic other tests hold against
NumPy. ``jax.nn.dot_product_attention`` is held beside it once more.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshwright as mw
from meshwright import Tensor
from meshwright.ops import blocks

from .laws import Way, agree, assert_same, tensor, ways
from .stablehlo import communicated

BATCH, HEADS, GROUP, LENGTH, HEAD = mw.dims(batch=2, heads=2, group=3, length=64, head_dim=8)
Q = tensor(BATCH, LENGTH, HEADS, GROUP, HEAD, seed=1)
K = tensor(BATCH, LENGTH, HEADS, HEAD, seed=2)
V = tensor(BATCH, LENGTH, HEADS, mw.Dim("head_dim", 4), seed=3)
SEGMENTS = Tensor(np.cumsum(np.random.default_rng(0).random((2, 64)) < 0.1, 1).astype(np.int32), (BATCH, LENGTH))
LAYOUTS = [
    ("x=4", "length:x"),
    ("x=8", "length:x"),
    ("x=2,y=4", "batch:x, length:y"),
    ("x=2,y=2,z=2", "length:(y,x), heads:z"),
    ("x=2", "heads:x"),
]
SIGHTS: dict[str, dict[str, Any]] = {
    "all": {},
    "causal": {"causal": True},
    "causal, a window within a device": {"causal": True, "window": 5},
    "causal, a window over several": {"causal": True, "window": 21},
    "a window": {"window": 7},
    "a wide window": {"window": 40},
}


CASES = [(sight, 8) for sight in SIGHTS] + [(sight, 512) for sight in ("all", "causal", "a wide window")]


@contextlib.contextmanager
def blocks_of(most_keys: int) -> Iterator[None]:
    """Blocks of keys, and parts of queries, have so many tokens at most."""
    before = blocks.MOST_KEYS, blocks.LEAST_KEYS
    blocks.MOST_KEYS, blocks.LEAST_KEYS = most_keys, 2
    try:
        yield
    finally:
        blocks.MOST_KEYS, blocks.LEAST_KEYS = before


def whole(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, *, causal: bool = False, window: Any = None) -> Any:
    """The same by whole scores."""
    k, v = k.rename(length="keys"), v.rename(length="keys", head_dim="value_dim")
    at = np.arange(LENGTH.size)
    mask = np.ones((2, LENGTH.size, LENGTH.size), bool)
    mask &= (at[:, None] >= at) if causal else True
    mask &= (abs(at[:, None] - at) < window) if window else True
    if segments is not None:
        same = np.asarray(segments.array)
        mask &= same[:, :, None] == same[:, None]
    scores = mw.einsum(q, k, out="batch heads group length keys") / np.sqrt(q.size("head_dim"))
    weights = mw.softmax(mw.where(Tensor(mask, "batch length keys"), scores, -1e30), "keys")
    return mw.einsum(weights, v, out="batch length heads group value_dim").rename(value_dim="head_dim")


@pytest.mark.parametrize(("sight", "most_keys"), CASES)
def test_it_is_the_softmax_of_whole_scores(sight: str, most_keys: int) -> None:
    options = SIGHTS[sight]
    weights = tensor(BATCH, LENGTH, HEADS, GROUP, mw.Dim("head_dim", 4), seed=4)
    for segments in (None, SEGMENTS):

        def loss(fn: Any, q: Any, k: Any, v: Any, segments: Any = segments) -> Any:
            return mw.sum(fn(q, k, v, segments=segments, **options) * weights)

        grads = [jax.value_and_grad(functools.partial(loss, fn), (0, 1, 2)) for fn in (mw.attention, whole)]
        with blocks_of(most_keys):
            assert_same(jax.jit(grads[0])(Q, K, V), jax.jit(grads[1])(Q, K, V), sight)


@pytest.mark.parametrize(("sight", "most_keys"), CASES)
def test_every_layout_gives_the_same(sight: str, most_keys: int) -> None:
    def program(q: Any, k: Any, v: Any, segments: Any) -> Any:
        options = SIGHTS[sight]
        return mw.attention(q, k, v, segments=segments, **options), mw.attention(q, k, v, **options)

    over = ways(*LAYOUTS, partitioners=("names",))
    if (sight, most_keys) == ("causal", 8):
        over += ways(*LAYOUTS[::2], partitioners=("xla",))
    with blocks_of(most_keys):
        agree(program, Q, K, V, SEGMENTS, over=over)


def test_what_sees_itself_alone_gets_its_own_value() -> None:
    for mesh, layout in LAYOUTS[:3]:
        region = Way(mesh, layout).region(functools.partial(mw.attention, causal=True, window=1))
        expected = mw.einsum(V, mw.ones(GROUP), out="batch length heads group head_dim")
        np.testing.assert_allclose(region(Q, K, V).array, expected.array, rtol=1e-6)


def test_it_is_jaxs_attention() -> None:
    q = Q.merge("heads group", "every").array
    k, v = (jnp.repeat(x.array, 3, axis=2) for x in (K, K * 0.5))
    for causal in (False, True):
        expected = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
        found = mw.attention(Q, K, K * 0.5, causal=causal).merge("heads group", "every").array
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_bfloat16_and_is_summed_in_float32() -> None:
    q, k = (x.astype("bfloat16") for x in (Q, K))
    found = mw.attention(q, k, k, causal=True)
    assert found.dtype == jnp.bfloat16
    exact = mw.attention(q.astype("float32"), *(k.astype("float32"),) * 2, causal=True)
    np.testing.assert_allclose(found.array.astype(jnp.float32), exact.array, atol=0.02)


@pytest.mark.parametrize("causal", [False, True])
def test_float64_is_scored_and_summed_in_float64(causal: bool) -> None:
    """Values and gradients, also of what goes round a ring of more than two devices."""
    with jax.enable_x64(True):
        operands = tuple(x.astype("float64") for x in (Q, K, V))

        def loss(fn: Any, q: Any, k: Any, v: Any) -> Any:
            return mw.sum(mw.sin(fn(q, k, v, causal=causal)))

        expected = jax.value_and_grad(functools.partial(loss, functools.partial(whole, segments=None)), (0, 1, 2))
        for way in (None, *ways(*LAYOUTS[:3], partitioners=["names"])):
            fn = functools.partial(loss, mw.attention)
            found = jax.value_and_grad(way.region(fn) if way is not None else fn, (0, 1, 2))
            assert_same(jax.jit(found)(*operands), jax.jit(expected)(*operands), str(way), 1e-12)
            if way is not None:
                rows = mw.plan(found, *operands).collectives
                assert {row.dtype for row in rows if row.kind == "permute"} == {"float64"}


@pytest.mark.parametrize("sight", ["all", "causal", "a window"])
def test_the_gradient_has_gradients(sight: str) -> None:
    """In both modes, of the whole region too."""

    def loss(fn: Any, q: Any, k: Any, v: Any) -> Any:
        return mw.sum(mw.sin(fn(q, k, v, **SIGHTS[sight])))

    def twice(first: Any) -> Any:
        def total(q: Any, k: Any, v: Any) -> Any:
            gradients = jax.grad(first, (0, 1, 2))(q, k, v)
            return sum(mw.sum(mw.cos(x)) for x in gradients)

        return jax.jit(lambda *t: (jax.grad(total, (0, 1, 2))(*t), jax.jvp(jax.grad(first), t, t)[1]))

    attended = functools.partial(loss, mw.attention)
    expected = twice(functools.partial(loss, functools.partial(whole, segments=None)))(Q, K, V)
    for first in (attended, Way("x=4", "length:x").region(attended)):
        assert_same(twice(first)(Q, K, V), expected, sight, 5e-5)
        with pytest.raises(TypeError, match="jvp"):
            jax.jvp(first, (Q, K, V), (Q, K, V))


def test_of_no_tokens_comes_nothing() -> None:
    q, k = (x.slice("length", 0, 0) for x in (Q, K))
    agree(lambda q, k: mw.attention(q, k, k, causal=True), q, k, over=ways(("x=4", "length:x"), partitioners=["names"]))
    nobody = mw.attention(Q.slice("batch", 0, 0), *(K.slice("batch", 0, 0),) * 2)
    assert nobody.size("batch") == 0 and nobody.dtype == jnp.float32


# What is sent

ELEMENTS = 2 * 16 * 2 * 8
"""Of keys on one of four devices: batch, a quarter of the length, heads, head_dim."""


def sent(region: Any, *inputs: Any) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for kind, size in communicated(region, *inputs):
        found.setdefault(kind, []).append(size)
    return found


@pytest.mark.parametrize("causal", [False, True])
def test_keys_go_round_and_are_never_gathered(causal: bool) -> None:
    region = Way("x=4", "length:x").region(functools.partial(mw.attention, causal=causal))
    p = mw.plan(jax.grad(lambda q, k, v: mw.sum(region(q, k, v)), (0, 1, 2)), Q, K, K)
    rows = [(row.kind, row.times) for row in p.collectives]
    assert {kind for kind, _ in rows} == {"permute"}
    around = [row for row in p.collectives if row.payload_bytes == ELEMENTS * 4 / (2 if causal else 1)]
    # Three hops forward, three back; there the gradients (of float32) come behind, and home with a fourth.
    pieces = 2 if causal else 1
    halves = 2 * (2 + 2) if causal else 0  # keys and values to their halves and their gradients back: two permutes each
    assert sum(row.times for row in around) == pieces * (2 * 3 + 2 * 3 + 2 * 4) + halves
    assert set(sent(region, Q, K, K)) == {"collective_permute"}


def test_a_window_asks_its_neighbours_alone() -> None:
    """A device has 8 of the 64 tokens."""
    for window, causal, hops in (
        (1, True, 0),
        (9, True, 1),
        (10, True, 2),
        (17, True, 2),
        (1, False, 0),
        (10, False, 4),
    ):
        region = Way("x=8", "length:x").region(functools.partial(mw.attention, causal=causal, window=window))
        rows = mw.plan(region, Q, K, K).collectives
        assert sum(row.times for row in rows) == 2 * hops, (window, causal)
        assert all(row.kind == "permute" for row in rows)


def test_memory_grows_with_the_length_not_with_its_square() -> None:
    def needed(length: int) -> int:
        dims = mw.Dim("batch", 1), mw.Dim("length", length), mw.Dim("heads", 1), mw.Dim("head_dim", 8)
        x = jax.eval_shape(lambda: mw.zeros(dims))
        region = Way("x=4", "length:x").region(functools.partial(mw.attention, causal=True))
        program = jax.jit(jax.grad(lambda q, k, v: mw.sum(region(q, k, v)), (0, 1, 2)))
        analysis: Any = program.lower(x, x, x).compile().memory_analysis()
        return int(analysis.temp_size_in_bytes)

    lengths = [16384, 32768, 65536, 131072]
    found = [needed(n) for n in lengths]
    for before, after in itertools.pairwise(found):
        assert after < 2.2 * before, dict(zip(lengths, found, strict=True))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: mw.attention(Q, K, K, over="lenght"), "attention: .*'lenght'.*Did you mean 'length'"),
        (lambda: mw.attention(K, Q, Q), "the queries lack group=3, which the keys have"),
        (lambda: mw.attention(Q, K, K.rename(heads="h")), "keys and values must have the same dims"),
        (lambda: mw.attention(Q, K, K, window=0), "window=0; a token sees itself at least"),
        (lambda: mw.attention(Q, K, K, window=2.5), "the window is a float; it must be an int"),  # pyright: ignore[reportArgumentType]
        (lambda: mw.attention(Q, K, K, window=jnp.int32(3)), "the window is a JAX array .* must be an int"),  # pyright: ignore[reportArgumentType]
        (lambda: mw.attention(Q, K, K, scale=Q), "scale is a Tensor; give a number"),  # pyright: ignore[reportArgumentType]
        (lambda: mw.attention(Q, K.astype("int32"), K), "an operand is of int32; .*astype.*keys"),
        (
            lambda: mw.attention(Q, *(K.slice("length", 0, 32),) * 2),
            r"'length' has several sizes.*length=64.*length=32.*(?s:.)*another name",
        ),
        (lambda: mw.attention(Q, K, K, segments=Q), "segments .* must be integers, with dims of the keys but"),
        (
            lambda: Way("x=2", "head_dim:x").region(mw.attention)(Q, K, K),
            "'head_dim' is split, along which queries and keys are multiplied",
        ),
    ],
)
def test_what_is_wrong_is_said(call: Any, says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        call()
