"""Parameter groups, schedulers, closures, hooks, overrides: what a training loop does to an optimizer."""

import copy
import gc
import io
import pickle

import numpy
import pytest
import torch
from optim_cases import CASES, OPTIMIZERS, assert_same_bits, make, parameters, run, set_grads, snapshot

import tilewright as tw
from reference.optim import Options
from tilewright.optim import GlobalOptimManager

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_overrides():
    yield
    GlobalOptimManager.get_instance().initialize()


def test_groups_have_their_own_settings(backend) -> None:
    alone, together = (parameters([300, 4097], torch.float32, backend.device) for _ in range(2))
    settings = [
        {"lr": 1e-2, "betas": (0.5, 0.6), "eps": 1e-4, "weight_decay": 0.5, "maximize": True},
        {"lr": 1e-3},
    ]
    separate = [tw.optim.AdamW8bit([p], **more) for p, more in zip(alone, settings, strict=True)]
    joint = tw.optim.AdamW8bit([{"params": [p], **more} for p, more in zip(together, settings, strict=True)])
    for step in range(3):
        set_grads(alone, step)
        set_grads(together, step)
        joint.step()
        for optimizer in separate:
            optimizer.step()
    assert_same_bits(snapshot(joint), [t for optimizer in separate for t in snapshot(optimizer)])


