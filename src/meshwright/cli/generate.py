"""``mw generate``: text from a model that ``mw train --save`` made.

mw generate --from runs/book --prompt "Once"
mw generate --from runs/book --temperature 0 --devices 2
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ..train import Checkpoints, Program, Sampling, generate
from .command import PROMPT, Command, open_console, show_sample
from .place import Where


@dataclass(frozen=True, kw_only=True)
class Generate(Command):
    """Let a trained model write."""

    folder: Annotated[Path, tyro.conf.arg(name="from")]
    """A folder of checkpoints; the newest is used."""
    prompt: str = PROMPT
    """What the text begins with."""
    where: Where = field(default_factory=Where)
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    """Of the draws."""

    def run(self) -> int:
        place = self.where.place()
        with Checkpoints(self.folder) as checkpoints:
            recipe, tokenizer = checkpoints.run()
            model = checkpoints.model(Program(recipe, place).shapes().model)
        written = generate(
            model, tokenizer, self.prompt, place, length=recipe.length, sampling=self.sampling, seed=self.seed
        )
        show_sample(open_console(), self.prompt, written)
        return 0
