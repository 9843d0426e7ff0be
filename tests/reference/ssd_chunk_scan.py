"""Mamba-2's scan from its recurrence, step by step, in the dtype of the tensors given."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus


def clamped(dt: Tensor, low: float, high: float) -> Tensor:
    """At a limit the gradient passes, as in mamba_ssm; torch's clamp lets it pass up to 2.13."""
    return torch.where(dt < low, low, torch.where(dt > high, high, dt))


def ssd_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Tensor, Tensor]:
    """The result and the final states, of every batch row or packed sequence."""
    batch, length, heads, head_dim = x.shape
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        parts = [
            ssd_chunk_scan(
                *(t[:, a:b] for t in (x, dt)), A, *(t[:, a:b] for t in (B, C)), D,
                None if z is None else z[:, a:b], dt_bias,
                None if initial_states is None else initial_states[i : i + 1],
                None if seq_idx is None else seq_idx[:, a:b], None, dt_softplus, dt_limit,
            )
            for i, (a, b) in enumerate(pairwise(bounds))
        ]  # fmt: skip
        return torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts])
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = softplus(dt)
    dt = clamped(dt, *dt_limit)
    B, C = (t.repeat_interleave(heads // B.shape[2], dim=2) for t in (B, C))
    h = x.new_zeros(batch, heads, head_dim, B.shape[3]) if initial_states is None else initial_states
    ys = []
    for t in range(length):
        if seq_idx is not None and t > 0:
            h = torch.where((seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None], h, 0)
        h = torch.exp(dt[:, t] * A)[..., None, None] * h + torch.einsum(
            "bhp,bhn->bhpn", dt[:, t, :, None] * x[:, t], B[:, t]
        )
        ys.append(torch.einsum("bhpn,bhn->bhp", h, C[:, t]))
    y = torch.stack(ys, 1) if ys else x
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]) * x
    return (y if z is None else y * silu(z)), h


def chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The same by products of matrices, a chunk at a time, without gate: low precision is held against it."""
    batch, length, heads, head_dim = x.shape
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = softplus(dt)
    dt = clamped(dt, *dt_limit)
    B, C = (t.repeat_interleave(heads // B.shape[2], dim=2) for t in (B, C))
    h = x.new_zeros(batch, heads, head_dim, B.shape[3]) if initial_states is None else initial_states
    ys = []
    for start in range(0, length, chunk_size):
        part = slice(start, start + chunk_size)
        xs, Bs, Cs, dts = x[:, part], B[:, part], C[:, part], dt[:, part]
        cum = (dts * A).cumsum(1).transpose(1, 2)
        causal = torch.ones(cum.shape[2], cum.shape[2]).tril().bool()
        decay = torch.exp((cum[..., :, None] - cum[..., None, :]).masked_fill(~causal, -math.inf))
        scores = torch.einsum("bihn,bjhn->bhij", Cs, Bs) * decay * dts.transpose(1, 2)[:, :, None]
        from_state = torch.einsum("bihn,bhpn->bihp", Cs, h) * torch.exp(cum).transpose(1, 2)[..., None]
        ys.append(torch.einsum("bhij,bjhp->bihp", scores, xs) + from_state)
        to_end = (torch.exp(cum[..., -1:] - cum) * dts.transpose(1, 2)).transpose(1, 2)
        added = torch.einsum("bjhp,bjhn->bhpn", xs * to_end[..., None], Bs)
        h = torch.exp(cum[..., -1])[..., None, None] * h + added
    y = torch.cat(ys, 1) if ys else x
    return (y if D is None else y + (D if D.dim() == 2 else D[:, None]) * x), h
