"""A Mamba-2 block between its projections as torch ops: convolution, SSD scan, and gated norm or gate.

    tilewright::mamba2_inner_fwd  the result, final states (empty unless wanted), what the backward op needs
    tilewright::mamba2_inner_bwd  the gradients asked for

The kernels are those of `conv`, `ssd` and `norm`. As one step each writes its gradient where it belongs in
that of zxbcdt; autograd would have each make its own, and then copy them all to lie side by side.

Weights are of the dtypes that `mamba2.py` casts to.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._library import define
from . import conv, norm, ssd

_INPUTS = (
    "Tensor zxbcdt, Tensor conv_weight, Tensor? conv_bias, Tensor A, Tensor D, Tensor? dt_bias, "
    "Tensor? norm_weight, Tensor? initial_states, Tensor? seq_idx, "
    "int groups, bool silu, float dt_min, float dt_max, int norm_group, bool norm_before_gate"
)
_DIFFERENTIABLE = 8  # of the inputs, the first ones


class _Block(NamedTuple):
    """The inputs in the order of the schema."""

    zxbcdt: Tensor
    conv_weight: Tensor
    conv_bias: Tensor | None
    A: Tensor
    D: Tensor
    dt_bias: Tensor | None
    norm_weight: Tensor | None
    initial_states: Tensor | None
    seq_idx: Tensor | None
    groups: int
    silu: bool
    dt_min: float
    dt_max: float
    norm_group: int
    norm_before_gate: bool

    def columns(self, zxbcdt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z, (x, B, C) and dt, or their gradients: (batch, length, ...) each."""
        heads, convolved = self.A.shape[0], self.conv_weight.shape[0]
        z, xBC, dt = zxbcdt.split_with_sizes([zxbcdt.shape[2] - convolved - heads, convolved, heads], -1)
        return z, xBC, dt

    def heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x by heads, B and C by groups."""
        dim = self.zxbcdt.shape[2] - self.conv_weight.shape[0] - self.A.shape[0]
        both = (self.conv_weight.shape[0] - dim) // 2
        x, B, C = xBC.split_with_sizes([dim, both, both], -1)
        return (
            self.by_head(x),
            torch.unflatten(B, -1, (self.groups, -1)),
            torch.unflatten(C, -1, (self.groups, -1)),
        )

    def by_head(self, channels: Tensor) -> Tensor:
        return torch.unflatten(channels, -1, (self.A.shape[0], -1))

    def gate(self, z: Tensor) -> Tensor | None:
        """What the scan's result is gated by; a norm has the gate to itself."""
        return self.by_head(z) if self.norm_weight is None else None

    def convolution(self, xBC: Tensor) -> tuple[Any, ...]:
        """The convolution's arguments."""
        return xBC.mT, self.conv_weight, self.conv_bias, self.seq_idx, None, self.silu

    def scan(self, xBC: Tensor, z: Tensor, dt: Tensor) -> tuple[Any, ...]:
        """The scan's arguments, of what the convolution made."""
        x, B, C = self.heads(xBC)
        return (
            x, dt.to(self.A.dtype), self.A, B, C, self.D, self.gate(z), self.dt_bias, self.initial_states,
            self.seq_idx, None, True, self.dt_min, self.dt_max,
        )  # fmt: skip


_INPUT_COUNT = len(_Block._fields)


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    return _run(conv.forward, ssd.forward, norm.forward, *arguments)


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    return _run(conv.fake_forward, ssd.fake_forward, norm.fake_forward, *arguments)


def _run(convolve: Any, scan: Any, normalize: Any, *arguments: Any) -> tuple[Tensor, ...]:
    """The result, the final states; what was convolved, the states before chunks, y and rstd."""
    block = _Block(*arguments[:_INPUT_COUNT])
    eps, return_final_states, keep_y = arguments[_INPUT_COUNT:]
    z, xBC, dt = block.columns(block.zxbcdt)
    xBC = convolve(*block.convolution(xBC), False)[0].mT
    keep_y = keep_y and block.norm_weight is None  # else it is what the norm is of
    out, states, chunk_states, y = scan(*block.scan(xBC, z, dt), return_final_states, keep_y)
    if block.norm_weight is None:
        return out.flatten(2), states, xBC, chunk_states, y, dt.new_empty(0)
    y = out.flatten(2)
    out, rstd = normalize(y, block.norm_weight, z, eps, block.norm_group, block.norm_before_gate)
    return out, states, xBC, chunk_states, y, rstd


