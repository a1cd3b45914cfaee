"""Movement along dims: against NumPy on whole arrays, law 1, and what is sent."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import meshwright as mw
from meshwright import Tensor
from meshwright.ops.window import window

from .laws import ABC, agree, tensor, ways
from .stablehlo import communicated

A, B, C = mw.dims(a=16, b=16, c=16)
T = jnp.int32(3)

Case = tuple[Callable[..., Any], Callable[..., Any]]


def named(x: Any) -> Any:
    return np.asarray(x.array if isinstance(x, Tensor) else x)


ONE: dict[str, Case] = {
    "slice": (lambda x, t: mw.slice(x, "a", 3, 8), lambda x: x[3:11]),
    "slice far": (lambda x, t: x.slice("b", 8, 8), lambda x: x[:, 8:]),
    "slice all": (lambda x, t: x.slice("b", 0, 16), lambda x: x),
    "slice traced": (lambda x, t: x.slice("a", t, 8), lambda x: x[3:11]),
    "slice traced, beyond": (lambda x, t: x.slice("a", t + 9, 8), lambda x: x[8:]),
    "slice traced, from the end": (lambda x, t: x.slice("b", t - 12, 8), lambda x: x[:, 7:15]),
    "slice traced, most": (lambda x, t: x.slice("c", t, 12), lambda x: x[..., 3:15]),
    "index": (lambda x, t: x[{"a": 3}], lambda x: x[3]),
    "index two": (lambda x, t: x[{"c": -1, "a": 2}], lambda x: x[2, :, -1]),
    "index all": (lambda x, t: x[{"c": -1, "a": 2, "b": 9}], lambda x: x[2, 9, -1]),
    "index traced": (lambda x, t: x[{"b": t}], lambda x: x[:, 3]),
    "index traced, from the end": (lambda x, t: x[{"b": t - 5, "a": t + 90}], lambda x: x[-1, -2]),
    "index slice": (lambda x, t: x[{"b": slice(1, 9)}], lambda x: x[:, 1:9]),
    "index step": (lambda x, t: x[{"b": slice(None, None, 2)}], lambda x: x[:, ::2]),
    "index back": (lambda x, t: x[{"a": slice(None, None, -2), "c": 3}], lambda x: x[::-2, :, 3]),
    "index tensor": (lambda x, t: x[{"c": t, "b": _ids()}], lambda x: x[:, [3, 0, -1, 15], 3].T),
    "index both": (lambda x, t: x[{"c": slice(1, 13, 3), "a": t}], lambda x: x[3, :, 1:13:3]),
    "pad": (lambda x, t: mw.pad(x, c=(4, 0)), lambda x: np.pad(x, ((0, 0), (0, 0), (4, 0)))),
    "pad value": (
        lambda x, t: mw.pad(x, 1.5, a=(3, 5), b=4),
        lambda x: np.pad(x, ((3, 5), (4, 4), (0, 0)), constant_values=1.5),
    ),
    "pad edge": (
        lambda x, t: mw.pad(x, mode="edge", b=(7, 1), c=(0, 4)),
        lambda x: np.pad(x, ((0, 0), (7, 1), (0, 4)), mode="edge"),
    ),
    "pad reflect": (
        lambda x, t: mw.pad(x, mode="reflect", a=(3, 5), c=(15, 1)),
        lambda x: np.pad(x, ((3, 5), (0, 0), (15, 1)), mode="reflect"),
    ),
    "pad wrap": (
        lambda x, t: mw.pad(x, mode="wrap", b=(1, 31)),
        lambda x: np.pad(x, ((0, 0), (1, 31), (0, 0)), mode="wrap"),
    ),
    "shift": (lambda x, t: mw.shift(x, "a", 1), lambda x: np.pad(x, ((1, 0), (0, 0), (0, 0)))[:-1]),
    "shift back": (lambda x, t: mw.shift(x, "b", -3), lambda x: np.pad(x, ((0, 0), (0, 3), (0, 0)))[:, 3:]),
    "shift fill": (
        lambda x, t: mw.shift(x, "c", 6, fill=2.5),
        lambda x: np.pad(x, ((0, 0), (0, 0), (6, 0)), constant_values=2.5)[..., :-6],
    ),
    "shift out": (lambda x, t: mw.shift(x, "c", 20), lambda x: 0 * x),
    "shift round": (lambda x, t: mw.shift(x, "b", 18, wrap=True), lambda x: np.roll(x, 18, 1)),
    "roll": (lambda x, t: mw.roll(x, a=5, c=-1), lambda x: np.roll(x, (5, -1), (0, 2))),
    "flip": (lambda x, t: mw.flip(x, "a"), lambda x: np.flip(x, 0)),
    "flip two": (lambda x, t: mw.flip(x, "b c"), lambda x: np.flip(x, (1, 2))),
    "unstack": (lambda x, t: mw.unstack(x, "a")[5], lambda x: x[5]),
    "unstack sum": (lambda x, t: sum(mw.unstack(x, "c")[2:7]), lambda x: x[..., 2:7].sum(-1)),
    "repeat": (lambda x, t: mw.repeat(x, "a", 3), lambda x: np.repeat(x, 3, 0)),
    "tile": (lambda x, t: mw.tile(x, "c", 3), lambda x: np.tile(x, (1, 1, 3))),
    "of a sum": (lambda x, t: x.sum("b").slice("c", 4, 4) * 2, lambda x: 2 * x.sum(1)[:, 4:8]),
    "one of a sum": (lambda x, t: x.sum("b")[{"a": 1}], lambda x: x.sum(1)[1]),
    "shift of a sum": (lambda x, t: mw.shift(x.sum("b"), "a", 2, fill=1), lambda x: _shifted_sum(x)),
}


def _ids() -> Tensor:
    return Tensor(jnp.asarray([3, 0, -1, 15]), "d")


def _shifted_sum(x: Any) -> Any:
    return np.pad(x.sum(1), ((2, 0), (0, 0)), constant_values=1)[:-2]


TWO: dict[str, Case] = {
    "concat": (lambda x, y: mw.concat([x, y], "c"), lambda x, y: np.concatenate([x, y.transpose(1, 2, 0)], 2)),
    "concat other order": (lambda x, y: mw.concat([y, x], "c"), lambda x, y: np.concatenate([y, x.transpose(2, 0, 1)])),
    "concat four": (
        lambda x, y: mw.concat([x, x.slice("a", 1, 8), x, x.slice("a", 8, 8)], "a"),
        lambda x, y: np.concatenate([x, x[1:9], x, x[8:]]),
    ),
    "stack": (
        lambda x, y: mw.stack([x.sum("a") * i for i in range(8)], "a"),
        lambda x, y: np.stack([x.sum(0) * i for i in range(8)]),
    ),
    "stack other order": (
        lambda x, y: mw.stack([y, mw.reorder(y * 2, "a", ...)], mw.Dim("d", 2)),
        lambda x, y: np.stack([y, 2 * y]),
    ),
    "stack scalars": (
        lambda x, y: mw.stack([x.sum(), y.sum(), 2.0, x.max()] * 2, "b"),
        lambda x, y: np.array([x.sum(), y.sum(), 2.0, x.max()] * 2),
    ),
}


def _one(case: Callable[..., Any]) -> Callable[..., Any]:
    """A case as a function of (x, y, t), with sizes small enough to compare to rounding."""
    return lambda x, y, t: case(x, t)


def _two(case: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, y, t: case(x, y)


def inputs() -> tuple[Tensor, Tensor]:
    return tensor(A, B, C), tensor(mw.Dim("c", 8), A, B, seed=1)


@pytest.mark.parametrize("name", ONE)
def test_one_tensor_is_numpys(name: str) -> None:
    ours, numpys = ONE[name]
    x, _ = inputs()
    expected = numpys(named(x))
    found = named(ours(x, T))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TWO)
def test_two_tensors_are_numpys(name: str) -> None:
    ours, numpys = TWO[name]
    x, y = inputs()
    np.testing.assert_allclose(named(ours(x, y)), numpys(named(x), named(y)), rtol=1e-5, atol=1e-4)


CASES = {n: _one(f) for n, (f, _) in ONE.items()} | {n: _two(f) for n, (f, _) in TWO.items()}


MANY = [pair for pair in ABC if pair[0] not in ("x=2", "x=2,y=2") or pair[1] == "a:(x,y)"]


def test_results_do_not_depend_on_the_layout() -> None:
    agree(CASES, *inputs(), T, over=[*ways(*MANY, partitioners=["names"]), *ways(ABC[6], partitioners=["xla"])])


def test_parameters_and_promised_sums() -> None:
    x, w = tensor(A, B), tensor(mw.Dim("layers", 4), mw.Dim("b", 16), mw.Dim("c", 8), seed=1, role="parameter")

    def program(x: Tensor, w: Tensor, t: Any) -> Any:
        product = mw.dot(x, w[{"layers": 1}], "b")
        back = mw.flip(w, "layers c")
        return {
            "layer": mw.dot(x, w[{"layers": t}], "b"),
            "last layers": w.slice("layers", 2, 2) * 2.0,
            "row": w[{"b": 3}] * 1.0,
            "columns": w[{"c": slice(0, 8, 2)}].sum("b"),
            "every": [p * 1.0 for p in mw.unstack(w, "layers")],
            "parts": sum(mw.unstack(w, "b")[:3]),
            "flipped": mw.dot(x, back[{"layers": 0}], "b"),
            "padded": mw.pad(w, 1.0, b=(0, 4)).sum("b"),
            "twice": mw.concat([mw.repeat(w, "c", 2), mw.tile(w, "c", 2)], "layers").sum("c"),
            "stacked": mw.stack(mw.unstack(w, "layers"), "d"),
            "last of a sum": product[{"a": -1}],
            "slice of a sum": product.slice("c", 4, 4),
            "slice of a sum, traced": product.slice("a", t, 8),
            "some of a sum": product[{"a": slice(0, 16, 2), "c": t}],
            "shift of a sum": mw.shift(product, "a", 1, fill=3.0),
        }

    pairs = [("x=2,y=2", "a:x"), ("x=2,y=2", "b:x"), ("x=2,y=2", "b:y, c:x")]
    over = [
        *ways(*pairs, partitioners=["names"], params="b:y, c:y"),
        *ways(pairs[1], partitioners=["names"], params="layers:y", gather="step"),
        *ways(pairs[0], partitioners=["names"], params="y", gather="step"),
        *ways(pairs[2], partitioners=["xla"], params="layers:y"),
    ]
    agree(program, x, w, T, over=over)


@pytest.mark.parametrize("dtype", [jnp.bool_, jnp.int32, jnp.uint8, jnp.bfloat16, jnp.complex64])
def test_every_dtype_moves(dtype: Any) -> None:
    x = tensor(mw.Dim("a", 16), mw.Dim("c", 2)).array
    x = Tensor((x > 0) if dtype == jnp.bool_ else (x * 20).astype(dtype), "a c")

    def program(x: Tensor, t: Any) -> Any:
        out = {
            "slice": x.slice("a", 3, 8),
            "traced": x.slice("a", t, 4),
            "index": x[{"a": 5}],
            "step": x[{"a": slice(15, 0, -4)}],
            "pad": mw.pad(x, 1, a=(3, 1)),
            "edge": mw.pad(x, mode="edge", a=(0, 4)),
            "shift": mw.shift(x, "a", 3),
            "concat": mw.concat([x, x], "a"),
            "flip": mw.flip(x, "a"),
        }
        assert all(y.dtype == x.dtype for y in out.values())
        return out

    agree(program, x, T, over=ways(("x=4", "a:x"), ("x=2,y=2", "a:(y,x)"), partitioners=["names"]), grads=False)


def test_random_keys_move() -> None:
    keys = Tensor(jax.random.split(jax.random.key(0), (8, 2)), "a b")

    def program(x: Tensor, t: Any) -> Any:
        return {
            "index": x[{"a": 3}],
            "one": x[{"a": t, "b": 1}],
            "slice": x.slice("a", 1, 4),
            "traced": x.slice("a", t, 4),
            "roll": mw.roll(x, a=3),
            "flip": mw.flip(x, "a"),
            "unstack": mw.unstack(x, "a")[1:3],
            "concat": mw.concat([x, x], "a"),
            "stack": mw.stack([x[{"a": i}] for i in range(4)], "a"),
            "repeat": mw.repeat(x, "a", 2),
        }

    agree(program, keys, T, over=ways(("x=4", "a:x"), partitioners=["names"]), grads=False)


def _drawn(rng: np.random.Generator, num: int, block: int) -> dict[str, Any]:
    step = int(rng.choice([1, 1, 2, 3, -1, -2]))
    length = int(rng.integers(1, 3 * block))
    wrap = abs(step) == 1 and bool(rng.integers(2))
    alike = bool(rng.integers(2))
    first = int(rng.integers(-2 * block, num * block))
    starts = [first + k * block if alike else int(rng.integers(-2 * block, (num + 1) * block)) for k in range(num)]
    return {"starts": starts, "length": length, "step": step, "wrap": wrap, "fill": float(rng.choice([0, 7]))}


@pytest.mark.parametrize(("mesh", "axes"), [("x=4", "x"), ("x=2,y=3", "y x"), ("x=2,y=2,z=2", "z x")])
def test_windows_are_any_stretches(mesh: str, axes: str) -> None:
    """Starts drawn at random, alike and unlike, past the ends, and with gaps; each position knows where it is from."""
    size = math.prod(int(part.split("=")[1]) for part in mesh.split(","))
    made = mw.Mesh(mesh, jax.devices()[:size])
    scope, over, block = mw.Layout("").scope(made), tuple(axes.split()), 4
    num = scope.size(over)
    rng = np.random.default_rng(size)
    drawn = [_drawn(rng, num, block) for _ in range(12)]
    x = rng.normal(size=(2, num * block)).astype(np.float32)

    def local(x: Any) -> Any:
        return [window(x, scope, over, 1, **case) for case in drawn]

    spec = PartitionSpec(None, over)
    windows = jax.shard_map(local, mesh=made.jax_mesh, in_specs=spec, out_specs=spec)

    def direct(x: Any) -> Any:
        out = []
        for case in drawn:
            at = np.concatenate([s + case["step"] * np.arange(case["length"]) for s in case["starts"]])
            inside = (at >= 0) & (at < num * block) | case["wrap"]
            out.append(jnp.where(inside[None], x[:, at % (num * block)], jnp.float32(case["fill"])))
        return out

    weights = [rng.normal(size=y.shape).astype(np.float32) for y in direct(x)]

    def both(function: Callable[..., Any]) -> Callable[..., Any]:
        def total(x: Any) -> Any:
            out = function(x)
            return sum(jnp.sum(w * y) for w, y in zip(weights, out, strict=True)), out

        return jax.jit(jax.value_and_grad(total, has_aux=True))

    ((_, found), gradient), ((_, expected), wanted) = both(windows)(x), both(direct)(x)
    for case, ours, theirs in zip(drawn, found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=str(case))
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-5)


# What is sent. ``a`` (64) is split over 4 devices, blocks of 16; a row of ``c`` is 3 elements.


SENT: dict[str, tuple[Callable[..., Any], list[tuple[str, int]]]] = {
    "shift": (lambda x, t: mw.shift(x, "a", 1), [("collective_permute", 3)]),
    "shift round": (lambda x, t: mw.shift(x, "a", -2, wrap=True), [("collective_permute", 6)]),
    "shift by a block": (lambda x, t: mw.shift(x, "a", 16), [("collective_permute", 48)]),
    "shift by two hops": (lambda x, t: mw.shift(x, "a", 17), [("collective_permute", 3), ("collective_permute", 45)]),
    "shift the other dim": (lambda x, t: mw.shift(x, "c", 1), []),
    "flip": (lambda x, t: mw.flip(x, "a"), [("collective_permute", 48)]),
    "pad": (lambda x, t: mw.pad(x, a=(4, 0)), [("collective_permute", 3 * 3)]),
    "pad both": (lambda x, t: mw.pad(x, a=(2, 2)), [("collective_permute", 3)]),
    "slice": (lambda x, t: x.slice("a", 16, 16), [("collective_permute", 12)] * 3),
    "slice of all but four": (lambda x, t: x.slice("a", 0, 60), [("collective_permute", 9)]),
    "every fourth": (lambda x, t: x[{"a": slice(3, None, 4)}], []),
    "every second of a half": (lambda x, t: x[{"a": slice(0, 32, 2)}], [("collective_permute", 12)] * 2),
    "concat": (lambda x, t: mw.concat([x, x], "a"), [("collective_permute", 48)] * 4),
    "repeat": (lambda x, t: mw.repeat(x, "a", 2), []),
    "slice traced, less": (lambda x, t: x.slice("a", t, 4), [("reduce_scatter", 12)]),
    "slice traced, most": (lambda x, t: x.slice("a", t, 60), [("collective_permute", 9)] * 2),
    "index": (lambda x, t: x[{"a": 5}] * 1.0, [("all_reduce", 3)]),
    "slice of a sum": (lambda x, t: x.sum("a").slice("c", 1, 2), [("all_reduce", 2)]),
    "last of a sum": (lambda x, t: x.sum("a")[{"c": 2}], [("all_reduce", 1)]),
}


@pytest.mark.parametrize("name", SENT)
def test_only_what_is_needed_is_sent(name: str) -> None:
    """The elements that a device puts into each collective, forward; and backward the same kinds, nothing gathered."""
    function, expected = SENT[name]
    x = tensor(mw.Dim("a", 64), mw.Dim("c", 3))
    region = mw.spmd(function, mw.Mesh("x=4", jax.devices()[:4]), mw.Layout("a:x"))
    assert sorted(communicated(region, x, T)) == sorted(expected)

    def total(x: Tensor) -> Any:
        y = region(x, T)
        return mw.sum(y) if isinstance(y, Tensor) else y

    there, back = {kind for kind, _ in expected}, {kind for kind, _ in communicated(jax.grad(total), x)}
    assert back <= there | ({"all_gather"} if "reduce_scatter" in there else set())


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "slice beyond": (lambda x: x.slice("a", 9, 8), r"8 elements from 9 .* 'a' of size 16.*a=\(before, after\)"),
    "slice unknown": (lambda x: x.slice("q", 0, 8), r"there is no dim 'q'"),
    "slice traced size": (lambda x: x.slice("a", 0, T), r"the size is a JAX array"),
    "slice start of floats": (lambda x: x.slice("a", jnp.float32(1), 2), r"integer scalar, found float32\[\]"),
    "index position": (lambda x: x[3], r"indexed by names, found 3: write x\[\{'a': 3\}\]"),
    "index beyond": (lambda x: x[{"a": 16}], r"no position 16 along 'a' of size 16"),
    "index bool": (lambda x: x[{"a": True}], r"is a bool"),
    "index None": (lambda x: x[{"a": None}], r"is a NoneType"),
    "index array": (lambda x: x[{"a": jnp.arange(3)}], r"mw.take\(x, mw.Tensor\(positions, 'picked'\), 'a'\)"),
    "index mask": (lambda x: x[{"a": x.sum("b") > 0}], r"is of bool; positions are integers"),
    "index traced slice": (lambda x: x[{"a": slice(T, None)}], r"x.slice\('a', start, size\)"),
    "index step": (lambda x: x[{"a": slice(None, None, 0)}], r"step of the slice of 'a' is 0"),
    "pad negative": (lambda x: mw.pad(x, a=(-1, 0)), r"x.slice\('a', 1, 15\)"),
    "pad width": (lambda x: mw.pad(x, a=1.5), r"width of 'a' is a float"),  # pyright: ignore[reportArgumentType]
    "pad three": (lambda x: mw.pad(x, a=(1, 2, 3)), r"give \(before, after\)"),  # pyright: ignore[reportArgumentType]
    "pad mode": (lambda x: mw.pad(x, mode="reflct", a=1), r"Did you mean 'reflect'"),
    "pad reflect": (lambda x: mw.pad(x, mode="reflect", a=16), r"around 'a' of size 16: a reflection"),
    "pad dtype": (lambda x: mw.pad(x.astype(jnp.int32), 0.5, a=1), r"int32 cannot be filled with a value of float32"),
    "shift traced": (lambda x: mw.shift(x, "a", T), r"shift of 'a' is a JAX array"),  # pyright: ignore[reportArgumentType]
    "shift unknown": (lambda x: mw.shift(x, "aa", 1), r"there is no dim 'aa'.*Did you mean 'a'"),
    "concat nothing": (lambda x: mw.concat([], "a"), r"no tensors"),
    "concat dtypes": (lambda x: mw.concat([x, x.astype(jnp.int32)], "a"), r"float32, int32.*one dtype"),
    "concat names": (lambda x: mw.concat([x, x.sum("b")], "a"), r"'b' stands in one operand only"),
    "concat sizes": (lambda x: mw.concat([x, x.slice("b", 0, 8)], "a"), r"'b' has size 16 in one operand and 8"),
    "concat array": (lambda x: mw.concat([x, x.array], "a"), r"expected a tensor, found an array"),
    "stack size": (lambda x: mw.stack([x, x], mw.Dim("d", 3)), r"d=3 for 2 tensors"),
    "stack name": (lambda x: mw.stack([x, x], "a"), r"'a' stands twice"),
    "stack scalars": (lambda x: mw.stack([x, 1.0], "d"), r"expected a tensor, found float"),
    "pad keys": (lambda x: mw.pad(Tensor(jax.random.split(jax.random.key(0), 2), "a"), a=1), r"random keys"),
    "repeat": (lambda x: mw.repeat(x, "a", -1), r"must not be negative"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name: str) -> None:
    function, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=f"(?s){message}.*test_along.py"):
        function(tensor(A, B))


def test_a_result_that_the_axes_do_not_divide_is_refused() -> None:
    region = mw.spmd(lambda x: x.slice("a", 0, 6), mw.Mesh("x=4", jax.devices()[:4]), mw.Layout("a:x"))
    with pytest.raises(ValueError, match=r"slice: the dim 'a' of size 6 cannot be split over the axis 'x'"):
        region(tensor(A, B))


def test_moving_by_nothing_is_nothing() -> None:
    x = tensor(A, B)
    assert mw.pad(x, a=0) is x and mw.roll(x, a=16) is x and mw.tile(x, "b", 1) is x and x.slice("a", 0, 16) is x
    assert mw.concat([x], "a") is x and x[{}] is x and mw.repeat(x, "a", 1) is x
    assert x.slice("a", 4, 0).shape == (0, 16) and mw.tile(x, "a", 0).shape == (0, 16)
