"""Modules that stand in for those people have."""

from .activation_sparse import ActivationSparseLinear
from .block_sparse_linear import BlockSparseLinear
from .crossover_linear import CrossoverLinear
from .mamba import Mamba
from .mamba2 import Mamba2
from .semi_structured_linear import SemiStructuredLinear
from .stable_embedding import StableEmbedding

__all__ = [
    "ActivationSparseLinear",
    "BlockSparseLinear",
    "CrossoverLinear",
    "Mamba",
    "Mamba2",
    "SemiStructuredLinear",
    "StableEmbedding",
]
