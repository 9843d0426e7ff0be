"""The selective scan, token by token, from its formula; autograd through it gives the gradients.

float64 tensors give the truth. Others are computed in float32, as plain PyTorch would from such inputs.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def visits(
    batch: int, length: int, cu_seqlens: Tensor | None, reverse: bool, order: Tensor | None
) -> tuple[Tensor, list[int]]:
    """The token visited at each step, (batch, length), and where sequences of steps start and end."""
    ends = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    steps = torch.arange(length)
    if reverse:
        parts = [steps[a:b].flip(0) for a, b in itertools.pairwise(ends)]
        steps = torch.cat(parts) if parts else steps
    tokens = steps if order is None else order.cpu().long()[..., steps]
    return tokens.expand(batch, length), ends


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out and the last states."""
    batch, dim, length = u.shape
    real = torch.promote_types(u.dtype, torch.float32)
    tokens, ends = visits(batch, length, cu_seqlens, reverse, order)
    tokens = tokens.to(u.device)

    def in_order(x: Tensor) -> Tensor:
        """(..., length) to a list over steps."""
        index = tokens.view(batch, *[1] * (x.dim() - 2), length).expand(x.shape)
        return list(x.gather(-1, index).unbind(-1))

    def maps(x: Tensor) -> list[Tensor]:
        """B or C of each step, (batch, dim, states)."""
        if x.dim() == 2:
            return [x] * length
        x = x if x.dim() == 4 else x.unsqueeze(1)
        x = x.to(real)
        if A.is_complex():
            x = torch.view_as_complex(x.unflatten(-1, (length, 2)).contiguous())
        return [step.repeat_interleave(dim // step.shape[1], dim=1) for step in in_order(x)]

    dt = delta.to(real)
    if delta_bias is not None:
        dt = dt + delta_bias[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    us, dts, Bs, Cs = in_order(u.to(real)), in_order(dt), maps(B), maps(C)

    states = A.shape[1]
    starts = A.new_zeros(batch if cu_seqlens is None else len(ends) - 1, dim, states)
    if initial_state is not None:
        starts = starts + initial_state
    rows, finals = [], []
    for i, (start, end) in enumerate(itertools.pairwise(ends)):
        h = starts if cu_seqlens is None else starts[i : i + 1]
        for t in range(start, end):
            step = dts[t][..., None]
            h = torch.exp(step * A) * h + step * Bs[t] * us[t][..., None]
            y = (Cs[t] * h).sum(-1)
            rows.append(2 * y.real if y.is_complex() else y)
        finals.append(h)
    y = torch.stack(rows, -1) if rows else dt * 0
    if batch * length:
        y = y.gather(-1, tokens.argsort(-1)[:, None, :].expand(y.shape))
    if D is not None:
        y = y + D[:, None] * u.to(real)
    if z is not None:
        y = y * F.silu(z.to(real))
    return y.to(u.dtype), torch.cat(finals) if finals else starts
