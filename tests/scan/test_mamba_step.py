"""The decode step of a whole Mamba layer: against float64, dtypes, strides, states, as a torch op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tilewright.testing
from reference import mamba_step as reference
from tilewright.nn import Mamba
from tilewright.scan import mamba_step

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
ATOL = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
STATES = ("conv_state", "ssm_state")


def make(
    batch: int = 2,
    d_model: int = 24,
    dim: int = 33,
    states: int = 16,
    rank: int = 5,
    dtype: torch.dtype = torch.float32,
    *,
    width: int = 4,
    state_length: int | None = None,
    state_dtype: torch.dtype | None = None,
    biases: bool = True,
    norms: bool = False,
    features: int | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of a layer of these sizes; the recurrence's are float32 unless all is float64."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, scale: float = 1.0, to: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(to).to(device)

    features = features or d_model
    length = max(width - 1, 0) if state_length is None else state_length
    found: dict[str, Any] = {
        "hidden_states": normal(batch, d_model),
        "conv_state": normal(batch, dim, length),
        "ssm_state": normal(batch, dim, states, to=state_dtype or wide),
        "in_proj_weight": normal(2 * dim, d_model, scale=d_model**-0.5),
        "in_proj_bias": normal(2 * dim) if biases else None,
        "conv1d_weight": normal(dim, width, scale=0.5),
        "conv1d_bias": normal(dim) if biases else None,
        "x_proj_weight": normal(rank + 2 * states, dim, scale=dim**-0.5),
        "dt_proj_weight": normal(dim, rank, scale=0.3),
        "dt_proj_bias": normal(dim, to=wide) if biases else None,
        "A_log": normal(dim, states, scale=0.5, to=wide),
        "D": normal(dim, to=wide) if biases else None,
        "out_proj_weight": normal(features, dim, scale=dim**-0.5),
        "out_proj_bias": normal(features) if biases else None,
    }
    if norms:
        found |= {"b_rms_weight": normal(states, to=wide), "c_rms_weight": None}
        found |= {"dt_rms_weight": normal(rank), "b_c_dt_rms_eps": 1e-5}
    return found


def double(arguments: dict[str, Any]) -> dict[str, Any]:
    return {n: t.double() if isinstance(t, Tensor) else t for n, t in arguments.items()}


def run(arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    states = {n: arguments[n].clone() for n in STATES}
    return mamba_step(**{**arguments, **states}), *states.values()


def assert_close(arguments: dict[str, Any]) -> None:
    """The rule of error, for out and the new states, all of which the layer's dtype rounds on the way."""
    exact = reference.mamba_step(**double(arguments))
    plain = reference.mamba_step(**arguments)
    atol = ATOL[arguments["hidden_states"].dtype]
    for name, ours, truth, usual in zip(("out", *STATES), run(arguments), exact, plain, strict=True):
        if truth.numel() == 0:
            continue
        scale = max(1.0, float(truth.abs().max()))
        error = float((ours.double() - truth).abs().max())
        allowed = 2 * float((usual.to(ours.dtype).double() - truth).abs().max()) + atol * scale
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("batch", [1, 2, 4, 5, 9])
def test_numbers_of_sequences(backend, batch: int) -> None:
    assert_close(make(batch, device=backend.device))


@pytest.mark.parametrize("size", [1, 7, 63, 65, 127, 129])
def test_sizes(backend, size: int) -> None:
    assert_close(make(1, size, 17, device=backend.device))
    assert_close(make(3, 8, min(size, 65), states=7, rank=size, features=size, device=backend.device))


@pytest.mark.parametrize("states", [1, 7, 16, 17, 64, 129])
def test_numbers_of_states(backend, states: int) -> None:
    assert_close(make(2, 16, 9, states, device=backend.device))
    assert_close(make(2, 16, 9, states, norms=True, device=backend.device))


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
def test_widths_and_lengths_of_the_state(backend, width: int) -> None:
    for length in (width - 1, width, width + 3):
        assert_close(make(2, 8, 19, 4, width=width, state_length=length, device=backend.device))


@pytest.mark.parametrize("state_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes(backend, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    for norms in (False, True):
        assert_close(
            make(3, 40, 33, dtype=dtype, state_dtype=state_dtype, norms=norms, device=backend.device)
        )
    assert_close(make(1, 64, 32, dtype=dtype, biases=False, device=backend.device))  # whole vectors


def test_float64() -> None:
    arguments = make(3, 24, 33, dtype=torch.float64, norms=True)
    for ours, truth in zip(run(arguments), reference.mamba_step(**arguments), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_no_sequences(backend) -> None:
    assert run(make(0, device=backend.device))[0].shape == (0, 24)


def _spread(tensor: Tensor) -> Tensor:
    """The same numbers at every other place of a transposed memory."""
    wide = torch.full((*reversed(tensor.shape), 2), 7.0, dtype=tensor.dtype, device=tensor.device)
    view = wide[..., 0].permute(*reversed(range(tensor.dim())))
    return view.copy_(tensor)


def test_strides(backend) -> None:
    arguments = make(3, norms=True, device=backend.device)
    spread = {n: _spread(t) if isinstance(t, Tensor) else t for n, t in arguments.items()}
    spread["hidden_states"] = arguments["hidden_states"].repeat(1, 2)[:, :24]  # rows apart
    out = mamba_step(**spread)
    expected = run(arguments)
    for ours, truth in zip((out, *(spread[n] for n in STATES)), expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)


def test_same_bits(backend) -> None:
    arguments = make(5, 70, 65, device=backend.device)
    first = run(arguments)
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(run(arguments), first, strict=True))


def test_same_bits_for_any_number_of_threads() -> None:
    arguments = make(3, 300, 700)  # more than a thread takes
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(arguments))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


