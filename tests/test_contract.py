"""Contractions: values against ``np.einsum``, law 1, and what is sent, forward and backward."""

import itertools
import math
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

from .laws import ABC, Way, agree, tensor, ways
from .stablehlo import communicated

A, B, C, D, E = mw.dims(a=8, b=8, c=16, d=8, e=4)
X, Y, W, V = tensor(A, B, C), tensor(C, A, D, seed=1), tensor(B, C, D, seed=2), tensor(D, E, seed=3)


def _letters(spec: str) -> tuple[list[str], str]:
    given, _, out = spec.partition("->")
    return given.split(","), out


def _random(names: str, sizes: dict[str, int], seed: int) -> Tensor:
    """Small whole numbers, whose products and sums float32 holds exactly."""
    rng = np.random.default_rng(seed)
    return Tensor(jnp.asarray(rng.integers(-3, 4, [sizes[n] for n in names]), jnp.float32), tuple(names))


def _by_numpy(spec: str, *tensors: Tensor) -> Any:
    return np.einsum(spec, *(np.asarray(x.array, np.float64) for x in tensors))


# On no mesh, against NumPy

SPECS = [
    "ab->ab", "ab->ba", "abc->cab", "a->a",
    "a,a->", "a,a->a", "a,b->ab", "a,b->ba", "ab,b->a", "ab,bc->ac", "ab,bc->ca", "ab,cb->ac", "ab,ab->", "ab,ba->ab",
    "ab,ba->", "abc,bcd->ad", "abc,cbd->ad", "abc,dcb->da", "abc,bd->adc", "abcd,bc->ad", "abcd,db->ca",
    "abc,abd->abcd", "abc,bad->dcab", "abc,acd->abd", "bac,cad->bad", "abcde,ebd->ac", "abcd,abcd->", "ab,cd->cbad",
    "ab,bc,cd->ad", "ab,bc,cd->da", "ab,bc,ca->", "a,a,a->a", "a,b,c->cab", "ab,ac,ad->abcd", "abc,bd,cd->a",
    "ab,ab,ab->b", "ab,bc,c->a", "ab,bc,cd,de->ae", "ab,bc,cd,da->", "a,ab,b,bc->c", "abc,bcd,cde,de->a",
    "ab,bc,cd,de,ea->", "ab,bc,cd,de,ef->fa", "a,a,b,b,ab->ab", "abc,ad,bd,cd,de->e", "ab,bc,cd,de,ef,fa->",
]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
def test_values_against_numpy(spec: str) -> None:
    given, out = _letters(spec)
    tensors = [_random(names, {n: 2 + i for i, n in enumerate("abcdef")}, i) for i, names in enumerate(given)]
    found = mw.einsum(*tensors, out=tuple(out))
    assert (found.names if out else ()) == tuple(out)
    np.testing.assert_array_equal(np.asarray(found.array if out else found), _by_numpy(spec, *tensors))


@st.composite
def contractions(draw: st.DrawFn) -> tuple[str, dict[str, int]]:
    """A legal contraction of one to five operands: a name that stands in one operand only is kept."""
    given = draw(
        st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4, unique=True), min_size=1, max_size=5)
    )
    every = sorted(set(itertools.chain(*given)))
    free = [n for n in every if sum(n in names for names in given) < 2]
    kept = draw(st.permutations(free + draw(st.lists(st.sampled_from(every), unique=True).map(_without(free)))))
    sizes = {n: draw(st.integers(0 if n == "f" else 1, 4)) for n in every}
    return ",".join("".join(names) for names in given) + "->" + "".join(kept), sizes


def _without(names: list[str]) -> Callable[[list[str]], list[str]]:
    return lambda drawn: [n for n in drawn if n not in names]


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(contractions())
def test_drawn_contractions_against_numpy(drawn: tuple[str, dict[str, int]]) -> None:
    spec, sizes = drawn
    given, out = _letters(spec)
    tensors = [_random(names, sizes, i) for i, names in enumerate(given)]
    found = jax.jit(lambda *xs: mw.einsum(*xs, out=tuple(out)))(*tensors)
    np.testing.assert_array_equal(np.asarray(found.array if out else found), _by_numpy(spec, *tensors))


