"""mamba_ssm.modules.mamba_simple."""

from tilewright.nn import Mamba

__all__ = ["Mamba"]
