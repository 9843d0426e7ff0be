"""The gated RMS norm from its formula, in the dtype of the tensors given.

In float64 it is the truth; in another dtype what plain PyTorch would make of the same formula.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_rms_norm(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """Each group of channels is divided by its root mean square; half types compute in float32."""
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    v, gate = x.to(wide), 1.0 if z is None else F.silu(z.to(wide))
    if not norm_before_gate:
        v = v * gate
    groups = v.unflatten(-1, (-1, group_size or x.shape[-1]))
    v = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    v = v.flatten(-2) * weight.to(wide)
    return (v * gate if norm_before_gate else v).to(dtype)
