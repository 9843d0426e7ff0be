"""Checkpoints of the dense layers that sparse ones stand for: each reads them, and may write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def writes_dense(layer: nn.Module) -> None:
    """From now on the layer's `state_dict` is that of the `torch.nn.Linear` it stands for."""
    layer.register_state_dict_post_hook(_write)  # type: ignore[no-untyped-call]


def _write(layer: Any, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [key for key in state_dict if key.startswith(prefix)]:
        del state_dict[key]
    with torch.no_grad():
        for name, parameter in layer.to_linear().named_parameters():
            state_dict[prefix + name] = parameter.detach()


def read_dense(
    layer: Any,
    state_dict: dict[str, Any],
    prefix: str,
    errors: list[str],
    convert: Callable[[Tensor], dict[str, Tensor]],
) -> None:
    """Puts what `convert` makes of a dense weight in its place, if that is what the checkpoint holds."""
    weight = state_dict.get(f"{prefix}weight")
    if not isinstance(weight, Tensor):
        return
    expected = (layer.out_features, layer.in_features)
    try:
        if tuple(weight.shape) != expected:
            raise ValueError(f"weight must have shape {expected}, got {tuple(weight.shape)}")
        made = convert(weight.detach())
    except ValueError as error:
        errors.append(f"{prefix.rstrip('.') or type(layer).__name__}: {error}")
    else:
        del state_dict[f"{prefix}weight"]
        state_dict.update({prefix + name: value for name, value in made.items()})
