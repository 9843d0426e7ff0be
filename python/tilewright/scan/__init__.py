"""Recurrences along a sequence: selective scans, linear scans, causal convolutions, their decode steps."""

from .linear import linear_scan

__all__ = ["linear_scan"]
