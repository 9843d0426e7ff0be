"""`prune`: which layers, exact counts, what it leaves alone, and the way back."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from hypothesis import given
from hypothesis import strategies as st
from prune_models import assert_same, batches, mlp, snapshot, tiny_llama, token_batches
from torch import Tensor, nn

import tilewright as tw
from tilewright.prune import Block, Perp, PruneReport, import_torch_masks, mask, mask_of, prune, set_mask


def square(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 1).square().mean()


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


# ---- one shot ----


@pytest.mark.parametrize(
    ("pattern", "sparsity"),
    [("element", 0.7), ("2:4", None), ("1:4", 0.75), ("row", 0.5), ("column", 0.25), (Block(8, 16), 0.6)],
)
def test_masks_are_those_of_mask(pattern: Any, sparsity: float | None) -> None:
    model = mlp()
    dense = copy.deepcopy(model)
    keys = list(model.state_dict())
    report = prune(model, pattern, sparsity)
    assert [layer.name for layer in report.layers] == ["0", "2", "4"]
    for layer in report.layers:
        weight = linears(dense)[layer.name].weight
        expected = mask(weight, pattern, sparsity)
        assert torch.equal(mask_of(linears(model)[layer.name]), expected)
        assert torch.equal(linears(model)[layer.name].weight, weight * expected)
        assert torch.equal(linears(model)[layer.name].bias, linears(dense)[layer.name].bias)
        assert layer.zeros == (~expected).sum()
        assert layer.distortion is None
    assert list(model.state_dict()) == keys
    assert report.distortion is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    model = mlp(dtype=dtype)
    report = prune(model, "element", 0.5)
    assert model[0].weight.dtype == dtype
    assert report.zeros == report.weights // 2


@pytest.mark.parametrize("sparsity", [0.0, 0.05 * 17, 0.999999])
def test_counts_are_exact(sparsity: float) -> None:
    report = prune(mlp((31, 17, 5)), "element", sparsity)
    for layer in report.layers:
        assert layer.zeros == min(round(sparsity * layer.weights), layer.weights - 1)


def test_twenty_densities_from_one_checkpoint() -> None:
    model = mlp()
    model[0].weight.data[3, 5] = -0.0
    before = snapshot(model)
    for step in range(1, 21):
        density = 0.05 + 0.75 * (step - 1) / 19
        for scope in (None, "global"):
            report = prune(model, "element", 1 - density, scope=scope)
            total = sum(layer.weight.numel() for layer in linears(model).values())
            zeros = sum(int((layer.weight == 0).sum()) for layer in linears(model).values())
            if scope == "global":
                assert report.zeros == round((1 - density) * total)
            assert zeros >= report.zeros
            report.undo()
            assert_same(before, snapshot(model))


def test_global_compares_all_layers() -> None:
    model = mlp()
    model[0].weight.data *= 10
    report = prune(model, "element", 0.5, scope="global")
    assert report.allocation == "global"
    assert report.zeros == round(0.5 * report.weights)
    assert report.layers[0].density > 0.9
    kept = min(layer.weight[mask_of(layer)].abs().min() for layer in linears(model).values())
    assert kept > 0


def test_wanda_weighs_by_the_inputs() -> None:
    model, data = mlp(), batches()
    dense = copy.deepcopy(model)
    report = prune(model, "element", 0.5, "wanda", data)
    seen = {}
    for name, layer in linears(dense).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
    dense(torch.cat(data))
    for name, layer in linears(dense).items():
        norm = torch.cat(seen[name]).double().square().sum(0).sqrt().float()
        expected = mask(layer.weight, "element", 0.5, "wanda", norm)
        assert torch.equal(mask_of(linears(model)[name]), expected)
        assert (expected.sum(1) == layer.in_features - round(0.5 * layer.in_features)).all(), "per row"
    assert 0 < report.distortion < 1


def test_taylor_weighs_by_the_gradient() -> None:
    model, data = mlp(), batches()
    dense = copy.deepcopy(model)
    model[2].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    prune(model, Block(8, 8), 0.5, "taylor", data, loss_fn=square)
    assert not model[2].weight.requires_grad
    assert torch.equal(model[0].weight.grad, mask_of(model[0]).float())
    for batch in data:
        (square(dense, batch) / len(data)).backward()
    for name, layer in linears(dense).items():
        expected = mask(layer.weight, Block(8, 8), 0.5, "taylor", gradient=layer.weight.grad)
        assert torch.equal(mask_of(linears(model)[name]), expected)


def test_taylor_by_a_function_that_yields_losses() -> None:
    first, second, data = mlp(), mlp(), batches()
    prune(first, "element", 0.5, "taylor", data, loss_fn=square)
    prune(second, "element", 0.5, "taylor", lambda model: (square(model, batch) for batch in data))
    assert torch.equal(mask_of(first[0]), mask_of(second[0]))


def test_random_by_seed() -> None:
    found = []
    for seed in (1, 1, 2):
        model = mlp((16, 16, 16))
        prune(model, "element", 0.5, "random", seed=seed)
        found.append([mask_of(layer) for layer in linears(model).values()])
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][0], found[2][0])
    assert not torch.equal(found[0][0], found[0][1]), "layers of one shape differ"


@pytest.mark.parametrize("pattern", ["element", "2:4", Block(8, 8)])
def test_sparsegpt_updates_what_it_keeps(pattern: Any) -> None:
    model, data = mlp(), batches(rows=64)
    dense, by_magnitude = copy.deepcopy(model), copy.deepcopy(model)
    sparsity = None if pattern == "2:4" else 0.5
    before = snapshot(model)
    report = prune(model, pattern, sparsity, "sparsegpt", data)
    magnitude = prune(by_magnitude, pattern, sparsity, calibration=data)
    assert report.distortion < magnitude.distortion
    for layer, other in zip(linears(model).values(), linears(dense).values(), strict=True):
        kept = mask_of(layer)
        assert (layer.weight[~kept] == 0).all()
        assert not torch.equal(layer.weight[kept], other.weight[kept])
    report.undo()
    assert_same(before, snapshot(model))


def test_calibration_of_any_form_gives_the_same() -> None:
    data = batches()

    def run(model: nn.Module) -> None:
        for batch in data:
            model(batch)

    forms: list[Any] = [
        data,
        iter(data),
        run,
        [(batch,) for batch in data],
        torch.cat(data),
        (torch.cat(data),),
    ]
    forms += [{"input": torch.cat(data)}, torch.utils.data.DataLoader(torch.cat(data), batch_size=7)]
    masks = []
    for form in forms:
        model = mlp()
        report = prune(model, "2:4", None, "wanda", form)
        masks.append(mask_of(model[2]))
        assert all(layer.distortion > 0 for layer in report.layers)
        assert (report.distortion is None) == (form is run)
    assert all(torch.equal(masks[0], other) for other in masks)


def test_distortions_are_those_of_the_outputs() -> None:
    model, data = mlp(), batches()
    dense = copy.deepcopy(model)
    report = prune(model, "2:4", calibration=data)
    x = torch.cat(data)
    for network in (model, dense):
        network.requires_grad_(False)
    difference, norm = (model(x) - dense(x)).double().square().sum(), dense(x).double().square().sum()
    assert math.isclose(report.distortion, difference / norm, rel_tol=1e-5)
    x, name = dense[1](dense[0](x)), "2"
    y, z = (nn.functional.linear(x, net[2].weight).double() for net in (dense, model))
    (layer,) = [layer for layer in report.layers if layer.name == name]
    assert math.isclose(layer.distortion, (y - z).square().sum() / y.square().sum(), rel_tol=1e-5)


def test_it_runs_in_evaluation_mode_and_spares_the_random_numbers() -> None:
    model = nn.Sequential(nn.Linear(32, 16), nn.Dropout(0.5), nn.BatchNorm1d(16), nn.Linear(16, 4))
    model[2].eval()
    loader = torch.utils.data.DataLoader(torch.cat(batches()), batch_size=8, shuffle=True)
    before = snapshot(model)
    report = prune(model, "2:4", None, "wanda", loader)
    report.undo()
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "2:4", "criterion": "sparsegpt"},
        {"pattern": "element", "sparsity": 0.5, "criterion": "wanda"},
        {"pattern": Block(8, 8), "sparsity": 0.5, "allocation": "distortion", "grid": [0.3]},
        {"pattern": "row", "sparsity": 0.6, "scope": "global"},
    ],
)
def test_on_every_backend(options: dict[str, Any], backend: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).to(backend.device)
    before = [layer.weight.detach().clone() for layer in linears(model).values()]
    x = torch.randn(20, 16).to(backend.device)
    optimizer = tw.optim.AdamW8bit(model.parameters(), lr=0.01)
    report = prune(model, **options, calibration=x, loss_fn=square, repair=Perp(steps=2))
    masks = [mask_of(layer) for layer in linears(model).values()]
    for _ in range(2):
        optimizer.zero_grad()
        square(model, x).backward()
        optimizer.step()
    for layer, kept in zip(linears(model).values(), masks, strict=True):
        assert (layer.weight[~kept] == 0).all()
    assert report.zeros == sum(int((~kept).sum()) for kept in masks)
    report.undo()
    for layer, weight in zip(linears(model).values(), before, strict=True):
        assert torch.equal(layer.weight, weight)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("shape", [(7, 1), (1, 7), (63, 65), (127, 129), (4, 0), (0, 4)])
@pytest.mark.parametrize("pattern", ["element", "row", "column", Block(16, 16)])
def test_odd_sizes(shape: tuple[int, int], pattern: Any) -> None:
    model, data = nn.Sequential(nn.Linear(*shape)), torch.randn(3, shape[0])
    before = snapshot(model)
    report = prune(model, pattern, 0.5, "wanda", data)
    expected = report.layers[0].weights - int(mask_of(model[0]).sum())
    assert report.zeros == expected
    report.undo()
    assert_same(before, snapshot(model))
    prune(nn.Sequential(model, nn.Linear(8, 8)), pattern, 0.5, allocation="erk")


@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    unit=st.tuples(st.sampled_from([1, 3, 8, None]), st.sampled_from([1, 2, 8, None])),
    sparsity=st.floats(0.0, 0.99),
    criterion=st.sampled_from(["magnitude", "lp", "wanda", "random"]),
    allocation=st.sampled_from(["uniform", "erk"]),
)
def test_any_shape_and_pattern(
    sizes: list[int], unit: tuple[int | None, int | None], sparsity: float, criterion: str, allocation: Any
) -> None:
    model, pattern = mlp(tuple(sizes)), Block(*unit)
    before = snapshot(model)
    calibration = batches(sizes[0], 1, 3) if criterion == "wanda" else None
    seed = 0 if criterion == "random" else None
    scope: Any = "layer" if criterion == "wanda" else None
    report = prune(model, pattern, sparsity, criterion, calibration, allocation, scope=scope, seed=seed)
    for layer in report.layers:
        kept = mask_of(linears(model)[layer.name])
        pattern.check_mask(kept)
        down, across = pattern.units(layer.shape)
        whole = pattern.sizes(layer.shape)
        if allocation == "uniform" and layer.shape == (down * whole[0], across * whole[1]):
            pruned = min(round(sparsity * down * across), down * across - 1)
            assert layer.zeros == pruned * whole[0] * whole[1]
        assert layer.zeros == (~kept).sum() < layer.weights
    report.undo()
    assert_same(before, snapshot(model))


def test_one_sample_without_a_batch() -> None:
    assert prune(mlp(), "2:4", None, "wanda", torch.randn(32)).distortion > 0


def test_a_progress_bar(capfd: pytest.CaptureFixture[str]) -> None:
    data = batches()
    for progress in (False, True):
        prune(
            mlp(), "element", 0.5, "sparsegpt", data, repair=Perp(steps=3), loss_fn=square, progress=progress
        )
        prune(mlp(), "element", 0.5, "wanda", data, "distortion", progress=progress)
        assert bool(capfd.readouterr().err) == progress


def test_a_compiled_model_is_pruned_below() -> None:
    model = mlp()
    report = prune(torch.compile(model), "2:4")
    assert report.layers[0].name == "0"
    assert mask_of(model[0]) is not None


# ---- which layers ----


def test_a_model_of_transformers() -> None:
    model = tiny_llama()
    before = snapshot(model)
    report = prune(model, "2:4", None, "wanda", token_batches())
    assert len(report.layers) == 14
    assert [(entry.name, entry.why) for entry in report.skipped] == [
        ("lm_head", "it is the model's output layer")
    ]
    assert (model.lm_head.weight != 0).all()
    ids = token_batches()[0]["input_ids"]
    assert torch.isfinite(model.generate(ids, max_new_tokens=3, do_sample=False)).all()
    report.undo()
    assert_same(before, snapshot(model))


def test_sparsegpt_on_a_model_of_transformers() -> None:
    model = tiny_llama()
    report = prune(model, "2:4", None, "sparsegpt", token_batches())
    assert len(report.layers) == 14
    assert report.density == 0.5


def test_layers_of_few_weights_that_decide_about_much_stay_dense() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=32, hidden_size=64, num_hidden_layers=3, pad_token_id=0)
    model = MambaForCausalLM(config)
    report = prune(model, "element", 0.5)
    assert sorted({layer.name.rpartition(".")[2] for layer in report.layers}) == ["in_proj", "out_proj"]
    assert "backbone.layers.{0..2}.mixer.dt_proj  it makes a state space's step sizes and maps" in str(report)
    assert len(prune(model, "element", 0.5, include="*.x_proj").layers) == 3


def test_thin_layers_stay_dense_unless_there_are_no_others() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3), nn.Linear(3, 48), nn.Linear(48, 64))
    before = snapshot(model)
    report = prune(model, "element", 0.5)
    assert [layer.name for layer in report.layers] == ["0", "2", "3"]
    assert [(entry.name, entry.why) for entry in report.skipped] == [
        ("1", "it is thin, 3 x 64: name it in include")
    ]
    report.undo()
    assert_same(before, snapshot(model))
    assert len(prune(model, "element", 0.5, include="*").layers) == 4
    assert len(prune(nn.Sequential(nn.Linear(64, 3), nn.Linear(3, 64)), "element", 0.5).layers) == 2


def test_tied_embeddings_stay_dense() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    before = model.lm_head.weight.detach().clone()
    report = prune(model, "element", 0.5)
    assert report.skipped[0].why == "its weight is an embedding's, too"
    assert torch.equal(model.lm_head.weight, before)


def test_conv1d_of_transformers_is_pruned_along_its_inputs() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16))
    report = prune(model, "2:4", None, "wanda", [{"input_ids": torch.randint(0, 64, (2, 9))}])
    attention = model.transformer.h[0].attn.c_attn
    assert report.layers[0].shape == (96, 32)
    assert attention.weight.shape == (32, 96)
    assert (attention.weight.t().reshape(-1, 4).ne(0).sum(1) == 2).all()
    report.undo()


def test_include_and_exclude() -> None:
    names = lambda report: [layer.name for layer in report.layers]  # noqa: E731
    assert names(prune(mlp(), "element", 0.5, include="0")) == ["0"]
    assert names(prune(mlp(), "element", 0.5, include=["0", "[24]"], exclude="4")) == ["0", "2"]
    assert names(prune(mlp(), "element", 0.5, include=lambda name, m: m.in_features == 48)) == ["2"]
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "classifier": nn.Linear(8, 4)})
    assert names(prune(model, "element", 0.5)) == ["body"]
    assert names(prune(model, "element", 0.5, include="classifier")) == ["classifier"]


def test_a_shared_weight_is_pruned_once_and_masked_everywhere() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    report = prune(model, "element", 0.5, calibration=torch.randn(4, 8))
    assert [layer.name for layer in report.layers] == ["0", "1"]
    assert torch.equal(mask_of(model[0]), mask_of(model[2]))
    report.undo()
    assert mask_of(model[2]) is None


# ---- on pruned models, and by other tools ----


def test_what_is_pruned_stays_pruned() -> None:
    for criterion in ("magnitude", "random"):
        for pattern in ("element", Block(4, 4)):
            model = mlp()
            prune(model, pattern, 0.3, criterion)
            first = mask_of(model[0])
            report = prune(model, pattern, 0.6, criterion)
            second = mask_of(model[0])
            assert not (second & ~first).any()
            units = first.numel() // (1 if pattern == "element" else 16)
            assert report.layers[0].zeros == round(0.6 * units) * (first.numel() // units)


def test_undo_gives_the_former_mask_back() -> None:
    model = mlp()
    prune(model, "element", 0.3)
    before = snapshot(model)
    report = prune(model, "element", 0.6)
    report.undo()
    assert_same(before, snapshot(model))


def test_undo_of_what_is_not_the_last() -> None:
    model = mlp()
    first = prune(model, "element", 0.3)
    second = prune(model, "element", 0.6)
    with pytest.raises(RuntimeError, match="0 was pruned again since"):
        first.undo()
    second.undo()
    first.undo()
    with pytest.raises(RuntimeError, match="undone already"):
        first.undo()
    report = prune(model, "element", 0.3)
    model[2] = nn.Linear(48, 40)
    with pytest.raises(RuntimeError, match="2 was replaced since"):
        report.undo()


def test_compressed_and_back() -> None:
    model = mlp((64, 128, 128, 64))
    before, x = snapshot(model), torch.randn(16, 64)
    report = prune(model, Block(16, 16), 0.8)
    expected = model(x)
    compressed = tw.prune.compress(model, x)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    if any(not isinstance(layer, nn.Linear) for layer in (model[0], model[2], model[4])):
        with pytest.raises(RuntimeError, match="was replaced since"):
            report.undo()
    compressed.undo()
    report.undo()
    assert_same({**before, "random": torch.get_rng_state()}, snapshot(model))


def test_masks_of_torch_are_taken_over() -> None:
    model = mlp()
    for index in (0, 2, 4):
        torch_prune.l1_unstructured(model[index], "weight", 0.5)
    model(batches()[0])
    theirs = mask_of(model[0])
    prune(model, "2:4")
    assert not (mask_of(model[0]) & ~theirs).any()
    assert list(model.state_dict())[:2] == ["0.weight", "0.bias"]
    copy.deepcopy(model)
    assert import_torch_masks(model) == []


def test_masks_of_torch_come_back_after_an_error() -> None:
    model = mlp()
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    model[4].weight.data[0, 0] = torch.nan
    out = model(batches()[0])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="not finite"):
        prune(model, "element", 0.5)
    assert list(model.state_dict()) == list(before)
    assert torch.equal(model[0].weight_orig, before["0.weight_orig"])
    assert torch_prune.is_pruned(model[0])
    model[4].weight.data[0, 0] = 0.0
    assert torch.equal(model(batches()[0])[:, 1:], out[:, 1:])
    model(batches()[0]).sum().backward()
    assert (model[0].weight_orig.grad[before["0.weight_mask"] == 0] == 0).all()


@pytest.mark.parametrize("given", [False, True])
def test_an_optimizer_forgets(given: bool) -> None:
    for make in (tw.optim.AdamW8bit, torch.optim.AdamW):
        model = mlp((128, 64, 8))
        optimizer = make(model.parameters(), lr=0.01)
        for step in range(6):
            if step == 3:
                prune(model, "element", 0.8, optimizer=optimizer if given else None)
            optimizer.zero_grad()
            square(model, batches(128)[0]).backward()
            optimizer.step()
            if step >= 3:
                assert (model[0].weight[~mask_of(model[0])] == 0).all()


# ---- the report ----


def test_the_report() -> None:
    model = mlp()
    report = prune(model, "2:4", calibration=batches(), exclude="4")
    text = str(report)
    assert text.startswith(
        "2 layers pruned, 1 layer left dense: 1728 of 3456 weights are zero, density 0.5000."
    )
    assert "The model's output differs by" in text
    assert "0               48 x 32  2:4      magnitude   0.5000    768" in text
    assert "excluded" in text
    entries = json.loads(report.to_json())
    assert entries["layers"][0]["density"] == 0.5
    assert entries["skipped"] == [{"name": "4", "why": "excluded"}]
    assert entries["zeros"] == 1728


def test_the_report_in_files(tmp_path: Path) -> None:
    report = prune(mlp(), "2:4", calibration=batches())
    report.to_json(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(report.to_json())
    pytest.importorskip("matplotlib")
    figure = report.plot(tmp_path / "report.png")
    assert len(figure.axes) == 2
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_a_copied_report_has_no_hold_on_the_model() -> None:
    report = prune(mlp(), "2:4")
    other: PruneReport = pickle.loads(pickle.dumps(report))
    assert other == report
    with pytest.raises(RuntimeError, match="the report is a copy"):
        other.undo()


# ---- bad input ----

NAN = float("nan")


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"0: pattern '2:5' needs rows of a multiple of 5, got 32 columns", ["2:5"]),
        (ValueError, r"pattern must be 'n:m'", ["blocks", 0.5]),
        (ValueError, r"in \[0, 1\), got 1.0", ["element", 1.0]),
        (ValueError, r"in \[0, 1\), got -0.1", ["element", -0.1]),
        (ValueError, r"in \[0, 1\), got nan", ["element", NAN]),
        (TypeError, r"sparsity must be a number in \[0, 1\), got None", ["element"]),
        (ValueError, r"pattern '2:4' prunes 0.5, not 0.75: leave sparsity out", ["2:4", 0.75]),
        (ValueError, r"criterion must .* 'sparsegpt', got 'wand': .* 'wanda'\?", ["2:4", None, "wand"]),
        (ValueError, r"criterion 'wanda' needs calibration=", ["2:4", None, "wanda"]),
        (ValueError, r"allocation 'distortion' needs calibration=",
         ["element", 0.5, "magnitude", None, "distortion"]),
        (ValueError, r"allocation must be .*got 'owl'", ["element", 0.5, "magnitude", None, "owl"]),
        (ValueError, r"prunes every group alike: leave out allocation='erk'",
         ["2:4", None, "magnitude", None, "erk"]),
        (ValueError, r"calibration has no batches", ["2:4", None, "wanda", []]),
        (TypeError, r"calibration must be a batch .*got int", ["2:4", None, "wanda", 3]),
        (ValueError, r"a loss is needed.*tensor of shape \(16, 8\)", ["2:4", None, "taylor", batches()]),
    ],
)  # fmt: skip
def test_bad_arguments(error: type[Exception], message: str, arguments: list[Any]) -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        prune(model, *arguments)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (
            ValueError,
            r"include: 'layer.\*' matches no linear layer; there are 0, 2, 4",
            {"include": "layer.*"},
        ),
        (TypeError, r"exclude must be a pattern", {"exclude": 3}),
        (ValueError, r"no linear layer of the model is to be pruned:\n  0: excluded", {"exclude": "*"}),
        (TypeError, r"optimizer must be a torch.optim.Optimizer, got list", {"optimizer": []}),
        (ValueError, r"scope must be", {"scope": "model"}),
        (ValueError, r"scope 'global' shares sparsity out itself", {"scope": "global", "allocation": "erk"}),
        (ValueError, r"seed is for criterion 'random'", {"seed": 3}),
        (ValueError, r"schedule= and train= go together", {"train": print}),
        (ValueError, r"repair= needs calibration=", {"repair": "perp"}),
        (ValueError, r"repair must be 'perp'", {"repair": "magic", "calibration": batches()}),
        (ValueError, r"grid must be at most 200 sparsities", {"grid": [1.5]}),
    ],
)
def test_bad_options(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        prune(model, "element", 0.5, **options)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt", "taylor"])
def test_weights_that_are_not_finite(criterion: str) -> None:
    model = mlp()
    model[2].weight.data[1, 2] = torch.inf
    model[2].weight.data[3, 4] = torch.nan
    before = snapshot(model)
    with pytest.raises(ValueError, match="2: 2 of 1920 weights are not finite"):
        prune(model, "element", 0.5, criterion, None if criterion == "magnitude" else batches())
    assert_same(before, snapshot(model))


def test_weights_that_are_nowhere() -> None:
    with torch.device("meta"):
        model = mlp()
    with pytest.raises(ValueError, match="0: weight must be on a CPU or CUDA device, got meta"):
        prune(model, "element", 0.5)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(32, 8), nn.Linear(32, 8)
        self.dropout = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.used(x))


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt", "taylor"])
def test_a_layer_that_calibration_never_reaches(criterion: str) -> None:
    model = Branches()
    before = snapshot(model)
    with pytest.raises(ValueError, match="calibration never reaches unused"):
        prune(model, "element", 0.5, criterion, batches(), loss_fn=lambda m, x: m(x).square().sum())
    assert_same(before, snapshot(model))


def test_sparsegpt_names_the_layer_it_cannot_do() -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"0: pattern: sparsegpt takes units of at most 512 columns, got 'row'"
    ):
        prune(model, "row", 0.5, "sparsegpt", batches())
    assert_same(before, snapshot(model))


def test_inputs_that_are_not_finite() -> None:
    for criterion in ("wanda", "sparsegpt"):
        model = mlp()
        before = snapshot(model)
        with pytest.raises(ValueError, match="0: its calibration inputs are not finite"):
            prune(model, "element", 0.5, criterion, [torch.full((2, 32), NAN)])
        assert_same(before, snapshot(model))


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt", "taylor"])
@pytest.mark.parametrize("when", [0, 1, 2])
def test_data_that_fails_midway(criterion: str, when: int) -> None:
    model = mlp()
    set_mask(model[0], torch.rand(48, 32) > 0.2)
    before = snapshot(model)
    calls = 0

    class Data:
        def __iter__(self) -> Any:
            nonlocal calls
            calls += 1
            yield batches()[0]
            if calls > when:
                raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        prune(model, "element", 0.5, criterion, Data(), loss_fn=square, repair="perp")
    assert_same(before, snapshot(model))
