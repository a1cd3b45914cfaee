"""Buckets of lengths: which tokens a batch holds, what counts in the loss, what is compiled, where a run goes on."""

import dataclasses
import io
import math
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

import meshwright as mw
from meshwright.models import Decoder
from meshwright.nn import cross_entropy
from meshwright.train import Batch, Batches, Buckets, Checkpoints, Data, Intervals, Program, Report, Tokenizer, Trainer
from meshwright.train import step as step_module
from meshwright.train.step import loss

from .laws import agree, assert_same, tensor, ways
from .test_train import END, MODEL, ONE, PLACES, RECIPE, first_state, place, stream

LENGTHS = (4, 8, 16)
BUCKETED = dataclasses.replace(RECIPE, buckets=LENGTHS[:-1], length=LENGTHS[-1], batch=8)


def documents(*texts: str) -> list[np.ndarray]:
    """Each letter a token: a is 1, b is 2."""
    return [np.asarray([ord(letter) - ord("a") + 1 for letter in text], np.int32) for text in texts]


def written(row: np.ndarray, weights: np.ndarray) -> str:
    """A row as letters: ``<`` for the token between documents, ``.`` where nothing counts."""
    letters = ["<" if token == END else chr(ord("a") + token - 1) for token in row]
    return "".join(letter if w else "." for letter, w in zip(letters, weights, strict=True))


def buckets(seed: int = 0) -> Buckets:
    return Buckets.sort(stream(seed), END, LENGTHS)


# What batches hold


def test_a_document_goes_into_the_shortest_length_that_holds_it() -> None:
    found = Buckets.sort(documents("abc", "de", "fghijk", "", "lmnopqrstu"), END, (8, 4))
    assert found.lengths == (4, 8) and found.sequences(1) == (2, 1) and found.num_tokens == 4 + 3 + 7 + 1 + 11
    rows = []
    for step in range(found.num_batches(1)):
        ids, targets, segments, _, weights = found.arrays(step, 1, None)
        assert ((segments == 0) == (weights > 0)).all() and ids.dtype == targets.dtype == segments.dtype == np.int32
        assert weights.sum() == pytest.approx(1) and weights.dtype == np.float32
        rows += [(written(i, w), written(t, w)) for i, t, w in zip(ids, targets, weights, strict=True)]
    # The last document is of 11 tokens with the one before it: 8 of them are a piece, 3 go into the shorter bucket.
    assert sorted(rows) == sorted([
        ("<abc", "abc<"), ("<de.", "de<."), ("<...", "<..."), ("stu.", "tu<."),
        ("<fghijk.", "fghijk<."), ("<lmnopqr", "lmnopqrs"),
    ])  # fmt: skip


@pytest.mark.parametrize("seed", [None, 5])
def test_an_epoch_predicts_every_token_once(seed: int | None) -> None:
    texts = stream(3)
    found = Buckets.sort(texts, END, LENGTHS)
    expected = sorted((int(a), int(b)) for t in texts for a, b in zip([END, *t], [*t, END], strict=True))
    for epoch in range(2):
        pairs: list[tuple[int, int]] = []
        for step in range(found.num_batches(8)):
            arrays = found.arrays(epoch * found.num_batches(8) + step, 8, seed)
            ids, targets, _, positions, weights = arrays
            counted = weights > 0
            pairs += zip(ids[counted].tolist(), targets[counted].tolist(), strict=True)
            assert (positions == np.arange(ids.shape[1])).all()
            amount = found.amount(epoch * found.num_batches(8) + step, 8, seed)
            assert amount == (int(counted.sum()), counted.size)
        assert sorted(pairs) == expected


