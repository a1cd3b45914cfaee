"""Elementwise operations: values against NumPy, SciPy and xarray, gradients by hand, and law 1."""

import math
import types
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
from meshwright.ops import elementwise, kin

from .laws import ABC, Way, agree, tensor, ways
from .stablehlo import counted

A, B, C = mw.dims(a=8, b=8, c=8)
OVER = [
    *ways(ABC[5], ABC[8], ABC[9], partitioners=("names",)),
    *ways(ABC[6], partitioners=("xla",)),
    Way("x=2,y=2", "a:x", {"params": "b:y", "gather": "use"}),
    Way("x=2,y=2", "a:x", {"params": "(y,x)", "gather": "step"}),
]


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def _elu(x: Any, alpha: float = 1.0) -> Any:
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


ORACLES: dict[str, Callable[..., Any]] = {
    "bitwise_not": np.bitwise_invert,
    "celu": _elu,
    "elu": _elu,
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "hard_sigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "hard_silu": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "hard_swish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "hard_tanh": lambda x: np.clip(x, -1, 1),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "log_sigmoid": lambda x: -np.logaddexp(0, -x),
    "mish": lambda x: x * np.tanh(np.logaddexp(0, x)),
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "selu": lambda x: 1.0507009873554805 * _elu(x, 1.6732632423543772),
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "swish": lambda x: x * _sigmoid(x),
    "soft_sign": lambda x: x / (1 + np.abs(x)),
    "softplus": lambda x: np.logaddexp(0, x),
    "sparse_plus": lambda x: np.where(x > 1, x, np.where(x < -1, 0, (x + 1) ** 2 / 4)),
    "sparse_sigmoid": lambda x: np.clip((x + 1) / 2, 0, 1),
    "squareplus": lambda x: (x + np.sqrt(x * x + 4)) / 2,
    "identity": lambda x: x,
    "stop_gradient": lambda x: x,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "pow": np.power,
    "isclose": np.isclose,
    "gammaln": scipy.special.gammaln,
}
"""What NumPy and SciPy do not have under the same name."""

BINARY = {
    "add", "subtract", "multiply", "divide", "true_divide", "arctan2", "atan2", "bitwise_and", "bitwise_or",
    "bitwise_xor", "bitwise_left_shift", "bitwise_right_shift", "left_shift", "right_shift", "copysign",
    "equal", "not_equal", "less",
    "less_equal", "greater", "greater_equal", "float_power", "floor_divide", "fmax", "fmin", "fmod", "gcd", "lcm",
    "heaviside", "hypot", "ldexp", "logaddexp", "logaddexp2", "logical_and", "logical_or", "logical_xor", "maximum",
    "minimum", "mod", "nextafter", "pow", "power", "remainder", "isclose", "xlogy", "xlog1py",
}  # fmt: skip
DIVISIONS = {"divide", "true_divide", "floor_divide", "mod", "remainder", "fmod"}
"""NumPy and JAX differ on a division by False."""
AT_LEAST_ONE = {"acosh", "arccosh"}
WITHIN_ONE = {"acos", "arccos", "asin", "arcsin", "atanh", "arctanh", "erfinv"}
POSITIVE = {
    "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "cbrt", "power", "pow", "float_power", "xlogy", "xlog1py",
    "digamma", "gammaln", "reciprocal",
}  # fmt: skip


def _table() -> dict[str, Callable[..., Any]]:
    """Every lifted function, by name."""
    functions = {n: f for n, f in vars(elementwise).items() if isinstance(f, types.FunctionType)}
    made = {n: f for n, f in functions.items() if f.__code__.co_name == "lifted"}
    products = {n: getattr(elementwise, n) for n in ("multiply", "divide", "true_divide", "stop_gradient")}
    return {n: f for n, f in {**made, **products}.items() if not n.startswith("_")}


def _oracle(name: str) -> Callable[..., Any]:
    if name in ORACLES:
        return ORACLES[name]
    return getattr(np, name) if hasattr(np, name) else getattr(scipy.special, name)


