"""One step of training: the loss inside the region, the update outside it.

The loss is an ordinary program on named tensors, so ``mw.spmd`` gives each device its slices and the gradients come
back split as the parameters lie at rest. The optimizer then works on those trees where they are. Its state lies by the
layout's ``optimizer`` rules; where they differ from the parameters' (ZeRO-1), gradients are moved to it and new
parameters back.

Dims: batch, length, vocab; the parameters' as in ``models/decoder.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax
import optax

from ..layout import OPTIMIZER, Layout
from ..mesh import Mesh
from ..models import Decoder, DecoderConfig
from ..nn import TopKRouter, cross_entropy, next_bias
from ..ops.elementwise import multiply
from ..ops.reduce import mean
from ..ops.reduce import sum as total
from ..placing import shard
from ..region import spmd
from ..tensor import Tensor, is_tensor
from .data import Batch
from .optimizer import update


@dataclass(frozen=True)
class Place:
    """Where a program runs: nothing that its results depend on."""

    mesh: Mesh
    layout: Layout
    partitioner: str = "names"

    def region(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """``fn`` as a program for the mesh."""
        return spmd(fn, self.mesh, self.layout, partitioner=self.partitioner)

    def shard(self, tree: Any, role: str | None = None) -> Any:
        """``tree`` placed by the layout: see ``mw.shard``."""
        return shard(tree, self.mesh, self.layout, role)

    def for_dims(self, names: set[str]) -> "Place":
        """The same place, less the rules for dims that a program does not have: making a model meets no batch."""
        return Place(self.mesh, self.layout.for_dims(names), self.partitioner)


class State(NamedTuple):
    """What a step changes."""

    model: Decoder
    optimizer: Any
    """Optax's state: trees like the model's."""


def loss(model: Decoder, batch: Batch) -> jax.Array:
    """The mean over a batch's tokens of the negative log-probability of the next token, in nats. With weights it is the
    sum of each by its share: what has none is left out, and a sum of parts is right under every layout."""
    return _of_logits(model(batch.ids, segments=batch.segments, positions=batch.positions), batch)


def _of_logits(logits: Tensor, batch: Batch) -> jax.Array:
    each = cross_entropy(logits, batch.targets, over="vocab")
    return mean(each) if batch.weights is None else total(multiply(each, batch.weights))


def objective(model: Decoder, batch: Batch) -> tuple[jax.Array, tuple[jax.Array, Tensor]]:
    """What a step of a model with experts makes smaller: the loss, and what keeps their load even. Beside it the loss
    alone, and each expert's share of the load, (depth, routes)."""
    logits, metrics = model.with_metrics(batch.ids, segments=batch.segments, positions=batch.positions)
    alone = _of_logits(logits, batch)
    assert metrics is not None
    return alone + model.config.experts.auxiliary_loss(metrics), (alone, mean(metrics.load, "batch"))


def balanced(model: Decoder, before: Decoder, load: Tensor) -> Decoder:
    """``model`` with the biases of its routers moved on from those ``before`` the step, by the load of the step."""
    biases = [_bias(m) for m in (model, before)]
    if biases[1] is None:
        return model
    new = next_bias(biases[1], load.rename(depth="layers"), model.config.experts.bias_rate)
    return eqx.tree_at(_bias, model, new, is_leaf=is_tensor)


def _bias(model: Decoder) -> Any:
    mlp: Any = model.blocks.mlp
    return mlp.router.bias if isinstance(mlp.router, TopKRouter) else None


def model_maker(config: DecoderConfig, place: Place) -> Callable[[jax.Array], Decoder]:
    """A function of a random key to the first model; each device makes its own slices."""

    def make(key: jax.Array) -> Decoder:
        return Decoder(config, key=key)

    shapes = jax.eval_shape(make, jax.random.key(0))
    tensors = jax.tree.leaves(shapes, is_leaf=is_tensor)
    return place.for_dims({name for x in tensors for name in x.names}).region(make)


def state_maker(
    config: DecoderConfig, optimizer: optax.GradientTransformation, place: Place
) -> Callable[[jax.Array], State]:
    """A function of a random key to the first state, to be compiled."""
    make = model_maker(config, place)

    def first(key: jax.Array) -> State:
        model: Any = make(key)
        return placed(State(model, optimizer.init(model)), place)

    return first


def placed(state: State, place: Place) -> State:
    """The state as it lies at rest."""
    return State(place.shard(state.model), place.shard(state.optimizer, OPTIMIZER))


def train_step(optimizer: optax.GradientTransformation, place: Place) -> Callable[[State, Batch], tuple[State, Any]]:
    """The compiled step: a state and a batch to the next state and the loss before it. The state given is used up."""
    dense = jax.value_and_grad(place.region(loss))
    sparse = jax.value_and_grad(place.region(objective), has_aux=True)

    def step(state: State, batch: Batch) -> tuple[State, jax.Array]:
        before, load = state.model, None
        if before.config.experts.num_experts:
            (_, (value, load)), gradient = sparse(before, batch)
        else:
            value, gradient = dense(before, batch)
        gradient = place.shard(gradient, OPTIMIZER)
        model, moved = update(optimizer, gradient, state.optimizer, before)
        model = model if load is None else balanced(model, before, load)
        return placed(State(model, moved), place), value

    return jax.jit(step, donate_argnums=0)
