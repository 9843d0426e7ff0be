"""Block-sparse attention: masks of blocks, with bits for the blocks that are visible in part, the softmax
attention that reads only what they keep, and estimators that find out what to keep."""

from . import estimate
from .block_sparse import block_sparse_attention
from .mask import BlockMask
from .permuted import permuted_block_sparse_attention
from .specification import BlockSparse

__all__ = [
    "BlockMask",
    "BlockSparse",
    "block_sparse_attention",
    "estimate",
    "permuted_block_sparse_attention",
]
