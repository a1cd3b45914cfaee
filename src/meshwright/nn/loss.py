"""Losses on named tensors."""

import jax.numpy as jnp

from ..dims import show, without
from ..errors import fail, fail_type
from ..ops.elementwise import greater_equal, less, logical_or, subtract, where
from ..ops.indexing import one_hot
from ..ops.lowering import check_operand
from ..ops.reduce import logsumexp
from ..ops.reduce import sum as sum_over
from ..tensor import Tensor


def cross_entropy(logits: Tensor, targets: Tensor, over: str = "vocab") -> Tensor:
    """The negative log-probability of each target, in float32 nats.

    Args:
        logits: unnormalised log-probabilities, with the dim ``over``; it may be split: no device sees a whole row.
        targets: integers along ``over``, with the other dims of ``logits``. One outside it gives NaN.
        over: the name of the dim of classes.

    Returns:
        A tensor with the dims of ``targets``.

    Raises:
        ValueError: ``logits`` lacks the dim ``over``, or ``targets`` has other dims than the rest of ``logits``.
        TypeError: ``targets`` are no integers.
    """
    _check(logits, targets, over)
    wide, vocab, targets = logits.astype("float32"), logits.dim(over), targets.astype("int32")
    # A sum under a mask, not a lookup: its gradient is a mask again, where that of a lookup is a scatter of all logits.
    picked = sum_over(where(one_hot(targets, vocab, "bool"), wide, 0.0), over)
    outside = logical_or(less(targets, 0), greater_equal(targets, vocab.size))
    return subtract(logsumexp(wide, over), where(outside, float("nan"), picked))


def _check(logits: Tensor, targets: Tensor, over: str) -> None:
    for operand in (logits, targets):
        check_operand(operand, "cross_entropy", scalars=False)
    rest = without(logits.dims, (logits.dim(over).name,))
    if set(targets.dims) != set(rest):
        raise fail(
            f"cross_entropy: the targets ({show(targets.dims)}) must have the dims of the logits "
            f"({show(logits.dims)}) less {over!r}: ({show(rest)})."
        )
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise fail_type(
            f"cross_entropy: the targets are {targets.dtype}; they are positions along {over!r}, integers. For "
            "probabilities write -(targets * mw.log_softmax(logits, over)).sum(over)."
        )