def test_groups_may_choose_their_bits() -> None:
    params = parameters([5000, 5000, 100], torch.float32, CPU)
    optimizer = tw.optim.AdamW8bit(
        [
            {"params": params[:1]},
            {"params": params[1:2], "optim_bits": 32},
            {"params": params[2:], "min_8bit_size": 50},
        ]
    )
    run(optimizer, 1)
    assert [optimizer.state[p]["state1"].dtype for p in params] == [torch.uint8, torch.float32, torch.uint8]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_group_added_later(name: str) -> None:
    params = parameters([300, 5000], torch.float32, CPU)
    optimizer = OPTIMIZERS[name](params[:1])
    run(optimizer, 2)
    optimizer.add_param_group({"params": params[1], "lr": 1e-2})
    run(optimizer, 2)
    assert [int(optimizer.state[p]["step"]) for p in params] == [4, 2]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_without_gradients_are_left_alone(backend, name: str) -> None:
    params = parameters([300, 5000, 10], torch.float32, backend.device)
    before = [p.detach().clone() for p in params]
    optimizer = OPTIMIZERS[name](params)
    optimizer.step()
    assert len(optimizer.state) == 0
    set_grads(params, 0)
    params[1].grad = None
    optimizer.step()
    assert torch.equal(params[1], before[1])
    assert params[1] not in optimizer.state
    assert not torch.equal(params[2], before[2])


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    params = parameters([300], torch.float32, CPU)
    optimizer = tw.optim.AdamW8bit(params)
    run(optimizer, 1)
    optimizer.zero_grad(set_to_none=set_to_none)
    optimizer.step()
    assert int(optimizer.state[params[0]]["step"]) == (1 if set_to_none else 2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_schedulers(name: str) -> None:
    """A scheduled run equals one with the settings of each step written by hand."""
    scheduled, by_hand = (parameters([300, 4097], torch.float32, CPU) for _ in range(2))
    optimizer, manual = OPTIMIZERS[name](scheduled, lr=1e-2), OPTIMIZERS[name](by_hand, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for step in range(4):
        manual.param_groups[0]["lr"] = scheduler.get_last_lr()[0]
        for each, params in ((optimizer, scheduled), (manual, by_hand)):
            set_grads(params, step)
            each.step()
        scheduler.step()
    assert_same_bits(snapshot(optimizer), snapshot(manual))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_cycle_moves_the_momentum_too(name: str) -> None:
    params = parameters([300], torch.float32, CPU)
    optimizer = OPTIMIZERS[name](params, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    group = optimizer.param_groups[0]
    first = group["momentum"] if name == "SGD8bit" else group["betas"][0]
    for step in range(2):
        set_grads(params, step)
        optimizer.step()
        scheduler.step()
    assert (group["momentum"] if name == "SGD8bit" else group["betas"][0]) < first


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_tensor_as_learning_rate(backend, name: str) -> None:
    """A tensor is followed when it is filled with another value, as schedulers do it."""
    left, right = (parameters([300, 4097], torch.float32, backend.device) for _ in range(2))
    lr = torch.tensor(0.5, device=backend.device)
    optimizer, plain = OPTIMIZERS[name](left, lr=lr), OPTIMIZERS[name](right, lr=0.5)
    for step, value in enumerate((0.5, 0.25)):
        lr.fill_(value)
        plain.param_groups[0]["lr"] = value
        for each, params in ((optimizer, left), (plain, right)):
            set_grads(params, step)
            each.step()
    assert_same_bits(snapshot(optimizer), snapshot(plain))


@pytest.mark.parametrize("lr", [1, numpy.float32(0.5), numpy.float64(0.5)])
def test_a_learning_rate_of_another_kind(lr) -> None:
    left, right = (parameters([300], torch.float32, CPU) for _ in range(2))
    run(tw.optim.AdamW8bit(left, lr=lr), 1)
    run(tw.optim.AdamW8bit(right, lr=float(lr)), 1)
    assert torch.equal(left[0], right[0])


def test_a_closure_is_called_with_gradients_enabled() -> None:
    (p,) = parameters([300], torch.float32, CPU)
    optimizer = tw.optim.AdamW8bit([p])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure).item()
    assert optimizer.step(closure).item() < first
    with torch.no_grad():
        optimizer.step(closure)
    assert int(optimizer.state[p]["step"]) == 3


def test_step_hooks() -> None:
    params = parameters([300], torch.float32, CPU)
    optimizer = tw.optim.AdamW8bit(params)
    calls = []
    optimizer.register_step_pre_hook(lambda *a: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *a: calls.append("post"))
    run(optimizer, 2)
    assert calls == ["pre", "post"] * 2


def test_named_parameters() -> None:
    model = torch.nn.Linear(3, 4)
    optimizer = tw.optim.AdamW8bit(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    model.weight.grad = torch.zeros(4, 3)
    model.bias.grad = torch.zeros(4)
    model.bias.grad.data = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"param 1 \(bias\): grad has dtype"):
        optimizer.step()


def test_training_changes_what_autograd_saved() -> None:
    """Going backward through a parameter that step() has overwritten must fail, not use the new values."""
    p = torch.nn.Parameter(torch.randn(300))
    optimizer = tw.optim.AdamW8bit([p])
    loss = p.square().sum()
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- layouts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_channels_last_parameters_keep_their_layout(backend, name: str) -> None:
    """The layout only decides how blocks run: elements in memory order are a plain parameter."""
    (p,) = parameters([(40, 6, 5, 5)], torch.float32, backend.device)
    p.data = p.data.to(memory_format=torch.channels_last)
    flat = torch.nn.Parameter(p.detach().permute(0, 2, 3, 1).flatten().clone())
    storage, strides = p.data_ptr(), p.stride()
    optimizer, plain = make(CASES[name], [p]), make(CASES[name], [flat])
    for step in range(3):
        set_grads([p], step)
        flat.grad = p.grad.permute(0, 2, 3, 1).flatten()
        optimizer.step()
        plain.step()
    assert (p.data_ptr(), p.stride()) == (storage, strides)
    assert optimizer.state[p]["state1"].stride() == strides
    assert torch.equal(p.detach().permute(0, 2, 3, 1).flatten(), flat)
    assert torch.equal(optimizer.state[p]["absmax1"], plain.state[flat]["absmax1"])


def test_a_gradient_of_another_layout(backend) -> None:
    left, right = (parameters([(40, 6, 5, 5), (70, 80)], torch.float32, backend.device) for _ in range(2))
    optimizer, plain = tw.optim.AdamW8bit(left), tw.optim.AdamW8bit(right)
    for step in range(2):
        set_grads(left, step)
        set_grads(right, step)
        left[0].grad = left[0].grad.to(memory_format=torch.channels_last)
        left[1].grad = left[1].grad.t().contiguous().t()
        optimizer.step()
        plain.step()
    assert_same_bits(snapshot(optimizer), snapshot(plain))
    assert left[0].grad.is_contiguous(memory_format=torch.channels_last)


def test_a_model_that_changes_its_layout_or_dtype_in_training() -> None:
    model = torch.nn.Conv2d(16, 32, 3)
    optimizer = tw.optim.AdamW8bit(model.parameters(), lr=1e-2)
    x = torch.randn(2, 16, 8, 8)
    for memory_format in (torch.contiguous_format, torch.channels_last, torch.contiguous_format):
        model.to(memory_format=memory_format)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert int(optimizer.state[model.weight]["step"]) == 3
    assert optimizer.state[model.weight]["state1"].is_contiguous()
    model.bfloat16()
    model(x.bfloat16()).square().mean().backward()
    optimizer.step()
    assert int(optimizer.state[model.weight]["step"]) == 4


def test_negated_views_as_gradients() -> None:
    """A tensor with torch's lazy negation bit set has memory of the other sign."""
    left, right = (parameters([300], torch.float32, CPU) for _ in range(2))
    set_grads(right, 0)
    left[0].grad = torch.complex(torch.zeros(300), -right[0].grad).conj().imag
    assert left[0].grad.is_neg()
    for params in (left, right):
        tw.optim.SGD8bit(params, lr=0.1, momentum=0.9).step()
    assert torch.equal(left[0], right[0])


# -- overrides --------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after", "after a step"])
def test_override_of_the_bits(when: str) -> None:
    params = parameters([5000, 5000], torch.float32, CPU)
    manager = GlobalOptimManager.get_instance()
    manager.register_parameters(params)
    if when == "before":
        manager.override_config(params[1], "optim_bits", 32)
    optimizer = tw.optim.AdamW8bit(params)
    if when == "after":
        manager.override_config(params[1], "optim_bits", 32)
    run(optimizer, 1)
    manager.override_config(params[1], "optim_bits", 32)
    run(optimizer, 1)
    assert [optimizer.state[p]["state1"].dtype for p in params] == [torch.uint8, torch.float32]
    assert [int(optimizer.state[p]["step"]) for p in params] == [2, 2]


@pytest.mark.parametrize(
    ("name", "override", "more"),
    [
        ("AdamW8bit", {"lr": 0.5}, {"lr": 0.5}),
        ("AdamW8bit", {"betas": (0.3, 0.4), "eps": 0.1}, {"betas": (0.3, 0.4), "eps": 0.1}),
        ("Adam8bit", {"weight_decay": 0.5}, {"weight_decay": 0.5}),
        ("Lion8bit", {"betas": (0.3, 0.4), "lr": 0.5}, {"betas": (0.3, 0.4), "lr": 0.5}),
        ("SGD8bit", {"betas": (0.3, 0.4)}, {"momentum": 0.3, "dampening": 0.4}),
        ("AdamW8bit", {"min_8bit_size": 0}, {"min_8bit_size": 0}),
    ],
)
def test_override_of_settings(name: str, override: dict, more: dict) -> None:
    params, alone = parameters([300, 300], torch.float32, CPU), parameters([300, 300], torch.float32, CPU)
    GlobalOptimManager.get_instance().override_config(params[1], key_value_dict=override)
    optimizer = OPTIMIZERS[name](params)
    separate = [OPTIMIZERS[name](alone[:1]), OPTIMIZERS[name](alone[1:], **more)]
    for step in range(3):
        set_grads(params, step)
        set_grads(alone, step)
        optimizer.step()
        for each in separate:
            each.step()
    assert_same_bits(snapshot(optimizer), [t for each in separate for t in snapshot(each)])


def test_overrides_of_several_parameters_are_not_one() -> None:
    """bitsandbytes gives them all the same dict, so that changing one later changes all."""
    params = parameters([300, 300], torch.float32, CPU)
    manager = GlobalOptimManager.get_instance()
    manager.override_config(params, key_value_dict={"lr": 0.1})
    manager.override_config(params[0], "lr", 0.5)
    assert [manager.overrides()[id(p)]["lr"] for p in params] == [0.5, 0.1]


def test_an_override_ends_with_its_parameter() -> None:
    """bitsandbytes keys them by id(), which a later parameter may be given again."""
    manager = GlobalOptimManager.get_instance()
    for _ in range(5):
        p = torch.nn.Parameter(torch.ones(10))
        assert id(p) not in manager.overrides()
        manager.override_config(p, "lr", 0.5)
        del p
    gc.collect()
    assert len(manager.overrides()) == 0


def test_module_overrides_follow_the_module() -> None:
    module = torch.nn.Linear(100, 100)
    manager = GlobalOptimManager.get_instance()
    manager.register_module_override(module, "weight", {"optim_bits": 32})
    module.weight = torch.nn.Parameter(torch.randn(100, 100))
    optimizer = tw.optim.AdamW8bit(module.parameters())
    run(optimizer, 1)
    assert optimizer.state[module.weight]["state1"].dtype == torch.float32
    del module, optimizer
    gc.collect()
    assert len(manager.overrides()) == 0


@pytest.mark.parametrize("key", ["max_unorm", "skip_zeros", "momentum", "nonsense"])
def test_overrides_without_an_effect_are_refused(key: str) -> None:
    p = torch.nn.Parameter(torch.ones(10))
    manager = GlobalOptimManager.get_instance()
    with pytest.raises(ValueError, match=f"cannot override '{key}': it would have no effect"):
        manager.override_config(p, key, 1)
    with pytest.raises(ValueError, match="needs key and value"):
        manager.override_config(p)
    with pytest.raises(ValueError, match="not both"):
        manager.override_config(p, "lr", 1.0, {"lr": 1.0})
    with pytest.raises(ValueError, match="optim_bits must be 8 or 32"):
        manager.override_config(p, "optim_bits", 4)
    with pytest.raises(TypeError, match="expected a parameter"):
        manager.override_config([3], "lr", 0.1)
    with pytest.raises(AttributeError):
        manager.register_module_override(torch.nn.Linear(1, 1), "nothing", {"lr": 1.0})
    assert manager.overrides() == {}


def test_an_override_the_optimizer_cannot_honour_is_refused() -> None:
    params = parameters([300], torch.float32, CPU)
    GlobalOptimManager.get_instance().override_config(params, "eps", 1e-3)
    with pytest.raises(ValueError, match="Lion8bit has no 'eps' to override"):
        run(tw.optim.Lion8bit(params), 1)


def test_the_manager_is_one() -> None:
    assert GlobalOptimManager.get_instance() is GlobalOptimManager.get_instance()
    with pytest.raises(RuntimeError, match="get_instance"):
        GlobalOptimManager()


# -- copies -----------------------------------------------------------------------------------------


def through_pickle(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return pickle.loads(pickle.dumps(optimizer))


def through_torch_save(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_copies_go_on_alike(backend, name: str, copied) -> None:
    params = parameters([300, 5000], torch.bfloat16, backend.device)
    more = {"param_precision": "stochastic", "seed": 4, "min_8bit_size": 200, "max_grad_norm": 1.0}
    optimizer = OPTIMIZERS[name](params, **more)
    run(optimizer, 2)
    twin = copied(optimizer)
    assert_same_bits(snapshot(twin), snapshot(optimizer))
    run(optimizer, 2, first_seed=2)
    run(twin, 2, first_seed=2)
    assert_same_bits(snapshot(twin), snapshot(optimizer))
    qmaps = {state["qmap1"].data_ptr() for each in (optimizer, twin) for state in each.state.values()}
    assert len(qmaps) == 1


def test_copies_of_fresh_optimizers() -> None:
    optimizer = make(Options("adamw"), parameters([300], torch.float32, CPU))
    run(copy.deepcopy(optimizer), 1)
    assert len(optimizer.state) == 0


# -- compile ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_compiled_training_step_breaks_its_graph_and_is_right() -> None:
    def train(compiled: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Linear(80, 80)
        optimizer = tw.optim.AdamW8bit(model.parameters(), lr=1e-2)

        def step(x: torch.Tensor) -> None:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        chosen = torch.compile(step, backend="eager") if compiled else step
        for _ in range(3):
            chosen(torch.ones(4, 80))
        return model.weight.detach()

    assert torch.equal(train(True), train(False))
