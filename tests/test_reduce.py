"""Reductions: values against NumPy, SciPy and xarray, gradients at ties and infinities, and law 1."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import xarray

import meshwright as mw
from meshwright import Tensor

from .laws import ABC, Way, agree, tensor, ways
from .stablehlo import communicated, counted

A, B, C = mw.dims(a=8, b=8, c=16)
SUBSETS = [" ".join(which) for k in (1, 2, 3) for which in itertools.combinations("abc", k)]
AT_REST = [
    Way("x=2,y=2", "a:x", {"params": "b:y", "gather": "use"}),
    Way("x=2,y=2", "a:x", {"params": "(y,x)", "gather": "step"}),
]


def _as_xarray(x: Tensor) -> Any:
    values = np.asarray(x.array)
    return xarray.DataArray(values.astype(np.float64) if values.dtype == np.float32 else values, dims=x.names)


def _softmax(x: Any, over: list[str]) -> Any:
    return x.copy(data=scipy.special.softmax(x.values, axis=tuple(x.get_axis_num(over))))


def _logsumexp(x: Any, over: list[str]) -> Any:
    return xarray.DataArray(
        scipy.special.logsumexp(x.values, axis=tuple(x.get_axis_num(over))), dims=[d for d in x.dims if d not in over]
    )


ORACLES: dict[str, Callable[..., Any]] = {
    "sum": lambda x, over: x.sum(over),
    "mean": lambda x, over: x.mean(over),
    "prod": lambda x, over: x.prod(over),
    "max": lambda x, over: x.max(over),
    "min": lambda x, over: x.min(over),
    "any": lambda x, over: x.astype(bool).any(over),
    "all": lambda x, over: x.astype(bool).all(over),
    "var": lambda x, over: x.var(over),
    "std": lambda x, over: x.std(over),
    "logsumexp": _logsumexp,
    "softmax": _softmax,
    "log_softmax": lambda x, over: np.log(_softmax(x, over)),
}


def _same(found: Any, expected: Any, what: str, relative: float = 2e-5) -> None:
    names = found.names if isinstance(found, Tensor) else ()
    assert tuple(expected.dims) == names, what
    values = np.asarray(found.array if isinstance(found, Tensor) else found).astype(np.float64)
    np.testing.assert_allclose(values, expected, rtol=relative, atol=relative, err_msg=what)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32, jnp.bool_], ids=["float32", "int32", "bool"])
def test_values_over_every_set_of_names(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(-3, 4, (4, 3, 2)) if dtype != jnp.float32 else rng.normal(size=(4, 3, 2))
    x = Tensor(jnp.asarray(values, dtype), "a b c")
    names = [n for n in ORACLES if dtype != jnp.bool_ or n not in ("var", "std")]
    cases = {(n, over): over for n in names for over in SUBSETS}
    found = jax.jit(lambda x: {f"{n} {over}": getattr(mw, n)(x, over) for n, over in cases})(x)
    for name, over in cases:
        given = _as_xarray(x).astype(np.float64) if name.endswith(("softmax", "logsumexp")) else _as_xarray(x)
        _same(found[f"{name} {over}"], ORACLES[name](given, over.split()), f"{name} over {over}")
    for over in "abc":
        for name in ("argmax", "argmin"):
            position = getattr(mw, name)(x, over)
            assert position.dtype == jnp.int32
            _same(position, getattr(_as_xarray(x), name)(over), f"{name} over {over}")


def test_dtypes_are_those_of_jax() -> None:
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32, jnp.int8, jnp.uint8, jnp.bool_):
        x = Tensor(jnp.ones((2, 3), dtype), "a b")
        for name in (
            "sum",
            "mean",
            "prod",
            "max",
            "min",
            "any",
            "all",
            "var",
            "std",
            "softmax",
            "log_softmax",
            "logsumexp",
        ):
            by_jax = getattr(jnp, name, None) or getattr(jax.nn, name)
            if name in ("softmax", "log_softmax") and not jnp.issubdtype(dtype, jnp.floating):
                continue
            found = jax.eval_shape(lambda x, name=name: getattr(mw, name)(x, "a").array, x)
            assert found.dtype == jax.eval_shape(lambda a, f=by_jax: f(a, 0), x.array).dtype, f"{name} of {dtype}"
    with jax.enable_x64(True):
        x = Tensor(jnp.ones((2, 3), jnp.int64), "a b")
        for f in (mw.mean, mw.var, mw.std, mw.logsumexp, mw.softmax):
            assert f(x, "a").dtype == jnp.float64
    x = tensor(A, B)
    assert mw.sum(x, "a", dtype=jnp.float32).dtype == mw.mean(x, "a", dtype=jnp.float32).dtype == jnp.float32


def test_bfloat16_is_summed_in_float32() -> None:
    """Over 4096 values near 100 a bfloat16 sum stands still at 2**15, and the squares of a bfloat16 mean's error (up to
    a quarter) drown a variance of 0.08."""
    values = 100 + np.random.default_rng(0).uniform(-0.5, 0.5, (4096, 2))
    x = Tensor(jnp.asarray(values, jnp.bfloat16), "a b")
    exact = np.asarray(x.array).astype(np.float64)
    for name in ("sum", "mean", "var", "std", "logsumexp"):
        expected = getattr(scipy.special if name == "logsumexp" else np, name)(exact, axis=0)
        found = np.asarray(getattr(mw, name)(x, "a").array).astype(np.float64)
        np.testing.assert_allclose(found, expected, rtol=2**-7, err_msg=name)


def test_options_and_names() -> None:
    x = tensor(A, B)
    for ddof in (0, 1, 3):
        _same(mw.var(x, "a", ddof=ddof), _as_xarray(x).var("a", ddof=ddof), f"var less {ddof}")
        _same(x.std(ddof=ddof), _as_xarray(x).std(ddof=ddof), f"std less {ddof}")
    for over in (None, "a b", "b a", ("a", "b"), ["b", "a"], "a,b"):
        assert float(mw.sum(x, over)) == pytest.approx(float(np.sum(np.asarray(x.array))), abs=1e-5)
    assert mw.max(x, ()).names == ("a", "b")
    assert mw.mean(x).shape == ()


# Gradients


def _grad(f: Callable[..., Any], *values: Any) -> np.ndarray:
    return np.asarray(jax.grad(f)(Tensor(jnp.array(values, jnp.float32), "n")).array)


def test_the_gradient_of_a_maximum_is_shared_between_ties() -> None:
    np.testing.assert_array_equal(_grad(mw.max, 1, 3, 3, 0), [0, 0.5, 0.5, 0])
    np.testing.assert_array_equal(_grad(mw.min, 1, 3, 1, 1), np.array([1, 0, 1, 1], np.float32) / 3)


@pytest.mark.parametrize("way", ways(("x=4", "n:x"), ("x=2,y=4", "n:(y,x)"), partitioners=("names", "xla")), ids=str)
def test_ties_are_shared_across_devices(way: Way) -> None:
    """Three of the greatest on two of four devices; the whole of a row equal on all."""
    rows = jnp.array([[5, 1, 5, 5, 0, 0, 0, 0], [2, 2, 2, 2, 2, 2, 2, 2]], jnp.float32)
    x = Tensor(rows, "m n")
    for f, expected in (
        (mw.max, [[1 / 3, 0, 1 / 3, 1 / 3, 0, 0, 0, 0], [1 / 8] * 8]),
        (mw.min, [[0, 0, 0, 0, 1 / 4, 1 / 4, 1 / 4, 1 / 4], [1 / 8] * 8]),
    ):
        found = jax.grad(lambda x, f=f: mw.sum(f(x, "n")))
        total = jax.jit(jax.grad(way.region(lambda x, f=f: mw.sum(f(x, "n")))))(x)
        np.testing.assert_allclose(np.asarray(total.array), expected, rtol=1e-6)
        np.testing.assert_allclose(np.asarray(found(x).array), expected, rtol=1e-6)


INFINITE = np.array(
    [
        [-np.inf, 1.0, 2.0, -np.inf, -np.inf, -np.inf, -np.inf, -np.inf],
        [-np.inf, -np.inf, -np.inf, -np.inf, 0.5, 1.5, -np.inf, -1.0],
        [0.0, 0.5, -np.inf, 0.25, 3.0, 2.0, 1.0, 1.25],
        [800.0, -800.0, 0.0, 799.0, -np.inf, 1.0, 2.0, 3.0],
    ],
    np.float32,
)
"""Masked scores: rows whose first or last devices hold nothing but -inf, and values whose exponential overflows."""


@pytest.mark.parametrize("way", [None, *ways(("x=4", "n:x"), ("x=2", "n:x"), partitioners=("names",))], ids=str)
def test_masked_scores_have_finite_gradients(way: Way | None) -> None:
    region = way.region if way else lambda f: f
    x, weights = Tensor(jnp.asarray(INFINITE), "m n"), tensor(*mw.dims(m=4, n=8), seed=3)
    finite = Tensor(jnp.isfinite(x.array), x.dims)

    def programs(x: Tensor, weights: Tensor, finite: Tensor) -> Any:
        kept = mw.where(finite, mw.log_softmax(x, "n"), 0.0)
        return mw.logsumexp(x, "n"), mw.softmax(x, "n") * weights, kept * weights

    def positional(a: Any, w: Any) -> Any:
        kept = jnp.where(jnp.isfinite(x.array), jax.nn.log_softmax(a, 1), 0.0)
        return jax.nn.logsumexp(a, 1), jax.nn.softmax(a, 1) * w, kept * w

    found = jax.jit(region(programs))(x, weights, finite)
    expected = positional(x.array, weights.array)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_allclose(np.asarray(a.array), b, rtol=1e-5, atol=1e-6)

        def total(x: Any, i: int = i) -> Any:
            return region(lambda *operands: mw.sum(programs(*operands)[i]))(x, weights, finite)

        gradient = np.asarray(jax.jit(jax.grad(total))(x).array)
        by_jax = jax.grad(lambda a, i=i: jnp.sum(positional(a, weights.array)[i]))(x.array)
        assert np.isfinite(gradient).all()
        np.testing.assert_allclose(gradient, by_jax, rtol=1e-5, atol=1e-6)


def test_nothing_but_minus_infinity() -> None:
    x = Tensor(jnp.full((2, 4), -jnp.inf), "m n")
    for region in (lambda f: f, Way("x=2", "n:x").region):
        np.testing.assert_array_equal(np.asarray(region(lambda x: mw.logsumexp(x, "n"))(x).array), [-np.inf, -np.inf])
        np.testing.assert_array_equal(np.asarray(region(lambda x: mw.max(x, "n"))(x).array), [-np.inf, -np.inf])


def test_gradients_of_variance_by_hand() -> None:
    x = tensor(A, B)
    values = np.asarray(x.array, np.float64)
    centred = values - values.mean(0)
    found = jax.grad(lambda x: mw.sum(mw.var(x, "a", ddof=1)))(x)
    np.testing.assert_allclose(np.asarray(found.array), 2 * centred / 7, rtol=1e-4, atol=1e-6)
    found = jax.grad(lambda x: mw.sum(mw.std(x, "a")))(x)
    np.testing.assert_allclose(np.asarray(found.array), centred / 8 / values.std(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", [None, *ways(("x=2,y=2", "a:(x,y)"), partitioners=("names",))], ids=str)
def test_second_derivatives_and_both_modes_agree(way: Way | None) -> None:
    """The Hessian of each function along a vector, inside the region and around it, against positional JAX."""
    region = way.region if way else lambda f: f
    x, v = tensor(A, B), tensor(A, B, seed=5)
    programs: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "logsumexp": (lambda x: mw.sum(mw.logsumexp(x, "a")), lambda a: jnp.sum(jax.nn.logsumexp(a, 0))),
        "softmax": (lambda x: mw.sum(mw.square(mw.softmax(x, "a"))), lambda a: jnp.sum(jax.nn.softmax(a, 0) ** 2)),
        "var": (lambda x: mw.sum(mw.square(mw.var(x, "a"))), lambda a: jnp.sum(jnp.var(a, 0) ** 2)),
        "max": (lambda x: mw.sum(mw.max(x, "a") ** 3), lambda a: jnp.sum(jnp.max(a, 0) ** 3)),
        "prod": (lambda x: mw.sum(mw.prod(x, "a")), lambda a: jnp.sum(jnp.prod(a, 0))),
    }

    def inside(x: Tensor, v: Tensor) -> Any:
        out = {}
        for name, (f, _) in programs.items():
            first = jax.grad(f)
            out[name] = (jax.jvp(f, (x,), (v,))[1], jax.grad(lambda x, first=first: mw.sum(first(x) * v))(x))
        return out

    found = jax.jit(region(inside))(x, v)
    around = jax.jit(lambda x, v: {n: jax.jvp(jax.grad(region(f)), (x,), (v,)) for n, (f, _) in programs.items()})(x, v)
    for name, (_, g) in programs.items():
        first, second = jax.grad(g)(x.array), jax.jvp(jax.grad(g), (x.array,), (v.array,))[1]
        slope, twice = found[name]
        np.testing.assert_allclose(slope, jnp.sum(first * v.array), rtol=1e-4, err_msg=name)
        scale = float(jnp.max(jnp.abs(second)))
        np.testing.assert_allclose(twice.array, second, rtol=1e-4, atol=1e-4 * scale, err_msg=name)
        np.testing.assert_allclose(around[name][1].array, second, rtol=1e-4, atol=1e-4 * scale, err_msg=name)
        np.testing.assert_allclose(around[name][0].array, first, rtol=1e-4, atol=1e-4, err_msg=name)


# Law 1


def _each(names: tuple[str, ...], subsets: tuple[str, ...]) -> dict[str, Callable[..., Any]]:
    return {f"{n} {over}": lambda x, w, n=n, over=over: getattr(mw, n)(x, over) for n in names for over in subsets}


CASES: dict[str, Callable[..., Any]] = {
    **_each(("sum", "mean", "max", "logsumexp", "var"), ("a", "b c", "a b c")),
    **_each(("prod", "min", "std"), ("b", "a c")),
    **_each(("softmax", "log_softmax"), ("b", "a c")),
    **_each(("argmax", "argmin"), ("a", "b", "c")),
    "any": lambda x, w: mw.any(x > 1.9, "b"),
    "all": lambda x, w: mw.all(x > -1.9, "a c"),
    "max of booleans": lambda x, w: mw.max(x > 1.99, "a"),
    "min of integers": lambda x, w: mw.min(mw.floor(x * 3).astype(jnp.int32), "a b"),
    "argmax of ties": lambda x, w: mw.argmax(mw.floor(x), "a"),
    "ties": lambda x, w: mw.max(mw.clip(x, -0.5, 0.5), "a c"),
    "integers": lambda x, w: (
        mw.sum(mw.floor(x * 3).astype(jnp.int8), "a") - mw.prod(mw.floor(x).astype(jnp.int32), "a")
    ),
    "mean of integers": lambda x, w: mw.mean(mw.floor(x).astype(jnp.int32), "a b"),
    "sum of a sum": lambda x, w: mw.sum(mw.sum(x, "a"), "b") + mw.mean(mw.mean(x, "b"), "a"),
    "sum of a sum of bytes": lambda x, w: mw.sum(mw.sum((x * 40).astype(jnp.int8), "a", dtype=jnp.int8), "b"),
    "sum then scale": lambda x, w: mw.sum(x, "a c") * 3.0 - mw.sum(x * x, "a c") / 2.0,
    "sum times a byte": lambda x, w: mw.sum((x * 60).astype(jnp.int8), "a", dtype=jnp.int8).astype(jnp.float32) * 0.5,
    "normalise": lambda x, w: (x - mw.mean(x, "b")) / mw.sqrt(mw.var(x, "b") + 1e-5),
    "weight decay": lambda x, w: mw.sum(w * w) + mw.mean(mw.square(w), "b").sum(),
    "norm of a parameter": lambda x, w: w / mw.sqrt(mw.sum(w * w, "c")),
    "parameter": lambda x, w: x * mw.softmax(w, "b") * mw.sum(w, "c"),
    "parameter's extremes": lambda x, w: (
        mw.max(w),
        mw.min(w, "c"),
        mw.argmax(w, "b"),
        mw.any(w > 1.9),
        mw.prod(w, "b"),
    ),
    "parameter's spread": lambda x, w: x * mw.std(w, "c") + mw.logsumexp(w),
}


def test_reductions_are_the_same_under_every_layout() -> None:
    names = ways(ABC[5], ABC[8], ABC[9], partitioners=("names",))
    inputs = tensor(A, B, C), tensor(B, C, seed=1, role="parameter")
    agree(CASES, *inputs, over=[*names, *AT_REST, *ways(ABC[6], partitioners=("xla",))])


def test_every_set_of_names_on_every_pair_of_axes() -> None:
    """Sums, maxima and softmax over each subset of names, where each subset meets another set of axes."""
    cases = {
        f"{n} {over}": lambda x, n=n, over=over: getattr(mw, n)(x, over)
        for n in ("sum", "max", "softmax")
        for over in SUBSETS
    }
    agree(cases, tensor(A, B, C), over=ways(ABC[4], ABC[10], partitioners=("names",)))


# Communication


def test_each_reduction_communicates_what_its_table_says() -> None:
    x, way = tensor(A, B, C), Way("x=2,y=2", "a:x, b:y")
    expected = {
        "sum": {"all_reduce": 1}, "mean": {"all_reduce": 1}, "max": {"all_reduce": 1}, "any": {"all_reduce": 1},
        "prod": {"all_gather": 1}, "var": {"all_reduce": 2}, "std": {"all_reduce": 2}, "logsumexp": {"all_reduce": 2},
        "softmax": {"all_reduce": 2}, "log_softmax": {"all_reduce": 2}, "argmax": {"all_gather": 2},
    }  # fmt: skip
    for name, counts in expected.items():
        assert counted(way.region(lambda x, n=name: getattr(mw, n)(x, "a")), x) == counts, name
        assert counted(way.region(lambda x, n=name: getattr(mw, n)(x, "c")), x) == {}, name


def test_a_reduction_over_several_axes_is_one_collective() -> None:
    x, way = tensor(A, B, C), Way("x=2,y=2", "a:x, b:y")
    assert counted(way.region(lambda x: mw.sum(x)), x) == {"all_reduce": 1}
    assert counted(way.region(lambda x: mw.sum(mw.sum(mw.sum(x, "a"), "c"), "b")), x) == {"all_reduce": 1}


def test_a_candidate_a_device_is_gathered_for_argmax_not_the_tensor() -> None:
    x, way = tensor(*mw.dims(a=8, b=1024)), Way("x=8", "b:x")
    text = jax.jit(way.region(lambda x: mw.argmax(x, "b"))).lower(x).as_text()
    gathers = [line for line in text.splitlines() if "stablehlo.all_gather" in line]
    assert len(gathers) == 2 and all("tensor<8x8x" in line.split("->")[-1] for line in gathers)


def test_weight_decay_of_parameters_at_rest_gathers_nothing() -> None:
    w = tensor(B, C, role="parameter")
    for gather, forward, backward in (
        ("use", {"all_reduce": 1}, {}),
        ("step", {"all_gather": 1, "all_reduce": 1}, {"reduce_scatter": 1}),
    ):
        region = Way("x=2,y=2", "c:y", {"params": "b:x", "gather": gather}).region(lambda w: mw.sum(w * w))
        assert counted(region, w).keys() == forward.keys(), gather
        found = counted(jax.grad(region), w)
        assert set(backward) <= set(found) and found.get("all_gather", 0) <= 1
        largest = math.prod((B.size, C.size // 2))
        text = jax.jit(jax.grad(region)).lower(w).as_text()
        reduced = [line for line in text.splitlines() if "stablehlo.all_reduce" in line]
        assert not any(f"tensor<{largest}" in line for line in reduced)


# Errors


def test_unknown_names_are_errors_with_the_nearest() -> None:
    x = Tensor(jnp.ones((2, 3)), "batch embed")
    for f in (mw.sum, mw.max, mw.softmax, mw.var, mw.argmax, mw.logsumexp, mw.any):
        with pytest.raises(
            ValueError, match=r"there is no dim 'embd' in \(batch=2, embed=3\). Did you mean 'embed'"
        ) as error:
            f(x, "embd")
        assert str(error.value).startswith(f.__name__) and "test_reduce.py" in str(error.value)


def test_other_mistakes_are_refused() -> None:
    x = tensor(A, B)
    with pytest.raises(
        ValueError, match=r"argmax: a position is counted along one dim, asked for 2 of \(a=8, b=8\)"
    ) as error:
        mw.argmax(x)
    assert "argmax(x.merge(('a', 'b'), 'flat'), 'flat')" in str(error.value)
    with pytest.raises(ValueError, match="var: 8 values less ddof=8 leaves none to divide by"):
        mw.var(x, "a", ddof=8)
    with pytest.raises(TypeError, match=r"sum: expected a tensor, found an array of shape \(3,\)"):
        mw.sum(jnp.ones(3))


NAN_ROWS = np.array(
    [[np.nan, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, -np.nan], [np.nan] * 8, [-np.inf] * 8,
     [-np.inf, 0, -0.5, np.inf, 1, 2, 3, 4], [-6e4, -1, -2, -3, -0.25, -5, -6, -1e-4]],
    np.float32,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=str)
def test_an_extreme_of_nan_is_nan_on_every_layout(dtype: Any) -> None:
    """The backend's own maximum across devices drops NaN."""
    x = Tensor(jnp.asarray(NAN_ROWS, dtype), "m n")
    expected = {f: f(np.asarray(x.array).astype(np.float32), axis=1) for f in (np.max, np.min)}
    layouts = ("x=2", "n:x"), ("x=2,y=4", "n:(y,x)"), ("x=8", "n:x"), ("x=2,y=4", "m:x, n:y")

    def both(x: Tensor) -> Any:
        return mw.max(x, "n"), mw.min(x, "n"), mw.max(x), mw.min(x)

    for way in [None, *ways(*layouts)]:
        *rows, most, least = jax.jit(way.region(both) if way else both)(x)
        for found, of_numpy in zip(rows, expected.values(), strict=True):
            assert found.dtype == dtype
            np.testing.assert_array_equal(np.asarray(found.array).astype(np.float32), of_numpy, str(way))
        assert np.isnan(most) and np.isnan(least)


