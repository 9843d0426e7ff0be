"""How many units each layer keeps: the same share, by its shape (ERK), or by what pruning it costs.

A unit is what the pattern removes as a whole. A budget is a number of weights to keep; it is met to the unit,
with at least one unit in every layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_COLUMNS = 1 << 16  # of the table of a dynamic programme; a budget of more weights is counted in larger steps
_UNREACHABLE = math.inf


@dataclass(frozen=True)
class Share:
    """What an allocation knows of a layer.

    Attributes:
        shape: of its weight, (outputs, inputs).
        units: how many of them it has.
    """

    shape: tuple[int, int]
    units: int

    @property
    def weights(self) -> int:
        """Number of its weights."""
        return self.shape[0] * self.shape[1]

    @property
    def unit(self) -> float:
        """Weights in a unit, on average: those at the edges may be smaller."""
        return self.weights / max(self.units, 1)


def uniform(layers: Sequence[Share], sparsity: float) -> list[int]:
    """Kept units of each layer: the same share everywhere, rounded in each."""
    return [max(layer.units - round(sparsity * layer.units), 1) for layer in layers]


def erk(layers: Sequence[Share], sparsity: float) -> list[int]:
    """Kept units by the Erdos-Renyi-kernel rule: density proportional to (in + out) / (in * out).

    Layers that this would give more weights than they have are dense, and the rest shares what they leave.
    """
    budget = _budget(layers, sparsity)
    dense: set[int] = set()
    while True:
        rest = [index for index in range(len(layers)) if index not in dense]
        left = budget - sum(layers[index].weights for index in dense)
        factor = left / sum(sum(layers[index].shape) for index in rest) if rest else 0.0
        over = {index for index in rest if factor * sum(layers[index].shape) > layers[index].weights}
        if not over:
            break
        dense |= over
    wanted = [
        float(layer.units) if index in dense else factor * sum(layer.shape) / layer.unit
        for index, layer in enumerate(layers)
    ]
    return rounded(layers, wanted, budget)


def rounded(layers: Sequence[Share], wanted: Sequence[float], budget: int) -> list[int]:
    """Whole units near those wanted, as many as the budget has room for: the largest fractions go up."""
    kept = [min(max(math.floor(units), 1), layer.units) for units, layer in zip(wanted, layers, strict=True)]
    order = sorted(range(len(layers)), key=lambda index: kept[index] - wanted[index])
    room = budget - sum(units * layer.unit for units, layer in zip(kept, layers, strict=True))
    progress = True
    while progress:
        progress = False
        for index in order:
            if kept[index] < layers[index].units and layers[index].unit <= room + 1e-6:
                kept[index] += 1
                room -= layers[index].unit
                progress = True
    order.reverse()
    for index in order:  # where single units in small layers cost more than there is
        while room < -1e-6 and kept[index] > 1:
            kept[index] -= 1
            room += layers[index].unit
    return kept


def cheapest(
    costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int, columns: int = _COLUMNS
) -> list[int]:
    """One choice for each layer: the least sum of costs whose sum of sizes is within the budget.

    A dynamic programme over the layers and the budget. A budget above `columns` is counted in steps of
    several weights and sizes are rounded up to such steps, so memory is layers x `columns` bytes or two
    times that, and the result is within the budget; it is exact where the step is 1.

    Args:
        costs: per layer, of each choice.
        sizes: per layer, of each choice, in weights.
        budget: in weights.
        columns: the largest number of steps.

    Raises:
        ValueError: even the smallest choices exceed the budget.
    """
    smallest = sum(min(choices) for choices in sizes)
    if smallest > budget:
        raise ValueError(f"the budget is {budget} weights, and the sparsest choices keep {smallest}")
    step = max(1, -(-budget // columns))
    while sum(min(-(-size // step) for size in choices) for choices in sizes) > budget // step:
        step = max(1, step // 2)  # rounding up took what there was; finer steps take less
    width = budget // step + 1
    best = np.zeros(width)
    chosen = np.zeros((len(costs), width), dtype=np.min_scalar_type(max(map(len, costs))))
    for layer, (layer_costs, layer_sizes) in enumerate(zip(costs, sizes, strict=True)):
        found = np.full(width, _UNREACHABLE)
        for choice, (cost, size) in enumerate(zip(layer_costs, layer_sizes, strict=True)):
            taken = -(-size // step)
            if taken >= width:
                continue
            sums = best[: width - taken] + cost
            better = sums < found[taken:]
            found[taken:][better] = sums[better]
            chosen[layer, taken:][better] = choice
        best = found
    return _backtracked(chosen, sizes, step, int(np.argmin(best)))


def _backtracked(chosen: np.ndarray, sizes: Sequence[Sequence[int]], step: int, left: int) -> list[int]:
    picks = []
    for layer in range(len(sizes) - 1, -1, -1):
        pick = int(chosen[layer, left])
        picks.append(pick)
        left -= -(-sizes[layer][pick] // step)
    return picks[::-1]


def by_distortion(
    layers: Sequence[Share],
    curves: Sequence[Sequence[float]],
    kept: Sequence[Sequence[int]],
    sparsity: float,
) -> tuple[list[int], float]:
    """Kept units that cost least, by what keeping so many alone costs in each layer; and the sum of that.

    Args:
        layers: the layers.
        curves: per layer, the distortion of each choice.
        kept: per layer, the units that each choice keeps.
        sparsity: of all layers together.
    """
    budget = _budget(layers, sparsity)
    sizes = [
        [math.ceil(units * layer.unit - 1e-6) for units in choices]
        for layer, choices in zip(layers, kept, strict=True)
    ]
    picks = cheapest(curves, sizes, budget)
    units = [choices[pick] for choices, pick in zip(kept, picks, strict=True)]
    total = sum(curve[pick] for curve, pick in zip(curves, picks, strict=True))
    return _with_the_rest(layers, curves, kept, picks, units, budget), total


def _with_the_rest(
    layers: Sequence[Share],
    curves: Sequence[Sequence[float]],
    kept: Sequence[Sequence[int]],
    picks: list[int],
    units: list[int],
    budget: int,
) -> list[int]:
    """What the choices leave of the budget goes where the next denser choice gains most a weight."""
    room = budget - sum(count * layer.unit for count, layer in zip(units, layers, strict=True))

    def gain(index: int) -> float:
        denser = [c for c in range(len(kept[index])) if kept[index][c] > kept[index][picks[index]]]
        if not denser:
            return 0.0
        following = min(denser, key=lambda c: kept[index][c])
        more = (kept[index][following] - kept[index][picks[index]]) * layers[index].unit
        return (curves[index][picks[index]] - curves[index][following]) / more

    for index in sorted(range(len(layers)), key=gain, reverse=True):
        more = min(layers[index].units - units[index], int((room + 1e-6) // layers[index].unit))
        if more > 0:
            units[index] += more
            room -= more * layers[index].unit
    return units


def _budget(layers: Sequence[Share], sparsity: float) -> int:
    total = sum(layer.weights for layer in layers)
    return total - round(sparsity * total)
