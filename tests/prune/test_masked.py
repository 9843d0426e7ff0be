"""Masks beside plain weights: zeros stay zero, and nobody who uses the model notices more than that."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from torch import Tensor, nn

import tilewright as tw
from ranks import run_ranks
from tilewright.prune import drop_mask, import_torch_masks, mask_of, set_mask

OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.01, max_iter=3),
    "AdamW8bit": lambda p: tw.optim.AdamW8bit(p, lr=0.01),
    "Adam8bit": lambda p: tw.optim.Adam8bit(p, lr=0.01, weight_decay=0.1),
    "Lion8bit": lambda p: tw.optim.Lion8bit(p, lr=0.01),
    "SGD8bit": lambda p: tw.optim.SGD8bit(p, lr=0.01, momentum=0.9),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = lambda p: torch.optim.Muon(p, lr=0.01)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 64, bias=False), nn.Tanh(), nn.Linear(64, 3, bias=False))


def make_mask() -> Tensor:
    return torch.rand(64, 96, generator=torch.Generator().manual_seed(1)) > 0.7


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(8, 96, dtype=dtype)

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss = (model(x) - 1).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def assert_pruned(weight: Tensor, mask: Tensor) -> None:
    assert torch.equal(weight[~mask], torch.zeros_like(weight[~mask]))
    assert not torch.signbit(weight[~mask]).any()
    assert (weight[mask] != 0).all()


def test_the_weight_is_plain_and_the_mask_beside_it() -> None:
    model, mask = make_model(), make_mask()
    before, parameter = model[0].weight.detach().clone(), model[0].weight
    set_mask(model[0], mask)
    assert model[0].weight is parameter
    assert type(model[0].weight) is nn.Parameter
    assert list(model.state_dict()) == ["0.weight", "2.weight"]
    assert not list(model.buffers())
    assert torch.equal(model[0].weight, before * mask)
    assert torch.equal(mask_of(model[0]), mask)
    assert mask_of(model[2]) is None
    mask.fill_(True)
    assert not mask_of(model[0]).all(), "the mask is a copy"


@pytest.mark.parametrize("before", [0, 3], ids=["fresh", "with history"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_zero_after_every_step(name: str, before: int) -> None:
    model, mask = make_model(), make_mask()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, before)
    set_mask(model[0], mask)
    dense = model[0].weight.detach().clone()
    for _ in range(4):
        train(model, optimizer, 1)
        assert_pruned(model[0].weight, mask)
    assert not torch.equal(model[0].weight, dense)


def test_the_optimizer_forgets_pruned_weights() -> None:
    for name in ("Adam", "AdamW8bit"):
        model, mask = make_model(), make_mask()
        optimizer = OPTIMIZERS[name](model.parameters())
        train(model, optimizer)
        saved = copy.deepcopy(optimizer.state_dict())
        set_mask(model[0], mask)
        train(model, optimizer)
        state = optimizer.state[model[0].weight]
        for moment in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            if moment in state:
                assert_pruned(state[moment], mask)
        if "qmap1" in state:
            assert (state["qmap1"][state["state1"][~mask].long()] == 0).all()
            assert (state["qmap2"][state["state2"][~mask].long()] == 0).all()
        optimizer.load_state_dict(saved)  # remembers them again
        for _ in range(3):
            train(model, optimizer, 1)
            assert_pruned(model[0].weight, mask)


@pytest.mark.slow
def test_a_thousand_steps_of_AdamW8bit_with_decay() -> None:
    model, mask = make_model(), make_mask()
    set_mask(model[0], mask)
    train(model, tw.optim.AdamW8bit(model.parameters(), lr=1e-3, weight_decay=0.1), 1000)
    assert_pruned(model[0].weight, mask)


def test_gradients_accumulated_before_and_after_are_masked() -> None:
    model, mask = make_model(), make_mask()
    x = torch.randn(5, 96)
    model(x).sum().backward()
    dense = model[0].weight.grad.clone()
    set_mask(model[0], mask)
    assert torch.equal(model[0].weight.grad, dense * mask)
    model(x).sum().backward()
    assert_pruned(model[0].weight.grad, mask)
    model.zero_grad()
    model[0].weight.grad = None
    with torch.no_grad():
        model[0].weight[0, 0] = 1.0
    loss = model(torch.full((1, 96), float("nan"))).sum()
    loss.backward()
    assert (model[0].weight.grad[~mask] == 0).all(), "not even by NaN"


@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradients_with_a_graph() -> None:
    model, mask = make_model(), make_mask()
    set_mask(model[0], mask)
    model(torch.randn(5, 96)).square().sum().backward(create_graph=True)
    assert model[0].weight.grad.requires_grad
    assert_pruned(model[0].weight.grad.detach(), mask)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_copies_are_pruned_too_and_independent(copied: Any) -> None:
    model, mask = make_model(), make_mask()
    set_mask(model[0], mask)
    model(torch.randn(2, 96)).sum().backward()
    other = copied(model)
    assert torch.equal(mask_of(other[0]), mask)
    assert mask_of(other[0]) is not mask_of(model[0])
    drop_mask(model[0])
    train(other, torch.optim.AdamW(other.parameters(), lr=0.01))
    assert_pruned(other[0].weight, mask)
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    assert (model[0].weight != 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_dtype(dtype: torch.dtype) -> None:
    model, mask = make_model(), make_mask()
    set_mask(model[0], mask)
    model.to(dtype)
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    assert_pruned(model[0].weight, mask)


def test_a_frozen_weight_is_masked_when_it_trains_later() -> None:
    model, mask = make_model(), make_mask()
    model[0].weight.requires_grad_(False)
    set_mask(model[0], mask)
    assert not model[0].weight.requires_grad
    model[0].weight.requires_grad_(True)
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    assert_pruned(model[0].weight, mask)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_dense_weights_keeps_the_mask(assign: bool) -> None:
    model, mask = make_model(), make_mask()
    initial = copy.deepcopy(model.state_dict())
    set_mask(model[0], mask)
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    model.load_state_dict(initial, assign=assign)
    assert torch.equal(model[0].weight, make_model()[0].weight * mask)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    assert_pruned(model[0].weight, mask)


def test_a_replaced_parameter_is_followed() -> None:
    model, mask = make_model(), make_mask()
    set_mask(model[0], mask)
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    assert_pruned(model[0].weight, mask)
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    train(model, torch.optim.SGD(model.parameters(), lr=0.01), 1)
    assert_pruned(model[0].weight, mask)


def test_another_mask_replaces_the_first() -> None:
    model, first = make_model(), make_mask()
    set_mask(model[0], first)
    second = first.clone()
    second[0] = True
    second[1] = False
    set_mask(model[0], second)
    assert torch.equal(mask_of(model[0]), second)
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    assert_pruned(model[0].weight, second)
    assert len(model[0]._load_state_dict_post_hooks) == 1


def test_dropping_leaves_nothing_behind() -> None:
    model = make_model()
    keys = {key: copy.copy(value) for key, value in vars(model[0]).items()}
    set_mask(model[0], make_mask())
    assert drop_mask(model[0])
    assert not drop_mask(model[0])
    assert vars(model[0]).keys() == keys.keys()
    assert not model[0]._load_state_dict_post_hooks
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    assert (model[0].weight != 0).all()


@pytest.mark.slow
def test_compiled_in_one_graph() -> None:
    model, mask = make_model(), make_mask()
    set_mask(model[0], mask)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 96)
    torch.testing.assert_close(compiled(x), model(x))
    train(compiled, torch.optim.AdamW(model.parameters(), lr=0.01))
    assert_pruned(model[0].weight, mask)


def _replicated(_rank: int) -> None:
    model, mask = make_model(), make_mask()
    set_mask(model[0], mask)
    parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    train(parallel, torch.optim.AdamW(parallel.parameters(), lr=0.01))
    assert_pruned(model[0].weight, mask)


@pytest.mark.slow
def test_data_parallel(tmp_path: Path) -> None:
    run_ranks(_replicated, tmp_path, ranks=2)


def test_masks_of_torch_become_ours() -> None:
    model = make_model()
    parameter = model[0].weight
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    torch_prune.random_unstructured(model[0], "weight", 0.2)
    model(torch.randn(2, 96))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    mask = mask_of(model[0])
    assert mask.sum() == 2458
    with pytest.raises(ValueError, match="import_torch_masks"):
        set_mask(model[0], mask)
    assert import_torch_masks(model) == ["0.weight"]
    assert list(model.state_dict()) == ["0.weight", "2.weight"]
    assert isinstance(model[0].weight, nn.Parameter)
    assert torch.equal(mask_of(model[0]), mask)
    optimizer = torch.optim.AdamW([parameter, model[2].weight], lr=0.01)
    train(copy.deepcopy(model), optimizer)
    train(model, optimizer)
    assert_pruned(model[0].weight, mask)
    assert import_torch_masks(model) == []


def test_the_order_of_keys_is_that_of_an_unpruned_layer() -> None:
    layer = nn.Linear(4, 3)
    torch_prune.l1_unstructured(layer, "bias", 1)
    torch_prune.l1_unstructured(layer, "weight", 0.5)
    import_torch_masks(layer)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert mask_of(layer, "bias").sum() == 2


def test_the_forward_knows_nothing_of_it() -> None:
    model = make_model()
    set_mask(model[0], make_mask())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_pruned_model_is_freed_at_once() -> None:
    model = make_model()
    set_mask(model[0], make_mask())
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    parameter = weakref.ref(model[0].weight)
    gc.collect()
    gc.disable()
    try:
        del model
        assert parameter() is None
    finally:
        gc.enable()


def test_bad_input() -> None:
    layer = nn.Linear(4, 3)
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got Parameter"):
        set_mask(layer.weight, torch.ones(3, 4, dtype=torch.bool))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"bool tensor, True = kept, got torch.float32"):
        set_mask(layer, torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"shape of weight, \(3, 4\), got \(4, 3\)"):
        set_mask(layer, torch.ones(4, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="the Linear has no parameter 'gain'"):
        set_mask(layer, torch.ones(3, 4, dtype=torch.bool), "gain")
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1, 2:] = False
    set_mask(layer, mask)
    with pytest.raises(ValueError, match=r"mask: 2 of 3 groups keep more than 2:4"):
        set_mask(layer, mask, pattern="2:4")
    with pytest.raises(ValueError, match=r"mask: 1 of 4 units of pattern 'block 2x2' are kept in part"):
        set_mask(layer, mask, pattern=tw.prune.Block(2, 2))
    nn.utils.parametrizations.weight_norm(layer)
    with pytest.raises(ValueError, match="parametrized"):
        set_mask(layer, torch.ones(3, 4, dtype=torch.bool))
