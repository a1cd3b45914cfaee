"""What a planned function is called with: static arguments, arguments by name, donation, leaves that are no arrays."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshwright as mw
from meshwright.plan.plan import Plan, plan

MESH = "data=4"
E, F, B = mw.dims(embed=8, ff=16, batch=12)


def _parameter() -> mw.Tensor:
    return mw.param(mw.ones((E, F)))


def _arguments(p: Plan) -> list[tuple[str, str, tuple[str, ...], bool]]:
    return [(a.path, a.role, a.names, a.donated) for a in p.program.arguments]


def _step(w: mw.Tensor, power: int, x: mw.Tensor, mode: str = "mean", rate: float = 0.1) -> Any:
    loss = mw.spmd(lambda w, x: getattr(mw, mode)(mw.dot(x, w, "embed") ** power), _mesh(), mw.Layout("batch:data"))
    gradient = jax.grad(loss)(w, x)
    return jax.tree.map(lambda a, b: a - rate * b, w, gradient), x * 2.0


def _mesh() -> mw.Mesh:
    return mw.Mesh(MESH, jax.devices()[:4])


W, X = ("parameter", ("embed", "ff")), ("activation", ("batch", "embed"))

CALLS: list[tuple[dict[str, Any], Callable[[Any, Any], Any], list[tuple[str, str, tuple[str, ...], bool]]]] = [
    (
        {"static_argnums": 1},
        lambda w, x: ((w, 3, x), {}),
        [("0", *W, False), ("2", *X, False)],
    ),
    (
        {"static_argnums": 1, "donate_argnums": 2},
        lambda w, x: ((w, 3, x), {}),
        [("0", *W, False), ("2", *X, True)],
    ),
    (
        {"static_argnums": 1, "donate_argnums": 0},
        lambda w, x: ((w, 3, x), {}),
        [("0", *W, True), ("2", *X, False)],
    ),
    (
        {"static_argnames": ("power", "mode"), "donate_argnames": "x"},
        lambda w, x: ((w,), {"x": x, "power": 3, "mode": "sum"}),
        [("0", *W, False), ("x", *X, True)],
    ),
    (
        {"static_argnames": ("power", "mode"), "donate_argnums": (0,)},
        lambda w, x: ((w, 3, x, "sum", 0.5), {}),
        [("0", *W, True), ("2", *X, False), ("4", "", (), False)],
    ),
    (
        {"static_argnums": (1, 3)},
        lambda w, x: ((w, 3, x), {"rate": 0.5}),
        [("0", *W, False), ("2", *X, False), ("rate", "", (), False)],
    ),
]


@pytest.mark.parametrize(("options", "call", "expected"), CALLS)
def test_arguments_keep_their_paths_roles_and_donation(options: dict[str, Any], call: Any, expected: Any) -> None:
    args, kwargs = call(*mw.shard((_parameter(), mw.ones((B, E))), _mesh(), mw.Layout("batch:data")))
    p = plan(jax.jit(_step, **options), *args, **kwargs)
    assert _arguments(p) == expected
    memory = p.compile().memory
    assert memory is not None
    assert p.memory.argument_bytes == memory.argument_bytes
    assert p.memory.alias_bytes == memory.alias_bytes


def test_numbers_that_may_be_static_or_not() -> None:
    """The trace does not say which of two numbers it took; all else lines up."""
    f = jax.jit(lambda a, b, x: x * b, static_argnums=0, donate_argnums=2)
    assert [(shape.value.shape, shape.donated) for shape in plan(f, 2, 3, jnp.ones(4)).program.arguments] == [
        ((), False),
        ((4,), True),
    ]


def test_arguments_by_name_of_a_function_that_is_not_compiled() -> None:
    p = plan(lambda fn, *, x: fn * x, 2.0, x=mw.ones((B, E)))
    assert [path for path, *_ in _arguments(p)] == ["0", "x"]
    named = plan(lambda fn, x: fn * x, fn=2.0, x=mw.ones((B, E)))
    assert [path for path, *_ in _arguments(named)] == ["fn", "x"]


# Meshes


def test_two_meshes_that_share_an_axis_of_two_sizes() -> None:
    layout = mw.Layout("batch:data")
    four, two = _mesh(), mw.Mesh("data=2", jax.devices()[:2])

    def total(mesh: mw.Mesh) -> Callable[[Any], Any]:
        return mw.spmd(lambda x: mw.sum(x), mesh, layout)

    x = mw.ones((B, E))
    with pytest.raises(ValueError, match=r"'data' differ: data=4 \(size 4\) and data=2 \(size 2\).*Give one of them"):
        plan(lambda x: total(four)(x) + total(two)(x), x)
    with pytest.raises(ValueError, match=r"'data' differ: data=2 \(size 2\) and data=4 \(size 4\)"):
        plan(total(four), mw.shard(x, two, layout))
    other = mw.spmd(lambda x: mw.sum(x), mw.Mesh("other=4", jax.devices()[:4]), mw.Layout("batch:other"))
    axes = [(row.axes, row.group_size) for row in plan(lambda x: total(four)(x) + other(x), x).collectives]
    assert axes == [(("data",), 4), (("other",), 4)]


# Leaves that are no arrays


class _Layer(eqx.Module):
    weight: mw.Tensor
    activation: Any
    over: str

    def __call__(self, x: mw.Tensor) -> mw.Tensor:
        return self.activation(mw.dot(x, self.weight, over=self.over))


def _loss(layer: _Layer, x: mw.Tensor) -> Any:
    return mw.mean(layer(x) ** 2)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_module_with_a_function_and_a_string_among_its_leaves(gradient: bool) -> None:
    layout = mw.Layout("batch:data", params="embed:data")
    layer, x = mw.shard((_Layer(_parameter(), mw.relu, "embed"), mw.ones((B, E))), _mesh(), layout)
    region = mw.spmd(_loss, _mesh(), layout)
    run = eqx.filter_grad(region) if gradient else region
    assert not isinstance(run, jax.stages.Wrapped)

    def bound(weight: mw.Tensor, x: mw.Tensor) -> Any:
        return run(_Layer(weight, mw.relu, "embed"), x)

    def array(layer: _Layer, x: mw.Tensor) -> Any:
        return eqx.filter(run(layer, x), eqx.is_array)

    p, other = plan(array, layer, x), plan(lambda w, x: eqx.filter(bound(w, x), eqx.is_array), layer.weight, x)
    assert p.name == "array"
    assert [path for path, *_ in _arguments(p)] == ["0.weight", "1"]
    assert [(row.kind, row.axes, row.payload_bytes) for row in p.collectives] == [
        (row.kind, row.axes, row.payload_bytes) for row in other.collectives
    ]
    assert {row.kind for row in p.compile().collectives} == {row.kind for row in p.collectives}


def test_what_is_bound_is_bound_in_a_second_trace() -> None:
    """As for the devices that a compiler describes."""
    layout = mw.Layout("batch:data", params="embed:data")
    mesh = mw.Mesh(MESH, topology="tpu:v5e:2x2")
    shapes = jax.eval_shape(lambda: (_parameter(), mw.ones((B, E))))
    weight, x = mw.shard(shapes, mesh, layout)
    here = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    p = plan(mw.spmd(_loss, mesh, layout), _Layer(weight, mw.relu, "embed"), x=x)
    text = p.call.over(here).lower().compile().as_text()
    assert "all-gather" in text and "all-reduce" in text
