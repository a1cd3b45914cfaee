"""Losses against Optax's, and their messages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import meshwright as mw
from meshwright import Tensor
from meshwright.nn import cross_entropy

from .laws import agree, tensor, ways

BATCH, VOCAB = mw.dims(batch=8, vocab=256)
TARGETS = jnp.arange(8) * 31


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32"])
def test_cross_entropy_is_optaxs_for_integers_of_every_width(dtype: str) -> None:
    logits = tensor(BATCH, VOCAB)
    targets = jnp.minimum(TARGETS, min(jnp.iinfo(dtype).max, 255)).astype(dtype)

    def theirs(array: jax.Array) -> jax.Array:
        return optax.losses.softmax_cross_entropy_with_integer_labels(array, targets.astype("int32")).sum()

    def ours(array: jax.Array) -> jax.Array:
        return cross_entropy(Tensor(array, (BATCH, VOCAB)), Tensor(targets, (BATCH,))).sum()

    for a, b in zip(*(jax.value_and_grad(f)(logits.array) for f in (ours, theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)


def test_a_target_outside_the_vocabulary_is_nan_and_no_other_is() -> None:
    targets = TARGETS.at[2].set(-1).at[5].set(256)
    found = cross_entropy(tensor(BATCH, VOCAB), Tensor(targets, (BATCH,))).array
    assert np.isnan(found).tolist() == [False, False, True, False, False, True, False, False]


def test_cross_entropy_does_not_depend_on_the_layout() -> None:
    agree(
        cross_entropy,
        tensor(BATCH, VOCAB),
        Tensor(TARGETS, (BATCH,)),
        over=ways(("x=4", "batch:x"), ("x=4", "vocab:x"), ("x=2,y=2", "batch:x, vocab:y"), ("x=2,y=2", "vocab:(y,x)")),
    )


def test_errors() -> None:
    logits, targets = tensor(BATCH, VOCAB), Tensor(TARGETS, (BATCH,))
    with pytest.raises(ValueError, match=r"targets \(row=8\) must have the dims of the logits .* less 'vocab'"):
        cross_entropy(logits, targets.rename(batch="row"))
    with pytest.raises(TypeError, match="the targets are float32; they are positions along 'vocab', integers"):
        cross_entropy(logits, targets.astype("float32"))
    with pytest.raises(ValueError, match="there is no dim 'classes'"):
        cross_entropy(logits, targets, over="classes")
