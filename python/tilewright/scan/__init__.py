"""Recurrences along a sequence, their decode steps, and the convolution and norm around them."""

from .conv import causal_conv1d
from .inner import mamba_inner
from .linear import linear_scan
from .mamba2 import mamba_split_conv1d_scan_combined
from .norm import gated_rms_norm
from .selective import selective_scan
from .ssd import ssd_chunk_scan
from .step import mamba_step
from .update import causal_conv1d_update, selective_state_update

__all__ = [
    "causal_conv1d",
    "causal_conv1d_update",
    "gated_rms_norm",
    "linear_scan",
    "mamba_inner",
    "mamba_split_conv1d_scan_combined",
    "mamba_step",
    "selective_scan",
    "selective_state_update",
    "ssd_chunk_scan",
]
