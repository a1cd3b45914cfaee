"""Convolution, by names: what moves, what is summed, what is kept.

    conv(x, kernel, over={"rows": "kernel_rows", "cols": "kernel_cols"}, inputs="channels")

    x       (batch, rows, cols, channels)
    kernel  (kernel_rows, kernel_cols, channels, features)   ->   (batch, rows, cols, features)

The kernel moves over the dims ``over``, each with a window dim of the kernel's, and is summed over its windows and the
dims ``inputs``, which both operands have. Every other name stays. A dim of x alone is a batch dim, one of the kernel
alone an output dim; a dim of both is a group: each of its positions has a kernel of its own. That is all there is to a
grouped convolution (split the channels into groups and what is in them), and with the channels themselves as the group
and no inputs, to a depthwise one. As in JAX, the kernel is not flipped.

==============================  ============================================================
split                           between devices
==============================  ============================================================
a dim of ``over``               permutes of the halos that the device's outputs look at
a dim of ``inputs``             a sum, pending until it is used
batch, output, group dims       nothing
a window dim of the kernel      an all-gather of the kernel
==============================  ============================================================

Locally all dims of a kind are merged into one, for ``jax.lax.conv_general_dilated`` with the channels last. A depthwise
kernel of few taps is a sum of products instead, a term for each tap: an elementwise function, which XLA fuses.

Under XLA's partitioner the dims of ``over`` are whole on every device for the convolution proper, and all dims where
there are groups: it multiplies gradients of a convolution by the size of a mesh axis that splits none of its dims, and
refuses some grouped ones by ending the process (JAX 0.10).
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax import lax

from ..dims import Dims, Names, as_names, find, index_of, names_of, show, union, without
from ..errors import fail, nearest
from ..held import gathered
from ..scope import Axes, Split
from ..tensor import PARAMETER, Tensor, make
from .lowering import align, check_operand, run, split_of, wanted
from .strides import (
    ByName,
    Padding,
    Reach,
    Stretch,
    make_reaches,
    resized_dims,
    skipped,
    stretch,
    summed_in,
    whole_for_xla,
)

Over = Names | Mapping[str, str]

MOST_SPATIAL = 3
FEW_TAPS = 32
"""Up to here a depthwise convolution is written as a sum of products. On a CPU (JAX 0.10.2) 3 x 3 taps on 4 x 32 x 32
positions of 96 channels take 2 ms so, with gradients 10 ms; as a grouped convolution 16 and 39 ms. Beyond, compiling so
many terms takes longer (3 s for the gradient of 7 x 7) and little is gained."""


def conv(
    x: Tensor,
    kernel: Tensor,
    over: Over,
    *,
    inputs: Names,
    strides: ByName = 1,
    dilation: ByName = 1,
    padding: Padding = "SAME",
    preferred_element_type: Any = None,
    precision: Any = None,
) -> Any:
    """The convolution of ``x`` with ``kernel``, over one, two or three dims.

    Args:
        x: the inputs.
        kernel: the windows, the dims ``inputs``, and the output dims; often a parameter.
        over: for each dim that the kernel moves over, its window dim in the kernel: ``{"rows": "kernel_rows"}``. Names
            alone, ``"rows cols"``, stand for window dims called ``kernel_rows`` and ``kernel_cols``.
        inputs: the dims that are summed over, of both operands: ``"channels"``; ``()`` for a depthwise kernel.
        strides: how far the kernel moves between outputs: an int for all dims, or by name (others 1).
        dilation: how far apart the elements lie that the kernel looks at, in the same form.
        padding: zeros around each dim: ``"SAME"`` makes size / stride outputs (rounded up), ``"VALID"`` puts none; or
            ``(before, after)``, or an int for both; for all dims, or for each by name.
        preferred_element_type: the dtype of sums and result, as in ``jax.lax.conv_general_dilated``.
        precision: as there.

    Returns:
        The dims of ``x`` but for ``inputs``, those of ``over`` with the sizes of the outputs, then the output dims of
        the kernel.

    Raises:
        ValueError: a name is unknown, missing in one operand or used twice, sizes of one name differ, a number is not
            positive, the kernel is wider than the padded dim; or the axes that split a dim do not divide its new size.
        TypeError: a number is not a static int.
    """
    roles = _roles(x, kernel, over, inputs, "conv")
    reaches = make_reaches(x, roles.taps, strides, dilation, padding, "conv")
    return _convolved(x, kernel, roles, reaches, "conv", preferred_element_type, precision)


def conv_transpose(
    x: Tensor,
    kernel: Tensor,
    over: Over,
    *,
    inputs: Names,
    strides: ByName = 1,
    dilation: ByName = 1,
    padding: Padding = "SAME",
    preferred_element_type: Any = None,
    precision: Any = None,
) -> Any:
    """The transposed convolution, as ``jax.lax.conv_transpose``: it makes dims longer by their strides.

    The inputs are spread out, ``strides`` apart with zeros in between, and convolved. The kernel is not flipped: the
    gradient of ``conv`` with respect to its inputs is that with the flipped one, ``mw.flip(kernel, "kernel_rows")``.

    Args:
        strides: how many outputs there are to an input: an int for all dims, or by name (others 1).
        padding: ``"SAME"`` makes size * stride outputs, ``"VALID"`` all that an input reaches (at least as many); or
            ``(before, after)``, zeros around the inputs that were spread out.

    The other arguments, the result and the errors are those of ``conv``.
    """
    roles = _roles(x, kernel, over, inputs, "conv_transpose")
    reaches = make_reaches(x, roles.taps, strides, dilation, padding, "conv_transpose", transposed=True)
    return _convolved(x, kernel, roles, reaches, "conv_transpose", preferred_element_type, precision)


# Who is who


@dataclass(frozen=True)
class _Roles:
    """The dims of both operands by what becomes of them."""

    batch: Dims
    spatial: Dims
    windows: Dims
    groups: Dims
    inputs: Dims
    outputs: Dims

    @property
    def taps(self) -> dict[str, int]:
        """The size of the window along each spatial dim."""
        return {d.name: window.size for d, window in zip(self.spatial, self.windows, strict=True)}

    @property
    def lhs(self) -> Dims:
        return self.batch + self.spatial + self.groups + self.inputs

    @property
    def rhs(self) -> Dims:
        return self.windows + self.inputs + self.groups + self.outputs


def _roles(x: Any, kernel: Any, over: Over, inputs: Names, asked: str) -> _Roles:
    for operand in (x, kernel):
        check_operand(operand, asked, scalars=False)
    pairs = dict(over) if isinstance(over, Mapping) else {n: f"kernel_{n}" for n in as_names(over, f"{asked}: over")}
    summed = as_names(inputs, f"{asked}: inputs")
    operands = f"\n  x: ({show(x.dims)})\n  kernel: ({show(kernel.dims)})"
    _check_pairs(x, kernel, pairs, summed, asked, operands)
    for name in summed:
        for operand, what in ((x, "x"), (kernel, "the kernel")):
            if name not in operand.names:
                hint = nearest(name, operand.names)
                raise fail(f"{asked}: the input dim {name!r} is missing in {what}.{hint}{operands}")
    windows = tuple(find(kernel.dims, w, asked) for w in pairs.values())
    others = without(kernel.dims, names_of(windows))
    every = union([x.dims, others], asked)
    both = [n for n in x.names if n in names_of(others)]
    return _Roles(
        batch=without(x.dims, (*both, *pairs)),
        spatial=tuple(find(x.dims, n, asked) for n in pairs),
        windows=windows,
        groups=tuple(find(x.dims, n, asked) for n in both if n not in summed),
        inputs=tuple(find(every, n, asked) for n in summed),
        outputs=without(others, x.names),
    )


def _check_pairs(
    x: Tensor, kernel: Tensor, pairs: Mapping[str, str], summed: tuple[str, ...], asked: str, operands: str
) -> None:
    """Raise unless the kernel has a window, and no more, for each dim that it moves over."""
    if not 1 <= len(pairs) <= MOST_SPATIAL:
        raise fail(
            f"{asked}: a kernel moves over 1 to {MOST_SPATIAL} dims, here over {len(pairs)}: ({', '.join(pairs)})."
            f"{operands}\n  A dim to sum over belongs to inputs; a dim that both have and that stays needs no mention."
        )
    for name, window in pairs.items():
        index_of(x.dims, name, asked)
        if window not in kernel.names:
            raise fail(
                f"{asked}: the kernel has no dim {window!r}, the window over {name!r}.{nearest(window, kernel.names)}"
                f"{operands}\n  Say which it is: over={{{name!r}: 'its name in the kernel'}}."
            )
        if name in kernel.names or window in x.names:
            twice = name if name in kernel.names else window
            raise fail(
                f"{asked}: both operands have the dim {twice!r}. A window has a name that x lacks, and the dim that it "
                f"moves over one that the kernel lacks.{operands}\n  Rename it in the kernel: "
                f"kernel.rename({twice}={'kernel_' + name!r})."
            )
        if name in summed or window in summed:
            raise fail(f"{asked}: {name if name in summed else window!r} is both in over and in inputs.{operands}")
    names = (*pairs.values(), *summed)
    if twice := [n for n in names if names.count(n) > 1]:
        raise fail(f"{asked}: the kernel's dim {twice[0]!r} is named twice in over and inputs.{operands}")


# The local rule, and the exchange before it


def _convolved(
    x: Tensor, kernel: Tensor, roles: _Roles, reaches: tuple[Reach, ...], asked: str, preferred: Any, precision: Any
) -> Any:
    kept = resized_dims(without(x.dims, names_of(roles.inputs)), reaches) + roles.outputs
    want = wanted(asked, x.dims, without(kernel.dims, names_of(roles.windows)), kept)
    dtype = jnp.result_type(x.dtype, kernel.dtype)
    made = roles.batch + resized_dims(roles.spatial, reaches) + roles.groups + roles.outputs
    at = [len(roles.batch) + i for i in range(len(reaches))]
    depthwise = not roles.inputs + roles.outputs and math.prod(roles.taps.values()) <= FEW_TAPS

    def together(array: Any, these: Dims) -> Any:
        return array if depthwise else whole_for_xla(array, these, names_of(these if roles.groups else roles.spatial))

    def reach(lhs: Any) -> Stretch:
        lhs = together(align(lhs, x.dims, roles.lhs), roles.lhs)
        return stretch(lhs.astype(dtype), reaches, at)

    reached = run(reach, [x], want, linear=True)

    def local(rhs: Any) -> Any:
        rhs = gathered(rhs, _only(kernel.dims, roles.windows, asked), want, x.scope)
        rhs = together(align(rhs, kernel.dims, roles.rhs).astype(dtype), roles.rhs)
        if depthwise:
            out = _sum_of_products(reached, rhs, roles, reaches, preferred)
        else:
            out = _product(reached, rhs, roles, reaches, preferred, precision)
        return align(together(skipped(out, reaches, at, reached.skips), made), made, kept)

    result = run(local, [kernel], want, again=kernel.role == PARAMETER)
    return make(result, kept, asked=asked, partial=_axes_of(roles.inputs, asked))


def _only(these: Dims, some: Dims, asked: str) -> Split:
    """The axes of some dims, none of the others."""
    return tuple(axes if d in some else () for d, axes in zip(these, split_of(these, asked), strict=True))


def _axes_of(these: Dims, asked: str) -> Axes:
    return tuple(axis for axes in split_of(these, asked) for axis in axes)


def _product(
    reached: Stretch, rhs: Any, roles: _Roles, reaches: tuple[Reach, ...], preferred: Any, precision: Any
) -> Any:
    """The convolution proper, all dims of a kind merged into one: batch, spatial dims, groups x channels."""
    (b, s) = len(roles.batch), len(reaches)
    for position in range(s):
        reached, reaches = _padded_within(reached, reaches, position, b + position)
    lhs = reached.array
    i = s + len(roles.inputs)
    g = i + len(roles.groups)
    groups, outputs = rhs.shape[i:g], rhs.shape[g:]
    spatial = "DHW"[:s]
    out = lax.conv_general_dilated(
        lhs.reshape(math.prod(lhs.shape[:b]), *lhs.shape[b : b + s], math.prod(lhs.shape[b + s :])),
        rhs.reshape(*rhs.shape[:s], math.prod(rhs.shape[s:i]), math.prod(rhs.shape[i:])),
        [reach.stride for reach in reaches],
        reached.ends,
        lhs_dilation=[reach.spread for reach in reaches],
        rhs_dilation=[reach.dilation for reach in reaches],
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        feature_group_count=math.prod(groups),
        precision=precision,
        preferred_element_type=preferred,
    )
    return out.reshape(lhs.shape[:b] + out.shape[1:-1] + groups + outputs)


def _padded_within(reached: Stretch, reaches: tuple[Reach, ...], i: int, at: int) -> tuple[Stretch, tuple[Reach, ...]]:
    """No more padding before a dim than a window sees beside an input; what is more is done here. Its gradient would be
    a convolution with padding below zero, for which XLA reads beyond the array on a CPU (JAX 0.10)."""
    reach, (before, after) = reaches[i], reached.ends[i]
    more = before - (reach.span - 1)
    if more <= 0:
        return reached, reaches
    widths = [(more, 0, reach.spread - 1) if p == at else (0, 0, 0) for p in range(reached.array.ndim)]
    array = lax.pad(reached.array, jnp.zeros((), reached.array.dtype), widths)
    ends = (*reached.ends[:i], (before - more, after), *reached.ends[i + 1 :])
    return Stretch(array, ends, reached.skips), (*reaches[:i], replace(reach, spread=1), *reaches[i + 1 :])


def _sum_of_products(reached: Stretch, rhs: Any, roles: _Roles, reaches: tuple[Reach, ...], preferred: Any) -> Any:
    """A depthwise convolution: the inputs at each tap, times the kernel there."""
    dtype, lhs, (b, s) = reached.array.dtype, reached.array, (len(roles.batch), len(reaches))
    wide = summed_in(preferred or dtype)
    widths = [(*ends, reach.spread - 1) for ends, reach in zip(reached.ends, reaches, strict=True)]
    none = (0, 0, 0)
    lhs = lax.pad(lhs, jnp.zeros((), dtype), [none] * b + widths + [none] * len(roles.groups))
    first = [0] * lhs.ndim
    steps = [1] * b + [reach.stride for reach in reaches] + [1] * len(roles.groups)
    total: Any = None
    for tap in itertools.product(*(range(reach.taps) for reach in reaches)):
        start, limit = first.copy(), list(lhs.shape)
        for i, (reach, t) in enumerate(zip(reaches, tap, strict=True)):
            start[b + i] = t * reach.dilation
            limit[b + i] = lhs.shape[b + i] - reach.span + 1 + start[b + i]
        part = lax.slice(lhs, start, limit, steps).astype(wide)
        term = part * jnp.expand_dims(rhs[tap].astype(wide), range(b + s))
        total = term if total is None else total + term
    return total.astype(preferred or dtype)
