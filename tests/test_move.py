"""Movement by name: values against NumPy, every move between splits over two axes, and what is sent.

Which elements a device holds under a split is computed here with NumPy (``_held``): a move whose result every device
holds already must send nothing, for renames, splits and merges between all pairs of splits over two axes.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshwright as mw
from meshwright import Tensor

from .laws import ABC, Way, agree, tensor, ways
from .stablehlo import communicated

A, B, C = mw.dims(a=8, b=8, c=16)
N, M = mw.dims(n=2, m=3)
X = tensor(A, B, C)


def _message(program: Callable[[], Any], error: type[Exception] = ValueError) -> str:
    with pytest.raises(error) as caught:
        program()
    assert "at tests/test_move.py:" in str(caught.value), "the user's line"
    return str(caught.value)


# On no mesh, against NumPy

ONE: dict[str, tuple[Callable[..., Any], str, Callable[..., Any]]] = {
    "rename": (lambda x: x.rename(a="d"), "d b c", lambda a: a),
    "rename two": (lambda x: mw.rename(x, a="b", b="a"), "b a c", lambda a: a),
    "rename none": (lambda x: x.rename(), "a b c", lambda a: a),
    "split": (lambda x: x.split("a", p=2, q=4), "p q b c", lambda a: a.reshape(2, 4, 8, 16)),
    "split three": (
        lambda x: x.split("c", p=2, q=-1, s=4), "a b p q s", lambda a: a.reshape(8, 8, 2, 2, 4)
    ),
    "split one": (lambda x: x.split("b", d=8), "a d c", lambda a: a),
    "split into its own name": (lambda x: x.split("b", b=2, d=-1), "a b d c", lambda a: a.reshape(8, 2, 4, 16)),
    "split off a one": (lambda x: mw.split(x, "b", d=1, b=8), "a d b c", lambda a: a[:, None]),
    "merge": (lambda x: x.merge("a b", "m"), "m c", lambda a: a.reshape(64, 16)),
    "merge back to front": (
        lambda x: x.merge(("c", "a"), "m"), "b m", lambda a: a.transpose(1, 2, 0).reshape(8, 128)
    ),
    "merge apart": (lambda x: mw.merge(x, "a c", "m"), "m b", lambda a: a.transpose(0, 2, 1).reshape(128, 8)),
    "merge last first": (lambda x: x.merge("c b", "m"), "a m", lambda a: a.transpose(0, 2, 1).reshape(8, 128)),
    "merge all": (lambda x: x.merge(x.names, "a"), "a", lambda a: a.ravel()),
    "merge one": (lambda x: x.merge("b", "m"), "a m c", lambda a: a),
    "reorder": (lambda x: x.reorder("c", "a", "b"), "c a b", lambda a: a.transpose(2, 0, 1)),
    "reorder text": (lambda x: x.reorder("b a c"), "b a c", lambda a: a.transpose(1, 0, 2)),
    "reorder dims": (lambda x: mw.reorder(x, C, B, A), "c b a", lambda a: a.T),
    "reorder a tuple": (lambda x: x.reorder(("b", ..., "a")), "b c a", lambda a: a.transpose(1, 2, 0)),
    "reorder to the end": (lambda x: x.reorder(..., "a"), "b c a", lambda a: a.transpose(1, 2, 0)),
    "reorder within": (lambda x: x.reorder("a", "c", ...), "a c b", lambda a: a.transpose(0, 2, 1)),
    "reorder nothing": (lambda x: x.reorder(...), "a b c", lambda a: a),
    "broadcast": (lambda x: x.broadcast(N), "n a b c", lambda a: np.broadcast_to(a, (2, *a.shape))),
    "broadcast two": (
        lambda x: mw.broadcast(x, N, M), "n m a b c", lambda a: np.broadcast_to(a, (2, 3, *a.shape))
    ),
    "broadcast a tuple": (lambda x: x.broadcast((M,)), "m a b c", lambda a: np.broadcast_to(a, (3, *a.shape))),
    "broadcast to none": (lambda x: x.broadcast(mw.Dim("n", 0)), "n a b c", lambda a: np.zeros((0, *a.shape))),
    "broadcast a scalar": (lambda x: mw.broadcast(2.5, N, M), "n m", lambda a: np.full((2, 3), 2.5)),
}  # fmt: skip


@pytest.mark.parametrize("name", ONE)
def test_values_and_names_on_no_mesh(name: str) -> None:
    program, names, expected = ONE[name]
    found = program(X)
    assert " ".join(found.names) == names
    np.testing.assert_array_equal(np.asarray(found.array), expected(np.asarray(X.array)))


def test_dtypes_and_roles_stay() -> None:
    for dtype in (jnp.int8, jnp.bool_, jnp.bfloat16, jnp.complex64):
        x = Tensor(jnp.zeros((2, 4), dtype), "a b", "parameter")
        for y in (x.rename(a="c"), x.split("b", c=2, d=2), x.merge("b a", "c"), x.reorder("b a")):
            assert y.dtype == dtype and y.role == "parameter"
        assert x.broadcast(M).dtype == dtype
    keys = mw.random.split(mw.random.key(0), B)
    np.testing.assert_array_equal(
        jax.random.key_data(keys.split("b", c=2, d=4).merge("d c", "e").array),
        jax.random.key_data(keys.array.reshape(2, 4).T.ravel()),
    )
    assert mw.broadcast(2.5) == 2.5, "no dims are no tensor"


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(st.data())
def test_merging_in_any_order_and_splitting_again(data: st.DataObject) -> None:
    """Each element is its own place, so that one misplaced shows."""
    sizes = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    names = "abcde"[: len(sizes)]
    array = np.arange(math.prod(sizes)).reshape(sizes)
    x = Tensor(jnp.asarray(array), tuple(names))
    order = data.draw(st.permutations(names))
    chosen = order[: data.draw(st.integers(1, len(order)))]
    merged = x.merge(chosen, "m")
    before = [n for n in names[: names.index(chosen[0])] if n not in chosen]
    after = [n for n in names if n not in chosen and n not in before]
    moved = np.transpose(array, [names.index(n) for n in (*before, *chosen, *after)])
    length = math.prod(x.size(n) for n in chosen)
    expected = moved.reshape(*(x.size(n) for n in before), length, *(x.size(n) for n in after))
    assert merged.names == (*before, "m", *after)
    np.testing.assert_array_equal(np.asarray(merged.array), expected)
    parts = {n: x.size(n) for n in chosen}
    if length:
        parts[data.draw(st.sampled_from(chosen))] = -1
    np.testing.assert_array_equal(np.asarray(merged.split("m", **parts).reorder(*names).array), array)


# Every move between splits over two axes

AXES = ("x", "y")
SEQUENCES = [axes for k in range(3) for axes in itertools.permutations(AXES, k)]
Splits = tuple[tuple[str, ...], ...]


def _splits(num: int) -> list[Splits]:
    """Every way to split ``num`` dims over two axes."""
    every = itertools.product(SEQUENCES, repeat=num)
    return [splits for splits in every if len(set(sum(splits, ()))) == len(sum(splits, ()))]


def _names(stems: str, splits: Splits) -> list[str]:
    """Names that are split so: ``pxy`` is split over x, then y."""
    return [stem + "".join(axes) for stem, axes in zip(stems, splits, strict=True)]


def _layout(names: Sequence[str]) -> str:
    return ", ".join(f"{n}:({','.join(n[1:])})" for n in dict.fromkeys(names) if n[1:])


def _as(x: Tensor, names: Sequence[str]) -> Any:
    return x.rename(**dict(zip(x.names, names, strict=False)))


def _holding(shape: Sequence[int], splits: Splits) -> Iterator[set[int]]:
    """For each of four devices, which elements of a row-major array it holds."""
    for place in itertools.product(range(2), repeat=2):
        here = np.arange(math.prod(shape)).reshape(shape)
        for i, axes in enumerate(splits):
            for axis in axes:
                here = np.split(here, 2, i)[place[AXES.index(axis)]]
        yield set(here.ravel().tolist())


def _held(old: Sequence[int], before: Splits, new: Sequence[int], after: Splits) -> bool:
    """Whether every device holds already what it is to hold."""
    pairs = zip(_holding(old, before), _holding(new, after), strict=True)
    return all(wanted <= have for have, wanted in pairs)


def _divides(shape: Sequence[int], splits: Splits) -> bool:
    return all(size % 2 ** len(axes) == 0 for size, axes in zip(shape, splits, strict=True))


Moves = list[tuple[tuple[int, ...], list[str], tuple[int, ...], list[str], bool]]
"""Shapes and names, before and after, and whether every device holds the result already."""


def _moves(stems: tuple[str, str], shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> Moves:
    pairs = itertools.product(
        *([s for s in _splits(len(stem)) if _divides(shape, s)] for stem, shape in zip(stems, shapes, strict=True))
    )
    return [
        (shapes[0], _names(stems[0], a), shapes[1], _names(stems[1], b), _held(shapes[0], a, shapes[1], b))
        for a, b in pairs
    ]


def _moved(x: Any, names: Sequence[str], shape: Sequence[int]) -> Any:
    """``x`` under other names, split or merged into them where there are more or fewer."""
    if len(names) == x.ndim:
        return _as(x, names)
    if x.ndim == 1:
        return x.split(x.names[0], **dict(zip(names, shape, strict=True)))
    return x.merge(x.names, names[0])


MOVES = {
    "rename": _moves(("pq", "pq"), ((4, 8), (4, 8))),
    "split": _moves(("a", "pq"), ((16,), (4, 4))),
    "split off two": _moves(("a", "pq"), ((16,), (2, 8))),
    "split off one": _moves(("a", "pqs"), ((8,), (2, 1, 4))),
    "merge": _moves(("pq", "a"), ((4, 4), (16,))),
    "merge two": _moves(("pq", "a"), ((2, 8), (16,))),
    "merge one": _moves(("pqs", "a"), ((2, 1, 4), (8,))),
}


def _distinct(moves: Moves) -> dict[tuple[str, ...], tuple[int, ...]]:
    return {tuple(names): shape for shape, names, _, _, _ in moves}


@pytest.mark.parametrize("name", MOVES)
def test_every_move_over_two_axes_gives_the_same_values_and_gradients(name: str) -> None:
    moves = MOVES[name]
    inputs = _distinct(moves)
    tensors = [tensor(*map(mw.Dim, names, shape), seed=i) for i, (names, shape) in enumerate(inputs.items())]

    def program(*xs: Any) -> Any:
        given = {x.names: x for x in xs}
        return [_moved(given[tuple(before)], after, shape) for _, before, shape, after, _ in moves]

    layout = _layout([n for _, before, _, after, _ in moves for n in (*before, *after)])
    agree(program, *tensors, over=[Way("x=2,y=2", layout)])


@pytest.mark.parametrize("name", MOVES)
def test_what_every_device_holds_already_is_not_sent(name: str) -> None:
    """All of the moves above that need nothing send nothing; of the others every third is looked at."""
    for i, (old, before, new, after, held) in enumerate(MOVES[name]):
        if held or i % 3 == 0:
            x = tensor(*map(mw.Dim, before, old))
            region = Way("x=2,y=2", _layout([*before, *after])).region(lambda x, a=after, s=new: _moved(x, a, s))
            assert (communicated(region, x) == []) == held, f"{before} to {after}"


@pytest.mark.parametrize("summed", [s for s in SEQUENCES if s], ids="".join)
def test_every_move_of_a_sum_still_pending(summed: tuple[str, ...]) -> None:
    """A contraction whose sum is pending over some axes, renamed onto every split."""
    before = [s for s in _splits(2) if not set(sum(s, ())) & set(summed)]
    k = "k" + "".join(summed)
    xs = [tensor(*map(mw.Dim, (*_names("pq", s), k), (4, 8, 4)), seed=i) for i, s in enumerate(before)]
    names = [_names("pq", s) for s in _splits(2)]

    def program(w: Any, *xs: Any) -> Any:
        return [[_as(mw.dot(x, w, k), after) for after in names] for x in xs]

    layout = _layout([n for x in xs for n in x.names] + [n for these in names for n in these])
    agree(program, tensor(mw.Dim(k, 4), seed=9), *xs, over=[Way("x=2,y=2", layout)])


@hypothesis.settings(max_examples=3, deadline=None, derandomize=True)
@hypothesis.given(st.lists(st.tuples(*[st.permutations("xyz-||")] * 2), min_size=16, max_size=16))
def test_moves_over_three_axes(drawn: list[tuple[list[str], list[str]]]) -> None:
    """Three dims, split as the letters between the bars say; those after the dash are not used."""
    names = [[_three(letters) for letters in pair] for pair in drawn]
    xs = [tensor(*map(mw.Dim, before, (8, 8, 8)), seed=i) for i, (before, _) in enumerate(names)]
    layout = _layout([n for pair in names for these in pair for n in these])

    def program(*xs: Any) -> Any:
        return [_as(x, after) for x, (_, after) in zip(xs, names, strict=True)]

    agree(program, *xs, over=[Way("x=2,y=2,z=2", layout)])


def _three(letters: Sequence[str]) -> list[str]:
    parts = "".join(letters).split("|")
    return [stem + part.split("-")[0] for stem, part in zip("pqs", parts, strict=True)]


# Law 1, with both partitioners, on meshes of 1 to 8 devices

CASES: dict[str, Callable[..., Any]] = {
    "away": lambda x, w: x.rename(a="d"),
    "away and back": lambda x, w: mw.sin(mw.cos(x.rename(a="d")).rename(d="a")),
    "swap": lambda x, w: x.rename(a="b", b="a") + x,
    "round": lambda x, w: x.rename(a="b", b="c", c="a"),
    "split": lambda x, w: x.split("c", d=2, a2=8) * 2.0,
    "split, its name first": lambda x, w: x.split("c", c=8, d=2),
    "split, its name last": lambda x, w: x.split("c", d=2, c=8),
    "merge": lambda x, w: x.merge("a b", "d"),
    "merge onto a name": lambda x, w: x.merge("b c", "b") + x.merge("c b", "b"),
    "merge all": lambda x, w: x.merge("c a b", "a"),
    "heads": lambda x, w: x.split("c", heads=2, d=8).rename(b="c", d="b").merge("heads b", "d"),
    "reorder": lambda x, w: x.reorder("c", ...) + x,
    "broadcast": lambda x, w: x.sum("a").broadcast(A) * x,
    "broadcast to new": lambda x, w: mw.broadcast(x.mean(), A, M),
    "broadcast of a row": lambda x, w: x.sum("b c").broadcast(C, M) + 1.0,
    "a parameter": lambda x, w: [w.rename(b="d"), w.rename(b="c", c="b"), w.split("c", d=8, b2=2), w.merge("c b", "d")],
    "a parameter, used": lambda x, w: mw.dot(x, w.rename(b="d").reorder("c d"), "c").rename(b="c", d="b"),
    "a parameter, repeated": lambda x, w: w.reorder("c b").broadcast(A) * x,
    "a parameter, renamed twice": lambda x, w: w.rename(b="a").rename(c="d", a="c") ** 2,
}


def test_movement_is_the_same_under_every_layout() -> None:
    over = ways(ABC[0], ABC[6], ABC[8], ABC[10], partitioners=("names",))
    over += ways(ABC[6], partitioners=("xla",))
    over += [
        Way("x=2,y=2", "a:x", {"params": "b:y", "gather": "use"}),
        Way("x=2,y=2", "b:x, c:y", {"params": "(y,x)", "gather": "use"}),
        Way("x=2,y=2", "a:x, c:y", {"params": "b:x", "gather": "step"}),
    ]
    agree(CASES, X, tensor(B, C, seed=1, role="parameter"), over=over)


# Communication

GATHER, SLICE, EXCHANGE = "all_gather", "all_reduce", "all_to_all"
SENT: dict[str, tuple[str, str, Callable[..., Any], list[tuple[str, int]], list[tuple[str, int]]]] = {
    # mesh, layout, program; what a device puts in forward, and more of it backward (512 elements are half the tensor)
    "stays": ("x=2", "a:x, d:x", lambda x: x.rename(a="d"), [], []),
    "goes from dim to dim": ("x=2", "a:x", lambda x: x.rename(a="b", b="a"), [(EXCHANGE, 512)], [(EXCHANGE, 512)]),
    "goes on by two renames": (
        "x=2", "a:x", lambda x: x.rename(a="d").rename(b="a"), [(EXCHANGE, 512)], [(EXCHANGE, 512)]
    ),
    "goes there and back": ("x=2", "a:x", lambda x: x.rename(a="d").rename(d="a"), [], []),
    "leaves": ("x=2", "a:x", lambda x: x.rename(a="d"), [(GATHER, 512)], []),
    "leaves, and one stays": ("x=2,y=2", "a:(x,y), d:x", lambda x: x.rename(a="d"), [(GATHER, 256)], []),
    "leaves, used elementwise": ("x=2", "a:x", lambda x: mw.sin(x.rename(a="d")) * 2.0, [(GATHER, 512)], []),
    "arrives": ("x=2", "d:x", lambda x: x.rename(a="d"), [], [("all_reduce", 1024)]),
    "two go together": (
        "x=2,y=2", "a:(x,y)", lambda x: x.rename(a="b", b="a"), [(EXCHANGE, 256)], [(EXCHANGE, 256)]
    ),
    "one of two goes": (
        "x=2,y=2", "a:(x,y), d:x, e:y", lambda x: x.rename(a="d", b="e"), [(EXCHANGE, 256)], [(EXCHANGE, 256)]
    ),
    "split in place": ("x=2", "a:x, p:x", lambda x: x.split("a", p=4, q=2), [], []),
    "split through a one": ("x=2", "a:x, q:x", lambda x: x.split("a", p=1, q=8), [], []),
    "split across": ("x=2", "a:x, q:x", lambda x: x.split("a", p=4, q=2), [(EXCHANGE, 512)], [(EXCHANGE, 512)]),
    "split to whole": ("x=2", "a:x", lambda x: x.split("a", p=4, q=2), [(GATHER, 512)], []),
    "split beside": ("x=2", "a:x", lambda x: x.split("c", p=4, q=4), [], []),
    "merge in place": ("x=2", "a:x, m:x", lambda x: x.merge("a b", "m"), [], []),
    "merge across": ("x=2", "b:x, m:x", lambda x: x.merge("a b", "m"), [(EXCHANGE, 512)], [(EXCHANGE, 512)]),
    "merge to whole": ("x=2", "b:x", lambda x: x.merge("a b", "m"), [(GATHER, 512)], []),
    "merge beside": ("x=2", "c:x", lambda x: x.merge("a b", "m"), [], []),
    "heads and back": (
        "x=2", "c:x, heads:x", lambda x: x.split("c", heads=4, d=4).merge("heads d", "c"), [], []
    ),
    "reorder": ("x=2,y=2", "a:x, b:y", lambda x: x.reorder("c b a"), [], []),
    "broadcast": ("x=2", "a:x", lambda x: x.broadcast(M), [], []),
    "broadcast along a split": ("x=2,y=2", "a:x, n:y", lambda x: x.broadcast(N), [], [("all_reduce", 512)]),
}  # fmt: skip


@pytest.mark.parametrize("name", SENT)
def test_what_a_move_sends(name: str) -> None:
    mesh, layout, program, forward, backward = SENT[name]
    way = Way(mesh, layout)
    assert communicated(way.region(program), X) == forward
    weights = jnp.asarray(np.arange(math.prod(jax.eval_shape(program, X).shape)), jnp.float32)
    back = communicated(jax.grad(lambda x: jnp.sum(way.region(program)(x).array.ravel() * weights)), X)
    assert back in (backward, [*forward, *backward])


def test_a_whole_value_is_gathered_once_for_all_its_uses() -> None:
    """Also when the renames are several, and when the second stands in a loop."""
    way = Way("x=2", "a:x")

    def program(x: Any) -> Any:
        whole = x.rename(a="d")
        inside = mw.fold(lambda c, _: mw.sin(c) + whole, whole, over=mw.Dim("steps", 2))
        return mw.softmax(whole, "d") + mw.cumsum(whole.rename(d="e"), "e").rename(e="d") * inside

    assert communicated(way.region(program), X) == [("all_gather", 512)]


# Errors

T = tensor(mw.Dim("batch", 8), mw.Dim("embed", 6))
MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "rename unknown": (lambda: T.rename(bach="b"), "rename: there is no dim 'bach' in (batch=8, embed=6). Did you"),
    "rename onto another": (
        lambda: T.rename(batch="embed"), "'s dims are unique: rename one of them, for instance to 'embed_out'."
    ),
    "rename two to one": (
        lambda: T.rename(batch="m", embed="m"), "rename: the dim 'm' stands twice in (m=8, m=6)."
    ),
    "rename to no name": (lambda: T.rename(batch="a b"), "Dim: 'a b' is not a name; use a Python identifier such as"),
    "split unknown": (lambda: T.split("embd", p=2, q=3), "split: there is no dim 'embd' in (batch=8, embed=6). Did"),
    "split wrong": (lambda: T.split("embed", p=4, q=2), "split: p=4 x q=2 does not make embed=6: 8 is not 6."),
    "split no whole part": (
        lambda: T.split("embed", p=4, q=-1), "split: p=4 x q=-1 does not make embed=6: 6 is not a multiple of 4."
    ),
    "split by none": (
        lambda: T.split("embed", p=0, q=-1), "split: p=0 x q=-1 does not make embed=6: 6 is not a multiple of 0."
    ),
    "split two unknown": (
        lambda: T.split("embed", p=-1, q=-1),
        "split: give the sizes of the parts of 'embed'; one of them may be -1. Found {'p': -1, 'q': -1}."
    ),
    "split into nothing": (lambda: T.split("embed"), "split: give the sizes of the parts of 'embed'; one of them may"),
    "split negative": (lambda: T.split("embed", p=-2, q=-3), "Dim: the size of 'p' is -2; it must not be negative."),
    "split onto another": (lambda: T.split("embed", batch=2, q=3), "split: the dim 'batch' stands twice in (batch=8"),
    "merge nothing": (lambda: T.merge((), "m"), "merge: name the dims of (batch=8, embed=6) to merge into 'm'."),
    "merge unknown": (lambda: T.merge("batch ember", "m"), "merge: there is no dim 'ember' in (batch=8, embed=6). Did"),
    "merge twice": (lambda: T.merge("batch batch", "m"), "merge: the dim 'batch' stands twice in (batch=8, batch=8)."),
    "merge onto another": (lambda: T.merge("batch", "embed"), "merge: the dim 'embed' stands twice in (embed=8, embed"),
    "reorder less": (
        lambda: T.reorder("embed"), "reorder: (embed) is not an order of (batch=8, embed=6); use ... for the rest."
    ),
    "reorder twice": (lambda: T.reorder("embed embed"), "reorder: (embed, embed) is not an order of (batch=8, embed=6"),
    "reorder unknown": (lambda: T.reorder("embd", ...), "reorder: there is no dim 'embd' in (batch=8, embed=6). Did"),
    "reorder rests": (lambda: T.reorder(..., "embed", ...), "reorder: (batch, embed, ...) is not an order of (batch=8"),
    "broadcast again": (
        lambda: T.broadcast(mw.Dim("batch", 3)), "broadcast: the tensor (batch=8, embed=6) has a dim 'batch' already."
    ),
    "broadcast twice": (lambda: T.broadcast(N, N), "the dim 'n' stands twice in (n=2, n=2)"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    program, words = MISTAKES[name]
    assert words in _message(program)


def test_what_is_no_tensor() -> None:
    for f in (lambda x: mw.rename(x, a="b"), lambda x: mw.split(x, "a", b=2), lambda x: mw.merge(x, "a", "b")):
        assert "expected a tensor, found an array of shape (3,)" in _message(lambda f=f: f(np.ones(3)), TypeError)
        assert "expected a tensor, found float" in _message(lambda f=f: f(2.0), TypeError)
    assert "reorder: expected a tensor, found list" in _message(lambda: mw.reorder([1], "a"), TypeError)
    message = _message(lambda: mw.broadcast(jnp.ones(3), N), TypeError)
    assert "broadcast: expected a tensor or a scalar, found an array of shape (3,). Name its dims" in message
    assert "found 'n' of type str; write mw.Dim(name, size)" in _message(lambda: T.broadcast("n"), TypeError)  # type: ignore[arg-type]


ILLEGAL: dict[str, tuple[str, Callable[..., Any], list[str]]] = {
    "rename, indivisible": (
        "d:x", lambda x: x.rename(embed="d"),
        ["rename: the dim 'd' of size 6 cannot be split over the axis 'x' (size 4): 6 is not a multiple of 4",
         "tensor: (batch=8, d=6, other=4)", "Make 'd' a multiple of 4 (4 or 8)", "Nothing is padded silently."],
    ),
    "rename, two on one": (
        "batch:x, d:x", lambda x: x.rename(other="d"),
        ["rename: the dims 'batch' and 'd' of one tensor are both split over the axis 'x'", "layout: batch:x, d:x",
         "tensor: (batch=8, embed=6, d=4)", ".rename(d='d_whole')"],
    ),
    "split, indivisible": (
        "p:x", lambda x: x.split("batch", p=2, q=4),
        ["split: the dim 'p' of size 2 cannot be split over the axis 'x' (size 4)", "(p=2, q=4, embed=6, other=4)"],
    ),
    "merge, two on one": (
        "batch:x, m:x", lambda x: x.merge("other embed", "m"),
        ["merge: the dims 'batch' and 'm' of one tensor are both split over the axis 'x'", "tensor: (batch=8, m=24)"],
    ),
    "broadcast, indivisible": (
        "n:x", lambda x: x.broadcast(N), ["broadcast: the dim 'n' of size 2 cannot be split", "tensor: (n=2, batch=8"]
    ),
    "broadcast a scalar, indivisible": (
        "n:x", lambda x: mw.broadcast(x.sum(), N), ["broadcast: the dim 'n' of size 2 cannot be split", "tensor: (n=2)"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("partitioner", ["names", "xla"])
@pytest.mark.parametrize("name", ILLEGAL)
def test_moves_that_the_layout_cannot_split(name: str, partitioner: str) -> None:
    layout, program, words = ILLEGAL[name]
    message = _message(
        lambda: Way("x=4", layout, partitioner=partitioner).region(program)(
            T.broadcast(mw.Dim("other", 4)).reorder(..., "other")
        )
    )
    for text in words:
        assert text in message
