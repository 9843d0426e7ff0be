"""Sharing a sparsity among layers: budgets to the weight, and the least sum of distortions."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prune_models import assert_same, batches, mlp, snapshot
from torch import nn

from tilewright.prune import Block, mask_of, prune
from tilewright.prune.allocation import Share, by_distortion, cheapest, erk, uniform


def budget(layers: list[Share], sparsity: float) -> int:
    total = sum(layer.weights for layer in layers)
    return total - round(sparsity * total)


def elements(*shapes: tuple[int, int]) -> list[Share]:
    return [Share(shape, shape[0] * shape[1]) for shape in shapes]


def test_uniform_is_the_share_of_each() -> None:
    layers = elements((7, 9), (100, 100), (1, 3))
    assert uniform(layers, 0.9) == [63 - 57, 1000, 1]


def test_erk_is_the_formula() -> None:
    layers = elements((300, 100), (300, 300), (200, 300))
    kept = erk(layers, 0.9)
    assert sum(kept) == budget(layers, 0.9)
    factor = 18000 / (400 + 600 + 500)
    for units, wanted in zip(kept, (400 * factor, 600 * factor, 500 * factor), strict=True):
        assert abs(units - wanted) <= 1


def test_erk_makes_small_layers_dense_and_solves_the_rest_again() -> None:
    layers = elements((10, 784), (300, 784), (100, 300), (10, 100))
    kept = erk(layers, 0.5)
    assert sum(kept) == budget(layers, 0.5)
    assert kept[3] == 1000
    assert kept[0] == 7840
    rest = budget(layers, 0.5) - 8840
    dense = [index for index in (1, 2) if kept[index] == layers[index].weights]
    if not dense:
        assert abs(kept[1] / kept[2] - 1084 / 400) < 0.01
    assert kept[1] + kept[2] == rest


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=6),
    st.floats(0.0, 0.99),
)
def test_erk_meets_its_budget(shapes: list[tuple[int, int]], sparsity: float) -> None:
    layers = elements(*shapes)
    kept = erk(layers, sparsity)
    assert all(1 <= units <= layer.units for units, layer in zip(kept, layers, strict=True))
    assert sum(kept) == max(budget(layers, sparsity), len(layers))


@given(st.integers(0, 10**6))
def test_the_programme_finds_what_brute_force_finds(seed: int) -> None:
    draw = random.Random(seed)
    layers, choices = 4, 5
    sizes = [[draw.randint(0, 40) for _ in range(choices)] for _ in range(layers)]
    costs = [[draw.random() for _ in range(choices)] for _ in range(layers)]
    room = draw.randint(sum(map(min, sizes)), 160)
    picks = cheapest(costs, sizes, room)

    def cost(picks: tuple[int, ...]) -> float:
        return sum(costs[layer][pick] for layer, pick in enumerate(picks))

    def size(picks: tuple[int, ...]) -> int:
        return sum(sizes[layer][pick] for layer, pick in enumerate(picks))

    allowed = [c for c in itertools.product(range(choices), repeat=layers) if size(c) <= room]
    assert size(tuple(picks)) <= room
    assert cost(tuple(picks)) == pytest.approx(min(map(cost, allowed)))


def test_a_large_budget_is_counted_in_steps() -> None:
    draw = random.Random(0)
    total = [draw.randint(10**8, 10**9) for _ in range(30)]
    sizes = [[round(size * share) for share in (1.0, 0.5, 0.25, 0.1, 0.02)] for size in total]
    costs = [[0.0, *sorted(draw.random() for _ in range(4))] for _ in total]
    room = sum(total) // 5
    coarse, fine = cheapest(costs, sizes, room, 1 << 12), cheapest(costs, sizes, room, 1 << 18)
    found = [
        (sum(row[pick] for row, pick in zip(table, picks, strict=True)))
        for picks in (coarse, fine)
        for table in (sizes, costs)
    ]
    assert max(found[0], found[2]) <= room
    assert found[1] <= found[3] * 1.02


def test_a_budget_that_cannot_be_met() -> None:
    with pytest.raises(ValueError, match="the budget is 3 weights, and the sparsest choices keep 4"):
        cheapest([[0.0], [0.0]], [[2], [2]], 3)


def test_what_the_choices_leave_is_given_away() -> None:
    layers = elements((10, 10), (10, 10))
    curves = [[0.0, 5.0, 9.0], [0.0, 0.1, 0.2]]
    kept = [[100, 40, 10], [100, 40, 10]]
    units, total = by_distortion(layers, curves, kept, 0.43)
    assert sum(units) == 114
    assert units == [100, 14]
    assert total == pytest.approx(0.2)


@pytest.mark.parametrize("allocation", ["erk", "distortion"])
@pytest.mark.parametrize("pattern", ["element", Block(4, 4), "row"])
def test_the_model_meets_the_budget(allocation: str, pattern: object) -> None:
    model = mlp((32, 48, 40, 24))
    report = prune(model, pattern, 0.8, calibration=batches(), allocation=allocation)
    total = report.weights
    unit = {"element": 1, "row": 48}.get(str(pattern), 16)
    kept = total - report.zeros
    assert budget([Share((1, total), total)], 0.8) - unit < kept <= budget([Share((1, total), total)], 0.8)
    for layer in report.layers:
        zeros = (~mask_of(model[int(layer.name)])).sum()
        assert zeros == layer.zeros


def test_measured_and_summed_distortion_are_close_where_pruning_is_light() -> None:
    model = mlp()
    report = prune(model, "element", 0.1, calibration=batches(), allocation="distortion")
    assert report.predicted_distortion == pytest.approx(report.distortion, rel=0.6)


def test_it_spares_the_layer_that_matters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    with torch.no_grad():  # the second is a few large weights: easily pruned
        model[1].weight *= (torch.rand(32, 32) > 0.9).float() + 1e-4
    dense = copy.deepcopy(model)
    found = {}
    for allocation in ("uniform", "erk", "distortion"):
        tried = copy.deepcopy(dense)
        report = prune(tried, "element", 0.7, calibration=batches(), allocation=allocation)
        found[allocation] = report.distortion
        densities = [layer.density for layer in report.layers]
    assert densities[0] > 0.45
    assert densities[1] < 0.15
    assert found["distortion"] < 0.5 * min(found["uniform"], found["erk"])


def test_measuring_leaves_the_model_alone() -> None:
    model = mlp()
    before = snapshot(model)
    prune(model, "element", 0.8, "wanda", batches(), "distortion").undo()
    assert_same(before, snapshot(model))
