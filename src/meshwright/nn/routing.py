"""Routers: which experts a token goes to.

A sequence is a group: tokens compete with those of their own sequence alone, nothing here looks along ``batch``, and so
every decision is the same under every layout and in every microbatch. Losses and counts come out for each group.

=============  ======================================================================
dim            what it counts
=============  ======================================================================
``length``     tokens of a group
``routes``     experts, as a router sees them: whole, unless a layout splits that very name
``choices``    the experts of one token, its first choice first
``capacity``   places that an expert has for the tokens of a group
=============  ======================================================================

Scores are computed in float32 whatever the dtype of the tokens (Fedus et al., 2021, "selective precision").

====================================  =============================================================================
paper                                 router
====================================  =============================================================================
Switch (Fedus et al., 2021)           ``TopKRouter(num_choices=1, normalised=False, jitter=0.01)``
GShard (Lepikhin et al., 2020)        ``TopKRouter(num_choices=2, random_second=True)``
Mixtral (Jiang et al., 2024)          ``TopKRouter(num_choices=2)``: the softmax over the chosen is the normalised one
DeepSeek-V3 (DeepSeek-AI, 2024)       ``TopKRouter(num_choices=8, scores="sigmoid", balanced=True, scale=2.5)``
expert choice (Zhou et al., 2022)     ``ExpertChoiceRouter``
hash layers (Roller et al., 2021)     ``HashRouter``
====================================  =============================================================================
"""

from typing import NamedTuple

import equinox as eqx
import jax

from ..dims import Dim, without
from ..errors import fail, nearest
from ..ops import random
from ..ops.elementwise import (
    absolute,
    add,
    bitwise_xor,
    divide,
    greater,
    less,
    mod,
    multiply,
    right_shift,
    sigmoid,
    sign,
    stop_gradient,
    subtract,
    where,
)
from ..ops.ids import check_ids
from ..ops.indexing import one_hot, take
from ..ops.join import stack
from ..ops.making import arange, full_like, zeros
from ..ops.order import top_k
from ..ops.parameter import param
from ..ops.reduce import logsumexp, mean, softmax
from ..ops.reduce import sum as sum_over
from ..tensor import Tensor
from .linear import Linear

SCORES = ("softmax", "sigmoid")


class Choices(NamedTuple):
    """What the tokens of each group chose."""

    experts: Tensor
    """(batch, length, choices), int32: positions along ``routes``, each token's all different; their number where a
    choice goes nowhere."""
    weights: Tensor
    """(batch, length, choices), float32: what the experts' outputs are multiplied with."""
    shares: Tensor | None = None
    """(batch, length, routes), float32: every expert's score, adding up to 1; None where there are none."""
    logits: Tensor | None = None
    """(batch, length, routes), float32."""


class Slots(NamedTuple):
    """Which token stands in each place that an expert has."""

    source: Tensor
    """(routes, batch, capacity), int32: a position along ``length``, its size for none."""
    weights: Tensor
    """(routes, batch, capacity), float32: what the expert's output is multiplied with; 0 for none."""
    logits: Tensor | None = None
    """(batch, length, routes), float32."""


