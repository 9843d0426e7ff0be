"""The linear recurrence as torch ops: schema, implementation, fake kernels, gradient.

    tilewright::linear_scan_fwd  h
    tilewright::linear_scan_out  writes h into a tensor of the caller
    tilewright::linear_scan_bwd  (da, db, dh0); da is empty where h is None, dh0 where h0 is None

a and b have one shape and dtype, h0 the accumulator's dtype (float32 for the 16-bit ones).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ... import _backend
from ..._checks import check_boundaries
from ..._library import define, nothing


def _run(
    tensors: tuple[Tensor | None, ...], cu_seqlens: Tensor | None, dim: int, backward: bool, descending: bool
) -> None:
    seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    workspace = None
    a = tensors[0]
    assert a is not None
    if a.is_cuda or _backend.is_emulated():
        size = _backend.C.linear_scan_workspace(tensors, seqlens, dim, backward, descending)
        workspace = torch.empty(size, dtype=torch.uint8, device=a.device) if size else None
    _backend.C.linear_scan(tensors, seqlens, dim, backward, descending, workspace, _backend.num_threads())


def _forward(
    a: Tensor, b: Tensor, h0: Tensor | None, cu_seqlens: Tensor | None, dim: int, reverse: bool
) -> Tensor:
    h = torch.empty_like(b)
    _write(a, b, h0, cu_seqlens, dim, reverse, h)
    return h


def _write(
    a: Tensor,
    b: Tensor,
    h0: Tensor | None,
    cu_seqlens: Tensor | None,
    dim: int,
    reverse: bool,
    out: Tensor,
) -> None:
    if cu_seqlens is not None:
        check_boundaries(cu_seqlens, b.shape[dim])
    _run((a, b, out, None, None, h0, None), cu_seqlens, dim, False, reverse)
    increment_version(out)


def _backward(
    grad: Tensor,
    a: Tensor,
    h: Tensor | None,
    h0: Tensor | None,
    cu_seqlens: Tensor | None,
    dim: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    da, db, dh0 = _fake_backward(grad, a, h, h0, cu_seqlens, dim, reverse)
    wanted_a, wanted_h0 = None if h is None else da, None if h0 is None else dh0
    _run((a, grad, db, h, wanted_a, h0, wanted_h0), cu_seqlens, dim, True, not reverse)
    return da, db, dh0


def _fake_forward(
    a: Tensor, b: Tensor, h0: Tensor | None, cu_seqlens: Tensor | None, dim: int, reverse: bool
) -> Tensor:
    return torch.empty_like(b)


def _fake_backward(
    grad: Tensor,
    a: Tensor,
    h: Tensor | None,
    h0: Tensor | None,
    cu_seqlens: Tensor | None,
    dim: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    like = a if h is None else h
    da = a.new_empty(0) if h is None else torch.empty_like(like)
    dh0 = a.new_empty(0) if h0 is None else torch.empty_like(h0)
    return da, torch.empty_like(like), dh0


define(
    "linear_scan_fwd(Tensor a, Tensor b, Tensor? h0, Tensor? cu_seqlens, int dim, bool reverse) -> Tensor",
    _forward,
    _fake_forward,
)
define(
    "linear_scan_out(Tensor a, Tensor b, Tensor? h0, Tensor? cu_seqlens, int dim, bool reverse, "
    "Tensor(a!) out) -> ()",
    _write,
    nothing,
)
define(
    "linear_scan_bwd(Tensor grad, Tensor a, Tensor? h, Tensor? h0, Tensor? cu_seqlens, int dim, "
    "bool reverse) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)

forward = torch.ops.tilewright.linear_scan_fwd.default
write = torch.ops.tilewright.linear_scan_out.default
backward = torch.ops.tilewright.linear_scan_bwd.default


class LinearScan(torch.autograd.Function):
    """The recurrence with its gradient; `apply` takes the arguments of `linear_scan_fwd`."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        h0: Tensor | None,
        cu_seqlens: Tensor | None,
        dim: int,
        reverse: bool,
    ) -> Tensor:
        """Returns h."""
        h: Tensor = forward(a, b, h0, cu_seqlens, dim, reverse)
        ctx.save_for_backward(a, h if ctx.needs_input_grad[0] else None, h0, cu_seqlens)
        ctx.dim, ctx.reverse = dim, reverse
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of a, b and h0."""
        if torch.is_grad_enabled():
            raise NotImplementedError("linear_scan: second derivatives are not supported")
        a, h, h0, cu_seqlens = ctx.saved_tensors
        da, db, dh0 = backward(grad, a, h, h0, cu_seqlens, ctx.dim, ctx.reverse)
        return da if h is not None else None, db, dh0 if h0 is not None else None, None, None, None
