"""Modules that stand in for those people have."""

from .stable_embedding import StableEmbedding

__all__ = ["StableEmbedding"]
