"""Model families, each a single-device program on named tensors."""

from .decoder import Decoder as Decoder
from .decoder import DecoderConfig as DecoderConfig
from .mixture import ExpertsConfig as ExpertsConfig
