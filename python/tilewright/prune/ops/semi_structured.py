"""The semi-structured linear layer as torch ops.

    tilewright::semi_structured_linear_fwd  y = activation(x W^T + bias), and z, before the activation
    tilewright::semi_structured_linear_dx   dx = dz W
    tilewright::semi_structured_linear_dw   dW = dz^T x at the kept elements
    tilewright::semi_structured_compress    (values, indices) of a dense weight that keeps n of m
    tilewright::semi_structured_decompress  the dense weight

W comes as `values` (out, in / m * n) and `indices` (out, ceil(in / 8)) of uint8: see csrc/prune.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _backend
from ..._library import define, differentiates
from .block_sparse import ACTIVATIONS, activation_gradient

_FORWARD, _INPUT, _WEIGHT = range(3)


def columns_of(values: Tensor, n: int, m: int) -> int:
    """`in` of the weight that these are the kept elements of."""
    return values.shape[1] // n * m


def _workspace(values: Tensor, n: int, m: int, tokens: int, call: int, threads: int) -> Tensor | None:
    if values.is_cuda or _backend.is_emulated():
        return None
    double = values.dtype == torch.float64
    needed = _backend.C.semi_structured_workspace(
        tokens, values.shape[0], columns_of(values, n, m), n, m, double, call, threads
    )
    return values.new_empty(needed, dtype=torch.uint8) if needed else None


def _fake_forward(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, n: int, m: int, activation: str,
    keep_z: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = x.new_empty((x.shape[0], values.shape[0]))
    return y, torch.empty_like(y) if keep_z else x.new_empty((0, values.shape[0]))


def _forward(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, n: int, m: int, activation: str,
    keep_z: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, z = _fake_forward(x, values, indices, bias, n, m, activation, keep_z)
    threads = _backend.num_threads()
    workspace = _workspace(values, n, m, x.shape[0], _FORWARD, threads)
    _backend.C.semi_structured_fwd(
        x, values, indices, bias, y, z if keep_z else None, columns_of(values, n, m), n, m,
        ACTIVATIONS.index(activation), workspace, threads,
    )  # fmt: skip
    return y, z


def _fake_dx(dz: Tensor, values: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    return dz.new_empty((dz.shape[0], columns_of(values, n, m)))


def _dx(dz: Tensor, values: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    dx, threads = _fake_dx(dz, values, indices, n, m), _backend.num_threads()
    workspace = _workspace(values, n, m, dz.shape[0], _INPUT, threads)
    _backend.C.semi_structured_dx(dz, values, indices, dx, dx.shape[1], n, m, workspace, threads)
    return dx


def _fake_dw(dz: Tensor, x: Tensor, values: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    return values.new_empty(values.shape)


def _dw(dz: Tensor, x: Tensor, values: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    dvalues, threads = _fake_dw(dz, x, values, indices, n, m), _backend.num_threads()
    workspace = _workspace(values, n, m, dz.shape[0], _WEIGHT, threads)
    _backend.C.semi_structured_dw(dz, x, values, indices, dvalues, x.shape[1], n, m, workspace, threads)
    return dvalues


def _fake_compress(dense: Tensor, mask: Tensor | None, n: int, m: int) -> tuple[Tensor, Tensor]:
    out, columns = dense.shape
    values = dense.new_empty((out, columns // m * n))
    return values, dense.new_empty((out, -(-columns // 8)), dtype=torch.uint8)


def _compress(dense: Tensor, mask: Tensor | None, n: int, m: int) -> tuple[Tensor, Tensor]:
    values, indices = _fake_compress(dense, mask, n, m)
    _backend.C.semi_structured_compress(dense, mask, values, indices, n, m, _backend.num_threads())
    return values, indices


def _fake_decompress(values: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    return values.new_empty((values.shape[0], columns_of(values, n, m)))


def _decompress(values: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    dense = _fake_decompress(values, indices, n, m)
    _backend.C.semi_structured_decompress(values, indices, dense, n, m, _backend.num_threads())
    return dense


_WEIGHT_SCHEMA = "Tensor values, Tensor indices"
define(
    f"semi_structured_linear_fwd(Tensor x, {_WEIGHT_SCHEMA}, Tensor? bias, int n, int m, str activation, "
    "bool keep_z) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
define(
    f"semi_structured_linear_dx(Tensor dz, {_WEIGHT_SCHEMA}, int n, int m) -> Tensor",
    _dx,
    _fake_dx,
)
define(
    f"semi_structured_linear_dw(Tensor dz, Tensor x, {_WEIGHT_SCHEMA}, int n, int m) -> Tensor",
    _dw,
    _fake_dw,
)
define(
    "semi_structured_compress(Tensor dense, Tensor? mask, int n, int m) -> (Tensor, Tensor)",
    _compress,
    _fake_compress,
)
define(
    f"semi_structured_decompress({_WEIGHT_SCHEMA}, int n, int m) -> Tensor",
    _decompress,
    _fake_decompress,
)

_fwd = torch.ops.tilewright.semi_structured_linear_fwd.default
_input_gradient = torch.ops.tilewright.semi_structured_linear_dx.default
_weight_gradient = torch.ops.tilewright.semi_structured_linear_dw.default
compress = torch.ops.tilewright.semi_structured_compress.default
decompress = torch.ops.tilewright.semi_structured_decompress.default


class SemiStructuredLinearFunction(torch.autograd.Function):
    """y of (x, values, indices, bias, n, m, activation); x (tokens, in)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, n: int, m: int,
        activation: str,
    ) -> Tensor:  # fmt: skip
        """Runs the op; z is kept only where there is an activation."""
        y, z = _fwd(x, values, indices, bias, n, m, activation, activation != "none")
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values, indices, z)
        ctx.options = n, m, activation
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, values and bias."""
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "SemiStructuredLinear has no second derivative: call backward without create_graph"
            )
        x, values, indices, z = ctx.saved_tensors
        n, m, activation = ctx.options
        need_x, need_values, _, need_bias, *_ = ctx.needs_input_grad
        dz = activation_gradient(dy, z, activation)
        dx = _input_gradient(dz, values, indices, n, m) if need_x else None
        dvalues = _weight_gradient(dz, x, values, indices, n, m) if need_values else None
        return dx, dvalues, None, dz.sum(0) if need_bias else None, None, None, None


def linear(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, n: int, m: int, activation: str
) -> Tensor:
    """y of x (tokens, in), with gradients where any input needs one."""
    if differentiates(x, values, bias):
        result: Tensor = SemiStructuredLinearFunction.apply(  # type: ignore[no-untyped-call]
            x, values, indices, bias, n, m, activation
        )
        return result
    return _fwd(x, values, indices, bias, n, m, activation, False)[0]  # type: ignore[no-any-return]
