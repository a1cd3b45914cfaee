"""Convolution and pooling: against a loop in NumPy and JAX on whole arrays, law 1, and what is sent."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax

import meshwright as mw
from meshwright import Tensor

from .laws import agree, tensor, ways
from .stablehlo import communicated


def named(x: Any) -> Any:
    return np.asarray(x.array if isinstance(x, Tensor) else x)


# One device, one dim: every size, kernel, stride, dilation and padding


def same(size: int, span: int, stride: int) -> tuple[int, int]:
    """As many zeros as make ceil(size / stride) outputs, found by counting up."""
    total = 0
    while (size + total - span) // stride + 1 < math.ceil(size / stride) or size + total < span:
        total += 1
    return total // 2, total - total // 2


def stretches(x: np.ndarray, taps: int, stride: int, dilation: int, ends: tuple[int, int]) -> np.ndarray:
    """For each output the inputs it looks at, along the first dim, NaN for padding: (outputs, taps, ...)."""
    before, after = ends
    span, out = (taps - 1) * dilation + 1, []
    for start in range(-before, len(x) + after - span + 1, stride):
        at = [start + t * dilation for t in range(taps)]
        out.append([x[p] if 0 <= p < len(x) else np.full_like(x[0], np.nan) for p in at])
    return np.asarray(out).reshape(len(out), taps, *x.shape[1:])


SIZES = {
    "size": st.integers(1, 11),
    "taps": st.integers(1, 5),
    "stride": st.integers(1, 4),
    "dilation": st.integers(1, 3),
}
PADDINGS = st.sampled_from(["SAME", "VALID"]) | st.tuples(st.integers(0, 4), st.integers(0, 4))


@given(**SIZES, padding=PADDINGS)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_one_dim_is_a_loop(size: int, taps: int, stride: int, dilation: int, padding: Any) -> None:
    span = (taps - 1) * dilation + 1
    ends = same(size, span, stride) if padding == "SAME" else (0, 0) if padding == "VALID" else padding
    assume(size + sum(ends) >= span)
    x, kernel = tensor(*mw.dims(batch=2, time=size, channels=3)), tensor(*mw.dims(features=4, tap=taps, channels=3))
    how = {"strides": {"time": stride}, "dilation": dilation, "padding": padding}
    seen = stretches(named(x).transpose(1, 0, 2), taps, stride, dilation, ends)

    found = mw.conv(x, kernel, {"time": "tap"}, inputs="channels", **how)
    assert found.names == ("batch", "time", "features") and found.size("time") == len(seen)
    loop = np.einsum("otbc,ftc->bof", np.nan_to_num(seen), named(kernel))
    np.testing.assert_allclose(named(found), loop, rtol=1e-5, atol=1e-4)

    window = {"time": taps}
    seen = seen.transpose(2, 0, 1, 3)
    np.testing.assert_allclose(named(mw.sum_pool(x, window, **how)), np.nansum(seen, 2), rtol=1e-5, atol=1e-5)
    zeros = mw.mean_pool(x, window, **how, count_include_pad=True)
    np.testing.assert_allclose(named(zeros), np.nan_to_num(seen).mean(2), rtol=1e-5, atol=1e-5)
    if np.isfinite(seen).any(2).all():
        np.testing.assert_allclose(named(mw.max_pool(x, window, **how)), np.nanmax(seen, 2))
        np.testing.assert_allclose(named(mw.mean_pool(x, window, **how)), np.nanmean(seen, 2), rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="lies in the padding"):
            mw.mean_pool(x, window, **how)


@given(**SIZES, padding=PADDINGS)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_one_dim_transposed_is_jaxs(size: int, taps: int, stride: int, dilation: int, padding: Any) -> None:
    assume(isinstance(padding, str) or (size - 1) * stride + 1 + sum(padding) >= (taps - 1) * dilation + 1)
    x, kernel = tensor(*mw.dims(batch=2, time=size, channels=3)), tensor(*mw.dims(tap=taps, channels=3, features=4))
    found = mw.conv_transpose(
        x, kernel, {"time": "tap"}, inputs="channels", strides=stride, dilation=dilation, padding=padding
    )
    pads = padding if isinstance(padding, str) else [padding]
    expected = lax.conv_transpose(
        x.array, kernel.array, (stride,), pads, (dilation,), dimension_numbers=("NWC", "WIO", "NWC")
    )
    np.testing.assert_allclose(named(found), expected, rtol=1e-5, atol=1e-4)
    if padding == "SAME":
        assert found.size("time") == size * stride


# One device, several dims: JAX's own


def test_two_and_three_dims_are_jaxs() -> None:
    x = tensor(*mw.dims(channels=3, batch=2, rows=7, cols=6))
    kernel = tensor(*mw.dims(features=5, kernel_rows=3, channels=3, kernel_cols=2), seed=1)
    found = mw.conv(x, kernel, "rows cols", inputs="channels", strides={"rows": 2}, padding={"rows": "SAME", "cols": 1})
    expected = lax.conv_general_dilated(
        x.array, kernel.array, (2, 1), [(1, 1), (1, 1)], dimension_numbers=("CNHW", "OHIW", "NHWC")
    )
    assert found.names == ("batch", "rows", "cols", "features")
    np.testing.assert_allclose(named(found), expected, rtol=1e-5, atol=1e-4)

    deep = tensor(*mw.dims(batch=2, depth=4, rows=5, cols=3, channels=2))
    kernel = tensor(*mw.dims(kernel_depth=2, kernel_rows=3, kernel_cols=2, channels=2, features=3))
    numbers = ("NDHWC", "DHWIO", "NDHWC")
    how = {"inputs": "channels", "dilation": {"cols": 2}}
    there = mw.conv(deep, kernel, "depth rows cols", strides={"depth": 3}, **how)
    expected = lax.conv_general_dilated(
        deep.array, kernel.array, (3, 1, 1), "SAME", rhs_dilation=(1, 1, 2), dimension_numbers=numbers
    )
    np.testing.assert_allclose(named(there), expected, rtol=1e-5, atol=1e-4)
    back = mw.conv_transpose(deep, kernel, "depth rows cols", strides={"rows": 2}, **how)
    expected = lax.conv_transpose(
        deep.array, kernel.array, (1, 2, 1), "SAME", rhs_dilation=(1, 1, 2), dimension_numbers=numbers
    )
    np.testing.assert_allclose(named(back), expected, rtol=1e-5, atol=1e-4)

    greatest = mw.max_pool(deep, {"cols": 2, "depth": 3}, padding="SAME", strides={"depth": 1})
    expected = lax.reduce_window(deep.array, -jnp.inf, lax.max, (1, 3, 1, 2, 1), (1, 1, 1, 2, 1), "SAME")
    np.testing.assert_array_equal(named(greatest), expected)


def test_groups_and_depthwise() -> None:
    x = tensor(*mw.dims(batch=2, groups=2, rows=6, channels=3))
    kernel = tensor(*mw.dims(kernel_rows=3, channels=3, groups=2, features=4), seed=1)
    found = mw.conv(x, kernel, "rows", inputs="channels", strides=2)
    assert found.names == ("batch", "groups", "rows", "features")
    each = [mw.conv(x[{"groups": g}], kernel[{"groups": g}], "rows", inputs="channels", strides=2) for g in range(2)]
    np.testing.assert_allclose(named(found), np.stack([named(y) for y in each], 1), rtol=1e-5, atol=1e-5)

    several = mw.conv(x, kernel, "rows", inputs="groups channels", padding="VALID")
    seen = np.stack([named(x)[:, :, t : t + 4] for t in range(3)])
    np.testing.assert_allclose(named(several), np.einsum("tbgoc,tcgf->bof", seen, named(kernel)), rtol=1e-5, atol=1e-4)

    for taps in (3, 34):
        kernel = tensor(*mw.dims(channels=3, kernel_rows=taps), seed=2)
        for op, stride, spread in ((mw.conv, 2, 1), (mw.conv_transpose, 1, 2)):
            found = op(x, kernel, "rows", inputs=(), strides=2, padding=(taps - 2, taps + 1))
            lhs = jnp.transpose(x.array, (0, 1, 3, 2)).reshape(4, 3, 6)
            expected = lax.conv_general_dilated(
                lhs, kernel.array[:, None], (stride,), [(taps - 2, taps + 1)], (spread,), feature_group_count=3
            )
            assert found.names == ("batch", "groups", "rows", "channels")
            expected = jnp.transpose(expected.reshape(2, 2, 3, -1), (0, 1, 3, 2))
            np.testing.assert_allclose(named(found), expected, rtol=1e-5, atol=1e-4)


def test_the_transpose_is_the_gradient() -> None:
    """With the flipped kernel; inputs and outputs change places by name."""
    x, kernel = tensor(*mw.dims(time=8, channels=3)), tensor(*mw.dims(kernel_time=4, channels=3, features=2))
    y, back = jax.vjp(lambda x: mw.conv(x, kernel, "time", inputs="channels", strides=2, padding=1), x)
    flipped = mw.flip(kernel, "kernel_time")
    found = mw.conv_transpose(y, flipped, "time", inputs="features", strides=2, padding=2)
    np.testing.assert_allclose(named(found), named(back(y)[0]), rtol=1e-5, atol=1e-4)


def test_padding_wider_than_a_window_has_its_gradient() -> None:
    """As a convolution of the padded inputs has; on a CPU XLA reads beyond the array for padding below zero."""
    x, kernel = tensor(*mw.dims(batch=2, time=9, channels=4)), tensor(*mw.dims(kernel_time=2, channels=4, features=4))
    for op, padding in ((mw.conv, (3, 0)), (mw.conv, (4, 3)), (mw.conv_transpose, (3, 1))):

        def total(x: Tensor, op: Any = op, padding: Any = padding) -> Any:
            y = op(x, kernel, "time", inputs="channels", strides=2, padding=padding)
            return mw.sum(mw.sin(y))

        def padded(x: Tensor, op: Any = op, padding: Any = padding) -> Any:
            if op is mw.conv_transpose:
                x = mw.stack([x, 0 * x], "zero").reorder("batch", "time", "zero", "channels")
                x = x.merge(("time", "zero"), "time").slice("time", 0, 17)
            x, strides = mw.pad(x, time=padding), 2 if op is mw.conv else 1
            return mw.sum(mw.sin(mw.conv(x, kernel, "time", inputs="channels", strides=strides, padding="VALID")))

        assert "padding=((-" not in str(jax.make_jaxpr(jax.grad(total))(x))
        found, expected = (named(jax.jit(jax.grad(f))(x)) for f in (total, padded))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_dtypes() -> None:
    pairs = list(itertools.product(("max_pool", "sum_pool", "mean_pool"), (jnp.int8, jnp.bool_, jnp.bfloat16)))
    x = Tensor(jnp.arange(8), "time")

    @jax.jit
    def pooled_and_reduced(x: Tensor) -> Any:
        both = []
        for name, dtype in pairs:
            y = x.astype(dtype)
            reduced = getattr(mw, name.removesuffix("_pool"))(y.split("time", windows=2, time=4), "time")
            both.append((getattr(mw, name)(y, {"time": 4}).array, reduced.array))
        return both

    for (name, dtype), (found, expected) in zip(pairs, pooled_and_reduced(x), strict=True):
        assert found.dtype == expected.dtype, f"{name} of {dtype}"
        np.testing.assert_array_equal(found, expected)
    low = Tensor(jnp.full((6,), -120, jnp.int8), "time")
    assert (named(mw.max_pool(low, {"time": 3}, strides=1, padding=2)) == -120).sum() == 6 + 2
    x, kernel = (tensor(*these, dtype=jnp.bfloat16) for these in (mw.dims(time=6, c=4), mw.dims(kernel_time=3, c=4)))
    for inputs in ("c", ()):

        def total(x: Tensor, kernel: Tensor, inputs: Any = inputs) -> Any:
            y = mw.conv(x, kernel, "time", inputs=inputs, preferred_element_type=jnp.float32)
            assert y.dtype == jnp.float32
            return y.sum()

        to_x, to_kernel = jax.grad(total, (0, 1))(x, kernel)
        assert to_x.dtype == to_kernel.dtype == jnp.bfloat16
    assert mw.conv(x, kernel, "time", inputs=()).dtype == jnp.bfloat16


def test_a_dilated_maximum_has_its_gradient() -> None:
    x = tensor(*mw.dims(time=12))
    _, back = jax.vjp(lambda x: mw.max_pool(x, {"time": 3}, dilation=2, strides=3, padding="SAME"), x)
    seen = stretches(named(x), 3, 3, 2, same(12, 5, 3))
    weights = np.arange(1.0, len(seen) + 1, dtype=np.float32)
    expected = sum(w * (named(x) == np.nanmax(s)) for w, s in zip(weights, seen, strict=True))
    np.testing.assert_array_equal(named(back(Tensor(weights, "time"))[0]), expected)


# Law 1

LAYOUTS_OF_ONE = [("x=2", "t:x"), ("x=4", "t:x"), ("x=2,y=2", "t:(y,x)")]


def drawn(rng: np.random.Generator, name: str, size: int, num: int) -> dict[str, Any]:
    """A window at random whose outputs ``num`` devices can share."""
    x = Tensor(jnp.zeros(size), "t")
    while True:
        taps, dilation = int(rng.integers(1, 8)), int(rng.integers(1, 4))
        padding = [str(rng.choice(["SAME", "VALID"])), tuple(map(int, rng.integers(0, 6, 2)))][int(rng.integers(2))]
        how = {"taps": taps, "dilation": dilation, "padding": padding, "strides": int(rng.integers(1, 5))}
        try:
            y = jax.eval_shape(functools.partial(applied, name, **how), x, Tensor(jnp.zeros(8), "k"))
        except ValueError:
            continue
        if y.size("t") % num == 0:
            return how


def applied(name: str, x: Tensor, kernel: Tensor, *, taps: int, **how: Any) -> Any:
    if name.startswith("conv"):
        return getattr(mw, name)(x, kernel.slice("k", 0, taps), {"t": "k"}, inputs=set(x.names) - {"t", "b"}, **how)
    return getattr(mw, name)(x, {"t": taps}, **how)


def test_any_window_over_a_split_dim() -> None:
    """Windows drawn at random, narrow, wide, strided past their own width, dilated across several devices' slices."""
    rng = np.random.default_rng(0)
    x, kernel = tensor(*mw.dims(b=2, t=16, c=2)), tensor(*mw.dims(k=8, c=2), seed=1)
    cases = {}
    # 52 outputs, 13 to a device, three to an input: the devices begin at different ones of the three.
    between = {"taps": 7, "strides": 3, "dilation": 1, "padding": "VALID"}
    names = ["conv", "conv_transpose", "max_pool", "mean_pool", "sum_pool"] * 5
    windows = [("conv_transpose", between), *((name, drawn(rng, name, 16, 4)) for name in names)]
    for i, (name, how) in enumerate(windows):

        def case(x: Tensor, kernel: Tensor, name: str = name, how: Any = how) -> Any:
            return applied(name, x, kernel, **how)

        cases[f"{i} {name} {how}"] = case
    agree(cases, x, kernel, over=ways(*LAYOUTS_OF_ONE, partitioners=["names"]))


