"""Training a decoder on text: data, optimizer, checkpoints and the loop."""

from .checkpoint import Checkpoints as Checkpoints
from .data import Batch as Batch
from .data import Batches as Batches
from .data import Windows as Windows
from .generate import Sampling as Sampling
from .generate import generate as generate
from .loop import Data as Data
from .loop import Intervals as Intervals
from .loop import Program as Program
from .loop import Trainer as Trainer
from .optimizer import OptimizerConfig as OptimizerConfig
from .optimizer import decayed as decayed
from .optimizer import make_optimizer as make_optimizer
from .optimizer import schedule as schedule
from .recipe import Recipe as Recipe
from .report import Report as Report
from .step import Place as Place
from .step import State as State
from .step import loss as loss
from .step import train_step as train_step
from .text import Corpus as Corpus
from .text import Document as Document
from .text import TextConfig as TextConfig
from .text import hold_out as hold_out
from .text import read as read
from .tokenizer import Tokenizer as Tokenizer
