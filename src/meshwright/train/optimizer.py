"""The optimizer: AdamW from Optax, with warm-up, cosine decay and clipping.

It runs outside the region, on trees of whole tensors that are split alike: elementwise updates of those need no
communication, and the global norm is one number. So the update is the same under every layout.

Weight decay is for matrices: parameters with at least two dims besides ``layers``, by which layers are stacked. What is
called ``bias``, ``scale`` or ``shift`` is none, whatever its dims.
"""

from dataclasses import dataclass
from typing import Any

import jax
import optax

from ..errors import fail
from ..tensor import Tensor, is_tensor

STACKED = "layers"
VECTORS = ("bias", "scale", "shift")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How parameters are updated."""

    learning_rate: float = 6e-3
    """The greatest learning rate, reached after the warm-up."""
    warmup_steps: int = 20
    """Steps in which the learning rate grows, in equal parts; the first step has the first part."""
    final_rate: float = 0.1
    """The learning rate of the last step, as a share of LEARNING_RATE; a cosine leads there."""
    weight_decay: float = 0.1
    """What a matrix loses in a step, times the learning rate."""
    clip_norm: float = 1.0
    """Gradients with a greater global norm are scaled down to it."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.95
    """Decay of the mean of squared gradients."""
    epsilon: float = 1e-8
    """Added to the root of the latter."""

    def __post_init__(self) -> None:
        for field in ("learning_rate", "clip_norm", "epsilon"):
            if getattr(self, field) <= 0:
                raise fail(f"OptimizerConfig: {field} is {getattr(self, field)}; it must be positive.")
        for field in ("warmup_steps", "weight_decay", "final_rate"):
            if getattr(self, field) < 0:
                raise fail(f"OptimizerConfig: {field} is {getattr(self, field)}; it must not be negative.")
        for field in ("beta1", "beta2"):
            if not 0 <= getattr(self, field) < 1:
                raise fail(
                    f"OptimizerConfig: {field} is {getattr(self, field)}; it must be at least 0 and less than 1."
                )


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of each step of a run of ``steps``, counted from 0."""
    warmup = min(config.warmup_steps, max(steps - 2, 0))
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (warmup + 1),
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps - 1, warmup + 1),
        end_value=config.final_rate * config.learning_rate,
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, 2019) for trees of tensors, in a run of ``steps``."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )


def update(optimizer: optax.GradientTransformation, gradient: Any, state: Any, params: Any) -> tuple[Any, Any]:
    """The next parameters and the optimizer's next state."""
    with jax.numpy_dtype_promotion("standard"):  # Optax multiplies its int32 count of steps with floats.
        updates, moved = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), moved


def decayed(params: Any) -> Any:
    """For each tensor whether it is a matrix: the mask of weight decay."""
    return jax.tree_util.tree_map_with_path(_is_matrix, params, is_leaf=is_tensor)


def _is_matrix(path: Any, x: Tensor) -> bool:
    """Whether a parameter has two dims besides the one by which layers are stacked, and is not called a vector."""
    last = jax.tree_util.keystr(path[-1:], simple=True)
    return last not in VECTORS and sum(name != STACKED for name in x.names) >= 2
