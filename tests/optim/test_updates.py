"""Every optimizer against its formula in float64: parameters and states, step by step."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_cases import CASES, FLOATS, SIZES, assert_error_rule, decoded, make, moments, parameters, set_grads
from torch import Tensor

from reference import optim as reference
from reference.optim import Options
from tilewright.optim import create_dynamic_map


def assert_state(state: dict, suffix: str, exact: Tensor, plain: Tensor, atol: float) -> None:
    """A float32 state obeys the error rule; codes are the nearest ones to the exact new value.

    A second moment is not rounded to zero.
    """
    if state["state" + suffix].dtype == torch.float32:
        assert_error_rule(state["state" + suffix], exact, plain, atol)
        return
    code = create_dynamic_map(suffix == "1")
    codes, absmax = reference.quantize(exact, code, 256)
    if suffix == "2":
        codes = reference.keep_positive(codes, exact)
    torch.testing.assert_close(state["absmax" + suffix].cpu().double(), absmax, rtol=1e-6, atol=atol)
    scale = reference.expand(absmax, exact.numel(), 256).view(exact.shape)
    best = (reference.dequantize(codes, code, absmax, 256) - exact).abs()
    assert bool(((decoded(state, suffix) - exact).abs() <= best + 1e-6 * scale + atol).all())


def check_steps(o: Options, params: list[Tensor], optimizer: torch.optim.Optimizer, steps: int) -> None:
    for t in range(1, steps + 1):
        set_grads(params, t)
        before = [(p.detach().cpu().clone(), p.grad.cpu(), *moments(optimizer, p)) for p in params]
        optimizer.step()
        for p, (old, g, m, v) in zip(params, before, strict=True):
            exact = reference.update(o, t, old.double(), g.double(), m, v)
            plain = reference.update(o, t, old.float(), g.float(), m.float(), v.float())
            rounding = torch.finfo(p.dtype).eps / 2 * float(exact[0].abs().max()) if p.numel() else 0.0
            assert_error_rule(p.detach(), exact[0], plain[0].to(p.dtype), atol=1e-9 + rounding)
            state = optimizer.state[p]
            assert int(state["step"]) == t
            # Where terms cancel, or one element is all there is, plain PyTorch may err by nothing at all.
            largest = max([float(x.abs().max()) for x in (old, g, m) if x.numel()], default=0.0)
            assert_state(state, "1", exact[1], plain[1], largest * 2.0**-23)
            if "state2" in state:
                assert_state(state, "2", exact[2], plain[2], largest**2 * (1 - o.betas[1]) * 2.0**-22)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_8bit_states(backend, name: str, dtype: torch.dtype) -> None:
    params = parameters(SIZES, dtype, backend.device)
    optimizer = make(CASES[name], params, min_8bit_size=0)
    check_steps(CASES[name], params, optimizer, 3)
    assert all(optimizer.state[p]["state1"].dtype == torch.uint8 for p in params)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_32bit_states(backend, name: str, dtype: torch.dtype) -> None:
    params = parameters(SIZES, dtype, backend.device)
    optimizer = make(CASES[name], params, min_8bit_size=10**6)
    check_steps(CASES[name], params, optimizer, 3)
    assert all(optimizer.state[p]["state1"].dtype == torch.float32 for p in params)


@given(
    o=st.builds(
        Options,
        kind=st.sampled_from(["adamw", "adam", "lion", "sgd"]),
        lr=st.floats(0, 0.1),
        betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.999)),
        eps=st.floats(1e-8, 0.1),
        weight_decay=st.floats(0, 1),
        momentum=st.floats(0.01, 0.99),
        nesterov=st.booleans(),
        maximize=st.booleans(),
    ),
    sizes=st.lists(st.integers(0, 700), min_size=1, max_size=4),
    dtype=st.sampled_from(FLOATS),
    smallest=st.sampled_from([0, 256]),
)
@settings(deadline=None)
def test_any_settings_and_sizes(o: Options, sizes: list[int], dtype: torch.dtype, smallest: int) -> None:
    params = parameters(sizes, dtype, torch.device("cpu"))
    check_steps(o, params, make(o, params, min_8bit_size=smallest), 2)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd_nesterov"])
def test_small_tensors_keep_32_bits(backend, name: str) -> None:
    params = parameters([4095, 4096], torch.float32, backend.device)
    optimizer = make(CASES[name], params)
    check_steps(CASES[name], params, optimizer, 2)
    assert [optimizer.state[p]["state1"].dtype for p in params] == [torch.float32, torch.uint8]


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_shapes_without_elements_and_without_axes(backend, name: str) -> None:
    params = parameters([(0,), (), (3, 0, 2), (1, 1, 300)], torch.float32, backend.device)
    optimizer = make(CASES[name], params, min_8bit_size=0)
    check_steps(CASES[name], params, optimizer, 2)


def test_only_empty_tensors(backend) -> None:
    params = parameters([(0,), (0, 4)], torch.float32, backend.device)
    optimizer = make(CASES["adamw"], params, max_grad_norm=1.0)
    check_steps(CASES["adamw"], params, optimizer, 2)


@pytest.mark.parametrize("name", ["adamw", "adam", "lion", "sgd_decay"])
@pytest.mark.parametrize("exponent", [-30, -12, 10])
def test_gradients_of_any_magnitude(backend, name: str, exponent: int) -> None:
    params = parameters([300, 5000], torch.float32, backend.device)
    optimizer = make(CASES[name], params, min_8bit_size=0)
    for t in range(1, 4):
        set_grads(params, t, scale=10.0**exponent)
        before = [(p.detach().cpu().double(), p.grad.cpu().double(), *moments(optimizer, p)) for p in params]
        optimizer.step()
        for p, old in zip(params, before, strict=True):
            exact = reference.update(CASES[name], t, *old)
            plain = reference.update(CASES[name], t, *(x.float() for x in old))
            assert_error_rule(p.detach(), exact[0], plain[0], atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_a_free_run_with_32_bits_stays_with_the_reference(name: str) -> None:
    o = CASES[name]
    (p,) = parameters([3000], torch.float32, torch.device("cpu"))
    optimizer = make(o, [p], min_8bit_size=10**6)
    zeros = torch.zeros(3000)
    exact, plain = (p.detach().double(), zeros.double(), zeros.double()), (p.detach().clone(), zeros, zeros)
    for t in range(1, 31):
        set_grads([p], t)
        exact = reference.update(o, t, exact[0], p.grad.double(), *exact[1:])
        plain = reference.update(o, t, plain[0], p.grad, *plain[1:])
        optimizer.step()
    assert_error_rule(p.detach(), exact[0], plain[0], atol=1e-7)


def quantized(x: Tensor, signed: bool) -> Tensor:
    code = create_dynamic_map(signed)
    codes, absmax = reference.quantize(x, code, 256)
    if not signed:
        codes = reference.keep_positive(codes, x)
    return reference.dequantize(codes, code, absmax, 256)


@pytest.mark.parametrize("name", ["adamw", "adam", "lion", "sgd_nesterov"])
def test_a_free_run_with_8_bits_stays_with_the_quantized_reference(name: str) -> None:
    """A code may fall to the other side of a midpoint now and then, so this compares means."""
    o = CASES[name]
    (p,) = parameters([20_000], torch.float32, torch.device("cpu"))
    optimizer = make(o, [p])
    exact = [p.detach().double(), torch.zeros(20_000).double(), torch.zeros(20_000).double()]
    unquantized = list(exact)
    for t in range(1, 21):
        set_grads([p], t)
        g = p.grad.double()
        exact = list(reference.update(o, t, exact[0], g, *exact[1:]))
        exact[1:] = quantized(exact[1], True), quantized(exact[2], False)
        unquantized = list(reference.update(o, t, unquantized[0], g, *unquantized[1:]))
        optimizer.step()
    error = float((p.detach().double() - exact[0]).abs().mean())
    cost_of_8_bits = float((unquantized[0] - exact[0]).abs().mean())
    assert error <= 0.01 * cost_of_8_bits + 1e-7


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_zero_gradients_only_decay(backend, name: str) -> None:
    o = CASES[name]
    params = parameters([300, 4096], torch.float32, backend.device)
    before = [p.detach().cpu().double() for p in params]
    optimizer = make(o, params, min_8bit_size=0)
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    factor = (1 - o.lr * o.weight_decay) ** 3 if o.kind != "sgd" else 1.0
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach().cpu().double(), old * factor, rtol=1e-6, atol=0.0)
        assert float(decoded(optimizer.state[p], "1").abs().max()) == 0.0


def test_first_step_of_sgd_takes_the_gradient_whole(backend) -> None:
    """torch sets the buffer to the gradient, dampening or not; bitsandbytes ignores dampening altogether."""
    params = parameters([256], torch.float32, backend.device)
    optimizer = make(Options("sgd", dampening=0.9), params, min_8bit_size=0)
    params[0].grad = torch.full_like(params[0], 0.5)
    optimizer.step()
    assert bool((decoded(optimizer.state[params[0]], "1") == 0.5).all())


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("name", ["adamw", "adam", "lion", "sgd", "sgd_nesterov"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_stays_put(backend, name: str, bad: float, bits: int) -> None:
    """As in torch its own parameter is lost (or moves by lr, for sign(inf)), and no other element notices."""

    def make_run(poison: bool) -> tuple[torch.Tensor, torch.Tensor]:
        params = parameters([600], torch.float32, backend.device)
        optimizer = make(CASES[name], params, min_8bit_size=0 if bits == 8 else 10**6)
        for t in range(3):
            set_grads(params, t)
            params[0].grad[300] = 0.0
            if poison and t == 1:
                params[0].grad[300] = bad
            optimizer.step()
        return params[0].detach().cpu(), decoded(optimizer.state[params[0]], "1")

    (clean, clean_m), (dirty, dirty_m) = make_run(False), make_run(True)
    others = torch.arange(600) != 300
    assert torch.equal(clean[others], dirty[others])
    assert torch.equal(clean_m[others], dirty_m[others])
    if not (name == "lion" and math.isinf(bad)):
        assert not math.isfinite(dirty[300])
    if bits == 8:
        assert dirty_m[300] == 0.0


def test_a_gradient_whose_square_overflows_does_not_blow_up_later(backend) -> None:
    """v is infinite then, which 8 bits cannot hold; m must not be left to be divided by a small v."""
    params = parameters([300], torch.float32, backend.device)
    optimizer = make(Options("adamw", lr=1e-3), params, min_8bit_size=0)
    before = params[0].detach().cpu().clone()
    for t in range(4):
        params[0].grad = torch.full_like(params[0], 1e-2)
        if t == 1:
            params[0].grad[7] = 1e25
        optimizer.step()
    assert float((params[0].detach().cpu() - before).abs().max()) <= 1e-2


def test_second_moments_that_are_small_in_their_block_do_not_blow_up() -> None:
    """Gradients in one block that differ by four decades: with float32 states no step is longer than lr."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.exp(1.5 * torch.randn(4096, generator=generator))
    p = torch.nn.Parameter(torch.zeros(4096))
    optimizer = make(Options("adamw", lr=1e-3), [p])
    for _ in range(200):
        before = p.detach().clone()
        p.grad = scale * torch.randn(4096, generator=generator) * 1e-3
        optimizer.step()
        assert float((p.detach() - before).abs().max()) <= 5e-3