def _values(name: str, dtype: Any, dims: tuple[mw.Dim, ...], seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    low, high = (1.0, 5.0) if name in AT_LEAST_ONE else (-0.95, 0.95) if name in WITHIN_ONE else (-3.0, 3.0)
    low = 0.1 if name in POSITIVE else low
    values = rng.uniform(low, high, [d.size for d in dims])
    if dtype == jnp.int32:
        values = rng.integers(1 if name in POSITIVE or "shift" in name else -5, 6, values.shape)
    if dtype == jnp.bool_:
        values = values > (-9 if name in DIVISIONS and seed == 2 else 0)
    return Tensor(jnp.asarray(values, dtype), dims)


def _as_xarray(x: Tensor, widen: bool = True) -> Any:
    values = np.asarray(x.array)
    return xarray.DataArray(values.astype(np.float64) if widen else values, dims=x.names)


def _fails(f: Callable[..., Any], *arrays: Any) -> bool:
    try:
        jax.eval_shape(f, *arrays)
    except (TypeError, ValueError):
        return True
    return False


def _check_values(found: Tensor, expected: Any, what: str) -> None:
    expected = expected.transpose(*found.names)
    assert expected.dims == found.names, what
    a, b = np.asarray(found.array), np.asarray(expected)
    if a.dtype == np.bool_ or np.issubdtype(a.dtype, np.integer):
        np.testing.assert_array_equal(a, b, err_msg=what)
    else:
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6, err_msg=what)


def test_every_function_of_the_table_has_an_oracle() -> None:
    for name in _table():
        _oracle(name)
    assert set(_table()) >= BINARY
    assert len(_table()) > 130


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32, jnp.bool_], ids=["float32", "int32", "bool"])
def test_values_are_those_of_numpy_with_names_aligned_by_xarray(dtype: Any) -> None:
    """Two operands have their dims in different orders, one of them lacks a dim. Where JAX's own function refuses a
    dtype, so does the lifted one."""
    table: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {}
    for name, f in _table().items():
        operands = [_values(name, dtype, (A, B), 1)]
        if name in BINARY:
            operands.append(_values(name, jnp.int32 if name == "ldexp" else dtype, (B,), 2))
        plain = getattr(f, "__wrapped__", None) or getattr(jnp, name, None) or jax.lax.stop_gradient
        positional = [x.array for x in operands]
        if name in BINARY:
            positional[1] = jnp.broadcast_to(positional[1], (A.size, B.size))
        if not _fails(plain, *positional):
            table[name] = (f, operands)
        else:
            with pytest.raises((TypeError, ValueError)):
                f(*operands)
    del table[
        "nextafter" if "nextafter" in table else "exp2"
    ]  # one step of float32 is none of float64: it stands below
    found = jax.jit(lambda operands: {n: f(*operands[n]) for n, (f, _) in table.items()})(
        {n: x for n, (_, x) in table.items()}
    )
    compared = 0
    for name, (_, operands) in table.items():
        widened = [_as_xarray(x, jnp.issubdtype(found[name].dtype, jnp.floating)) for x in operands]
        try:
            with np.errstate(all="ignore"):
                expected = xarray.apply_ufunc(_oracle(name), *widened)
        except TypeError:
            continue  # NumPy refuses a dtype that JAX takes
        _check_values(found[name], expected, f"{name} of {jnp.dtype(dtype)}")
        compared += 1
    assert compared > {"float32": 110, "int32": 90, "bool": 60}[jnp.dtype(dtype).name]