def test_dot_keeps_the_names_in_the_order_met() -> None:
    x, w = tensor(A, B, C), tensor(C, B, D, seed=1)
    for over, names, spec in (
        ("c", ("a", "b", "d"), "abc,cbd->abd"),
        ("b c", ("a", "d"), "abc,cbd->ad"),
        (("c", "b"), ("a", "d"), "abc,cbd->ad"),
        ("b b", ("a", "c", "d"), "abc,cbd->acd"),
        ((), ("a", "b", "c", "d"), "abc,cbd->abcd"),
        (["c"], ("a", "b", "d"), "abc,cbd->abd"),
    ):
        found = mw.dot(x, w, over)
        assert found.names == names
        np.testing.assert_allclose(np.asarray(found.array), _by_numpy(spec, x, w), rtol=1e-5, atol=1e-5)
    total = mw.dot(x, x, "a b c")
    assert not isinstance(total, Tensor) and total.shape == ()
    np.testing.assert_allclose(total, _by_numpy("abc,abc->", x, x), rtol=1e-5)


def test_names_as_text_and_as_tuples() -> None:
    expected = mw.einsum(X, V.rename(d="a"), out=("e", "b", "c")).array
    outs: list[Any] = ["e b c", "e, b, c", ["e", "b", "c"], iter("ebc")]
    for out in outs:
        np.testing.assert_array_equal(mw.einsum(X, V.rename(d="a"), out=out).array, expected)
    for out in ((), "", []):
        assert mw.einsum(X, X, out=out).shape == ()


def test_gradients_against_positional_jax() -> None:
    def named(x: Any, y: Any, w: Any) -> Any:
        return mw.sum(mw.sin(mw.einsum(x, y, w, out="d a")))

    def positional(x: Any, y: Any, w: Any) -> Any:
        return jnp.sum(jnp.sin(jnp.einsum("abc,cad,bcd->da", x, y, w)))

    found = jax.grad(named, (0, 1, 2))(X * 0.1, Y * 0.1, W * 0.1)
    expected = jax.grad(positional, (0, 1, 2))(X.array * 0.1, Y.array * 0.1, W.array * 0.1)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.array, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", ["ab,bc->ca", "abc,bcd->da", "abc,acd->adb", "ab,bc,cd->da"])
def test_a_result_the_other_way_round_is_not_transposed(spec: str) -> None:
    """XLA's CPU backend has no transposed product of bfloat16 that comes out in float32, either."""
    given, out = _letters(spec)
    tensors = [_random(names, dict.fromkeys("abcd", 4), i) for i, names in enumerate(given)]
    halves = [x.astype(jnp.bfloat16) for x in tensors]
    program = jax.jit(lambda *xs: mw.einsum(*xs, out=tuple(out), preferred_element_type=jnp.float32))
    assert "transpose" not in program.lower(*tensors).as_text()
    np.testing.assert_array_equal(np.asarray(program(*halves).array), _by_numpy(spec, *tensors))


# Dtypes


def test_the_preferred_element_type_is_that_of_products_and_sums() -> None:
    """257 terms of 1 + 1/128 in bfloat16, and int8 products that int8 does not hold."""
    k = mw.Dim("k", 257)
    x = Tensor(jnp.full((2, 257), 1 + 2**-7, jnp.bfloat16), (mw.Dim("i", 2), k))
    w = Tensor(jnp.ones(257, jnp.bfloat16), (k,))
    wide = mw.dot(x, w, "k", preferred_element_type=jnp.float32)
    assert wide.dtype == jnp.float32
    np.testing.assert_array_equal(wide.array, np.full(2, 257 * (1 + 2**-7), np.float32))
    assert mw.dot(x, w, "k").dtype == jnp.bfloat16
    bytes_ = Tensor(jnp.asarray([[100, 100], [-128, 3]], jnp.int8), "i j")
    summed = mw.einsum(bytes_, bytes_, out="i", preferred_element_type=jnp.int32)
    np.testing.assert_array_equal(summed.array, np.array([20000, 16393], np.int32))
    np.testing.assert_array_equal(mw.einsum(bytes_, bytes_, out="i").array, np.array([20000, 16393]).astype(np.int8))


