"""Gradual pruning: the cubic schedule, in one call and in a training loop."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from prune_models import assert_same, batches, mlp, snapshot
from torch import nn

import tilewright as tw
from tilewright.prune import Block, Cubic, Pruner, mask_of, prune


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for batch in batches(count=steps):
        optimizer.zero_grad()
        (model(batch) - 1).square().mean().backward()
        optimizer.step()


def test_the_formula() -> None:
    cubic = Cubic(10, start=0.2, begin=100, every=50)
    found = [cubic.sparsity(k, 0.9) for k in range(12)]
    for k in range(11):
        t, t0, n, dt = 100 + 50 * k, 100, 10, 50
        assert found[k] == pytest.approx(0.9 + (0.2 - 0.9) * (1 - (t - t0) / (n * dt)) ** 3)
    assert found[10] == found[11] == 0.9
    assert found == sorted(found)
    assert [step for step in range(800) if cubic.due(step)] == list(range(150, 601, 50))
    assert cubic.due(600) == 10


@pytest.mark.parametrize("pattern", ["element", Block(4, 4)])
@pytest.mark.parametrize("criterion", ["magnitude", "random", "wanda"])
def test_prune_and_train_by_turns(pattern: object, criterion: str) -> None:
    model = mlp()
    optimizer = tw.optim.AdamW8bit(model.parameters(), lr=0.01)
    seen = []

    def step(model: nn.Module, pruning: int) -> None:
        train(model, optimizer)
        seen.append((pruning, mask_of(model[0]).clone()))

    calibration = batches() if criterion == "wanda" else None
    report = prune(
        model,
        pattern,
        0.8,
        criterion,
        calibration,
        schedule=Cubic(4, start=0.1),
        train=step,
        optimizer=optimizer,
    )
    assert [pruning for pruning, _ in seen] == [1, 2, 3, 4]
    assert [sparsity for _, sparsity in report.history] == [
        Cubic(4, 0.1).sparsity(k, 0.8) for k in (1, 2, 3, 4)
    ]
    for (_, before), (_, after) in pairwise(seen):
        assert not (after & ~before).any(), "nothing grows back"
        assert after.sum() < before.sum()
    assert (model[0].weight[~mask_of(model[0])] == 0).all()
    assert report.density == pytest.approx(0.2, abs=0.02)


def test_undo_brings_the_whole_model_back() -> None:
    model = mlp()
    prune(model, "element", 0.1)
    before = snapshot(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    report = prune(model, "element", 0.8, schedule=Cubic(3), train=lambda m, k: train(m, optimizer))
    report.undo()
    model.zero_grad()
    assert_same(before, snapshot(model))


def test_a_training_that_fails_leaves_the_model_as_it_was() -> None:
    model = mlp()
    before = snapshot(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def step(model: nn.Module, pruning: int) -> None:
        train(model, optimizer)
        model.zero_grad()
        if pruning == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model, "element", 0.8, schedule=Cubic(3), train=step)
    assert_same(before, snapshot(model))


def test_in_a_training_loop() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pruner = Pruner(model, "element", 0.9, schedule=Cubic(3, begin=1, every=2), optimizer=optimizer)
    found = []
    for _ in range(9):
        train(model, optimizer, 1)
        found.append(pruner.step())
        assert pruner.done == (pruner.steps >= 7)
    expected = [Cubic(3).sparsity(k, 0.9) for k in (1, 2, 3)]
    assert found == [None, None, expected[0], None, expected[1], None, expected[2], None, None]
    assert pruner.report.history == [(3, expected[0]), (5, expected[1]), (7, expected[2])]
    assert pruner.report.layers[0].zeros == round(0.9 * model[0].weight.numel())
    assert (model[0].weight == 0).sum() == pruner.report.layers[0].zeros
    with pytest.raises(RuntimeError, match="nothing to undo"):
        pruner.report.undo()


def test_going_on_from_a_checkpoint() -> None:
    def make() -> tuple[nn.Module, Pruner]:
        model = mlp()
        return model, Pruner(model, "element", 0.9, "random", schedule=Cubic(4, every=2))

    model, pruner = make()
    for _ in range(8):
        pruner.step()
    first, half = make()
    half.load_state_dict({**half.state_dict(), "seed": pruner.state_dict()["seed"]})
    for _ in range(5):
        half.step()
    second, rest = make()
    second.load_state_dict(first.state_dict())
    rest.load_state_dict(half.state_dict())
    while not rest.done:
        rest.step()
    assert torch.equal(mask_of(second[0]), mask_of(model[0]))
    assert rest.report.history == pruner.report.history


def test_bad_input() -> None:
    for error, message, call in (
        (ValueError, "steps must be a positive int", lambda: Cubic(0)),
        (ValueError, "start must be a number", lambda: Cubic(3, start=1.0)),
        (ValueError, "begin must be an int", lambda: Cubic(3, begin=-1)),
        (ValueError, "every must be a positive int", lambda: Cubic(3, every=0)),
        (ValueError, "it cannot follow a schedule", lambda: Pruner(mlp(), "2:4", 0.5, schedule=Cubic(3))),
        (TypeError, "schedule must be a tilewright.prune.Cubic",
         lambda: Pruner(mlp(), "row", 0.5, schedule=3)),  # type: ignore[arg-type]
        (ValueError, "start 0.9 is above the final sparsity 0.5",
         lambda: Pruner(mlp(), "row", 0.5, schedule=Cubic(3, start=0.9))),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
