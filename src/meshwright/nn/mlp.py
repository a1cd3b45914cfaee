"""The gated feed-forward layer (Shazeer, 2020, "GLU variants improve transformer")."""

from collections.abc import Callable

import equinox as eqx
import jax

from ..dims import Dim
from ..ops.elementwise import multiply, silu
from ..tensor import Tensor
from .linear import Linear


class GatedMLP(eqx.Module):
    """down(activation(gate(x)) * up(x)): from ``embed`` to ``ff`` twice, and back."""

    gate: Linear
    up: Linear
    down: Linear
    activation: Callable[[Tensor], Tensor] = eqx.field(static=True)

    def __init__(
        self,
        embed: Dim,
        ff: Dim,
        *,
        key: jax.Array,
        activation: Callable[[Tensor], Tensor] = silu,
        scale: float = 1.0,
    ) -> None:
        gate, up, down = jax.random.split(key, 3)
        self.gate = Linear(embed, ff, key=gate)
        self.up = Linear(embed, ff, key=up)
        self.down = Linear(ff, embed, key=down, scale=scale)
        self.activation = activation

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(multiply(self.activation(self.gate(x)), self.up(x)))
