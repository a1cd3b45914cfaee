"""Context parallelism in the decoder: packed documents under every layout, and what the compiled program sends.

Layouts that split the length, round a ring or by heads, are those of ``test_decoder.py``.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

import meshwright as mw
from meshwright import Tensor
from meshwright.explain import show_bytes
from meshwright.models import Decoder
from meshwright.models.decoder import num_parameters
from meshwright.nn import cross_entropy
from meshwright.plan.context import Context, contexts_of
from meshwright.plan.plan import Plan
from meshwright.plan.warnings import PlanWarning

from .laws import Way, assert_same
from .test_decoder import CONFIG, CONTEXT, LAYOUTS, TENSOR, _batch, _loss, _shapes
from .test_plan_exact import NO_MERGING, _compiled, _planned, _totals
from .test_plan_warnings import known, shapes

STARTS = np.random.default_rng(1).random((8, 16)) < 0.2
SEGMENTS = np.cumsum(STARTS, 1).astype(np.int32)
PLACES = np.broadcast_to(np.arange(16), (8, 16))
POSITIONS = (PLACES - np.maximum.accumulate(np.where(STARTS, PLACES, 0), 1)).astype(np.int32)
WINDOW = 5


def _packed(window: int | None) -> tuple[Any, ...]:
    model = Decoder(dataclasses.replace(CONFIG, window=window), key=jax.random.key(0))
    return model, *_batch(), mw.Tensor(SEGMENTS, "batch length"), mw.Tensor(POSITIONS, "batch length")


def _packed_loss(model: Decoder, ids: Any, targets: Any, segments: Any, positions: Any) -> Any:
    return mw.mean(cross_entropy(model(ids, segments=segments, positions=positions), targets))


@functools.cache
def _on_one_device(window: int | None) -> Any:
    return jax.jit(jax.value_and_grad(_packed_loss))(*_packed(window))


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize(("mesh", "layout", "options"), CONTEXT, ids=str)
def test_packed_documents_are_the_same_under_every_layout(
    mesh: str, layout: str, options: dict[str, Any], window: int | None
) -> None:
    way = Way(mesh, layout, options)
    found = jax.jit(jax.value_and_grad(way.region(_packed_loss)))(*_packed(window))
    assert_same(found, _on_one_device(window), f"{way}: loss and gradients")


def test_a_document_and_a_window_end_what_a_token_sees() -> None:
    """Tokens beyond either change nothing."""
    model, ids, _, segments, positions = _packed(None)
    whole = model(ids, segments, positions)
    other = mw.Tensor(np.where(SEGMENTS[:, -1:] == SEGMENTS, ids.array, 0), "batch length")
    np.testing.assert_allclose(model(other, segments, positions).array[:, -1], whole.array[:, -1], rtol=1e-5)
    near = dataclasses.replace(CONFIG, window=3)
    model = Decoder(near, key=jax.random.key(0))
    far = mw.Tensor(ids.array.at[:, : -(2 * near.layers + 1)].set(0), "batch length")
    np.testing.assert_allclose(model(far).array[:, -1], model(ids).array[:, -1], rtol=1e-5)
    assert not np.allclose(model(far).array[:, -2], model(ids).array[:, -2])
    with pytest.raises(ValueError, match="window is 0; a token sees itself at least"):
        dataclasses.replace(CONFIG, window=0)


# What is sent


def _plan(way: Way, loss: Any = _loss, *more: Any, **options: Any) -> Plan:
    program = jax.value_and_grad(way.region(loss))
    return mw.plan(program, _shapes(2, **{"unroll": False, **options}), *_batch(), *more)


def _kinds(plan: Plan, sizes: dict[str, int]) -> dict[str, int]:
    """Of the compiled program: bytes by kind; they are those of the plan."""
    planned = _totals(_planned(plan, sizes))
    assert planned == _totals(_compiled(plan, sizes, NO_MERGING))
    found: dict[str, int] = {}
    for (kind, _), num_bytes in planned.items():
        found[kind] = found.get(kind, 0) + num_bytes
    return found


@pytest.mark.parametrize(("mesh", "layout", "options"), [*LAYOUTS, CONTEXT[0], CONTEXT[1]], ids=str)
def test_renames_move_nothing_where_the_layout_does_not_speak_of_the_names(
    mesh: str, layout: str, options: dict[str, Any]
) -> None:
    rows = _plan(Way(mesh, layout, options)).collectives
    assert "residual_length" in layout or not [row for row in rows if row.origin.operation == "rename"]


GRADIENTS_AND_LOSS = 4 * num_parameters(CONFIG) + 4


def test_a_ring_permutes_and_gathers_nothing() -> None:
    """What is all-reduced are the parameters' gradients and the loss."""
    found = _kinds(_plan(Way("context=4", "length:context")), {"context": 4})
    assert set(found) == {"permute", "all_reduce"}
    assert found["all_reduce"] == GRADIENTS_AND_LOSS


