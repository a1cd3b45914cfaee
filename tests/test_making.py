"""arange, linspace, constants, and masks from positions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshwright as mw

from .laws import ABC, Way, agree, tensor, ways
from .stablehlo import communicated

A, B, C = mw.dims(a=8, b=8, c=16)


def numpy(x: mw.Tensor) -> np.ndarray:
    return np.asarray(x.array)


def test_ranges_are_numpys() -> None:
    positions = mw.arange(A)
    assert positions.dims == (A,) and positions.dtype == jnp.int32
    np.testing.assert_array_equal(numpy(positions), np.arange(8))
    np.testing.assert_array_equal(numpy(mw.arange(A, 5, -2)), np.arange(5, 5 - 16, -2))
    halves = mw.arange(A, 1, 0.5)
    assert halves.dtype == jnp.float32
    np.testing.assert_array_equal(numpy(halves), np.arange(1, 5, 0.5))
    assert mw.arange(A, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    np.testing.assert_allclose(numpy(mw.linspace(A, -1.0, 2.5)), np.linspace(-1, 2.5, 8), rtol=1e-6)
    np.testing.assert_allclose(numpy(mw.linspace(A, 0, 4, endpoint=False)), np.linspace(0, 4, 8, endpoint=False))
    assert numpy(mw.linspace(mw.Dim("one", 1), 3.0, 4.0)).tolist() == [3.0]


def test_constants_are_numpys() -> None:
    for made, array in (
        (mw.zeros((A, B)), np.zeros((8, 8), np.float32)),
        (mw.ones(A, jnp.int8), np.ones(8, np.int8)),
        (mw.full((B, A), 2.5), np.full((8, 8), 2.5, np.float32)),
        (mw.full(A, True), np.full(8, True)),
        (mw.zeros_like(tensor(A, B)), np.zeros((8, 8), np.float32)),
        (mw.ones_like(tensor(A), jnp.int32), np.ones(8, np.int32)),
        (mw.full_like(tensor(A).astype(jnp.bfloat16), 3), np.full(8, 3, jnp.bfloat16)),
        (mw.eye(A, C, 2), np.eye(8, 16, 2, dtype=np.float32)),
        (mw.eye(A, B, dtype=jnp.int32), np.eye(8, dtype=np.int32)),
        (mw.tri(A, C, -1), np.tri(8, 16, -1, dtype=bool)),
    ):
        assert made.dtype == array.dtype
        np.testing.assert_array_equal(numpy(made), array)
    assert mw.zeros(()) == 0.0 and mw.ones_like(3.0) == 1.0


def test_causal_masks() -> None:
    queries, keys = mw.dims(queries=3, keys=5)
    mask = mw.causal_mask(queries, keys)
    assert mask.dims == (queries, keys) and mask.dtype == jnp.bool_
    np.testing.assert_array_equal(numpy(mask), np.tri(3, 5, dtype=bool))
    later = jax.jit(lambda start: mw.causal_mask(queries, keys, start=start))(jnp.int32(2))
    np.testing.assert_array_equal(numpy(later), np.tri(3, 5, 2, dtype=bool))
    window = mw.causal_mask(queries, keys, start=2, window=2)
    np.testing.assert_array_equal(numpy(window), np.tri(3, 5, 2, dtype=bool) & ~np.tri(3, 5, 0, dtype=bool))


def _all_of_them(x: mw.Tensor, start: Any) -> Any:
    return {
        "arange": mw.arange(A),
        "arange from": mw.arange(B, start * 1.0, 0.25),
        "linspace": mw.linspace(C, 0.0, start * 2.0),
        "zeros": mw.zeros((A, B)),
        "ones": mw.ones((B, C), jnp.int32),
        "full": mw.full((A, B, C), start),
        "zeros like": mw.zeros_like(x),
        "full like": mw.full_like(x.sum("a"), 2.0) * x.sum("a"),
        "eye": mw.eye(A, C, 1),
        "tri": mw.tri(B, C, 2),
        "mask": mw.causal_mask(A, B, window=3),
        "masked": mw.where(mw.causal_mask(B, C, start=2), x, 0.0),
        "sum": mw.arange(C, dtype=jnp.float32).sum() + mw.ones((A, B)).sum(),
    }


def test_what_is_made_does_not_depend_on_the_layout() -> None:
    agree(_all_of_them, tensor(A, B, C), jnp.float32(1.5), over=ways(*ABC[7:], partitioners=["names"]))
    agree(_all_of_them, tensor(A, B, C), jnp.float32(1.5), over=ways(ABC[10], partitioners=["xla"]))


def test_nothing_is_communicated() -> None:
    way = Way("x=2,y=2,z=2", "a:x, b:y, c:z")

    def program(x: mw.Tensor) -> Any:
        made = _all_of_them(x, jnp.float32(1.0))
        return [made[name] for name in made if name not in ("sum", "full like")]

    assert communicated(way.region(program), tensor(A, B, C)) == []


def test_like_a_parameter_lies_at_rest() -> None:
    x = tensor(A, C, role="parameter")
    way = Way("x=2,y=2", "c:x", {"params": "a:y"})
    region = way.region(lambda x: (mw.zeros_like(x), mw.ones_like(x) + x.astype(jnp.float32)))
    assert communicated(region, x) == []
    zeros, more = region(x)
    assert zeros.role == "parameter"
    np.testing.assert_array_equal(numpy(more), numpy(x) + 1)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"the dim 'a' stands twice"):
        mw.tri(A, A)
    with pytest.raises(TypeError, match=r"expected dims, found 8 of type int; write mw.Dim\(name, size\)"):
        mw.zeros((8, 8))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"full: value must be a scalar, found a tensor \(a=8\)"):
        mw.full(A, tensor(A))
    with pytest.raises(ValueError, match=r"causal_mask: window=0; a query sees at least 1 key"):
        mw.causal_mask(A, B, window=0)
    both = Way("x=2", "a:x, b:x").region(lambda x: mw.causal_mask(A, B))
    with pytest.raises(ValueError, match=r"'a' and 'b' of one tensor are both split over the axis 'x'"):
        both(jnp.float32(1))


def test_linspace_of_integers_is_numpys() -> None:
    for start, stop in ((0, 10), (-3, 4), (5, -5)):
        found = mw.linspace(mw.Dim("a", 7), start, stop, dtype="int32")
        np.testing.assert_array_equal(found.array, np.linspace(start, stop, 7, dtype="int32"))
        assert found.dtype == jnp.int32
