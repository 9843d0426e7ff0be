"""Modules that stand in for those people have."""

from .crossover_linear import CrossoverLinear
from .mamba import Mamba
from .mamba2 import Mamba2
from .stable_embedding import StableEmbedding

__all__ = ["CrossoverLinear", "Mamba", "Mamba2", "StableEmbedding"]