IMAGE = mw.dims(batch=4, rows=8, cols=8, channels=4)
KERNEL = mw.dims(kernel_rows=3, kernel_cols=2, channels=4, features=4)

IMAGES: dict[str, Callable[..., Any]] = {
    "same": lambda x, w, v: _same(x, w),
    "strided": lambda x, w, v: mw.conv(x, w, "cols rows", inputs="channels", strides=2, padding={"rows": 1, "cols": 0}),
    "transposed": lambda x, w, v: mw.conv_transpose(x, w, "rows cols", inputs="channels", strides=2),
    "no inputs, so groups": lambda x, w, v: mw.conv(x, w, "rows cols", inputs=(), dilation={"rows": 3}),
    "depthwise": lambda x, w, v: mw.conv(x, v, "rows cols", inputs=()),
    "one dim of two": lambda x, w, v: mw.conv(x, v.sum("kernel_cols"), "rows", inputs=()),
    "added": lambda x, w, v: _same(x, w) + _same(2 * x, w),
    "greatest": lambda x, w, v: mw.max_pool(x, {"rows": 3, "cols": 2}, strides={"rows": 1}, padding="SAME"),
    "mean": lambda x, w, v: mw.mean_pool(x, {"rows": 2, "cols": 3}, strides=2, padding="SAME"),
    "mean of sums": lambda x, w, v: mw.mean_pool(x.sum("channels"), {"rows": 2, "cols": 2}),
    "sum of a product": lambda x, w, v: mw.sum_pool(_same(x, w), {"rows": 2}),
}  # fmt: skip


