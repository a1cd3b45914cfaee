"""What the commands share: how they are run, and how text that a model wrote is shown."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import jax
from rich.console import Console
from rich.text import Text

from ..models import DecoderConfig
from ..models.decoder import num_parameters
from ..train.report import show_count

PROMPT = "def __init__(self"
"""What text begins with when the user does not say: the text that is there by default is Python."""


@dataclass(frozen=True, kw_only=True)
class Command(ABC):
    """A command; its fields are its flags."""

    debug: bool = False
    """Show the whole traceback of an error."""

    def defaults(self) -> Self | None:
        """What flags that were not given are to be, when something that was given decides that; None: what they are."""
        return None

    @abstractmethod
    def run(self) -> int:
        """Do it. The exit status."""


def open_console() -> Console:
    """Where to write; of several processes only the first writes. JAX starts here, if it has not."""
    return Console(highlight=False, quiet=jax.process_index() > 0)


def show_sample(console: Console, prompt: str, written: str) -> None:
    """The prompt, then what a model wrote after it."""
    console.print(Text.assemble((prompt, "bold"), written), soft_wrap=True)


def model_row(model: DecoderConfig) -> tuple[str, str]:
    """A model, as the word for it and what it is."""
    group = f" x group={model.group}" if model.group > 1 else ""
    num = model.experts.num_experts
    sparse = f" x experts={num}, {model.experts.num_choices} a token" if num else ""
    sizes = (
        f"layers={model.layers}, embed={model.embed}, heads={model.heads}{group}, ff={model.ff}{sparse}, {model.dtype}"
    )
    return "model", f"{show_count(num_parameters(model))} parameters: {sizes}"
