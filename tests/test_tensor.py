"""Tensor itself: making and printing one, what it is as a pytree, its operators, and what it refuses to be."""

import operator
import pickle
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import meshwright as mw
from meshwright import Tensor

from .laws import Way, tensor

A, B, C = mw.dims(a=2, b=3, c=4)
X = Tensor(jnp.arange(6.0).reshape(2, 3) + 1, "a b")
I = Tensor(jnp.arange(6).reshape(2, 3) + 1, (A, B))  # noqa: E741
NAMES, XLA = Way("x=2,y=2", "a:x"), Way("x=2,y=2", "a:x", partitioner="xla")


def _message(program: Callable[[], Any], error: type[Exception] = ValueError) -> str:
    with pytest.raises(error) as caught:
        program()
    assert "at tests/test_tensor.py:" in str(caught.value), "the user's line"
    return str(caught.value)


# Making one


@pytest.mark.parametrize("dims", ["a b", "a, b", ("a", "b"), ["a", "b"], (A, B), [A, B], ("a", B), iter((A, B))])
def test_dims_by_name_and_by_dim(dims: Any) -> None:
    x = Tensor(jnp.ones((2, 3)), dims)
    assert x.dims == (A, B) and x.names == ("a", "b") and x.shape == (2, 3) and x.ndim == 2
    assert x.size("b") == 3 and x.dim("b") == B and x.dtype == jnp.float32


def test_from_what_jax_takes_for_an_array() -> None:
    assert Tensor([1, 2], "a").dims == (A,)
    assert Tensor(np.ones((2, 3), np.float16), "a b").dtype == jnp.float16
    assert Tensor(jnp.ones(3), B).names == ("b",)
    assert Tensor(jax.random.split(jax.random.key(0), 2), "a").dims == (A,)
    assert Tensor(jnp.ones((0, 3)), "a b").size("a") == 0


@pytest.mark.parametrize(
    ("array", "dims", "error", "words"),
    [
        (jnp.ones((2, 3)), "a", ValueError, "the names are (a), the array has 2 dims: its shape is (2, 3)"),
        (jnp.ones((2, 2)), "a a", ValueError, "the dim 'a' stands twice in (a=2, a=2)"),
        (jnp.ones(()), "", ValueError, "a tensor without dims is a plain JAX scalar, so use the array itself"),
        (jnp.ones(()), (), ValueError, "there are no dims"),
        (jnp.ones((3, 2)), (A, B), ValueError, "has shape (3, 2), the dims (a=2, b=3) have sizes (2, 3)"),
        (jnp.ones((2, 4)), ("a", B), ValueError, "has shape (2, 4), the dims (a=2, b=3) have sizes (2, 3)"),
        (jnp.ones(2), "batch-size", ValueError, "'batch-size' is not a name; use a Python identifier"),
        (jnp.ones(2), 3, TypeError, "expected dims or their names, found int"),
        (jnp.ones(2), (3,), TypeError, "A tensor: expected dims, found 3 of type int; write mw.Dim(name, size)"),
        ("text", "a", TypeError, "Tensor: expected an array, found str"),
        (None, "a", TypeError, "Tensor: expected an array, found NoneType"),
        ([[1, 2], [3]], "a b", TypeError, "Tensor: expected an array, found list"),
        (X, "a b", TypeError, "(a=2, b=3) is a tensor already; rename its dims, or write x.array"),
    ],
)
def test_what_makes_no_tensor(array: Any, dims: Any, error: type[Exception], words: str) -> None:
    assert words in _message(lambda: Tensor(array, dims), error)


def test_unknown_names_propose_the_nearest() -> None:
    x = tensor(*mw.dims(batch=2, length=3))
    message = _message(lambda: x.size("lenght"))
    assert (
        "size: there is no dim 'lenght' in (batch=2, length=3). Did you mean 'length'? Known: batch, length." in message
    )
    assert "dim: there is no dim 'b'" in _message(lambda: x.dim("b"))


# Printing


def test_a_whole_tensor_shows_names_sizes_and_values() -> None:
    assert repr(X) == "Tensor(a=2, b=3; float32)\n[[1. 2. 3.]\n [4. 5. 6.]]"
    assert str(I) == "Tensor(a=2, b=3; int32)\n[[1 2 3]\n [4 5 6]]"
    assert repr(Tensor(jnp.ones(2, jnp.bfloat16), A, "parameter")) == "Tensor(a=2; bfloat16, parameter)\n[1 1]"
    big = repr(Tensor(jnp.zeros((100, 100)), "a b"))
    assert big.startswith("Tensor(a=100, b=100; float32)\n[[0. 0. 0. ...") and len(big) < 500
    assert repr(mw.random.split(mw.random.key(0), A)) == "Tensor(a=2; key<fry>)"


