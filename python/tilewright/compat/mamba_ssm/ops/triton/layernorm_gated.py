"""mamba_ssm.ops.triton.layernorm_gated."""

from torch import Tensor

from tilewright.nn.mamba2 import RMSNormGated as RMSNorm
from tilewright.scan import gated_rms_norm

__all__ = ["RMSNorm", "rmsnorm_fn"]


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """`tilewright.scan.gated_rms_norm` with mamba_ssm's arguments; there is no bias."""
    if bias is not None:
        raise NotImplementedError("bias must be None: the norms of Mamba-2 models have none")
    return gated_rms_norm(x, weight, z, eps, group_size, norm_before_gate)