@pytest.mark.parametrize("num", [1, 2, 3, 5])
@pytest.mark.parametrize("preferred", [None, jnp.float32])
def test_dtypes_that_come_out(num: int, preferred: Any) -> None:
    tensors = [tensor(B, D, seed=i, dtype=jnp.bfloat16) for i in range(num)]
    found = mw.einsum(*tensors, out="d b", preferred_element_type=preferred)
    assert found.dtype == (preferred or jnp.bfloat16)
    expected = math.prod(np.asarray(x.array, np.float64) for x in tensors).T  # type: ignore[union-attr]
    np.testing.assert_allclose(np.asarray(found.array, np.float64), expected, rtol=2**-6, atol=1e-2)


def test_operands_of_several_dtypes_are_promoted_as_in_jax() -> None:
    whole, half = tensor(A, B, dtype=jnp.float32), tensor(B, D, dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="no available implicit dtype promotion path"):
        mw.dot(whole, half, "b")
    with jax.numpy_dtype_promotion("standard"):
        found = mw.dot(whole, half, "b")
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found.array, _by_numpy("ab,bd->ad", whole, half), rtol=1e-5)


def test_complex_and_boolean() -> None:
    x, w = (tensor(A, B, seed=i).astype(jnp.complex64) * (1 + 2j) for i in (0, 1))
    np.testing.assert_allclose(mw.dot(x, w, "b").array, np.einsum("ab,ab->a", x.array, w.array), rtol=1e-5)
    p, q = tensor(A, B) > 1.5, tensor(B, D, seed=1) > 1.0
    found = mw.dot(p, q, "b")
    assert found.dtype == jnp.bool_
    np.testing.assert_array_equal(found.array, np.einsum("ab,bd->ad", np.asarray(p.array), np.asarray(q.array)))
    assert 0 < np.asarray(found.array).sum() < 64


# Law 1

CASES: dict[str, Callable[..., Any]] = {
    "one": lambda x, y, w, v: mw.einsum(x, out="c a b"),
    "free": lambda x, y, w, v: mw.einsum(v, x.sum("b c"), out="e a d"),
    "contracted": lambda x, y, w, v: mw.einsum(x, w, out="a d"),
    "batched": lambda x, y, w, v: mw.einsum(x, y, out="a b d"),
    "batched, none contracted": lambda x, y, w, v: mw.einsum(x, w, out="d c b a"),
    "elementwise": lambda x, y, w, v: mw.einsum(x, x, out="a b c"),
    "scalar": lambda x, y, w, v: mw.einsum(x, x, out=()),
    "scalar of three": lambda x, y, w, v: mw.einsum(x, y, w, out=()),
    "three": lambda x, y, w, v: mw.einsum(x, y, w, out="d b"),
    "three with one kept": lambda x, y, w, v: mw.einsum(x, w, v, out="c e a"),
    "four": lambda x, y, w, v: mw.einsum(x, y, w, v, out="e a"),
    "five": lambda x, y, w, v: mw.einsum(x, w, v, y, v * 0.5, out="b e"),
    "of a sum": lambda x, y, w, v: mw.dot(mw.dot(x, w, "b"), v, "d"),
    "of renamed": lambda x, y, w, v: mw.dot(x.rename(a="b", b="a"), w, "b c"),
    "of a square": lambda x, y, w, v: mw.einsum(x, x.rename(a="f"), out="a f"),
    "dot": lambda x, y, w, v: mw.dot(x, w, "b c") + mw.dot(x, y, "c").sum("b"),
    "in bfloat16": lambda x, y, w, v: mw.einsum(
        mw.floor(x * 4).astype(jnp.bfloat16), mw.floor(w * 4).astype(jnp.bfloat16), out="d a",
        preferred_element_type=jnp.float32,
    ),
    "in bytes": lambda x, y, w, v: mw.dot((x * 60).astype(jnp.int8), (w * 60).astype(jnp.int8), "b c"),
    "in wide bytes": lambda x, y, w, v: mw.dot(
        (x * 60).astype(jnp.int8), (w * 60).astype(jnp.int8), "b c", preferred_element_type=jnp.int32
    ).rename(d="b"),
    "of booleans": lambda x, y, w, v: mw.dot(x > 1.8, w > 1.8, "b c"),
    "of booleans, renamed": lambda x, y, w, v: mw.dot(x > 1.9, x > 1.7, "a").rename(b="a").astype(jnp.int32) * 3,
    "of complex numbers": lambda x, y, w, v: mw.abs(
        mw.dot(x.astype(jnp.complex64) * (2 + 1j), w.astype(jnp.complex64) + 1j, "c b")
    ),
}  # fmt: skip