def test_tracers_and_slices_show_no_values() -> None:
    shown: list[str] = []

    def program(x: Tensor) -> Any:
        shown.append(repr(x))
        return x.sum()

    jax.jit(program)(X)
    jax.grad(program)(X)
    XLA.region(program)(X)
    assert set(shown) == {"Tensor(a=2, b=3; float32)"}
    shown.clear()
    NAMES.region(program)(X)
    Way("x=2,y=4", "a:(y,x)").region(program)(Tensor(jnp.ones((8, 3)), "a b"))
    assert shown == ["Tensor(a=2/x, b=3; float32)", "Tensor(a=8/yxx, b=3; float32)"]


def test_an_abstract_tensor_shows_its_dtype() -> None:
    abstract = jax.eval_shape(lambda x: x * 2, X)
    assert repr(abstract) == "Tensor(a=2, b=3; float32)"
    assert repr(jax.tree.map(lambda _: None, X)) == "Tensor(a=2, b=3; NoneType)"


# As a pytree


def test_a_tensor_is_a_pytree_of_one_array() -> None:
    leaves, structure = jax.tree.flatten(X)
    assert leaves == [X.array] and jax.tree.unflatten(structure, leaves).dims == X.dims
    assert jax.tree_util.keystr(jax.tree.leaves_with_path({"w": X})[0][0]) == "['w'].array"
    same, other = (jax.tree.structure(Tensor(jnp.ones((2, 3)), names)) for names in ("a b", "b a"))
    assert structure == same and structure != other
    assert jax.tree.structure(Tensor(X.array, "a b", "parameter")) != same
    assert jax.tree.map(lambda x: x + 1, X).dims == X.dims
    with pytest.raises(ValueError, match="different pytree metadata"):
        jax.tree.map(jnp.add, X, X.rename(a="other"))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(X)).array, X.array)
    np.testing.assert_array_equal(jax.device_put(X).array, jax.block_until_ready(X).array)


def test_jit_grad_checkpoint_and_scan_take_and_give_tensors() -> None:
    y = jax.jit(lambda x, n: {"out": x * n, "sum": x.sum()})(X, 2)
    assert y["out"].dims == X.dims and float(y["sum"]) == 21
    value, grad = jax.value_and_grad(lambda x: (x * x).sum())(X)
    assert float(value) == 91 and grad.dims == X.dims
    np.testing.assert_array_equal(grad.array, 2 * X.array)
    np.testing.assert_array_equal(jax.grad(jax.checkpoint(lambda x: mw.sin(x).sum()))(X).array, jnp.cos(X.array))
    last, sums = jax.lax.scan(lambda x, n: (x + n, x.sum()), X, jnp.arange(3.0))
    np.testing.assert_array_equal(last.array, X.array + 3)
    np.testing.assert_array_equal(sums, [21, 21, 27])
    primal, tangent = jax.jvp(lambda x: x * x, (X,), (X,))
    np.testing.assert_array_equal(tangent.array, 2 * primal.array)


def test_jit_compiles_once_for_the_same_names() -> None:
    traces: list[tuple[str, ...]] = []

    @jax.jit
    def program(x: Tensor) -> Tensor:
        traces.append(x.names)
        return x

    for names in ("a b", "a b", "b a", "a b"):
        program(Tensor(X.array, names))
    assert traces == [("a", "b"), ("b", "a")]


def test_jax_mapping_over_the_array_itself_is_refused() -> None:
    x = tensor(A, B, C)
    words = "holds an array of shape (3, 4): jax.vmap or jax.lax.scan took or added an axis that has no name"
    message = _message(lambda: jax.vmap(lambda x: x.sum("b"))(x))
    assert f"sum: the tensor (a=2, b=3, c=4) {words}" in message and "mw.vmap(f, dim)" in message
    assert words in _message(lambda: jax.lax.scan(lambda n, x: (n + x.mean("b c").sum(), None), 0.0, x))
    stacked = jax.vmap(lambda n: Tensor(jnp.ones((2, 3)) * n, "a b"))(jnp.arange(5.0))
    assert "holds an array of shape (5, 2, 3)" in _message(lambda: stacked * 2)
    assert "argument [0]: the tensor (a=2, b=3) holds" in _message(lambda: NAMES.region(lambda x: x)(stacked))
    np.testing.assert_array_equal(mw.vmap(lambda x: x.sum("b"), "a")(x).array, x.array.sum(1))


