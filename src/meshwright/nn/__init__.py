"""Equinox modules on named tensors."""

from .attention import Attention as Attention
from .attention import rotary as rotary
from .attention import rotation as rotation
from .conv import Conv as Conv
from .conv import ConvTranspose as ConvTranspose
from .experts import ExpertMetrics as ExpertMetrics
from .experts import GatedExperts as GatedExperts
from .experts import MixtureOfExperts as MixtureOfExperts
from .linear import Embedding as Embedding
from .linear import Linear as Linear
from .loss import cross_entropy as cross_entropy
from .mlp import GatedMLP as GatedMLP
from .norm import GroupNorm as GroupNorm
from .norm import LayerNorm as LayerNorm
from .norm import RMSNorm as RMSNorm
from .routing import Choices as Choices
from .routing import ExpertChoiceRouter as ExpertChoiceRouter
from .routing import HashRouter as HashRouter
from .routing import Slots as Slots
from .routing import TopKRouter as TopKRouter
from .routing import next_bias as next_bias
