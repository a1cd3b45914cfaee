"""Losses on named tensors."""

from ..ops.elementwise import greater_equal, less, logical_or, subtract, where
from ..ops.indexing import one_hot
from ..ops.reduce import logsumexp
from ..ops.reduce import sum as sum_over
from ..tensor import Tensor


def cross_entropy(logits: Tensor, targets: Tensor, over: str = "vocab") -> Tensor:
    """The negative log-probability of each target, in float32 nats.

    Args:
        logits: unnormalised log-probabilities, with the dim ``over``; it may be split: no device sees a whole row.
        targets: integers along ``over``, with the other dims of ``logits``. One outside it gives NaN.

    Returns:
        A tensor with the dims of ``targets``.
    """
    wide, vocab = logits.astype("float32"), logits.dim(over)
    # A sum under a mask, not a lookup: its gradient is a mask again, where that of a lookup is a scatter of all logits.
    picked = sum_over(where(one_hot(targets, vocab, "bool"), wide, 0.0), over)
    outside = logical_or(less(targets, 0), greater_equal(targets, vocab.size))
    return subtract(logsumexp(wide, over), where(outside, float("nan"), picked))
