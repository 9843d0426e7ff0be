"""Recurrences along a sequence: selective scans, linear scans, causal convolutions, their decode steps."""

from .conv import causal_conv1d
from .update import causal_conv1d_update, selective_state_update

__all__ = [
    "causal_conv1d",
    "causal_conv1d_update",
    "selective_state_update",
]
