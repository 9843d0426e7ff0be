"""The activation-sparse linear layer's ops: the choice of inputs and the product, on every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tilewright.testing
from reference import prune_activation as reference
from tilewright import _C
from tilewright.prune.activation_ops import FEW_TOKENS, ActivationSparse

keep_inputs = torch.ops.tilewright.keep_inputs
forward = torch.ops.tilewright.activation_sparse_fwd
step = torch.ops.tilewright.activation_sparse_step
HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALVES]
ATOL = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_keep(tokens: int, inputs: int, density: float = 0.4, seed: int = 3) -> Tensor:
    return torch.rand(tokens, inputs, generator=torch.Generator().manual_seed(seed)) < density


def make(
    tokens: int, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device, bias: bool = True
) -> dict[str, Any]:
    """The arguments of the product."""
    found = {
        "x": normal(tokens, inputs, dtype=dtype),
        "keep": random_keep(tokens, inputs),
        "weight_t": normal(inputs, outputs, dtype=dtype, seed=1) / max(inputs, 1) ** 0.5,
        "bias": normal(outputs, dtype=dtype, seed=2) if bias else None,
    }
    return {name: t if t is None else t.to(device) for name, t in found.items()}


def assert_close(arguments: dict[str, Any]) -> None:
    """The rule of error."""
    x, keep, weight_t, bias = arguments.values()
    ours = forward(*arguments.values())
    wide = [None if t is None else t.double() for t in (x, weight_t, bias)]
    exact = reference.linear(wide[0], keep, wide[1].t(), wide[2])
    plain = reference.linear(x, keep, weight_t.t(), bias)
    assert ours.shape == exact.shape
    assert ours.dtype == x.dtype
    if exact.numel() == 0:
        return
    error, usual = ((t.double() - exact).abs().max().item() for t in (ours, plain))
    scale = max(1.0, exact.abs().max().item())
    assert error <= 2 * usual + ATOL[x.dtype] * scale, f"error {error:.3g}, torch's {usual:.3g}"


# ---- which inputs a token keeps ----


@pytest.mark.parametrize("inputs", [1, 7, 31, 32, 33, 63, 65, 127, 129, 515])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_are_kept(backend, inputs: int, dtype: torch.dtype) -> None:
    x = normal(3, inputs, dtype=dtype).to(backend.device)
    scale = (normal(inputs, seed=1).abs() + 0.1).to(backend.device)
    for count in {0, 1, inputs // 4, inputs // 2, inputs - 1, inputs}:
        keep = keep_inputs(x, scale, None, count)
        assert torch.equal(keep, reference.largest(x, scale, count))
        assert (keep.sum(1) == count).all()


@pytest.mark.parametrize("inputs", [2047, 2049, 14336])
def test_the_largest_of_many(backend, inputs: int) -> None:
    x, scale = normal(1, inputs).to(backend.device), torch.ones(inputs, device=backend.device)
    for count in (inputs // 4, inputs // 2):
        assert torch.equal(keep_inputs(x, scale, None, count), reference.largest(x, scale, count))


@pytest.mark.parametrize("inputs", [40, 700])
def test_the_first_of_equals_are_kept(backend, inputs: int) -> None:
    coarse = (normal(4, inputs) * 2).round() / 2
    scale = torch.ones(inputs)
    for x in (coarse, torch.zeros(2, inputs), torch.full((1, inputs), -3.0)):
        for count in (1, inputs // 3, inputs - 1):
            keep = keep_inputs(x.to(backend.device), scale.to(backend.device), None, count)
            assert torch.equal(keep.cpu(), reference.largest(x, scale, count))


def test_signs_zeros_infinities_and_nan_are_ordered(backend) -> None:
    x = torch.tensor([[0.0, -0.0, 1e-40, -2.0, 1.0, math.inf, math.nan, -1e30]], device=backend.device)
    scale, order = torch.ones(8, device=backend.device), []
    for count in range(1, 9):
        kept = set(keep_inputs(x, scale, None, count)[0].nonzero().flatten().tolist())
        order.append((kept - set(order)).pop())
        assert len(kept) == count
    assert order == [6, 5, 7, 3, 4, 2, 0, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_above_a_threshold_is_kept(backend, dtype: torch.dtype) -> None:
    x = normal(5, 129, dtype=dtype)
    x[0, 3], x[1, 7], x[2, 5] = math.nan, 0.0, -math.inf
    for value in (-1.0, 0.0, float(x[3, 3].abs()), 0.5, math.inf, math.nan):
        threshold = torch.tensor(value)
        keep = keep_inputs(x.to(backend.device), None, threshold.to(backend.device), 0)
        assert torch.equal(keep.cpu(), reference.above(x, threshold))


def test_choice_in_float64() -> None:
    x, scale = normal(3, 130, dtype=torch.float64), normal(130, dtype=torch.float64, seed=1).abs()
    x[1] = x[0] * (1 + 1e-12)
    assert torch.equal(keep_inputs(x, scale, None, 40), reference.largest(x, scale, 40))
    threshold = x[0, 0].abs()
    assert torch.equal(keep_inputs(x, None, threshold, 0), reference.above(x, threshold))


def test_choice_reads_any_strides(backend) -> None:
    x, scale = normal(40, 6).to(backend.device), torch.ones(40, device=backend.device)
    assert torch.equal(keep_inputs(x.t(), scale, None, 11), reference.largest(x.t(), scale, 11))
    one = x[:, :1].t().expand(3, 40)
    assert torch.equal(keep_inputs(one, scale, None, 11), reference.largest(one, scale, 11))


# ---- the product ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 9, 20])
def test_product_is_that_of_masked_inputs(backend, tokens: int, dtype: torch.dtype) -> None:
    """Each token applies its own mask: TEAL's kernel is right for one token alone (TEAL issue 12)."""
    for inputs, outputs in ((1, 1), (37, 65), (130, 127), (64, 264)):
        assert_close(make(tokens, inputs, outputs, dtype, backend.device))
    assert_close(make(tokens, 65, 33, dtype, backend.device, bias=False))


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("outputs", [1, 7, 63, 65, 127, 129, 2047, 2049, 5000])
def test_numbers_of_outputs(backend, outputs: int, tokens: int) -> None:
    if backend.name == "emulated" and outputs > 2049:
        outputs = 300
    assert_close(make(tokens, 45, outputs, torch.float32, backend.device))
    assert_close(make(tokens, 45, outputs, torch.bfloat16, backend.device))


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("inputs", [511, 513, 1100, 3000])
def test_sums_of_several_blocks_of_rows(backend, inputs: int, tokens: int) -> None:
    assert_close(make(tokens, inputs, 40, torch.float32, backend.device))


