"""A mixture of experts: many feed-forward layers of which each token passes through a few.

Tokens are sent to their experts by a rename (``ops/dispatch.py``). What is dispatched has the dims

    (routes, batch, capacity, embed)   ->   (experts, routed_batch, capacity, embed)

and ``routed_batch`` lies as ``batch`` does less the axes of ``experts``: under ``batch:data, experts:data`` an axis
goes from one dim to another, which is one all-to-all, and the rename back is one more. Nothing else here knows of
devices.

=================  =================================================================
dim                what it counts
=================  =================================================================
``batch``          groups: sequences, whose tokens compete for places
``length``         tokens of a group
``embed``          the size of a token's vector
``experts``        experts, where their weights are; ``routes``: as routers see them
``routed_batch``   groups while experts work on them
``capacity``       places that an expert has for the tokens of a group
``ff``             the width of an expert
=================  =================================================================

Two ways to dispatch. ``capacity``: an expert has so many places for each group, given to first choices before second
ones and to earlier tokens before later ones (Lepikhin et al., 2020); who finds none is dropped, and counted. All that
is made are places and the tokens in them, never a mask of tokens by experts by places. ``dropless``: tokens are sorted
by expert and multiplied group by group (``jax.lax.ragged_dot``; Gale et al., 2022, "MegaBlocks"); see ``ops/rows.py``.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax

from ..dims import Dim, names_of, without
from ..errors import fail, nearest
from ..ops.contract import dot
from ..ops.cumulative import cumsum
from ..ops.dispatch import from_experts, to_experts
from ..ops.elementwise import add, greater_equal, less, logical_and, multiply, silu, subtract, where
from ..ops.indexing import one_hot
from ..ops.join import stack
from ..ops.making import arange, full_like, zeros, zeros_like
from ..ops.reduce import sum as sum_over
from ..ops.rows import Rows, to_rows
from ..ops.scatter import scatter_add
from ..ops.slots import from_slots, to_slots
from ..tensor import Tensor
from .linear import normal
from .mlp import GatedMLP
from .routing import (
    Choices,
    ExpertChoiceRouter,
    HashRouter,
    Slots,
    TopKRouter,
    balance_loss,
    check_choices,
    load_of,
    z_loss,
)

DISPATCHES = ("capacity", "dropless")

Router = TopKRouter | ExpertChoiceRouter | HashRouter


Numbers = Tensor | jax.Array
"""One for each group: a scalar where there is no ``batch``."""


class ExpertMetrics(NamedTuple):
    """What a mixture tells of each group, float32; the caller takes means."""

    load: Tensor
    """(batch, routes): the share of the choices, or for expert choice of the places, that each expert has."""
    num_dropped: Numbers
    """(batch): choices for which there was no place; for expert choice, tokens that no expert chose."""
    balance_loss: Numbers
    """(batch): 1 when even; 0 where the router has no scores to balance."""
    z_loss: Numbers
    """(batch): the mean squared logsumexp of the router's logits; 0 where it has none."""


class GatedExperts(eqx.Module):
    """down(activation(gate(x)) * up(x)), each expert with weights of its own."""

    gate: Tensor
    up: Tensor
    down: Tensor
    activation: Callable[[Tensor], Tensor] = eqx.field(static=True)

    def __init__(
        self,
        embed: Dim,
        experts: Dim,
        ff: Dim,
        *,
        key: jax.Array,
        activation: Callable[[Tensor], Tensor] = silu,
        scale: float = 1.0,
    ) -> None:
        gate, up, down = jax.random.split(key, 3)
        self.gate = normal(gate, (experts, embed, ff), 1.0 / math.sqrt(embed.size))
        self.up = normal(up, (experts, embed, ff), 1.0 / math.sqrt(embed.size))
        self.down = normal(down, (experts, ff, embed), math.sqrt(scale / ff.size))
        self.activation = activation

    def __call__(self, x: Tensor) -> Tensor:
        """(experts, …, embed) to the same."""
        _, embed, ff = names_of(self.gate.dims)
        gate, up, down = (w.astype(x.dtype) for w in (self.gate, self.up, self.down))
        return dot(multiply(self.activation(dot(x, gate, embed)), dot(x, up, embed)), down, ff)

    def on_rows(self, x: Rows) -> Rows:
        """The same for rows sorted by expert."""
        _, embed, ff = names_of(self.gate.dims)
        gate, up, down = (w.astype(x.array.dtype) for w in (self.gate, self.up, self.down))
        opened = x.dot(gate, embed).map(self._gated, x.dot(up, embed))
        return opened.dot(down, ff)

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return multiply(self.activation(gate), up)


