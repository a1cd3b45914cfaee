"""Work: the floating-point operations of a program on one device.

A product of matrices counts two for each multiplication with its addition, a convolution the same for each tap that
meets an element (not the zeros of padding and dilation, so that its gradients cost what it costs), an elementwise
operation one for each element of its result, a reduction one for each element that it reads. Loops count their turns,
a while loop one; of branches the one with the most work counts. What moves data (reshape, transpose, gather, slices,
casts) counts nothing. Along a pipeline each device does passes of its own, which are counted for each; the work of the
program is that of the device that does most.

Work is *useful* the first time it is done, *recomputed* when rematerialisation does it again, and *duplicated* where
devices along an axis hold the same operands and do the same: d devices that do one thing waste d - 1 of d.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from .origin import RECOMPUTE, Origin
from .primitives import BINARY, READING, UNARY
from .program import Block, Choice, Loop, Op, Program, devices_along

MATMUL, CONVOLUTION, ELEMENTWISE = "matmul", "convolution", "elementwise"


def flops_of(op: Op) -> tuple[str, int]:
    """What kind of work one run of an operation is, and how many operations it does on one device."""
    if op.name == "dot_general":
        contracted = op.params["dimension_numbers"][0][0]
        if not contracted:  # an outer product adds nothing up
            return ELEMENTWISE, op.outs[0].num_elements
        return MATMUL, 2 * op.outs[0].num_elements * _contracted(op)
    if op.name == "ragged_dot_general":
        return MATMUL, 2 * _ragged(op)
    if op.name == "conv_general_dilated":
        return CONVOLUTION, 2 * _taps(op)
    if op.name in UNARY or op.name in BINARY:
        return ELEMENTWISE, op.outs[0].num_elements
    if op.name in READING:
        return ELEMENTWISE, next((v.num_elements for v in reversed(op.ins) if v is not None), 0)
    return ELEMENTWISE, 0


def _contracted(op: Op) -> int:
    (left, right), _ = op.params["dimension_numbers"]
    given, places = (op.ins[0], left) if op.ins[0] is not None else (op.ins[1], right)
    return math.prod(given.shape[i] for i in places) if given is not None else 1


def _ragged(op: Op) -> int:
    """The multiplications of a product by groups: each row meets the matrix of its own group alone, be the rows kept,
    or summed over, as in the gradient for the matrices."""
    rows, matrices = op.ins[:2]
    if rows is None or matrices is None:
        return 0
    numbers = op.params["ragged_dot_dimension_numbers"]
    (_, summed), (_, batch) = numbers.dot_dimension_numbers
    met = {*summed, *batch, *numbers.rhs_group_dimensions}
    return rows.num_elements * math.prod(n for i, n in enumerate(matrices.shape) if i not in met)


def _taps(op: Op) -> int:
    """The multiplications of a convolution."""
    (array, kernel), out, params = op.ins[:2], op.outs[0], op.params
    if array is None or kernel is None:
        return 0
    from_dims, kernel_dims, to_dims = params["dimension_numbers"]
    along = (
        _meetings(array.shape[i], kernel.shape[k], out.shape[o], stride, padding[0], holes, kernel_holes)
        for i, k, o, stride, padding, holes, kernel_holes in zip(
            from_dims[2:], kernel_dims[2:], to_dims[2:],
            params["window_strides"], params["padding"], params["lhs_dilation"], params["rhs_dilation"], strict=True,
        )
    )  # fmt: skip
    return out.shape[to_dims[0]] * out.shape[to_dims[1]] * kernel.shape[kernel_dims[1]] * math.prod(along)


@functools.lru_cache(maxsize=1024)
def _meetings(size: int, taps: int, results: int, stride: int, before: int, holes: int, kernel_holes: int) -> int:
    """How often, along one dim, a tap meets an element rather than padding or a hole between elements."""
    place = np.arange(results)[:, None] * stride + np.arange(taps) * kernel_holes - before
    return int(np.sum((place >= 0) & (place <= (size - 1) * holes) & (place % holes == 0)))


@dataclass(frozen=True)
class Work:
    """One operation's work, all its runs."""

    kind: str
    """``matmul``, ``convolution`` or ``elementwise``."""
    flops: int
    """On one device, all its runs together."""
    copies: int
    """How many devices do the same."""
    origin: Origin

    @property
    def recomputed(self) -> bool:
        return self.origin.direction == RECOMPUTE


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one call of a program, on one device: along a pipeline, that which does most."""

    works: tuple[Work, ...] = field(repr=False)

    def _sum(self, kind: str | None = None, recomputed: bool | None = None) -> int:
        return sum(w.flops for w in self.works if kind in (None, w.kind) and recomputed in (None, w.recomputed))

    @property
    def total(self) -> int:
        """All of them."""
        return self._sum()

    @property
    def useful(self) -> int:
        """Those done the first time."""
        return self._sum(recomputed=False)

    @property
    def recomputed(self) -> int:
        """Those that rematerialisation does again."""
        return self._sum(recomputed=True)

    @property
    def matmul(self) -> int:
        """Those of matrix products, the recomputed ones among them."""
        return self._sum(MATMUL)

    @property
    def convolution(self) -> int:
        """Those of convolutions, the recomputed ones among them."""
        return self._sum(CONVOLUTION)

    @property
    def elementwise(self) -> int:
        """All others, the recomputed ones among them."""
        return self._sum(ELEMENTWISE)

    @property
    def duplicated(self) -> int:
        """Those that other devices do as well, less this device's share of doing them once."""
        return sum(w.flops - w.flops // w.copies for w in self.works)


def flops_along(program: Program) -> tuple[Flops, ...]:
    """The work of each device along the pipeline; of one device where there is none."""
    num = devices_along(program.block)
    return tuple(Flops(tuple(_works(program.block, 1, program.sizes, d))) for d in range(num))


def _works(block: Block, times: int, sizes: dict[str, int], device: int) -> Iterator[Work]:
    for node in block.nodes:
        if isinstance(node, Loop):
            turns = node.length if node.length is not None else 1
            yield from _works(node.body, times * turns, sizes, device)
        elif isinstance(node, Choice) and node.passes is not None:
            for branch, runs in node.passes.on(device, times):
                yield from _works(node.branches[branch], runs, sizes, device)
        elif isinstance(node, Choice):
            yield from max((tuple(_works(b, times, sizes, device)) for b in node.branches), key=_total)
        else:
            kind, flops = flops_of(node)
            if flops:
                yield Work(kind, flops * times, copies_of(node, sizes), node.origin)


def _total(works: tuple[Work, ...]) -> int:
    return sum(work.flops for work in works)


def copies_of(op: Op, sizes: dict[str, int]) -> int:
    """How many devices do the same operation on the same operands."""
    axes = {a for v in (*op.ins, *op.outs) if v is not None for a in (*v.varying, *(a for s in v.split for a in s))}
    return math.prod(size for axis, size in sizes.items() if axis not in axes)
