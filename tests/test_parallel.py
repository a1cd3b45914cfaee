"""Law 1 for whole networks: one transformer, dense and with experts, under every kind of parallelism on eight devices.

Loss, gradients and the state after three steps of AdamW are those of one device without a region, to 1e-5 of each
array's largest value. The documents are packed, so that segments and positions travel too.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

import meshwright as mw
from meshwright.models import Decoder, DecoderConfig, ExpertsConfig
from meshwright.train import Batch, OptimizerConfig, Place, State, loss, make_optimizer
from meshwright.train.optimizer import update
from meshwright.train.step import objective, placed

from .laws import assert_same

DENSE = DecoderConfig(vocab=32, embed=32, layers=4, heads=4, group=2, head_dim=8, ff=64)
EXPERTS = DecoderConfig(
    vocab=32, embed=32, layers=4, heads=4, head_dim=8, ff=32, experts=ExpertsConfig(num_experts=8, shared_ff=32)
)
DROPLESS = DecoderConfig(
    vocab=32, embed=32, layers=4, heads=4, head_dim=8, ff=32,
    experts=ExpertsConfig(num_experts=8, dispatch="dropless", scores="sigmoid", balance_loss=0.1),
)  # fmt: skip
# An epsilon that keeps Adam's first updates from being signs, which magnify rounding.
OPTIMIZER: Any = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=1, epsilon=1e-3), 4)
STEPS = 3
TENSOR = "heads:model, ff:model, vocab:model"
SEQUENCE = f"{TENSOR}, residual_length:model"
CUBE = "data=2, pipe=2, model=2"

Case = tuple[str, str, dict[str, Any]]
LAYOUTS: list[Case] = [
    ("data=8", "batch:data", {}),
    ("data=8", "batch:data", {"params": "data"}),
    ("data=8", "batch:data", {"params": "embed:data", "gather": "step"}),
    ("data=8", "batch:data", {"params": "", "optimizer": "data"}),
    ("data=8", "batch:data", {"params": "data", "microbatches": 2}),
    ("dcn=2, data=4", "batch:(dcn,data)", {}),
    ("dcn=2, data=2, model=2", f"batch:(dcn,data), {TENSOR}", {"params": "embed:data"}),
    ("data=2, model=4", f"batch:data, {TENSOR}", {}),
    ("data=2, model=4", f"batch:data, {TENSOR}", {"params": "data", "microbatches": 4}),
    ("data=4, model=2", f"batch:data, {SEQUENCE}", {"params": "data"}),
    ("data=2, model=4", f"batch:data, {SEQUENCE}", {"overlap": "model"}),
    ("data=4, model=2", f"batch:data, {SEQUENCE}", {"overlap": "model", "params": "embed:data"}),
    ("context=8", "length:context", {}),
    ("data=2, context=4", "batch:data, length:context", {"params": "data"}),
    ("data=2, context=4", "batch:data, length:context", {"params": "embed:(data,context)", "microbatches": 2}),
    ("data=2, context=4", "batch:data, length:context, attention_heads:context", {"params": "data"}),
    (
        "data=2, context=2, model=2",
        f"batch:data, length:context, {TENSOR}, residual_length:(context,model)",
        {"params": "data"},
    ),
    ("context=2, model=4", f"length:context, {TENSOR}, residual_length:(context,model)", {"overlap": "model"}),
    ("pipe=4, data=2", "layers:pipe, batch:data", {"microbatches": 4}),
    ("pipe=4, data=2", "layers:pipe, batch:data", {"microbatches": 2, "schedule": "gpipe", "params": "data"}),
    ("pipe=2, data=4", "layers:pipe, batch:data", {"microbatches": 2, "virtual_stages": 2, "params": "embed:data"}),
    (CUBE, f"batch:data, layers:pipe, {TENSOR}", {"microbatches": 4}),
    (CUBE, f"batch:data, layers:pipe, {SEQUENCE}", {"microbatches": 4, "params": "data", "gather": "step"}),
    (CUBE, f"batch:data, layers:pipe, {TENSOR}", {"microbatches": 4, "virtual_stages": 2, "params": "data"}),
    ("pipe=2, context=4", "layers:pipe, length:context", {"microbatches": 4, "params": "context"}),
    (
        "pipe=2, context=2, model=2",
        "layers:pipe, length:context, heads:model, attention_heads:(model,context)",
        {"microbatches": 2},
    ),
]
SPARSE: list[Case] = [
    ("data=8", "batch:data, experts:data", {}),
    ("data=8", "batch:data, experts:data", {"params": "data", "microbatches": 2}),
    ("data=2, expert=4", "batch:(data,expert), experts:expert", {"params": "data"}),
    ("data=4, expert=2", "batch:data, experts:expert", {}),
    ("data=4, model=2", f"batch:data, experts:data, {TENSOR}", {}),
    ("data=4, model=2", f"batch:data, experts:data, {SEQUENCE}", {"params": "embed:data", "overlap": "model"}),
    ("data=2, context=4", "batch:data, experts:data, length:context", {"params": "data"}),
    ("data=2, pipe=2, model=2", f"batch:data, experts:data, layers:pipe, {TENSOR}", {"microbatches": 4}),
    ("data=2, pipe=4", "batch:data, experts:data, layers:pipe", {"microbatches": 4, "params": "data"}),
    ("pipe=2, expert=4", "batch:expert, experts:expert, layers:pipe", {"microbatches": 2, "virtual_stages": 2}),
    ("data=4, model=2", f"batch:data, experts:model, {SEQUENCE}", {"params": "data"}),
]
DEALT = [case for i, case in enumerate(SPARSE) if i not in (5, 6, 9)]
CASES = [
    *(pytest.param(DENSE, *case, id=f"dense-{i}") for i, case in enumerate(LAYOUTS)),
    *(pytest.param(EXPERTS, *case, id=f"experts-{i}") for i, case in enumerate(SPARSE)),
    *(pytest.param(DROPLESS, *case, id=f"dropless-{i}") for i, case in enumerate(DEALT)),
]


def batch() -> Batch:
    """Packed documents of 16 sequences of 16 tokens."""
    rng = np.random.default_rng(0)
    ids, targets = rng.integers(0, 32, (2, 16, 16)).astype(np.int32)
    starts = rng.random((16, 16)) < 0.15
    segments = np.cumsum(starts, 1).astype(np.int32)
    places = np.broadcast_to(np.arange(16), (16, 16))
    positions = (places - np.maximum.accumulate(np.where(starts, places, 0), 1)).astype(np.int32)
    return Batch(*(mw.Tensor(x, "batch length") for x in (ids, targets, segments, positions)))


def run(config: DecoderConfig, region: Callable[[Any], Any], lay: Callable[[State], State], given: Batch) -> Any:
    """The losses of three steps, the first gradient, and the state at the end."""
    loss_of = region(objective if config.experts.num_experts else _dense)

    @jax.jit
    def step(state: State, batch: Batch) -> Any:
        (value, _), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.model, batch)
        model, moved = update(OPTIMIZER, gradient, state.optimizer, state.model)
        return lay(State(model, moved)), value, gradient

    model = Decoder(config, key=jax.random.key(0))
    state, losses, first = lay(State(model, OPTIMIZER.init(model))), [], None
    for _ in range(STEPS):
        state, value, gradient = step(state, given)
        losses.append(value)
        first = gradient if first is None else first
    return losses, first, state


def _dense(model: Decoder, given: Batch) -> Any:
    return loss(model, given), ()


@functools.cache
def on_one_device(config: DecoderConfig) -> Any:
    return run(config, lambda fn: fn, lambda state: state, batch())


@pytest.mark.parametrize(("config", "mesh", "layout", "options"), CASES)
def test_loss_gradients_and_three_steps_are_those_of_one_device(
    config: DecoderConfig, mesh: str, layout: str, options: dict[str, Any]
) -> None:
    where = mw.Mesh(mesh, dcn="dcn" if "dcn" in mesh else ())
    place = Place(where, mw.Layout(layout, strict=True, **options))
    found = run(config, place.region, lambda state: placed(state, place), place.shard(batch()))
    assert_same(mw.unshard(found), mw.unshard(on_one_device(config)), f"{mesh} | {layout} | {options}")


def test_there_are_enough_of_them() -> None:
    assert len({str(case) for case in LAYOUTS}) >= 25 and len({str(case) for case in SPARSE}) >= 10