def test_modules_and_optimizers_work_on_trees_of_tensors() -> None:
    class Linear(eqx.Module):
        weight: Tensor
        bias: Tensor
        name: str = eqx.field(static=True)

        def __call__(self, x: Tensor) -> Tensor:
            return mw.dot(x, self.weight, "b") + self.bias

    def loss(model: Linear, x: Tensor) -> Any:
        return (model(x) ** 2).mean()

    model = Linear(tensor(B, C, role="parameter"), tensor(C, seed=1, role="parameter"), "linear")
    arrays: Any = {"weight": model.weight.array, "bias": model.bias.array}
    optimizer: Any = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1, weight_decay=0.01))
    state, array_state = optimizer.init(model), optimizer.init(arrays)

    @eqx.filter_jit
    def step(model: Any, state: Any, x: Tensor) -> tuple[Any, ...]:
        value, grad = eqx.filter_value_and_grad(NAMES.region(loss))(model, x)
        updates, state = optimizer.update(grad, state, model)
        return value, optax.apply_updates(model, updates), state, optax.tree.norm(grad)

    def array_loss(arrays: Any) -> Any:
        return ((X.array @ arrays["weight"] + arrays["bias"][None]) ** 2).mean()

    for _ in range(3):
        with jax.numpy_dtype_promotion("standard"):  # Optax's own code needs it
            value, model, state, norm = step(model, state, X)
            expected, grad = jax.value_and_grad(array_loss)(arrays)
            updates, array_state = optimizer.update(grad, array_state, arrays)
            arrays = optax.apply_updates(arrays, updates)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        np.testing.assert_allclose(norm, optax.tree.norm(grad), rtol=1e-5)
    assert isinstance(model, Linear) and model.weight.role == "parameter"
    np.testing.assert_allclose(model.weight.array, arrays["weight"], rtol=1e-5)
    np.testing.assert_allclose(model.bias.array, arrays["bias"], rtol=1e-5)
    moments = [x for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Tensor)) if isinstance(x, Tensor)]
    assert {x.names for x in moments} == {("b", "c"), ("c",)}


# Operators

BINARY = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lt", "le", "gt", "ge", "eq", "ne"]
BITS = ["and_", "or_", "xor", "lshift", "rshift"]


@pytest.mark.parametrize("name", [*BINARY, *BITS])
def test_operators_with_scalars_on_either_side(name: str) -> None:
    f = getattr(operator, name)
    x = I if name in BITS else X
    dtype = np.int32 if name in BITS else np.float32
    for scalar in (2, dtype(2), np.array(2, dtype), jnp.asarray(2, dtype), *([] if name in BITS else [2.0])):
        for found, expected in ((f(x, scalar), f(x.array, scalar)), (f(scalar, x), f(scalar, x.array))):
            assert type(found) is Tensor and found.dims == x.dims, f"{name} with {type(scalar)}"
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found.array, expected)
    np.testing.assert_array_equal(f(x, x).array, f(x.array, x.array))


@pytest.mark.parametrize("name", ["neg", "pos", "abs", "invert"])
def test_unary_operators(name: str) -> None:
    f = getattr(operator, name)
    np.testing.assert_array_equal(f(I).array, f(I.array))


def test_operators_broadcast_by_name_and_in_place_makes_a_new_one() -> None:
    row = Tensor(jnp.arange(3.0), "b")
    assert (X + row).names == (row + X).names == ("a", "b")
    np.testing.assert_array_equal((row - X).array, row.array[None] - X.array)
    y = X
    y += 1
    assert y is not X and float(X.array[0, 0]) == 1
    np.testing.assert_array_equal(sum([X, X]).array, 2 * X.array)  # type: ignore[union-attr]
    column = Tensor(jnp.arange(2.0), "a")
    assert "no operand's dims contain the other's" in _message(lambda: row * column)


@pytest.mark.parametrize("other", [np.ones((2, 3), np.float32), jnp.ones((2, 3)), [1, 2], "text", None, object()])
def test_operators_refuse_what_has_no_names(other: Any) -> None:
    for program in (lambda: X * other, lambda: other * X, lambda: X - other, lambda: other == X, lambda: other < X):
        message = _message(program, TypeError)
        assert "expected a tensor or a scalar, found" in message and "mw.Tensor(array, 'batch embed')" in message


