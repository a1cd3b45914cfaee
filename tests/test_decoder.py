"""The decoder: its arithmetic against positional JAX written by hand, and its training step under every layout.

The hand-written side (``benchmarks/handwritten.py``) knows nothing of names; the layouts are compared with the step on
one device without a region. What a step communicates is read from the compiled program.
"""

import collections
import dataclasses
import functools
import re
import sys
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import optax
import pytest

import meshwright as mw
from meshwright.models import Decoder, DecoderConfig
from meshwright.nn import cross_entropy

from .laws import Way, assert_same, tensor
from .stablehlo import communicated, traffic_of

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import handwritten

CONFIG = DecoderConfig(vocab=64, embed=16, layers=2, heads=4, group=2, head_dim=4, ff=32)
TENSOR = "heads:model, ff:model, vocab:model"


def _with_gradient(loss: Any) -> Any:
    return jax.value_and_grad(loss)


def _batch() -> tuple[mw.Tensor, mw.Tensor]:
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab, (8, 17)).astype(np.int32)
    return mw.Tensor(tokens[:, :-1], "batch length"), mw.Tensor(tokens[:, 1:], "batch length")


def _loss(model: Decoder, ids: Any, targets: Any) -> Any:
    return mw.mean(cross_entropy(model(ids), targets))


@pytest.fixture(scope="module")
def model() -> Decoder:
    return Decoder(CONFIG, key=jax.random.key(0))


def test_the_arithmetic_is_that_of_positional_jax(model: Decoder) -> None:
    ids, targets = _batch()
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    by_hand = handwritten.jitted_loss(CONFIG, mesh, handwritten.Plan())
    with jax.numpy_rank_promotion("allow"):
        expected, wanted = jax.jit(jax.value_and_grad(by_hand))(
            handwritten.from_decoder(model), ids.array, targets.array
        )
    found, gradient = jax.jit(_with_gradient(_loss))(model, ids, targets)
    assert_same((found, handwritten.from_decoder(gradient)), (expected, wanted), "by hand")


# The training step under layouts

LAYOUTS = [
    ("data=1", "batch:data", {}),
    ("data=2", "batch:data", {}),
    ("data=8", "batch:data", {"params": "embed:data"}),
    ("data=8", "batch:data", {"params": "data", "gather": "step"}),
    ("model=2", TENSOR, {}),
    ("model=4", TENSOR + ", residual_length:model", {}),
    ("data=2,model=4", f"batch:data, {TENSOR}", {}),
    ("data=4,model=2", f"batch:data, {TENSOR}", {"params": "embed:data"}),
    ("data=4,model=2", f"batch:data, {TENSOR}, residual_length:model", {"params": "data", "gather": "step"}),
    ("pod=2,data=2,model=2", f"batch:(pod,data), {TENSOR}", {"params": "(pod,data)"}),
    ("pod=2,data=4", "batch:(pod,data)", {"params": "embed:data"}),
    (
        "data=2,model=2,context=2",
        f"batch:data, {TENSOR}, length:context, residual_length:context",
        {"params": "embed:data"},
    ),
    ("a=2,b=2,c=2", "group:a, ff:(b,a), vocab:(a,b), batch:c", {"params": "embed:b", "gather": "step"}),
    ("x=8", "embed:x", {}),
    ("model=4", f"{TENSOR}, residual_length:model", {"overlap": "model"}),
    ("data=2,model=4", f"batch:data, {TENSOR}, residual_length:model", {"params": "embed:data", "overlap": "model"}),
]
CONTEXT = [
    ("context=4", "length:context", {}),
    ("data=2,model=2,context=2", f"batch:data, {TENSOR}, length:context", {}),
    ("data=2,context=4", "batch:data, length:context", {"params": "embed:(data,context)"}),
    ("context=4", "length:context, attention_heads:context", {}),
    ("model=2,context=2", f"{TENSOR}, length:context, attention_heads:(model,context)", {"params": "embed:context"}),
    ("context=2", "length:context, attention_group:context", {}),
    ("model=2,context=2", f"{TENSOR}, length:context, residual_length:(context,model)", {}),
    ("ring=2,heads=2", "length:(ring,heads), attention_heads:heads", {}),
]
"""The length split: round a ring, by heads, by query heads, with tensor and sequence parallelism, and both at once."""


def _train(model: Decoder, loss: Any, steps: int = 3) -> Any:
    # With a tiny epsilon Adam's first updates are the signs of the gradients, and a sign magnifies rounding.
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, eps=1e-3, weight_decay=0.1))
    state = model, optimizer.init(cast(Any, model))
    batch = _batch()

    @jax.jit
    def step(state: Any) -> Any:
        model, moments = state
        value, gradient = jax.value_and_grad(loss)(model, *batch)
        with jax.numpy_dtype_promotion("standard"):  # Optax adds integers to floats
            updates, moments = optimizer.update(gradient, moments, model)
        return (optax.apply_updates(model, updates), moments), value

    losses = []
    for _ in range(steps):
        state, value = step(state)
        losses.append(value)
    return losses, state[0]


