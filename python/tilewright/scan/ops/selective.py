"""The selective scan as torch ops: schema, implementation, fake kernel, gradient.

    tilewright::selective_scan_fwd   out, the last states, the states the backward pass starts from
    tilewright::selective_scan_bwd   the gradients asked for

States that are not asked for come back empty. Tensors are of the dtypes that `selective.py` casts to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _backend
from ..._checks import check_boundaries
from ..._library import define, differentiates
from .sequences import chunk_count, sequence_count

_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "Tensor? initial_state, Tensor? cu_seqlens, Tensor? order"
)
_DIFFERENTIABLE = 9  # of the inputs, the first ones


def _outputs(
    u: Tensor, A: Tensor, cu_seqlens: Tensor | None, last_state: bool, chunk_states: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dim, states = A.shape
    batch, _, length = u.shape
    ends = (sequence_count(batch, cu_seqlens), dim, states) if last_state else (0,)
    chunk = _backend.C.SELECTIVE_SCAN_CHUNK
    starts = (chunk_count(batch, length, cu_seqlens, chunk), states, dim) if chunk_states else (0,)
    return torch.empty_like(u), A.new_empty(ends), A.new_empty(starts)


def _gradients(inputs: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    """Room for the gradients needed, each laid out like its input where that has no gaps or overlaps."""
    gradients: list[Tensor | None] = [
        torch.empty_like(value) if wanted and value is not None else None
        for value, wanted in zip(inputs, needed, strict=True)
    ]
    for i in (2, 5, 7, 8):  # A, D, delta_bias, initial_state: kernels write these as they are indexed
        gradient = gradients[i]
        if gradient is not None and not gradient.is_contiguous():
            gradients[i] = torch.empty_like(gradient, memory_format=torch.contiguous_format)
    return gradients


def _run(kernel: Callable[..., int], u: Tensor, *arguments: Any) -> None:
    """Runs a kernel, with the scratch memory it asks for."""
    threads = _backend.num_threads()
    missing = kernel(*arguments, None, threads)
    if missing:
        kernel(*arguments, torch.empty(missing, dtype=torch.uint8, device=u.device), threads)


def _dense(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()


def _check_order(order: Tensor, length: int) -> None:
    """Looks at the values, which waits for the device; not while a CUDA graph is captured."""
    if order.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    inside = (order >= 0) & (order < length)
    seen = torch.zeros_like(order, dtype=torch.bool)
    seen.scatter_(-1, torch.where(inside, order, 0), inside)
    if length and not bool(seen.all()):
        raise ValueError(f"order must hold every token of 0 to {length - 1} once")


def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    order: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    last_state: bool,
    chunk_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if cu_seqlens is not None:
        check_boundaries(cu_seqlens, u.shape[2])
    if order is not None:
        _check_order(order, u.shape[2])
    outputs = _outputs(u, A, cu_seqlens, last_state, chunk_states)
    out, ends, starts = outputs
    _run(
        _backend.C.selective_scan_fwd,
        u,
        *(u, delta, A, B, C, _dense(D), z, _dense(delta_bias), _dense(initial_state)),
        *(_dense(cu_seqlens), _dense(order), delta_softplus, reverse, out),
        *(ends if last_state else None, starts if chunk_states else None),
    )
    return outputs


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    u, _, A = arguments[:3]
    cu_seqlens, (last_state, chunk_states) = arguments[_DIFFERENTIABLE], arguments[-2:]
    return _outputs(u, A, cu_seqlens, last_state, chunk_states)


def _backward(
    dout: Tensor,
    dlast_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    order: Tensor | None,
    chunk_states: Tensor,
    delta_softplus: bool,
    reverse: bool,
    needed: list[bool],
) -> list[Tensor]:
    gradients = _gradients((u, delta, A, B, C, D, z, delta_bias, initial_state), needed)
    _run(
        _backend.C.selective_scan_bwd,
        u,
        *(dout, _dense(dlast_state), u, delta, A, B, C, _dense(D), z, _dense(delta_bias)),
        *(_dense(initial_state), _dense(cu_seqlens), _dense(order), chunk_states),
        *(delta_softplus, reverse, gradients),
    )
    return [gradient for gradient in gradients if gradient is not None]


def _fake_backward(dout: Tensor, dlast_state: Tensor | None, *arguments: Any) -> list[Tensor]:
    gradients = _gradients(arguments[:_DIFFERENTIABLE], arguments[-1])
    return [gradient for gradient in gradients if gradient is not None]


define(
    f"selective_scan_fwd({_INPUTS}, bool delta_softplus, bool reverse, bool last_state, bool chunk_states) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
define(
    f"selective_scan_bwd(Tensor dout, Tensor? dlast_state, {_INPUTS}, Tensor chunk_states, "
    "bool delta_softplus, bool reverse, bool[] needed) -> Tensor[]",
    _backward,
    _fake_backward,
)

_forward_op = torch.ops.tilewright.selective_scan_fwd.default
_backward_op = torch.ops.tilewright.selective_scan_bwd.default


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, delta_softplus: bool, reverse: bool, last_state: bool, *inputs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, ends, starts = _forward_op(*inputs, delta_softplus, reverse, last_state, True)
        ctx.save_for_backward(*inputs, starts)
        ctx.options, ctx.last_state = (delta_softplus, reverse), last_state
        ctx.set_materialize_grads(False)
        if not last_state:
            ctx.mark_non_differentiable(ends)
        return out, ends

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlast_state: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError("selective_scan cannot be differentiated twice")
        *inputs, starts = ctx.saved_tensors
        if dout is None:
            dout = inputs[0].new_zeros(()).expand(inputs[0].shape)
        if not ctx.last_state:
            dlast_state = None  # torch.compile makes one up for the empty tensor
        needed = list(ctx.needs_input_grad[3 : 3 + _DIFFERENTIABLE])
        gradients = iter(_backward_op(dout, dlast_state, *inputs, starts, *ctx.options, needed))
        return None, None, None, *(next(gradients) if wanted else None for wanted in needed), None, None


def selective_scan(
    inputs: Sequence[Tensor | None], delta_softplus: bool, reverse: bool, last_state: bool
) -> tuple[Tensor, Tensor]:
    """out and the last states (empty unless asked for), of the inputs in the order of the schema."""
    if differentiates(*inputs):
        result: tuple[Tensor, Tensor] = _SelectiveScan.apply(delta_softplus, reverse, last_state, *inputs)  # type: ignore[no-untyped-call]
        return result
    out, ends, _ = _forward_op(*inputs, delta_softplus, reverse, last_state, False)
    return out, ends
