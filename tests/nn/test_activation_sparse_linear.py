"""ActivationSparseLinear: what it computes, what it stores, how it follows its weights."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

import tilewright as tw
from reference import prune_activation as reference
from tilewright.nn import ActivationSparseLinear


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_linear(
    inputs: int = 70, outputs: int = 50, dtype: torch.dtype = torch.float32, bias: bool = True
) -> nn.Linear:
    """A layer whose inputs differ in weight, as trained ones do."""
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(normal(outputs, inputs) * (normal(inputs, seed=1).exp()) / inputs**0.5)
        if bias:
            linear.bias.copy_(normal(outputs, seed=2))
    return linear


def activations(tokens: int, inputs: int = 70, seed: int = 4) -> Tensor:
    """Heavy-tailed, of channels with different scales."""
    return normal(tokens, inputs, seed=seed) ** 3 * normal(inputs, seed=9).exp()


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(70,), (1, 70), (2, 4, 70), (3, 5, 70), (0, 70)], ids=str)
def test_wina_is_its_formula(backend, shape, dtype: torch.dtype, sparsity: float) -> None:
    linear = make_linear(dtype=dtype).to(backend.device)
    layer = ActivationSparseLinear.from_linear(linear, sparsity)
    x = normal(*shape, dtype=dtype).to(backend.device)
    keep = reference.largest(x, linear.weight.float().norm(dim=0), 70 - round(70 * sparsity))
    assert torch.equal(layer.kept_inputs(x), keep)
    found, expected = layer(x), reference.linear(x, keep, linear.weight, linear.bias)
    assert found.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("tokens", [1, 2, 8, 30])
def test_teal_is_its_formula(backend, tokens: int) -> None:
    linear = make_linear().to(backend.device)
    calibration = activations(200).to(backend.device)
    layer = ActivationSparseLinear.from_linear(linear, 0.6, "teal", calibration)
    expected = calibration.abs().flatten().sort().values[round(0.6 * 200 * 70) - 1]
    assert layer.threshold is not None
    assert torch.equal(layer.threshold, expected)
    assert float(layer.kept_inputs(calibration).float().mean()) == pytest.approx(0.4, abs=1e-3)
    x = activations(tokens, seed=7).to(backend.device)
    keep = x.abs() > expected
    assert torch.equal(layer.kept_inputs(x), keep)
    torch.testing.assert_close(
        layer(x), reference.linear(x, keep, linear.weight, linear.bias), atol=1e-3, rtol=1e-5
    )


def test_wina_errs_less_than_teal() -> None:
    """At equal sparsity of the same activations, of a layer whose inputs differ in weight."""
    linear, x = make_linear(300, 200), activations(400, 300)
    linear.requires_grad_(False)
    for sparsity in (0.25, 0.5, 0.75):
        wina = ActivationSparseLinear.from_linear(linear, sparsity)
        teal = ActivationSparseLinear.from_linear(linear, sparsity, "teal", x)
        assert float(teal.kept_inputs(x).float().mean()) == pytest.approx(1 - sparsity, abs=1e-3)
        errors = [float((layer(x) - linear(x)).square().mean()) for layer in (wina, teal)]
        assert errors[0] < errors[1]


def test_an_uncalibrated_teal_layer_keeps_everything() -> None:
    layer = ActivationSparseLinear(70, 50, method="teal")
    x = normal(3, 70)
    assert layer.kept_inputs(x).all()
    torch.testing.assert_close(layer(x), layer.to_linear()(x))


def test_no_sparsity_is_the_dense_layer() -> None:
    linear, x = make_linear(), normal(2, 70)
    for layer in (
        ActivationSparseLinear.from_linear(linear, 0.0),
        ActivationSparseLinear.from_linear(linear, 0.0, "teal", x),
    ):
        torch.testing.assert_close(layer(x), linear(x))


@pytest.mark.parametrize("bias", [True, False])
def test_there_and_back(bias: bool) -> None:
    linear = make_linear(bias=bias, dtype=torch.bfloat16).requires_grad_(False).eval()
    layer = ActivationSparseLinear.from_linear(linear, 0.5)
    assert torch.equal(layer.weight, linear.weight)
    assert not layer.weight_t.requires_grad
    assert not layer.training
    assert layer.weight_t.is_contiguous()
    back = layer.to_linear()
    assert type(back) is nn.Linear
    assert back.weight.is_contiguous()
    assert not back.weight.requires_grad
    assert not back.training
    assert back.state_dict().keys() == linear.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), linear.parameters(), strict=True))
    with torch.no_grad():  # copies, not views
        layer.weight_t.zero_()
    assert linear.weight.abs().sum() > 0


def reloaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("method", ["wina", "teal"])
@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        reloaded,
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_the_same(copied, method: str) -> None:
    layer, x = make_layer(method), activations(3)
    assert torch.equal(copied(layer)(x), layer(x))


def make_layer(method: str) -> ActivationSparseLinear:
    calibration = activations(100) if method == "teal" else None
    return ActivationSparseLinear.from_linear(make_linear(), 0.6, method, calibration)


@pytest.mark.parametrize("method", ["wina", "teal"])
def test_state_dicts_are_plain(method: str, tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    layer, x = make_layer(method), activations(3)
    state = layer.state_dict()
    assert list(state) == ["weight_t", "bias", *(["threshold"] if method == "teal" else [])]
    safetensors.save_file(state, tmp_path / "layer.safetensors")
    other = ActivationSparseLinear(70, 50, sparsity=0.6, method=method)
    other.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("assign", [False, True])
def test_a_dense_state_dict_can_be_loaded(assign: bool) -> None:
    linear, x = make_linear(), activations(2)
    model = nn.Sequential(ActivationSparseLinear(70, 50, sparsity=0.6))
    state = nn.Sequential(linear).state_dict()
    model.load_state_dict(state, assign=assign)
    assert "0.weight" in state  # the caller's dict is left as it was
    assert torch.equal(model(x), ActivationSparseLinear.from_linear(linear, 0.6)(x))
    assert model[0].weight_t.is_contiguous()
    teal = nn.Sequential(make_layer("teal"))
    threshold = teal[0].threshold.clone()
    teal.load_state_dict(state)
    assert torch.equal(teal[0].threshold, threshold)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({"0.weight": torch.zeros(50, 71), "0.bias": torch.zeros(50)})


def test_a_layer_made_on_meta_can_be_filled() -> None:
    layer = ActivationSparseLinear(70, 50, sparsity=0.6, device="meta")
    expected, x = make_layer("wina"), activations(2)
    layer.load_state_dict(expected.state_dict(), assign=True)
    assert torch.equal(layer(x), expected(x))


def test_norms_follow_the_weights() -> None:
    layer, x = make_layer("wina").eval(), activations(3)

    def is_right() -> bool:
        expected = reference.largest(x, layer.weight.detach().float().norm(dim=0), 70 - 42)
        return torch.equal(layer.kept_inputs(x), expected)

    with torch.no_grad():
        layer.weight_t[:30] *= 7
    assert is_right()
    layer.weight_t.data = layer.weight_t.data.flip(0).contiguous()
    assert is_right()
    layer.load_state_dict(make_linear().state_dict())
    assert is_right()
    optimizer = torch.optim.SGD(layer.train().parameters(), lr=100.0)
    layer(x).square().sum().backward()
    optimizer.step()
    assert is_right()
    with torch.inference_mode():
        assert is_right()
    assert is_right()


def test_a_layer_made_in_inference_mode_runs() -> None:
    with torch.inference_mode():
        layer = make_layer("wina")
        expected = layer(activations(2))
    with torch.no_grad():
        assert torch.equal(layer(activations(2)), expected)


@pytest.mark.parametrize("method", ["wina", "teal"])
def test_casts_keep_norms_and_threshold_in_float32(method: str) -> None:
    layer = make_layer(method)
    threshold = layer.threshold
    layer.to(torch.bfloat16)
    assert layer.weight_t.dtype == torch.bfloat16
    if threshold is not None:
        assert torch.equal(layer.threshold, threshold)
    else:
        assert layer.column_norm.dtype == torch.float32
    assert layer(activations(2).bfloat16()).dtype == torch.bfloat16
    assert layer.double()(activations(2).double()).dtype == torch.float64


def test_autocast_gives_its_dtype_and_leaves_the_weights() -> None:
    layer, x = make_layer("wina"), activations(3)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, layer(x.bfloat16().float()).bfloat16())
    found.sum().backward()
    assert layer.weight_t.grad.dtype == torch.float32


@pytest.mark.parametrize("method", ["wina", "teal"])
def test_it_trains(method: str) -> None:
    layer = make_layer(method)
    optimizer = tw.optim.AdamW(layer.parameters(), lr=3e-3)
    x, target = activations(200) / 10, normal(200, 50, seed=11)
    losses = []
    for _ in range(30):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("method", ["wina", "teal"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_compiled(method: str, tokens: int) -> None:
    layer, x = make_layer(method), activations(tokens)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    grads = []
    for module in (compiled, layer):
        layer.zero_grad()
        module(x).square().sum().backward()
        grads.append(layer.weight_t.grad.clone())
    torch.testing.assert_close(*grads)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


def test_it_says_what_it_is() -> None:
    expected = (
        "ActivationSparseLinear(in_features=70, out_features=50, bias=True, sparsity=0.6, method='wina')"
    )
    assert repr(make_layer("wina")) == expected


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (3, TypeError, "x must be a tensor, got int"),
        (torch.zeros(2, 71), ValueError, r"x must have shape \(\.\.\., 70\), got \(2, 71\)"),
        (torch.tensor(1.0), ValueError, "x must have shape"),
        (torch.zeros(2, 70).int(), TypeError, "x must have dtype"),
        (torch.zeros(2, 70).half(), TypeError, "dtype of the weights, float32, got float16"),
        (torch.zeros(2, 70, device="meta"), ValueError, "x must be on a CPU or CUDA device"),
    ],
)
def test_bad_input(x, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_layer("wina")(x)


def test_bad_construction() -> None:
    linear, x = make_linear(), activations(3)
    for sparsity in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"sparsity must be a number in \[0, 1\), got"):
            ActivationSparseLinear.from_linear(linear, sparsity)
    with pytest.raises(TypeError, match="sparsity must be a number"):
        ActivationSparseLinear.from_linear(linear, "half")
    with pytest.raises(ValueError, match="method must be 'wina' or 'teal', got 'wanda'"):
        ActivationSparseLinear.from_linear(linear, 0.5, "wanda")
    with pytest.raises(TypeError, match=r"linear must be a torch\.nn\.Linear, got Conv1d"):
        ActivationSparseLinear.from_linear(nn.Conv1d(1, 1, 1), 0.5)
    with pytest.raises(ValueError, match="takes its threshold from calibration"):
        ActivationSparseLinear.from_linear(linear, 0.5, "teal")
    with pytest.raises(ValueError, match="calibration is for method 'teal'"):
        ActivationSparseLinear.from_linear(linear, 0.5, "wina", x)
    with pytest.raises(ValueError, match="in_features must be a positive int"):
        ActivationSparseLinear(0, 5)
    with pytest.raises(TypeError, match="dtype must have dtype"):
        ActivationSparseLinear(5, 5, dtype=torch.int32)


def test_bad_calibration() -> None:
    layer, x = make_layer("teal"), activations(3)
    before = layer.threshold.clone()
    x[1, 1] = math.nan
    for wrong, message in ((x, "must be finite to calibrate with, got 1"), (x[:0], "holds no activations")):
        with pytest.raises(ValueError, match=message):
            layer.calibrate(wrong)
    with pytest.raises(ValueError, match="x must have shape"):
        layer.calibrate(torch.zeros(3, 7))
    assert torch.equal(layer.threshold, before)
    with pytest.raises(ValueError, match="'wina' needs no calibration"):
        make_layer("wina").calibrate(activations(3))