def _same(x: Tensor, w: Tensor) -> Any:
    return mw.conv(x, w, "rows cols", inputs="channels")


LAYOUTS = [
    ("x=2,y=2", "rows:x, cols:y"),
    ("x=2,y=4", "batch:x, rows:y"),
    ("x=2,y=2", "channels:x, features:y"),
    ("x=2,y=2,z=2", "channels:y, cols:(z,x)"),
    ("x=2,y=3", "kernel_cols:x, batch:x, kernel_rows:y"),
]


def images() -> tuple[Tensor, ...]:
    depthwise = tensor(*KERNEL[:3], seed=2, role="parameter")
    return tensor(*IMAGE), tensor(*KERNEL, seed=1, role="parameter"), depthwise


def test_images_do_not_depend_on_the_layout() -> None:
    agree(IMAGES, *images(), over=[*ways(*LAYOUTS, partitioners=["names"]), *ways(LAYOUTS[0], partitioners=["xla"])])


def test_kernels_at_rest() -> None:
    some = {name: IMAGES[name] for name in ("same", "transposed", "depthwise", "added")}
    pairs = ("x=2,y=2", "batch:x, rows:y"), ("x=2,y=2", "cols:(x,y)")
    for gather in ("use", "step"):
        agree(some, *images(), over=ways(*pairs, partitioners=["names"], params="channels:x", gather=gather))


