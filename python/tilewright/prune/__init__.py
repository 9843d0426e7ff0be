"""Structured pruning: masks, sparse linear layers, and models made faster by them."""

from .masks import global_masks, mask, scores
from .obs import sparsegpt
from .patterns import Block, NOfM, parse_pattern

__all__ = ["Block", "NOfM", "global_masks", "mask", "parse_pattern", "scores", "sparsegpt"]