class TopKRouter(eqx.Module):
    """Each token chooses the experts that have the highest scores for it.

    Args:
        embed: the dim of the tokens' vectors.
        num_experts: how many there are to choose from.
        key: for the weight.
        num_choices: how many a token chooses.
        scores: "softmax" or "sigmoid" of the logits.
        normalised: whether the weights of the chosen are divided by their sum.
        balanced: whether there is a bias for each expert, added to the scores for the choice alone, by which
            ``next_bias`` keeps the load even without a loss (Wang et al., 2024; DeepSeek-V3).
        scale: a factor on the weights.
        jitter: where a key is given, tokens are multiplied with numbers drawn from 1 - jitter to 1 + jitter (Switch).
        random_second: where a key is given, a token goes to the second of its two choices with a probability of twice
            that one's share of the weight of both, so always where they are alike, and else to the first alone, whose
            weight stays what it was (GShard, algorithm 1).

    Raises:
        ValueError: more choices than experts, unknown scores, or a random second of other than two choices.
    """

    linear: Linear
    bias: Tensor | None
    num_choices: int = eqx.field(static=True)
    scores: str = eqx.field(static=True)
    normalised: bool = eqx.field(static=True)
    scale: float = eqx.field(static=True)
    jitter: float = eqx.field(static=True)
    random_second: bool = eqx.field(static=True)

    def __init__(
        self,
        embed: Dim,
        num_experts: int,
        *,
        key: jax.Array,
        num_choices: int = 2,
        scores: str = "softmax",
        normalised: bool = True,
        balanced: bool = False,
        scale: float = 1.0,
        jitter: float = 0.0,
        random_second: bool = False,
    ) -> None:
        if scores not in SCORES:
            raise fail(f"TopKRouter: there are no scores {scores!r}.{nearest(str(scores), SCORES)}")
        check_choices("TopKRouter", num_choices, num_experts)
        if random_second and num_choices != 2:
            raise fail(f"TopKRouter: random_second is of two choices; num_choices={num_choices}. Write num_choices=2.")
        routes = Dim("routes", num_experts)
        self.linear = Linear(embed, routes, key=key)
        self.bias = param(zeros(routes)) if balanced else None
        self.num_choices, self.scores, self.normalised = num_choices, scores, normalised
        self.scale, self.jitter, self.random_second = scale, jitter, random_second

    @property
    def num_experts(self) -> int:
        """How many there are to choose from."""
        return self.linear.weight.size("routes")

    def __call__(self, x: Tensor, ids: Tensor | None = None, key: jax.Array | None = None) -> Choices:
        """(batch, length, embed) to the choices of its tokens; ``ids`` are not looked at."""
        del ids
        logits = _logits(self.linear, x, key, self.jitter)
        scores = softmax(logits, "routes") if self.scores == "softmax" else sigmoid(logits)
        ranked = stop_gradient(scores)
        ranked = ranked if self.bias is None else add(ranked, stop_gradient(self.bias))
        _, experts = top_k(ranked, "routes", Dim("choices", self.num_choices))
        weights = take(scores, experts, "routes")
        if key is not None and self.random_second:
            used = _second_drawn(weights, jax.random.fold_in(key, 1))  # the key itself is the jitter's
            experts = where(used, experts, self.num_experts)
        if self.normalised:
            weights = divide(weights, sum_over(weights, "choices"))
        shares = scores if self.scores == "softmax" else divide(scores, sum_over(scores, "routes"))
        return Choices(experts, multiply(weights, self.scale), shares, logits)


class ExpertChoiceRouter(eqx.Module):
    """Each expert chooses, in each group, the tokens that have the highest scores for it, as many as it has places.

    The load is even by construction. A token's choice depends on later tokens of its sequence, so a decoder that is
    trained so sees a little of the future.

    Args:
        embed: the dim of the tokens' vectors.
        num_experts: how many there are.
        key: for the weight.
        jitter: as in ``TopKRouter``.
    """

    linear: Linear
    jitter: float = eqx.field(static=True)

    def __init__(self, embed: Dim, num_experts: int, *, key: jax.Array, jitter: float = 0.0) -> None:
        self.linear, self.jitter = Linear(embed, Dim("routes", num_experts), key=key), jitter

    @property
    def num_experts(self) -> int:
        """How many there are that choose."""
        return self.linear.weight.size("routes")

    def __call__(self, x: Tensor, capacity: Dim, key: jax.Array | None = None) -> Slots:
        """(batch, length, embed) to the tokens that each expert chose: ``capacity`` of them."""
        logits = _logits(self.linear, x, key, self.jitter)
        weights, source = top_k(softmax(logits, "routes"), "length", capacity)
        source, weights = (t.reorder("routes", ..., capacity.name) for t in (source, weights))
        return Slots(source, weights, logits)


class HashRouter(eqx.Module):
    """A token's experts follow from its id: nothing is learnt, and a token always goes to the same ones.

    Args:
        num_experts: how many there are to choose from.
        num_choices: how many a token goes to, each with the same weight.
        seed: another one gives other experts.

    Raises:
        ValueError: more choices than experts.
    """

    num_experts: int = eqx.field(static=True)
    num_choices: int = eqx.field(static=True)
    seed: int = eqx.field(static=True)

    def __init__(self, num_experts: int, *, num_choices: int = 1, seed: int = 0) -> None:
        check_choices("HashRouter", num_choices, num_experts)
        self.num_experts, self.num_choices, self.seed = num_experts, num_choices, seed

    def __call__(self, x: Tensor, ids: Tensor | None = None, key: jax.Array | None = None) -> Choices:
        """The choices for ``ids``, (batch, length), int32; ``x`` and ``key`` are not looked at."""
        del x, key
        if ids is None:
            raise fail("HashRouter: it chooses by the tokens' ids. Write experts(x, ids=ids).")
        check_ids(ids, "HashRouter")
        first = mod(_mixed(ids, self.seed), self.num_experts).astype("int32")
        each = [mod(add(first, i), self.num_experts) for i in range(self.num_choices)]
        experts = stack(each, Dim("choices", self.num_choices)).reorder(..., "choices")
        return Choices(experts, full_like(experts, 1.0 / self.num_choices, "float32"))