def test_three_dims_do_not_depend_on_the_layout() -> None:
    x = tensor(*mw.dims(batch=2, depth=4, rows=4, cols=8, channels=2))
    w = tensor(*mw.dims(kernel_depth=3, kernel_rows=2, kernel_cols=3, channels=2, features=2), seed=1)
    names = "depth rows cols"
    cases = {
        "conv": lambda x, w: mw.conv(x, w, names, inputs="channels", strides={"cols": 2}),
        "greatest": lambda x, w: mw.max_pool(x, {"cols": 3, "depth": 2}, strides=1, padding="SAME"),
    }
    agree(cases, x, w, over=ways(("x=2,y=2,z=2", "depth:x, rows:y, cols:z"), partitioners=["names"]))


def test_ties_go_to_the_first_on_every_layout() -> None:
    """The gradient of a maximum too: to the first element in the order of the dims, as JAX has it."""
    values = np.random.default_rng(0).integers(0, 2, (8, 8))
    x = Tensor(jnp.asarray(values, jnp.float32), "rows cols")
    agree(
        lambda x: mw.max_pool(x, {"rows": 3, "cols": 3}, strides=1, padding="SAME"),
        x, over=ways(("x=4,y=2", "rows:x, cols:y"), partitioners=["names"]),
    )  # fmt: skip