def test_operators_are_the_functions() -> None:
    x, y, whole = (
        _values("add", jnp.float32, (A, B), 1),
        _values("log", jnp.float32, (B,), 2),
        _values("power", jnp.int32, (A, B), 3),
    )
    pairs = [
        (x + y, mw.add(x, y)), (y - x, mw.subtract(y, x)), (2.0 - x, mw.subtract(2.0, x)), (x * 3, mw.multiply(x, 3)),
        (3.0 / y, mw.divide(3.0, y)), (x // y, mw.floor_divide(x, y)), (x % y, mw.mod(x, y)), (y**2, mw.power(y, 2)),
        (2.0**x, mw.power(2.0, x)), (-x, mw.negative(x)), (+x, mw.positive(x)), (abs(x), mw.abs(x)),
        (x < y, mw.less(x, y)),
        (x >= y, mw.greater_equal(x, y)), (x == x, mw.equal(x, x)), (x != y, mw.not_equal(x, y)),
        ((x > 0) & (x < 1), mw.logical_and(x > 0, x < 1)), ((x > 0) | (y < 1), mw.logical_or(x > 0, y < 1)),
        ((x > 0) ^ (y < 1), mw.logical_xor(x > 0, y < 1)), (~(x > 0), mw.logical_not(x > 0)),
        (whole << 1, mw.left_shift(whole, 1)), (whole >> 1, mw.right_shift(whole, 1)),
        (1.0 // y, mw.floor_divide(1.0, y)),
        (7 % whole, mw.mod(7, whole)), (np.float32(2) * x, mw.multiply(x, 2.0)), (jnp.float32(2) + x, mw.add(x, 2.0)),
    ]  # fmt: skip
    for i, (a, b) in enumerate(pairs):
        assert a.names == b.names and a.dtype == b.dtype, i
        np.testing.assert_array_equal(np.asarray(a.array), np.asarray(b.array), err_msg=str(i))


@np.errstate(invalid="ignore")
def test_special_values_and_keywords() -> None:
    x = Tensor(jnp.array([jnp.nan, jnp.inf, -jnp.inf, 2.5, -2.5, 0.0, 1e-3, 7.123]), A)
    values = np.asarray(x.array)
    pairs = [
        (mw.nan_to_num(x, nan=1.0, posinf=2.0, neginf=3.0), np.nan_to_num(values, nan=1.0, posinf=2.0, neginf=3.0)),
        (mw.round(x, decimals=1), np.round(values, 1)),
        (mw.maximum(x, 0.0), np.maximum(values, np.float32(0))),
        (mw.fmax(x, 0.0), np.fmax(values, np.float32(0))),
        (mw.clip(x, -1.0, 2.0), np.clip(values, -1, 2)),
        (mw.clip(x, greatest=2.0), np.clip(values, None, 2)),
        (mw.sign(x), np.sign(values)),
        (mw.isclose(x, 2.5001, rtol=1e-3), np.isclose(values, 2.5001, rtol=1e-3)),
        (mw.nextafter(x, 10.0), np.nextafter(values, np.float32(10))),
        (mw.gelu(x, approximate=False), values * (1 + scipy.special.erf(values / math.sqrt(2))) / 2),
        (mw.leaky_relu(x, negative_slope=0.2), np.where(values >= 0, values, values * np.float32(0.2))),
    ]
    for i, (found, expected) in enumerate(pairs):
        np.testing.assert_allclose(np.asarray(found.array), expected, rtol=1e-5, atol=1e-6, err_msg=str(i))
    assert mw.exp(1.0) == pytest.approx(math.e)
    assert mw.where(True, 1.0, 2.0) == 1.0
    assert (x.astype(jnp.bfloat16).dtype, mw.astype(1.5, jnp.int32).dtype) == (jnp.bfloat16, jnp.int32)
    assert x.astype(jnp.float32) is x


def test_where_takes_names_from_any_of_the_three() -> None:
    mask, x, y = (
        _values("add", jnp.bool_, (B,), 1),
        _values("add", jnp.float32, (C, B, A), 2),
        _values("add", jnp.float32, (A,), 3),
    )
    for operands in ((mask, x, y), (mask, y, x), (mask, x, 0.0), (mask, 1.0, x), (x > 0, y, 2.0), (True, x, y)):
        found = mw.where(*operands)
        given = [_as_xarray(o, o.dtype != jnp.bool_) if isinstance(o, Tensor) else o for o in operands]
        _check_values(found, xarray.apply_ufunc(np.where, *given), str(operands))
        assert found.names == ("c", "b", "a")


# Their kin in jax.lax


def test_kin_gives_to_the_bit_what_the_function_gives() -> None:
    """Values, dtype and gradient, of floats of one dtype and of operands that have to be promoted first."""
    rng = np.random.default_rng(0)
    x, row = (jnp.asarray(rng.uniform(0.5, 2.0, shape), jnp.float32) for shape in ((4, 3), (1, 3)))
    tie, narrow, whole, weak = x.at[0].set(row[0]), x.astype(jnp.bfloat16), x.astype(jnp.int32), jnp.full((4, 3), 2.0)
    assert weak.weak_type
    pairs = [(x, row), (tie, row), (narrow, narrow), (narrow, 2), (1.5, x), (x, jnp.float32(2)), (weak, 2.0)]
    promoted = [(x, narrow), (whole, 2), (whole, 1.5), (x, True), (x, np.float32(2)), (weak, narrow)]
    with jax.numpy_dtype_promotion("standard"):
        for function, _ in kin.KIN:
            for operands in (*pairs, *promoted) if function.__name__ in BINARY else ((x,), (narrow,), (weak,)):
                _alike(lambda *a, f=function: kin.applied(f, a), function, operands)
        for a, b in (*pairs, *promoted):
            _alike(lambda *a: kin.applied(jnp.where, a), jnp.where, (tie > row, a, b))


def _alike(found: Callable[..., Any], expected: Callable[..., Any], operands: tuple[Any, ...]) -> None:
    a, b = found(*operands), expected(*operands)
    assert (a.dtype, a.weak_type) == (b.dtype, b.weak_type), (expected, operands)
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    floats = tuple(i for i, o in enumerate(operands) if jnp.issubdtype(jnp.result_type(o), jnp.floating))
    if floats and jnp.issubdtype(a.dtype, jnp.floating):
        slopes = (jax.grad(lambda *x, f=f: jnp.sum(f(*x)).astype(float), floats)(*operands) for f in (found, expected))
        jax.tree.map(np.testing.assert_array_equal, *slopes)


def test_a_function_of_floats_alike_is_no_trace_of_its_own() -> None:
    x, row = tensor(A, B), tensor(B, seed=1)
    text = str(jax.make_jaxpr(lambda x, row: mw.where(x > 0, mw.silu(x * row + 1.0), -1.0).array)(x, row))
    assert "select_n" in text and "logistic" in text and "silu" not in text and "_where" not in text


def test_any_function_can_be_lifted() -> None:
    """One that cannot be hashed too."""

    class Scale:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, x: Any) -> Any:
            return x * 2.0

    np.testing.assert_array_equal(mw.lift(Scale(), "scale")(_row(1, 2)).array, [2, 4])


# Gradients


def _gradients(f: Callable[..., Any], *operands: Tensor) -> list[np.ndarray]:
    total = jax.grad(lambda *x: mw.sum(f(*x)), argnums=tuple(range(len(operands))))
    return [np.asarray(g.array) for g in total(*operands)]


def _row(*values: float) -> Tensor:
    return Tensor(jnp.array(values, jnp.float32), "n")


def test_gradients_at_ties_are_shared() -> None:
    """maximum, minimum and clip have the mean of their two one-sided slopes where the operands are equal."""
    x, y = _row(1, 2, 3), _row(2, 2, 2)
    for f, expected in (
        (mw.maximum, ([0, 0.5, 1], [1, 0.5, 0])),
        (mw.minimum, ([1, 0.5, 0], [0, 0.5, 1])),
    ):
        for found, by_hand in zip(_gradients(f, x, y), expected, strict=True):
            np.testing.assert_array_equal(found, by_hand)
    np.testing.assert_array_equal(
        _gradients(lambda x: mw.clip(x, 1.0, 2.0), _row(0, 1, 1.5, 2, 3))[0], [0, 0.5, 1, 0.5, 0]
    )
    np.testing.assert_array_equal(
        _gradients(mw.abs, _row(-2, 0, 2))[0], [-1, 1, 1]
    )  # at zero JAX takes the right slope
    np.testing.assert_array_equal(_gradients(mw.relu, _row(-2, 0, 2))[0], [0, 0, 1])


def test_gradients_of_broadcast_operands_are_summed() -> None:
    """A tie of every element of x (a, b) with its row of y (b): y's gradient adds up a half for each position of a."""
    y = Tensor(jnp.arange(8.0), B)
    x = y.broadcast(A)
    for f in (mw.maximum, mw.minimum):
        g_x, g_y = _gradients(f, x, y)
        np.testing.assert_array_equal(g_x, np.full((8, 8), 0.5))
        np.testing.assert_array_equal(g_y, np.full(8, 4.0))
    lo, hi = Tensor(jnp.full(8, 2.0), A), Tensor(jnp.full(8, 5.0), B)
    g_x, g_lo, g_hi = _gradients(mw.clip, x, lo, hi)
    column = [0, 0, 0.5, 1, 1, 0.5, 0, 0]
    np.testing.assert_array_equal(g_x, np.broadcast_to(column, (8, 8)))
    np.testing.assert_array_equal(g_lo, np.full(8, 2.5))
    np.testing.assert_array_equal(g_hi, [0, 0, 0, 0, 0, 4, 8, 8])


def test_the_gradient_of_a_power_is_finite_where_the_power_is() -> None:
    x, n = _row(0, 0, 2, 2), _row(2, 1, 0, 3)
    g_x, g_n = _gradients(mw.power, x, n)
    np.testing.assert_allclose(g_x, [0, 1, 0, 12], rtol=1e-6)
    np.testing.assert_allclose(g_n[2:], [math.log(2), 8 * math.log(2)], rtol=1e-6)
    assert np.isfinite(g_n).all()
    np.testing.assert_allclose(_gradients(lambda x: x**2, _row(0, -3))[0], [0, -6])
    np.testing.assert_allclose(_gradients(lambda x: 2.0**x, _row(0, 1))[0], [math.log(2), 2 * math.log(2)], rtol=1e-6)


def test_masked_out_nan_and_inf_get_a_gradient_of_zero() -> None:
    bad = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 1.0, 2.0, 3.0, 4.0, 5.0])
    x, good = Tensor(bad, A), Tensor(jnp.ones((8, 8)), (B, A))
    mask = Tensor(jnp.arange(8) >= 3, A)
    g_x, g_good = _gradients(lambda x, good: mw.where(mask, x * 2.0, good), x, good)
    np.testing.assert_array_equal(g_x, [0, 0, 0, 16, 16, 16, 16, 16])
    np.testing.assert_array_equal(g_good, np.broadcast_to([1, 1, 1, 0, 0, 0, 0, 0], (8, 8)))
    (g,) = _gradients(lambda x: mw.log(mw.where(mask, x, 1.0)), x)
    np.testing.assert_allclose(g, [0, 0, 0, 1, 1 / 2, 1 / 3, 1 / 4, 1 / 5], rtol=1e-6)
    np.testing.assert_array_equal(_gradients(lambda x: mw.where(mask, mw.maximum(x, 0.0), 0.0), x)[0][3:], np.ones(5))