@functools.cache
def _on_one_device() -> Any:
    return _train(Decoder(CONFIG, key=jax.random.key(0)), _loss)


@pytest.mark.parametrize("partitioner", ["names", "xla"])
@pytest.mark.parametrize(("mesh", "layout", "options"), LAYOUTS + CONTEXT, ids=str)
def test_three_steps_are_the_same_under_every_layout(
    model: Decoder, mesh: str, layout: str, options: dict[str, Any], partitioner: str
) -> None:
    way = Way(mesh, layout, options, partitioner)
    found = _train(model, way.region(_loss))
    assert_same(found, _on_one_device(), f"{way}: losses and parameters")


# What a step communicates, from the compiled program


def _collectives(text: str) -> dict[str, int]:
    kinds = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
    return {k: len(re.findall(rf" {k}(?:-start)?\(", text)) for k in kinds}


def _shapes(layers: int, **options: Any) -> Decoder:
    config = dataclasses.replace(CONFIG, **{"layers": layers, "unroll": True, **options})
    return jax.eval_shape(lambda key: Decoder(config, key=key), jax.random.key(0))


def _compiled(way: Way, layers: int) -> str:
    return str(jax.jit(_with_gradient(way.region(_loss))).lower(_shapes(layers), *_batch()).compile().as_text())


def test_tensor_parallelism_is_two_all_reduces_a_layer_each_way() -> None:
    way = Way("model=2", TENSOR)
    two, three = (_collectives(_compiled(way, n)) for n in (2, 3))
    assert three["all-reduce"] - two["all-reduce"] == 4
    assert sum(two.values()) == two["all-reduce"]


def test_tensor_parallelism_sums_five_times_besides_the_layers() -> None:
    """The embedding, and for the loss its maximum, its sum, its target and the gradient of its input."""
    program = jax.jit(jax.value_and_grad(Way("model=2", TENSOR).region(_loss)))
    found = traffic_of(program.lower(_shapes(3, unroll=False), *_batch()), {"model": 2})
    runs = [times for (kind, _, _, times), count in found.items() for _ in range(count) if kind == "all_reduce"]
    assert sorted(runs) == [1] * 5 + [3] * 4 and len(runs) == found.total()


def test_fsdp_reduce_scatters_gradients_and_never_all_reduces_a_parameter() -> None:
    way = Way("data=4", "batch:data", {"params": "embed:data"})
    text = _compiled(way, 2)
    found = _collectives(text)
    parameters = 3 + 2 * 9
    assert found["reduce-scatter"] == parameters
    assert found["all-gather"] >= parameters
    assert found["all-to-all"] == found["collective-permute"] == 0
    reduced = re.findall(r"= (\S+) all-reduce(?:-start)?\(", text)
    assert reduced and all(shape.startswith("f32[]") for shape in reduced), (
        f"only the loss is all-reduced, found {reduced}"
    )


def test_rematerialised_layers_gather_a_parameter_once_for_their_backward_pass() -> None:
    """Twice in all, as FSDP does: not once for what is computed again and once more for the gradients."""
    way = Way("data=4", "batch:data", {"params": "embed:data"})
    program = jax.jit(jax.value_and_grad(way.region(_loss)))
    for policy in ("nothing", "dots"):
        found = communicated(program, _shapes(2, remat=policy, unroll=False), *_batch())
        matrices = [size for kind, size in found if kind == "all_gather" and size > CONFIG.embed]
        assert len(matrices) == 2 * 7 + 2 + 1, f"{policy}: seven in a layer, the table once, the head twice"


def test_a_layout_only_renames_devices(model: Decoder) -> None:
    """Two meshes that say the same with other axis names lower to the same program."""
    one, two = Way("data=2,model=2", f"batch:data, {TENSOR}"), Way("p=2,q=2", "batch:p, heads:q, ff:q, vocab:q")
    texts = [
        _collectives(str(jax.jit(jax.grad(w.region(_loss))).lower(model, *_batch()).compile().as_text()))
        for w in (one, two)
    ]
    assert texts[0] == texts[1]


def test_sequence_parallelism_has_no_all_reduce_of_activations() -> None:
    text = _compiled(Way("model=4", TENSOR + ", residual_length:model"), 2)
    activation = 8 * 16 * 16
    for shape in re.findall(r"= \(?(?:f32\[)([\d,]*)\]\S* all-reduce(?:-start)?\(", text):
        size = int(np.prod([int(s) for s in shape.split(",") if s]))
        assert size < activation // 4, f"an all-reduce of f32[{shape}] in a sequence-parallel layout"