@pytest.mark.parametrize("tokens", [1, 3, 8, 9])
def test_product_in_float64(tokens: int) -> None:
    assert_close(make(tokens, 300, 70, torch.float64, torch.device("cpu")))


@pytest.mark.parametrize("tokens", [1, 2, 8])
def test_nothing_and_everything_kept(backend, tokens: int) -> None:
    arguments = make(tokens, 70, 50, torch.float32, backend.device)
    arguments["keep"] = torch.zeros_like(arguments["keep"])
    assert torch.equal(forward(*arguments.values()), arguments["bias"].expand(tokens, 50))
    arguments["keep"] = torch.ones_like(arguments["keep"])
    assert_close(arguments)


def test_empty(backend) -> None:
    for tokens, inputs, outputs in ((0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0)):
        assert_close(make(tokens, inputs, outputs, torch.float32, backend.device))
    empty = torch.empty(0, 5, device=backend.device)
    assert keep_inputs(empty, torch.ones(5, device=backend.device), None, 2).shape == (0, 5)


def test_what_no_token_keeps_is_not_read(backend) -> None:
    """Neither its weights nor its x reach the result, whatever they are."""
    for tokens in (1, 2, 8):
        arguments = make(tokens, 60, 40, torch.float32, backend.device)
        keep = arguments["keep"] = random_keep(1, 60).expand(tokens, 60).contiguous().to(backend.device)
        expected = forward(*arguments.values())
        arguments["x"][~keep] = math.nan
        arguments["weight_t"][~keep[0]] = math.nan
        assert torch.equal(forward(*arguments.values()), expected)


