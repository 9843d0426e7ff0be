"""Structured pruning: masks, sparse linear layers, and models made faster by them."""

from .compress_report import Compressed, CompressReport
from .compressing import compress
from .masked import drop_mask, import_torch_masks, mask_of, set_mask
from .shrink_report import ShrinkReport, Shrunk, Unshrunk
from .shrinking import load_shrunk, shrink

__all__ = [
    "CompressReport",
    "Compressed",
    "ShrinkReport",
    "Shrunk",
    "Unshrunk",
    "compress",
    "drop_mask",
    "import_torch_masks",
    "load_shrunk",
    "mask_of",
    "set_mask",
    "shrink",
]
