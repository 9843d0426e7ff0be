"""Whether a model computes the same before and after its layers were swapped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._models import call, coarsest, evaluation, floats_of

# Largest difference allowed, as a share of the largest value: two right ways of rounding stay well below.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def outputs_of(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """The floating-point tensors among the model's outputs, by where they are in them."""
    with evaluation(model), torch.no_grad():
        outputs = dict(floats_of(call(model, inputs)))
    if not outputs:
        raise TypeError("verify needs a model that returns floating-point tensors, and this one returns none")
    return {name: tensor.clone() for name, tensor in outputs.items()}


def tolerance_of(model: nn.Module) -> float:
    """The difference to allow, by the coarsest dtype the model has: outputs are often widened at the end."""
    return coarsest(model, _TOLERANCE)


def compare(before: dict[str, Tensor], after: dict[str, Tensor], tolerance: float) -> None:
    """Raises RuntimeError if two sets of outputs differ by more than `tolerance` of the largest value."""
    if before.keys() != after.keys():
        raise RuntimeError(
            f"verify: the outputs were {sorted(before)} and are {sorted(after)} after the swap, "
            "which was undone"
        )
    for name, old in before.items():
        new = after[name]
        largest = old.abs().nan_to_num(0, 0, 0).amax().item() if old.numel() else 0.0
        allowed = tolerance * max(largest, 1e-6)
        if old.shape == new.shape and torch.allclose(old, new, rtol=0, atol=allowed, equal_nan=True):
            continue
        raise RuntimeError(
            f"verify: {name} differs by {_largest_difference(old, new)} after the swap, and {allowed:.3g} is "
            f"allowed (its largest value is {largest:.3g}). The swap was undone."
        )


def _largest_difference(old: Tensor, new: Tensor) -> str:
    if old.shape != new.shape:
        return f"its shape ({tuple(old.shape)} before, {tuple(new.shape)} after)"
    return f"{(old - new).abs().amax().item():.3g}"
