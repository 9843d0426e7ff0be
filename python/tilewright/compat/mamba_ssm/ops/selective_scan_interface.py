"""mamba_ssm.ops.selective_scan_interface."""

from tilewright.scan import mamba_inner as mamba_inner_fn
from tilewright.scan import selective_scan as selective_scan_fn

__all__ = ["mamba_inner_fn", "selective_scan_fn"]