def test_contractions_are_the_same_under_every_layout() -> None:
    inputs = X * 0.5, Y * 0.5, Tensor(W.array, W.dims, "parameter"), Tensor(V.array, V.dims, "parameter")
    over = ways(ABC[0], ABC[3], ABC[8], ABC[9], partitioners=("names",))
    over += ways(("x=2,y=4", "d:y, c:x"), ("x=2,y=2,z=2", "e:y, b:x, d:z"), partitioners=("names",))
    over += ways(ABC[6], partitioners=("xla",))
    over += [
        Way("x=2,y=2", "a:x", {"params": "b:y, d:x", "gather": "use"}),
        Way("x=2,y=2", "b:x, d:y", {"params": "(y,x)", "gather": "step"}),
    ]
    agree(CASES, *inputs, over=over, relative=2e-5)


# Communication

PAIR = "x=2,y=2"
SENT: dict[str, tuple[str, str, Callable[..., Any], list[tuple[str, int]], list[tuple[str, int]]]] = {
    # mesh, layout, program of x (a, b, c) and w (b, c, d); what a device puts in forward, and more of it backward
    "whole": ("x=2", "", lambda x, w: mw.dot(x, w, "b c"), [], []),
    "batch dims": ("x=2", "c:x", lambda x, w: mw.einsum(x, w, out="a b c d"), [], []),
    "a row": ("x=2", "a:x", lambda x, w: mw.dot(x, w, "b c"), [], [("all_reduce", 1024)]),
    "a column": ("x=2", "d:x", lambda x, w: mw.dot(x, w, "b c"), [], [("all_reduce", 1024)]),
    "contracted": ("x=2", "b:x", lambda x, w: mw.dot(x, w, "b c"), [("all_reduce", 64)], []),
    "contracted to a scalar": ("x=2", "b:x", lambda x, w: mw.einsum(x, x, out=()), [("all_reduce", 1)], []),
    "contracted, two axes": (PAIR, "b:x, c:y", lambda x, w: mw.dot(x, w, "b c"), [("all_reduce", 64)], []),
    "contracted, one dim over two": (PAIR, "c:(y,x)", lambda x, w: mw.dot(x, w, "b c"), [("all_reduce", 64)], []),
    "a row, contracted": (
        PAIR, "a:x, b:y", lambda x, w: mw.dot(x, w, "b c"), [("all_reduce", 32)], [("all_reduce", 512)]
    ),
    "a row and a column": (
        PAIR, "a:x, d:y", lambda x, w: mw.dot(x, w, "b c"), [], [("all_reduce", 512), ("all_reduce", 512)]
    ),
    "three of one": (
        "x=2", "b:x", lambda x, w: mw.einsum(x, w, w * 2.0, out="a d"), [("all_reduce", 64)], []
    ),
    "of booleans": (
        "x=2", "b:x", lambda x, w: mw.dot(x > 1, w > 1, "b c").astype(jnp.float32), [("all_reduce", 64)], []
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SENT)
def test_what_a_contraction_sends(name: str) -> None:
    mesh, layout, program, forward, backward = SENT[name]
    region = Way(mesh, layout).region(program)
    assert communicated(region, X, W) == forward

    def total(x: Any, w: Any) -> Any:
        found = region(x, w)
        return jnp.sum(found.array * 2.0) if isinstance(found, Tensor) else found * 2.0

    back = communicated(jax.grad(total, (0, 1)), X, W)
    assert sorted(back) in (sorted(backward), sorted(forward + backward))


def test_a_parameter_at_rest_is_gathered_and_its_gradient_reduce_scattered() -> None:
    """FSDP: the batch split over the axis of the rest. Gathered again in the backward pass, never kept."""
    w = Tensor(W.array, W.dims, "parameter")
    region = Way("x=2", "a:x", {"params": "b:x"}).region(lambda x, w: mw.sum(mw.sin(mw.dot(x, w, "b c"))))
    gathered, scattered = ("all_gather", 512), ("reduce_scatter", 1024)
    assert communicated(region, X, w) == [gathered, ("all_reduce", 1)]
    assert communicated(jax.grad(region, 1), X, w) == [gathered, scattered]
    assert communicated(jax.grad(region, (0, 1)), X, w) == [gathered, gathered, scattered]


# Errors

P, Q = tensor(*mw.dims(batch=8, embed=4)), tensor(*mw.dims(embed=4, ff=6), seed=1)
MISTAKES: dict[str, tuple[type[Exception], Callable[[], Any], list[str]]] = {
    "no tensors": (TypeError, lambda: mw.einsum(out="a"), ["einsum: no tensors. Write mw.einsum(x, w, out=("]),
    "an array": (
        TypeError, lambda: mw.einsum(P, np.ones((4, 2)), out="batch"),  # type: ignore[arg-type]
        ["einsum: expected a tensor, found an array of shape (4, 2). Name its dims: mw.Tensor(array, 'batch embed')."],
    ),
    "a scalar": (
        TypeError, lambda: mw.einsum(P, 2.0, out="batch embed"),  # type: ignore[arg-type]
        ["einsum: expected a tensor, found float."],
    ),
    "unknown in out": (
        ValueError, lambda: mw.einsum(P, Q, out="batch f"),
        ["einsum: out has the name 'f', which stands in no operand. Did you mean 'ff'? Known: batch, embed, ff.",
         "operands: (batch=8, embed=4); (embed=4, ff=6)", "To repeat along a new dim, use x.broadcast(dim)."],
    ),
    "summed alone": (
        ValueError, lambda: mw.einsum(P, Q, out="batch"),
        ["einsum: the dim 'ff' would be summed over, but it stands in one operand only.",
         "operands: (batch=8, embed=4); (embed=4, ff=6)", "out: (batch)",
         "If you mean the sum, take it first: x.sum('ff').", "put it in out; if it is misspelt, rename it."],
    ),
    "summed alone, one operand": (ValueError, lambda: mw.einsum(P, out="batch"), ["the dim 'embed' would be summed"]),
    "twice in out": (
        ValueError, lambda: mw.einsum(P, Q, out="batch ff batch"),
        ["einsum: out: the dim 'batch' stands twice in (batch=8, ff=6, batch=8)."],
    ),
    "two sizes": (
        ValueError, lambda: mw.einsum(P, Q.slice("embed", 0, 3), out="batch ff"),
        ["einsum: the dim 'embed' has size 4 in one operand and 3 in another.", "(batch=8, embed=4); (embed=3, ff=6)",
         "One name has one size: rename one of them, or slice it to the other's size."],
    ),
    "dot, missing": (
        ValueError, lambda: mw.dot(P, Q, "ff"), ["dot: there is no dim 'ff' in (batch=8, embed=4). Known: batch, embed"]
    ),
    "dot, misspelt": (
        ValueError, lambda: mw.dot(P, Q, "embd"), ["dot: there is no dim 'embd' in (batch=8, embed=4). Did you"]
    ),
    "dot, two sizes": (
        ValueError, lambda: mw.dot(P, Q.slice("embed", 0, 3), "embed"),
        ["dot: the dim 'embed' has size 4 in one operand and 3 in another."],
    ),
    "dot, an array": (
        TypeError, lambda: mw.dot(P, [1.0], "embed"), ["dot: expected a tensor, found list."]  # type: ignore[arg-type]
    ),
    "two on one axis": (
        ValueError, lambda: Way("x=2", "batch:x, ff:x").region(lambda x, w: mw.dot(x, w, "embed"))(P, Q),
        ["einsum, its operands together: the dims 'batch' and 'ff' of one tensor are both split over the axis 'x'.",
         "tensor: (batch=8, embed=4, ff=6)", "layout: batch:x, ff:x", ".rename(ff='ff_whole')"],
    ),
    "contracted and kept on one axis": (
        ValueError,
        lambda: Way("x=2", "embed:x, out:x").region(lambda x, w: mw.dot(x, w.rename(ff="out"), "embed"))(P, Q),
        ["the dims 'embed' and 'out' of one tensor are both split over the axis 'x'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    error, program, words = MISTAKES[name]
    with pytest.raises(error) as caught:
        program()
    for text in (*words, "at tests/test_contract.py:"):
        assert text in str(caught.value)
