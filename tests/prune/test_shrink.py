"""Channels leave networks of convolutions and linear layers: what is left computes what zeros would."""

from __future__ import annotations

import copy
import io
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from shrink_models import MLP, ConvNet, ResidualBlock, randomized
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.utils.flop_counter import FlopCounterMode

import tilewright as tw


def keep_mask(group: tw.prune.Shrunk, width: int = 1) -> Tensor:
    mask = torch.ones(group.total, width, dtype=torch.float64)
    mask[group.removed] = 0
    return mask.flatten()


def multiplied(module: nn.Module, mask: Tensor, start: int = 0) -> None:
    """From now on, the module's output channels from `start` on are multiplied by the mask."""

    def hook(_: nn.Module, __: object, output: Tensor) -> Tensor:
        whole = torch.ones(output.shape[1], dtype=output.dtype)
        whole[start : start + len(mask)] = mask
        return output * whole.view(1, -1, *[1] * (output.dim() - 2))

    module.register_forward_hook(hook)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9])
def test_mlp_is_the_masked_one(ratio: float) -> None:
    model, x = randomized(MLP()), torch.randn(6, 9, dtype=torch.float64)
    masked = copy.deepcopy(model)
    report = tw.prune.shrink(model, x, ratio)
    assert [group.name for group in report.shrunk] == ["0", "2"]
    assert [group.total - group.kept for group in report.shrunk] == [int(24 * ratio), int(17 * ratio)]
    with torch.no_grad():
        for group, (before, after) in zip(report.shrunk, ((0, 2), (2, 4)), strict=True):
            masked[before].weight[group.removed] = 0
            masked[before].bias[group.removed] = 0
            masked[after].weight[:, group.removed] = 0  # sigmoid(0) is not 0
    torch.testing.assert_close(model(x), masked(x), rtol=0, atol=1e-12)
    assert model[0].out_features == model[2].in_features == report.shrunk[0].kept == model[0].weight.shape[0]


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_residuals_concatenations_and_depthwise_convolutions(norm: str) -> None:
    torch.manual_seed(1)
    model, x = randomized(ConvNet(norm)), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    masked = copy.deepcopy(model)
    report = tw.prune.shrink(model, x, 0.5)
    groups = {group.name: group for group in report.shrunk}
    names = ["stem", "block1.conv1", "block2.conv1", "block2.short", "dense1", "dense2", "up", "last"]
    assert list(groups) == names
    assert [(skip.name, skip.why) for skip in report.skipped] == [
        ("head", "its channels are those of the model's output")
    ]
    stem = keep_mask(groups["stem"], 1 if norm == "batch" else 3)  # whole groups of a GroupNorm leave
    for module in (masked.act, masked.block1.bn2):
        multiplied(module, stem)
    multiplied(masked.block1.bn1, keep_mask(groups["block1.conv1"]))
    multiplied(masked.block2.bn1, keep_mask(groups["block2.conv1"]))
    wide = keep_mask(groups["block2.short"])
    for module in (masked.block2.bn2, masked.block2.short, masked.densebn, masked.depthwise):
        multiplied(module, wide)
    narrow = keep_mask(groups["dense1"])
    for module, start in ((masked.dense1, 0), (masked.densebn, 16), (masked.depthwise, 16)):
        multiplied(module, narrow, start)
    multiplied(masked.dense2, keep_mask(groups["dense2"]))
    multiplied(masked.depthwise, keep_mask(groups["dense2"]), 22)
    multiplied(masked.up, keep_mask(groups["up"]))
    multiplied(masked.last, keep_mask(groups["last"]))
    expected = masked(x)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert (
        model.depthwise.groups == model.depthwise.in_channels == model.depthwise.weight.shape[0] == 8 + 3 + 4
    )
    assert report.parameters == sum(p.numel() for p in model.parameters()) < report.parameters_before


class Gated(nn.Module):
    """One layer makes two halves that meet: channel i and i + 8 can only leave together."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(8, 4, 1)
        self.scale = nn.Parameter(torch.ones(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.conv(x).chunk(2, 1)
        return self.head(value * gate.sigmoid() * self.scale).mean((2, 3))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 12, 3), nn.Linear(12, 6), nn.Linear(6, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        x = x * self.fc2(F.relu(self.fc1(x.mean((2, 3))))).sigmoid()[:, :, None, None]
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(("make", "widths"), [(Gated, {"conv": 8}), (SqueezeExcite, {"conv": 6, "fc1": 3})])
def test_channels_that_meet_leave_together(make: type[nn.Module], widths: dict[str, int]) -> None:
    model, x = randomized(make()), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    report = tw.prune.shrink(model, x, 0.5)
    assert report.verified
    for name, width in widths.items():
        assert getattr(model, name).weight.shape[0] == width, str(report)
    assert model(x).shape[0] == 2


class Softmaxed(nn.Module):
    """Zeros before a softmax are not nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.two(self.one(x).softmax(-1))))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.one(x)))


