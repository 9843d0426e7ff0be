"""The SSD scan of Mamba-2 as torch ops.

    tilewright::ssd_chunk_scan_fwd  the result, final states (empty unless wanted), what the backward op needs
    tilewright::ssd_chunk_scan_bwd  all gradients

Weights (A, D, dt_bias), dt and states are float32, or float64 where x is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _backend
from ..._checks import check_boundaries
from ..._library import define
from .sequences import kept_chunks, sequence_count

_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens, "
    "bool dt_softplus, float dt_min, float dt_max"
)
_DIFFERENTIABLE = 9  # of the inputs, the first ones
_NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states", "seq_idx", "cu_seqlens")


def _empty(
    x: Tensor, B: Tensor, dt: Tensor, cu_seqlens: Tensor | None, return_final_states: bool, keep_y: bool
) -> tuple[Tensor, ...]:
    batch, _, heads, head_dim = x.shape
    states = B.shape[3]
    final = (sequence_count(batch, cu_seqlens), heads, head_dim, states) if return_final_states else (0,)
    return (
        x.new_empty(x.shape),
        x.new_empty(final, dtype=dt.dtype),
        x.new_empty((kept_chunks(x, cu_seqlens), heads, states, head_dim), dtype=dt.dtype),
        x.new_empty(x.shape if keep_y else (0,)),
    )


def _workspace(x: Tensor, B: Tensor, cu_seqlens: Tensor | None, backward: bool) -> Tensor:
    size = _backend.C.ssd_chunk_scan_workspace(x, B, cu_seqlens, backward, _backend.num_threads())
    return x.new_empty(size, dtype=torch.uint8)


def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    return_final_states: bool,
    keep_y: bool,
) -> tuple[Tensor, ...]:
    if cu_seqlens is not None:
        check_boundaries(cu_seqlens, x.shape[1])
    results = _empty(x, B, dt, cu_seqlens, return_final_states, keep_y)
    if not sequence_count(x.shape[0], cu_seqlens):
        return results
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens)
    tensors: dict[str, Tensor | None] = dict(zip(_NAMES, inputs, strict=True))
    tensors["out"], final_states, tensors["chunk_states"] = results[:3]
    tensors["final_states"] = final_states if return_final_states else None
    tensors["y"] = results[3] if keep_y else None
    tensors["workspace"] = _workspace(x, B, cu_seqlens, False)
    _backend.C.ssd_chunk_scan_fwd(tensors, dt_softplus, dt_min, dt_max, _backend.num_threads())
    return results


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    x, dt, _, B = arguments[:4]
    return _empty(x, B, dt, arguments[10], *arguments[-2:])


def _empty_gradients(*inputs: Tensor | None) -> list[Tensor]:
    """One for each of the differentiable inputs; that of an absent one has no elements."""
    x = inputs[0]
    assert x is not None
    return [x.new_empty((0,)) if t is None else t.new_empty(t.shape) for t in inputs]


def _backward(
    dout: Tensor,
    dfinal_states: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    chunk_states: Tensor,
    y: Tensor | None,
) -> list[Tensor]:
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens)
    gradients = _empty_gradients(*inputs[:_DIFFERENTIABLE])
    if not sequence_count(x.shape[0], cu_seqlens):
        return [gradient.zero_() for gradient in gradients]
    if chunk_states.shape[0] < kept_chunks(x, cu_seqlens):  # a GPU's call, made again on a CPU
        chunk_states = _forward(*inputs, dt_softplus, dt_min, dt_max, False, False)[2]
    tensors: dict[str, Tensor | None] = dict(zip(_NAMES, inputs, strict=True))
    for name, source, gradient in zip(_NAMES, inputs, gradients, strict=False):
        tensors["d" + name] = None if source is None else gradient
    tensors["dout"], tensors["dfinal_states"] = dout, dfinal_states
    tensors["chunk_states"], tensors["y"] = chunk_states, y
    tensors["workspace"] = _workspace(x, B, cu_seqlens, True)
    _backend.C.ssd_chunk_scan_bwd(tensors, dt_softplus, dt_min, dt_max, _backend.num_threads())
    return gradients


def _fake_backward(dout: Tensor, dfinal_states: Tensor | None, *arguments: Any) -> list[Tensor]:
    return _empty_gradients(*arguments[:_DIFFERENTIABLE])


define(
    f"ssd_chunk_scan_fwd({_INPUTS}, bool return_final_states, bool keep_y) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
define(
    f"ssd_chunk_scan_bwd(Tensor dout, Tensor? dfinal_states, {_INPUTS}, Tensor chunk_states, Tensor? y) "
    "-> Tensor[]",
    _backward,
    _fake_backward,
)

_fwd = torch.ops.tilewright.ssd_chunk_scan_fwd.default
_bwd = torch.ops.tilewright.ssd_chunk_scan_bwd.default


class SsdChunkScan(torch.autograd.Function):
    """(out, final_states) of the arguments in the order of the op's schema, up to return_final_states."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Runs the op; keeps its inputs, on a CPU the states before each chunk, for the gate its result."""
        inputs, options, return_final_states = arguments[:11], arguments[11:14], arguments[14]
        z = inputs[6]
        keep_y = z is not None and any(ctx.needs_input_grad)
        out, final_states, chunk_states, y = _fwd(*inputs, *options, return_final_states, keep_y)
        ctx.save_for_backward(*inputs, chunk_states, y if keep_y else None)
        ctx.options, ctx.has_final_states = options, return_final_states
        ctx.set_materialize_grads(False)
        if not return_final_states:
            ctx.mark_non_differentiable(final_states)
        return out, final_states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the nine differentiable inputs."""
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "ssd_chunk_scan has no second derivative: call backward without create_graph"
            )
        *inputs, chunk_states, y = ctx.saved_tensors
        dout, dfinal_states = grads[0], grads[1] if ctx.has_final_states else None
        if dout is None:
            dout = inputs[0].new_zeros(()).expand(inputs[0].shape)
        if dfinal_states is not None:
            dfinal_states = dfinal_states.contiguous()
        found = _bwd(dout, dfinal_states, *inputs, *ctx.options, chunk_states, y)
        needed = ctx.needs_input_grad
        results = [found[i] if needed[i] else None for i in range(_DIFFERENTIABLE)]
        return (*results, None, None, None, None, None, None)