class MixtureOfExperts(eqx.Module):
    """Experts behind a router (Shazeer et al., 2017, "Outrageously large neural networks").

    Args:
        router: a ``TopKRouter``, ``ExpertChoiceRouter`` or ``HashRouter`` for as many experts.
        experts: the experts.
        shared: a layer that every token passes through as well (DeepSeekMoE: Dai et al., 2024).
        dispatch: "capacity" or "dropless".
        factor: with "capacity", the places of all experts together, as a multiple of what is needed when the load is
            even: each has ceil(factor x length x choices / experts) for each group.
        bound: with "dropless", the room for what one device may send to another, as a multiple of the even share; None:
            room for all that may come. What finds no room is counted as dropped, and depends on the layout.
        num_choices: with expert choice, how many experts choose a token on average.

    Raises:
        ValueError: an unknown dispatch, expert choice without capacity, a router for another number of experts, a
            number of choices that there cannot be, a bound without dropless, or a factor or bound that is not positive.
    """

    router: Router
    experts: GatedExperts
    shared: GatedMLP | None
    dispatch: str = eqx.field(static=True)
    factor: float = eqx.field(static=True)
    bound: float | None = eqx.field(static=True)
    num_choices: int = eqx.field(static=True)

    def __init__(
        self,
        router: Router,
        experts: GatedExperts,
        *,
        shared: GatedMLP | None = None,
        dispatch: str = "capacity",
        factor: float = 1.25,
        bound: float | None = None,
        num_choices: int = 2,
    ) -> None:
        if dispatch not in DISPATCHES:
            raise fail(f"MixtureOfExperts: there is no dispatch {dispatch!r}.{nearest(str(dispatch), DISPATCHES)}")
        if isinstance(router, ExpertChoiceRouter):
            if dispatch != "capacity":
                raise fail(
                    "MixtureOfExperts: experts that choose have a number of places, and fill them: nothing is dropped. "
                    'Write dispatch="capacity" with an ExpertChoiceRouter.'
                )
            check_choices("MixtureOfExperts", num_choices, experts.gate.dims[0].size)
        else:
            num_choices = router.num_choices
        if router.num_experts != experts.gate.dims[0].size:
            raise fail(
                f"MixtureOfExperts: the router chooses among {router.num_experts} experts, and there are "
                f"{experts.gate.dims[0]}. Give the router num_experts={experts.gate.dims[0].size}."
            )
        if bound is not None and dispatch != "dropless":
            raise fail(
                f"MixtureOfExperts: bound={bound} is room for what devices send to one another with "
                f'dispatch="dropless"; with dispatch={dispatch!r} factor={factor} says how many places there are.'
            )
        for name, value in (("factor", factor), ("bound", bound)):
            if value is not None and value <= 0:
                raise fail(f"MixtureOfExperts: {name}={value}; it must be positive. 1 is the even share.")
        self.router, self.experts, self.shared = router, experts, shared
        self.dispatch, self.factor, self.bound, self.num_choices = dispatch, factor, bound, num_choices

    def __call__(
        self, x: Tensor, *, ids: Tensor | None = None, key: jax.Array | None = None
    ) -> tuple[Tensor, ExpertMetrics]:
        """(batch, length, embed) to the same, and what is to be known of it.

        Args:
            x: the tokens' vectors. Of its dims, ``length`` counts the tokens of a group and ``batch`` the groups.
            ids: the tokens, (batch, length), int32: for a ``HashRouter``.
            key: for the router's jitter and second choices that it draws; None for none.
        """
        num_experts = self.experts.gate.dims[0].size
        length = x.dim("length")
        if isinstance(self.router, ExpertChoiceRouter):
            slots = self.router(x, self._capacity(length, num_experts), key)
            y, metrics = self._in_slots(x, slots), _of_slots(slots, length)
        else:
            chosen = self.router(x, ids, key)
            y, num_dropped = self._dropless(x, chosen) if self.dispatch == "dropless" else self._placed(x, chosen)
            metrics = _of_choices(chosen, num_experts, num_dropped)
        y = y if self.shared is None else add(y, self.shared(x))
        return y.reorder(*x.names), metrics

    def _capacity(self, length: Dim, num_experts: int) -> Dim:
        places = math.ceil(self.factor * length.size * self.num_choices / num_experts)
        return Dim("capacity", min(places, length.size))

    def _dropless(self, x: Tensor, chosen: Choices) -> tuple[Tensor, Numbers]:
        whom = chosen.experts.reorder(..., "length", "choices")  # by groups
        rows = self.experts.on_rows(to_rows(x, whom, self.experts.gate.dims[0], self.bound))
        return rows.to_tokens(chosen.weights)

    def _placed(self, x: Tensor, chosen: Choices) -> tuple[Tensor, Numbers]:
        num_experts = self.experts.gate.dims[0].size
        slots, num_dropped = places(chosen, num_experts, self._capacity(x.dim("length"), num_experts))
        return self._in_slots(x, slots), num_dropped

    def _in_slots(self, x: Tensor, slots: Slots) -> Tensor:
        """There and back."""
        y = from_experts(self.experts(to_experts(to_slots(x, slots.source, "length"))))
        return from_slots(y, slots.source, slots.weights, x.dim("length"))


