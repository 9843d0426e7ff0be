"""A dense product, in float64."""

from __future__ import annotations

from torch import Tensor


def matmul(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a (m, k), b (k, n), bias (n) or None -> (m, n)."""
    product = a.double() @ b.double()
    return product if bias is None else product + bias.double()
