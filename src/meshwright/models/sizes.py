"""Sizes: decoders by the number of their parameters, as people speak of them.

Widths are multiples of the matrix unit's 128, and heads, ``ff``, ``embed`` and ``vocab`` of 8, so that any of them can
be split over an axis of 8 devices. 8b, 70b and 400b have the shapes of the Llama 3 models (Dubey et al., 2024); the
others are of the same family. All compute in bfloat16 and save no activations within a layer, without which none of
them is trained.

    >>> sized("70b").layers
    80
"""

import math
import re
from collections.abc import Mapping

from ..errors import fail
from .decoder import DecoderConfig

_UNITS = {"m": 1e6, "b": 1e9, "t": 1e12}


def _decoder(vocab: int, layers: int, embed: int, heads: tuple[int, int], ff: int) -> DecoderConfig:
    """A decoder with ``heads``, (key/value heads, query heads for each)."""
    return DecoderConfig(
        vocab=vocab,
        layers=layers,
        embed=embed,
        heads=heads[0],
        group=heads[1],
        head_dim=128,
        ff=ff,
        dtype="bfloat16",
        remat="nothing",
    )


SIZES: Mapping[str, DecoderConfig] = {
    "1b": _decoder(32768, 16, 2048, (16, 1), 6144),
    "3b": _decoder(32768, 28, 3072, (8, 3), 8192),
    "8b": _decoder(128256, 32, 4096, (8, 4), 14336),
    "10b": _decoder(32768, 40, 4096, (8, 4), 16384),
    "30b": _decoder(32768, 60, 6144, (8, 6), 22528),
    "70b": _decoder(128256, 80, 8192, (8, 8), 28672),
    "100b": _decoder(32768, 80, 10240, (16, 5), 32768),
    "400b": _decoder(128256, 126, 16384, (8, 16), 53248),
}
"""By name; a name is within 5 % of the number of parameters."""


def sized(name: str) -> DecoderConfig:
    """The decoder of a size.

    Raises:
        ValueError: there is none of that name; the nearest is named.
    """
    if name.lower() in SIZES:
        return SIZES[name.lower()]
    asked = _number(name.lower())
    near = min(SIZES, key=lambda known: abs(math.log(_number(known) / asked))) if asked else ""
    raise fail(
        f"model: there is no size {name!r}.{f' The nearest is {near!r}.' if near else ''} Known: {', '.join(SIZES)}. "
        "Each of its fields (layers, embed, ff …) can be given a value of its own."
    )


def _number(name: str) -> float:
    """How many parameters a name speaks of; 0 where it does not say."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([mbt])", name)
    return float(found[1]) * _UNITS[found[2]] if found else 0.0