def test_second_derivatives_and_both_modes_agree() -> None:
    x, v = tensor(A, seed=1), tensor(A, seed=2)
    for f, second in (
        (mw.sin, lambda a: -np.sin(a)),
        (lambda x: x**3, lambda a: 6 * a),
        (mw.tanh, lambda a: -2 * np.tanh(a) / np.cosh(a) ** 2),
        (lambda x: mw.where(x > 0, x * x, -x), lambda a: np.where(a > 0, 2.0, 0.0)),
    ):
        first = jax.grad(lambda x, f=f: mw.sum(f(x)))
        found = jax.grad(lambda x, first=first: mw.sum(first(x)))(x)
        np.testing.assert_allclose(np.asarray(found.array), second(np.asarray(x.array)), rtol=1e-4, atol=1e-5)
        _, forward = jax.jvp(lambda x, f=f: mw.sum(f(x)), (x,), (v,))
        assert forward == pytest.approx(float(mw.sum(first(x) * v)), rel=1e-5)


# Law 1

CASES: dict[str, Callable[..., Any]] = {
    "one": lambda x, row, cell, w: mw.gelu(x),
    "two alike": lambda x, row, cell, w: x * mw.sin(x) + x,
    "row": lambda x, row, cell, w: x * row,
    "row first": lambda x, row, cell, w: row - x,
    "another order": lambda x, row, cell, w: cell / (x * x + 1.0),
    "row and cell": lambda x, row, cell, w: mw.maximum(cell, row),
    "scalars": lambda x, row, cell, w: 2.0 - x * 3.0 + jnp.float32(4) * row,
    "a scalar of its own": lambda x, row, cell, w: x * mw.sum(row) - mw.mean(cell),
    "where": lambda x, row, cell, w: mw.where(x > 0, row, cell),
    "where by a row": lambda x, row, cell, w: mw.where(row > 0, x, 0.0),
    "ties": lambda x, row, cell, w: mw.maximum(mw.floor(x) + row * 0.0, mw.floor(cell)) + mw.minimum(row, row),
    "clip": lambda x, row, cell, w: mw.clip(x, row, 1.0),
    "power": lambda x, row, cell, w: mw.power(mw.square(x) + 0.1, row),
    "abs": lambda x, row, cell, w: abs(x) * abs(row),
    "compare": lambda x, row, cell, w: (x > row) & (cell != x) | ~(row >= 0),
    "integers": lambda x, row, cell, w: (x * 4).astype(jnp.int32) // 3 + (row * 5).astype(jnp.int32) % 4,
    "mixed dtypes": lambda x, row, cell, w: (x.astype(jnp.bfloat16) * 0 + 1).astype(jnp.float32) * row,
    "parameter alone": lambda x, row, cell, w: mw.tanh(w * w) * 0.5,
    "parameter": lambda x, row, cell, w: x * w,
    "parameter without split operands": lambda x, row, cell, w: w * row,
    "parameter changed at rest": lambda x, row, cell, w: x * mw.exp(w * 0.3 - 1.0) + w.astype(jnp.float32),
    "parameter masked": lambda x, row, cell, w: mw.where(w > 0, w, w * w) * x,
    "stop gradient": lambda x, row, cell, w: mw.stop_gradient(w) * x * mw.stop_gradient(x),
}


