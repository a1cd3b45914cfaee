"""Equinox modules on named tensors."""

from .attention import Attention as Attention
from .attention import rotary as rotary
from .attention import rotation as rotation
from .linear import Embedding as Embedding
from .linear import Linear as Linear
from .loss import cross_entropy as cross_entropy
from .mlp import GatedMLP as GatedMLP
from .norm import LayerNorm as LayerNorm
from .norm import RMSNorm as RMSNorm