# What is sent: 32 rows over 4 devices, of 2 x 8 x 3 = 48 elements each


def _over_rows(x: Tensor, w: Tensor, **how: Any) -> Any:
    return mw.conv(x, w, "rows", inputs="channels", **how)


ROW = 48
SENT: dict[str, tuple[Callable[[Tensor, Tensor], Any], list[int]]] = {
    "three rows": (_over_rows, [ROW, ROW]),
    "strided": (lambda x, w: _over_rows(x, w, strides=2), [ROW]),
    "dilated": (lambda x, w: _over_rows(x, w, dilation=4), [4 * ROW, 4 * ROW]),
    "causal": (lambda x, w: _over_rows(x, w, padding=(2, 0)), [2 * ROW]),
    "several hops": (lambda x, w: _over_rows(x, w, dilation=9), [ROW, 8 * ROW, 8 * ROW, ROW]),
    "transposed": (lambda x, w: mw.conv_transpose(x, w, "rows", inputs="channels", strides=2), [ROW]),
    "one tap": (lambda x, w: _over_rows(x, w.slice("kernel_rows", 0, 1)), []),
    "one tap, strided": (lambda x, w: _over_rows(x, w.slice("kernel_rows", 0, 1), strides=4), []),
    "pool as wide as its stride": (lambda x, w: mw.max_pool(x, {"rows": 2}), []),
    "pool of another dim": (lambda x, w: mw.max_pool(x, {"cols": 2}), []),
    "pools that overlap": (lambda x, w: mw.mean_pool(x, {"rows": 3}, strides=2, padding="SAME"), [ROW]),
}


