"""Recurrences along a sequence: selective scans, linear scans, causal convolutions, their decode steps."""

from .ssd import mamba_split_conv1d_scan_combined as mamba_split_conv1d_scan_combined
from .ssd import ssd_chunk_scan as ssd_chunk_scan

__all__ = ["mamba_split_conv1d_scan_combined", "ssd_chunk_scan"]
