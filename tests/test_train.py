"""Training: text, tokens, batches, the optimizer, and the whole step under layouts."""

import dataclasses
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import meshwright as mw
from meshwright.models import Decoder, DecoderConfig
from meshwright.nn import GatedMLP
from meshwright.train import (
    Amount,
    Batch,
    Batches,
    Checkpoints,
    Data,
    Document,
    Intervals,
    OptimizerConfig,
    Place,
    Program,
    Recipe,
    Report,
    Sampling,
    State,
    TextConfig,
    Tokenizer,
    Trainer,
    Windows,
    decayed,
    generate,
    hold_out,
    loss,
    make_optimizer,
    read,
    schedule,
)
from meshwright.train.generate import choose
from meshwright.train.loop import finite
from meshwright.train.optimizer import update
from meshwright.train.report import Meter, show_count, show_seconds

from .laws import assert_same

END = 0
MODEL = DecoderConfig(vocab=64, embed=32, layers=2, heads=2, group=2, head_dim=8, ff=64)
RECIPE = Recipe(model=MODEL, optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1), steps=4, batch=8, length=16)


def place(mesh: str, rules: str, partitioner: str = "names", **options: Any) -> Place:
    sizes = [int(part.split("=")[1]) for part in mesh.split(",")]
    layout = mw.Layout(rules, strict=True, **options)
    return Place(mw.Mesh(mesh, jax.devices()[: math.prod(sizes)]), layout, partitioner)


ONE = place("data=1", "batch:data")
PLACES = {
    "FSDP": place("data=4", "batch:data", params="data"),
    "tensor, FSDP, gathered once": place(
        "data=2,model=2", "batch:data, heads:model, ff:model, vocab:model", params="embed:data", gather="step"
    ),
    "ZeRO-1": place("data=8", "batch:data", params="", optimizer="data"),
    "sequence, by XLA": place("data=2,model=2", "batch:data, ff:model, residual_length:model", "xla", params="data"),
}


def stream(seed: int = 0, documents: int = 40) -> list[np.ndarray]:
    """Documents of a language that can be learnt: each token is followed by one of two."""
    rng = np.random.default_rng(seed)

    def write() -> np.ndarray:
        tokens = [int(rng.integers(1, MODEL.vocab))]
        for _ in range(int(rng.integers(5, 40))):
            tokens.append(1 + (3 * tokens[-1] + int(rng.integers(2))) % (MODEL.vocab - 1))
        return np.asarray(tokens, np.int32)

    return [write() for _ in range(documents)]


def windows(length: int = RECIPE.length, seed: int = 0) -> Windows:
    return Windows.cut(stream(seed), END, length)


def first_state(program: Program) -> State:
    """As ``program.first_state()``, compiled as quickly as the rest of the tests."""
    return jax.jit(program.make_state)(jax.random.key(program.recipe.seed))


def arrays(batch: Batch) -> list[np.ndarray]:
    return [np.asarray(x.array) for x in batch if x is not None]


# Batches


def test_documents_are_packed_with_positions_and_segments_of_their_own() -> None:
    documents = [np.asarray(d, np.int32) for d in ([1, 2, 3], [4, 5], [6, 7, 8, 9, 10, 11])]
    packed = Windows.cut(documents, END, 4)
    assert packed.tokens.tolist() == [0, 1, 2, 3, 0, 4, 5, 0, 6, 7, 8, 9, 10, 11]
    assert len(packed) == 3
    ids, targets, segments, positions = packed.rows(np.arange(3))
    assert ids.tolist() == [[0, 1, 2, 3], [0, 4, 5, 0], [6, 7, 8, 9]]
    assert targets.tolist() == [[1, 2, 3, 0], [4, 5, 0, 6], [7, 8, 9, 10]]
    assert segments.tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert positions.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 2, 3]]
    assert all(x.dtype == np.int32 for x in (ids, targets, segments, positions))


def test_an_epoch_predicts_every_token_once() -> None:
    packed = windows(length=7)
    _, targets, segments, positions = packed.rows(np.arange(len(packed)))
    num = len(packed) * 7
    assert targets.ravel().tolist() == packed.tokens[1 : num + 1].tolist()
    assert (np.diff(segments, axis=1) == (positions[:, 1:] == 0)).all()


