"""Structured pruning: masks, sparse linear layers, and models made faster by them."""

from .masked import drop_mask, import_torch_masks, mask_of, set_mask
from .masks import global_masks, mask, scores
from .obs import sparsegpt
from .patterns import Block, NOfM, parse_pattern
from .perp import Perp, repair
from .pruning import Pruner, prune
from .report import PruneReport, PrunedLayer, RepairReport
from .schedules import Cubic

__all__ = [
    "Block",
    "Cubic",
    "NOfM",
    "Perp",
    "PruneReport",
    "PrunedLayer",
    "Pruner",
    "RepairReport",
    "drop_mask",
    "global_masks",
    "import_torch_masks",
    "mask",
    "mask_of",
    "parse_pattern",
    "prune",
    "repair",
    "scores",
    "set_mask",
    "sparsegpt",
]
