"""A mixture of experts under layouts that split its own names, with its dims in other orders, and in other dtypes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshwright as mw
from meshwright import nn

from .laws import Way, agree, assert_same, ways
from .test_experts import EMBED, EXPERTS, FF, _inputs, _key, _leaves, _mixture, _program, _router

SLOTS = ways(
    ("x=2", "routes:x"),
    ("x=2,y=2", "routes:(y,x), experts:y"),
    ("x=2", "routes:x, experts:x"),
    ("x=2,y=2", "batch:y, experts:y, routes:x"),
    ("x=2", "capacity:x"),
    ("x=2,y=2", "batch:y, capacity:x, experts:y"),
    ("x=2", "length:x, capacity:x"),
    ("x=2,y=2", "length:(x,y), capacity:x"),
    ("x=2,y=2", "length:x, capacity:(y,x)"),
    ("x=2,y=2", "length:(x,y), capacity:y, experts:x"),
    partitioners=("names",),
)
CHOICES = ways(
    ("x=2", "choices:x"),
    ("x=2", "choices:x, experts:x"),
    ("x=2,y=2", "choices:x, experts:y"),
    ("x=2,data=2", "batch:data, choices:x, experts:(data,x)"),
    ("x=2,data=2", "batch:data, choices:x, experts:(x,data)"),
    partitioners=("names",),
)


@pytest.mark.parametrize("kind", ["top-2", "expert choice"])
def test_slots_may_be_split_by_name(kind: str) -> None:
    leaves, program = _leaves(_mixture(kind, factor=1.0))
    agree(program, *_inputs(), *leaves, over=SLOTS[:: 1 if kind == "top-2" else 3])


@pytest.mark.parametrize("bound", [None, 4.0])
def test_choices_may_be_split(bound: float | None) -> None:
    leaves, program = _leaves(_mixture("top-2", "dropless", bound=bound))
    agree(program, *_inputs(), *leaves, over=CHOICES if bound is None else CHOICES[1::2])


def test_split_images_beside_rows_of_tokens() -> None:
    """``rows`` is what images have."""

    def program(x: mw.Tensor, ids: mw.Tensor, image: mw.Tensor, *leaves: Any) -> Any:
        return without(x, ids, *leaves)["y"] * mw.mean(image * image)

    leaves, without = _leaves(_mixture("top-2", "dropless"))
    image = mw.random.normal(_key(9), mw.dims(rows=4, columns=4))
    agree(
        program,
        *_inputs(),
        image,
        *leaves,
        over=ways(("x=2,y=2", "rows:x, columns:y"), ("x=2,y=2", "rows:x, experts:y")),
    )


@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
@pytest.mark.parametrize("order", ["length batch embed", "embed length batch"])
def test_what_a_group_is_does_not_hang_on_the_order_of_dims(order: str, dispatch: str) -> None:
    leaves, program = _leaves(_mixture("top-2", dispatch, factor=0.5))
    x, ids = _inputs()
    expected, found = program(x, ids, *leaves), program(x.reorder(*order.split()), ids, *leaves)
    assert found["y"].names == tuple(order.split())
    assert {name: t.names for name, t in found.items() if name != "y"} == {
        "load": ("batch", "routes"), "num_dropped": ("batch",), "balance_loss": ("batch",), "z_loss": ("batch",)
    }  # fmt: skip
    assert_same(found | {"y": found["y"].reorder(*x.names)}, expected, order)


def test_the_load_of_expert_choice_has_the_same_dims() -> None:
    _, metrics = _mixture("expert choice")(_inputs()[0])
    assert metrics.load.names == ("batch", "routes")


@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
def test_wide_types_change_no_dtype(dispatch: str) -> None:
    """With x64 JAX counts in int64; places and rows stay int32, also under strict promotion."""
    leaves, program = _leaves(_mixture("top-2", dispatch))
    over = [Way("data=4", "batch:data, experts:data"), Way("context=2,e=2", "length:context, experts:e")]
    with jax.enable_x64(True):
        agree(program, *_inputs(), *leaves, over=over, grads=False)
        wide = _inputs()[0].astype("float64")
        y, metrics = _mixture("top-2", dispatch)(wide)
    assert y.dtype == jnp.float64 and {m.dtype for m in metrics} == {jnp.dtype("float32")}


def test_a_bias_rests_where_the_load_is_even_under_every_layout() -> None:
    """Shares of 1/24 have no exact sum: what is left is rounding, whose sign is another under another layout."""
    length, num = 12, 6
    choices = np.random.default_rng(0).permutation(np.repeat(np.arange(num), 8 * length * 2 // num))
    experts = mw.Tensor(choices.reshape(8, length, 2).astype(np.int32), "batch length choices")
    bias = mw.zeros(mw.Dim("routes", num))

    def mean_load(experts: mw.Tensor) -> Any:
        return mw.mean(nn.routing.load_of(experts, num), "batch")

    for way in (None, *ways(("data=4", "batch:data"), ("data=2,context=2", "batch:data, length:context"))):
        load = (way.region if way is not None else lambda f: f)(mean_load)(experts)
        np.testing.assert_array_equal(nn.next_bias(bias, load, 1e-3).array, np.zeros(num), str(way))
    one_more = mw.Tensor(np.array([1 / 6 + 2e-5, 1 / 6 - 2e-5, 1 / 6, 1 / 6, 1 / 6, 1 / 6], np.float32), "routes")
    np.testing.assert_allclose(nn.next_bias(bias, one_more, 0.5).array, [-0.5, 0.5, 0, 0, 0, 0])


def test_mistakes_about_numbers_and_names_are_told() -> None:
    embed, experts, ff = mw.dims(embed=EMBED, experts=EXPERTS, ff=FF)
    gated, (x, ids) = nn.GatedExperts(embed, experts, ff, key=_key(3)), _inputs()
    others: list[Any] = [nn.HashRouter(16), nn.TopKRouter(embed, 16, key=_key(1))]
    for router in [*others, nn.ExpertChoiceRouter(embed, 16, key=_key(1))]:
        with pytest.raises(
            ValueError, match=r"chooses among 16 experts, and there are experts=8. Give .* num_experts=8"
        ):
            nn.MixtureOfExperts(router, gated)
    with pytest.raises(ValueError, match="num_choices=0; a token chooses from 1 to num_experts=8"):
        nn.MixtureOfExperts(_router("expert choice"), gated, num_choices=0)
    with pytest.raises(
        ValueError, match=r"bound=2.0 is room for .* with dispatch='capacity' factor=1.25 says how many"
    ):
        nn.MixtureOfExperts(_router("top-2"), gated, bound=2.0)
    with pytest.raises(TypeError, match="HashRouter: ids must be integers"):
        nn.MixtureOfExperts(nn.HashRouter(EXPERTS), gated)(x, ids=ids.astype("float32"))
    dropless = nn.MixtureOfExperts(nn.HashRouter(EXPERTS), gated, dispatch="dropless")
    with pytest.raises(ValueError, match=r"a row has one dim, and of x .* 2 are not among .*: \(batch=8, embed=16\)"):
        dropless(x, ids=ids[{"batch": 0}])
    leaves, program = _leaves(_mixture("top-2", "dropless"), _program)
    with pytest.raises(ValueError, match=r"splits 'routed_rows' over 'x'.*leave 'routed_rows' out"):
        Way("x=2", "routed_rows:x").region(program)(x, ids, *leaves)