def test_elementwise_is_the_same_under_every_layout() -> None:
    inputs = tensor(A, B, C), tensor(B, seed=1), tensor(C, A, B, seed=2), tensor(B, C, seed=3, role="parameter")
    agree(CASES, *inputs, over=OVER)


def test_elementwise_communicates_nothing() -> None:
    inputs = tensor(A, B, C), tensor(B, seed=1), tensor(C, A, B, seed=2), tensor(B, C, seed=3)
    silent = {n: f for n, f in CASES.items() if n != "a scalar of its own"}
    region = Way("x=2,y=2,z=2", "a:x, b:y, c:z").region(lambda *x: {n: f(*x) for n, f in silent.items()})
    assert counted(region, *inputs) == {}


# Errors


def test_an_outer_product_by_accident_is_refused() -> None:
    x, y = tensor(A, B), tensor(B, C)
    with pytest.raises(ValueError, match="add: no operand's dims contain the other's") as error:
        x + y
    message = str(error.value)
    assert "operands: (a=8, b=8); (b=8, c=8)" in message and "If (a=8, b=8, c=8) is what you want" in message
    assert "mw.einsum(x, y, out=(...))" in message and "x.broadcast(dim)" in message
    assert "test_elementwise.py" in message and "x + y" in message
    with pytest.raises(ValueError, match="where: no operand's dims contain the other's"):
        mw.where(tensor(A) > 0, tensor(B), 0.0)


