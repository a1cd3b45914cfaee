"""A residual block on images whose rows and columns are split, as an expert writes it by hand with ``jax.shard_map``.

Before each convolution the neighbours along the rows exchange their outermost rows, then those along the columns their
outermost columns, the corners among them; there the convolution itself needs no padding. A group's mean is summed over
all devices. The arithmetic is that of ``Block`` in ``examples/resnet.py`` without a shortcut: x + f(x), f being two
convolutions with group norm. Losses and gradients agree to rounding.

Arrays are (batch, rows, columns, channels), kernels (rows, columns, in, out).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

Params = dict[str, Any]
NUMBERS = ("NHWC", "HWIO", "NHWC")


@dataclass(frozen=True)
class Plan:
    """Which mesh axis does what; None for nothing."""

    data: str | None = None
    """Splits the batch."""
    rows: str | None = None
    """Splits the rows of the images."""
    columns: str | None = None
    """Splits their columns."""

    @property
    def image(self) -> P:
        """The partition spec of images and activations."""
        return P(self.data, self.rows, self.columns, None)

    @property
    def space(self) -> tuple[str, ...]:
        """The axes over which a mean over rows and columns is taken."""
        return tuple(axis for axis in (self.rows, self.columns) if axis)


def from_block(block: Any) -> Params:
    """The parameters of a ``Block`` as positional arrays."""
    norms = {"first": block.first_norm, "second": block.second_norm}
    return {
        "first": block.first.kernel.raw,
        "second": block.second.kernel.raw,
        **{f"{name}_scale": norm.scale.raw for name, norm in norms.items()},
        **{f"{name}_shift": norm.shift.raw for name, norm in norms.items()},
    }


def with_halo(x: jax.Array, axis: str, at: int, width: int) -> jax.Array:
    """``width`` elements more on both sides of position ``at``: the neighbours' along ``axis``, zeros at the ends."""
    size = x.shape[at]
    up = [(i, i + 1) for i in range(lax.axis_size(axis) - 1)]
    before = lax.ppermute(lax.slice_in_dim(x, size - width, size, axis=at), axis, up)
    after = lax.ppermute(lax.slice_in_dim(x, 0, width, axis=at), axis, [(j, i) for i, j in up])
    return jnp.concatenate([before, x, after], at)


def conv(x: jax.Array, kernel: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """A convolution that keeps the size of the image; ``kernel`` is of odd height and width."""
    padding = []
    for at, (axis, taps) in enumerate(zip(axes, kernel.shape, strict=False), 1):
        x = with_halo(x, axis, at, taps // 2) if axis else x
        padding.append((0, 0) if axis else (taps // 2, taps // 2))
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=NUMBERS)


def norm(x: jax.Array, scale: jax.Array, shift: jax.Array, num_groups: int, space: tuple[str, ...]) -> jax.Array:
    """Group norm, in two passes."""
    channels = x.shape[-1]

    def mean(x: jax.Array) -> jax.Array:
        each = jnp.mean(x, (1, 2)).reshape(-1, num_groups, channels // num_groups).mean(-1)
        each = lax.pmean(each, space) if space else each
        return jnp.repeat(each, channels // num_groups, -1)[:, None, None]

    centred = x - mean(x)
    return centred * (lax.rsqrt(mean(centred * centred) + 1e-5) * scale) + shift


def mapped_loss(mesh: Mesh, plan: Plan, num_groups: int) -> Callable[[Params, jax.Array], jax.Array]:
    """The mean of the block's squared outputs, as a function of (params, images), through ``jax.shard_map``."""
    axes, space = (plan.rows, plan.columns), plan.space

    def loss(p: Params, x: jax.Array) -> jax.Array:
        y = conv(x, p["first"], axes)
        y = jax.nn.relu(norm(y, p["first_scale"], p["first_shift"], num_groups, space))
        y = norm(conv(y, p["second"], axes), p["second_scale"], p["second_shift"], num_groups, space)
        mean = jnp.mean(jax.nn.relu(x + y) ** 2)
        every = (plan.data, *space) if plan.data else space
        return lax.pmean(mean, every) if every else mean

    return jax.shard_map(loss, mesh=mesh, in_specs=(P(), plan.image), out_specs=P())
