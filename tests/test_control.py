"""scan, fold, while_loop, cond, remat, vmap, apply and custom gradients, on one device and under every layout."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshwright as mw

from .laws import ABC, Way, agree, tensor, ways

A, B, C = mw.dims(a=8, b=8, c=16)
L, TIME = mw.dims(layers=3, time=14)
W = tensor(L, mw.Dim("b", 8), mw.Dim("b_out", 8), seed=1, role="parameter") * 0.2
X = tensor(A, B, C)


def _layer(x: Any, w: Any) -> Any:
    return mw.tanh(mw.dot(x, w, "b").rename(b_out="b")) + x


def _scanned(x: Any, w: Any, **options: Any) -> Any:
    def step(carry: Any, w: Any) -> Any:
        y = _layer(carry, w)
        return y, (y.mean("a"), y.sum())

    last, (means, sums) = mw.scan(step, x, w, over="layers", **options)
    return last, means, sums


def _branch(x: Any) -> Any:
    return mw.cond(x.sum() > 0, lambda x: x * 2, lambda x: mw.dot(x, x, "c").rename(b="d").sum("d").broadcast(B, C), x)


@mw.custom_vjp
def _clipped_gradient(x: Any) -> Any:
    return x * x


_clipped_gradient.defvjp(lambda x: (x * x, x), lambda x, g: (mw.clip(g * x * 2.0, -1.0, 1.0),))


def _closing_over(y: Any, x: Any, w: Any) -> Any:
    return mw.fold(lambda c, w: _layer(c, w) + y, x, w, over="layers")


CASES = {
    "scan": _scanned,
    "scan reversed": functools.partial(_scanned, reverse=True),
    "scan unrolled": functools.partial(_scanned, unroll=True),
    "scan remat": functools.partial(_scanned, remat="nothing"),
    "scan remat dots": functools.partial(_scanned, remat="dots", unroll=2),
    "scan over a split dim": lambda x, w: mw.scan(lambda c, xi: (c + xi * xi, c * 0.5 + xi), x.mean("a"), x, over="a"),
    "scan over the last dim": lambda x, w: mw.scan(lambda c, xi: (mw.sin(c) + xi, c), x.mean("c"), x, over="c"),
    "scan of scalars": lambda x, w: mw.scan(lambda c, xi: (c + xi, c * xi), jnp.float32(0), x.mean("b c"), over="a"),
    "scan without xs": lambda x, w: mw.scan(lambda c, _: (mw.cos(c), None), x, over=mw.Dim("steps", 3))[0],
    "carry in another order": lambda x, w: mw.fold(lambda c, w: _layer(c, w).reorder("c a b"), x, w, over="layers"),
    "carry with a pending sum": lambda x, w: mw.fold(
        lambda c, w: c + mw.dot(mw.dot(c, w, "b"), w.rename(b="b2"), "b_out").rename(b2="b"), x, w, over="layers"
    ),
    "closure over a pending sum": lambda x, w: _closing_over(mw.dot(x, w.sum("layers"), "b").rename(b_out="b"), x, w),
    "cond": lambda x, w: _branch(x),
    "remat": lambda x, w: mw.remat(lambda x, scale, w: _layer(x * scale, w.sum("layers")))(x, 2.0, w),
    "remat with names": lambda x, w: mw.remat(lambda x: mw.sin(mw.saved(mw.exp(x * 0.1), "power")), save=("power",))(x),
    "vmap": lambda x, w: mw.vmap(lambda xi, w: mw.softmax(mw.dot(xi, w.sum("layers"), "b"), "c"), "a")(x, w),
    "vmap to scalars": lambda x, w: mw.vmap(lambda xi: (xi * xi).sum(), "a")(x),
    "vmap over a scan": lambda x, w: mw.vmap(lambda xi, w: mw.fold(_layer, xi, w, over="layers"), "a")(x, w),
    "vmap over a new dim": lambda x, w: mw.vmap(lambda: x * 2.0, mw.Dim("n", 2))(),
    "apply": lambda x, w: mw.apply(jnp.fft.irfft, mw.rename(x, a="whole"), dims_in="whole", dims_out=TIME),
    "apply to two": lambda x, w: mw.apply(
        jnp.outer, x.rename(a="i").mean("c"), x.rename(a="j").mean("b"), dims_in=["i", "j"], dims_out="i j"
    ),
    "custom gradient": lambda x, w: _clipped_gradient(x),
    "gradient inside": lambda x, w: jax.grad(lambda x: (x**3).sum() + mw.dot(x, w.mean("layers"), "b").sum())(x),
    "jit inside": lambda x, w: jax.jit(_layer)(x, w.mean("layers")),
}


@pytest.mark.parametrize("part", range(4))
def test_control_is_the_same_under_every_layout(part: int) -> None:
    cases = dict(list(CASES.items())[part::4])
    over = [*ways(*ABC[1:], partitioners=("names",)), *ways(ABC[5], ABC[8], partitioners=("xla",))]
    over += [Way("x=2,y=2", "a:x", {"params": p, "gather": g}) for p in ("b:x", "(x,y)") for g in ("use", "step")]
    agree(cases, X, W, over=over)


def test_apply_holds_results_against_dims_out() -> None:
    x = tensor(A, B)
    size = mw.Dim("half", 4)
    assert mw.apply(lambda v: v[:4], x, dims_in="b", dims_out=size).dims == (A, size)
    assert mw.apply(lambda v: v.sum(), x, dims_in="b", dims_out="").dims == (A,)
    wrong: dict[str, tuple[Any, Any]] = {
        r"dims_out asks for \(b=8\), so the shape \(8,\); the result of the function has the shape \(4,\)": (
            lambda v: v[:4],
            "b",
        ),
        r"the result of the function has the shape \(\)": (lambda v: v.sum(), "b"),
        r"result 1 of the function has the shape \(4,\)": (lambda v: (v, v[:4]), ["b", "b"]),
        r"the function returned a tuple of 2; dims_out says one array": (lambda v: (v, v), "b"),
        r"the function returned a tuple of 2; dims_out says a tuple of 3 arrays": (lambda v: (v, v), ["b", "b", "b"]),
        r"the function returned one \w+; dims_out says a tuple of 1 arrays": (lambda v: v, ["b"]),
    }
    for message, (f, dims_out) in wrong.items():
        for region in (lambda f: f, Way("x=2", "a:x").region):
            with pytest.raises(ValueError, match=f"(?s)apply: .*{message}.*test_control.py"):
                region(lambda x, f=f, dims_out=dims_out: mw.apply(f, x, dims_in="b", dims_out=dims_out))(x)


def test_apply_refuses_a_dim_worked_on_in_one_tensor_only() -> None:
    x, y = tensor(A, B), tensor(B)
    message = r"works on the dim 'b' of one tensor and is to run for each of its positions in another"
    with pytest.raises(ValueError, match=rf"(?s){message}.*dims_in: \(b\), \(\).*x.rename\(b='b_in'\)"):
        mw.apply(jnp.multiply, x, y, dims_in=["b", ""], dims_out="b")
    both = mw.apply(jnp.multiply, x, y, dims_in=["b", "b"], dims_out="b")
    assert (both.array == x.array * y.array[None]).all()


def test_the_body_of_a_scan_returns_a_pair() -> None:
    bodies: list[tuple[Any, str]] = [
        (lambda c, x: (c,), "a tuple of 1"),
        (lambda c, x: c, "one array"),
        (lambda c, x: x, "one Tensor"),
        (lambda c, x: None, "one NoneType"),
        (lambda c, x: (c, x, c), "a tuple of 3"),
    ]
    for body, found in bodies:
        message = rf"scan: the body returned {found}; it must return \(carry, y\).*mw.fold"
        with pytest.raises(TypeError, match=message):
            mw.scan(body, jnp.float32(0), X, over="a")


@mw.custom_vjp
def _sine_of_product(w: Any, x: Any) -> Any:
    return mw.sin(mw.dot(x, w, over="b"))


def _backward(kept: Any, g: Any, role: bool) -> Any:
    w, x = kept
    slope = g * mw.cos(mw.dot(x, w, over="b"))
    to_w = mw.einsum(slope, x, out="c b")
    return (mw.param(to_w) if role else to_w), mw.dot(slope, w, over="c")


@pytest.mark.parametrize("role", [False, True])
def test_a_custom_gradient_of_a_parameter_at_rest(role: bool) -> None:
    """The rule's gradient may have any order of dims and either role; the parameter may rest anywhere."""
    _sine_of_product.defvjp(lambda w, x: (_sine_of_product(w, x), (w, x)), functools.partial(_backward, role=role))
    w = tensor(B, C, seed=1, role="parameter") * 0.2
    options: list[dict[str, Any]] = [{"params": "b:x"}, {"params": "b:x", "gather": "step"}, {"params": "x"}]
    over = [way for each in options for way in ways(("x=4", "a:x"), ("x=2,y=2", "a:x, c:y"), **each)]
    agree(lambda w, x: _sine_of_product(w, x), w, X_AB, over=over)
    plain = jax.grad(lambda w: mw.sum(mw.sin(mw.dot(X_AB, w, over="b"))))(w)
    found = jax.grad(lambda w: mw.sum(_sine_of_product(w, X_AB)))(w)
    assert jnp.allclose(found.array, plain.array, rtol=1e-5, atol=1e-5)


