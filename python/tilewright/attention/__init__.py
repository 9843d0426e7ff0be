"""Block-sparse attention: masks of blocks, with bits for the blocks that are visible in part."""

from .mask import BlockMask

__all__ = ["BlockMask"]
