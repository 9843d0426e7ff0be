"""Block-sparse attention: masks of blocks, with bits for the blocks that are visible in part, and the softmax
attention that reads only what they keep."""

from .block_sparse import block_sparse_attention
from .mask import BlockMask
from .specification import BlockSparse

__all__ = ["BlockMask", "BlockSparse", "block_sparse_attention"]
