"""mamba_ssm.ops.triton: the names alone, there is no Triton here."""

from tilewright.compat.mamba_ssm.ops.triton import layernorm_gated, selective_state_update, ssd_combined

__all__ = ["layernorm_gated", "selective_state_update", "ssd_combined"]
