"""How much a model's output, and each layer's, changes by pruning: measured on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .calibration import Calibration, check_reached, evaluation, input_of, progress_bar
from .changes import Change
from .layers import Target

_PART = 1 << 22  # elements of an output taken at a time in float64


def measure(calibration: Calibration, changes: Sequence[Change]) -> tuple[list[float], float | None]:
    """Relative errors of the layers' outputs on dense inputs, and of the model's output.

    Each is sum (y - y')^2 / sum y^2. The changes are applied and reverted for every batch, and are reverted
    afterwards. The model's is None for calibration functions, which do not say what the output is.
    """
    errors, norms = [0.0] * len(changes), [0.0] * len(changes)
    reached = [False] * len(changes)
    error = norm = 0.0

    def hook(index: int) -> Callable[..., None]:
        def on_forward(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = input_of(args, kwargs)
            change = changes[index]
            dense = F.linear(x, change.target.matrix)
            errors[index] += _distance(F.linear(x, change.pruned_matrix()), dense)
            norms[index] += _square(dense)
            reached[index] = reached[index] or x.shape[0] > 0

        return on_forward

    with torch.no_grad(), evaluation(calibration.model):
        for batch in calibration.batches("calibration: distortion"):
            after = None if calibration.runs_itself else _output_with(calibration, batch, changes)
            with ExitStack() as stack:
                for index, change in enumerate(changes):
                    for module in change.target.modules:
                        handle = module.register_forward_pre_hook(hook(index), with_kwargs=True)
                        stack.callback(handle.remove)
                if after is None:
                    calibration.forward(batch)
                    continue
                before = calibration.output(batch)
            error += _distance(after, before)
            norm += _square(before)
    check_reached([change.target for change in changes], reached)
    relative = [_ratio(e, n) for e, n in zip(errors, norms, strict=True)]
    return relative, None if calibration.runs_itself else _ratio(error, norm)


def curves(
    calibration: Calibration, targets: Sequence[Target], masks: Callable[[int], Sequence[Tensor]], points: int
) -> tuple[list[list[float]], list[list[int]]]:
    """What the model's output loses when one layer alone is pruned, at a number of sparsities.

    Args:
        calibration: the data; the model is run `len(targets) * (points - 1) + 1` times on each batch.
        targets: the layers.
        masks: called with an index into `targets`: its masks as matrices, from all kept to the sparsest; each
            keeps a part of what the one before keeps.
        points: how many masks there are for each layer.

    Returns:
        Per target and mask: the relative error of the model's output, and the number of kept weights.
    """
    levels, sizes = [], []  # how many of its masks keep a weight: a byte for each weight
    for index in range(len(targets)):
        found = masks(index)
        level = torch.zeros_like(found[0], dtype=torch.uint8)
        for mask in found:
            level += mask
        levels.append(level)
        sizes.append([int(mask.count_nonzero()) for mask in found])
    sums = [[0.0] * points for _ in targets]
    norm, seen = 0.0, 0
    with torch.no_grad(), evaluation(calibration.model):
        for batch in calibration.batches(None):
            seen += 1
            dense = calibration.output(batch)
            norm += _square(dense)
            title = f"allocation: distortion of {len(targets)} layers, batch {seen}"
            with progress_bar(title, len(targets), calibration.progress) as advance:
                for index, target in enumerate(targets):
                    for point, output in _outputs(calibration, batch, target, levels[index], points):
                        sums[index][point] += _distance(output, dense)
                    advance()
    return [[_ratio(value, norm) for value in found] for found in sums], sizes


def _outputs(calibration: Calibration, batch: Any, target: Target, level: Tensor, points: int) -> Any:
    """The model's outputs with one layer pruned to each point but the first; its weight comes back."""
    weight = target.weight
    former = weight.detach().clone()
    try:
        for point in range(1, points):
            weight.copy_(former.masked_fill(target.as_matrix(level <= point), 0.0))
            yield point, calibration.output(batch)
    finally:
        weight.copy_(former)


def _output_with(calibration: Calibration, batch: Any, changes: Sequence[Change]) -> Tensor:
    try:
        for change in changes:
            change.apply()
        return calibration.output(batch)
    finally:
        for change in changes:
            change.revert()


def _distance(a: Tensor, b: Tensor) -> float:
    pairs = zip(_parts(a), _parts(b), strict=True)
    return sum(float((x - y).square().sum()) for x, y in pairs)


def _square(tensor: Tensor) -> float:
    return sum(float(part.square().sum()) for part in _parts(tensor))


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    return (part.to(torch.float64) for part in torch.split(tensor.flatten(), _PART))


def _ratio(error: float, norm: float) -> float:
    return error / norm if norm > 0.0 else (0.0 if error == 0.0 else float("inf"))
