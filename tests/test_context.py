"""Context parallelism in the decoder: packed documents under every layout, and what the compiled program sends.

Layouts that split the length, round a ring or by heads, are those of ``test_decoder.py``.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import numpy as np
import pytest

import meshwright as mw
from meshwright.models import Decoder
from meshwright.nn import cross_entropy
from meshwright.plan.plan import Plan

from .laws import Way, assert_same
from .test_decoder import CONFIG, CONTEXT, LAYOUTS, TENSOR, _batch, _loss, _shapes
from .test_plan_exact import NO_MERGING, _compiled, _planned, _sizes, _totals

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
    other = mw.Tensor(np.where(SEGMENTS < SEGMENTS[:, -1:], 0, ids.array), "batch length")
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
