"""The gated RMS norm as torch ops: schema, implementation, fake kernels, gradient.

tilewright::gated_rms_norm_fwd  out, rstd (rows * groups)
tilewright::gated_rms_norm_bwd  dx, dweight, dz (empty without z)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _backend
from ..._library import define


def in_rows(x: Tensor) -> Tensor:
    """x, or a copy of it if its rows do not lie at one distance, or their elements not side by side."""
    if x.is_contiguous():
        return x
    try:
        rows = x.view(-1, x.shape[-1])
    except RuntimeError:  # no such matrix
        return x.contiguous()
    return x if rows.stride(1) == 1 or rows.shape[1] == 1 else x.contiguous()


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _forward(
    x: Tensor, weight: Tensor, z: Tensor | None, eps: float, group_size: int, norm_before_gate: bool
) -> tuple[Tensor, Tensor]:
    out, rstd = _fake_forward(x, weight, z, eps, group_size, norm_before_gate)
    _backend.C.gated_rms_norm_fwd(
        in_rows(x),
        weight,
        None if z is None else in_rows(z),
        eps,
        group_size,
        norm_before_gate,
        out,
        rstd,
        _backend.num_threads(),
    )
    return out, rstd


def _fake_forward(
    x: Tensor, weight: Tensor, z: Tensor | None, eps: float, group_size: int, norm_before_gate: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return _empty_like(x), x.new_empty(x.numel() // group_size, dtype=dtype)


def _backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    z: Tensor | None,
    rstd: Tensor,
    group_size: int,
    norm_before_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _fake_backward(dout, x, weight, z, rstd, group_size, norm_before_gate)
    dx, dweight, dz = gradients
    if dx.numel() == 0:
        dweight.zero_()
        return gradients
    x = in_rows(x)
    scratch = _backend.C.gated_rms_norm_workspace(x, group_size)
    _backend.C.gated_rms_norm_bwd(
        in_rows(dout),
        x,
        weight,
        None if z is None else in_rows(z),
        rstd,
        group_size,
        norm_before_gate,
        dx,
        dweight,
        None if z is None else dz,
        torch.empty(scratch, dtype=torch.uint8, device=x.device),
        _backend.num_threads(),
    )
    return gradients


def _fake_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    z: Tensor | None,
    rstd: Tensor,
    group_size: int,
    norm_before_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(x), _empty_like(weight), x.new_empty(0) if z is None else _empty_like(x)


define(
    "gated_rms_norm_fwd(Tensor x, Tensor weight, Tensor? z, float eps, int group_size, "
    "bool norm_before_gate) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
define(
    "gated_rms_norm_bwd(Tensor dout, Tensor x, Tensor weight, Tensor? z, Tensor rstd, int group_size, "
    "bool norm_before_gate) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)

_fwd = torch.ops.tilewright.gated_rms_norm_fwd.default
_bwd = torch.ops.tilewright.gated_rms_norm_bwd.default


class GatedRmsNorm(torch.autograd.Function):
    """out with gradients of x, weight and z."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        z: Tensor | None,
        eps: float,
        group_size: int,
        norm_before_gate: bool,
    ) -> Tensor:
        """Calls the forward op."""
        out, rstd = _fwd(x, weight, z, eps, group_size, norm_before_gate)
        ctx.save_for_backward(x, weight, z, rstd)
        ctx.group_size, ctx.norm_before_gate = group_size, norm_before_gate
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        """Calls the backward op."""
        if torch.is_grad_enabled():
            raise NotImplementedError("gated_rms_norm has no second derivative (create_graph=True)")
        x, weight, z, rstd = ctx.saved_tensors
        dx, dweight, dz = _bwd(gradients[0], x, weight, z, rstd, ctx.group_size, ctx.norm_before_gate)
        return dx, dweight, None if z is None else dz, None, None, None