def test_nan_and_infinity_reach_their_token_alone(backend) -> None:
    arguments = make(3, 40, 30, torch.float32, backend.device)
    arguments["keep"][:, 4] = True
    expected = forward(*arguments.values())
    arguments["x"][1, 4] = math.inf
    found = forward(*arguments.values())
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[2], expected[2])
    assert not found[1].isfinite().any()


def test_strides_are_honoured(backend) -> None:
    plain = make(5, 40, 48, torch.float32, backend.device)
    expected = forward(*plain.values())
    turned = plain["x"].t().contiguous().t()
    assert torch.equal(forward(*(plain | {"x": turned}).values()), expected)
    wide = torch.full((40, 61), math.nan, device=backend.device)
    for offset in (0, 3):  # rows that are a multiple of no vector, or begin at none
        part = wide[:, offset : offset + 48].copy_(plain["weight_t"])
        torch.testing.assert_close(forward(*(plain | {"weight_t": part}).values()), expected)


def test_repeats_and_threads_give_the_same_bits() -> None:
    before = torch.get_num_threads()
    for tokens in (1, 4):
        arguments, found = make(tokens, 3000, 5000, torch.float32, torch.device("cpu")), []
        try:
            for threads in (1, 2, 3, 1):
                torch.set_num_threads(threads)
                found.append(forward(*arguments.values()))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(found[0], other) for other in found[1:])


def test_seeds_of_the_emulator_give_the_same_bits() -> None:
    arguments = make(3, 200, 300, torch.bfloat16, torch.device("cpu"))
    scale, found = torch.ones(200), []
    for seed in range(3):
        with tilewright.testing.emulated(seed=seed):
            keep = keep_inputs((arguments["x"] * 4).round(), scale, None, 77)
            found.append((keep, forward(*(arguments | {"keep": keep}).values())))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 10),
    inputs=st.integers(0, 600),
    outputs=st.integers(0, 200),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    density=st.floats(0, 1),
    bias=st.booleans(),
    turned=st.booleans(),
)
def test_any_shapes(tokens, inputs, outputs, dtype, density, bias, turned) -> None:
    arguments = make(tokens, inputs, outputs, dtype, torch.device("cpu"), bias)
    arguments["keep"] = random_keep(tokens, inputs, density)
    if turned:
        arguments["x"] = arguments["x"].t().contiguous().t()
    assert_close(arguments)


