"""causal_conv1d.causal_conv1d_interface."""

from tilewright.scan import causal_conv1d as causal_conv1d_fn
from tilewright.scan import causal_conv1d_update

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]
