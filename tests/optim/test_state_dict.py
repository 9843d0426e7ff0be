"""Checkpoints: resuming to the bit, conversion, and refusing what does not fit before anything changes."""

import copy
import io

import pytest
import torch
from optim_cases import (
    CASES,
    OPTIMIZERS,
    along_memory,
    assert_same_bits,
    decoded,
    make,
    parameters,
    run,
    snapshot,
)
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import tilewright as tw
from reference import optim as reference
from tilewright.optim import GlobalOptimManager, create_dynamic_map
from tilewright.optim.maps import shared_map
from tilewright.optim.state_io import NESTED_KEY

CPU = torch.device("cpu")
SHAPES = [300, 5000, (30, 8, 5, 5)]


def stepped(
    name: str = "AdamW8bit", sizes=(5000,), steps: int = 1, device: torch.device = CPU
) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    params = parameters(sizes, torch.float32, device)
    optimizer = OPTIMIZERS[name](params)
    run(optimizer, steps)
    return params, optimizer


def through_file(state_dict: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def flattened(state_dict: dict) -> dict:
    """As bitsandbytes wrote it before 0.49.2: no nested dict."""
    result = copy.deepcopy(state_dict)
    for entries in result["state"].values():
        entries.update(entries.pop(NESTED_KEY))
    return result


@pytest.mark.parametrize("precision", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resuming_is_exact_to_the_bit(backend, name: str, precision: str) -> None:
    """10 steps, save, load into new objects, 10 steps: the same as 20 steps."""
    steps = 2 if backend.name == "emulated" else 10
    dtype = torch.float32 if precision == "nearest" else torch.bfloat16
    params = parameters(SHAPES, dtype, backend.device)
    params[2].data = params[2].data.to(memory_format=torch.channels_last)
    optimizer = OPTIMIZERS[name](params, lr=1e-2, param_precision=precision)
    run(optimizer, steps)
    saved = through_file(optimizer.state_dict())
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = OPTIMIZERS[name](copies, param_precision=precision)
    resumed.load_state_dict(saved)
    assert_same_bits(snapshot(resumed), snapshot(optimizer))
    assert resumed.param_groups[0]["lr"] == 1e-2
    run(optimizer, steps, first_seed=steps)
    run(resumed, steps, first_seed=steps)
    assert_same_bits(snapshot(resumed), snapshot(optimizer))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_flat_keys_load_as_nested_ones(name: str) -> None:
    params = parameters(SHAPES, torch.float32, CPU)
    optimizer, other = OPTIMIZERS[name](params), OPTIMIZERS[name](params)
    run(optimizer, 2)
    other.load_state_dict(through_file(flattened(optimizer.state_dict())))
    assert_same_bits(snapshot(other), snapshot(optimizer))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_layout_is_bitsandbytes(name: str) -> None:
    _, optimizer = stepped(name, [300, 5000], 3)
    saved = optimizer.state_dict()
    states = ["state1"] if name in ("Lion8bit", "SGD8bit") else ["state1", "state2"]
    assert set(saved["state"][0]) == {"step", NESTED_KEY}
    assert saved["state"][0]["step"] == 3
    assert type(saved["state"][0]["step"]) is int
    assert set(saved["state"][0][NESTED_KEY]) == set(states)
    nested = saved["state"][1][NESTED_KEY]
    assert set(nested) == {key + s[-1] for key in ("state", "absmax", "qmap") for s in states}
    assert (nested["state1"].dtype, nested["state1"].shape) == (torch.uint8, (5000,))
    assert (nested["absmax1"].dtype, nested["absmax1"].shape) == (torch.float32, (20,))
    assert torch.equal(nested["qmap1"], create_dynamic_map(True))
    group = saved["param_groups"][0]
    assert {"lr", "betas", "eps", "weight_decay", "params"} <= set(group)
    if name == "SGD8bit":
        assert group["betas"] == (0.9, 0.0)


def test_loading_copies(backend) -> None:
    """torch.optim shares tensors with the dict it loads; going on must not change the dict's owner."""
    _, optimizer = stepped(device=backend.device)
    other = tw.optim.AdamW8bit(parameters([5000], torch.float32, backend.device))
    other.load_state_dict(optimizer.state_dict())
    before = snapshot(optimizer)
    run(other, 1, first_seed=9)
    assert_same_bits(snapshot(optimizer), before)


def test_the_built_in_map_is_shared_after_loading() -> None:
    _, optimizer = stepped(sizes=[5000, 5000])
    optimizer.load_state_dict(through_file(optimizer.state_dict()))
    for state in optimizer.state.values():
        assert state["qmap1"] is shared_map(CPU, True)
        assert state["qmap2"] is shared_map(CPU, False)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_a_map_of_its_own_is_honoured_and_kept(backend, name: str) -> None:
    """Checkpoints of bitsandbytes 0.36 to 0.41.0 carry another unsigned map than today's."""
    own = {"qmap1": torch.linspace(-1, 1, 256), "qmap2": torch.linspace(0, 1, 256)}
    params = parameters([5000], torch.float32, backend.device)
    optimizer = make(CASES[name], params)
    run(optimizer, 1)
    saved = through_file(optimizer.state_dict())
    nested = saved["state"][0][NESTED_KEY]
    for key in own:
        if key in nested:
            nested[key] = own[key]
    optimizer.load_state_dict(saved)
    state = optimizer.state[params[0]]
    assert torch.equal(state["qmap1"].cpu(), own["qmap1"])
    m, v = decoded(state, "1"), decoded(state, "2") if "state2" in state else torch.zeros(5000).double()
    p = params[0].detach().cpu().double()
    run(optimizer, 1, first_seed=1)
    exact = reference.update(CASES[name], 2, p, params[0].grad.cpu().double(), m, v)
    torch.testing.assert_close(params[0].detach().cpu().double(), exact[0], rtol=1e-6, atol=1e-7)
    codes, absmax = reference.quantize(exact[1], own["qmap1"], 256)
    expected = reference.dequantize(codes, own["qmap1"], absmax, 256)
    error = (decoded(optimizer.state[params[0]], "1") - expected).abs() / reference.expand(absmax, 5000, 256)
    gap = 2 / 255
    assert float(error.max()) <= 1.001 * gap
    assert float((error > 0.5 * gap).double().mean()) < 1e-3
    assert torch.equal(optimizer.state_dict()["state"][0][NESTED_KEY]["qmap1"].cpu(), own["qmap1"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_blocks_of_2048(name: str) -> None:
    """As bitsandbytes wrote them until 0.44."""
    params, optimizer = stepped(name)
    saved = through_file(optimizer.state_dict())
    nested = saved["state"][0][NESTED_KEY]
    expected = {}
    for suffix in [key[-1] for key in nested if key.startswith("state")]:
        values = torch.rand(5000, generator=torch.Generator().manual_seed(0))
        codes, absmax = reference.quantize(values, nested["qmap" + suffix], 2048)
        nested["state" + suffix], nested["absmax" + suffix] = codes, absmax.float()
        expected[suffix] = reference.dequantize(codes, nested["qmap" + suffix], absmax, 2048)
    optimizer.load_state_dict(saved)
    state = optimizer.state[params[0]]
    for suffix, values in expected.items():
        assert state["absmax" + suffix].shape == (20,)
        codes, absmax = reference.quantize(values, create_dynamic_map(suffix == "1"), 256)
        again = reference.dequantize(codes, create_dynamic_map(suffix == "1"), absmax, 256)
        torch.testing.assert_close(decoded(state, suffix), again, rtol=0.02, atol=1e-7)
    run(optimizer, 1)


@pytest.mark.parametrize(("stored", "wanted"), [(8, 32), (32, 8)])
@pytest.mark.parametrize("name", ["AdamW", "Adam", "Lion"])
def test_states_of_other_bits_are_converted(name: str, stored: int, wanted: int) -> None:
    chosen = getattr(tw.optim, name)
    params = parameters([300, 5000], torch.float32, CPU)
    optimizer = chosen(params, optim_bits=stored)
    run(optimizer, 2)
    other = chosen(params, optim_bits=wanted)
    other.load_state_dict(optimizer.state_dict())
    state = other.state[params[1]]
    assert state["state1"].dtype == (torch.uint8 if wanted == 8 else torch.float32)
    assert other.state[params[0]]["state1"].dtype == torch.float32
    assert int(state["step"]) == 2
    exact = decoded(optimizer.state[params[1]], "1")
    if wanted == 32:
        assert torch.equal(state["state1"], exact.float())
    else:
        codes, absmax = reference.quantize(exact, create_dynamic_map(), 256)
        assert torch.equal(state["state1"], codes)
        assert torch.equal(state["absmax1"], absmax.float())


def test_overrides_decide_the_bits_of_what_is_loaded() -> None:
    params, optimizer = stepped()
    GlobalOptimManager.get_instance().override_config(params[0], "optim_bits", 32)
    try:
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.state[params[0]]["state1"].dtype == torch.float32
    finally:
        GlobalOptimManager.get_instance().initialize()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("to_channels_last", [True, False])
def test_a_checkpoint_of_another_layout(name: str, to_channels_last: bool) -> None:
    """Values go with their indices; only the blocks they share a scale with are others."""
    formats = [torch.contiguous_format, torch.channels_last]
    source, target = formats if to_channels_last else formats[::-1]
    (p,) = parameters([(30, 8, 5, 5)], torch.float32, CPU)
    p.data = p.data.to(memory_format=source)
    optimizer = OPTIMIZERS[name]([p])
    run(optimizer, 2)
    other_p = torch.nn.Parameter(p.detach().to(memory_format=target))
    other = OPTIMIZERS[name]([other_p])
    other.load_state_dict(through_file(optimizer.state_dict()))
    state = other.state[other_p]
    assert state["state1"].stride() == other_p.stride()
    exact = decoded(optimizer.state[p], "1")
    codes, _ = reference.quantize(along_memory(exact.to(memory_format=target)), create_dynamic_map(), 256)
    assert torch.equal(along_memory(state["state1"]), codes)
    run(other, 1)


# -- torch.optim ------------------------------------------------------------------------------------

TORCH = {
    "AdamW8bit": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
    "Adam8bit": lambda params: torch.optim.Adam(params, lr=1e-2, weight_decay=0.1),
    "SGD8bit": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.8, weight_decay=0.1, nesterov=True),
}


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_import_from_torch(backend, name: str, dtype: torch.dtype) -> None:
    params = parameters([300, 5000], dtype, backend.device)
    params[1].data = params[1].data.view(50, 100).t()
    theirs = TORCH[name](params)
    run(theirs, 3)
    ours = OPTIMIZERS[name](params)
    ours.load_state_dict(through_file(theirs.state_dict()))
    group = ours.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (1e-2, 0.1)
    assert not {"foreach", "fused", "capturable", "amsgrad", "decoupled_weight_decay"} & set(group)
    key, signed = ("momentum_buffer", True) if name == "SGD8bit" else ("exp_avg", True)
    small, large = (ours.state[p] for p in params)
    assert torch.equal(small["state1"], theirs.state[params[0]][key].float())
    codes, absmax = reference.quantize(
        along_memory(theirs.state[params[1]][key].cpu()), create_dynamic_map(signed), 256
    )
    assert torch.equal(large["absmax1"].cpu().double(), absmax)
    assert float((along_memory(large["state1"].cpu()) != codes).double().mean()) < 1e-3
    if name != "SGD8bit":
        assert int(large["step"]) == 3
        assert decoded(large, "2").min() >= 0
    else:
        assert (group["momentum"], group["nesterov"]) == (0.8, True)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    twin = TORCH[name](twins)
    twin.load_state_dict(theirs.state_dict())
    run(ours, 1, first_seed=7)
    run(twin, 1, first_seed=7)
    for a, b in zip(params, twins, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)


def test_import_of_a_lion_that_keeps_no_step() -> None:
    params = parameters([5000], torch.float32, CPU)
    optimizer = tw.optim.Lion8bit(params)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {0: {"exp_avg": torch.ones(5000)}}, "param_groups": groups})
    assert bool((decoded(optimizer.state[params[0]], "1") == 1.0).all())


def test_torch_sgd_before_its_first_buffer() -> None:
    params = parameters([300], torch.float32, CPU)
    optimizer = tw.optim.SGD8bit(params, lr=0.1, momentum=0.9)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {0: {"momentum_buffer": None}}, "param_groups": groups})
    assert len(optimizer.state) == 0
    run(optimizer, 1)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad=True"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "decoupled_weight_decay=False: load it into Adam"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "the checkpoint holds momentum_buffer"),
        (lambda p: torch.optim.RMSprop(p), "the checkpoint holds square_avg"),
    ],
)
def test_states_of_other_optimizers_are_refused(theirs, message: str) -> None:
    params = parameters([300], torch.float32, CPU)
    foreign = theirs(params)
    run(foreign, 1)
    optimizer = tw.optim.AdamW8bit(params)
    run(optimizer, 1)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(foreign.state_dict())
    assert_same_bits(snapshot(optimizer), before)


