"""First-order linear recurrences along an axis."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import (
    check_apart,
    check_cu_seqlens,
    check_device,
    check_dtype,
    check_flag,
    check_shape,
    check_tensor,
)
from .._library import differentiates
from .ops.linear import LinearScan
from .ops.linear import forward as _forward
from .ops.linear import write as _write

_DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
)
_HALVES = (torch.bfloat16, torch.float16)


def linear_scan(
    a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    *,
    dim: int = 1,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Computes ``h[t] = a[t] * h[t-1] + b[t]`` along `dim`, with ``h[-1] = h0``.

    The state is carried in float32 for bfloat16 and float16, else in the inputs' dtype. NaN and infinity
    appear where the recurrence, step by step, has them. Differentiable in a, b and h0, once.

    Args:
        a: decay, of b's shape or one that broadcasts against it; real or complex. float32, bfloat16, float16
            or complex64; on the CPU float64 and complex128 too. Any strides; expanded views are not copied.
        b: input, likewise. If the dtypes of a and b differ, both are cast as ``a * b`` would cast them.
        h0: state before the first step, of h's shape without the axis `dim`; packed: ``(n_seq, ...)`` with
            h's axes after `dim`. Cast to the state's dtype. None: zeros.
        dim: axis of the steps, counted in h; negative from the end.
        reverse: run from the end, ``h[t] = a[t] * h[t+1] + b[t]``; h0 enters behind the last step.
        cu_seqlens: int32 or int64 ``(n_seq + 1,)`` on b's device, rising strictly from 0 to the length:
            sequence i is the steps ``cu_seqlens[i]`` to ``cu_seqlens[i+1]``, and no state passes from one to
            another. The axes before `dim` must have size 1. Its values are read on the host, which waits for
            a CUDA device once, except while a CUDA graph is captured: there they are trusted.
            None: one sequence.
        out: contiguous tensor of h's shape, dtype and device to write h to, where no gradient is asked for.
            None: a new one, whose memory the system has to find and clear; that takes as long as h itself.

    Returns:
        h, of the broadcast shape of a and b and their common dtype; with b's strides where b is dense; or
        `out`.

    Raises:
        TypeError: an argument is not of its type, or a dtype is none of those above.
        ValueError: a shape, device, `dim` or `cu_seqlens` that does not fit; an `out` that does not fit,
            overlaps an input, or comes where a gradient is asked for.
        NotImplementedError: float64 or complex128 on CUDA; more than six axes that strides keep from merging;
            a second derivative.

    Autocast changes nothing here: the dtypes given decide. vmap and torch.func.grad are not supported.

    Source: the gradient's form is that of Martin & Cundy, "Parallelizing Linear Recurrent Neural Nets Over
    Sequence Length" (arXiv 1709.04057).
    """
    a, b = _common(a, b)
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an int, got {type(dim).__name__}")
    check_flag("reverse", reverse)
    if not -b.ndim <= dim < b.ndim:
        raise ValueError(f"dim must be in [{-b.ndim}, {b.ndim - 1}] for a and b of {b.ndim} axes, got {dim}")
    dim %= b.ndim
    if cu_seqlens is not None:
        _check_packing(cu_seqlens, b, dim)
    if h0 is not None:
        h0 = _checked_state(h0, b, dim, cu_seqlens)
    needs_grad = differentiates(a, b, h0)
    if out is not None:
        _check_out(out, needs_grad, a, b, h0)
        _write(a, b, h0, cu_seqlens, dim, reverse, out)
        return out
    if needs_grad:
        differentiable: Tensor = LinearScan.apply(  # type: ignore[no-untyped-call]
            a, b, h0, cu_seqlens, dim, reverse
        )
        return differentiable
    h: Tensor = _forward(a, b, h0, cu_seqlens, dim, reverse)
    return h


def _common(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both as tensors of one shape and dtype."""
    for name, value in (("a", a), ("b", b)):
        check_tensor(name, value)
        check_dtype(name, value, _DTYPES)
    check_device("a", a, b.device, "b")
    if a.dtype != b.dtype:
        dtype = torch.promote_types(a.dtype, b.dtype)
        a, b = a.to(dtype), b.to(dtype)
    if a.shape != b.shape:
        try:
            a, b = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]
        except RuntimeError:
            raise ValueError(
                f"a and b must have shapes that broadcast, got {tuple(a.shape)} and {tuple(b.shape)}"
            ) from None
    if b.ndim == 0:
        raise ValueError("a and b must have at least one axis, got scalars")
    return a, b


def _check_packing(cu_seqlens: Tensor, b: Tensor, dim: int) -> None:
    check_cu_seqlens(cu_seqlens, b.device, "b")
    if any(size != 1 for size in b.shape[:dim]):
        raise ValueError(
            f"cu_seqlens needs axes of size 1 before dim={dim}, got a and b of shape {tuple(b.shape)}"
        )


def _checked_state(h0: Tensor, b: Tensor, dim: int, cu_seqlens: Tensor | None) -> Tensor:
    """h0 in the dtype the state is carried in."""
    check_tensor("h0", h0)
    check_device("h0", h0, b.device, "b")
    dtype = torch.float32 if b.dtype in _HALVES else b.dtype
    fitting = [allowed for allowed in _DTYPES if torch.promote_types(allowed, dtype) == dtype]
    check_dtype("h0", h0, fitting)
    if cu_seqlens is None:
        expected = (*b.shape[:dim], *b.shape[dim + 1 :])
        check_shape("h0", h0, expected, "h's without dim")
    else:
        expected = (cu_seqlens.shape[0] - 1, *b.shape[dim + 1 :])
        check_shape("h0", h0, expected, "(n_seq, h's axes after dim)")
    return h0.to(dtype)


def _check_out(out: Tensor, needs_grad: bool, a: Tensor, b: Tensor, h0: Tensor | None) -> None:
    check_tensor("out", out)
    check_dtype("out", out, (b.dtype,))
    check_shape("out", out, b.shape, "h's")
    check_device("out", out, b.device, "b")
    if needs_grad or out.requires_grad:
        raise ValueError("out is written to without a gradient, but an input or out requires one")
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()} for shape {tuple(out.shape)}")
    if torch.compiler.is_compiling():
        return  # what follows cannot be asked of a tensor there
    if out.is_conj():
        raise ValueError("out must not be a conjugated view")
    check_apart("out", out, a=a, b=b, h0=h0)