def places(chosen: Choices, num_experts: int, capacity: Dim) -> tuple[Slots, Numbers]:
    """The places that choices get, all first choices before all second ones, earlier tokens before later ones, and how
    many in each group get none."""
    routes, length = Dim("routes", num_experts), chosen.experts.dim("length")
    place = _queue(chosen.experts, routes)
    exists = logical_and(greater_equal(chosen.experts, 0), less(chosen.experts, num_experts))
    fits = logical_and(exists, less(place, capacity.size))
    slots = Dim("slots", num_experts * capacity.size)
    at = where(fits, add(multiply(chosen.experts, capacity.size), place), slots.size)
    groups = without(chosen.experts.dims, ("length", "choices"))
    # Sums into places that one choice each has: between devices, these small sums are all that a split length asks for.
    here = subtract(arange(length, dtype="int32"), length.size)
    behind = scatter_add(zeros((*groups, slots), "int32"), at, here, "slots")
    weights = scatter_add(zeros((*groups, slots)), at, chosen.weights, "slots")
    source, weights = (
        t.split("slots", routes=routes.size, capacity=capacity.size).reorder("routes", ..., "capacity")
        for t in (add(behind, length.size), weights)
    )
    num_dropped = sum_over(logical_and(exists, greater_equal(place, capacity.size)), ("length", "choices"))
    return Slots(source, weights, chosen.logits), num_dropped.astype("float32")


def _queue(experts: Tensor, routes: Dim) -> Tensor:
    """For each choice, how many come before it at the same expert."""
    ahead, found = None, []
    for i in range(experts.size("choices")):
        mine = one_hot(experts[{"choices": i}], routes, "int32")
        before = subtract(cumsum(mine, "length"), mine)
        before = before if ahead is None else add(before, ahead)
        found.append(sum_over(multiply(mine, before), "routes", dtype="int32"))
        count = sum_over(mine, "length", dtype="int32")
        ahead = count if ahead is None else add(ahead, count)
    return stack(found, experts.dim("choices")).reorder(*experts.names)


def _of_choices(chosen: Choices, num_experts: int, num_dropped: Numbers) -> ExpertMetrics:
    load = load_of(chosen.experts, num_experts)
    none = zeros_like(num_dropped)
    balance = none if chosen.shares is None else balance_loss(load, chosen.shares)
    return ExpertMetrics(load, num_dropped, balance, none if chosen.logits is None else z_loss(chosen.logits))


def _of_slots(slots: Slots, length: Dim) -> ExpertMetrics:
    """Of experts that chose: all have the same load."""
    groups = without(slots.source.dims, ("routes", "capacity"))
    seen = scatter_add(zeros((*groups, length), "int32"), slots.source, 1, "length")
    assert slots.logits is not None
    z = z_loss(slots.logits)
    load = full_like(sum_over(slots.weights, "capacity"), 1.0 / slots.weights.size("routes")).reorder(..., "routes")
    num_dropped = sum_over(less(seen, 1), "length").astype("float32")
    return ExpertMetrics(load, num_dropped, zeros_like(z), z)
