"""The decode step of a whole Mamba layer: one token of every sequence, and both states moved on in place."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_number
from .ops import step as _  # noqa: F401 - defines the op
from .update import check_tensors

_step = torch.ops.tilewright.mamba_step.default


def mamba_step(
    hidden_states: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor | None,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None = None,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float | None = None,
) -> Tensor:
    """Takes one token of every sequence through a Mamba layer and moves both states on, in place.

    For few sequences, where the layer's time is that of reading its weights; any number is right::

        x, z = in_proj(hidden_states)
        u = silu(causal convolution of x and what conv_state holds)
        dt, B, C = x_proj(u), each through an RMS norm if asked
        y = selective_state_update(ssm_state, u, dt_proj(dt), -exp(A_log), B, C, D, z, dt_proj_bias, True)
        out = out_proj(y)

    Products are summed in float32 (float64 for float64), and what goes from part to part is rounded to the
    dtype of hidden_states. The projections are not cast under autocast.

    Args:
        hidden_states: ``(batch, d_model)``; float32, float16, bfloat16, or float64 on a CPU.
        conv_state: ``(batch, dim, state_length)`` of that dtype, any strides: the inputs of the convolution
            before this one, oldest first, `state_length` at least width - 1. Written in place.
        ssm_state: ``(batch, dim, N)``, any of the dtypes, any strides. Written in place.
        in_proj_weight, in_proj_bias: ``(2 dim, d_model)``, ``(2 dim,)`` or None; these and the other weights
            and biases are of the dtype of hidden_states, at any strides.
        conv1d_weight, conv1d_bias: ``(dim, width)``, width 1 to 8, and ``(dim,)`` or None.
        x_proj_weight: ``(rank + 2 N, dim)``.
        dt_proj_weight, dt_proj_bias: ``(dim, rank)``, and ``(dim,)`` of any of the dtypes or None.
        A_log, D: ``(dim, N)``, and ``(dim,)`` or None, of any of the dtypes.
        out_proj_weight, out_proj_bias: ``(features, dim)``, ``(features,)`` or None.
        b_rms_weight, c_rms_weight, dt_rms_weight: ``(N,)``, ``(N,)``, ``(rank,)``, of any of the dtypes.
            None: ones. Without an epsilon there are no norms.
        b_c_dt_rms_eps: added to the mean squares of the norms. None: no norms.

    Returns:
        out, ``(batch, features)`` of the dtype of hidden_states.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype than those above.
        ValueError: a shape or device that is not one of the above, or norm weights without an epsilon.
        NotImplementedError: an argument requires a gradient or has a tangent; there is neither. Use
            `torch.no_grad()`.

    Source: Gu and Dao, "Mamba" (arXiv 2312.00752); what mamba_ssm.Mamba.step does.
    """
    weights = (b_rms_weight, c_rms_weight, dt_rms_weight)
    tensors = (
        hidden_states, conv_state, ssm_state, in_proj_weight, conv1d_weight, x_proj_weight, dt_proj_weight,
        A_log, out_proj_weight, in_proj_bias, conv1d_bias, dt_proj_bias, D, out_proj_bias, *weights,
    )  # fmt: skip
    check_tensors(tensors, _NAMES, 9)
    if b_c_dt_rms_eps is None and any(weight is not None for weight in weights):
        raise ValueError("b_c_dt_rms_eps must be given with the weights of norms, got None")
    if not (b_c_dt_rms_eps is None or type(b_c_dt_rms_eps) is float):
        b_c_dt_rms_eps = check_number("b_c_dt_rms_eps", b_c_dt_rms_eps, "[0, inf)")
    return _step(  # type: ignore[no-any-return]
        hidden_states, conv_state, ssm_state, in_proj_weight, in_proj_bias, conv1d_weight, conv1d_bias,
        x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, out_proj_weight, out_proj_bias, *weights,
        b_c_dt_rms_eps,
    )  # fmt: skip


_NAMES = (
    "hidden_states", "conv_state", "ssm_state", "in_proj_weight", "conv1d_weight", "x_proj_weight",
    "dt_proj_weight", "A_log", "out_proj_weight", "in_proj_bias", "conv1d_bias", "dt_proj_bias", "D",
    "out_proj_bias", "b_rms_weight", "c_rms_weight", "dt_rms_weight",
)  # fmt: skip