def test_a_custom_gradient_takes_arguments_by_name() -> None:
    def f(x: Any, scale: Any = 3.0) -> Any:
        return mw.sum(x * scale)

    by_vjp, by_jvp = mw.custom_vjp(f), mw.custom_jvp(f)
    by_vjp.defvjp(lambda x, scale: (f(x, scale), (x, scale)), lambda kept, g: (kept[0] * 0 + g * kept[1] * 10, None))
    by_jvp.defjvp(lambda primals, tangents: (f(*primals), f(tangents[0], primals[1]) * 10))
    for g in (by_vjp, by_jvp):
        for call, expected in ((lambda x, g=g: g(x), 3), (lambda x, g=g: g(scale=2.0, x=x), 2)):
            np.testing.assert_allclose(jax.grad(call)(X_AB).array, expected * 10.0)
        with pytest.raises(TypeError, match="unexpected keyword argument 'scal'"):
            g(X_AB, scal=2.0)
    for function in (lambda x, *, scale=2.0: x * scale, functools.partial(lambda x, scale: x * scale, scale=2.0)):
        kept = mw.custom_jvp(function)
        kept.defjvp(lambda primals, tangents: (primals[0] * 2.0, tangents[0] * 7.0))
        assert jnp.array_equal(kept(X_AB).array, X_AB.array * 2.0)
        np.testing.assert_allclose(jax.grad(lambda x, kept=kept: mw.sum(kept(x)))(X_AB).array, 7.0)
    alone = mw.custom_jvp(lambda x, *, scale: x * scale)
    alone.defjvp(lambda primals, tangents: (primals[0], tangents[0]))
    with pytest.raises(TypeError, match="takes scale by keyword alone"):
        alone(X_AB, scale=2.0)


