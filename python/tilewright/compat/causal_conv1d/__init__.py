"""causal_conv1d's public names."""

from tilewright.compat.causal_conv1d import causal_conv1d_interface
from tilewright.compat.causal_conv1d.causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update

__version__ = "1.6.1"  # the release whose names and signatures these are

__all__ = ["causal_conv1d_fn", "causal_conv1d_interface", "causal_conv1d_update"]
