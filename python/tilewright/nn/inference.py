"""States of Mamba layers between calls, in mamba_ssm's InferenceParams."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import scan
from .._checks import FLOATS, check_dtype, check_tensor


@dataclass
class InferenceParams:
    """What a model remembers between calls; the caller adds the tokens of each call to `seqlen_offset`.

    Attributes:
        max_seqlen, max_batch_size: what attention layers may make room for.
        seqlen_offset: tokens seen so far; 0 starts anew.
        batch_size_offset: for layers that take part of a batch; Mamba layers do not look at it.
        key_value_memory_dict: the states of every layer, by `layer_idx`.
        lengths_per_sample: for attention layers.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Starts anew, in the memory there is."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


def states_of(layer: Any, inference_params: Any, batch_size: int, reset: bool) -> tuple[Tensor, Tensor]:
    """The layer's conv and ssm state, made where there are none yet, or too few or many rows at a start."""
    if layer.layer_idx is None:
        raise ValueError("inference_params needs a layer with layer_idx: it says whose states are whose")
    memory = inference_params.key_value_memory_dict
    kept = memory.get(layer.layer_idx)
    if kept is not None and kept[0].shape[0] != batch_size:
        if inference_params.seqlen_offset > 0:
            raise ValueError(f"the cache holds {kept[0].shape[0]} rows, and the input has {batch_size}")
        kept = None
    if kept is None:
        memory[layer.layer_idx] = kept = layer.allocate_inference_cache(batch_size, 0)
    elif reset:
        for state in kept:
            state.zero_()
    conv_state, ssm_state = kept
    return conv_state, ssm_state


def conv_step(conv1d: nn.Conv1d, x: Tensor, conv_state: Tensor) -> Tensor:
    """One token (batch, channels) through the convolution; the state is moved on and keeps its dtype.

    That need not be x's: under autocast states may be wider than what the projections give.
    """
    check_tensor("conv_state", conv_state)
    check_dtype("conv_state", conv_state, (torch.float64,) if x.dtype == torch.float64 else FLOATS[:3])
    dtype = torch.promote_types(x.dtype, conv_state.dtype)
    state, weight = conv_state.to(dtype), conv1d.weight.squeeze(1)
    y = scan.causal_conv1d_update(x.to(dtype), state, weight, conv1d.bias, activation="silu")
    if conv_state.dtype != dtype:
        conv_state.copy_(state)
    return y.to(x.dtype)


def keep_last(conv_state: Tensor, x: Tensor, *, go_on: bool) -> None:
    """Writes the last inputs of the convolution, x (batch, channels, length), into its state."""
    kept, length = conv_state.shape[-1], x.shape[-1]
    if length >= kept:
        conv_state.copy_(x[..., length - kept :])
        return
    if go_on:
        conv_state.copy_(conv_state.roll(-length, -1))
    else:
        conv_state.zero_()
    if length:
        conv_state[..., kept - length :] = x
