"""Whether a model computes the same before and after its layers were swapped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Largest difference allowed, as a share of the largest value: two right ways of rounding stay well below.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def arguments_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for the model."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    raise TypeError(f"verify must be a tensor, a tuple or a dict of inputs, got {type(inputs).__name__}")


def outputs_of(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """The floating-point tensors among the model's outputs, by where they are in them."""
    arguments, keywords = arguments_of(inputs)
    with _evaluation(model), torch.no_grad():
        outputs = dict(_tensors("output", model(*arguments, **keywords)))
    if not outputs:
        raise TypeError("verify needs a model that returns floating-point tensors, and this one returns none")
    return {name: tensor.clone() for name, tensor in outputs.items()}


def tolerance_of(model: nn.Module) -> float:
    """The difference to allow, by the coarsest dtype the model has: outputs are often widened at the end."""
    dtypes = {tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()}
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        dtypes.add(torch.bfloat16)
    return max((_TOLERANCE.get(dtype, 1e-1) for dtype in dtypes), default=1e-3)


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


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _tensors(f"{name}.{key}", entry)
    elif isinstance(value, (tuple, list)):
        for index, entry in enumerate(value):
            yield from _tensors(f"{name}[{index}]", entry)


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time being: dropout would make any two runs differ."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