def test_an_empty_document_is_only_its_separator() -> None:
    packed = Windows.cut([np.asarray(d, np.int32) for d in ([], [1, 2], [])], END, 3)
    assert packed.tokens.tolist() == [0, 0, 1, 2, 0]
    assert packed.rows(np.asarray([0]))[2].tolist() == [[0, 1, 1]]


def test_too_few_tokens_for_a_window_are_an_error() -> None:
    with pytest.raises(ValueError, match="4 tokens: too few for one window of length=4"):
        Windows.cut([np.asarray([1, 2, 3], np.int32)], END, 4)


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    packed = windows()
    first, again = (Batches(packed, 8, ONE.mesh, ONE.layout, seed=3) for _ in range(2))
    other = Batches(packed, 8, ONE.mesh, ONE.layout, seed=4)
    expected = [arrays(first[step]) for step in range(5)]
    for step in reversed(range(5)):
        for a, b in zip(arrays(again[step]), expected[step], strict=True):
            np.testing.assert_array_equal(a, b)
    assert arrays(first[0])[0].tolist() != arrays(other[0])[0].tolist()


def test_every_window_comes_once_in_an_epoch() -> None:
    packed = windows()
    chosen = np.concatenate([packed.chosen(step, 8, seed=0) for step in range(len(packed))])
    epochs = chosen.reshape(8, len(packed))
    for epoch in epochs:
        assert sorted(epoch) == list(range(len(packed)))
    assert epochs[0].tolist() != epochs[1].tolist()


def test_a_batch_lies_as_the_layout_says() -> None:
    here = place("data=2,context=2", "batch:data, length:context")
    batch = Batches(windows(), 8, here.mesh, here.layout, seed=0)[1]
    assert batch.ids.array.sharding.shard_shape((8, 16)) == (4, 8)
    assert batch.ids.dims == mw.dims(batch=8, length=16)
    assert_same(batch, Batches(windows(), 8, ONE.mesh, ONE.layout, seed=0)[1], "placed")


# Text and tokens


def test_the_standard_library_is_the_text_when_none_is_named() -> None:
    corpus = read(TextConfig(max_bytes=300_000))
    again = read(TextConfig(max_bytes=300_000))
    assert corpus == again
    size = sum(d.num_bytes for d in corpus.training + corpus.held_out)
    assert 300_000 <= size < 900_000
    assert corpus.cut and corpus.held_out and not corpus.num_skipped
    assert "standard library" in str(corpus) and "the rest left out" in str(corpus)


