"""The activation-sparse linear layer, from its formula."""

from __future__ import annotations

import torch
from torch import Tensor


def largest(x: Tensor, scale: Tensor, count: int) -> Tensor:
    """The `count` inputs of each token with the largest |x| * scale, the first ones among equals."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    order = (x.abs().to(wide) * scale.to(wide)).sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros(x.shape, dtype=torch.bool, device=x.device).scatter(-1, order[..., :count], True)


def above(x: Tensor, threshold: Tensor) -> Tensor:
    """What is not |x| <= threshold."""
    return ~(x.abs().to(threshold.dtype) <= threshold)


def linear(x: Tensor, keep: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(x * keep) W^T + bias in the dtype of x."""
    return torch.nn.functional.linear(x * keep, weight, bias)
