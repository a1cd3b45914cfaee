"""Losses on named tensors."""

from ..ops.elementwise import subtract
from ..ops.indexing import take
from ..ops.reduce import logsumexp
from ..tensor import Tensor


def cross_entropy(logits: Tensor, targets: Tensor, over: str = "vocab") -> Tensor:
    """The negative log-probability of each target, in float32 nats.

    Args:
        logits: unnormalised log-probabilities, with the dim ``over``; it may be split: no device sees a whole row.
        targets: integers along ``over``, with the other dims of ``logits``.

    Returns:
        A tensor with the dims of ``targets``.
    """
    wide = logits.astype("float32")
    return subtract(logsumexp(wide, over), take(wide, targets, over))
