"""The decode step of a whole Mamba layer as a torch op; it moves both states on in place.

    tilewright::mamba_step  writes conv_state and ssm_state, returns out

The compiled binding checks the arguments, as it does those of the other decode steps.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version

from ... import _backend
from ..._library import define


def _step(
    hidden_states: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    *rest: Any,
) -> Tensor:
    batch, out_proj_weight = hidden_states.shape[0], rest[3]
    elements = 5 * dt_proj_weight.shape[0] + x_proj_weight.shape[0]
    workspace = hidden_states.new_empty((batch, elements))
    out = hidden_states.new_empty((batch, out_proj_weight.shape[0]))
    _backend.C.mamba_step(  # type: ignore[call-arg]  # mypy takes `rest` for all that is missing
        hidden_states, conv_state, ssm_state, in_proj_weight, in_proj_bias, conv1d_weight, conv1d_bias,
        x_proj_weight, dt_proj_weight, *rest, workspace, out, _backend.num_threads(),
    )  # fmt: skip
    increment_version(conv_state)
    increment_version(ssm_state)
    return out


def _fake_step(hidden_states: Tensor, *rest: Any) -> Tensor:
    out_proj_weight = rest[11]
    return hidden_states.new_empty((hidden_states.shape[0], out_proj_weight.shape[0]))


define(
    "mamba_step(Tensor hidden_states, Tensor(a!) conv_state, Tensor(b!) ssm_state, Tensor in_proj_weight, "
    "Tensor? in_proj_bias, Tensor conv1d_weight, Tensor? conv1d_bias, Tensor x_proj_weight, "
    "Tensor dt_proj_weight, Tensor? dt_proj_bias, Tensor A_log, Tensor? D, Tensor out_proj_weight, "
    "Tensor? out_proj_bias, Tensor? b_rms_weight, Tensor? c_rms_weight, Tensor? dt_rms_weight, "
    "float? b_c_dt_rms_eps) -> Tensor",
    _step,
    _fake_step,
)
