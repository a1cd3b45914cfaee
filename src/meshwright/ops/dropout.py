"""Dropout: elements set to zero at random, the others scaled up so that the mean stays."""

from typing import Any

from ..dims import Names
from ..errors import fail
from .elementwise import astype, divide, where
from .lowering import check_operand, over_names
from .random import bernoulli


def dropout(x: Any, rate: Any, key: Any, *, over: Names | None = None) -> Any:
    """``x`` with elements set to zero at random, and the others divided by ``1 - rate``.

    Args:
        x: a tensor.
        rate: the probability of dropping an element: 0 <= rate < 1, a number or a traced scalar.
        key: a random key; None for ``x`` as it is (evaluation).
        over: the names along which elements are dropped one by one; along the others all go together. All when None.
            ``over=("batch", "embed")`` drops a feature of a sequence for its whole length.

    The mask is ``jax.random.bernoulli(key, 1 - rate, sizes)`` for the dims of ``x`` that are in ``over``, in their
    order, bit for bit on every layout; each device makes its slice of it.

    Raises:
        ValueError: the rate is outside 0 to 1, or a name is missing.
    """
    check_operand(x, "dropout", scalars=False)
    names = over_names(x, over, "dropout")
    if isinstance(rate, int | float) and not 0 <= rate < 1:
        raise fail(f"dropout: the rate is {rate}; it must be at least 0 and below 1.")
    if key is None or (isinstance(rate, int | float) and rate == 0):
        return x
    kept = 1.0 - rate
    mask = bernoulli(key, tuple(d for d in x.dims if d.name in names), kept)
    return where(mask, divide(x, kept if isinstance(kept, float) else astype(kept, x.dtype)), 0)
