"""`repair`: PERP trains very little, keeps the zeros, and leaves no trace but better weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from prune_models import assert_same, batches, mlp, snapshot, tiny_llama, token_batches
from torch import Tensor, nn

from tilewright.prune import Block, Perp, mask_of, prune, repair


def fit(teacher: nn.Module) -> Any:
    """The loss of a student of this model."""
    frozen = copy.deepcopy(teacher)
    return lambda model, batch: (model(batch) - frozen(batch).detach()).square().mean()


@pytest.mark.parametrize("optimizer", ["AdamW8bit", "AdamW", lambda p, lr: torch.optim.SGD(p, lr)])
@pytest.mark.parametrize("pattern", ["2:4", "element", Block(8, 8)])
def test_it_repairs_and_keeps_the_mask(pattern: Any, optimizer: Any) -> None:
    model = mlp()
    loss = fit(model)
    prune(model, pattern, None if pattern == "2:4" else 0.5)
    before, masks = snapshot(model), [mask_of(model[index]).clone() for index in (0, 2, 4)]
    lr = 0.05 if callable(optimizer) else 1e-2
    report = repair(model, batches(), loss_fn=loss, steps=30, lr=lr, optimizer=optimizer, max_trainable=None)
    assert report.loss_after < report.loss_before * (0.97 if callable(optimizer) else 0.9)
    assert report.loss_after == pytest.approx(
        sum(float(loss(model, x).detach()) for x in batches()) / 3, rel=1e-4
    )
    assert len(report.losses) == 30
    assert report.rank == 16
    after = snapshot(model)
    for index, kept in zip((0, 2, 4), masks, strict=True):
        assert torch.equal(mask_of(model[index]), kept)
        assert (model[index].weight[~kept] == 0).all()
        assert not torch.signbit(model[index].weight[~kept]).any()
    assert_same({**before, "state": {}}, {**after, "state": {}})
    assert list(before["state"]) == list(after["state"])


def test_little_is_trained() -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.LayerNorm(512), nn.Linear(512, 512))
    x = torch.randn(4, 512)
    loss = fit(model)
    prune(model, "2:4")
    report = repair(model, [x], loss_fn=loss, steps=2)
    assert report.rank == 1
    assert report.trained == 4 * 512 + 2 * 1024
    assert report.trained_share < 0.01
    assert report.trained_share == report.trained / sum(p.numel() for p in model.parameters())


def test_biases_and_norms_alone() -> None:
    model = tiny_llama(attention_bias=True)
    prune(model, "2:4")
    before = copy.deepcopy(model.state_dict())
    report = repair(model, token_batches(), steps=3, rank=0)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert all(name.endswith("bias") or "norm" in name for name in changed)
    assert any("norm" in name for name in changed)
    assert report.layers == []


def test_a_model_of_transformers_by_its_own_loss() -> None:
    model = tiny_llama().train()
    report = prune(model, "2:4", calibration=token_batches(), repair=Perp(steps=20, lr=5e-3))
    assert report.repair.loss_after < report.repair.loss_before
    assert "Repaired by perp: loss" in str(report)
    assert report.to_dict()["repair"]["steps"] == 20
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_undo_takes_the_repair_back() -> None:
    model = mlp()
    before = snapshot(model)
    report = prune(model, "element", 0.8, calibration=batches(), loss_fn=fit(model), repair=Perp(steps=5))
    report.undo()
    assert_same(before, snapshot(model))


def test_zeros_without_a_mask_are_the_mask() -> None:
    model = mlp()
    loss = fit(model)
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
    report = repair(model, batches(), loss_fn=loss, steps=20, lr=1e-2)
    assert report.layers == ["0"]
    assert (model[0].weight[:, ::2] == 0).all()
    assert report.loss_after < report.loss_before


def test_gradients_and_flags_come_back() -> None:
    model = mlp()
    loss = fit(model)
    prune(model, "2:4")
    model[2].weight.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = snapshot(model)
    repair(model, batches(), loss_fn=loss, steps=2)
    assert_same({**before, "state": {}}, {**snapshot(model), "state": {}})


def test_the_same_twice() -> None:
    found = []
    for _ in range(2):
        model = mlp()
        loss = fit(model)
        prune(model, "2:4")
        repair(model, batches(), loss_fn=loss, steps=5)
        found.append(model.state_dict())
        torch.randn(3)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("at", [0, 2, 4, 7])
def test_an_error_leaves_the_model_as_it_was(at: int) -> None:
    model = mlp()
    prune(model, "2:4")
    before = snapshot(model)
    calls = 0

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        scale = torch.nan if calls == at + 1 else 1.0
        return model(batch).square().mean() * scale

    with pytest.raises(ValueError, match=r"repair: the (mean )?loss"):
        repair(model, batches(), loss_fn=loss, steps=3)
    assert_same(before, snapshot(model))


def test_gradient_checkpointing_sees_the_update() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    plain, wrapped = mlp(), Checkpointed(mlp())
    loss = fit(plain)
    for model in (plain, wrapped):
        prune(model, "2:4")
        repair(model, batches(), loss_fn=loss, steps=5, lr=1e-2)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(wrapped.state_dict()[f"inner.{name}"], tensor)


def test_bad_input() -> None:
    model = mlp()
    prune(model, "2:4")
    for error, message, call in (
        (ValueError, "repair must be 'perp' or a tilew", lambda: repair(model, batches(), "lora")),
        (TypeError, "give settings to Perp", lambda: repair(model, batches(), Perp(), steps=3)),
        (TypeError, "Perp has no argument 'step'.*'steps'", lambda: repair(model, batches(), step=3)),
        (ValueError, "steps must be a positive int", lambda: Perp(steps=0)),
        (ValueError, "rank must be", lambda: Perp(rank=-1)),
        (ValueError, "lr must be a number", lambda: Perp(lr=float("nan"))),
        (ValueError, "max_trainable must be a number", lambda: Perp(max_trainable=2.0)),
        (ValueError, "optimizer, .*, must be 'AdamW8bit'", lambda: Perp(optimizer="sgd")),
        (TypeError, "model must be a torch.nn.Module", lambda: repair(3, batches())),  # type: ignore[arg-type]
        (ValueError, "there is nothing to train", lambda: repair(nn.ReLU(), batches())),
        (ValueError, "a loss is needed", lambda: repair(model, batches())),
        (ValueError, "calibration has no batches", lambda: repair(model, [])),
    ):  # fmt: skip
        before = snapshot(model)
        with pytest.raises(error, match=message):
            call()
        assert_same(before, snapshot(model))