def _backward(dout: Tensor, dfinal_states: Tensor | None, *arguments: Any) -> list[Tensor]:
    *inputs, xBC, chunk_states, y, rstd, needed = arguments
    block = _Block(*inputs)
    # First what is freed again: from the heap's end it would go back to the system, and come page by page.
    dxBC, dy = xBC.new_empty(xBC.shape), None if block.norm_weight is None else torch.empty_like(y)
    gradients = _empty_gradients(block, [value is not None for value in inputs[:_DIFFERENTIABLE]])
    d: Any = _Block(*gradients, *inputs[_DIFFERENTIABLE:])  # type: ignore[arg-type]
    z, convolved, dt = block.columns(block.zxbcdt)
    dz, dconvolved, ddt = block.columns(d.zxbcdt)
    if block.norm_weight is not None and dy is not None:
        given = (dout, y, block.norm_weight, z, rstd, block.norm_group, block.norm_before_gate)
        norm.backward_into((dy, d.norm_weight, dz), *given)
        dout, y = dy, None
    if any(needed[:6]) or needed[7]:
        scanned = (block.by_head(dout), dfinal_states, *block.scan(xBC, z, dt), chunk_states, y)
        _scan_backward(block, d, dxBC, ddt, dz, scanned)
        if any(needed[:3]):
            found = (dconvolved.mT, d.conv_weight, d.conv_bias, dxBC.new_empty(0))
            conv.backward_into(found, dxBC.mT, None, *block.convolution(convolved))
    return [value if wanted else xBC.new_empty(0) for value, wanted in zip(gradients, needed, strict=True)]


def _scan_backward(
    block: _Block, d: Any, dxBC: Tensor, ddt: Tensor, dz: Tensor, given: tuple[Any, ...]
) -> None:
    """Writes into d, which has every input's gradient in its place; the kernel's own ddt is as wide as A."""
    dx, dB, dC = block.heads(dxBC)
    wide = ddt if ddt.dtype == d.A.dtype else d.A.new_empty(ddt.shape)
    gradients = (dx, wide, d.A, dB, dC, d.D, block.gate(dz), d.dt_bias, d.initial_states)
    ssd.backward_into(gradients, *given)
    if wide is not ddt:
        ddt.copy_(wide)


def _empty_gradients(block: _Block, needed: list[bool]) -> list[Tensor]:
    """Those that are not needed have no elements."""
    inputs: tuple[Any, ...] = block[:_DIFFERENTIABLE]
    return [
        value.new_empty(value.shape) if wanted else block.zxbcdt.new_empty(0)
        for value, wanted in zip(inputs, needed, strict=True)
    ]


def _fake_backward(dout: Tensor, dfinal_states: Tensor | None, *arguments: Any) -> list[Tensor]:
    return _empty_gradients(_Block(*arguments[:_INPUT_COUNT]), arguments[-1])


define(
    f"mamba2_inner_fwd({_INPUTS}, float eps, bool return_final_states, bool keep_y) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
define(
    f"mamba2_inner_bwd(Tensor dout, Tensor? dfinal_states, {_INPUTS}, Tensor xBC, Tensor chunk_states, "
    "Tensor y, Tensor rstd, bool[] needed) -> Tensor[]",
    _backward,
    _fake_backward,
)

_fwd = torch.ops.tilewright.mamba2_inner_fwd.default
_bwd = torch.ops.tilewright.mamba2_inner_bwd.default


class Mamba2Inner(torch.autograd.Function):
    """(out, final_states) of the op's tensors, in their order, and its options, up to return_final_states."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Runs the op and keeps its inputs and what lies between its kernels."""
        *tensors, options = arguments
        out, final_states, *kept = _fwd(*tensors, *options, True)
        ctx.save_for_backward(*tensors, *kept)
        ctx.options = options[:-2]
        ctx.set_materialize_grads(False)
        if not options[-1]:
            ctx.mark_non_differentiable(final_states)
        return out, final_states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the eight differentiable inputs."""
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "a Mamba-2 block has no second derivative: call backward without create_graph"
            )
        *inputs, xBC, chunk_states, y, rstd = ctx.saved_tensors
        dout, dfinal_states = grads
        if dout is None:
            dout = y.new_zeros(()).expand(y.flatten(2).shape)
        if dfinal_states is not None:
            dfinal_states = dfinal_states.contiguous()
        needed = list(ctx.needs_input_grad[:_DIFFERENTIABLE])
        found = _bwd(dout, dfinal_states, *inputs, *ctx.options, xBC, chunk_states, y, rstd, needed)
        results = [gradient if wanted else None for gradient, wanted in zip(found, needed, strict=True)]
        return (*results, *[None] * (len(ctx.needs_input_grad) - _DIFFERENTIABLE))
