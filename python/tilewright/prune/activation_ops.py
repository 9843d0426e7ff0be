"""The activation-sparse linear layer as torch ops: schema, implementation, fake kernels, gradient.

    tilewright::keep_inputs            which inputs each token keeps, bool (tokens, in)
    tilewright::activation_sparse_fwd  (x * keep) @ weight_t + bias, reading the rows that are kept

The first is not differentiable: a gradient takes the choice of inputs for given. Up to `FEW_TOKENS` tokens
the kernel reads what any of them keeps; more of them keep nearly everything between them, so that product is
a dense one of masked inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _backend
from .._library import define, differentiates

FEW_TOKENS = 8


def _fake_keep(x: Tensor, scale: Tensor | None, threshold: Tensor | None, count: int) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.bool)


def _keep(x: Tensor, scale: Tensor | None, threshold: Tensor | None, count: int) -> Tensor:
    keep, threads = _fake_keep(x, scale, threshold, count), _backend.num_threads()
    room = 0
    if scale is not None and not (x.is_cuda or _backend.is_emulated()):
        room = _backend.C.keep_inputs_workspace(x.shape[1], x.itemsize, threads)
    workspace = x.new_empty(room, dtype=torch.uint8)
    _backend.C.keep_inputs(x, scale, threshold, count, keep, workspace, threads)
    return keep


def _fake_forward(x: Tensor, keep: Tensor, weight_t: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight_t.shape[1]))


def _forward(x: Tensor, keep: Tensor, weight_t: Tensor, bias: Tensor | None) -> Tensor:
    if x.shape[0] > FEW_TOKENS:
        masked = torch.where(keep, x, 0)
        return masked @ weight_t if bias is None else torch.addmm(bias, masked, weight_t)
    y = _fake_forward(x, keep, weight_t, bias)
    room = _backend.C.activation_sparse_linear_workspace(weight_t, x.shape[0])
    workspace = x.new_empty(room, dtype=torch.uint8)
    _backend.C.activation_sparse_linear(x, keep, weight_t, bias, y, workspace, _backend.num_threads())
    return y


define("keep_inputs(Tensor x, Tensor? scale, Tensor? threshold, int count) -> Tensor", _keep, _fake_keep)
define(
    "activation_sparse_fwd(Tensor x, Tensor keep, Tensor weight_t, Tensor? bias) -> Tensor",
    _forward,
    _fake_forward,
)

keep_inputs = torch.ops.tilewright.keep_inputs.default
_fwd = torch.ops.tilewright.activation_sparse_fwd.default


class ActivationSparse(torch.autograd.Function):
    """(x * keep) @ weight_t + bias of x and keep (tokens, in), weight_t (in, out), bias (out,) or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, weight_t: Tensor, bias: Tensor | None) -> Tensor:
        """Runs the op."""
        ctx.save_for_backward(x, keep, weight_t)
        result: Tensor = _fwd(x, keep, weight_t, bias)
        return result

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
        """The gradients of the masked product; an input that is left out gets none and gives none."""
        if torch.is_grad_enabled():
            raise NotImplementedError("an activation-sparse linear layer has no second derivative")
        x, keep, weight_t = ctx.saved_tensors
        needs_x, _, needs_weight, needs_bias = ctx.needs_input_grad
        dx = torch.where(keep, dy @ weight_t.mT, 0) if needs_x else None
        dweight = torch.where(keep, x, 0).mT @ dy if needs_weight else None
        return dx, None, dweight, dy.sum(0) if needs_bias else None


def activation_sparse_linear(x: Tensor, keep: Tensor, weight_t: Tensor, bias: Tensor | None) -> Tensor:
    """ActivationSparse, or the op alone where nobody asks for a gradient."""
    if differentiates(x, weight_t, bias):
        result: Tensor = ActivationSparse.apply(x, keep, weight_t, bias)  # type: ignore[no-untyped-call]
    else:
        result = _fwd(x, keep, weight_t, bias)
    return result
