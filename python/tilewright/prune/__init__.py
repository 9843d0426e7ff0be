"""Structured pruning: masks, sparse linear layers, and models made faster by them."""

from .masked import drop_mask, import_torch_masks, mask_of, set_mask

__all__ = [
    "drop_mask",
    "import_torch_masks",
    "mask_of",
    "set_mask",
]
