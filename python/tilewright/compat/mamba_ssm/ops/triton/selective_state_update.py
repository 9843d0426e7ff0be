"""mamba_ssm.ops.triton.selective_state_update."""

from tilewright.scan import selective_state_update

__all__ = ["selective_state_update"]
