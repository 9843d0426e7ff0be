"""What a model returns on example inputs before and after a change, and whether that is the same."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_matches
from .._models import call, coarsest, evaluation, floats_of

# Largest difference allowed, as a share of the largest value: two right ways of rounding stay well below.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def check_patterns(name: str, value: Any, known: Sequence[str], called: str) -> list[str] | None:
    """The patterns of an `include` or `exclude` argument, each of which must match one; None stays None."""
    if value is None:
        return None
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, Sequence) or not all(isinstance(pattern, str) for pattern in found):
        raise TypeError(f"{name} must be a pattern of names or several of them, got {value!r}")
    check_matches(name, found, known, called)
    return list(found)


def any_matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether one of the names matches one of the patterns."""
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def outputs_of(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """The floating-point outputs in evaluation mode and without gradients."""
    with evaluation(model), torch.no_grad():
        outputs = {name: tensor.clone() for name, tensor in floats_of(call(model, inputs))}
    if not outputs:
        raise TypeError("the model must return floating-point tensors; on example_inputs it returned none")
    return outputs


def tolerance_of(model: nn.Module) -> float:
    """The difference to allow, by the coarsest dtype the model has: outputs are often widened at the end."""
    return coarsest(model, _TOLERANCE)


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
