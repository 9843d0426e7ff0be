"""Modules that stand in for those people have."""

from .mamba import Mamba
from .mamba2 import Mamba2
from .semi_structured_linear import SemiStructuredLinear
from .stable_embedding import StableEmbedding

__all__ = ["Mamba", "Mamba2", "SemiStructuredLinear", "StableEmbedding"]