def test_a_region_composes_with_jaxs_transformations_alone_and_inside_a_trace() -> None:
    """Alone it is compiled as a whole; under ``jax.jit`` it is traced with what surrounds it."""
    x, w = tensor(A, B), tensor(B, mw.Dim("d", 8), seed=1, role="parameter")
    tree = jax.tree.structure(w)

    def loss(w: Any, x: Any) -> Any:
        return mw.mean(mw.silu(mw.dot(x, w, "b")))

    def stacked(f: Any) -> Any:
        return jax.vmap(lambda a: f(jax.tree.unflatten(tree, [a]), x))(jnp.stack([w.raw, w.raw * 2.0]))

    def outcomes(f: Any) -> list[Any]:
        slope = jax.grad(f)
        return [
            jax.jvp(lambda w: f(w, x), (w,), (w,)),
            jax.jvp(lambda w: slope(w, x), (w,), (w,)),
            jax.linearize(lambda w: f(w, x), w)[1](w),
            jax.grad(jax.checkpoint(f))(w, x),
            jax.lax.scan(lambda carry, _: (carry + slope(w, x).raw, None), jnp.zeros((8, 8)), None, length=2)[0],
            stacked(f),
            stacked(slope),
        ]

    expected = jax.tree.leaves(outcomes(loss))
    region = Way("x=2,y=2", "a:x", {"params": "d:y"}).region(loss)
    for found in (outcomes(region), jax.jit(lambda: outcomes(region))()):
        for a, b in zip(jax.tree.leaves(found), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_backward_rule_is_held_against_its_arguments() -> None:
    f = mw.custom_vjp(lambda w, x: w * x)
    w = x = tensor(A)
    wrong: list[tuple[Any, type[Exception], str]] = [
        (lambda kept, g: (g,), TypeError, "the backward rule gave 1; it must give a tuple with a gradient for each of"),
        (lambda kept, g: g, TypeError, "the backward rule gave a Tensor"),
        (lambda kept, g: (g, {"x": g}), TypeError, "the gradient of argument 1 is a tree of 1 values"),
        (lambda kept, g: (g, g.rename(a="b")), ValueError, r"argument 1: expected a tensor with the dims \(a=8\)"),
        (lambda kept, g: (g, g.sum()), ValueError, r"argument 1: .*found a value without dims"),
    ]
    for backward, error, message in wrong:
        f.defvjp(lambda w, x: (w * x, None), backward)
        with pytest.raises(error, match=f"custom_vjp: .*{message}") as caught:
            jax.grad(lambda w: mw.sum(f(w, x)))(w)
        assert len(str(caught.value)) < 400
    f.defvjp(lambda w, x: (w * x, x), lambda kept, g: (g * kept, None))
    assert (jax.grad(lambda w: mw.sum(f(w, x)))(w).array == x.array).all()


X_AB = tensor(A, B, seed=2)


def test_what_goes_round_keeps_its_dtype() -> None:
    a, b = mw.dims(a=4, b=8)
    with pytest.raises(TypeError, match=r"scan: carry\[0\]: \(b=8\) went in as float32 and came back as bfloat16"):
        mw.fold(lambda c, x: (c[0].astype("bfloat16"),), (tensor(b),), tensor(a, b), over="a")
    with pytest.raises(TypeError, match=r"cond: result.*float32.*bfloat16"):
        mw.cond(jnp.bool_(True), lambda x: x, lambda x: x.astype("bfloat16"), tensor(b))


def test_a_region_called_several_times_in_one_trace_is_traced_twice() -> None:
    """Once with what surrounds it, and once by itself, which further calls share."""
    traced = []
    mesh, layout = mw.Mesh("x=2", jax.devices()[:2]), mw.Layout("a:x")

    def program(x: Any) -> Any:
        traced.append(1)
        return mw.tanh(x) * 0.5

    region = mw.spmd(program, mesh, layout)

    def several(x: Any) -> Any:
        for _ in range(6):
            x = region(x)
        return x

    x = tensor(*mw.dims(a=8, b=4))
    expected = x
    for _ in range(6):
        expected = program(expected)
    traced.clear()
    np.testing.assert_allclose(jax.jit(several)(x).array, expected.array, rtol=1e-6)
    assert len(traced) == 2


def test_a_cached_function_inside_is_known_to_have_met_its_names() -> None:
    """Equal regions share JAX's caches: the second finds the inner function traced already."""
    mesh = mw.Mesh("x=2,y=2", jax.devices()[:4])
    x = tensor(*mw.dims(a=8, b=4))
    inner = jax.jit(lambda x: (x.rename(b="c") * 2.0).rename(c="b"))
    for reduce in (mw.sum, mw.mean):
        layout = mw.Layout("a:x, c:y", strict=True)
        found = mw.spmd(lambda x, reduce=reduce: reduce(inner(x)), mesh, layout)(x)
        np.testing.assert_allclose(found, reduce(x * 2.0), rtol=1e-5)