@pytest.mark.parametrize("remat", [None, "nothing"])
def test_with_overlap_the_embedding_alone_gathers_and_scatters_activations(remat: str | None) -> None:
    """Each other gather and scatter of the residual stream is n - 1 permutes of a slice: two and two in a layer, the
    head's, and what is done again."""
    layout = f"{TENSOR}, residual_length:model"
    plain, rings = (
        collections.Counter(
            communicated(
                jax.value_and_grad(Way("model=4", layout, options).region(_loss)),
                _shapes(2, remat=remat),
                *_batch(),
            )
        )
        for options in ({}, {"overlap": "model"})
    )
    activation = 8 * 16 * CONFIG.embed
    again = 0 if remat is None else 3  # its two gathers, and the scatter that the feed-forward layer needs
    assert plain["all_gather", activation // 4] + plain["reduce_scatter", activation] == 2 * (1 + 2 + 2 + 1) + again
    assert rings["collective_permute", activation // 4] == 3 * (2 * (2 + 2 + 1) + again)
    assert rings["all_gather", activation // 4] == rings["reduce_scatter", activation] == 1
    assert {what: n for what, n in plain.items() if what[0] == "all_reduce"} == {
        what: n for what, n in rings.items() if what[0] == "all_reduce"
    }


def test_initial_values_are_bit_identical_under_a_layout() -> None:
    """Compiled as users compile: with the tests' fast and rough code, the last bit of a float is XLA's to choose."""
    way = Way("data=4,model=2", f"batch:data, {TENSOR}", {"params": "embed:data"})
    options = {"xla_backend_optimization_level": 3, "xla_backend_extra_options": ""}

    def initial(key: Any) -> Decoder:
        return Decoder(CONFIG, key=key)

    key = jax.random.key(0)
    found, expected = (
        jax.jit(f).lower(key).compile(compiler_options=options)(key) for f in (way.region(initial), initial)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_bfloat16_computation_gathers_half_the_bytes() -> None:
    way = Way("data=4", "batch:data", {"params": "embed:data"})
    text = jax.jit(way.region(_loss)).lower(_shapes(2, dtype="bfloat16"), *_batch()).as_text()
    gathered = re.findall(r"stablehlo.all_gather.*?-> tensor<[\dx]*x(\w+)>", text, re.DOTALL)
    matrices = [d for d in gathered if d == "bf16"]
    assert len(matrices) == 2 + 7, gathered
    assert len(gathered) - len(matrices) == 2 + 1, "the norms' scales stay in float32"


def test_a_gradient_is_scattered_before_it_is_summed_over_further_axes() -> None:
    """FSDP inside a wider data axis: what crosses the outer axis is a slice of each gradient, not the whole."""
    for layout, options in (
        ("batch:(pod,data)", {"params": "embed:data"}),
        ("batch:data, length:pod, residual_length:pod", {"params": "embed:data"}),
    ):
        program = jax.jit(jax.value_and_grad(Way("pod=2,data=4", layout, options).region(_loss)))
        found = communicated(program, _shapes(2), *_batch())
        scattered = [size for kind, size in found if kind == "reduce_scatter"]
        assert scattered
        summed = [size for kind, size in found if kind == "all_reduce"]
        assert max(summed) <= max(scattered) // 4, (layout, max(summed), max(scattered))


def test_what_two_uses_of_a_parameter_give_is_added_before_it_is_summed() -> None:
    """Tied embeddings: the gradients of the lookup and of the product are one all-reduce."""
    vocab, embed, batch = mw.dims(vocab=64, embed=32, batch=16)

    def loss(table: mw.Tensor, ids: mw.Tensor) -> Any:
        found = mw.take(table, ids, "vocab")
        return mw.mean(mw.logsumexp(mw.dot(found, table, over="embed"), "vocab"))

    table, ids = tensor(vocab, embed, role="parameter"), mw.Tensor(np.arange(16) * 3 % 64, (batch,))
    options: dict[str, str]
    for layout, options, num in (
        ("batch:data", {}, 64 * 32),
        ("batch:(pod,data)", {"params": "embed:data"}, 64 * 32 // 4),
    ):
        gradient = jax.grad(Way("pod=2,data=4", layout, options).region(loss))
        summed = [size for kind, size in communicated(gradient, table, ids) if kind == "all_reduce" and size >= num]
        assert summed == [num], layout
        (row,) = [
            row
            for row in mw.plan(gradient, table, ids).collectives
            if row.payload_bytes == num * 4 and row.kind == "all_reduce"
        ]
        assert set(row.origin.dims) == {"vocab", "embed"}
        assert_same(gradient(table, ids), jax.grad(loss)(table, ids), layout)
