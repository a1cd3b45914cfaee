"""The laws as functions that tests apply to programs.

``agree`` is law 1: a program gives one result, whatever the layout, mesh and partitioner; values and gradients are
compared with the same program on one device, without a region. The one-device program itself is compared with NumPy
and others in the tests of each operation.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import meshwright as mw
from meshwright import Tensor

RELATIVE = 1e-5
"""float32, as the project promises."""


@dataclass(frozen=True)
class Way:
    """One way to run a program: a mesh, a layout on it, and who makes the collectives."""

    mesh: str
    layout: str
    options: Mapping[str, Any] = field(default_factory=dict)
    partitioner: str = "names"
    dcn: str = ""
    """The axes that cross a slow network."""

    def __str__(self) -> str:
        options = "".join(f" {k}={v}" for k, v in self.options.items())
        dcn = f" dcn={self.dcn}" if self.dcn else ""
        return f"{self.mesh} | {self.layout or 'nothing split'}{options} | {self.partitioner}{dcn}"

    def region(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        sizes = [int(part.split("=")[1]) for part in self.mesh.split(",")]
        mesh = mw.Mesh(self.mesh, jax.devices()[: math.prod(sizes)], dcn=self.dcn)
        return mw.spmd(fn, mesh, mw.Layout(self.layout, **self.options), partitioner=self.partitioner)


def ways(
    *pairs: tuple[str, str], partitioners: Sequence[str] = ("names", "xla"), dcn: str = "", **options: Any
) -> list[Way]:
    """A way for each (mesh, layout) and partitioner."""
    return [Way(mesh, layout, options, p, dcn) for mesh, layout in pairs for p in partitioners]


ABC = [
    ("x=1", "a:x"),
    ("x=2", "a:x"),
    ("x=2", "b:x"),
    ("x=4", "c:x"),
    ("x=8", "a:x"),
    ("x=2,y=2", "a:x, b:y"),
    ("x=2,y=4", "b:x, c:y"),
    ("x=2,y=2", "a:(x,y)"),
    ("x=2,y=4", "b:(y,x)"),
    ("x=2,y=2,z=2", "a:x, b:y, c:z"),
    ("x=2,y=2,z=2", "c:(x,z), a:y"),
]
"""Meshes of 1 to 8 devices and layouts for programs on dims called a, b and c (sizes that are multiples of 8)."""


def tensor(*dims: mw.Dim, seed: int = 0, dtype: Any = jnp.float32, role: str = "activation") -> Tensor:
    """A tensor of distinct, well-spread values: a shuffled range, so that maxima and orders have no ties."""
    rng = np.random.default_rng(seed)
    size = math.prod(d.size for d in dims)
    values = (rng.permutation(size) - size / 2 + 0.25) / max(size, 1) * 4
    return Tensor(jnp.asarray(values.reshape([d.size for d in dims]), dtype), dims, role)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _weights(out: Any) -> Any:
    """For every inexact output a tensor of weights: their weighted sum's gradient tests the whole of each output."""

    def one(i: int, x: Any) -> Any:
        if isinstance(x, Tensor):
            return tensor(*x.dims, seed=100 + i)
        return jnp.float32(1.5 + i)

    leaves, tree = jax.tree.flatten(out, is_leaf=_is_tensor)
    return jax.tree.unflatten(tree, [one(i, x) if _inexact(x) else None for i, x in enumerate(leaves)])


def _weighted(out: Any, weights: Any) -> Any:
    total = jnp.float32(0)
    pairs = zip(
        jax.tree.leaves(out, is_leaf=_is_tensor),
        jax.tree.leaves(weights, is_leaf=lambda x: x is None or _is_tensor(x)),
        strict=True,
    )
    for x, w in pairs:
        if w is not None:
            product = x * w
            total = total + (mw.sum(product) if isinstance(product, Tensor) else product)
    return total


def _split_inexact(inputs: Sequence[Any]) -> tuple[list[Any], Callable[[list[Any]], list[Any]]]:
    chosen = [i for i, x in enumerate(inputs) if _inexact(x)]

    def join(new: list[Any]) -> list[Any]:
        given = dict(zip(chosen, new, strict=True))
        return [given.get(i, x) for i, x in enumerate(inputs)]

    return [inputs[i] for i in chosen], join


def prepared(
    fn: Callable[..., Any], inputs: Sequence[Any], grads: bool, region: Callable[..., Any]
) -> tuple[Any, tuple[Any, ...]]:
    """A compiled program that gives outputs and gradients of ``fn`` run through ``region``, and its arguments."""
    if not grads:
        return jax.jit(region(fn)), tuple(inputs)
    out = jax.eval_shape(fn, *inputs)
    weights = _weights(out)

    def total(weights: Any, *inputs: Any) -> Any:
        result = fn(*inputs)
        return _weighted(result, weights), result

    inside = region(total)

    @jax.jit
    def run(weights: Any, inputs: Sequence[Any]) -> Any:
        inexact, join = _split_inexact(inputs)
        (_, result), gradient = jax.value_and_grad(lambda new: inside(weights, *join(new)), has_aux=True)(inexact)
        return result, gradient

    return run, (weights, list(inputs))


def outcome(fn: Callable[..., Any], inputs: Sequence[Any], way: Way | None, grads: bool = True) -> Any:
    """What ``fn`` gives on ``inputs``: (outputs, gradients of their weighted sum), or outputs when not ``grads``."""
    run, arguments = prepared(fn, inputs, grads, way.region if way is not None else lambda f: f)
    return run(*arguments)


def assert_same(found: Any, expected: Any, what: str, relative: float = RELATIVE) -> None:
    """Every leaf agrees: exactly for integers, and to ``relative`` of the largest value for floating point."""
    assert jax.tree.structure(found) == jax.tree.structure(expected), f"{what}: {found} is not like {expected}"
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        a, b = np.asarray(a), np.asarray(b)
        place = f"{what}: {jax.tree_util.keystr(path)}"
        assert a.dtype == b.dtype and a.shape == b.shape, f"{place}: {a.dtype}{a.shape} is not {b.dtype}{b.shape}"
        if np.issubdtype(a.dtype, np.inexact) or a.dtype.name == "bfloat16":
            a, b = (x.astype(np.complex128 if np.iscomplexobj(x) else np.float64) for x in (a, b))
            scale = float(np.max(np.abs(b[np.isfinite(b)]), initial=0.0))
            np.testing.assert_allclose(a, b, rtol=relative, atol=relative * scale, err_msg=place)
        else:
            np.testing.assert_array_equal(a, b, err_msg=place)


def agree(
    fn: Callable[..., Any] | Mapping[str, Callable[..., Any]],
    *inputs: Any,
    over: Sequence[Way],
    grads: bool = True,
    relative: float = RELATIVE,
) -> None:
    """Law 1 for ``fn`` (or several functions of the same inputs, compiled together) over many ways to run it."""
    program = together(fn)
    expected = outcome(program, inputs, None, grads)
    for way in over:
        assert_same(outcome(program, inputs, way, grads), expected, str(way), relative)


def together(fn: Callable[..., Any] | Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """Several functions of the same inputs as one."""
    return fn if callable(fn) else functools.partial(_each, fn)


def _each(functions: Mapping[str, Callable[..., Any]], *inputs: Any) -> dict[str, Any]:
    return {name: fn(*inputs) for name, fn in functions.items()}
