"""The decode steps as torch ops: schema, implementation, fake kernels. They move a state on in place.

    tilewright::causal_conv1d_update    writes conv_state, returns out
    tilewright::selective_state_update  writes state, returns out

The compiled binding checks the arguments: a decode step is so short that checks in Python would show.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ... import _backend
from ..._library import define


def _conv_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> Tensor:
    out = torch.empty_like(x)
    threads = _backend.num_threads()
    _backend.C.causal_conv1d_update(
        x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices, out, threads
    )
    increment_version(conv_state)
    return out


def _state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state_batch_indices: Tensor | None,
) -> Tensor:
    out = torch.empty_like(x)
    threads = _backend.num_threads()
    _backend.C.selective_state_update(
        state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, out, threads
    )
    increment_version(state)
    return out


define(
    "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool silu, "
    "Tensor? cache_seqlens, Tensor? conv_state_indices) -> Tensor",
    _conv_update,
    lambda x, *_: torch.empty_like(x),
)
define(
    "selective_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
    "Tensor? z, Tensor? dt_bias, bool dt_softplus, Tensor? state_batch_indices) -> Tensor",
    _state_update,
    lambda state, x, *_: torch.empty_like(x),
)
