"""Recurrences along a sequence: selective scans, linear scans, causal convolutions, their decode steps."""

from .selective import selective_scan

__all__ = ["selective_scan"]
