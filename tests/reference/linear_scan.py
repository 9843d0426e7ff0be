"""The linear recurrence from its formula, a step at a time, in the dtype of the tensors given.

In float64 or complex128 it is the truth; in float32 or a 16-bit dtype it is what plain PyTorch makes of it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def scan(a: Tensor, b: Tensor, h0: Tensor | None = None, dim: int = 1, reverse: bool = False) -> Tensor:
    """h[t] = a[t] h[t-1] + b[t] along dim, differentiable by autograd."""
    a, b = torch.broadcast_tensors(a, b)
    decays, inputs = a.unbind(dim), b.unbind(dim)
    state = torch.zeros_like(b.select(dim, 0)) if h0 is None and b.shape[dim] else h0
    states = [state] * len(inputs)
    order = range(len(inputs))
    for t in reversed(order) if reverse else order:
        state = decays[t] * state + inputs[t]
        states[t] = state
    return torch.stack(states, dim) if states else torch.empty_like(b)


def packed(a: Tensor, b: Tensor, h0: Tensor | None, dim: int, reverse: bool, bounds: list[int]) -> Tensor:
    """Sequences one behind the other along dim, each with its own state."""
    parts = []
    for i, (begin, end) in enumerate(pairwise(bounds)):
        part = [t.narrow(dim, begin, end - begin) for t in torch.broadcast_tensors(a, b)]
        state = None if h0 is None else h0[i].reshape(part[1].select(dim, 0).shape)
        parts.append(scan(*part, state, dim, reverse))
    return torch.cat(parts, dim)
