"""Torch ops of the pruning family; each module registers its own when imported."""
