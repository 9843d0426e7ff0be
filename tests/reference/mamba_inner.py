"""A Mamba block between its projections, from its formula, in the dtype of the tensors given."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.causal_conv1d import causal_conv1d
from reference.selective_scan import selective_scan


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight).to(x.dtype)


def mamba_inner(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    x, z = xz.chunk(2, dim=1)
    wide = torch.promote_types(xz.dtype, torch.float32)
    conv_bias = None if conv1d_bias is None else conv1d_bias.to(wide)
    u, _ = causal_conv1d(x.to(wide), conv1d_weight.squeeze(1).to(wide), conv_bias, activation="silu")
    u = u.to(xz.dtype)
    rank, numbers = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    projected = F.linear(u.transpose(1, 2), x_proj_weight)

    dt = projected[..., :rank]
    behind = dt_rms_weight is not None and dt_rms_weight.numel() == delta_proj_weight.shape[0]
    if dt_rms_weight is not None and not behind:
        dt = rms_norm(dt, dt_rms_weight, b_c_dt_rms_eps)
    delta = F.linear(dt, delta_proj_weight)
    if dt_rms_weight is not None and behind:
        delta = rms_norm(delta, dt_rms_weight, b_c_dt_rms_eps)

    def made(columns: Tensor, bias: Tensor | None, weight: Tensor | None) -> Tensor:
        if bias is not None:
            columns = columns + bias.to(columns.dtype)
        if weight is not None:
            columns = rms_norm(columns, weight, b_c_dt_rms_eps)
        if not A.is_complex():
            return columns.transpose(1, 2)
        pairs = columns.unflatten(-1, (A.shape[1], 2))  # (batch, length, states, 2)
        return pairs.permute(0, 2, 1, 3).flatten(2)

    if B is None:
        B = made(projected[..., rank : rank + numbers], B_proj_bias, b_rms_weight)
    if C is None:
        C = made(projected[..., -numbers:], C_proj_bias, c_rms_weight)
    y, _ = selective_scan(u, delta.transpose(1, 2), A, B, C, D, z, delta_bias, delta_softplus)
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)
