"""Modules that stand in for those people have."""

from .block_sparse_linear import BlockSparseLinear
from .mamba import Mamba
from .mamba2 import Mamba2
from .stable_embedding import StableEmbedding

__all__ = [
    "BlockSparseLinear",
    "Mamba",
    "Mamba2",
    "StableEmbedding",
]
