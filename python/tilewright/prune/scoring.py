"""How much each unit of a group matters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._models import call, evaluation
from .surgery import Cut, Group, is_conv1d

CRITERIA = ("magnitude", "l1", "taylor", "wanda", "random")


def scores(
    group: Group, criterion: str, norms: dict[nn.Module, Tensor], generator: torch.Generator
) -> Tensor:
    """A score for every unit, float64 on the CPU; the lowest leave first.

    magnitude: the L2 norm of all weights that would leave with the unit, l1: their absolute sum; taylor: the
    absolute sum of weight times gradient; wanda: the absolute weights that read the unit, each times the
    L2 norm of the input it meets; random: uniform.
    """
    if criterion == "random":
        return torch.rand(group.units, generator=generator, dtype=torch.float64)
    total = torch.zeros(group.units, dtype=torch.float64)
    for cut in group.cuts:
        if criterion == "wanda" and (cut.side != "in" or cut.module not in norms):
            continue
        for name, dim, value in cut.tensors():
            if (name == "weight" and value.dim() > 1) or cut.parameter is not None:
                along = _along(cut, name, dim, value, criterion, norms)
                total.index_add_(0, cut.unit, along[cut.position])
    if not torch.isfinite(total).all():
        bad = int((~torch.isfinite(total)).sum())
        raise ValueError(
            f"{group.name}: the {criterion} score of {bad} of its {group.units} units is not finite"
        )
    if criterion == "magnitude":
        return total.sqrt()
    return total.abs() if criterion == "taylor" else total


def _along(
    cut: Cut, name: str, dim: int, value: Tensor, criterion: str, norms: dict[nn.Module, Tensor]
) -> Tensor:
    """What each position of a dimension contributes."""
    weight = value.detach()
    if criterion == "taylor":
        if value.grad is None:
            raise ValueError(
                f"criterion 'taylor' needs gradients, and {cut.path}.{name} has none: "
                "run a loss and its backward pass first"
            )
        weight = weight * value.grad
    elif criterion == "magnitude":
        weight = weight.double().square()
    else:
        weight = weight.abs()
    others = [other for other in range(weight.dim()) if other != dim]
    summed = weight.sum(others, dtype=torch.float64) if others else weight.double()
    if criterion == "wanda":
        summed = summed * norms[cut.module].to(summed.device)
    return summed.cpu()


@contextmanager
def input_norms(groups: list[Group]) -> Iterator[dict[nn.Module, Tensor]]:
    """Collects, while the model runs, the L2 norm of every input channel of the layers that read units."""
    squares: dict[nn.Module, Tensor] = {}

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        value = inputs[0].detach().double()
        last = isinstance(module, nn.Linear) or is_conv1d(module)
        kept = value.dim() - 1 if last else 1
        over = [dim for dim in range(value.dim()) if dim != kept]
        norm = value.square().sum(over) if over else value.square()
        squares[module] = squares[module] + norm if module in squares else norm

    readers = {cut.module for group in groups for cut in group.cuts if cut.side == "in"}
    hooks = [module.register_forward_pre_hook(hook) for module in readers]
    try:
        yield squares
    finally:
        for handle in hooks:
            handle.remove()
        for module in squares:
            squares[module] = squares[module].sqrt()


def norms_on(model: nn.Module, groups: list[Group], batches: list[Any]) -> dict[nn.Module, Tensor]:
    """The input norms over all batches."""
    with evaluation(model), torch.no_grad(), input_norms(groups) as norms:
        for batch in batches:
            call(model, batch)
    return norms
