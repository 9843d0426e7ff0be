"""mamba_ssm.ops.triton.ssd_combined."""

from tilewright.scan import mamba_split_conv1d_scan_combined
from tilewright.scan import ssd_chunk_scan as mamba_chunk_scan_combined

__all__ = ["mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"]
