"""A decoder with experts: its steps under every layout, what it tells of its layers, and its flags."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pytest

import meshwright as mw
from meshwright.cli import main
from meshwright.models import Decoder, DecoderConfig, ExpertsConfig
from meshwright.nn import rotation
from meshwright.plan.hlo import compiled_collectives
from meshwright.train import Program, Recipe
from meshwright.train.data import Batch
from meshwright.train.optimizer import OptimizerConfig, make_optimizer
from meshwright.train.step import Place, State, loss, model_maker, objective, train_step

from .laws import assert_same
from .test_cli import TINY, losses

EXPERTS = ExpertsConfig(num_experts=4, shared_ff=16, expert_ff=16)
CONFIG = DecoderConfig(vocab=64, embed=16, layers=2, heads=4, group=1, head_dim=4, ff=32, experts=EXPERTS)
KINDS = {
    "capacity": EXPERTS,
    "dropless": dataclasses.replace(EXPERTS, dispatch="dropless", scores="sigmoid", bias_rate=0.01),
    "hash": dataclasses.replace(EXPERTS, router="hash", shared_ff=0),
    "expert-choice": dataclasses.replace(EXPERTS, router="expert-choice"),
}
LAYOUTS: list[tuple[str, str, dict[str, Any]]] = [
    ("data=4", "batch:data, experts:data", {}),
    ("data=2,model=2", "batch:data, experts:data, ff:model, heads:model, residual_length:model", {"params": "data"}),
    ("data=2,expert=2", "batch:(data,expert), experts:expert", {"params": "(data,expert)"}),
    ("data=2,pipe=2", "batch:data, experts:data, layers:pipe", {"microbatches": 2}),
    ("data=4", "batch:data, experts:data", {"microbatches": 2, "params": "data"}),
    ("data=2,context=2", "batch:data, length:context, experts:(data,context)", {}),
    ("data=2,pipe=2,model=2", "batch:data, experts:data, layers:pipe, ff:model, heads:model", {"microbatches": 4}),
    ("data=4", "batch:data, experts:data", {"params": "data", "gather": "step"}),
]


def _place(mesh: str, layout: str, options: Mapping[str, Any]) -> Place:
    num = math.prod(int(part.split("=")[1]) for part in mesh.split(","))
    return Place(mw.Mesh(mesh, jax.devices()[:num]), mw.Layout(layout, **options))


def _batch() -> Batch:
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab, (8, 17)).astype(np.int32)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16))
    arrays = (tokens[:, :-1], tokens[:, 1:], np.zeros((8, 16), np.int32), positions)
    return Batch(*(mw.Tensor(a, "batch length") for a in arrays))


def test_a_model_is_made_split_where_only_experts_have_a_width() -> None:
    """A device makes its slice of each expert, not the whole of it: the rule for ``ff`` holds while a model is made."""
    place = _place("data=4,model=2", "batch:data, ff:model", {})
    config = dataclasses.replace(CONFIG, experts=dataclasses.replace(EXPERTS, shared_ff=0))
    made = jax.jit(model_maker(config, place))(jax.random.key(0))
    gate = made.blocks.mlp.experts.gate
    assert gate.names == ("layers", "experts", "embed", "expert_ff")
    assert gate.array.sharding.shard_shape(gate.shape) == (*gate.shape[:-1], gate.shape[-1] // 2)


@functools.cache
def _model(kind: str) -> Decoder:
    return Decoder(dataclasses.replace(CONFIG, experts=KINDS[kind]), key=jax.random.key(0))


def _steps(kind: str, place: Place) -> tuple[list[Any], Any]:
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3), 3)
    model = jax.tree.map(lambda a: a + 0, _model(kind))  # a step uses up what it is given
    state = State(place.shard(model), place.shard(optimizer.init(model), "optimizer"))
    step, found = train_step(optimizer, place), []
    for _ in range(3):
        state, value = step(state, _batch())
        found.append(value)
    return found, state.model


@functools.cache
def _on_one_device(kind: str) -> Any:
    return _steps(kind, _place("data=1", "", {}))


@pytest.mark.parametrize(("mesh", "layout", "options"), LAYOUTS)
def test_three_steps_are_the_same_under_every_layout(mesh: str, layout: str, options: dict[str, Any]) -> None:
    kinds = list(KINDS) if (mesh, options) == ("data=4", {}) else ["capacity", "dropless"]
    for kind in kinds:
        found = _steps(kind, _place(mesh, layout, options))
        assert_same(found, _on_one_device(kind), f"{kind}, {mesh} {layout} {options}")


def test_metrics_are_those_of_each_layer() -> None:
    """The layers one by one, by hand."""
    model, batch = _model("capacity"), _batch()
    _, told = jax.jit(lambda model, ids: model.with_metrics(ids))(model, batch.ids)
    assert told is not None and told.load.names == ("depth", "batch", "routes")
    assert told.num_dropped.names == told.z_loss.names == ("depth", "batch")
    np.testing.assert_allclose(told.load.array.sum(-1), 1.0, rtol=1e-5)
    x = model.embedding(batch.ids).rename(length="residual_length")
    turn = _turn(batch)
    for i in range(CONFIG.layers):
        block = jax.tree.map(lambda t, i=i: t[{"layers": i}], model.blocks, is_leaf=lambda t: isinstance(t, mw.Tensor))
        x, metrics = block(x, turn)
        one = [m[{"depth": i}] for m in told]
        for found, expected in zip(one, metrics, strict=True):
            np.testing.assert_allclose(found.array, expected.array, rtol=1e-4, atol=1e-6)


def _turn(batch: Batch) -> Any:
    return rotation(mw.arange(batch.ids.dim("length")), mw.Dim("head_dim", CONFIG.head_dim), CONFIG.rope_base)


def test_the_objective_is_the_loss_and_what_evens_the_load() -> None:
    model, batch = _model("capacity"), _batch()
    whole, (alone, load) = jax.jit(objective)(model, batch)
    _, told = model.with_metrics(batch.ids)
    assert told is not None
    balance, z = told.balance_loss, told.z_loss
    assert isinstance(balance, mw.Tensor) and isinstance(z, mw.Tensor)
    extra = 0.01 * balance.array.mean() + 0.001 * z.array.mean()
    np.testing.assert_allclose(alone, loss(model, batch), rtol=1e-6)
    np.testing.assert_allclose(whole - alone, extra, rtol=1e-3)
    np.testing.assert_allclose(load.array, told.load.array.mean(1), rtol=1e-5)
    assert (
        Decoder(dataclasses.replace(CONFIG, experts=ExpertsConfig()), key=jax.random.key(0)).with_metrics(batch.ids)[1]
        is None
    )


def test_a_step_moves_biases_by_the_load_alone() -> None:
    _, model = _on_one_device("dropless")
    bias = model.blocks.mlp.router.bias.array
    assert bias.shape == (CONFIG.layers, EXPERTS.num_experts)
    steps = np.round(np.asarray(bias) / 0.01)
    np.testing.assert_allclose(bias, steps * 0.01, atol=1e-7)
    assert np.abs(steps).max() <= 3 and np.abs(steps).max() > 0


def test_a_recipe_keeps_its_experts() -> None:
    recipe = Recipe(model=CONFIG)
    assert Recipe.from_json(recipe.to_json()) == recipe
    held = recipe.to_json()
    del held["model"]["experts"]
    assert Recipe.from_json(held).model.experts == ExpertsConfig()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "topk"}, r"there is no router 'topk'. Did you mean 'top-k'"),
        ({"dispatch": "drop"}, r"there is no dispatch 'drop'"),
        ({"shared_ff": 16}, r"shared_ff is 16, which is of experts, and there .*none.* num_experts=8"),
        ({"num_experts": -1}, "num_experts is -1; it must not be negative"),
        ({"router": "hash", "bias_rate": 0.1}, "bias_rate is for tokens that choose: router is 'hash'"),
    ],
)
def test_mistakes_in_the_configuration_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertsConfig(**options)


def test_it_trains_and_plans_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--num-experts=4",
        "--shared-ff=16",
        "--bias-rate=0.001",
        "--devices=2",
        "--layout=batch:data, experts:data",
    ]
    assert main(["train", *TINY, *flags, "--steps=6"]) == 0
    written = capsys.readouterr().out
    assert "ff=32 x experts=4, 2 a token" in written
    assert losses(written)[-1] < losses(written)[0]
    assert (
        main(["plan", *[f for f in TINY if "tokens" not in f and "every" not in f and "bytes" not in f], *flags]) == 0
    )
    assert "all_to_all" in capsys.readouterr().out


@pytest.mark.parametrize(("mesh", "layout", "options"), LAYOUTS[:2])
def test_the_plan_of_a_step_is_what_is_compiled(mesh: str, layout: str, options: dict[str, Any]) -> None:
    """The update of biases outside the region too."""
    model = dataclasses.replace(CONFIG, experts=KINDS["dropless"], unroll=True)
    program = Program(Recipe(model=model, batch=8, length=16), _place(mesh, layout, options))
    plan = program.plan()
    assert not plan.program.unknown
    text = plan.program.traced.lower().compile(compiler_options={"xla_disable_hlo_passes": "cse,algsimp"}).as_text()
    sizes = {axis: int(size) for axis, size in (part.split("=") for part in mesh.split(","))}
    totals = []
    for rows in (plan.collectives, compiled_collectives(text, sizes)):
        found: dict[str, int] = {}
        for row in rows:
            if row.payload_bytes:
                found[row.kind] = found.get(row.kind, 0) + row.times * row.payload_bytes
        totals.append(found)
    assert totals[0] == totals[1] and totals[0]["all_to_all"] > 0