def test_folders_and_files_are_text(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b.txt").write_text("bee\n")
    (tmp_path / "folder" / "a.txt").write_text("äh\n")
    (tmp_path / "folder" / "image.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "folder" / "latin.txt").write_bytes("ä".encode("latin-1"))
    (tmp_path / "folder" / ".hidden").write_text("no")
    (tmp_path / "one.txt").write_text("one\n")
    corpus = read(TextConfig(data=(tmp_path / "one.txt", tmp_path / "folder")))
    assert sorted(d.text for d in corpus.training + corpus.held_out) == ["bee\n", "one\n", "äh\n"]
    assert corpus.num_skipped == 2 and not corpus.cut
    assert "2 files skipped that are not text" in str(corpus)
    with pytest.raises(ValueError, match=r"latin\.txt' is not UTF-8 text"):
        read(TextConfig(data=(tmp_path / "folder" / "latin.txt",)))
    with pytest.raises(ValueError, match=r"there is no file or folder '.*missing'"):
        read(TextConfig(data=(tmp_path / "missing",)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="There is no text in"):
        read(TextConfig(data=(tmp_path / "empty",)))


def test_held_out_documents_are_chosen_by_their_contents() -> None:
    documents = [Document(str(i), f"text {i}\n") for i in range(100)]
    training, held_out = hold_out(documents, 0.1)
    assert len(held_out) == 10 and len(training) == 90
    assert not {d.text for d in training} & {d.text for d in held_out}
    backwards = hold_out(documents[::-1], 0.1)[1]
    assert {d.text for d in backwards} == {d.text for d in held_out}
    assert len(hold_out(documents[:3], 0.01)[1]) == 1


def test_a_single_document_is_cut_at_the_end_of_a_line() -> None:
    text = "".join(f"line {i}\n" for i in range(100))
    (training,), (held_out,) = hold_out([Document("book", text)], 0.05)
    assert training.text + held_out.text == text
    assert training.text.endswith("\n") and 0.01 < len(held_out.text) / len(text) < 0.06
    (training,), (held_out,) = hold_out([Document("line", "x" * 100)], 0.05)
    assert (len(training.text), len(held_out.text)) == (95, 5)


STRANGE = ["", " ", "def f(x):\n\treturn  x\n\n\n", "naïve — 東京 🙂\r\n", "<|endoftext|>", "\0\x7f", "     a    b  "]


def test_tokens_decode_to_the_text() -> None:
    texts = [d.text for d in read(TextConfig(max_bytes=100_000)).training]
    tokenizer = Tokenizer.train(texts, 400)
    assert tokenizer.size == 400
    for text in [*STRANGE, texts[0][:5000]]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.end not in ids
    together = tokenizer.encode_all(STRANGE)
    assert [ids.tolist() for ids in together] == [tokenizer.encode(text) for text in STRANGE]
    assert len(tokenizer.encode("return self")) < 8
    assert tokenizer.decode([tokenizer.end, *tokenizer.encode("x")]) == "x"
    assert Tokenizer.train(texts, 400).to_text() == tokenizer.to_text()
    assert Tokenizer.from_text(tokenizer.to_text()).encode(texts[0]) == tokenizer.encode(texts[0])


def test_a_short_text_has_fewer_tokens_than_asked_for() -> None:
    assert 257 <= Tokenizer.train(["aaaa bbbb aaaa"], 1000).size < 270
    with pytest.raises(ValueError, match="a vocabulary of 100 is too small"):
        Tokenizer.train(["a"], 100)
    other = Tokenizer.train(["a"], 257).to_text().replace("<|endoftext|>", "<end>")
    with pytest.raises(ValueError, match=r"it has no token '<.endoftext"):
        Tokenizer.from_text(other)


# The optimizer


@pytest.mark.parametrize("warmup", [0, 1, 5, 100])
def test_the_learning_rate_rises_and_falls(warmup: int) -> None:
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=warmup, final_rate=0.1)
    rate: Any = schedule(config, 20)
    found = [float(rate(jnp.asarray(t))) for t in range(21)]
    w = min(warmup, 18)
    for t in range(20):
        if t < w:
            expected = 0.5 * (t + 1) / (w + 1)
        else:
            expected = 0.5 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (t - w) / (19 - w))))
        assert found[t] == pytest.approx(expected, rel=1e-5)
    assert found[20] == found[19] == pytest.approx(0.05)


def test_weight_decay_is_for_matrices() -> None:
    shapes = jax.eval_shape(lambda key: Decoder(MODEL, key=key), jax.random.key(0))
    mask = jax.tree.leaves_with_path(decayed(shapes))
    kept = {jax.tree_util.keystr(path, simple=True, separator=".") for path, matrix in mask if not matrix}
    assert kept == {"blocks.attention_norm.scale", "blocks.mlp_norm.scale", "norm.scale"}
    assert len(mask) == 12