# -- bad checkpoints --------------------------------------------------------------------------------


def put(key: str, value):
    return lambda saved: saved["state"][1][NESTED_KEY].update({key: value})


def drop(key: str):
    return lambda saved: saved["state"][1][NESTED_KEY].pop(key)


CORRUPTIONS = {
    "shape": (put("state1", torch.zeros(4999, dtype=torch.uint8)), r"param 1: state1 has shape \(4999,\)"),
    "axes": (
        put("state1", torch.zeros(50, 100, dtype=torch.uint8)),
        r"state1 has shape \(50, 100\), the parameter",
    ),
    "ademamix": (put("state1", torch.zeros(2, 5000, dtype=torch.uint8)), r"state1 has shape \(2, 5000\)"),
    "dtype": (put("state2", torch.zeros(5000, dtype=torch.int32)), "state2 must be uint8 or float32"),
    "blocks": (
        put("absmax1", torch.zeros(19)),
        "absmax1 has 19 blocks, which fits 5000 elements in blocks of neither",
    ),
    "blocks512": (put("absmax2", torch.zeros(10)), "absmax2 has 10 blocks"),
    "absmax dtype": (put("absmax1", torch.zeros(20).double()), "absmax1 must be float32"),
    "short map": (put("qmap1", torch.zeros(16)), r"state1: code must hold 256 float32 values"),
    "unsorted map": (put("qmap2", torch.linspace(1, 0, 256)), "ascending"),
    "nan map": (put("qmap2", torch.full((256,), torch.nan)), "finite"),
    "no state2": (drop("state2"), "neither of state2 and exp_avg_sq"),
    "no absmax": (drop("absmax1"), "state1 has no absmax1 or no qmap1"),
    "no map": (drop("qmap2"), "state2 has no absmax2 or no qmap2"),
    "two forms": (
        put("exp_avg", torch.zeros(5000)),
        "state1 and exp_avg of state1 and exp_avg, expected one",
    ),
    "unknown": (
        put("state3", torch.zeros(5000)),
        "the checkpoint holds state3, which this optimizer does not have",
    ),
    "no step": (lambda saved: saved["state"][1].pop("step"), "param 1: step must be a whole number"),
    "bad step": (lambda saved: saved["state"][1].update(step=1.5), "step must be a whole number"),
    "negative step": (lambda saved: saved["state"][1].update(step=-1), "step must be a whole number"),
    "list": (put("state1", [0] * 5000), "state1 must be a plain tensor, got list"),
    "orphan": (lambda saved: saved["state"].update({7: {"step": 1}}), "states of no parameter: 7"),
    "groups": (
        lambda saved: saved["param_groups"].append(saved["param_groups"][0]),
        "has 2 parameter groups",
    ),
    "params": (lambda saved: saved["param_groups"][0]["params"].pop(), "has 1 parameters in the checkpoint"),
    "lr": (lambda saved: saved["param_groups"][0].update(lr=-1.0), "lr must be a number"),
    "betas": (
        lambda saved: saved["param_groups"][0].update(betas=(0.9, 0.9, 0.9)),
        "betas must be two numbers",
    ),
}


