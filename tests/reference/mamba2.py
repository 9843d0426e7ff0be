"""A Mamba-2 block with its projections, from its parts' references, in the dtype of the tensors given."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.causal_conv1d import causal_conv1d
from reference.gated_rms_norm import gated_rms_norm
from reference.ssd_chunk_scan import ssd_chunk_scan


def mamba2_block(
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor | None,
    norm_weight: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    initial_states: Tensor | None,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The result and the final states."""
    heads, channels, dim = A_log.shape[0], conv_weight.shape[0], out_weight.shape[1]
    shared = (channels - dim) // 2
    z, xBC, dt = F.linear(x, in_weight, in_bias).split([dim, channels, heads], -1)
    xBC = causal_conv1d(xBC.mT, conv_weight.squeeze(1), conv_bias, activation="silu")[0].mT
    inputs, B, C = xBC.split([dim, shared, shared], -1)
    y, states = ssd_chunk_scan(
        inputs.unflatten(-1, (heads, -1)), dt, -torch.exp(A_log), B.unflatten(-1, (groups, -1)),
        C.unflatten(-1, (groups, -1)), D, None if norm_weight is not None else z.unflatten(-1, (heads, -1)),
        dt_bias, initial_states, dt_softplus=True,
    )  # fmt: skip
    y = y.flatten(-2)
    if norm_weight is not None:
        y = gated_rms_norm(y, norm_weight, z, eps, None, norm_before_gate=False)
    return F.linear(y, out_weight, out_bias), states
