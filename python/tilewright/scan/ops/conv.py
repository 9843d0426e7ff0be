"""The causal convolution as torch ops: schema, implementation, fake kernels, gradient.

tilewright::causal_conv1d_fwd  out, final_states (empty unless wanted)
tilewright::causal_conv1d_bwd  dx, dweight, dbias (empty without bias), dinitial_states (empty without)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _backend
from ..._library import define


def _is_channel_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.stride(2) != 1


def _empty_like(x: Tensor) -> Tensor:
    """A dense tensor in which the axis that lies side by side in x does so too."""
    batch, dim, length = x.shape
    if _is_channel_last(x):
        return x.new_empty((batch, length, dim)).transpose(1, 2)
    return x.new_empty((batch, dim, length))


def _workspace(x: Tensor, width: int, seq_idx: Tensor | None, backward: bool) -> Tensor:
    count = _backend.C.causal_conv1d_workspace(x, width, seq_idx is not None, backward)
    return torch.empty(count, dtype=torch.uint8, device=x.device)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    silu: bool,
    return_final_states: bool,
) -> tuple[Tensor, Tensor]:
    out, final = _fake_forward(x, weight, bias, seq_idx, initial_states, silu, return_final_states)
    if out.numel() == 0:
        if return_final_states:
            final.zero_() if initial_states is None else final.copy_(initial_states)
        return out, final
    _backend.C.causal_conv1d_fwd(
        x,
        weight,
        bias,
        seq_idx,
        initial_states,
        silu,
        out,
        final if return_final_states else None,
        _workspace(x, weight.shape[1], seq_idx, backward=False),
        _backend.num_threads(),
    )
    return out, final


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    silu: bool,
    return_final_states: bool,
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], x.shape[1], weight.shape[1] - 1) if return_final_states else (0,)
    return _empty_like(x), x.new_empty(shape)


def _backward(
    dout: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = _fake_backward(dout, dfinal, x, weight, bias, seq_idx, initial_states, silu)
    dx, dweight, dbias, dinitial = gradients
    if dx.numel() == 0:
        dweight.zero_()
        dbias.zero_()
        if initial_states is not None:
            dinitial.zero_() if dfinal is None else dinitial.copy_(dfinal)
        return gradients
    if dout.stride(1 if dout.stride(2) == 1 else 2) != 0 and _is_channel_last(dout) != _is_channel_last(x):
        dout = _empty_like(x).copy_(dout)  # one copy costs less than gathering across both tensors
    _backend.C.causal_conv1d_bwd(
        dout,
        dfinal,
        x,
        weight,
        bias,
        seq_idx,
        initial_states,
        silu,
        dx,
        dweight,
        None if bias is None else dbias,
        None if initial_states is None else dinitial,
        _workspace(x, weight.shape[1], seq_idx, backward=True),
        _backend.num_threads(),
    )
    return gradients


def _fake_backward(
    dout: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = weight.new_empty((0,) if bias is None else bias.shape)
    dinitial = x.new_empty((0,) if initial_states is None else initial_states.shape)
    return _empty_like(x), weight.new_empty(weight.shape), dbias, dinitial


define(
    "causal_conv1d_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? initial_states, "
    "bool silu, bool return_final_states) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
define(
    "causal_conv1d_bwd(Tensor dout, Tensor? dfinal, Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, "
    "Tensor? initial_states, bool silu) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)

_fwd = torch.ops.tilewright.causal_conv1d_fwd.default
_bwd = torch.ops.tilewright.causal_conv1d_bwd.default


class CausalConv1d(torch.autograd.Function):
    """out and final_states (empty unless wanted) with gradients of x, weight, bias and initial_states."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        seq_idx: Tensor | None,
        initial_states: Tensor | None,
        silu: bool,
        return_final_states: bool,
    ) -> tuple[Tensor, Tensor]:
        """Calls the forward op."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, seq_idx, initial_states)
        ctx.silu = silu
        out, final = _fwd(x, weight, bias, seq_idx, initial_states, silu, return_final_states)
        ctx.has_final_states = return_final_states
        if not return_final_states:
            ctx.mark_non_differentiable(final)
        return out, final

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        """Calls the backward op."""
        if torch.is_grad_enabled():
            raise NotImplementedError("causal_conv1d has no second derivative (create_graph=True)")
        dout, dfinal = gradients[0], gradients[1] if ctx.has_final_states else None
        x, weight, bias, seq_idx, initial_states = ctx.saved_tensors
        if dout is None and dfinal is None:
            return None, None, None, None, None, None, None
        if dout is None:
            dout = torch.zeros_like(x)
        dx, dweight, dbias, dinitial = _bwd(dout, dfinal, x, weight, bias, seq_idx, initial_states, ctx.silu)
        return (
            dx,
            dweight,
            None if bias is None else dbias,
            None,
            None if initial_states is None else dinitial,
            None,
            None,
        )
