"""cumsum, cumprod, cummax, cummin and cumlogsumexp."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshwright as mw

from .laws import ABC, Way, agree, tensor, ways
from .stablehlo import communicated

A, B, C = mw.dims(a=8, b=8, c=16)
NAMES = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
UFUNCS: dict[str, np.ufunc] = dict(zip(NAMES, (np.add, np.multiply, np.maximum, np.minimum, np.logaddexp), strict=True))
REDUCTIONS: dict[str, str] = dict(zip(NAMES, ("sum", "prod", "max", "min", "logsumexp"), strict=True))


def numpy(x: mw.Tensor) -> np.ndarray:
    return np.asarray(x.array)


def tied(*dims: mw.Dim) -> mw.Tensor:
    values = np.random.default_rng(0).integers(-1, 2, [d.size for d in dims])
    return mw.Tensor(jnp.asarray(values, jnp.float32), dims)


@pytest.mark.parametrize("name", NAMES)
def test_values_are_numpys(name: str) -> None:
    x, cumulative = tensor(A, B), getattr(mw, name)
    np.testing.assert_allclose(numpy(cumulative(x, "b")), UFUNCS[name].accumulate(numpy(x), 1), rtol=1e-5)
    backwards = UFUNCS[name].accumulate(numpy(x)[::-1], 0)[::-1]
    np.testing.assert_allclose(numpy(cumulative(x, "a", reverse=True)), backwards, rtol=1e-5)


def test_dtypes() -> None:
    flags = tensor(A, B) > 0
    counts = mw.cumsum(flags, "a")
    assert counts.dtype == jnp.int32
    np.testing.assert_array_equal(numpy(counts), np.cumsum(numpy(flags), 0))
    small = tensor(B).astype(jnp.int8)
    for name in NAMES[:4]:
        assert getattr(mw, name)(small, "b").dtype == jnp.int8
    np.testing.assert_array_equal(numpy(mw.cummax(small, "b")), np.maximum.accumulate(numpy(small)))
    assert mw.cumlogsumexp(small, "b").dtype == jnp.float32


@pytest.mark.parametrize("name", NAMES)
def test_each_position_has_the_gradient_of_the_reduction_so_far(name: str) -> None:
    """At ties too: the oracle is ``mw.max`` and its like, on the positions so far."""
    x = tied(B) if name in ("cummax", "cummin") else tensor(B)

    def stretch(whole: mw.Tensor, i: int) -> Any:
        return getattr(mw, REDUCTIONS[name])(mw.Tensor(whole.array[: i + 1], "so_far"))

    for i in (0, 3, 7):
        found = jax.grad(lambda x, i=i: mw.take(getattr(mw, name)(x, "b"), i, "b"))(x)
        expected = jax.grad(functools.partial(stretch, i=i))(x)
        np.testing.assert_allclose(numpy(found), numpy(expected), rtol=1e-5, atol=1e-6)


def test_cumulative_does_not_depend_on_the_layout() -> None:
    cases = {
        "sum": lambda x, t: mw.cumsum(x, "c"),
        "sum, reversed": lambda x, t: mw.cumsum(x, "b", reverse=True),
        "product": lambda x, t: mw.cumprod(mw.where(t > 0, x, t), "c"),
        "greatest, tied": lambda x, t: mw.cummax(t, "c"),
        "least, tied, reversed": lambda x, t: mw.cummin(t, "b", reverse=True),
        "logarithms": lambda x, t: mw.cumlogsumexp(x, "c", reverse=True),
        "counts": lambda x, t: mw.cumsum(x > 0, "c"),
        "greatest of ints": lambda x, t: mw.cummax((x * 9.0).astype(jnp.int32), "b"),
    }
    some = [ABC[i] for i in (3, 8, 10)]
    over = [*ways(*some, partitioners=["names"]), *ways(ABC[6], partitioners=["xla"])]
    agree(cases, tensor(A, B, C), tied(A, B, C), over=over)


def test_infinities_under_every_layout() -> None:
    low = np.full(8, -np.inf, np.float32)
    low[5], low[2] = 1.0, 2.0
    x = mw.Tensor(jnp.asarray(np.stack([low, np.full(8, -np.inf, np.float32), np.roll(low, 2)])), "rows b")

    def total(x: mw.Tensor) -> Any:
        sums = mw.cumlogsumexp(x, "b")
        return mw.where(mw.isinf(sums), 0.0, sums).sum() + mw.cummax(mw.exp(x), "b").sum(), sums

    (_, sums), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(x)
    np.testing.assert_allclose(numpy(sums), np.logaddexp.accumulate(numpy(x), 1), rtol=1e-6)
    assert np.isfinite(numpy(gradient)).all()
    for way in ways(("x=4", "b:x"), ("x=8", "b:x"), partitioners=["names"]):
        (_, found), to_x = jax.jit(jax.value_and_grad(way.region(total), has_aux=True))(x)
        np.testing.assert_allclose(numpy(found), numpy(sums), rtol=1e-6)
        np.testing.assert_allclose(numpy(to_x), numpy(gradient), rtol=1e-5, atol=1e-6)


def test_only_totals_are_gathered() -> None:
    x, way = tensor(A, B, C), Way("x=4,y=2", "c:x, a:y")
    for name in NAMES:
        cumulative = getattr(mw, name)
        found = communicated(way.region(functools.partial(cumulative, name="c")), x)
        assert found == [("all_gather", 4 * 8)], f"{name}: one total for each row of a device"
        assert communicated(way.region(functools.partial(cumulative, name="b")), x) == []
    back = communicated(jax.grad(way.region(lambda x: mw.sum(mw.cumsum(x, "c") * x))), x)
    assert max(size for _, size in back) <= 4 * 4 * 8, back
    assert ("reduce_scatter", 4 * 4 * 8) in back


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"cumsum: there is no dim 'bb' in \(a=8, b=8\). Did you mean 'b'"):
        mw.cumsum(tensor(A, B), "bb")
    with pytest.raises(TypeError, match=r"cummax: expected a tensor, found an array of shape \(3,\)"):
        mw.cummax(jnp.ones(3), "b")


def test_nan_has_the_same_gradients_under_every_layout() -> None:
    """In the first slice, in the last, in none, in two: what stands before a slice lets no gradient of NaN through."""
    values = np.array(tensor(mw.Dim("rows", 5), B).array)
    values[0, 3], values[1, 0], values[2, 7], values[3, [2, 4]] = np.nan, np.nan, np.nan, np.nan
    x = mw.Tensor(jnp.asarray(values), "rows b")
    cases = {
        f"{name}, reverse={back}": lambda x, name=name, back=back: getattr(mw, name)(x, "b", reverse=back)
        for name in NAMES
        for back in (False, True)
    }
    agree(cases, x, over=ways(("x=2", "b:x"), ("x=4", "b:x"), ("x=8", "b:x"), partitioners=["names"]))
    to_x = jax.grad(lambda x: mw.sum(mw.cummax(x, "b")))(x)
    whole = np.where(np.isnan(values[3]), 0.0, numpy(to_x)[3])
    assert numpy(to_x)[0, 3] == 5 and numpy(to_x)[1, 0] == 8 and whole.sum() == 2, "the first NaN takes what follows"
    of_product = numpy(jax.grad(lambda x: mw.sum(mw.cumprod(x, "b")))(x))
    np.testing.assert_array_equal(np.isnan(of_product[0]), np.arange(8) != 3)
    assert np.isfinite(of_product[4]).all()


def test_a_split_dim_without_elements() -> None:
    x = tensor(mw.Dim("none", 0), B)
    cases = {name: lambda x, name=name: getattr(mw, name)(x, "none") for name in NAMES}
    cases |= {"rename": lambda x: x.rename(none="whole"), "sort": lambda x: mw.sort(x, "none")}
    cases |= {"sum": lambda x: mw.sum(x, "none"), "greatest of others": lambda x: mw.max(x, "b")}
    agree(cases, x, over=ways(("x=4", "none:x"), ("x=2,y=2", "none:x, b:y"), partitioners=["names"]))


def test_several_along_one_split_dim_in_one_program() -> None:
    """XLA's own partitioner gives wrong results there, so it is not left to it."""
    a, b = mw.dims(a=8, b=16)

    def program(x: Any) -> Any:
        return mw.cummax(x, "b"), mw.cumsum(x, "b"), mw.cumprod(x, "b")

    agree(program, tensor(a, b), over=ways(("x=2,y=4", "a:y, b:x"), ("x=4", "b:x")), grads=False)
