"""The activation-sparse linear layer as torch ops: schema, implementation, fake kernels, gradient.

    tilewright::keep_inputs             which inputs each token keeps, bool (tokens, in)
    tilewright::activation_sparse_fwd   (x * keep) @ weight_t + bias, reading the rows that are kept
    tilewright::activation_sparse_step  both, for decoding: one token's product takes no longer than a few ops

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


def _workspace(x: Tensor, outputs: int, threads: int) -> Tensor:
    room = _backend.C.activation_sparse_workspace(x, outputs, threads)
    return x.new_empty(room, dtype=torch.uint8)


def _keep(x: Tensor, scale: Tensor | None, threshold: Tensor | None, count: int) -> Tensor:
    keep, threads = _fake_keep(x, scale, threshold, count), _backend.num_threads()
    _backend.C.keep_inputs(x, scale, threshold, count, keep, _workspace(x, 0, threads), threads)
    return keep


def _fake_forward(x: Tensor, keep: Tensor, weight_t: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight_t.shape[1]))


def _forward(x: Tensor, keep: Tensor, weight_t: Tensor, bias: Tensor | None) -> Tensor:
    if x.shape[0] > FEW_TOKENS:
        masked = torch.where(keep, x, 0)
        return masked @ weight_t if bias is None else torch.addmm(bias, masked, weight_t)
    y, threads = _fake_forward(x, keep, weight_t, bias), _backend.num_threads()
    workspace = _workspace(x, y.shape[1], threads)
    _backend.C.activation_sparse_linear(x, keep, weight_t, bias, y, workspace, threads)
    return y


def _fake_step(
    x: Tensor, scale: Tensor | None, threshold: Tensor | None, count: int, weight_t: Tensor,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], weight_t.shape[1]))


def _step(
    x: Tensor, scale: Tensor | None, threshold: Tensor | None, count: int, weight_t: Tensor,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    if x.shape[0] > FEW_TOKENS:
        return _forward(x, _keep(x, scale, threshold, count), weight_t, bias)
    y, threads = _fake_step(x, scale, threshold, count, weight_t, bias), _backend.num_threads()
    workspace = _workspace(x, y.shape[1], threads)
    _backend.C.activation_sparse_step(x, scale, threshold, count, weight_t, bias, y, workspace, threads)
    return y


define("keep_inputs(Tensor x, Tensor? scale, Tensor? threshold, int count) -> Tensor", _keep, _fake_keep)
define(
    "activation_sparse_fwd(Tensor x, Tensor keep, Tensor weight_t, Tensor? bias) -> Tensor",
    _forward,
    _fake_forward,
)
define(
    "activation_sparse_step(Tensor x, Tensor? scale, Tensor? threshold, int count, Tensor weight_t, "
    "Tensor? bias) -> Tensor",
    _step,
    _fake_step,
)

keep_inputs = torch.ops.tilewright.keep_inputs.default
_fwd = torch.ops.tilewright.activation_sparse_fwd.default
_step_op = torch.ops.tilewright.activation_sparse_step.default


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


def activation_sparse_linear(
    x: Tensor, scale: Tensor | None, threshold: Tensor | None, count: int, weight_t: Tensor,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """(x * keep_inputs(x)) @ weight_t + bias; one op where nobody asks for a gradient."""
    if differentiates(x, weight_t, bias):
        keep = keep_inputs(x.detach(), scale, threshold, count)
        result: Tensor = ActivationSparse.apply(x, keep, weight_t, bias)  # type: ignore[no-untyped-call]
    else:
        result = _step_op(x, scale, threshold, count, weight_t, bias)
    return result
