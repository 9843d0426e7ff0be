"""Structured pruning: masks, sparse linear layers, and models made faster by them."""

from .shrink_report import ShrinkReport, Shrunk, Unshrunk
from .shrinking import load_shrunk, shrink

__all__ = ["ShrinkReport", "Shrunk", "Unshrunk", "load_shrunk", "shrink"]