def test_batches_have_about_as_many_tokens_and_what_divides_the_batch_divides_them() -> None:
    found = Buckets.sort(stream(), END, (4, 7, 16))
    assert found.sequences(8) == (32, 16, 8)
    places = {a.places // n for a, n in zip(found.amounts(8), found.counts(8), strict=True)}
    assert places == {32 * 4, 16 * 7, 8 * 16}


def test_padding_is_counted_by_hand() -> None:
    found = Buckets.sort(documents("abc", "de", "fghijk"), END, (4, 8))
    assert found.amounts(1) == ((7, 8), (7, 8))
    assert [a.padding for a in found.amounts(2)] == [1 - 7 / 16, 1 - 7 / 16]  # half of each batch is empty
    one_length = Buckets.sort(documents("abc", "de", "fghijk"), END, (8,))
    assert one_length.amounts(1)[0].padding == pytest.approx(1 - 14 / 24)


def test_buckets_lose_less_than_one_length() -> None:
    def padding(lengths: tuple[int, ...]) -> float:
        amounts = Buckets.sort(stream(documents=400), END, lengths).amounts(8)
        return 1 - sum(a.tokens for a in amounts) / sum(a.places for a in amounts)

    assert padding((8, 16, 24, 40)) < 0.5 * padding((40,))


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    first, again = buckets(), buckets()
    steps = range(2 * first.num_batches(8))
    expected = [first.arrays(step, 8, 3) for step in steps]
    for step in reversed(steps):
        for a, b in zip(again.arrays(step, 8, 3), expected[step], strict=True):
            np.testing.assert_array_equal(a, b)
    shapes = [[found[0].shape for found in (first.arrays(s, 8, seed) for s in steps)] for seed in (3, 4)]
    assert shapes[0] != shapes[1] and sorted(shapes[0]) == sorted(shapes[1])


def test_without_a_seed_the_buckets_are_spread_evenly() -> None:
    """So that the first few batches, over which a held-out loss is taken, are of all lengths."""
    found = Buckets.sort(stream(documents=400), END, LENGTHS)
    num = found.num_batches(8)
    half = [found.arrays(step, 8, None)[0].shape[1] for step in range(num // 2)]
    for length, count in zip(found.lengths, found.counts(8), strict=True):
        assert abs(half.count(length) - count / 2) <= 1


def test_a_bucket_may_be_empty() -> None:
    found = Buckets.sort(documents("abc", "bcd"), END, (2, 4, 8))
    assert found.counts(1) == (0, 1, 0)
    assert found.arrays(1, 1, 0)[0].shape == (2, 4)


def test_errors() -> None:
    for lengths in ((), (0, 4), (4, 4)):
        with pytest.raises(ValueError, match=r"Buckets: the lengths \[.*\] must be different and at least 1"):
            Buckets.sort(documents("a"), END, lengths)
    with pytest.raises(ValueError, match="there are no documents"):
        Buckets.sort([], END, (4,))


# The loss


def test_the_loss_is_the_mean_over_tokens_of_documents_alone() -> None:
    """Each document by itself, without padding or other documents, on one device without a mesh."""
    found = Buckets.sort(documents("abc", "fghijk", "bcd", "de", "abcdefghi", "ef", "nopqrs"), END, (4, 8))
    model = Decoder(MODEL, key=jax.random.key(0))
    each: list[float] = []
    for first, size in np.concatenate(found.pieces):
        ids, targets = (mw.Tensor(found.tokens[None, first + i : first + i + size], "batch length") for i in (0, 1))
        each += cross_entropy(model(ids), targets).array[0].tolist()
    batches = Batches(found, 2, ONE.mesh, ONE.layout, seed=0)
    num = found.num_batches(2)
    losses = [float(jax.jit(loss)(model, batches[step])) for step in range(num)]
    assert np.average(losses, weights=[batches.amount(s).tokens for s in range(num)]) == pytest.approx(
        float(np.mean(each)), rel=1e-5
    )


LAYOUTS = {
    **{name: here for name, here in PLACES.items() if name != "ZeRO-1"},
    "context": place("data=2,context=2", "batch:data, length:context"),
    "microbatches": place("data=2", "batch:data", microbatches=4),
    "pipeline": place("pipe=2,data=2", "batch:data, layers:pipe", microbatches=4),
}


@pytest.fixture(scope="module")
def padded() -> tuple[Decoder, Batch, Any]:
    """A model, a batch with padding, and what one device makes of them."""
    batch = mw.unshard(Batches(buckets(), 8, ONE.mesh, ONE.layout, seed=1)[0])
    assert batch.weights is not None and (np.asarray(batch.weights.array) == 0).any(axis=1).sum() > 4
    model = Decoder(MODEL, key=jax.random.key(0))
    return model, batch, jax.jit(jax.value_and_grad(loss))(model, batch)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_loss_and_its_gradient_are_the_same_under_every_layout(
    name: str, padded: tuple[Decoder, Batch, Any]
) -> None:
    model, batch, expected = padded
    found = jax.jit(jax.value_and_grad(LAYOUTS[name].region(loss)))(model, batch)
    assert_same(mw.unshard(found), mw.unshard(expected), name, 2e-5)


def test_a_mean_over_what_a_mask_leaves_is_right_under_every_layout() -> None:
    """As users write it: both sums are over the whole batch, whoever holds how many of the tokens that count."""
    values = tensor(*mw.dims(batch=8, length=16))
    mask = mw.Tensor(np.arange(16) < np.asarray([[16, 3, 0, 1, 0, 0, 9, 2]]).T, "batch length")

    def mean_of_real(values: mw.Tensor, mask: mw.Tensor) -> Any:
        return mw.sum(mw.where(mask, values, 0.0)) / mw.sum(mask.astype("float32"))

    expected = np.asarray(values.array)[np.asarray(mask.array)].mean()
    assert mean_of_real(values, mask) == pytest.approx(expected, rel=1e-5)
    layouts = ways(
        ("x=4", "batch:x"), ("x=4", "length:x"), ("x=2,y=4", "batch:(x,y)"), ("x=2,y=4", "batch:x, length:y")
    )
    agree(mean_of_real, values, mask, over=layouts)


# The run


def data() -> Data:
    return Data(Tokenizer.train(["a"], 257), buckets(), buckets(seed=1))


def run(here: Any, report: Report, **options: Any) -> Trainer:
    program = Program(BUCKETED, here)
    return Trainer(program, data(), first_state(program), 0, report, Intervals(), **options)


def report() -> tuple[Report, io.StringIO]:
    text = io.StringIO()
    return Report(Console(file=text, width=120), steps=BUCKETED.steps, done=0, padded=True), text


def test_each_bucket_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[tuple[int, ...]] = []

    def counting(logits: mw.Tensor, targets: mw.Tensor, over: str) -> mw.Tensor:
        traced.append(targets.shape)
        return cross_entropy(logits, targets, over)

    monkeypatch.setattr(step_module, "cross_entropy", counting)
    program = Program(BUCKETED, PLACES["FSDP"])
    batches, state = program.batches(buckets(), 0), first_state(program)
    shapes = {batches[i].ids.shape for i in range(buckets().num_batches(8))}
    assert shapes == {(32, 4), (16, 8), (8, 16)}
    compiled: set[tuple[int, ...]] = set()
    for i in range(12):
        before, shape = len(traced), batches[i].ids.shape
        state, _ = program.step(state, batches[i])
        assert (len(traced) > before) == (shape not in compiled), f"step {i}: {shape}"
        compiled.add(shape)
    assert compiled == shapes and set(traced) == shapes


def test_a_run_in_buckets_goes_on_where_it_stopped_under_another_layout(tmp_path: Any) -> None:
    shown, text = report()
    whole = run(ONE, shown)
    whole.train()
    assert "tokens/s  padding " in text.getvalue() and text.getvalue().count("held-out loss") == 1
    with Checkpoints(tmp_path / "run") as checkpoints:
        half = run(PLACES["FSDP"], report()[0], checkpoints=checkpoints)
        for _ in range(2):
            half._advance()
        half._aside(half._save)
        other = Program(checkpoints.run()[0], PLACES["tensor, FSDP, gathered once"])
        assert other.recipe == BUCKETED
        rest = Trainer(other, data(), checkpoints.state(other.shapes()), 2, report()[0], Intervals())
    rest.train()
    assert_same(mw.unshard(rest.state), mw.unshard(whole.state), "gone on")
    assert whole.held_out is not None and rest.held_out == pytest.approx(whole.held_out, rel=1e-5)


def test_a_layout_is_checked_for_every_bucket() -> None:
    short = dataclasses.replace(BUCKETED, buckets=(6,))
    with pytest.raises(ValueError, match="'length' of size 6 cannot be split over the axis 'context'"):
        Program(short, place("context=4", "length:context")).check()
    Program(BUCKETED, place("context=4", "length:context")).check()


def test_shapes_are_those_of_the_batches() -> None:
    program = Program(BUCKETED, PLACES["FSDP"])
    batches = program.batches(buckets(), None)
    for step in range(4):
        batch = batches[step]
        expected = program.batch_shapes(batch.ids.size("length"))
        for x, like in zip(jax.tree.leaves(batch), jax.tree.leaves(expected), strict=True):
            assert (x.shape, x.dtype, x.sharding) == (like.shape, like.dtype, like.sharding)
    assert math.prod(program.batch_shapes().ids.shape) == 8 * 16
