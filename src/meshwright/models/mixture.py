"""Experts in a decoder: their sizes, how tokens are sent to them, and what is added to the loss to keep the load even.

Dims: those of ``nn/experts.py``, but that an expert's width is ``expert_ff``, so that experts and a shared layer, whose
width is ``ff``, may be split over one axis; ``depth`` counts layers where what each of them tells is set side by side.
"""

from dataclasses import dataclass, fields

import jax

from ..dims import Dim
from ..errors import fail, nearest
from ..nn import ExpertChoiceRouter, ExpertMetrics, GatedExperts, GatedMLP, HashRouter, MixtureOfExperts, TopKRouter
from ..nn.experts import DISPATCHES, Router
from ..nn.routing import SCORES
from ..ops.reduce import mean

ROUTERS = ("top-k", "expert-choice", "hash")


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Experts in place of the feed-forward layer; with none, the model is dense."""

    num_experts: int = 0
    """Experts in each layer; 0: one feed-forward layer for all tokens."""
    num_choices: int = 2
    """Experts that each token passes through; with expert choice, on average."""
    expert_ff: int = 0
    """Width of an expert; 0: that of the feed-forward layer, FF."""
    shared_ff: int = 0
    """Width of a layer beside the experts that every token passes through; 0: none."""
    router: str = "top-k"
    """Who chooses: "top-k", each token; "expert-choice", each expert; "hash", the token's id."""
    scores: str = "softmax"
    """What top-k ranks: "softmax" or "sigmoid" of the router's logits."""
    normalised_weights: bool = True
    """Whether the weights of the chosen add up to 1."""
    weight_scale: float = 1.0
    """A factor on the weights."""
    dispatch: str = "capacity"
    """How tokens are sent: "capacity", to so many places; "dropless", as many as there are."""
    capacity_factor: float = 1.25
    """With capacity, places for a sequence's tokens, as a multiple of what an even load needs."""
    bound: float | None = None
    """With dropless, room for what one device sends to another, as a multiple of the even share; None: for all."""
    balance_loss: float = 0.01
    """Factor on the balance loss; 0: none."""
    router_z_loss: float = 0.001
    """Factor on the router's z-loss; 0: none."""
    bias_rate: float = 0.0
    """By how much a step moves the bias that evens an expert's load without a loss; 0: there is no bias."""

    def __post_init__(self) -> None:
        for name, known in (("router", ROUTERS), ("scores", SCORES), ("dispatch", DISPATCHES)):
            if (value := getattr(self, name)) not in known:
                raise fail(f"ExpertsConfig: there is no {name} {value!r}.{nearest(str(value), known)}")
        for name in ("num_experts", "expert_ff", "shared_ff", "balance_loss", "router_z_loss", "bias_rate"):
            if getattr(self, name) < 0:
                raise fail(f"ExpertsConfig: {name} is {getattr(self, name)}; it must not be negative.")
        if self.bias_rate and self.router != "top-k":
            raise fail(f"ExpertsConfig: bias_rate is for tokens that choose: router is {self.router!r}, not 'top-k'.")
        beside = [f for f in fields(self) if f.name != "num_experts" and getattr(self, f.name) != f.default]
        if beside and not self.num_experts:
            raise fail(
                f"ExpertsConfig: {beside[0].name} is {getattr(self, beside[0].name)!r}, which is of experts, and there "
                f"are none: num_experts is 0. Say how many, num_experts=8, or leave it out."
            )

    def make(self, embed: Dim, ff: Dim, *, key: jax.Array, scale: float) -> MixtureOfExperts:
        """The layer.

        Args:
            embed: the dim of the residual stream.
            ff: that of the feed-forward layer in whose place it stands.
            key: for the weights.
            scale: a factor on the output projections' variance.
        """
        router, experts, shared = jax.random.split(key, 3)
        width = Dim("expert_ff", self.expert_ff or ff.size)
        return MixtureOfExperts(
            self._router(embed, router),
            GatedExperts(embed, Dim("experts", self.num_experts), width, key=experts, scale=scale),
            shared=GatedMLP(embed, Dim("ff", self.shared_ff), key=shared, scale=scale) if self.shared_ff else None,
            dispatch=self.dispatch,
            factor=self.capacity_factor,
            bound=self.bound,
            num_choices=self.num_choices,
        )

    def _router(self, embed: Dim, key: jax.Array) -> Router:
        if self.router == "hash":
            return HashRouter(self.num_experts, num_choices=self.num_choices)
        if self.router == "expert-choice":
            return ExpertChoiceRouter(embed, self.num_experts, key=key)
        return TopKRouter(
            embed,
            self.num_experts,
            key=key,
            num_choices=self.num_choices,
            scores=self.scores,
            normalised=self.normalised_weights,
            balanced=self.bias_rate > 0,
            scale=self.weight_scale,
        )

    def auxiliary_loss(self, metrics: ExpertMetrics) -> jax.Array:
        """What is added to the loss: the means over layers and sequences, each times its factor."""
        return mean(metrics.balance_loss) * self.balance_loss + mean(metrics.z_loss) * self.router_z_loss
