"""The causal convolution and its decode step, from their formulas, in the dtype of the tensors given.

In float64 they are the truth; in another dtype what plain PyTorch would make of the same formulas.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """out and final_states; every tap is written out, so that seq_idx is a comparison."""
    batch, dim, length = x.shape
    halo = weight.shape[1] - 1
    before = x.new_zeros(batch, dim, halo) if initial_states is None else initial_states
    padded = torch.cat([before, x], dim=2)
    if seq_idx is None:
        seq_idx = torch.zeros(batch, length, dtype=torch.int64, device=x.device)
    numbers = torch.cat([seq_idx[:, :1].expand(-1, halo if length else 0), seq_idx], dim=1)
    out = x.new_zeros(batch, dim, length)
    for tap in range(halo + 1):
        same = (numbers[:, tap : tap + length] == seq_idx)[:, None] if length else numbers.new_zeros(0).bool()
        out = out + torch.where(same, padded[:, :, tap : tap + length], 0) * weight[:, tap, None]
    if bias is not None:
        out = out + bias[:, None]
    if activation is not None:
        out = F.silu(out)
    if length == 0:
        return out, padded
    out = torch.where((seq_idx >= 0)[:, None], out, 0)
    last = (numbers[:, length:] == seq_idx[:, -1:]) & (seq_idx[:, -1:] >= 0)
    return out, torch.where(last[:, None], padded[:, :, length:], 0)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out and the new state of steps x (batch, dim, steps)."""
    state_length, steps = conv_state.shape[2], x.shape[2]
    if cache_seqlens is not None:  # from ring to line: the oldest first
        turn = torch.arange(state_length, device=x.device) + cache_seqlens[:, None].long()
        turn = (turn % state_length)[:, None].expand_as(conv_state)
        line = conv_state.gather(2, turn)
    else:
        line = conv_state
    history = torch.cat([line, x], dim=2)
    out, _ = causal_conv1d(history, weight, bias, activation=activation)
    new = history[:, :, steps:]
    if cache_seqlens is not None:
        turn = torch.arange(state_length, device=x.device) + cache_seqlens[:, None].long() + steps
        new = torch.empty_like(new).scatter_(2, (turn % state_length)[:, None].expand_as(new), new)
    return out[:, :, out.shape[2] - steps :], new