# ---- both at once ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 3, 8, 9])
def test_a_step_is_the_choice_and_the_product(backend, tokens: int, dtype: torch.dtype) -> None:
    """To the bit."""
    for inputs, outputs in ((1, 1), (70, 33), (600, 65)):
        x, _, weight_t, bias = make(tokens, inputs, outputs, dtype, backend.device).values()
        scale = (normal(inputs, seed=1).abs() + 0.1).to(backend.device)
        for choice in ((scale, None), (None, scale[:1])):
            expected = forward(x, keep_inputs(x, *choice, inputs // 3), weight_t, bias)
            assert torch.equal(step(x, *choice, inputs // 3, weight_t, bias), expected)


def test_a_step_with_bad_input() -> None:
    x, scale, weight_t = torch.zeros(2, 5), torch.ones(5), torch.zeros(5, 4)
    for arguments, error, message in (
        ((x, None, None, 2, weight_t, None), ValueError, "one of them must be given"),
        ((x, scale, None, 2, weight_t[:4], None), ValueError, "weight_t: must have shape"),
        ((x, scale.double(), None, 2, weight_t, None), TypeError, "scale must have dtype float32, got"),
        ((x, scale, None, 2, weight_t, torch.zeros(3)), ValueError, "bias must have 4 elements, got 3"),
    ):
        with pytest.raises(error, match=message):
            step(*arguments)


# ---- as torch ops ----


@pytest.mark.parametrize("tokens", [1, 3, FEW_TOKENS + 1])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(tokens: int, bias: bool) -> None:
    arguments = make(tokens, 9, 6, torch.float64, torch.device("cpu"), bias)
    leaves = [None if t is None else t.requires_grad_(t.is_floating_point()) for t in arguments.values()]
    assert torch.autograd.gradcheck(ActivationSparse.apply, leaves)


def test_gradients_pass_through_kept_inputs_alone(backend) -> None:
    arguments = make(4, 70, 33, torch.float32, backend.device)
    x, keep, weight_t, bias = (t.requires_grad_(t.is_floating_point()) for t in arguments.values())
    dy = normal(4, 33, seed=5).to(backend.device)
    ours = torch.autograd.grad(ActivationSparse.apply(x, keep, weight_t, bias), (x, weight_t, bias), dy)
    plain = torch.autograd.grad(reference.linear(x, keep, weight_t.t(), bias), (x, weight_t, bias), dy)
    for ours_of, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(ours_of, expected, atol=1e-5, rtol=1e-5)
    assert (ours[0][~keep] == 0).all()


def test_there_is_no_second_derivative() -> None:
    x, keep, weight_t, bias = make(2, 5, 4, torch.float32, torch.device("cpu")).values()
    y = ActivationSparse.apply(x.requires_grad_(), keep, weight_t, bias)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_opcheck() -> None:
    for tokens in (2, FEW_TOKENS + 1):
        arguments = make(tokens, 33, 20, torch.float32, torch.device("cpu"))
        torch.library.opcheck(forward.default, tuple(arguments.values()))
        torch.library.opcheck(keep_inputs.default, (arguments["x"], torch.rand(33), None, 9))
        torch.library.opcheck(keep_inputs.default, (arguments["x"], None, torch.tensor(0.5), 9))
        step_arguments = (arguments["x"], torch.rand(33), None, 9, arguments["weight_t"], arguments["bias"])
        torch.library.opcheck(step.default, step_arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 6)}, ValueError, "keep: must have shape"),
        ({"x": torch.zeros(2, 5).int()}, TypeError, "x must have dtype .*, got int32"),
        ({"x": torch.zeros(2, 5, 1)}, ValueError, "x: must have shape"),
        ({"keep": torch.zeros(2, 5)}, TypeError, "keep must have dtype .*, got float32"),
        ({"weight_t": torch.zeros(6, 4)}, ValueError, "weight_t: must have shape"),
        ({"weight_t": torch.zeros(4, 5).t()}, ValueError, "weight_t: the weights of an input must lie"),
        ({"weight_t": torch.zeros(5, 4).double()}, TypeError, "weight_t must have dtype .*, got float64"),
        ({"bias": torch.zeros(3)}, ValueError, "bias must have .* elements, got 3"),
    ],
)
def test_bad_input(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    arguments = make(2, 5, 4, torch.float32, torch.device("cpu")) | change
    with pytest.raises(error, match=message):
        forward(*arguments.values())


def test_bad_choice_and_workspace() -> None:
    x, scale = torch.zeros(2, 5), torch.ones(5)
    with pytest.raises(ValueError, match="one of them must be given"):
        keep_inputs(x, None, None, 2)
    with pytest.raises(ValueError, match=r"scale must have .* elements, got 4"):
        keep_inputs(x, torch.ones(4), None, 2)
    with pytest.raises(TypeError, match=r"scale must have dtype .*, got float64"):
        keep_inputs(x, scale.double(), None, 2)
    with pytest.raises(ValueError, match=r"workspace must have .* elements, got 0"):
        _C.keep_inputs(x, scale, None, 2, x > 0, torch.empty(0, dtype=torch.uint8), 1)
