"""Normalisation over named dims, computed in float32 and returned in the dtype that came in."""

import equinox as eqx

from ..dims import Dim, Dims, as_dims, names_of
from ..ops.elementwise import add, multiply, rsqrt, subtract
from ..ops.making import ones, zeros
from ..ops.parameter import param
from ..ops.reduce import mean
from ..tensor import Tensor


class RMSNorm(eqx.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale, over ``dims`` (Zhang and Sennrich, 2019)."""

    scale: Tensor
    over: tuple[str, ...] = eqx.field(static=True)
    epsilon: float = eqx.field(static=True)

    def __init__(self, dims: Dim | Dims, *, epsilon: float = 1e-6) -> None:
        self.over, self.epsilon = names_of(as_dims(dims)), epsilon
        self.scale = param(ones(as_dims(dims)))

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.astype("float32")
        inverse = rsqrt(add(mean(multiply(wide, wide), self.over), self.epsilon))
        return multiply(multiply(wide, inverse), self.scale).astype(x.dtype)


class LayerNorm(eqx.Module):
    """(x - mean) / sqrt(variance + epsilon) * scale + shift, over ``dims`` (Ba, Kiros and Hinton, 2016)."""

    scale: Tensor
    shift: Tensor
    over: tuple[str, ...] = eqx.field(static=True)
    epsilon: float = eqx.field(static=True)

    def __init__(self, dims: Dim | Dims, *, epsilon: float = 1e-5) -> None:
        self.over, self.epsilon = names_of(as_dims(dims)), epsilon
        self.scale, self.shift = param(ones(as_dims(dims))), param(zeros(as_dims(dims)))

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.astype("float32")
        centred = subtract(wide, mean(wide, self.over))
        inverse = rsqrt(add(mean(multiply(centred, centred), self.over), self.epsilon))
        return add(multiply(multiply(centred, inverse), self.scale), self.shift).astype(x.dtype)
