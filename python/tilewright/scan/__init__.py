"""Recurrences along a sequence: selective scans, linear scans, causal convolutions, their decode steps."""

from .selective import selective_scan
from .ssd import mamba_split_conv1d_scan_combined, ssd_chunk_scan

__all__ = [
    "mamba_split_conv1d_scan_combined",
    "selective_scan",
    "ssd_chunk_scan",
]
