"""mamba_ssm.modules.mamba2."""

from tilewright.nn import Mamba2

__all__ = ["Mamba2"]
