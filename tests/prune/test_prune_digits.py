"""Pruning on real data: scikit-learn's handwritten digits, a network that has learnt them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tilewright as tw
from tilewright.prune import Block, mask_of, prune, repair

datasets = pytest.importorskip("sklearn.datasets")
pytestmark = pytest.mark.slow


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture(scope="module")
def digits() -> dict[str, Any]:
    x, y = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    data = list(zip(x[:1440].split(120), y[:1440].split(120), strict=True))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    train(model, data, epochs=15, lr=2e-3)
    assert float((model(x[1440:]).argmax(1) == y[1440:]).float().mean()) > 0.95
    return {"model": model, "data": data, "test": (x[1440:], y[1440:])}


def train(model: nn.Module, data: list[tuple[Tensor, Tensor]], epochs: int, lr: float) -> None:
    optimizer = tw.optim.AdamW8bit(model.parameters(), lr=lr)
    for batch in data * epochs:
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()


def accuracy(model: nn.Module, digits: dict[str, Any]) -> float:
    x, y = digits["test"]
    return float((model(x).argmax(1) == y).float().mean())


@pytest.mark.parametrize(
    ("pattern", "sparsity", "most"), [("2:4", None, 0.01), ("element", 0.9, 0.01), (Block(16, 16), 0.8, None)]
)
def test_perp_recovers_nearly_what_full_retraining_does(
    pattern: Any, sparsity: float | None, most: float | None, digits: dict[str, Any]
) -> None:
    pruned = copy.deepcopy(digits["model"])
    prune(pruned, pattern, sparsity, exclude="4")
    retrained = copy.deepcopy(pruned)
    settings = {"steps": 120, "lr": 5e-3, "max_trainable": most}
    report = repair(pruned, digits["data"], loss_fn=loss_fn, **settings)
    train(retrained, digits["data"], epochs=10, lr=1e-3)
    assert report.loss_after < 0.5 * report.loss_before
    assert report.trained_share < (most or 0.1)
    assert accuracy(pruned, digits) > accuracy(retrained, digits) - 0.02
    for index in (0, 2):
        kept = mask_of(pruned[index])
        assert torch.equal(kept, mask_of(retrained[index]))
        assert (pruned[index].weight[~kept] == 0).all()


def test_allocation_by_distortion_beats_the_others_at_90_percent(digits: dict[str, Any]) -> None:
    found = {}
    data = [x for x, _ in digits["data"]]
    for allocation in ("uniform", "erk", "distortion"):
        model = copy.deepcopy(digits["model"])
        report = prune(model, "element", 0.9, calibration=data, allocation=allocation)
        found[allocation] = report.distortion
    assert found["distortion"] < min(found["uniform"], found["erk"])


def test_criteria_that_look_at_the_data_do_better(digits: dict[str, Any]) -> None:
    found = {}
    for criterion in ("random", "magnitude", "wanda", "taylor", "sparsegpt"):
        model = copy.deepcopy(digits["model"])
        report = prune(model, "2:4", None, criterion, digits["data"], loss_fn=loss_fn)
        found[criterion] = report.distortion
    assert found["sparsegpt"] < found["wanda"] < found["magnitude"] < found["random"]