# What Python does with arrays, and a tensor refuses


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (lambda: bool(X), "A tensor (a=2, b=3) has no truth value; reduce it: x.any() or x.all()"),
        (lambda: X if X > 1 else None, "has no truth value"),
        (lambda: 1 < X < 2, "has no truth value"),
        (lambda: max(X, X), "has no truth value"),
        (lambda: len(X), "has no length; write x.size(name) for the size of a dim"),
        (lambda: list(X), "has no first dim to iterate over; write x.unstack(name)"),
        (lambda: np.asarray(X), "is not an array by itself; write x.array for its positions"),
        (lambda: np.sin(X), "is not an array by itself"),
        (lambda: jnp.asarray(X), "is not an array by itself"),
        (lambda: X @ X, "has no last dim for @ to sum; write mw.dot(x, y, over=name)"),
        (lambda: np.ones((3, 2)) @ X, "has no last dim for @"),
    ],
)
def test_refusals(program: Callable[[], Any], words: str) -> None:
    assert words in _message(program, TypeError)


def test_what_a_tensor_does_not_have() -> None:
    with pytest.raises(TypeError, match="unhashable type: 'Tensor'"):
        hash(X)
    with pytest.raises(TypeError, match="Tensor"):
        jnp.sin(X)  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="'Tensor' object has no attribute 'lenght'"):
        X.lenght = 3  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="does not support item assignment"):
        X["a"] = 0  # type: ignore[index]


# In the wrong region


def test_a_slice_outside_its_region() -> None:
    kept: list[Tensor] = []

    def leak(x: Tensor) -> Any:
        kept.append(x * 2)
        return x.sum()

    NAMES.region(leak)(X)
    for use in (lambda: kept[0] + 1, lambda: X + kept[0], lambda: kept[0].sum("a"), lambda: kept[0].rename(a="c")):
        message = _message(use)
        assert "(a=2, b=3) is one device's slice from inside a region (layout: a:x), used outside it" in message
        assert "Return it from the function given to mw.spmd: what comes out is the whole tensor." in message
    assert repr(kept[0]) == "Tensor(a=2/x, b=3; float32)"
    other = Way("x=2,y=2", "a:y")
    message = _message(lambda: other.region(lambda x: x + kept[0])(X))
    assert (
        "add: the tensor (a=2, b=3) belongs to a region with the layout 'a:x' on the mesh (x=2, y=2), used in one with "
        "the layout 'a:y' on the mesh (x=2, y=2)." in message
    )
    message = _message(lambda: Way("x=2", "a:x").region(lambda x: x + kept[0])(X))
    assert (
        "with the layout 'a:x' on the mesh (x=2, y=2), used in one with the layout 'a:x' on the mesh (x=2)" in message
    )
    assert "Return it from the first region and pass it to the second as an argument." in message
    assert "argument [0] is a slice from inside a region, not a whole tensor" in _message(
        lambda: other.region(lambda x: x)(kept[0])
    )


def test_a_whole_tensor_closed_over_by_a_region() -> None:
    words = "(a=2, b=3) is a whole tensor from outside, used inside a region (layout: a:x)"
    for program in (lambda x: x + X, lambda x: x + X.sum("b"), lambda x: mw.dot(x, X.rename(a="c"), "b")):
        message = _message(lambda: NAMES.region(program)(X))  # noqa: B023
        assert words in message and "Pass it to the function given to mw.spmd as an argument" in message
    message = _message(lambda: NAMES.region(lambda x: (x, X))(X))
    assert f"spmd: an output: the tensor {words}" in message
    np.testing.assert_array_equal(XLA.region(lambda x: x + X)(X).array, 2 * X.array)
    np.testing.assert_array_equal(NAMES.region(lambda x: x + Tensor(X.array, "a b"))(X).array, 2 * X.array)
    np.testing.assert_array_equal(jax.jit(lambda x: x + X)(X).array, 2 * X.array)


def test_a_whole_array_made_a_tensor_in_a_region_is_sliced() -> None:
    def program(x: Tensor) -> Tensor:
        y = Tensor(jnp.arange(6.0).reshape(2, 3), (A, B))
        assert y.array.shape == (1, 3) and y.shape == (2, 3)
        return x * 0 + y

    np.testing.assert_array_equal(NAMES.region(program)(X).array, jnp.arange(6.0).reshape(2, 3))
    message = _message(lambda: NAMES.region(lambda x: Tensor(x.array, x.dims))(X))
    assert "has shape (1, 3), the dims (a=2, b=3)" in message and "mw.apply works on slices" in message


# Positions and numbers where names belong


