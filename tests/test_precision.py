"""Mixed precision: what moves is what was cast, and sums across devices are taken in the dtype asked for."""

import re
from typing import Any

import jax
import numpy as np
import pytest

import meshwright as mw

from .laws import Way, tensor

A, B, C = mw.dims(a=8, b=8, c=16)
X = tensor(A, B)
W = tensor(B, C, role="parameter", seed=1)
SMALL = W * 0.1


def _loss(w: Any, x: Any) -> Any:
    y = mw.dot(x.astype("bfloat16"), w.astype("bfloat16"), "b")
    return mw.mean(mw.tanh(y).astype("float32"))


def _moved(way: Way) -> dict[str, set[str]]:
    """The dtypes that each kind of collective puts in."""
    text = jax.jit(jax.value_and_grad(way.region(_loss))).lower(W, X).as_text()
    found: dict[str, set[str]] = {}
    pattern = r'"stablehlo\.(all_gather|all_reduce|reduce_scatter)"\(.*?[>)] : \(tensor<(?:\d+x)*(\w+)>'
    for kind, dtype in re.findall(pattern, text, re.DOTALL):
        found.setdefault(kind, set()).add(dtype)
    return found


def test_a_parameter_is_cast_before_it_is_gathered_and_its_gradient_scattered() -> None:
    found = _moved(Way("x=4", "a:x", {"params": "c:x"}))
    assert found == {"all_gather": {"bf16"}, "reduce_scatter": {"bf16"}, "all_reduce": {"f32"}}


def test_gradients_are_summed_in_float32_when_asked() -> None:
    found = _moved(Way("x=4", "a:x", {"params": "c:x", "sums": "float32"}))
    assert found == {"all_gather": {"bf16"}, "reduce_scatter": {"f32"}, "all_reduce": {"f32"}}


def test_gathered_once_a_step_sums_in_float32_too() -> None:
    found = _moved(Way("x=4", "a:x", {"params": "c:x", "sums": "float32", "gather": "step"}))
    assert found["reduce_scatter"] == {"f32"}


@pytest.mark.parametrize("options", [{}, {"gather": "step"}], ids=str)
def test_forward_mode_goes_through_a_gather_summed_in_float32(options: dict[str, str]) -> None:
    """Against the same in one device's bfloat16, to its rounding; and the Hessian along a vector by both modes."""
    region = Way("x=4", "a:x", {"params": "c:x", "sums": "float32", **options}).region(_loss)
    for f in (lambda f: jax.jvp(lambda w: f(w, X), (SMALL,), (SMALL,))[1], _slope_of_the_slope, _twice_forwards):
        np.testing.assert_allclose(float(jax.jit(lambda f=f: f(region))()), float(f(_loss)), rtol=0.05)


def _slope_of_the_slope(f: Any) -> Any:
    return jax.jvp(lambda w: mw.sum(jax.grad(lambda w: f(w, X))(w)), (SMALL,), (SMALL,))[1]


def _twice_forwards(f: Any) -> Any:
    return jax.jvp(lambda w: jax.jvp(lambda w: f(w, X), (w,), (SMALL,))[1], (SMALL,), (SMALL,))[1]


def test_a_contraction_is_summed_in_the_dtype_asked_for() -> None:
    assert _moved(Way("x=4", "b:x"))["all_reduce"] == {"bf16"}
    assert _moved(Way("x=4", "b:x", {"sums": "float32"}))["all_reduce"] == {"f32"}


def test_every_sum_of_gradients_is_taken_in_float32_when_asked() -> None:
    """Data parallelism's sums of weights, and tensor parallelism's of inputs, are transposes of nothing that moves."""
    batch, embed, ff = mw.dims(batch=8, embed=16, ff=32)
    w, x = tensor(embed, ff, role="parameter"), tensor(batch, embed)

    def loss(w: Any, x: Any) -> Any:
        half = mw.dot(x.astype("bfloat16"), w.astype("bfloat16"), over="embed")
        return (half.astype("float32") ** 2).sum()

    for sums, expected in ((None, "bf16"), ("float32", "f32")):
        way = Way("data=4,model=2", "batch:data, ff:model", {"sums": sums})
        text = jax.jit(jax.grad(way.region(loss), argnums=(0, 1))).lower(w, x).as_text()
        reduced = re.findall(r"stablehlo\.all_reduce.*?\}\) : \(tensor<(?:\d+x)*([a-z]+\d+)>\)", text, re.DOTALL)
        assert reduced == [expected] * 2, (sums, reduced)
