"""mamba_ssm.modules."""

from tilewright.compat.mamba_ssm.modules import mamba2, mamba_simple

__all__ = ["mamba2", "mamba_simple"]