def test_sizes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="multiply: the dim 'b' has size 8 in one operand and 4 in another") as error:
        tensor(A, B) * tensor(mw.Dim("b", 4))
    assert "rename one of them, or slice it to the other's size" in str(error.value)


def test_arrays_without_names_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"maximum: expected a tensor or a scalar, found an array of shape \(8,\)"
    ) as error:
        mw.maximum(tensor(A), jnp.ones(8))
    assert "Name its dims: mw.Tensor(array, 'batch embed')" in str(error.value)
    with pytest.raises(TypeError, match="exp: expected a tensor or a scalar, found str"):
        mw.exp("a")
    with pytest.raises(TypeError, match="clip: give a least or a greatest value"):
        mw.clip(tensor(A))


def test_addends_of_bytes_are_not_widened_before_their_sum() -> None:
    """A sum of bytes wraps round in bytes, also where a wider one is added to it."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-128, 127, shape).astype(np.int8) for shape in ((8, 16), (16, 4)))
    x, w = Tensor(jnp.asarray(a), "a c"), Tensor(jnp.asarray(b), "c b")

    def both(x: Tensor, w: Tensor) -> Any:
        narrow, wide = (mw.einsum(*pair, out="a b") for pair in ((x, w), (x.astype(jnp.int32), w.astype(jnp.int32))))
        return narrow.astype(jnp.int32) + wide, mw.add(narrow, narrow)

    def mixed(x: Tensor, w: Tensor) -> Any:
        narrow, wide = (mw.einsum(*pair, out="a b") for pair in ((x, w), (x.astype(jnp.int32), w.astype(jnp.int32))))
        return narrow + wide, wide - narrow

    exact = a.astype(np.int32) @ b.astype(np.int32)
    wrapped = exact.astype(np.int8)
    with jax.numpy_dtype_promotion("standard"):
        for way in ways(("x=4", "c:x"), ("x=2,y=2", "c:(y,x)")):
            for function, expected in (
                (both, (wrapped + exact, wrapped + wrapped)),
                (mixed, (wrapped + exact, exact - wrapped)),
            ):
                for found, of_numpy in zip(way.region(function)(x, w), expected, strict=True):
                    np.testing.assert_array_equal(np.asarray(found.array), of_numpy, str(way))


def test_a_cast_to_the_same_dtype_makes_a_weak_type_strong() -> None:
    """As in jax.numpy: what was cast is not promoted to its neighbour's dtype."""
    a = mw.Dim("a", 4)
    weak = mw.where(tensor(a) > 0, 1.0, 0.0)
    half = tensor(a, dtype="bfloat16")
    with jax.numpy_dtype_promotion("standard"):
        assert (weak * half).dtype == jnp.bfloat16
        assert (weak.astype("float32") * half).dtype == jnp.float32
        assert mw.dot(weak, half, over="a").dtype == jnp.bfloat16