class Grouped(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv1d(4, 8, 3), nn.Conv1d(8, 8, 3, groups=2), nn.Conv1d(8, 3, 1))


@pytest.mark.parametrize(
    ("make", "shape", "name", "why", "shrunk"),
    [
        (Softmaxed, (5, 6), "one", "removing is not the same as zeros here: output differs", ["two"]),
        (Normed, (5, 6), "one", "norm takes its statistics over the channels", []),
        (Grouped, (2, 4, 9), "0", "it runs into 1, a Conv1d of 2 groups, which is not cut", []),
    ],
)
def test_what_cannot_shrink_stays_and_says_why(
    make: type[nn.Module], shape: tuple[int, ...], name: str, why: str, shrunk: list[str]
) -> None:
    model, x = randomized(make()), torch.randn(shape, dtype=torch.float64)
    report = tw.prune.shrink(model, x, 0.5)
    assert [group.name for group in report.shrunk] == shrunk
    assert next(skip.why for skip in report.skipped if skip.name == name).startswith(why)


def test_undo_puts_the_same_parameters_back() -> None:
    torch.manual_seed(1)
    model, x = randomized(ConvNet()), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters, out, text = dict(model.named_parameters()), model(x), str(model)
    report = tw.prune.shrink(model, x, 0.5)
    assert str(model) != text
    report.undo()
    report.undo()
    assert str(model) == text
    assert all(parameters[name] is value for name, value in model.named_parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model(x), out)


def test_mode_gradients_and_dtype_survive() -> None:
    model, x = MLP().train(), torch.randn(6, 9)
    model[0].weight.requires_grad_(False)
    model[1].eval()
    report = tw.prune.shrink(model, x, 0.5)
    assert len(report.shrunk) == 2
    assert model.training
    assert [module.training for module in model] == [True, False, True, True, True]
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True]
    assert all(p.is_leaf and p.dtype == torch.float32 and p.is_contiguous() for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model(x).square().sum().backward()
    assert model[2].weight.grad is not None


def test_a_shrunk_model_is_a_plain_one() -> None:
    torch.manual_seed(1)
    model, x = randomized(ConvNet()), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    tw.prune.shrink(model, x, 0.5)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
    tw.prune.shrink(model, x, 0.5)  # and shrinks again
    assert model.last.out_channels == 1


@pytest.mark.parametrize("make", [ConvNet, lambda: ConvNet("group"), MLP])
def test_a_fresh_model_takes_a_shrunk_state_dict(make: type[nn.Module]) -> None:
    torch.manual_seed(1)
    model = randomized(make())
    x = (
        torch.randn(2, 9, dtype=torch.float64)
        if make is MLP
        else torch.randn(2, 3, 8, 8, dtype=torch.float64)
    )
    tw.prune.shrink(model, x, 0.5)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = randomized(make(), seed=1)
    assert tw.prune.load_shrunk(fresh, torch.load(file)) is fresh
    assert torch.equal(fresh(x), model(x))
    assert str(fresh) == str(model)


def test_a_state_dict_that_does_not_fit_changes_nothing() -> None:
    model = MLP()
    before, text = {name: value.clone() for name, value in model.state_dict().items()}, str(model)
    wider = nn.Sequential(nn.Linear(9, 30), nn.GELU(), nn.Linear(30, 17), nn.Sigmoid(), nn.Linear(17, 5))
    torn = {name: value[:3] if name == "0.bias" else value for name, value in model.state_dict().items()}
    for state, message in (
        (wider.state_dict(), "0: its out_features is 24, and 30 in the state dict"),
        ({"0.weight": torch.ones(3, 9)}, "Missing key"),
        (torn, "size mismatch|does not fit|do not agree"),
    ):
        with pytest.raises(ValueError, match=message):
            tw.prune.load_shrunk(model, state)
        assert str(model) == text
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(TypeError, match=r"state_dict\['0.weight'\] must be a tensor, got list"):
        tw.prune.load_shrunk(model, {"0.weight": [1.0]})


def test_the_lowest_scores_leave() -> None:
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False)).double()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[2].weight.fill_(1.0)
        model[0].weight[1] = -3.0  # large, though negative
        model[0].weight[4] = 0.5
        model[2].weight[:, 2] = 0.25
    x = torch.ones(3, 4, dtype=torch.float64)
    report = tw.prune.shrink(model, x, 0.5)
    assert report.shrunk[0].removed == [2, 4, 5]  # 0, 3 and 5 are equal: the latest leaves
    report.undo()
    assert tw.prune.shrink(model, x, 0.5, "l1").shrunk[0].removed == [2, 4, 5]