def test_weight_decay_shrinks_matrices_alone() -> None:
    params = {
        "matrix": mw.param(mw.Tensor(jnp.ones((2, 3)), "embed ff")),
        "stacked scale": mw.param(mw.Tensor(jnp.ones((2, 3)), "layers embed")),
        "bias": mw.param(mw.Tensor(jnp.ones((2, 3)), "heads head_dim")),
        "norm": {"scale": mw.param(mw.Tensor(jnp.ones((2, 3)), "heads head_dim"))},
    }
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.5, warmup_steps=0, weight_decay=0.2), 10)
    zero = jax.tree.map(jnp.zeros_like, params)
    new, _ = update(optimizer, zero, optimizer.init(params), params)
    np.testing.assert_allclose(new["matrix"].array, 1 - 0.5 * 0.2, rtol=1e-6)
    np.testing.assert_array_equal(new["stacked scale"].array, 1)
    np.testing.assert_array_equal(new["bias"].array, 1)
    np.testing.assert_array_equal(new["norm"]["scale"].array, 1)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: OptimizerConfig(learning_rate=0.0), "learning_rate is 0.0; it must be positive"),
        (lambda: OptimizerConfig(warmup_steps=-1), "warmup_steps is -1"),
        (lambda: OptimizerConfig(beta2=1.0), "beta2 is 1.0"),
        (lambda: TextConfig(held_out=1.0), "held_out is 1.0"),
        (lambda: TextConfig(max_bytes=0), "max_bytes is 0"),
        (lambda: Recipe(steps=0), "steps is 0"),
        (
            lambda: Recipe(buckets=(32, 128)),
            "buckets are 32, 128 beside length=128; they are different lengths",
        ),
        (lambda: Recipe(buckets=(32, 32)), "buckets are 32, 32 beside length=128"),
        (lambda: Recipe(buckets=(0,)), "buckets are 0 beside length=128"),
        (lambda: Intervals(evaluate_every=0), "evaluate_every is 0"),
        (lambda: Sampling(temperature=-1.0), "temperature is -1.0"),
    ],
)
def test_configurations_are_checked(wrong: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        wrong()


# The report


def test_rates_are_of_the_last_steps() -> None:
    now = [0.0]
    meter, amount = Meter(clock=lambda: now[0]), Amount(100, 125)
    assert meter.tokens_per_second is None and meter.seconds_per_step is None
    meter.step(amount)
    assert meter.tokens_per_second is None
    for _ in range(4):
        now[0] += 2.0
        meter.step(amount)
    assert meter.seconds_per_step == 2.0 and meter.tokens_per_second == 50.0
    now[0] += 60.0
    meter.skip(60.0)
    now[0] += 2.0
    meter.step(amount)
    assert meter.seconds_per_step == 2.0
    for _ in range(20):
        now[0] += 1.0
        meter.step(amount)
    assert meter.seconds_per_step == 1.0 and meter.tokens_per_second == 100.0 and meter.padding == pytest.approx(0.2)
    now[0] += 1.0
    meter.step(Amount(1100, 1225))
    assert meter.tokens_per_second == 150.0 and meter.padding == pytest.approx(1 - 3000 / 3600)


def test_numbers_are_short() -> None:
    assert [show_count(n) for n in (None, 0, 999, 1234, 9996, 99960, 123456, 4.2e6, 7e9, 2e12)] == [
        "N/A", "0", "999", "1.23k", "10.0k", "100k", "123k", "4.20M", "7.00B", "2000B"
    ]  # fmt: skip
    assert [show_seconds(s) for s in (None, 0.4, 62, 3723)] == ["N/A", "0:00", "1:02", "1:02:03"]


def quiet_report(recipe: Recipe, done: int = 0) -> tuple[Report, io.StringIO]:
    written = io.StringIO()
    console = Console(file=written, width=100)
    return Report(console, steps=recipe.steps, done=done, padded=bool(recipe.buckets)), written


def test_a_terminal_shows_a_bar() -> None:
    written = io.StringIO()
    console = Console(file=written, width=100, force_terminal=True)
    with Report(console, steps=10, done=0) as report:
        report.step(1, 2.5, Amount(64, 64))
        report.step(2, 2.25, Amount(64, 64))
        report.held_out(2, 2.125)
    assert "step 0/10" in written.getvalue() and "loss N/A" in written.getvalue()
    assert "loss 2.250" in written.getvalue() and "tokens/s" in written.getvalue()
    assert "held-out loss 2.125" in written.getvalue()


# The step, under layouts


def one_device_run(steps: int) -> tuple[list[float], State]:
    """The same training without a region, a mesh or a layout."""
    optimizer: Any = make_optimizer(RECIPE.optimizer, RECIPE.steps)
    apply_updates: Any = optax.apply_updates
    batches = Batches(windows(), RECIPE.batch, ONE.mesh, ONE.layout, RECIPE.seed)

    @jax.jit
    def first(key: jax.Array) -> State:
        model: Any = Decoder(MODEL, key=key)
        return State(model, optimizer.init(model))

    @jax.jit
    def step(state: State, batch: Batch) -> tuple[State, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(state.model, batch)
        with jax.numpy_dtype_promotion("standard"):
            updates, moved = optimizer.update(gradient, state.optimizer, state.model)
        return State(apply_updates(state.model, updates), moved), value

    state, losses = first(jax.random.key(RECIPE.seed)), []
    for i in range(steps):
        state, value = step(state, batches[i])
        losses.append(float(value))
    return losses, state


@pytest.fixture(scope="module")
def expected() -> tuple[list[float], State]:
    return one_device_run(3)


@pytest.mark.parametrize("name", PLACES)
def test_training_is_the_same_under_every_layout(name: str, expected: tuple[list[float], State]) -> None:
    program = Program(RECIPE, PLACES[name])
    batches, step = program.batches(windows(), RECIPE.seed), program.step
    state, losses = first_state(program), []
    shapes = program.shapes()
    for i in range(3):
        state, value = step(state, batches[i])
        losses.append(float(value))
        for x, like in zip(jax.tree.leaves(state), jax.tree.leaves(shapes), strict=True):
            assert x.sharding.shard_shape(x.shape) == like.sharding.shard_shape(like.shape)
    np.testing.assert_allclose(losses, expected[0], rtol=1e-5)
    assert_same(mw.unshard(state), mw.unshard(expected[1]), name)


def test_first_parameters_do_not_depend_on_the_layout() -> None:
    one, split = (Program(RECIPE, p).first_state().model for p in (ONE, PLACES["tensor, FSDP, gathered once"]))
    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(one), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_state_at_rest_is_split() -> None:
    shapes = Program(RECIPE, PLACES["ZeRO-1"]).shapes()
    mlp = shapes.model.blocks.mlp
    assert isinstance(mlp, GatedMLP)
    weight, moment = mlp.up.weight, shapes.optimizer[1][0].mu.blocks.mlp.up.weight
    assert weight.array.sharding.shard_shape(weight.shape) == weight.shape
    assert moment.array.sharding.shard_shape(moment.shape) == (2, 32, 8)


def test_a_layout_is_checked_before_any_work() -> None:
    with pytest.raises(ValueError, match="'batch' of size 6 cannot be split over the axis 'data'"):
        Program(dataclasses.replace(RECIPE, batch=6), PLACES["FSDP"]).check()
    with pytest.raises(ValueError, match="Did you mean 'heads'"):
        Program(RECIPE, place("data=2,model=2", "batch:data, head:model")).check()


# The loop


def data() -> Data:
    alphabet = Tokenizer.train(["a"], 257)
    return Data(alphabet, windows(), windows(seed=1))


def trainer(recipe: Recipe, here: Place, report: Report, **options: Any) -> Trainer:
    program = Program(recipe, here)
    return Trainer(program, data(), first_state(program), 0, report, **{"intervals": Intervals(), **options})


def test_the_loss_falls() -> None:
    recipe = dataclasses.replace(RECIPE, steps=60)
    report, written = quiet_report(recipe)
    run = trainer(recipe, PLACES["FSDP"], report, intervals=Intervals(evaluate_every=30))
    run.train()
    lines = written.getvalue().splitlines()
    assert run.done == 60 and run.held_out is not None and run.held_out < 2.5
    assert lines[0].startswith("step  1/60  loss  ") and "N/A tokens/s" in lines[0]
    assert sum("held-out loss" in line for line in lines) == 2
    assert float(lines[0].split()[3]) > 4 and float(lines[-2].split()[3]) < 2.5


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    assert finite(jnp.float32(1.5), 1) == 1.5
    recipe = dataclasses.replace(RECIPE, steps=50, optimizer=OptimizerConfig(learning_rate=1e30, warmup_steps=0))
    report, _ = quiet_report(recipe)
    with pytest.raises(ValueError, match=r"The loss of step [0-9]+ is (nan|inf): the run has diverged"):
        trainer(recipe, ONE, report).train()


def test_a_checkpoint_goes_on_under_another_layout(tmp_path: Path) -> None:
    report, _ = quiet_report(RECIPE)
    whole = trainer(RECIPE, ONE, report)
    whole.train()
    folder = tmp_path / "run"
    with Checkpoints(folder) as checkpoints:
        half = trainer(RECIPE, PLACES["FSDP"], report, intervals=Intervals(save_every=2), checkpoints=checkpoints)
        for _ in range(2):
            half._advance()
        half._aside(half._save)
    other = Program(RECIPE, PLACES["tensor, FSDP, gathered once"])
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.last == 2
        recipe, tokenizer = checkpoints.run()
        assert recipe == RECIPE and tokenizer.to_text() == data().tokenizer.to_text()
        state = checkpoints.state(other.shapes())
        model = checkpoints.model(Program(RECIPE, ONE).shapes().model)
    assert_same(mw.unshard(model), mw.unshard(state.model), "the model alone")
    mlp = state.model.blocks.mlp
    assert isinstance(mlp, GatedMLP)
    assert mlp.up.weight.array.sharding.shard_shape((2, 32, 64)) == (2, 16, 32)
    rest = Trainer(other, data(), state, 2, report, Intervals())
    rest.train()
    assert rest.done == 4
    assert_same(mw.unshard(rest.state), mw.unshard(whole.state), "gone on")


def test_a_folder_without_checkpoints_says_so(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "none") as checkpoints, pytest.raises(ValueError, match="There is no checkpoint in"):
        checkpoints.run()
    assert not (tmp_path / "none").exists()


def test_a_recipe_survives_json(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, text=TextConfig(data=(tmp_path / "a",), max_bytes=5))
    for each in (recipe, dataclasses.replace(recipe, buckets=(4, 8))):
        assert Recipe.from_json(json.loads(json.dumps(each.to_json()))) == each
    wider = dataclasses.replace(RECIPE, model=dataclasses.replace(MODEL, ff=128, dtype="bfloat16"))
    with pytest.raises(ValueError, match="has ff=64, and ff=128 is asked for"):
        wider.check_continues(RECIPE)
    dataclasses.replace(RECIPE, model=dataclasses.replace(MODEL, dtype="bfloat16")).check_continues(RECIPE)


# Text from a model


def test_only_the_most_probable_tokens_are_drawn() -> None:
    logits = jnp.asarray([0.0, 3.0, 1.0, 2.0])
    keys = jax.random.split(jax.random.key(0), 200)

    def drawn(sampling: Sampling) -> set[int]:
        return set(np.asarray(jax.vmap(lambda key: choose(logits, key, sampling))(keys)).tolist())

    assert drawn(Sampling(top_k=2, temperature=5.0)) == {1, 3}
    assert drawn(Sampling(top_k=0, temperature=5.0)) == {0, 1, 2, 3}
    assert drawn(Sampling(top_k=100, temperature=5.0)) == {0, 1, 2, 3}
    assert drawn(Sampling(temperature=0.0)) == drawn(Sampling(top_k=1)) == drawn(Sampling(temperature=0.01)) == {1}


def greedy(model: Decoder, sequence: Sequence[int], num: int, length: int) -> list[int]:
    """The most probable tokens by a forward pass over the last ``length`` tokens, without padding."""
    sequence = list(sequence)
    for _ in range(num):
        ids = mw.Tensor(jnp.asarray([sequence[-length:]], jnp.int32), "batch length")
        sequence.append(int(jnp.argmax(model(ids).array[0, -1])))
    return sequence[-num:]


def test_text_is_what_the_model_finds_probable() -> None:
    config = dataclasses.replace(MODEL, vocab=288)
    tokenizer = Tokenizer.train(["a"], 257)
    here = place("data=2,model=2", "batch:data, vocab:model, ff:model", params="embed:data")
    recipe = dataclasses.replace(RECIPE, model=config, seed=1)
    model = first_state(Program(recipe, here)).model
    length, num = 6, 9
    expected = greedy(mw.unshard(model), [tokenizer.end, *tokenizer.encode("abc")], num, length)
    assert tokenizer.end not in expected
    sampling = Sampling(tokens=num, temperature=0.0)
    written = generate(model, tokenizer, "abc", here, length=length, sampling=sampling)
    assert written == tokenizer.decode(expected)
