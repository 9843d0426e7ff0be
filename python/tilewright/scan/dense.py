"""Dense float32 products on processors where torch's own are slow.

torch multiplies float32 matrices on a CPU with MKL, whose AVX-512 code is for Intel's processors alone: on
others it takes more than twice the time. Beside a scan the projections of a Mamba block are most of its work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from .._checks import PLAIN
from .._info import cpuinfo
from .._library import differentiates, is_transformed
from .ops import matmul  # noqa: F401  (it registers the op used below)

_WORTH_IT = 1 << 18  # multiplications, below which torch's product is the faster one to call
_ROWS = 4  # of x, where the weight's rows do not lie side by side

_left: list[bool] = []
_matmul = torch.ops.tilewright.matmul.default


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As torch.nn.functional.linear; under torch.compile, torch.func and autocast it is that."""
    if not takes(x, weight) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    return multiply(x, weight, bias)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same by our product, whatever is faster: float32 on a CPU, x of two axes or more."""
    if differentiates(x, weight, bias):
        return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return, no-untyped-call]
    return _multiply(x, weight, bias)


def product(rows: Tensor, columns: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., k) times (n, k) transposed, and a bias (n,), without a gradient -> (..., n)."""
    if not takes(rows, columns):
        return F.linear(rows, columns, bias)
    return _multiply(rows, columns, bias)


def may_be_part(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether products of what is like x with these may be part of an op: nobody looks for torch's own."""
    if torch.compiler.is_compiling() or _left or is_transformed() or torch.is_autocast_enabled(x.device.type):
        return False
    return all(t is None or (type(t) in PLAIN and t.dtype == x.dtype) for t in weights)


@contextmanager
def by_torch() -> Iterator[None]:
    """Leaves products to torch, whose own functions a reader of autograd's graph knows."""
    _left.append(True)
    try:
        yield
    finally:
        _left.pop()


@cache
def is_better() -> bool:
    """Whether large products are faster here than torch's on this processor."""
    return (
        torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        and any(level.startswith("avx512") for level in _C.cpu_levels())
        and next((value for key, value in cpuinfo() if key == "vendor_id"), "GenuineIntel") != "GenuineIntel"
    )


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = _matmul(x.flatten(0, -2), weight.t(), bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether our product is the faster one for these two."""
    return is_free() and suits(x, weight)


def is_free() -> bool:
    """Whether our product may be taken at all, and is the faster one for what it suits."""
    if torch.compiler.is_compiling() or _left or is_transformed():
        return False
    return is_better() and _C.cpu_level().startswith("avx512")


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether our product is for these two: float32 on a CPU, and large."""
    return (
        type(x) in PLAIN
        and type(weight) in PLAIN
        and x.dtype == weight.dtype == torch.float32
        and x.is_cpu
        and weight.is_cpu
        and x.dim() > 1
        and (weight.stride(1) == 1 or x.numel() >= _ROWS * x.shape[-1])
        and x.numel() * weight.shape[0] >= _WORTH_IT
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return linear_gradients(grad, x, weight, ctx.needs_input_grad)


def linear_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Of a linear layer's input, weight and bias, those that are needed; x itself is read for the second."""
    rows = grad.flatten(0, -2)
    times = F.linear if torch.is_grad_enabled() else product  # torch's own is for a second derivative
    wants_x, wants_weight, wants_bias = needed
    return (
        times(rows, weight.t()).view(*grad.shape[:-1], weight.shape[1]) if wants_x else None,
        times(rows.t(), x.flatten(0, -2).t()) if wants_weight else None,
        rows.sum(0) if wants_bias else None,
    )
