"""Linear maps between named dims, and embeddings: tables looked up by token.

A weight's dims are its inputs' and its outputs', so a layer says by names alone how it is split: an output dim that the
layout splits makes it column-parallel, an input dim row-parallel. Parameters are cast to the dtype of the activations
before anything is gathered.
"""

import math
from collections.abc import Sequence

import equinox as eqx
import jax

from ..dims import Dim, Dims, as_dims, names_of, num_elements
from ..ops import random
from ..ops.contract import dot
from ..ops.elementwise import add, multiply
from ..ops.indexing import take
from ..ops.making import zeros
from ..ops.parameter import param
from ..tensor import Tensor


class Linear(eqx.Module):
    """``y = x . weight + bias``, contracted over the input dims.

    Args:
        inputs: the dims that go in; the output's names must differ from them.
        outputs: the dims that come out, last.
        key: for the weight, normal with variance ``scale`` / (elements of the inputs).
        bias: whether to add one.
        scale: a factor on the variance.
    """

    weight: Tensor
    bias: Tensor | None
    over: tuple[str, ...] = eqx.field(static=True)

    def __init__(
        self, inputs: Dim | Dims, outputs: Dim | Dims, *, key: jax.Array, bias: bool = False, scale: float = 1.0
    ) -> None:
        inputs, outputs = as_dims(inputs), as_dims(outputs)
        self.over = names_of(inputs)
        self.weight = normal(key, inputs + outputs, math.sqrt(scale / num_elements(inputs)))
        self.bias = param(zeros(outputs)) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        y = dot(x, self.weight.astype(x.dtype), self.over)
        return y if self.bias is None else add(y, self.bias.astype(x.dtype))


class Embedding(eqx.Module):
    """A table of vectors, one for each position of ``vocab``, looked up by integer.

    Args:
        vocab: the dim that is looked up.
        vector: the dims of an entry.
        key: for the table, normal with standard deviation ``deviation``.
    """

    table: Tensor
    over: str = eqx.field(static=True)

    def __init__(self, vocab: Dim, vector: Dim | Dims, *, key: jax.Array, deviation: float = 1.0) -> None:
        self.over = vocab.name
        self.table = normal(key, (vocab, *as_dims(vector)), deviation)

    def __call__(self, ids: Tensor, dtype: str = "float32") -> Tensor:
        return take(self.table.astype(dtype), ids, self.over)


def normal(key: jax.Array, dims: Sequence[Dim], deviation: float) -> Tensor:
    """A parameter drawn from a normal distribution; each device makes its slice."""
    return param(multiply(random.normal(key, tuple(dims)), deviation))