def test_criteria_that_look_at_data() -> None:
    torch.manual_seed(0)
    model, x = randomized(MLP()), torch.randn(16, 9, dtype=torch.float64)
    start = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"'taylor' needs gradients, and 0.weight has none"):
        tw.prune.shrink(model, x, 0.5, "taylor")
    model(x).square().sum().backward()

    both = (model[0].weight * model[0].weight.grad).sum(1) + (model[2].weight * model[2].weight.grad).sum(0)
    removed = tw.prune.shrink(model, x, 0.5, "taylor").shrunk[0].removed
    assert removed == sorted(both.abs().argsort()[:12].tolist())
    model = copy.deepcopy(start)
    norm = torch.cat([F.gelu(model[0](batch)) for batch in (x, 2 * x)]).square().sum(0).sqrt()
    wanda = model[2].weight.abs().sum(0) * norm
    removed = tw.prune.shrink(model, x, 0.5, "wanda", calibration=[x, 2 * x]).shrunk[0].removed
    assert removed == sorted(wanda.argsort()[:12].tolist())
    first, second, third = (
        tw.prune.shrink(copy.deepcopy(start), x, 0.5, "random", seed=seed).shrunk[0].removed
        for seed in (3, 3, 4)
    )
    assert first == second != third


def test_counts_are_exact_and_rounded_as_asked() -> None:
    x = torch.randn(2, 9)
    assert [g.kept for g in tw.prune.shrink(MLP(), x, 0.5, round_to=8).shrunk] == [16, 16]
    assert [g.kept for g in tw.prune.shrink(MLP(), x, 0.9, min_width=10).shrunk] == [10, 10]
    assert [g.kept for g in tw.prune.shrink(MLP(), x, {"0": 0.25}).shrunk] == [18]
    assert [g.name for g in tw.prune.shrink(MLP(), x, 0.5, exclude="0").shrunk] == ["2"]
    assert [g.name for g in tw.prune.shrink(MLP(), x, 0.5, include=["4"]).shrunk] == ["2"]  # its inputs
    report = tw.prune.shrink(MLP(), x, 0.01)
    assert report.shrunk == []
    assert "0.01 of its 24 channels is less than one" in str(report)