def test_heads_split_instead_are_all_to_alls() -> None:
    plan = _plan(Way("context=4", "length:context, attention_heads:context"))
    found = _kinds(plan, {"context": 4})
    assert set(found) == {"all_to_all", "all_reduce"}
    assert found["all_reduce"] == GRADIENTS_AND_LOSS
    queries = 8 * 4 * 4 * 2 * 4 * 4  # batch, length, heads, group, head_dim on a device, float32
    assert found["all_to_all"] == CONFIG.layers * 2 * (2 * queries + 2 * queries // CONFIG.group)


def test_parameters_at_rest_are_all_that_is_gathered() -> None:
    for layout in ("batch:data, length:context", "batch:data, length:context, attention_heads:context"):
        plan = _plan(Way("data=2,context=4", layout, {"params": "embed:(data,context)"}))
        found = _kinds(plan, {"data": 2, "context": 4})
        moved = "all_to_all" if "heads" in layout else "permute"
        assert set(found) == {"all_gather", "reduce_scatter", "all_reduce", moved}
        assert (found["reduce_scatter"], found["all_reduce"]) == (GRADIENTS_AND_LOSS - 4, 4)
        for row in plan.collectives:
            assert row.kind != "all_gather" or not {"batch", "length", "attention_length"}.intersection(row.origin.dims)


def test_sequence_parallelism_scatters_and_gathers() -> None:
    """The embedding's sum and two a layer are scattered, two a layer and the head's input gathered; and back."""
    plan = _plan(Way("model=4", f"{TENSOR}, residual_length:model"))
    found = _kinds(plan, {"model": 4})
    activation, tokens = 8 * 16 * CONFIG.embed * 4, 8 * 16 * 4
    assert set(found) == {"reduce_scatter", "all_gather", "all_reduce"}
    assert found["reduce_scatter"] == found["all_gather"] == (4 * CONFIG.layers + 2) * activation
    assert all(row.payload_bytes <= tokens for row in plan.collectives if row.kind == "all_reduce")


def test_document_numbers_are_gathered_once_not_in_each_layer() -> None:
    segments, positions = _packed(None)[3:]
    way = Way("context=4", "length:context, attention_heads:context")
    rows = _plan(way, _packed_loss, segments, positions, remat="nothing").collectives
    assert [(r.payload_bytes, r.times) for r in rows if r.kind == "all_gather"] == [(8 * 16 * 4, 1)]


# Which way is cheaper

RING, HEADS, GROUP = "length:x", "length:x, attention_heads:x", "length:x, attention_group:x"
SIGHTS = [{"causal": True}, {}, {"causal": True, "window": 20}, {"window": 20}, {"causal": True, "window": 1}]


def _looking(q: Tensor, k: Tensor, v: Tensor, **sight: Any) -> Any:
    q = q.rename(length="attention_length", heads="attention_heads", group="attention_group")
    k, v = (x.rename(length="attention_length", heads="attention_heads") for x in (k, v))
    out = mw.attention(q, k, v, over="attention_length", **sight)
    out = out.rename(attention_length="length", attention_heads="heads", attention_group="group")
    return mw.sum(out.astype("float32") ** 2)


def _attention(layout: str, mesh: mw.Mesh, sight: dict[str, Any], dtype: str = "float32", **sizes: int) -> Plan:
    sizes = {"batch": 2, "length": 128, "heads": 8, "group": 4, "head_dim": 16, **sizes}
    text = " ".join(f"{name}={size}" for name, size in sizes.items())
    q, k = shapes(text, dtype), shapes(text.replace(f"group={sizes['group']} ", ""), dtype)
    placed = mw.shard((q, k, k), mesh, mw.Layout(layout))
    region = mw.spmd(functools.partial(_looking, **sight), mesh, mw.Layout(layout))
    return mw.plan(jax.value_and_grad(region, (0, 1, 2)), *placed).on(mesh)


def _context(plan: Plan) -> Context:
    (context,) = contexts_of(known(plan))
    return context


def _sent(rows: Any) -> collections.Counter[tuple[str, str, int]]:
    found: collections.Counter[tuple[str, str, int]] = collections.Counter()
    for row in rows:
        if row.origin.operation in ("attention", "rename"):
            found[row.kind, row.dtype, row.payload_bytes] += row.times
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sight", SIGHTS, ids=str)
@pytest.mark.parametrize("num", [2, 4])
def test_a_plan_knows_what_the_other_way_would_send(num: int, sight: dict[str, Any], dtype: str) -> None:
    """Collective by collective, from either side."""
    mesh = mw.Mesh(f"x={num}", topology=f"tpu:v5e:{num}x1" if num < 4 else "tpu:v5e:2x2")
    plans = {layout: _attention(layout, mesh, sight, dtype) for layout in (RING, HEADS, GROUP)}
    actual = {layout: _sent(plan.collectives) for layout, plan in plans.items()}
    for layout, plan in plans.items():
        context = _context(plan)
        assert context.around == (layout == RING)
        assert context.dim == ("attention_group" if layout == GROUP else "attention_heads")
        assert _sent(context.ring.rows) == actual[RING]
        assert _sent(context.moved.rows) == actual[GROUP if layout == GROUP else HEADS]


def _told(plan: Plan) -> list[PlanWarning]:
    return [w for w in plan.warnings if w.kind == "attention"]


@pytest.mark.parametrize(
    ("topology", "sight", "sizes", "cheaper"),
    [
        ("tpu:v5p:2x2x1", {"causal": True}, {"length": 1024, "group": 1}, HEADS),
        ("gpu:h100:4", {"causal": True}, {"length": 1024}, HEADS),
        ("tpu:v5p:2x2x1", {}, {"length": 1024}, RING),  # about as many bytes, of which products hide a ring's
        ("tpu:v5p:2x2x2", {"causal": True}, {"length": 65536}, RING),  # three times the bytes, and time to hide them
    ],
)
def test_a_plan_says_which_way_is_cheaper(
    topology: str, sight: dict[str, Any], sizes: dict[str, int], cheaper: str
) -> None:
    """As the times of both plans say."""
    mesh = mw.Mesh({"x": math.prod(map(int, topology.split(":")[2].split("x")))}, topology=topology)
    sizes = {"group": 8, "head_dim": 128, **sizes}
    plans = {layout: _attention(layout, mesh, sight, "bfloat16", **sizes) for layout in (RING, HEADS)}
    dearer = HEADS if cheaper == RING else RING
    assert plans[cheaper].time().seconds < plans[dearer].time().seconds
    assert not _told(plans[cheaper])
    (warning,) = _told(plans[dearer])
    ring, moved = _context(plans[RING]).ring, _context(plans[HEADS]).moved
    assert ring.seconds is not None and moved.seconds is not None
    assert warning.seconds == pytest.approx(abs(ring.seconds - moved.seconds))
    assert all(show_bytes(way.sent_bytes) in warning.message for way in (ring, moved))
    assert f"{1e3 * moved.seconds:.3g} ms that no product hides" in warning.message


def test_without_a_machine_bytes_decide() -> None:
    """A window asks one neighbour, and heads split are moved all the same; without one, the reverse."""
    (warning,) = _told(_plan(Way("context=4", "length:context")))
    assert "sends 128 KiB a device round a ring, and 36.0 KiB with attention_heads split" in warning.message
    assert "attention_heads:context" in warning.remedy and warning.message.endswith("This is the ring.")
    assert (warning.num_bytes, warning.seconds) == ((128 - 36) * 1024, None)
    assert warning.place.startswith("decoder.py:")
    assert not _told(_plan(Way("context=4", "length:context, attention_heads:context")))
    assert not _told(_plan(Way("context=4", "length:context"), window=2))
    (warning,) = _told(_plan(Way("context=4", "length:context, attention_heads:context"), window=2))
    assert "This is the latter." in warning.message and "attention is a ring" in warning.remedy
    (warning,) = _told(_plan(Way("model=2,context=2", f"{TENSOR}, length:context")))
    assert "attention_heads:(model,context)" in warning.remedy


def test_heads_that_the_axis_does_not_divide_leave_the_ring() -> None:
    assert not _told(_plan(Way("context=8", "length:context")))
    assert not _told(_plan(Way("model=4,context=2", f"{TENSOR}, length:context")))
    assert not _told(_plan(Way("context=4", "batch:context"))), "a length that is not split"


def test_masks_of_documents_are_made_block_by_block_in_every_layer() -> None:
    """What depends on no layer JAX takes out of the loop over layers: a mask there would be held whole."""
    config = dataclasses.replace(CONFIG, remat="nothing")
    model = jax.eval_shape(lambda key: Decoder(config, key=key), jax.random.key(0))
    tokens = mw.Tensor(np.zeros((1, 4096), np.int32), "batch length")
    region = Way("context=2", "length:context").region(_packed_loss)
    traced = jax.jit(jax.value_and_grad(region)).trace(model, tokens, tokens, tokens, tokens)
    masks = [v.aval.size for v in _made(traced.jaxpr.jaxpr) if v.aval.dtype == bool]
    block = config.heads * config.group * (4096 // 2 // 2) * 512
    assert masks and max(masks) <= block


def _made(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield from (v for v in eqn.outvars if hasattr(v.aval, "dtype"))
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _made(inner)