@pytest.mark.parametrize("name", SENT)
def test_only_halos_are_sent(name: str) -> None:
    """Permutes of the halos, and the same ones back for the gradient; a kernel's gradient is summed."""
    function, expected = SENT[name]
    x = tensor(*mw.dims(batch=2, rows=32, cols=8, channels=3))
    w = tensor(*mw.dims(kernel_rows=3, channels=3, features=2), seed=1)
    region = mw.spmd(function, mw.Mesh("x=4", jax.devices()[:4]), mw.Layout("rows:x"))
    assert communicated(region, x, w) == [("collective_permute", size) for size in expected]

    back = communicated(jax.grad(lambda x, w: jnp.square(region(x, w).array).sum(), (0, 1)), x, w)
    halos = sorted(size for kind, size in back if kind == "collective_permute")
    assert halos == sorted(expected + expected)
    of_kernel = [] if "pool" in name else [("all_reduce", 6 if "one tap" in name else 18)]
    assert [sent for sent in back if sent[0] != "collective_permute"] == of_kernel


def test_a_kernel_at_rest_is_gathered_for_its_use() -> None:
    """Its gradient's sum is scattered. Halos are exchanged once: the input with its halos is kept for the gradient."""
    x = tensor(*mw.dims(batch=2, rows=32, cols=8, channels=4))
    w = tensor(*mw.dims(kernel_rows=3, channels=4, features=2), seed=1, role="parameter")
    region = mw.spmd(_over_rows, mw.Mesh("x=4", jax.devices()[:4]), mw.Layout("rows:x", params="channels:x"))
    there = [("collective_permute", 64), ("collective_permute", 64)]
    assert sorted(communicated(region, x, w)) == [("all_gather", 6), *there]
    back = communicated(jax.grad(lambda w: jnp.square(region(x, w).array).sum()), w)
    assert sorted(back) == [("all_gather", 6), *there, ("reduce_scatter", 24)]


# What is refused

REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "unknown dim": (lambda x, w: mw.conv(x, w, "row", inputs="channels"), r"no dim 'row' .*Did you mean 'rows'"),
    "no window": (
        lambda x, w: mw.conv(x, w, {"rows": "kernel_row"}, inputs="channels"),
        r"no dim 'kernel_row', the window over 'rows'. Did you mean 'kernel_rows'.*kernel: \(kernel_rows=3",
    ),
    "no inputs": (
        lambda x, w: _over_both(x, w.rename(channels="chan")),
        r"input dim 'channels' is missing in the kernel.*Did you mean 'chan'",
    ),
    "other inputs": (
        lambda x, w: _over_both(x.slice("channels", 0, 2), w),
        r"'channels' has size 2 in one operand and 4 in another",
    ),
    "nothing to move over": (lambda x, w: mw.conv(x, w, (), inputs="channels"), r"over 1 to 3 dims, here over 0"),
    "four": (lambda x, w: mw.conv(x, w, "a b c d", inputs="channels"), r"here over 4: \(a, b, c, d\)"),
    "one name for both": (
        lambda x, w: mw.conv(x, w.rename(kernel_rows="rows"), {"rows": "rows"}, inputs="channels"),
        r"both operands have the dim 'rows'.*kernel.rename\(rows='kernel_rows'\)",
    ),
    "one window for two": (
        lambda x, w: mw.conv(x, w, {"rows": "kernel_rows", "cols": "kernel_rows"}, inputs="channels"),
        r"'kernel_rows' is named twice",
    ),
    "summed and moved over": (
        lambda x, w: mw.conv(x, w, "rows cols", inputs="rows"),
        r"'rows' is both in over and in inputs",
    ),
    "too wide": (
        lambda x, w: _over_both(x, w, dilation={"rows": 4}, padding="VALID"),
        r"window of 3 at dilation 4 spans 9, but 'rows' has size 8: nothing is left",
    ),
    "stride of nothing": (lambda x, w: _over_both(x, w, strides={"row": 2}), r"a stride for 'row', over.*'rows'"),
    "stride 0": (lambda x, w: _over_both(x, w, strides=0), r"the stride of 'rows' is 0; it must be at least 1"),
    "stride traced": (lambda x, w: _over_both(x, w, strides=jnp.int32(2)), r"the stride is a JAX array.*\{'rows': 2\}"),
    "padding": (lambda x, w: _over_both(x, w, padding="SAMME"), r"no padding 'SAMME'. Did you mean 'SAME'"),
    "padding of one": (lambda x, w: _over_both(x, w, padding={"rows": 1}), r"of 'cols' is not given.*cols=\(0, 0\)"),
    "padding, three": (lambda x, w: _over_both(x, w, padding=(1, 1, 1)), r"give \(before, after\)"),
    "padding, negative": (lambda x, w: _over_both(x, w, padding=(0, -1)), r"padding \(0, -1\) of 'rows' is negative"),
    "array": (lambda x, w: _over_both(x, w.array), r"expected a tensor, found an array of shape \(3, 2, 4, 4\)"),
    "transposed": (
        lambda x, w: mw.conv_transpose(x, w, {"rows": "k"}, inputs="channels"),
        r"conv_transpose: the kernel has no dim 'k', the window over 'rows'",
    ),
    "pool of a name": (lambda x, w: mw.max_pool(x, "rows"), r"over is 'rows'; give the size of the window.*2\}"),  # pyright: ignore[reportArgumentType]
    "pool of 0": (lambda x, w: mw.sum_pool(x, {"rows": 0}), r"sum_pool: the window along 'rows' has size 0"),
    "pool of half": (lambda x, w: mw.sum_pool(x, {"rows": 1.5}), r"window along 'rows' is a float"),  # pyright: ignore[reportArgumentType]
    "pool too wide": (lambda x, w: mw.max_pool(x, {"rows": 9}), r"spans 9, but 'rows' has size 8"),
    "pool of keys": (lambda x, w: mw.max_pool(_keys(), {"rows": 1}), r"is not of numbers"),
    "pool of complex": (lambda x, w: mw.max_pool(x.astype(jnp.complex64), {"rows": 2}), r"complex64 has no order"),
    "mean of nothing": (
        lambda x, w: mw.mean_pool(x, {"rows": 2, "cols": 1}, strides=1, padding={"rows": (3, 0), "cols": 0}),
        r"mean_pool: window 0 along 'rows' \(size 8\) lies in the padding \(3, 0\) alone",
    ),
}  # fmt: skip


