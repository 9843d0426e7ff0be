"""Masked attention from its formula, in the dtype of the tensors given."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None = None, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Result and logarithms; `visible` is bool and expands to (batch, heads, q_len, kv_len)."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    s = q @ k.mT * (1 / math.sqrt(q.shape[3]) if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~visible, -math.inf)
    empty = ~visible.any(-1, keepdim=True).expand(*s.shape[:3], 1)
    # A row without keys would be NaN, and so would its gradient.
    s = torch.where(empty, 0.0, s)
    p = torch.where(empty, 0.0, s.softmax(-1))
    lse = torch.where(empty[..., 0], -math.inf, torch.logsumexp(s, -1))
    return p @ v, lse


def bottom_right(q_len: int, kv_len: int) -> Tensor:
    """The causal mask in which the last query and the last key are at the same position."""
    return torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
