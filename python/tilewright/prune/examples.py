"""Running a model on example inputs: how they are passed, and which tensors come back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Largest difference allowed, as a share of the largest value: two right ways of rounding stay well below.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's output on a tensor, a tuple of positional or a dict of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def check_inputs(inputs: Any) -> None:
    """Refuses what cannot be passed to a model."""
    if not isinstance(inputs, (Tensor, tuple, list, Mapping)):
        raise TypeError(
            f"example_inputs must be a tensor, a tuple or a dict of inputs, got {type(inputs).__name__}"
        )


def floats_of(value: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors in an output, by where they are in it."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from floats_of(entry, f"{name}.{key}")
    elif isinstance(value, (tuple, list)):
        for index, entry in enumerate(value):
            yield from floats_of(entry, f"{name}[{index}]")


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time being: dropout would make any two runs differ."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def outputs_of(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """The floating-point outputs in evaluation mode and without gradients."""
    with evaluation(model), torch.no_grad():
        outputs = {name: tensor.clone() for name, tensor in floats_of(call(model, inputs))}
    if not outputs:
        raise TypeError("the model must return floating-point tensors; on example_inputs it returned none")
    return outputs


def tolerance_of(model: nn.Module) -> float:
    """The difference to allow, by the coarsest dtype the model has: outputs are often widened at the end."""
    dtypes = {tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()}
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        dtypes.add(torch.bfloat16)
    return max((_TOLERANCE.get(dtype, 1e-1) for dtype in dtypes), default=1e-3)


def largest_difference(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """Of all outputs, as a share of the largest value of each."""
    shares = [0.0]
    for name, old in before.items():
        if old.numel():
            largest = max(old.abs().nan_to_num(0, 0, 0).amax().item(), 1e-30)
            shares.append((old - after[name]).abs().nan_to_num(0, 0, 0).amax().item() / largest)
    return max(shares)


def difference(
    before: dict[str, Tensor], after: dict[str, Tensor], tolerance: float | None = None
) -> str | None:
    """In words how two sets of outputs differ by more than rounding; None if they do not."""
    if before.keys() != after.keys():
        return f"the outputs were {sorted(before)} and became {sorted(after)}"
    for name, old in before.items():
        new = after[name]
        if old.shape != new.shape:
            return f"{name} had shape {tuple(old.shape)} and got {tuple(new.shape)}"
        largest = old.abs().nan_to_num(0, 0, 0).amax().item() if old.numel() else 0.0
        share = _TOLERANCE.get(old.dtype, 1e-1) if tolerance is None else tolerance
        allowed = share * max(largest, 1e-6)
        if not torch.allclose(old, new, rtol=0, atol=allowed, equal_nan=True):
            found = (old - new).abs().amax().item()
            return f"{name} differs by {found:.3g} where its largest value is {largest:.3g}"
    return None
