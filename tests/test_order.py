"""top_k, sort and argsort."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshwright as mw

from .laws import ABC, Way, agree, tensor, ways
from .stablehlo import communicated

A, B, C = mw.dims(a=8, b=8, c=16)


def tied(*dims: mw.Dim, seed: int = 0) -> mw.Tensor:
    """Values of which many are equal."""
    values = np.random.default_rng(seed).integers(-2, 3, [d.size for d in dims])
    return mw.Tensor(jnp.asarray(values, jnp.float32), dims)


def numpy(x: mw.Tensor) -> np.ndarray:
    return np.asarray(x.array)


def test_top_k_is_laxs() -> None:
    x = tied(A, B, C)
    values, positions = mw.top_k(x, "b", mw.Dim("k", 5))
    assert values.dims == positions.dims == (A, mw.Dim("k", 5), C)
    expected = jax.lax.top_k(jnp.swapaxes(x.array, 1, 2), 5)
    for found, whole in zip((values, positions), expected, strict=True):
        np.testing.assert_array_equal(numpy(found), np.swapaxes(whole, 1, 2))
    assert positions.dtype == jnp.int32
    same, _ = mw.top_k(x, "c", mw.Dim("c", 2))
    np.testing.assert_array_equal(numpy(same), -np.sort(-numpy(x), -1)[..., :2])


@pytest.mark.parametrize("descending", [False, True])
def test_sort_and_argsort_are_numpys(descending: bool) -> None:
    x = tied(A, B)
    order = np.argsort(-numpy(x) if descending else numpy(x), 0, kind="stable")
    np.testing.assert_array_equal(numpy(mw.argsort(x, "a", descending=descending)), order)
    found = mw.sort(x, "a", descending=descending)
    np.testing.assert_array_equal(numpy(found), np.take_along_axis(numpy(x), order, 0))
    along = mw.take_along(x, mw.argsort(x, "a", descending=descending), "a")
    np.testing.assert_array_equal(numpy(along), numpy(found))


def _top_k(x: mw.Tensor, name: str, into: str, k: int) -> Any:
    return mw.top_k(x, name, mw.Dim(into, k))


def test_order_does_not_depend_on_the_layout() -> None:
    cases = {
        "top 3 of b": lambda x, t: _top_k(x, "b", "k", 3),
        "top 8 of c, into b": lambda x, t: _top_k(x.sum("b"), "c", "b", 8),
        "top 8 of c": lambda x, t: _top_k(x, "c", "c", 8),
        "all of a, tied": lambda x, t: _top_k(t, "a", "k", 8),
        "top 5 of c, tied": lambda x, t: _top_k(t, "c", "k", 5),
        "sort": lambda x, t: mw.sort(x, "a"),
        "sort down": lambda x, t: mw.sort(x, "c", descending=True),
        "sort tied": lambda x, t: mw.sort(t, "b"),
        "argsort": lambda x, t: mw.argsort(t, "a"),
        "argsort down": lambda x, t: mw.argsort(t, "c", descending=True),
        "top of sums": lambda x, t: _top_k(mw.einsum(x, x, out="b c"), "c", "k", 2),
    }
    some = [ABC[i] for i in (5, 6, 7, 10)]
    over = [*ways(*some, partitioners=["names"]), *ways(ABC[9], partitioners=["xla"])]
    agree(cases, tensor(A, B, C), tied(A, B, C), over=over)


def test_not_a_number_and_infinities_come_out_alike() -> None:
    x = mw.Tensor(jnp.asarray([1.0, jnp.nan, -jnp.inf, 3.0, jnp.inf, jnp.nan, 0.0, -0.0]), A)

    def program(x: mw.Tensor) -> Any:
        return (*mw.top_k(x, "a", mw.Dim("k", 4)), mw.sort(x, "a"), mw.argsort(x, "a", descending=True))

    expected = program(x)
    for one, whole in zip(Way("x=4", "a:x").region(program)(x), expected, strict=True):
        np.testing.assert_array_equal(numpy(one), numpy(whole))
    np.testing.assert_array_equal(numpy(expected[1]), [1, 5, 4, 3])


def test_parameters_at_rest_in_order() -> None:
    x = tensor(A, C, role="parameter")
    cases = {"top": lambda x: _top_k(x, "c", "k", 2), "sort": lambda x: mw.sort(x, "c")}
    agree(cases, x, over=[Way("x=2,y=2", "c:x", {"params": "a:y"})])


def test_what_order_communicates() -> None:
    x, way = tensor(A, B, C), Way("x=4,y=2", "c:x, a:y")
    found = communicated(way.region(lambda x: mw.top_k(x, "c", mw.Dim("k", 2))), x)
    assert found == [("all_gather", 4 * 8 * 2)] * 2, "two candidates a device, and their positions"
    assert communicated(way.region(lambda x: mw.top_k(x, "b", mw.Dim("k", 2))), x) == []
    assert communicated(way.region(lambda x: mw.sort(x, "c")), x) == [("all_gather", 4 * 8 * 4)]
    assert communicated(way.region(lambda x: mw.sort(x, "b")), x) == []


def test_errors() -> None:
    x = tensor(A, B)
    with pytest.raises(ValueError, match=r"k=9 values wanted of a=8; 9 is more than 8. Tensor: \(a=8, b=8\)"):
        mw.top_k(x, "a", mw.Dim("k", 9))
    with pytest.raises(ValueError, match=r"the dim 'b' stands twice"):
        mw.top_k(x, "a", mw.Dim("b", 2))
    with pytest.raises(ValueError, match=r"sort: there is no dim 'aa' in \(a=8, b=8\). Did you mean 'a'"):
        mw.sort(x, "aa")
    with pytest.raises(ValueError, match=r"'k' of size 3 cannot be split over the axis 'x'"):
        Way("x=2", "k:x, a:x").region(lambda x: mw.top_k(x, "a", mw.Dim("k", 3)))(x)
