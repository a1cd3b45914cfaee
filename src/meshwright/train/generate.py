"""Text from a model, a token at a time.

Each token is drawn after a forward pass over the whole sequence, which is padded to a fixed length so that it is
compiled once; attention is causal, so what stands after the last token does not matter. A sequence longer than that
length goes on from its last tokens.

Dims: batch, length, vocab. The batch holds the same sequence as often as the layout needs to split it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ..dims import Dim
from ..errors import fail
from ..models import Decoder
from ..tensor import Tensor
from .step import Place
from .tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn."""

    tokens: int = 160
    """How many tokens to draw; fewer when the text ends before."""
    temperature: float = 0.7
    """Logits are divided by it; 0 takes the most probable token."""
    top_k: int = 40
    """Only so many of the most probable tokens are drawn from; 0: all."""

    def __post_init__(self) -> None:
        for field in ("tokens", "temperature", "top_k"):
            if getattr(self, field) < 0:
                raise fail(f"Sampling: {field} is {getattr(self, field)}; it must not be negative.")


def generate(
    model: Decoder, tokenizer: Tokenizer, prompt: str, place: Place, *, length: int, sampling: Sampling, seed: int = 0
) -> str:
    """The text that ``model`` writes after ``prompt``, without it, until the token between documents.

    Args:
        length: how many tokens the model sees at once, as in training.
        seed: of the draws.
    """
    draw = sampler(place, length, sampling)
    sequence = [tokenizer.end, *tokenizer.encode(prompt)]
    drawn: list[int] = []
    for token in _drawn(draw, model, sequence, length, sampling.tokens, jax.random.key(seed)):
        if token == tokenizer.end:
            break
        drawn.append(token)
    return tokenizer.decode(drawn)


Draw = Callable[[Decoder, np.ndarray, int, jax.Array], jax.Array]


def _drawn(draw: Draw, model: Decoder, sequence: list[int], length: int, num: int, key: jax.Array) -> Iterator[int]:
    for i in range(num):
        seen = sequence[-length:]
        ids = np.zeros(length, np.int32)
        ids[: len(seen)] = seen
        token = int(draw(model, ids, len(seen) - 1, jax.random.fold_in(key, i)))
        sequence = [*seen, token]
        yield token


def sampler(place: Place, length: int, sampling: Sampling) -> Draw:
    """A compiled function of a model, tokens (length,), the place of the last one, and a key, to the next token."""
    scope = place.layout.scope(place.mesh)
    dims = Dim("batch", scope.size(scope.axes_of("batch"))), Dim("length", length)
    forward = place.region(lambda model, ids: model(ids))

    @jax.jit
    def draw(model: Decoder, ids: jax.Array, last: int, key: jax.Array) -> jax.Array:
        logits = forward(model, Tensor(jnp.broadcast_to(ids, (dims[0].size, length)), dims))
        return choose(logits.array[0, last].astype(jnp.float32), key, sampling)

    return draw


def choose(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """A token drawn by its logits, (vocab,)."""
    if sampling.temperature == 0:
        return jnp.argmax(logits)
    top_k = sampling.top_k or logits.size
    values, tokens = jax.lax.top_k(logits, min(top_k, logits.size))
    return tokens[jax.random.categorical(key, values / sampling.temperature)]
