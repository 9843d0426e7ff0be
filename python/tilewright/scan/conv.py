"""The causal depthwise convolution of Mamba blocks, and its decode step."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .._checks import FLOATS, check_choice, check_device, check_dtype, check_shape, check_tensor
from .._library import differentiates
from .ops import conv as ops

MAX_WIDTH = 8

_fwd = torch.ops.tilewright.causal_conv1d_fwd.default


@overload
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., seq_idx: Tensor | None = ...,
    initial_states: Tensor | None = ..., return_final_states: Literal[False] = ...,
    final_states_out: Tensor | None = ..., activation: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., seq_idx: Tensor | None = ...,
    initial_states: Tensor | None = ..., *, return_final_states: Literal[True],
    final_states_out: Tensor | None = ..., activation: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., seq_idx: Tensor | None = ...,
    initial_states: Tensor | None = ..., return_final_states: bool = ...,
    final_states_out: Tensor | None = ..., activation: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolves every channel with its own `width` taps, looking backward only.

        out[b, d, t] = activation(bias[d] + sum_j weight[d, width - 1 - j] * x[b, d, t - j]),   j < width

    where x before its first step is `initial_states`, or zero. Sums are float32 whatever the dtypes (float64
    for float64), and out has x's dtype and layout: channel-last in, channel-last out.

    Args:
        x: ``(batch, dim, length)`` with any strides, which are read as they are; float32, float16, bfloat16,
            or float64 on a CPU.
        weight: ``(dim, width)``, width 1 to 8; float32, float16 or bfloat16, not necessarily x's dtype;
            float64 with a float64 x.
        bias: ``(dim,)``. None: no bias.
        seq_idx: ``(batch, length)``, int32 or int64: the number of the sequence that each step belongs to.
            Taps that fall in another sequence are zero. A negative number marks padding: its output is 0.
        initial_states: ``(batch, dim, width - 1)``, the steps before x, oldest first. With `seq_idx` they
            belong to the sequence of step 0.
        return_final_states: also return the last `width - 1` steps, of `initial_states` and x together, which
            are the `initial_states` of what follows. With `seq_idx` they belong to the sequence of the last
            step; steps of other sequences are zero in them.
        final_states_out: ``(batch, dim, width - 1)`` of x's dtype to write them to.
        activation: None, "silu" or "swish" (the same).

    Returns:
        out ``(batch, dim, length)``, or ``(out, final_states)``; final_states are ``(batch, dim, width - 1)``
        of x's dtype.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype than those above.
        ValueError: a shape, device or activation that is not one of the above, or `final_states_out` without
            `return_final_states`.
        NotImplementedError: the gradient is asked for its own gradient.

    Differentiable in x, weight, bias, initial_states, through out and final_states. Under autocast it
    computes with the dtypes it is given. vmap and torch.func are not supported.

    Source: Gu and Dao, "Mamba" (arXiv 2312.00752); arguments as causal_conv1d.causal_conv1d_fn.
    """
    silu = check_activation(activation)
    _check_inputs(x, weight, bias)
    batch, dim, length = x.shape
    states_shape = (batch, dim, weight.shape[1] - 1)
    if seq_idx is not None:
        check_tensor("seq_idx", seq_idx)
        check_dtype("seq_idx", seq_idx, (torch.int32, torch.int64))
        check_shape("seq_idx", seq_idx, (batch, length), "(batch, length)")
        check_device("seq_idx", seq_idx, x.device, "x")
    if initial_states is not None:
        check_tensor("initial_states", initial_states)
        check_dtype("initial_states", initial_states, FLOATS)
        check_shape("initial_states", initial_states, states_shape, "(batch, dim, width - 1)")
        check_device("initial_states", initial_states, x.device, "x")
        initial_states = initial_states.to(x.dtype)
    if final_states_out is not None:
        _check_final_states_out(final_states_out, return_final_states, x, states_shape)
    weight, bias = one_dtype(weight, bias)
    arguments = (x, weight, bias, seq_idx, initial_states, silu, return_final_states)
    if differentiates(x, weight, bias, initial_states):
        out, final = ops.CausalConv1d.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        out, final = _fwd(*arguments)
    if not return_final_states:
        return out  # type: ignore[no-any-return]
    return out, final if final_states_out is None else final_states_out.copy_(final)


def check_activation(activation: Any) -> bool:
    """Whether to apply silu."""
    check_choice("activation", activation, ("silu", "swish", None))
    return activation is not None


def _check_inputs(x: Any, weight: Any, bias: Any) -> None:
    check_tensor("x", x)
    check_dtype("x", x, FLOATS if x.is_cpu else FLOATS[:3])
    if x.ndim != 3:
        raise ValueError(f"x must have shape (batch, dim, length), got {tuple(x.shape)}")
    allowed = (torch.float64,) if x.dtype == torch.float64 else FLOATS[:3]
    check_tensor("weight", weight)
    check_dtype("weight", weight, allowed)
    check_device("weight", weight, x.device, "x")
    if weight.ndim != 2 or weight.shape[0] != x.shape[1]:
        raise ValueError(
            f"weight must have shape (dim, width) with dim = {x.shape[1]}, got {tuple(weight.shape)}"
        )
    if not 1 <= weight.shape[1] <= MAX_WIDTH:
        raise ValueError(f"weight must have 1 to {MAX_WIDTH} taps (width), got {weight.shape[1]}")
    if bias is not None:
        check_tensor("bias", bias)
        check_dtype("bias", bias, allowed)
        check_device("bias", bias, x.device, "x")
        check_shape("bias", bias, (x.shape[1],), "(dim,)")


def _check_final_states_out(
    final_states_out: Any, return_final_states: bool, x: Tensor, shape: tuple[int, ...]
) -> None:
    if not return_final_states:
        raise ValueError(
            "final_states_out is given, but return_final_states is False: nothing would be written"
        )
    check_tensor("final_states_out", final_states_out)
    check_dtype("final_states_out", final_states_out, (x.dtype,))
    check_shape("final_states_out", final_states_out, shape, "(batch, dim, width - 1)")
    check_device("final_states_out", final_states_out, x.device, "x")


def one_dtype(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in one dtype that loses nothing of either; others refuse other dtypes."""
    if bias is None or bias.dtype == weight.dtype or not {bias.dtype, weight.dtype} <= set(FLOATS[:3]):
        return weight, bias
    return weight.float(), bias.float()
