"""One token through a Mamba layer, from its formula, in the dtype of the tensors given."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.mamba_inner import rms_norm
from reference.selective_state_update import selective_state_update


def mamba_step(
    hidden_states: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor | None,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None = None,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out and the two states after it."""
    x, z = F.linear(hidden_states, in_proj_weight, in_proj_bias).chunk(2, dim=-1)
    taps = torch.cat([conv_state, x[..., None]], dim=-1)
    u = (taps[..., taps.shape[-1] - conv1d_weight.shape[1] :] * conv1d_weight).sum(-1)
    u = F.silu(u if conv1d_bias is None else u + conv1d_bias)
    rank, states = dt_proj_weight.shape[1], A_log.shape[1]
    parts = list(F.linear(u, x_proj_weight).split([rank, states, states], dim=-1))
    if b_c_dt_rms_eps is not None:
        for i, weight in enumerate((dt_rms_weight, b_rms_weight, c_rms_weight)):
            ones = parts[i].new_ones(parts[i].shape[-1])
            parts[i] = rms_norm(parts[i], ones if weight is None else weight, b_c_dt_rms_eps)
    dt, B, C = parts
    y, ssm_state = selective_state_update(
        ssm_state, u, F.linear(dt, dt_proj_weight), -A_log.exp(), B, C, D, z, dt_proj_bias, True
    )
    out = F.linear(y.to(hidden_states.dtype), out_proj_weight, out_proj_bias)
    return out, taps[..., taps.shape[-1] - conv_state.shape[-1] :], ssm_state