def _over_both(x: Any, w: Any, **how: Any) -> Any:
    return mw.conv(x, w, "rows cols", inputs="channels", **how)


def _keys() -> Tensor:
    return Tensor(jax.random.split(jax.random.key(0), 2), "rows")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name: str) -> None:
    function, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=f"(?s){message}.*test_conv.py"):
        function(*images()[:2])


def test_outputs_that_the_axes_do_not_divide_are_refused() -> None:
    for name, function, size in (
        ("conv", lambda x: _over_both(x, images()[1], padding="VALID"), 6),
        ("max_pool", lambda x: mw.max_pool(x, {"rows": 3}), 2),
    ):
        region = mw.spmd(function, mw.Mesh("x=4", jax.devices()[:4]), mw.Layout("rows:x"))
        message = rf"{name}: the dim 'rows' of size {size} cannot be split over the axis 'x' \(size 4\)"
        with pytest.raises(ValueError, match=message):
            region(images()[0])


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_under_xlas_partitioner_on_meshes_with_more_axes(transposed: bool) -> None:
    """XLA's own are multiplied by the size of the axis that is left over: of the kernel, where a spatial dim is split,
    or where there are groups and the batch is."""
    x = tensor(*mw.dims(batch=4, rows=16, channels=8))
    kernel = tensor(*mw.dims(kernel_rows=3, channels=8, features=4), seed=1)
    each = tensor(*mw.dims(kernel_rows=33, channels=8), seed=2)
    function = mw.conv_transpose if transposed else mw.conv
    cases = {
        "plain": lambda x, k, d: mw.sin(function(x, k, "rows", inputs="channels")),
        "dilated": lambda x, k, d: mw.sin(function(x, k, "rows", inputs="channels", dilation=2)),
        "strided": lambda x, k, d: mw.sin(function(x, k, "rows", inputs="channels", strides=2)),
        "depthwise, many taps": lambda x, k, d: mw.sin(function(x, d, "rows", inputs=())),
    }
    layouts = ("rows:x", "rows:x, channels:y", "rows:x, features:y", "rows:y, batch:x", "batch:x")
    over = ways(*(("x=2,y=2", layout) for layout in layouts), partitioners=("xla",))
    agree(cases, x, kernel, each, over=over)