class Partial(nn.Module):
    """A norm over groups of the channels that only some of a sum's channels went through."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 8)
        self.mix, self.head = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.norm(self.one(x)), self.two(x)], 1) + self.mix(x))


def test_a_group_norm_binds_only_its_own_channels() -> None:
    model, x = randomized(Partial()), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    report = tw.prune.shrink(model, x, 0.5)
    assert (model.one.out_channels, model.norm.num_groups, model.two.out_channels) == (4, 1, 2), str(report)
    assert model.mix.out_channels == model.head.in_channels == 6
    assert model(x).shape == (2, 2, 4, 4)


def test_flops_are_torchs() -> None:
    model, x = randomized(ConvNet()), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    report = tw.prune.shrink(model, x, 0.0)
    assert report.flops == report.flops_before == counter.get_total_flops()


def test_tied_and_masked_weights_stay() -> None:
    model, x = MLP(), torch.randn(2, 9)
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    report = tw.prune.shrink(model, x, 0.5)
    why = "the weight of 0 is no plain parameter: make it one by import_torch_masks or by "
    assert any(why in skip.why for skip in report.skipped), report
    tw.prune.import_torch_masks(model)
    assert len(tw.prune.shrink(model, x, 0.5).shrunk) == 2
    tied = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    tied[2].weight = tied[0].weight
    report = tw.prune.shrink(tied, torch.randn(2, 6), 0.5)
    assert any("the weight of 2 is also that of 0" in skip.why for skip in report.skipped)


def test_masks_shrink_with_their_weights() -> None:
    model, x = MLP(), torch.randn(6, 9)
    mask = torch.rand(17, 24) < 0.5
    tw.prune.set_mask(model[2], mask)
    report = tw.prune.shrink(model, x, 0.5)
    rows = [row for row in range(17) if row not in report.shrunk[1].removed]
    columns = [column for column in range(24) if column not in report.shrunk[0].removed]
    assert torch.equal(tw.prune.mask_of(model[2]), mask[rows][:, columns])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    assert not model[2].weight[~tw.prune.mask_of(model[2])].any()
    report.undo()
    assert torch.equal(tw.prune.mask_of(model[2]), mask)
    assert not model[2].weight[~mask].any()
    model(x).square().sum().backward()
    assert not model[2].weight.grad[~mask].any()


def test_bad_arguments_and_broken_models_change_nothing() -> None:
    model, x = MLP(), torch.randn(2, 9)
    before = copy.deepcopy(model.state_dict())
    for arguments, error, message in (
        ((x, 1.0), ValueError, r"ratio must be a number in \[0, 1\), got 1.0"),
        ((x, "half"), TypeError, "ratio must be a number in"),
        ((x, {"0": -0.5}), ValueError, r"ratio\['0'\] must be a number in"),
        (
            (x, 0.5, "size"),
            ValueError,
            "criterion must be 'magnitude', 'l1', 'taylor', 'wanda' or 'random', got 'size'",
        ),
        ((3, 0.5), TypeError, "example_inputs must be a tensor, a tuple or a dict of inputs, got int"),
        ((torch.randn(2, 8), 0.5), RuntimeError, "could not trace this model .*shapes cannot be multiplied"),
    ):
        with pytest.raises(error, match=message):
            tw.prune.shrink(model, *arguments)
        assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(TypeError, match=r"round_to must be a positive int, got 2\.0"):
        tw.prune.shrink(model, x, 0.5, round_to=2.0)
    with pytest.raises(ValueError, match="min_width must be a positive int, got 0"):
        tw.prune.shrink(model, x, 0.5, min_width=0)
    with pytest.raises(TypeError, match="include must be a pattern"):
        tw.prune.shrink(model, x, 0.5, include=3)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        tw.prune.shrink(3, x, 0.5)
    with pytest.raises(ValueError, match="no linear layer or convolution"):
        tw.prune.shrink(nn.ReLU(), x, 0.5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        model[2].weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match="0: the magnitude score of 1 of its 24 units is not finite"):
        tw.prune.shrink(model, x, 0.5)


def test_without_torch_pruning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pip install tilewright\[prune\]"):
        tw.prune.shrink(MLP(), torch.randn(2, 9), 0.5)


def test_inference_mode_and_frozen_models() -> None:
    model, x = MLP().requires_grad_(False), torch.randn(2, 9)
    with torch.no_grad():
        report = tw.prune.shrink(model, x, 0.5)
    assert len(report.shrunk) == 2
    assert not any(p.requires_grad for p in model.parameters())


def test_report(tmp_path: Path) -> None:
    model, x = MLP(), torch.randn(4, 9)
    report = tw.prune.shrink(model, x, 0.5)
    text = str(report)
    assert "2 groups shrunk by magnitude" in text
    assert "12/24" in text
    read = json.loads(report.to_json(tmp_path / "report.json"))
    assert read["shrunk"][0]["kept"] == 12
    assert read == json.loads((tmp_path / "report.json").read_text())
    assert read["flops_before"] == 2 * 4 * (9 * 24 + 24 * 17 + 17 * 5)
    assert read["flops"] == 2 * 4 * (9 * 12 + 12 * 9 + 9 * 5)
    assert report.shrunk[0].parameters_before == 24 * 9 + 24 + 17 * 24
    assert report.shrunk[0].flops_before == 2 * 4 * (9 * 24 + 24 * 17)
    assert report.plot(tmp_path / "report.png") is not None
    assert tw.prune.shrink(model, x, 0.0).plot() is not None


def test_batch_norm_trains_on() -> None:
    model = nn.Sequential(ResidualBlock(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    x = torch.randn(4, 3, 6, 6)
    tw.prune.shrink(model, x, 0.5)
    model.train()
    model(x).sum().backward()
    assert model[0].bn2.running_mean.shape == (4,)
