"""Attention, by names: queries look at keys, and get the mean of what those hold, weighted by a softmax of products.

    attention(q, k, v, over="length", summed="head_dim", causal=True)

    q       (batch, length, heads, group, head_dim)
    k, v    (batch, length, heads, head_dim)            ->   (batch, length, heads, group, head_dim)

Queries, keys and values all have the dim ``over``, and are multiplied along ``summed``. Every other dim of the keys is
one of the queries' too; a dim of the queries alone (``group``) has the keys in common. The scores are float32
(float64 where an operand is) and never whole in memory: ``blocks.py`` says how.

================================  ============================================================
split                             between devices
================================  ============================================================
``over``                          permutes of keys and values round a ring (``ring.py``)
any other dim but ``summed``      nothing
================================  ============================================================

To have heads split instead of the length while attention runs (DeepSpeed-Ulysses: Jacobs et al., 2023), rename both: an
axis that goes from one dim to another is one all-to-all.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..dims import Dim, Dims, find, show, without
from ..errors import fail, fail_type
from ..scope import current_manual
from ..tensor import Tensor, make
from .along import whole
from .attended import Attended, Lying
from .blocks import Sight
from .lowering import align, axes_of, check_operand, copied, is_scalar, local_sizes, run, wanted
from .ring import Ring, attend


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    over: str = "length",
    summed: str = "head_dim",
    causal: bool = False,
    window: int | None = None,
    segments: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q . k) . v, along the tokens ``over`` of one sequence.

    Args:
        q: queries, with the dims of ``k`` and any more.
        k: keys.
        v: values, with the dims of ``k`` (``summed`` may have another size).
        over: the name of the dim along which tokens look at one another.
        summed: the name of the dim along which queries and keys are multiplied.
        causal: whether a token sees itself and those before it only.
        window: a token sees those less than so many places away.
        segments: integers, with the dim ``over`` and any of the keys' others but ``summed``: a token sees those of its
            own segment.
        scale: what products are multiplied with; None: 1 / sqrt(the size of ``summed``).

    Returns:
        The dims of ``q``, in its order, in the dtype of ``q``. A token that sees none gets zeros.

    Raises:
        ValueError: a dim is missing or differs, ``window`` is below 1, or ``summed`` is split.
        TypeError: an operand is not of real floating point numbers, ``window`` is not a static int or ``scale`` no
            number.

    ``jax.grad`` of it may be differentiated in turn, in either mode (``jax.hessian``). ``jax.jvp`` of attention itself
    has no rule: its gradient is written by hand, so that scores are not kept.
    """
    asked = "attention"
    for x in (q, k, v, *(() if segments is None else (segments,))):
        check_operand(x, asked, scalars=False)
    window = None if window is None else whole(window, "the window", asked)
    _check(q, k, v, segments, over, summed, window)
    if not (scale is None or is_scalar(scale)):
        raise fail_type(f"attention: scale is a {type(scale).__name__}; give a number, or multiply the queries by it.")
    marked = () if segments is None else without(segments.dims, (over,))
    shared = tuple(d for d in without(k.dims, (over, summed)) if d not in marked)
    group = tuple(d for d in q.dims if d.name not in k.names)
    length, head, out_head = find(k.dims, over, asked), find(k.dims, summed, asked), find(v.dims, summed, asked)
    ring = _ring(length, Sight(causal, window if window is not None and window < length.size else None))
    factor = 1.0 / math.sqrt(head.size) if scale is None else scale
    ends = marked, shared, group
    out = tuple(out_head if d.name == summed else d for d in q.dims)
    told = Attended(over, summed, causal, ring.sight.window, *map(_lying, (q, k, v))).text

    def on_arrays(*arrays: Any) -> Any:
        with jax.named_scope(told):
            scaled = arrays[0] * jnp.asarray(factor, q.dtype)
        queries = _merged(scaled, q.dims, (*ends, (length,), (head,)))
        keys = _merged(arrays[1], k.dims, (marked, shared, (length,), (head,)))
        values = _merged(arrays[2], v.dims, (marked, shared, (length,), (out_head,)))
        same = _merged(arrays[3], segments.dims, (marked, (length,))) if segments is not None else None
        made: Any = attend(ring, queries, keys, values, same)
        order = (*marked, *shared, *group, length, out_head)
        return align(made.reshape(local_sizes(order, asked)), order, out)

    tensors = [q, k, v] if segments is None else [q, k, v, segments]
    want = wanted(asked, q.dims)
    copies = copied(tensors, want)
    result = run(on_arrays, tensors, want.union(copies))
    return make(result, out, asked=asked, copies=copies)  # type: ignore[no-any-return]


def _ring(length: Dim, sight: Sight) -> Ring:
    split = axes_of(length) if length.size else None
    return Ring(sight, split[1], split[0].size(split[1])) if split else Ring(sight)


def _lying(x: Tensor) -> Lying:
    scope = current_manual()
    return Lying(x.dims, scope.split(x.dims, "attention") if scope is not None else ((),) * x.ndim, str(x.dtype))


def _merged(array: Any, have: Dims, groups: Sequence[Dims]) -> Any:
    """A positional array with the dims of each group merged into one, in this order."""
    array = align(array, have, tuple(d for group in groups for d in group))
    sizes = iter(array.shape)
    return array.reshape([math.prod(next(sizes) for _ in group) for group in groups])


def _check(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, over: str, summed: str, window: int | None
) -> None:
    asked = "attention"
    for x in (q, k, v):
        for name in (over, summed):
            find(x.dims, name, asked)
    operands = f"queries ({show(q.dims)}), keys ({show(k.dims)}), values ({show(v.dims)})"
    if wrong := [str(x.dtype) for x in (q, k, v) if not jnp.issubdtype(x.dtype, jnp.floating)]:
        raise fail_type(
            f"attention: an operand is of {wrong[0]}; a softmax of products is of real floating point numbers. Write "
            f"x.astype('float32') first. {operands}"
        )
    sizes = {find(x.dims, over, asked).size for x in (q, k, v)}
    if len(sizes) > 1:
        raise fail(
            f"attention: {over!r} has several sizes. {operands}\n  It is along the tokens of one sequence. For two, "
            f"give the keys' length another name: mw.einsum, mw.softmax over it and mw.einsum."
        )
    lacking = [d for d in k.dims if d not in q.dims]
    if lacking:
        raise fail(f"attention: the queries lack {show(lacking)}, which the keys have. {operands}")
    if set(without(v.dims, (summed,))) != set(without(k.dims, (summed,))):
        raise fail(f"attention: keys and values must have the same dims but for the size of {summed!r}. {operands}")
    if segments is not None:
        find(segments.dims, over, f"{asked}: segments")
        wrong = [d for d in segments.dims if d not in k.dims or d.name == summed]
        if wrong or not jnp.issubdtype(segments.dtype, jnp.integer):
            raise fail(
                f"attention: segments ({show(segments.dims)}; {segments.dtype}) must be integers, with dims of the "
                f"keys but {summed!r}: ({show(without(k.dims, (summed,)))})."
            )
    if window is not None and window < 1:
        raise fail(f"attention: window={window}; a token sees itself at least, window=1.")
    if axes_of(find(k.dims, summed, asked)) or axes_of(find(v.dims, summed, asked)):
        raise fail(
            f"attention: {summed!r} is split, along which queries and keys are multiplied: every score would be a sum "
            f"over devices. Leave {summed!r} out of the layout, or rename it first: q.rename({summed}='whole')."
        )
