"""take, gather, take_along, one_hot, scatter_add and scatter_set."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import meshwright as mw

from .laws import ABC, Way, agree, assert_same, outcome, tensor, ways
from .stablehlo import communicated

A, B, C = mw.dims(a=8, b=8, c=16)
Q, J, D, E = mw.dims(i=6, j=3, d=8, e=16)


def ids_of(*dims: mw.Dim, below: int, least: int = 0, seed: int = 0, dtype: Any = jnp.int32) -> mw.Tensor:
    values = np.random.default_rng(seed).integers(least, below, [d.size for d in dims])
    return mw.Tensor(jnp.asarray(values, dtype), dims)


def numpy(x: mw.Tensor) -> np.ndarray:
    return np.asarray(x.array)


# Values, on whole arrays


def test_take_is_numpys_take() -> None:
    x, ids = tensor(A, B, C), ids_of(Q, J, below=8, least=-8)
    taken = mw.take(x, ids, "b")
    assert taken.dims == (Q, J, A, C)
    np.testing.assert_array_equal(numpy(taken), np.moveaxis(np.take(numpy(x), numpy(ids), 1), (1, 2), (0, 1)))
    row = mw.take(x, 3, "a")
    assert row.dims == (B, C)
    np.testing.assert_array_equal(numpy(row), numpy(x)[3])
    np.testing.assert_array_equal(numpy(mw.take(x, jnp.int32(-1), "a")), numpy(x)[-1])


def test_take_with_batch_dims() -> None:
    x, labels = tensor(A, B, C), ids_of(C, A, below=8)
    taken = mw.take(x, labels, "b")
    assert taken.dims == (C, A)
    expected = np.take_along_axis(numpy(x), numpy(labels).T[:, None, :], 1)[:, 0, :].T
    np.testing.assert_array_equal(numpy(taken), expected)


def test_take_from_a_vector_gives_the_dims_of_the_ids() -> None:
    x = tensor(C)
    assert mw.take(x, ids_of(C, below=16), "c").dims == (C,)
    assert jnp.shape(mw.take(x, 5, "c")) == ()


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.uint32])
def test_take_of_ids_of_every_dtype(dtype: Any) -> None:
    long = mw.Dim("long", 250)
    x = mw.Tensor(jnp.arange(250.0), long)
    ids = np.array([0, 7, 127]).astype(dtype)
    greatest = np.iinfo(dtype).max
    found = numpy(mw.take(x, mw.Tensor(jnp.asarray([*ids, greatest]), "i"), "long"))
    np.testing.assert_array_equal(found, [0, 7, 127, greatest if greatest < 250 else np.nan])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, jnp.bool_])
def test_ids_outside_read_what_jnp_reads(dtype: Any) -> None:
    x = mw.Tensor(jnp.arange(8).astype(dtype), B)
    ids = mw.Tensor(jnp.asarray([0, 7, 8, -8, -9, 100, -100]), "i")
    expected = jnp.take(x.array, ids.array)
    for layout in ("", "b:x"):
        found = Way("x=2", layout).region(lambda x, ids: mw.take(x, ids, "b"))(x, ids)
        np.testing.assert_array_equal(numpy(found).astype(np.float64), np.asarray(expected, np.float64))


def test_gather_is_numpys_indexing() -> None:
    x, rows, cols = tensor(A, B, C), ids_of(Q, below=8), ids_of(Q, J, below=16, seed=1)
    found = mw.gather(x, a=rows, c=cols)
    assert found.dims == (Q, J, B)
    expected = np.moveaxis(numpy(x), 1, -1)[numpy(rows)[:, None], numpy(cols)]
    np.testing.assert_array_equal(numpy(found), expected)
    single = mw.gather(x, c=cols, b=-1)
    np.testing.assert_array_equal(numpy(single), np.moveaxis(numpy(x)[:, -1][:, numpy(cols)], 0, -1))


def test_gather_outside_along_any_name_reads_nan() -> None:
    x = tensor(A, B)
    found = mw.gather(x, a=mw.Tensor(jnp.asarray([0, 8, 1]), "i"), b=mw.Tensor(jnp.asarray([0, 1, -9]), "i"))
    np.testing.assert_array_equal(np.isnan(numpy(found)), [False, True, True])


def test_take_along_is_numpys() -> None:
    x, ids = tensor(A, B, C), ids_of(A, mw.Dim("c", 5), B, below=16)
    found = mw.take_along(x, ids, "c")
    assert found.dims == (A, B, mw.Dim("c", 5))
    expected = np.take_along_axis(numpy(x), numpy(ids).swapaxes(1, 2), 2)
    np.testing.assert_array_equal(numpy(found), expected)


def test_one_hot() -> None:
    ids = mw.Tensor(jnp.asarray([[0, 3], [-1, 9]]), "i j")
    hot = mw.one_hot(ids, mw.Dim("k", 4), jnp.int32)
    assert hot.names == ("i", "j", "k")
    np.testing.assert_array_equal(numpy(hot), np.asarray(jax.nn.one_hot(ids.array, 4, dtype=jnp.int32)))
    np.testing.assert_array_equal(numpy(mw.one_hot(2, mw.Dim("k", 4))), [0, 0, 1, 0])


def test_scatter_add_accumulates() -> None:
    x, ids, updates = tensor(B, C), ids_of(Q, J, below=8, least=-9), tensor(J, C, Q, seed=2)
    expected = numpy(x).copy()
    for i, j in np.ndindex(6, 3):
        if -8 <= numpy(ids)[i, j] < 8:
            expected[numpy(ids)[i, j]] += numpy(updates)[j, :, i]
    found = mw.scatter_add(x, ids, updates, "b")
    np.testing.assert_allclose(numpy(found), expected, rtol=1e-6, atol=1e-6)
    counts = mw.scatter_add(mw.zeros(B, jnp.int32), ids % 8, 1, "b")
    np.testing.assert_array_equal(numpy(counts), np.bincount(numpy(ids).reshape(-1) % 8, minlength=8))


def test_scatter_set_keeps_the_last_in_row_major_order() -> None:
    x, ids, updates = tensor(A, B, C), ids_of(Q, A, J, below=17, least=-17), tensor(Q, A, J, B, seed=2)
    expected = numpy(x).copy()
    for i, a, j in np.ndindex(6, 8, 3):
        if -16 <= numpy(ids)[i, a, j] < 16:
            expected[a, :, numpy(ids)[i, a, j]] = numpy(updates)[i, a, j]
    found = mw.scatter_set(x, ids, updates, "c")
    np.testing.assert_array_equal(numpy(found), expected)
    flags = mw.scatter_set(mw.zeros(B, jnp.bool_), mw.Tensor(jnp.asarray([1, 5, 1]), "i"), True, "b")
    np.testing.assert_array_equal(numpy(flags), np.isin(np.arange(8), [1, 5]))
    assert numpy(mw.scatter_set(x, -1, 0.5, "c"))[..., -1].tolist() == np.full((8, 8), 0.5).tolist()


def test_gradients_are_those_of_the_positional_program() -> None:
    x, ids, updates = tensor(B, C), ids_of(Q, below=9, least=-9), tensor(Q, C, seed=2)
    weight, wide = tensor(Q, C, seed=3), tensor(B, C, seed=4)
    inside = (numpy(ids) >= -8) & (numpy(ids) < 8)
    rows = jnp.asarray(numpy(ids) % 8)
    masked = jnp.where(inside[:, None], weight.array, 0)
    found = jax.grad(lambda x: (mw.where(jnp.inf > mw.take(x, ids, "b"), mw.take(x, ids, "b"), 0.0) * weight).sum())(x)
    np.testing.assert_allclose(numpy(found), jnp.zeros((8, 16)).at[rows].add(masked), rtol=1e-6)

    def written(x: mw.Tensor, updates: mw.Tensor) -> Any:
        return (mw.scatter_set(x, ids, updates, "b") * wide).sum() + (mw.scatter_add(x, ids, updates, "b") * wide).sum()

    to_x, to_updates = jax.grad(written, (0, 1))(x, updates)
    last = {int(r): k for k, r in enumerate(rows) if inside[k]}
    kept = np.array([r not in last for r in range(8)])
    np.testing.assert_allclose(numpy(to_x), (1.0 + kept[:, None]) * numpy(wide), rtol=1e-6)
    wins = np.array([inside[k] and last[int(r)] == k for k, r in enumerate(rows)])
    expected = (inside[:, None] * 1.0 + wins[:, None]) * numpy(wide)[np.asarray(rows)]
    np.testing.assert_allclose(numpy(to_updates), expected, rtol=1e-6)


# Law 1


def _cases() -> dict[str, Any]:
    return {
        "new dims": lambda x, i, ia, iac, u: mw.take(x, i, "b"),
        "batch dim": lambda x, i, ia, iac, u: mw.take(x, ia, "c"),
        "all batch": lambda x, i, ia, iac, u: mw.take(x.reorder("b", ...), iac, "b"),
        "by itself": lambda x, i, ia, iac, u: mw.take(x, ia, "a"),
        "to a scalar": lambda x, i, ia, iac, u: mw.take(x.sum("a b"), 5, "c"),
        "along": lambda x, i, ia, iac, u: mw.take_along(x, iac, "c"),
        "two names": lambda x, i, ia, iac, u: mw.gather(x, c=iac, b=ia),
        "three names": lambda x, i, ia, iac, u: mw.gather(x, a=i, c=i * 2, b=3),
        "one_hot": lambda x, i, ia, iac, u: mw.one_hot(ia, B) * u,
        "outside": lambda x, i, ia, iac, u: mw.isnan(mw.take(x, iac * 2 - 9, "b")),
        "booleans": lambda x, i, ia, iac, u: mw.take(x > 0, iac * 2 - 9, "b"),
        "add one": lambda x, i, ia, iac, u: mw.scatter_add(x, i, 1.5, "b"),
        "add batch": lambda x, i, ia, iac, u: mw.scatter_add(x, iac, u, "c"),
        "add sums": lambda x, i, ia, iac, u: mw.scatter_add(x.sum("a"), iac, u, "b"),
        "set": lambda x, i, ia, iac, u: mw.scatter_set(x, i, mw.take(x * 2.0, i, "b"), "b"),
        "set batch": lambda x, i, ia, iac, u: mw.scatter_set(x, ia, u, "c"),
        "set sums": lambda x, i, ia, iac, u: mw.scatter_set(x.sum("a"), iac, u, "b"),
        "set one": lambda x, i, ia, iac, u: mw.scatter_set(x, 6, u, "b"),
    }


def test_indexing_does_not_depend_on_the_layout() -> None:
    inputs = tensor(A, B, C), ids_of(Q, below=8), ids_of(A, below=8), ids_of(A, C, below=8), tensor(A, seed=3)
    some = [ABC[i] for i in (5, 7, 8, 10)]
    agree(_cases(), *inputs, over=[*ways(*some, partitioners=["names"]), *ways(ABC[9], partitioners=["xla"])])


def test_ids_split_over_the_axes_of_the_indexed_dim() -> None:
    cases = {
        "take": lambda x, ids, u: mw.take(x, ids, "a"),
        "other order": lambda x, ids, u: mw.take(x.reorder("b", ...), ids.reorder("e", ...), "a"),
        "gather": lambda x, ids, u: mw.gather(x, a=ids, b=ids),
        "add": lambda x, ids, u: mw.scatter_add(x, ids, u, "a"),
        "add narrow": lambda x, ids, u: mw.scatter_add(x, ids, u.sum("e b"), "a"),
        "set": lambda x, ids, u: mw.scatter_set(x, ids, u, "a"),
        "set narrow": lambda x, ids, u: mw.scatter_set(x, ids, u.sum("d b"), "a"),
        "set kept": lambda x, ids, u: mw.scatter_set(x.rename(a="z"), ids, u.sum("d e"), "z"),
    }
    shared = [
        ("x=2,y=2", "a:(x,y), d:(y,x)"),
        ("x=2,y=2", "a:y, d:(x,y)"),
        ("x=2,y=2", "a:(y,x), d:x, e:y"),
        ("x=2,y=2,z=2", "a:(x,z), d:(y,x), e:z"),
    ]
    inputs = tensor(A, B), ids_of(D, E, below=8, least=-8), tensor(D, E, B, seed=2)
    agree(cases, *inputs, over=ways(*shared, partitioners=["names"]))


def test_a_tensor_split_over_the_axis_of_the_ids_takes_updates_that_are_not() -> None:
    cases = {
        "one": lambda x, ids, u: mw.scatter_add(x, ids, 0.5, "a"),
        "some": lambda x, ids, u: mw.scatter_add(x, ids, u, "a"),
        "set": lambda x, ids, u: mw.scatter_set(x, ids, u, "a"),
    }
    inputs = tensor(A, B), ids_of(D, below=8), tensor(D, seed=2)
    agree(cases, *inputs, over=ways(("x=2", "b:x, d:x"), ("x=2,y=2", "b:(x,y), d:y"), partitioners=["names"]))


def test_a_table_at_rest() -> None:
    vocab, embed, batch = mw.dims(vocab=16, embed=8, batch=8)
    table, ids = tensor(vocab, embed, role="parameter"), ids_of(batch, Q, below=16)
    cases = {
        "take": lambda table, ids: mw.take(table, ids, "vocab"),
        "scatter": lambda table, ids: mw.scatter_add(table, ids, 1.0, "vocab"),
        "zeros": lambda table, ids: mw.zeros_like(table),
    }
    layouts = [
        ("x=2,y=2", "batch:x, vocab:y", {"params": "embed:x"}),
        ("x=2,y=2", "batch:x, vocab:y", {"params": "vocab:x", "gather": "step"}),
    ]
    agree(cases, table, ids, over=[Way(mesh, layout, options) for mesh, layout, options in layouts])


@functools.cache
def _compiled(name: str, layout: str) -> Any:
    def program(x: mw.Tensor, ids: mw.Tensor, updates: mw.Tensor) -> Any:
        taken, masked = mw.take(x, ids, "b"), mw.take(x, ids.rename(d="a"), "b")
        added, put = mw.scatter_add(x, ids, updates, "b"), mw.scatter_set(x, ids, updates, "b")
        return taken, masked, added, put

    assert name
    return jax.jit(Way("x=2,y=2", layout).region(program))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(-10, 9), min_size=8, max_size=8), st.sampled_from(["b:x, d:y", "b:(y,x), d:x", "a:x, d:y"]))
def test_any_ids(values: list[int], layout: str) -> None:
    x, updates = tensor(A, B), tensor(D, A, seed=1)
    ids = mw.Tensor(jnp.asarray(values, jnp.int32), D)
    taken, picked, added, put = (numpy(t) for t in _compiled("any", layout)(x, ids, updates))
    whole = numpy(x).T
    table = np.concatenate([whole, np.full((1, 8), np.nan, np.float32)])
    rows = np.array([v % 8 if -8 <= v < 8 else 8 for v in values])
    np.testing.assert_array_equal(taken, table[rows])
    np.testing.assert_array_equal(picked, table[rows, np.arange(8)])
    expected_added, expected_put = whole.copy(), whole.copy()
    for row, update in zip(rows, numpy(updates), strict=True):
        if row < 8:
            expected_added[row] += update
            expected_put[row] = update
    np.testing.assert_allclose(added, expected_added.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(put, expected_put.T)


# Communication


def test_what_indexing_communicates() -> None:
    way = Way("x=2,y=2", "batch:x, vocab:y")
    batch, vocab, embed = mw.dims(batch=8, vocab=32, embed=4)
    table, ids = tensor(vocab, embed), ids_of(batch, Q, below=32)
    take = way.region(lambda table, ids: mw.take(table, ids, "vocab"))
    assert communicated(take, table, ids) == [("all_reduce", 4 * 6 * 4)]
    assert communicated(way.region(lambda ids: mw.one_hot(ids, vocab)), ids) == []
    alone = Way("x=2,y=2", "batch:x").region(lambda table, ids: mw.take(table, ids, "vocab"))
    assert communicated(alone, table, ids) == []
    shared = Way("x=4", "batch:x, vocab:x").region(lambda table, ids: mw.take(table, ids, "vocab"))
    assert communicated(shared, table, ids) == [("all_gather", 2 * 6), ("reduce_scatter", 8 * 6 * 4)]

    def into(table: mw.Tensor, ids: mw.Tensor) -> Any:
        return mw.scatter_add(table, ids, 1.0, "vocab")

    assert communicated(way.region(into), table, ids) == [("all_reduce", 16 * 4)]
    assert communicated(Way("x=2", "vocab:x").region(into), table, ids) == []


def test_the_gradient_of_take_is_one_sum_over_the_ids_axes() -> None:
    way = Way("x=2,y=2", "batch:x, vocab:y")
    batch, vocab, embed = mw.dims(batch=8, vocab=32, embed=4)
    table, ids = tensor(vocab, embed), ids_of(batch, Q, below=32)
    loss = way.region(lambda table, ids: mw.sum(mw.take(table, ids, "vocab") * 2.0))
    kinds = communicated(jax.grad(loss), table, ids)
    assert ("all_reduce", 16 * 4) in kinds
    assert all(kind == "all_reduce" for kind, _ in kinds)


# Errors


def _message(raises: type[Exception], function: Any) -> str:
    with pytest.raises(raises) as caught:
        function()
    return str(caught.value)


def test_errors() -> None:
    x, ids = tensor(A, B), ids_of(Q, below=8)
    assert "no dim 'bb' in (a=8, b=8). Did you mean 'b'?" in _message(ValueError, lambda: mw.take(x, ids, "bb"))
    text = _message(TypeError, lambda: mw.take(x, ids.astype(jnp.float32), "b"))
    assert "the tensor (i=6) is of float32. Write ids.astype(jnp.int32)" in text and "test_indexing.py" in text
    assert "has size 5 in one operand and 8" in _message(
        ValueError, lambda: mw.take(x, ids_of(mw.Dim("a", 5), below=8), "b")
    )
    assert "mw.take(x, ids, 'b')" in _message(ValueError, lambda: mw.take_along(x, ids.rename(i="b").broadcast(J), "b"))
    assert "no dim 'b' in (i=6)" in _message(ValueError, lambda: mw.take_along(x, ids, "b"))
    assert "a keyword for each indexed dim" in _message(TypeError, lambda: mw.gather(x))
    text = _message(ValueError, lambda: mw.scatter_add(x, ids, tensor(J), "b"))
    assert "updates (j=3) has the dim 'j'" in text and "(i=6, a=8)" in text
    text = _message(TypeError, lambda: mw.scatter_add(x, ids, tensor(Q, dtype=jnp.bfloat16), "b"))
    assert "updates of bfloat16 for a tensor of float32" in text
    assert "updates of float32" in _message(TypeError, lambda: mw.scatter_set(mw.zeros(B, jnp.int32), ids, 0.5, "b"))
    both = Way("x=2", "i:x, a:x").region(lambda x, ids: mw.take(x, ids, "b"))
    assert "'i' and 'a' of one tensor are both split over the axis 'x'" in _message(ValueError, lambda: both(x, ids))


def test_outcomes_of_one_device_are_the_same_under_jit() -> None:
    x, ids = tensor(A, B), ids_of(Q, below=8)
    program = functools.partial(mw.take, ids=ids, name="b")
    assert_same(outcome(program, [x], None)[0], program(x), "jit")