def test_extremes_next_to_nan_have_the_same_gradients() -> None:
    x = Tensor(jnp.asarray(np.where(np.isinf(NAN_ROWS), 0, NAN_ROWS)), "m n")
    cases = {"max": lambda x: mw.max(x, "n"), "min": lambda x: mw.min(x, "n")}
    agree(cases, x, over=ways(("x=4", "n:x"), ("x=2,y=4", "n:(y,x), m:()")))


def test_a_maximum_is_one_collective_of_its_own_size() -> None:
    x, way = tensor(A, B, C), Way("x=2,y=2", "a:x, b:y")
    assert communicated(way.region(lambda x: mw.max(x, "a")), x) == [("all_reduce", 4 * 16)]


def test_a_sum_of_booleans_as_booleans_is_whether_any_is_true() -> None:
    x = tensor(A, C)
    for way in [None, *ways(ABC[3], ("x=2,y=4", "c:(y,x)"))]:
        function = lambda x: mw.sum(x > 1.9, "c", dtype=jnp.bool_)  # noqa: E731
        found = jax.jit(way.region(function) if way else function)(x)
        assert found.dtype == jnp.bool_, str(way)
        np.testing.assert_array_equal(found.array, np.any(np.asarray(x.array) > 1.9, 1))
    with pytest.raises(TypeError, match=r"mean: dtype=int32 cannot hold a mean; write mw.mean\(x, ...\).astype"):
        mw.mean(x, "c", dtype=jnp.int32)
