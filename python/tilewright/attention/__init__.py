"""Block-sparse attention."""

from .block_sparse import block_sparse_attention

__all__ = ["block_sparse_attention"]
