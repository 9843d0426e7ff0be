"""The decode steps of Mamba blocks: one token, or a few, and the states moved on in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._checks import check_tensor
from .conv import check_activation, one_dtype
from .ops import update as _  # noqa: F401 - defines the ops

_conv_update = torch.ops.tilewright.causal_conv1d_update.default
_state_update = torch.ops.tilewright.selective_state_update.default


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Convolves the next steps of every sequence and moves `conv_state` on, in place.

    Args:
        x: ``(batch, dim)``, one step, or ``(batch, dim, steps)``, any strides; float32, float16, bfloat16,
            or float64 on a CPU.
        conv_state: ``(batch, dim, state_length)`` of x's dtype, any strides: the steps before x, oldest
            first, `state_length` at least width - 1. Written in place: the last steps after x.
        weight: ``(dim, width)``, width 1 to 8; float32, float16 or bfloat16, not necessarily x's dtype.
        bias: ``(dim,)``. None: no bias.
        activation: None, "silu" or "swish" (the same).
        cache_seqlens: ``(batch,)``, int32 or int64: how many steps each sequence has had. conv_state is
            then a ring: step number t is at position t modulo `state_length`, and nothing moves.
        conv_state_indices: ``(batch,)``, int32 or int64: conv_state is ``(slots, dim, state_length)``, and
            this is the slot of each sequence. Negative marks padding: no state is touched, and out is 0. Two
            sequences must not share a slot. A slot that does not exist is an error on a CPU; on a GPU, where
            nobody looks at it in time, out is NaN and no state is touched.

    Returns:
        out, shaped as x, of x's dtype.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype than those above.
        ValueError: a shape, device, slot or activation that is not one of the above.
        NotImplementedError: an argument requires a gradient or has a tangent; there is neither. Use
            `torch.no_grad()`.

    Arguments as causal_conv1d.causal_conv1d_update.
    """
    silu = check_activation(activation)
    check_tensors((x, conv_state, weight, bias, cache_seqlens, conv_state_indices), _CONV_NAMES, 3)
    if bias is not None and bias.dtype != weight.dtype:
        weight, bias = one_dtype(weight, bias)
    return _conv_update(  # type: ignore[no-any-return]
        x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices
    )


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """Takes one step of a selective scan for every sequence and moves `state` on, in place.

        dt = dt + dt_bias, through softplus if asked
        state = exp(dt A) state + dt B x
        out = (C state + D x) silu(z)

    All arithmetic is float32 (float64 for a float64 state), and out is computed from the state before it is
    rounded to its dtype. Tensors may have any strides and any of float32, float16 and bfloat16, each its own;
    nothing is copied. Where A, dt, dt_bias and D are one number a head, as in Mamba-2, expand them: strides
    of 0 are read as they are, and A expanded along N costs one exponential a channel.

    Args:
        state: ``(batch, dim, N)`` or ``(batch, heads, dim, N)``. Written in place.
        x, dt, z: ``(batch, dim)`` or ``(batch, heads, dim)``. z None: no gate.
        A: ``(dim, N)`` or ``(heads, dim, N)``.
        B, C: ``(batch, N)`` or ``(batch, groups, N)``, groups dividing heads: head h is in group
            h // (heads // groups).
        D, dt_bias: ``(dim,)`` or ``(heads, dim)``. None: zero.
        dt_softplus: take softplus of dt + dt_bias.
        state_batch_indices: ``(batch,)``, int32 or int64: state is ``(slots, ...)``, and this is the slot of
            each sequence. Negative marks padding: no state is touched, and out is 0. Two sequences must not
            share a slot. A slot that does not exist is an error on a CPU; on a GPU, where nobody looks at it
            in time, out is NaN and no state is touched.

    Returns:
        out, shaped as x, of x's dtype.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype than those above.
        ValueError: a shape, device or slot that is not one of the above.
        NotImplementedError: an argument requires a gradient or has a tangent; there is neither. Use
            `torch.no_grad()`.

    Source: Gu and Dao, "Mamba" (arXiv 2312.00752), Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060);
    arguments as mamba_ssm.ops.triton.selective_state_update.selective_state_update.
    """
    check_tensors((state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices), _STATE_NAMES, 6)
    return _state_update(  # type: ignore[no-any-return]
        state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices
    )


_CONV_NAMES = ("x", "conv_state", "weight", "bias", "cache_seqlens", "conv_state_indices")
_STATE_NAMES = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "state_batch_indices")


def check_tensors(tensors: tuple[Any, ...], names: tuple[str, ...], required: int) -> None:
    """Refuses what is no tensor, needs a gradient or has a tangent; all else is checked by the binding."""
    differentiating, has_tangents = torch.is_grad_enabled(), forward_ad._current_level >= 0
    for i, tensor in enumerate(tensors):
        if tensor is None and i >= required:
            continue
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            check_tensor(names[i], tensor)
        if differentiating and tensor.requires_grad:
            raise NotImplementedError(
                f"{names[i]} requires a gradient, but a decode step has none: call it under torch.no_grad()"
            )
        if has_tangents and forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise NotImplementedError(f"{names[i]} has a tangent, but a decode step has no forward mode AD")
