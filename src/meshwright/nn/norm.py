"""Normalisation over named dims, computed in float32 and returned in the dtype that came in."""

import equinox as eqx

from ..dims import Dim, Dims, Names, as_dims, as_names, names_of
from ..errors import fail
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


class GroupNorm(eqx.Module):
    """(x - mean) / sqrt(variance + epsilon) * scale + shift, over groups of channels and the dims ``over`` (Wu and He,
    2018).

    Means are taken over the dims ``over`` first and over a group's channels then: whatever is split, only numbers of
    the size (batch, channels) go between devices.

    Args:
        channels: the dim that is cut into groups.
        num_groups: how many: each has channels / num_groups neighbours.
        over: the other dims of a mean: ``"rows columns"``.

    Raises:
        ValueError: the groups do not divide the channels.
    """

    scale: Tensor
    shift: Tensor
    num_groups: int = eqx.field(static=True)
    over: tuple[str, ...] = eqx.field(static=True)
    epsilon: float = eqx.field(static=True)

    def __init__(self, channels: Dim, num_groups: int, over: Names, *, epsilon: float = 1e-5) -> None:
        if num_groups < 1 or channels.size % num_groups:
            fit = [n for n in range(1, channels.size + 1) if channels.size % n == 0]
            raise fail(
                f"GroupNorm: {num_groups} groups do not divide {channels.name}={channels.size}. "
                f"These do: {', '.join(map(str, fit))}."
            )
        self.num_groups, self.over, self.epsilon = num_groups, as_names(over, "GroupNorm: over"), epsilon
        self.scale, self.shift = param(ones((channels,))), param(zeros((channels,)))

    def __call__(self, x: Tensor) -> Tensor:
        """The dims of ``x``, which has ``channels`` and ``over`` among them; every other dim is a batch dim."""
        wide = x.astype("float32")
        centred = subtract(wide, self._mean(wide))
        inverse = rsqrt(add(self._mean(multiply(centred, centred)), self.epsilon))
        return add(multiply(centred, multiply(inverse, self.scale)), self.shift).astype(x.dtype)

    def _mean(self, x: Tensor) -> Tensor:
        """The mean of each group, for each of its channels."""
        name = self.scale.names[0]
        groups, members = f"{name}_group", f"{name}_member"
        each = mean(x, self.over).split(name, **{groups: self.num_groups, members: -1})
        return mean(each, members).broadcast(each.dim(members)).merge((groups, members), name)
