"""Dense float32 products by oneDNN, where torch's own are slow.

torch multiplies float32 matrices on a CPU with MKL, whose AVX-512 code is for Intel's processors alone: on
others it takes twice the time that oneDNN does, which comes with torch too. Beside a scan the projections of
a Mamba block are most of its work.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .._info import cpuinfo
from .._library import differentiates

_WORTH_IT = 1 << 21  # multiplications, below which setting up oneDNN's product costs more than it saves


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As torch.nn.functional.linear; under torch.compile and autocast it is that."""
    if not _takes(x, weight) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if differentiates(x, weight, bias):
        return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return, no-untyped-call]
    return _multiply(x, weight, bias)


def product(rows: Tensor, columns: Tensor) -> Tensor:
    """(..., k) times (n, k) transposed, without a gradient -> (..., n)."""
    return _multiply(rows, columns, None) if _takes(rows, columns) else F.linear(rows, columns)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not weight.is_contiguous() and not weight.t().is_contiguous():
        weight = weight.contiguous()  # oneDNN has nothing fast for rows with gaps
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def _takes(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is the better one for these two."""
    if torch.compiler.is_compiling():
        return False
    return (
        all(type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and t.is_cpu for t in (x, weight))
        and x.dim() > 1
        and x.numel() * weight.shape[0] >= _WORTH_IT
        and bool(torch.backends.mkldnn.enabled)
        and _is_better()
    )


@cache
def _is_better() -> bool:
    return (
        torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and next((value for key, value in cpuinfo() if key == "vendor_id"), "GenuineIntel") != "GenuineIntel"
        and _works()
    )


def _works() -> bool:
    """Whether this torch's oneDNN product takes what we give it: it is an internal op, which may change."""
    x, weight = torch.ones(2, 3, device="cpu"), torch.ones(4, 3, device="cpu")
    try:
        return torch.equal(_multiply(x, weight, None), F.linear(x, weight))
    except (RuntimeError, TypeError):
        return False


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            product(grad, weight.t()) if wants_x else None,
            product(rows.t(), x.flatten(0, -2).t()) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
        )
