"""Tokens: byte-level byte-pair encoding, trained on the text itself.

Every byte is a token, so every text has an encoding and decodes to itself; the rest of the vocabulary are merges that
are frequent in the text (Hugging Face's ``tokenizers``). One token has no bytes, ``<|endoftext|>``: it stands before
each document, and only there, whatever the text says.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ..errors import fail

END = "<|endoftext|>"
SMALLEST = 257
"""The bytes and the token between documents."""
_ENCODED_TOGETHER = 256


class Tokenizer:
    """Text to token ids and back.

    Raises:
        ValueError: the tokenizer given lacks the token between documents.
    """

    def __init__(self, held: tokenizers.Tokenizer) -> None:
        end = held.token_to_id(END)
        if end is None:
            raise fail(f"Tokenizer: it has no token {END!r}, which stands between documents.")
        self._held = held
        self._held.encode_special_tokens = True
        self.end: int = end
        """The id of the token between documents."""

    @classmethod
    def train(cls, texts: Iterable[str], vocab: int) -> "Tokenizer":
        """A tokenizer of at most ``vocab`` tokens: fewer when the text is too short to show so many merges.

        Raises:
            ValueError: ``vocab`` is smaller than the bytes and the token between documents.
        """
        if vocab < SMALLEST:
            raise fail(
                f"Tokenizer: a vocabulary of {vocab} is too small; each byte is a token, so it takes {SMALLEST}."
            )
        held = tokenizers.Tokenizer(models.BPE())
        held.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        held.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        )
        held.train_from_iterator(texts, trainer)
        return cls(held)

    @classmethod
    def from_text(cls, text: str) -> "Tokenizer":
        """The tokenizer that ``to_text`` wrote."""
        return cls(tokenizers.Tokenizer.from_str(text))

    def to_text(self) -> str:
        """The tokenizer as JSON, in the format of Hugging Face's ``tokenizer.json``."""
        return self._held.to_str()

    @property
    def size(self) -> int:
        """The number of tokens: ids are smaller than this."""
        return self._held.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without the token between documents."""
        return self._held.encode(text).ids

    def encode_all(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        """The tokens of each text, int32, (length,); several are encoded at a time."""
        for i in range(0, len(texts), _ENCODED_TOGETHER):
            for found in self._held.encode_batch_fast(texts[i : i + _ENCODED_TOGETHER]):
                yield np.asarray(found.ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some tokens; the token between documents is left out, bytes that are no UTF-8 show as �."""
        return self._held.decode(list(ids), skip_special_tokens=True)


def sample(texts: Iterable[str], num_bytes: int) -> Iterator[str]:
    """The first texts, until they hold ``num_bytes``."""
    for text in texts:
        if num_bytes <= 0:
            return
        yield text
        num_bytes -= len(text.encode())
