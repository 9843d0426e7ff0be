"""One step of a selective scan, from its formula, in the dtype of the tensors given.

In float64 it is the truth; in another dtype what plain PyTorch would make of the same formula.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """out and the new state, for a state with or without an axis of heads."""
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt)
    if state.ndim == 4:  # a projection a head
        B, C = (p[:, None] if p.ndim == 2 else p for p in (B, C))
        B, C = (p.repeat_interleave(state.shape[1] // p.shape[1], dim=1) for p in (B, C))
    elif B.ndim == 3:
        B, C = B[:, 0], C[:, 0]
    B, C = B.unsqueeze(-2), C.unsqueeze(-2)
    new = state * torch.exp(dt[..., None] * A) + dt[..., None] * B * x[..., None]
    out = (new * C).sum(-1)
    if D is not None:
        out = out + D * x
    if z is not None:
        out = out * F.silu(z)
    return out, new
