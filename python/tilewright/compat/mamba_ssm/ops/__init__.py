"""mamba_ssm.ops."""

from tilewright.compat.mamba_ssm.ops import selective_scan_interface, triton

__all__ = ["selective_scan_interface", "triton"]