BY_NUMBER: dict[str, Callable[[], Any]] = {
    "sum: expected names of dims, found 0 of type int": lambda: X.sum(0),  # type: ignore[arg-type]
    "max: expected names of dims, found 1 of type int": lambda: mw.max(X, ["a", 1]),  # type: ignore[list-item]
    "softmax: expected names of dims, found -1 of type int": lambda: mw.softmax(X, -1),  # type: ignore[arg-type]
    "argmax: expected names of dims, found -1 of type int": lambda: mw.argmax(X, -1),  # type: ignore[arg-type]
    "dot: over: expected names of dims, found None": lambda: mw.dot(X, X, over=None),  # type: ignore[arg-type]
    "einsum: out: expected names of dims, found None": lambda: mw.einsum(X, out=None),  # type: ignore[arg-type]
    "flip: expected names of dims, found 0 of type int": lambda: mw.flip(X, 0),  # type: ignore[arg-type]
    "merge: expected names of dims, found a Array": lambda: X.merge(jnp.arange(2), "c"),  # type: ignore[arg-type]
    "conv: inputs: expected names of dims, found 1": lambda: mw.conv(X, X, "a", inputs=1),  # type: ignore[arg-type]
    "apply: dims_in: expected names of dims, found 0": lambda: mw.apply(jnp.sin, X, dims_in=0, dims_out="a"),  # type: ignore[arg-type]
    "ones: expected dims, found 8 of type int": lambda: mw.ones(8),  # type: ignore[arg-type]
    "zeros: expected dims, found 'a' of type str": lambda: mw.zeros("a"),  # type: ignore[arg-type]
    "full: expected dims, found 3 of type int": lambda: mw.full((A, 3), 1.0),  # type: ignore[arg-type]
    "top_k: expected dims, found 3 of type int": lambda: mw.top_k(X, "b", 3),  # type: ignore[arg-type]
    "one_hot: expected dims, found 3 of type int": lambda: mw.one_hot(I, 3),  # type: ignore[arg-type]
    "arange: expected one dim, found 2: (a=2, b=3)": lambda: mw.arange((A, B)),  # type: ignore[arg-type]
    "stack: expected dims, found 0 of type int": lambda: mw.stack([X, X], 0),  # type: ignore[arg-type]
    "broadcast: expected dims, found 3 of type int": lambda: X.broadcast(3),  # type: ignore[arg-type]
    "normal: expected dims, found 8 of type int": lambda: mw.random.normal(jax.random.key(0), 8),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("words", BY_NUMBER)
def test_numbers_where_names_belong(words: str) -> None:
    message = _message(BY_NUMBER[words], TypeError)
    assert words in message
    if "expected names" in words:
        assert "Dims have names, not numbers: write 'embed', or 'batch embed' for several." in message
    elif "one dim" not in words:
        assert "write mw.Dim(name, size)." in message


# What a region takes and gives


def test_the_arguments_of_spmd_have_an_order() -> None:
    mesh, layout = mw.Mesh("x=2", jax.devices()[:2]), mw.Layout("a:x")
    expected = "spmd: expected a function, a mesh and a layout, found "
    spmd: Callable[..., Any] = mw.spmd
    for given, found, swapped in (
        ((layout, mesh, "a:x"), "Layout, Mesh, str", False),
        ((X, mesh, layout), "Tensor, Mesh, Layout", False),
        ((mw.sum, layout, mesh), "function, Layout, Mesh", True),
        ((mesh, layout, mw.sum), "Mesh, Layout, function", True),
    ):
        message = _message(lambda: spmd(*given), TypeError)  # noqa: B023
        hint = " The arguments are swapped." if swapped else ""
        assert f"{expected}{found}.{hint} Write mw.spmd(fn, mesh, layout)." in message


@pytest.mark.parametrize("way", [NAMES, XLA], ids=str)
def test_what_a_region_takes_and_gives(way: Way) -> None:
    message = _message(lambda: way.region(lambda x, s: x * len(s))(X, {1, 2}), TypeError)
    assert "spmd: argument [1] is a set: it is no tensor, array or number to be traced, and cannot be static" in message
    message = _message(lambda: way.region(lambda x: {"x": x, "name": "b"})(X), TypeError)
    assert "spmd: an output is a str. A region returns tensors, arrays and numbers" in message
    doubled = way.region(lambda x, how, times: (x if how == "plain" else -x) * times)(X, "plain", 2.0)
    np.testing.assert_array_equal(doubled.array, 2 * X.array)
    traced = [0]

    def count(x: Tensor, times: Any) -> Tensor:
        traced[0] += 1
        return x * times

    region = way.region(count)
    assert float(region(X, 3.0).array[0, 0]) == 3 and float(region(X, 4.0).array[0, 0]) == 4
    assert traced == [1], "a number is traced, not part of the program"
