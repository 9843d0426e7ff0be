"""Modules that stand in for those people have."""

from .block_sparse_linear import BlockSparseLinear
from .crossover_linear import CrossoverLinear
from .mamba import Mamba
from .mamba2 import Mamba2
from .stable_embedding import StableEmbedding

__all__ = ["BlockSparseLinear", "CrossoverLinear", "Mamba", "Mamba2", "StableEmbedding"]
