"""Convolutions as modules, over any one, two or three named dims.

    Conv("rows columns", channels, hidden)    (batch, rows, columns, channels) -> (batch, rows, columns, hidden)

A kernel's dims are a window for each dim that it moves over, ``kernel_rows`` for ``rows``, then its inputs and outputs,
and a layout splits what they name as everywhere: ``rows:x`` exchanges halos, an output dim that is split makes a layer
column-parallel, an input dim row-parallel. Two layers, from ``channels`` to ``hidden`` and back, are split by
``hidden:model`` as a feed-forward layer is.
"""

import math
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax

from ..dims import Dim, Dims, Names, as_dims, as_names, names_of, num_elements
from ..ops.conv import conv, conv_transpose
from ..ops.elementwise import add
from ..ops.making import zeros
from ..ops.parameter import param
from ..ops.strides import ByName, Padding, by_name
from ..tensor import Tensor
from .linear import normal


class _Moving(eqx.Module):
    """What both have: a kernel that moves over dims, a bias or none."""

    kernel: Tensor
    bias: Tensor | None
    over: tuple[str, ...] = eqx.field(static=True)
    inputs: tuple[str, ...] = eqx.field(static=True)
    how: "_Fixed" = eqx.field(static=True)

    def __init__(
        self, over: Names, inputs: Dims, outputs: Dims, size: ByName, how: Mapping[str, Any], key: jax.Array,
        bias: bool, variance: float,
    ) -> None:  # fmt: skip
        asked = type(self).__name__
        self.over, self.inputs, self.how = as_names(over, f"{asked}: over"), names_of(inputs), _Fixed(how)
        sizes = by_name(size, dict.fromkeys(self.over, 1), "size", asked)
        windows = tuple(Dim(f"kernel_{name}", sizes[name]) for name in self.over)
        deviation = math.sqrt(variance / num_elements(windows + inputs))
        self.kernel = normal(key, windows + inputs + outputs, deviation)
        self.bias = param(zeros(outputs)) if bias else None

    def _with_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else add(y, self.bias.astype(y.dtype))


class Conv(_Moving):
    """A convolution, ``mw.conv``, with its kernel, and a bias if asked for.

    Args:
        over: the dims that the kernel moves over: ``"rows columns"``.
        inputs: the dims that are summed over; ``()`` for none.
        outputs: the dims that come out, last; their names must differ from the inputs'. A name of x that is not in
            ``inputs`` makes a group of each of its positions: ``Conv("rows", (), channels)`` is depthwise.
        size: how many elements the window has: an int for all dims, or by name (others 1).
        strides, dilation, padding: as in ``mw.conv``.
        key: for the kernel, normal with variance ``scale`` / (elements that an output sums).
        bias: whether to add one.
        scale: a factor on the variance; 2 where a ReLU follows (He et al., 2015).

    Raises:
        ValueError: an output has an input's name, or a number is not positive.
    """

    def __init__(
        self, over: Names, inputs: Dim | Dims, outputs: Dim | Dims, *, key: jax.Array, size: ByName = 3,
        strides: ByName = 1, dilation: ByName = 1, padding: Padding = "SAME", bias: bool = False, scale: float = 1.0,
    ) -> None:  # fmt: skip
        how = {"strides": strides, "dilation": dilation, "padding": padding}
        super().__init__(over, as_dims(inputs), as_dims(outputs), size, how, key, bias, scale)

    def __call__(self, x: Tensor) -> Tensor:
        """The dims of ``x`` but for the inputs, those of ``over`` with the sizes of the outputs, then the outputs."""
        return self._with_bias(conv(x, self.kernel.astype(x.dtype), self.over, inputs=self.inputs, **self.how))


class ConvTranspose(_Moving):
    """A transposed convolution, ``mw.conv_transpose``: dims become longer by their strides, here 2 unless given.

    The arguments and errors are those of ``Conv``; an output sums size / strides windows of the inputs.
    """

    def __init__(
        self, over: Names, inputs: Dim | Dims, outputs: Dim | Dims, *, key: jax.Array, size: ByName = 2,
        strides: ByName = 2, dilation: ByName = 1, padding: Padding = "SAME", bias: bool = False, scale: float = 1.0,
    ) -> None:  # fmt: skip
        how = {"strides": strides, "dilation": dilation, "padding": padding}
        names = as_names(over, "ConvTranspose: over")
        longer = math.prod(by_name(strides, dict.fromkeys(names, 1), "stride", "ConvTranspose").values())
        super().__init__(over, as_dims(inputs), as_dims(outputs), size, how, key, bias, scale * longer)

    def __call__(self, x: Tensor) -> Tensor:
        """As ``Conv``."""
        kernel = self.kernel.astype(x.dtype)
        return self._with_bias(conv_transpose(x, kernel, self.over, inputs=self.inputs, **self.how))


class _Fixed(dict[str, Any]):
    """A mapping that can be part of a module's static structure: it is never changed, and has a hash."""

    def __init__(self, items: Mapping[str, Any]) -> None:
        super().__init__({name: _fixed(value) for name, value in items.items()})

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


def _fixed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _Fixed(value)
    return tuple(value) if isinstance(value, list) else value
