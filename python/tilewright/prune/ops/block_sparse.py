"""The block-sparse linear layer as torch ops.

    tilewright::block_sparse_linear_fwd  y = activation(x W^T + bias), and z before the activation if wanted
    tilewright::block_sparse_linear_dx   dx = dz W
    tilewright::block_sparse_linear_dw   dW = dz^T x at the blocks that are there

W comes as `values` (blocks, block rows, block columns) and the pattern of `block_pattern.kernel_pattern`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _backend
from ..._library import define, differentiates, is_direct, new_on_cpu

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
_FORWARD, _INPUT, _WEIGHT = range(3)


def _workspace(values: Tensor, out: int, into: int, tokens: int, call: int, threads: int) -> Tensor | None:
    needed = _backend.C.block_sparse_linear_workspace(values, out, into, tokens, call, threads)
    return values.new_empty(needed, dtype=torch.uint8) if needed else None


def _fake_forward(
    x: Tensor, values: Tensor, pattern: Tensor, bias: Tensor | None, out_features: int, activation: str,
    keep_z: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = x.new_empty((x.shape[0], out_features))
    return y, torch.empty_like(y) if keep_z else x.new_empty((0, out_features))


def _forward(
    x: Tensor, values: Tensor, pattern: Tensor, bias: Tensor | None, out_features: int, activation: str,
    keep_z: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, z = _fake_forward(x, values, pattern, bias, out_features, activation, keep_z)
    tokens, into = x.shape
    threads = _backend.num_threads()
    workspace = _workspace(values, out_features, into, tokens, _FORWARD, threads)
    _backend.C.block_sparse_linear_fwd(
        x, values, pattern, bias, y, z if keep_z else None, out_features, into,
        ACTIVATIONS.index(activation), workspace, threads,
    )  # fmt: skip
    return y, z


def _fake_dx(dz: Tensor, values: Tensor, pattern: Tensor, in_features: int) -> Tensor:
    return dz.new_empty((dz.shape[0], in_features))


def _dx(dz: Tensor, values: Tensor, pattern: Tensor, in_features: int) -> Tensor:
    dx, (tokens, out), threads = _fake_dx(dz, values, pattern, in_features), dz.shape, _backend.num_threads()
    workspace = _workspace(values, out, in_features, tokens, _INPUT, threads)
    _backend.C.block_sparse_linear_dx(dz, values, pattern, dx, out, in_features, workspace, threads)
    return dx


def _fake_dw(dz: Tensor, x: Tensor, pattern: Tensor, shape: list[int]) -> Tensor:
    return x.new_empty(shape)


def _dw(dz: Tensor, x: Tensor, pattern: Tensor, shape: list[int]) -> Tensor:
    dvalues, threads = _fake_dw(dz, x, pattern, shape), _backend.num_threads()
    (tokens, out), into = dz.shape, x.shape[1]
    workspace = _workspace(dvalues, out, into, tokens, _WEIGHT, threads)
    _backend.C.block_sparse_linear_dw(dz, x, pattern, dvalues, out, into, workspace, threads)
    return dvalues


define(
    "block_sparse_linear_fwd(Tensor x, Tensor values, Tensor pattern, Tensor? bias, int out_features, "
    "str activation, bool keep_z) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
define(
    "block_sparse_linear_dx(Tensor dz, Tensor values, Tensor pattern, int in_features) -> Tensor",
    _dx,
    _fake_dx,
)
define("block_sparse_linear_dw(Tensor dz, Tensor x, Tensor pattern, int[] shape) -> Tensor", _dw, _fake_dw)

_fwd = torch.ops.tilewright.block_sparse_linear_fwd.default
_input_gradient = torch.ops.tilewright.block_sparse_linear_dx.default
_weight_gradient = torch.ops.tilewright.block_sparse_linear_dw.default


def activation_gradient(dy: Tensor, z: Tensor, activation: str) -> Tensor:
    """dz of y = activation(z)."""
    aten, result = torch.ops.aten, dy
    if activation == "relu":
        result = aten.threshold_backward(dy, z, 0)
    elif activation == "silu":
        result = aten.silu_backward(dy, z)
    elif activation in ("gelu", "gelu_tanh"):
        result = aten.gelu_backward(dy, z, approximate="tanh" if activation == "gelu_tanh" else "none")
    return result


class BlockSparseLinearFunction(torch.autograd.Function):
    """y of (x, values, pattern, bias, out_features, activation); x (tokens, in)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, pattern: Tensor, bias: Tensor | None, out: int, activation: str
    ) -> Tensor:
        """Runs the op; z is kept only where there is an activation."""
        y, z = _fwd(x, values, pattern, bias, out, activation, activation != "none")
        ctx.save_for_backward(x, values, pattern, z)
        ctx.activation = activation
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, values and bias."""
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "BlockSparseLinear has no second derivative: call backward without create_graph"
            )
        x, values, pattern, z = ctx.saved_tensors
        need_x, need_values, _, need_bias, *_ = ctx.needs_input_grad
        dz = activation_gradient(dy, z, ctx.activation)
        dx = _input_gradient(dz, values, pattern, x.shape[1]) if need_x else None
        dvalues = _weight_gradient(dz, x, pattern, list(values.shape)) if need_values else None
        return dx, dvalues, None, dz.sum(0) if need_bias else None, None, None


def block_sparse_linear(
    x: Tensor, values: Tensor, pattern: Tensor, bias: Tensor | None, out_features: int, activation: str
) -> Tensor:
    """y of x (tokens, in), with gradients where any input needs one."""
    arguments = (x, values, pattern, bias, out_features, activation)
    if differentiates(x, values, bias):
        y: Tensor = BlockSparseLinearFunction.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        y, _ = _fwd(*arguments, False)
    return y


def call_directly(
    x: Tensor, values: Tensor | None, pattern: Tensor | None, bias: Tensor | None, out: int, into: int,
    activation: str,
) -> Tensor | None:  # fmt: skip
    """y of x (..., in) without the op; None where that is not for this call, or arguments are mistaken."""
    if values is None or pattern is None or not is_direct(x, values, pattern, bias):
        return None
    y = new_on_cpu((*x.shape[:-1], out), values.dtype)
    try:
        _backend.C.block_sparse_linear_fwd(
            x, values, pattern, bias, y, None, out, into, ACTIVATIONS.index(activation), None,
            _backend.num_threads(),
        )  # fmt: skip
    except (TypeError, ValueError):
        return None
    return y
