"""What Mamba layers of transformers keep between calls, in the caches of its versions.

Since 5.5 there is one class of cache for all models, whose layers hold their states in attributes; since 5.14
these are dicts, of several states a layer, and a cache can record inputs that assisted decoding takes back.
Before 5.5 each model has a cache of its own, with the states of all layers in `conv_states` and `ssm_states`:
zeros before the first token, and all on one device. Before 5.14 states have the model's dtype, later on the
one that they are given.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class States:
    """One layer's states in a cache.

    Attributes:
        conv: (batch, channels, width), the last inputs of the convolution; None before the first token.
        recurrent: the state after the last token; None before the first.
        recording: `conv` is not to be written in place: it holds more inputs than the convolution needs, or
            is a copy.
    """

    def __init__(self, cache: Any, index: int, device: torch.device, position: Tensor | None) -> None:
        """`position`: where the tokens at hand are, as models of transformers before 5.4 say it."""
        self._cache, self._index = cache, index
        self.recording = False
        known: Any
        conv: Any = None
        recurrent: Any = None
        if self._is_a_models_own():
            known = _goes_on(cache, position)
            conv, recurrent = (
                _moved(states[index], device) for states in (cache.conv_states, cache.ssm_states)
            )
            if isinstance(cache.conv_states, Tensor):  # Mamba-2's, of all layers
                self.recording = conv.device != cache.conv_states.device
            else:
                cache.conv_states[index], cache.ssm_states[index] = conv, recurrent
        elif index < len(cache.layers):
            layer = cache.layers[index]
            known, conv, recurrent = layer.has_previous_state, layer.conv_states, layer.recurrent_states
            if isinstance(known, dict):
                known, conv, recurrent = known.get(0), conv.get(0), recurrent.get(0)
                self.recording = getattr(layer, "record_past", False)
        else:
            known = False
        self.conv: Tensor | None = conv if known else None
        self.recurrent: Tensor | None = recurrent if known else None

    def _is_a_models_own(self) -> bool:
        return hasattr(self._cache, "ssm_states")

    def keep_conv(self, x: Tensor, width: int) -> Tensor:
        """x (batch, channels, length) behind the inputs before it, the last `width` of which are kept."""
        cache, index = self._cache, self._index
        own = self._is_a_models_own()
        if not own and isinstance(cache.layers[index].has_previous_state, dict):
            return cache.update_conv_state(x, index, conv_kernel_size=width)  # type: ignore[no-any-return]
        whole = x if self.conv is None else torch.cat([self.conv.to(x.dtype), x], dim=-1)
        last = F.pad(whole[..., -width:], (max(width - whole.shape[-1], 0), 0))
        if own:
            cache.conv_states[index].copy_(last)
        else:
            cache.update_conv_state(last, index)
        return whole

    def keep_recurrent(self, state: Tensor) -> None:
        """Keeps the state after the last token."""
        cache, index = self._cache, self._index
        if not self._is_a_models_own():
            cache.update_recurrent_state(state, index)
            return
        cache.ssm_states[index].copy_(state)
        if index == len(cache.ssm_states) - 1 and hasattr(cache, "has_previous_state"):
            cache.has_previous_state = True


def _moved(state: Tensor, device: torch.device) -> Tensor:
    """The state on the layer's device. Of a model with offloaded weights its cache is made without memory."""
    return torch.zeros_like(state, device=device) if state.is_meta else state.to(device)


def _goes_on(cache: Any, position: Tensor | None) -> bool:
    """Whether a model's own cache holds a beginning of the sequence at hand."""
    flag = getattr(cache, "has_previous_state", None)
    if flag is not None:
        return bool(flag)
    return position is None or position.shape[0] == 1 or bool(position[0] > 0)
