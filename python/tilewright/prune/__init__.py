"""Structured pruning: masks, sparse linear layers, and models made faster by them."""
