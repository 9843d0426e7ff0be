"""mamba_ssm.utils."""

from tilewright.compat.mamba_ssm.utils import generation

__all__ = ["generation"]
