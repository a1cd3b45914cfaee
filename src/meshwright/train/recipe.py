"""A recipe: everything that the result of a run depends on, and nothing else.

Where a run takes place (mesh, layout, number of devices) is not part of it: the same recipe gives the same model
anywhere, to rounding. A recipe is saved with each checkpoint.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import fail
from ..models import DecoderConfig, ExpertsConfig
from .data import num_sequences
from .optimizer import OptimizerConfig
from .text import TextConfig

COMPUTE_ONLY = ("dtype", "remat", "unroll")
"""Fields of the model's configuration that change how it is computed, not its parameters."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained, on what, and for how long."""

    text: TextConfig = field(default_factory=TextConfig)
    """The text."""
    model: DecoderConfig = field(default_factory=lambda: DecoderConfig(embed=128, head_dim=32, ff=512, unroll=True))
    """The model's sizes."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How parameters are updated."""
    steps: int = 400
    """Updates in the whole run, those before a checkpoint included; the learning rate falls until the last."""
    batch: int = 16
    """Sequences in a step, over all devices: a multiple of the devices that ``batch`` is split over."""
    length: int = 128
    """Tokens in a sequence, and those that the model sees when it writes."""
    buckets: tuple[int, ...] = ()
    """Shorter lengths, for documents of unequal lengths: each document is a sequence of its own, in the shortest that
    holds it, LENGTH being the longest. None: documents are packed end to end."""
    seed: int = 0
    """Of the first parameters, and of the order of the text."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "length"):
            if getattr(self, name) < 1:
                raise fail(f"Recipe: {name} is {getattr(self, name)}; it must be at least 1.")
        if len({*self.buckets, self.length}) <= len(self.buckets) or any(not 0 < b < self.length for b in self.buckets):
            shown = ", ".join(map(str, self.buckets))
            raise fail(
                f"Recipe: buckets are {shown} beside length={self.length}; they are different lengths shorter than "
                "that one, which is a bucket by itself. Make length longer, or leave some out."
            )

    def sequences(self, length: int) -> int:
        """How many sequences a batch has in the bucket of a length."""
        return num_sequences(self.batch, self.length, length)

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON's types."""
        held = dataclasses.asdict(self)
        held["text"]["data"] = [str(path.resolve()) for path in self.text.data]
        return held

    @classmethod
    def from_json(cls, held: dict[str, Any]) -> "Recipe":
        """The recipe that ``to_json`` wrote."""
        text = {**held["text"], "data": tuple(Path(path) for path in held["text"]["data"])}
        experts = ExpertsConfig(**held["model"].get("experts", {}))
        parts = {
            "text": TextConfig(**text),
            "model": DecoderConfig(**{**held["model"], "experts": experts}),
            "optimizer": OptimizerConfig(**held["optimizer"]),
        }
        return cls(**{**held, **parts, "buckets": tuple(held.get("buckets", ()))})

    def check_continues(self, saved: "Recipe") -> None:
        """Raise a ``ValueError`` unless a model of ``saved`` can go on by this recipe: its sizes must be the same."""
        for each in dataclasses.fields(DecoderConfig):
            asked, held = getattr(self.model, each.name), getattr(saved.model, each.name)
            if asked != held and each.name not in COMPUTE_ONLY:
                raise fail(
                    f"The checkpoint's model has {each.name}={held}, and {each.name}={asked} is asked for. "
                    f"A model keeps its sizes: leave {each.name} out, or start a new run."
                )