def _mixed(ids: Tensor, seed: int) -> Tensor:
    """Integers made to look random, of 32 bits: the finaliser of MurmurHash3 (Appleby, 2011)."""
    bits = bitwise_xor(ids.astype("uint32"), seed)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = multiply(bitwise_xor(bits, right_shift(bits, shift)), jax.numpy.uint32(factor))
    return bitwise_xor(bits, right_shift(bits, 16))


def _logits(linear: Linear, x: Tensor, key: jax.Array | None, jitter: float) -> Tensor:
    wide = x.astype("float32")
    if key is not None and jitter:
        wide = multiply(wide, random.uniform(key, x.dims, minval=1.0 - jitter, maxval=1.0 + jitter))
    return linear(wide)


def _second_drawn(weights: Tensor, key: jax.Array) -> Tensor:
    """Which of two choices, (…, choices), a token goes to: all first ones, and second ones by their weight."""
    weights, choices = stop_gradient(weights), weights.dim("choices")
    twice = divide(multiply(weights, 2.0), sum_over(weights, "choices"))
    chance = where(less(arange(choices), 1), 1.0, twice)
    return less(random.uniform(key, without(weights.dims, ("choices",))), chance)


def check_choices(asked: str, num_choices: int, num_experts: int) -> None:
    """Raise a ``ValueError`` unless a token can choose so many experts."""
    if not 1 <= num_choices <= num_experts:
        raise fail(f"{asked}: num_choices={num_choices}; a token chooses from 1 to num_experts={num_experts}.")


# What keeps the load even


def load_of(experts: Tensor, num_experts: int) -> Tensor:
    """The share of a group's choices that fell on each expert, of those that go to any: (batch, routes), float32,
    adding up to 1."""
    num = sum_over(one_hot(experts, Dim("routes", num_experts)), ("length", "choices"))
    return divide(num, sum_over(num, "routes"))


def balance_loss(load: Tensor, shares: Tensor) -> Tensor | jax.Array:
    """experts x sum(load x mean share), for each group: 1 where both are even (Fedus et al., 2021, equation 4).

    Args:
        load: (batch, routes), ``load_of`` what was chosen; it has no gradient.
        shares: (batch, length, routes), the scores.
    """
    return multiply(sum_over(multiply(load, mean(shares, "length")), "routes"), float(load.size("routes")))


def z_loss(logits: Tensor) -> Tensor | jax.Array:
    """The mean over a group's tokens of the squared logsumexp of their logits, which keeps these small (Zoph et al.,
    2022, equation 5)."""
    whole = logsumexp(logits, "routes")
    return mean(multiply(whole, whole), "length")


def next_bias(bias: Tensor, load: Tensor, rate: float = 1e-3) -> Tensor:
    """The bias for the next step: ``rate`` more for an expert that had less than its share, less for one that had more
    (Wang et al., 2024, algorithm 1). One whose load is its share but for rounding keeps its bias: the sign of what
    rounding leaves would depend on the layout.

    Args:
        bias: that of a balanced ``TopKRouter``, (routes), or of a stack of them, (layers, routes).
        load: the dims of ``bias`` and any others, such as ``batch``, over which it is averaged.
        rate: the step.
    """
    others = tuple(n for n in load.names if n not in bias.names)
    even = 1.0 / bias.size("routes")
    missing = subtract(even, mean(load, others) if others else load)
    direction = where(greater(absolute(missing), _ROUNDING * even), sign(missing), 0.0)
    return param(add(bias, multiply(direction, rate)))


_ROUNDING = 1e-5
"""Of an expert's share: more than sums of many loads in float32 are off by, and less than one choice of 100 000."""