def test_same_bits_for_any_seed() -> None:
    found = []
    for seed in range(3):
        with tilewright.testing.emulated(seed=seed):
            found.append(run(make(2, norms=True)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


def test_nan_stays_in_its_sequence(backend) -> None:
    arguments = make(3, device=backend.device)
    clean = run(arguments)[0]
    arguments["hidden_states"][1, 3] = float("nan")
    out = run(arguments)[0]
    assert out[1].isnan().all()
    assert torch.equal(out[::2], clean[::2])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*[st.integers(1, 40)] * 3),
    batch=st.integers(0, 6),
    rank=st.integers(1, 20),
    width=st.integers(1, 8),
    extra=st.integers(0, 2),
    dtype=st.sampled_from(FLOATS),
    biases=st.booleans(),
    norms=st.booleans(),
)
def test_any_sizes(sizes, batch, rank, width, extra, dtype, biases, norms) -> None:
    assert_close(
        make(
            batch,
            *sizes,
            rank,
            dtype,
            width=width,
            state_length=width - 1 + extra,
            biases=biases,
            norms=norms,
        )
    )


def test_token_by_token_is_forward() -> None:
    torch.manual_seed(0)
    layer = Mamba(16, d_state=8).double()
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    with torch.no_grad():
        whole = layer(x)
        states = layer.allocate_inference_cache(2, 11)
        tokens = [layer.step(x[:, t : t + 1], *states)[0] for t in range(11)]
    torch.testing.assert_close(torch.cat(tokens, 1), whole, rtol=1e-10, atol=1e-10)


def test_hooks_on_the_projections_are_called() -> None:
    layer, calls = Mamba(16), []
    states = layer.allocate_inference_cache(1, 1)
    layer.out_proj.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        layer.step(torch.randn(1, 1, 16), *states)
    assert calls == [1]


def test_opcheck() -> None:
    arguments = make()
    names = [a.name for a in torch.ops.tilewright.mamba_step.default._schema.arguments]
    torch.library.opcheck(torch.ops.tilewright.mamba_step.default, tuple(arguments.get(n) for n in names))


def test_compile() -> None:
    arguments = make(norms=True)
    eager = run(arguments)
    compiled = torch.compile(run, fullgraph=True)(arguments)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def test_writing_the_states_is_noticed() -> None:
    arguments = make()
    weight = torch.ones_like(arguments["ssm_state"], requires_grad=True)
    loss = (weight * arguments["ssm_state"]).sum()
    with torch.no_grad():
        mamba_step(**arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def _changed(name: str, value: Any) -> dict[str, Any]:
    return make() | {name: value}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (_changed("hidden_states", torch.zeros(2, 1, 24)), ValueError, r"hidden_states must have shape"),
        (_changed("hidden_states", 3), TypeError, "hidden_states must be a tensor"),
        (_changed("hidden_states", torch.zeros(2, 24, dtype=torch.int32)), TypeError, "float64, got int32"),
        (_changed("hidden_states", torch.zeros(24, 2).t()), ValueError, "must have features side by side"),
        (_changed("in_proj_weight", torch.zeros(65, 24)), ValueError, "in_proj_weight must have shape"),
        (_changed("in_proj_weight", torch.zeros(66, 23)), ValueError, "in_proj_weight must .* got"),
        (_changed("in_proj_weight", torch.zeros(66, 24).half()), TypeError, "in_proj_weight must have"),
        (_changed("in_proj_bias", torch.zeros(33)), ValueError, "in_proj_bias"),
        (_changed("conv1d_weight", torch.zeros(33, 9)), ValueError, "must have a width of 1 to 8, got 9"),
        (_changed("conv_state", torch.zeros(2, 33, 2)), ValueError, "at least width - 1 = 3, got 2"),
        (_changed("conv_state", torch.zeros(3, 33, 3)), ValueError, "conv_state must have shape"),
        (_changed("conv_state", torch.zeros(1, 33, 3).expand(2, 33, 3)), ValueError, "conv_state .* clone"),
        (_changed("ssm_state", torch.zeros(2, 1, 16).expand(2, 33, 16)), ValueError, "ssm_state .* clone"),
        (_changed("ssm_state", torch.zeros(2, 33, 15)), ValueError, "ssm_state must have shape"),
        (_changed("ssm_state", torch.zeros(2, 33, 16).double()), TypeError, "ssm_state must have dtype"),
        (_changed("x_proj_weight", torch.zeros(38, 33)), ValueError, "with rank = 5, got"),
        (_changed("A_log", torch.zeros(33)), ValueError, "A_log must have shape"),
        (_changed("out_proj_weight", torch.zeros(24, 32)), ValueError, "out_proj_weight"),
        (_changed("b_rms_weight", torch.ones(16)), ValueError, "b_c_dt_rms_eps must be given"),
        (make(norms=True) | {"dt_rms_weight": torch.ones(4)}, ValueError, "dt_rms_weight must have shape"),
        (_changed("D", torch.zeros(33, requires_grad=True)), NotImplementedError, "D requires a gradient"),
    ],
)  # fmt: skip
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    before = {n: arguments[n].clone() for n in STATES}
    with pytest.raises(error, match=message):
        mamba_step(**arguments)
    assert all(torch.equal(arguments[n], before[n]) for n in STATES)


def test_float64_stays_on_the_cpu() -> None:
    with (
        tilewright.testing.emulated(),
        pytest.raises(TypeError, match="float32, float16, bfloat16 on a CUDA device, got float64"),
    ):
        mamba_step(**make(dtype=torch.float64))
