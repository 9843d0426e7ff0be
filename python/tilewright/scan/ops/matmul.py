"""The dense product as a torch op: schema, implementation, fake kernel. Its gradient is `scan.dense`'s.

tilewright::matmul  a (m, k), b (k, n), bias (n) -> (m, n), float32 on a CPU
"""

from __future__ import annotations

from torch import Tensor

from ... import _backend
from ..._library import define


def _matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    out = _fake(a, b, bias)
    # Of the product, not of what tests exchange for it: there is no CUDA kernel to emulate.
    _backend._C.matmul(a, b, bias if bias is None else bias.contiguous(), out, _backend.num_threads())  # type: ignore[attr-defined]
    return out


def _fake(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


define("matmul(Tensor a, Tensor b, Tensor? bias=None) -> Tensor", _matmul, _fake)
