"""Structured pruning: masks, sparse linear layers, and models made faster by them."""

from .compress_report import Compressed, CompressReport
from .compressing import compress
from .masked import drop_mask, import_torch_masks, mask_of, set_mask
from .masks import global_masks, mask, scores
from .obs import sparsegpt
from .patterns import Block, NOfM, parse_pattern
from .perp import Perp, repair
from .pruning import Pruner, prune
from .report import PrunedLayer, PruneReport, RepairReport
from .schedules import Cubic
from .shrink_report import ShrinkReport, Shrunk, Unshrunk
from .shrinking import load_shrunk, shrink

__all__ = [
    "Block",
    "CompressReport",
    "Compressed",
    "Cubic",
    "NOfM",
    "Perp",
    "PruneReport",
    "PrunedLayer",
    "Pruner",
    "RepairReport",
    "ShrinkReport",
    "Shrunk",
    "Unshrunk",
    "compress",
    "drop_mask",
    "global_masks",
    "import_torch_masks",
    "load_shrunk",
    "mask",
    "mask_of",
    "parse_pattern",
    "prune",
    "repair",
    "scores",
    "set_mask",
    "shrink",
    "sparsegpt",
]