@pytest.mark.parametrize("case", CORRUPTIONS)
def test_what_does_not_fit_is_refused_before_anything_changes(case: str) -> None:
    """bitsandbytes loads any absmax; its CUDA kernel would read past the end of a short one."""
    corrupt, message = CORRUPTIONS[case]
    _, optimizer = stepped(sizes=[300, 5000], steps=2)
    saved = through_file(optimizer.state_dict())
    corrupt(saved)
    run(optimizer, 1)
    before, groups = snapshot(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_same_bits(snapshot(optimizer), before)
    assert optimizer.state_dict()["param_groups"] == groups


def test_states_without_a_word_on_their_block_order_are_refused() -> None:
    """bitsandbytes' states of channels_last parameters: their order depends on the device that made them."""
    (p,) = parameters([(30, 8, 5, 5)], torch.float32, CPU)
    p.data = p.data.to(memory_format=torch.channels_last)
    optimizer = tw.optim.AdamW8bit([p])
    run(optimizer, 1)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["block_order"]
    with pytest.raises(ValueError, match="does not say how its blocks run"):
        optimizer.load_state_dict(saved)


def test_leftovers_of_old_versions_are_ignored() -> None:
    params, optimizer = stepped()
    saved = flattened(optimizer.state_dict())
    saved["state"][0].update(gnorm_vec=torch.zeros(100), unorm_vec=torch.zeros(1), max1=torch.zeros(1))
    optimizer.load_state_dict(saved)
    assert "gnorm_vec" not in optimizer.state[params[0]]


def test_old_states_without_blocks_are_refused() -> None:
    _, optimizer = stepped()
    saved = flattened(optimizer.state_dict())
    for suffix in "12":
        del saved["state"][0]["absmax" + suffix]
        saved["state"][0].update({f"max{suffix}": torch.ones(1), f"new_max{suffix}": torch.ones(1)})
    with pytest.raises(ValueError, match="8-bit states without blocks"):
        optimizer.load_state_dict(saved)


def test_hooks_see_what_is_written_and_read() -> None:
    _, optimizer = stepped()
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("state_dict pre"))
    optimizer.register_state_dict_post_hook(lambda o, d: {**d, "extra": NESTED_KEY in d["state"][0]})
    optimizer.register_load_state_dict_pre_hook(lambda o, d: calls.append("load pre"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("load post"))
    saved = optimizer.state_dict()
    assert saved["extra"] is True
    optimizer.load_state_dict(saved)
    assert calls == ["state_dict pre", "load pre", "load post"]


def test_settings_of_the_user_and_of_schedulers_survive() -> None:
    params = parameters([300], torch.float32, CPU)
    optimizer = tw.optim.AdamW8bit([{"params": params, "name": "head"}], lr=torch.tensor(0.1))
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    saved = through_file(optimizer.state_dict())
    optimizer.param_groups[0].update(lr=0.5, name="tail", initial_lr=3.0)
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert group["name"] == "head"
    assert group["initial_lr"] == pytest.approx(0.1)
    assert isinstance(group["lr"], torch.Tensor)
    assert group["lr"] is not saved["param_groups"][0]["lr"]
    assert not {"block_order", "alpha", "t_alpha"} & set(group)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torchs_distributed_checkpoints(name: str) -> None:
    """They step once with lr 0 to make states appear, which the checkpoint then overwrites."""

    def fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.Sequential(torch.nn.Linear(80, 80), torch.nn.Linear(80, 3))
        return model, OPTIMIZERS[name](model.parameters(), lr=0.1)

    (model, optimizer), (other_model, other) = fresh(), fresh()
    run(optimizer, 2)
    saved = get_state_dict(model, optimizer)
    set_state_dict(other_model, other, model_state_dict=saved[0], optim_state_dict=saved[1])
    assert_same_bits(snapshot(other), snapshot(optimizer))
    assert other.param_groups[0]["lr"] == 0.1


def test_loading_before_the_first_step() -> None:
    optimizer = tw.optim.AdamW8bit(parameters([300], torch.float32, CPU))
    optimizer.load_state_dict(optimizer.state_dict())
    run(optimizer, 1)
