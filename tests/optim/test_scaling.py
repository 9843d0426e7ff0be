"""Clipping by the global norm, and GradScaler."""

import math

import pytest
import torch
from optim_cases import (
    CASES,
    FLOATS,
    assert_error_rule,
    assert_same_bits,
    make,
    moments,
    parameters,
    run,
    set_grads,
    snapshot,
)

import tilewright as tw
from reference import optim as reference


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ["adamw", "adam", "lion", "sgd_nesterov"])
@pytest.mark.parametrize("max_norm", [0.1, 1e4])
def test_clipping(backend, name: str, dtype: torch.dtype, max_norm: float) -> None:
    o = CASES[name]
    params = parameters([300, 4097, 1], dtype, backend.device)
    optimizer = make(o, params, max_grad_norm=max_norm)
    for t in range(1, 3):
        set_grads(params, t)
        before = [(p.detach().cpu(), p.grad.cpu().clone(), *moments(optimizer, p)) for p in params]
        before = [tuple(x.clone() for x in row) for row in before]
        factor = reference.clip_coefficient([row[1] for row in before], max_norm)
        optimizer.step()
        for p, (old, g, m, v) in zip(params, before, strict=True):
            assert torch.equal(p.grad.cpu(), g)
            exact = reference.update(o, t, old.double(), g.double() * factor, m, v)
            plain = reference.update(o, t, old.float(), g.float() * factor, m.float(), v.float())
            assert_error_rule(p.detach(), exact[0], plain[0].to(dtype), atol=1e-9)


def test_clipping_is_torchs(backend) -> None:
    ours, theirs = (parameters([300, 4097], torch.float32, backend.device) for _ in range(2))
    clipped, plain = tw.optim.AdamW8bit(ours, max_grad_norm=0.5), tw.optim.AdamW8bit(theirs)
    for step in range(3):
        set_grads(ours, step)
        set_grads(theirs, step)
        torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        clipped.step()
        plain.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_norm_below_the_limit_changes_no_bit(backend) -> None:
    results = []
    for more in ({}, {"max_grad_norm": 1e6}):
        params = parameters([300, 4097], torch.bfloat16, backend.device)
        optimizer = tw.optim.AdamW8bit(params, **more)
        run(optimizer, 2)
        results.append(snapshot(optimizer))
    assert_same_bits(*results)


def test_the_norm_is_over_all_groups_and_only_over_gradients_there_are(backend) -> None:
    params = [torch.nn.Parameter(torch.zeros(4, device=backend.device)) for _ in range(3)]
    params[0].grad = torch.tensor([3.0, 0, 0, 0], device=backend.device)
    params[1].grad = torch.tensor([0, 4.0, 0, 0], device=backend.device)
    optimizer = tw.optim.SGD8bit([{"params": [p]} for p in params], lr=1.0, momentum=0.5, max_grad_norm=1.0)
    optimizer.step()
    assert params[0][0].item() == pytest.approx(-0.6, rel=1e-5)
    assert params[1][1].item() == pytest.approx(-0.8, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_does_what_torch_does(backend, bad: float) -> None:
    ours, theirs = (parameters([300, 5000], torch.float32, backend.device) for _ in range(2))
    for params in (ours, theirs):
        set_grads(params, 0)
        params[0].grad[3] = bad
    tw.optim.SGD8bit(ours, lr=0.1, momentum=0.9, max_grad_norm=1.0).step()
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.optim.SGD(theirs, lr=0.1, momentum=0.9).step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.isnan(), b.isnan())


def test_large_gradients_do_not_overflow_the_norm(backend) -> None:
    params = [torch.nn.Parameter(torch.zeros(5000, dtype=torch.float16, device=backend.device))]
    params[0].grad = torch.full_like(params[0], 6e4)
    tw.optim.SGD8bit(params, lr=1.0, momentum=0.5, max_grad_norm=1.0).step()
    torch.testing.assert_close(
        params[0].detach().float().norm().cpu(), torch.tensor(1.0), rtol=1e-3, atol=0.0
    )


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_limits_that_cannot_be(bad: float) -> None:
    with pytest.raises(ValueError, match="max_grad_norm must be a number"):
        tw.optim.AdamW8bit([torch.nn.Parameter(torch.zeros(3))], max_grad_norm=bad)


# -- GradScaler -------------------------------------------------------------------------------------


def scaled_step(optimizer, scaler, params, step: int, poison: bool = False, unscale: bool = False) -> None:
    set_grads(params, step)
    for p in params:
        p.grad.mul_(scaler.get_scale())
    if poison:
        params[0].grad[0] = math.inf
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_scaled_gradients_give_the_same_bits(backend, name: str, unscale: bool) -> None:
    plain_params, params = (parameters([300, 4097], torch.float32, backend.device) for _ in range(2))
    plain, optimizer = make(CASES[name], plain_params), make(CASES[name], params)
    scaler = torch.amp.GradScaler(backend.device.type, init_scale=1024.0)
    scaler.scale(torch.zeros((), device=backend.device))
    for step in range(3):
        scaled_step(optimizer, scaler, params, step, unscale=unscale)
    run(plain, 3)
    assert_same_bits(snapshot(optimizer), snapshot(plain))


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_an_overflow_skips_the_step_altogether(backend, name: str, unscale: bool) -> None:
    params = parameters([300, 4097], torch.float32, backend.device)
    optimizer = make(CASES[name], params, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler(backend.device.type, init_scale=1024.0)
    scaler.scale(torch.zeros((), device=backend.device))
    scaled_step(optimizer, scaler, params, 0)
    before = snapshot(optimizer)
    scaled_step(optimizer, scaler, params, 1, poison=True, unscale=unscale)
    assert_same_bits(snapshot(optimizer), before)
    assert scaler.get_scale() == 512.0
    scaled_step(optimizer, scaler, params, 2)
    assert int(optimizer.state[params[0]]["step"]) == 2


def test_an_overflow_in_the_very_first_step(backend) -> None:
    params = parameters([4097], torch.float16, backend.device)
    before = params[0].detach().clone()
    optimizer = tw.optim.AdamW8bit(params)
    scaler = torch.amp.GradScaler(backend.device.type, init_scale=2.0)
    scaler.scale(torch.zeros((), device=backend.device))
    scaled_step(optimizer, scaler, params, 0, poison=True)
    assert torch.equal(params[0], before)
    assert int(optimizer.state[params[0]]["step"]) == 0


def test_clipping_sees_unscaled_gradients(backend) -> None:
    plain_params, params = (parameters([300, 4097], torch.float32, backend.device) for _ in range(2))
    plain = tw.optim.AdamW8bit(plain_params, max_grad_norm=0.1)
    optimizer = tw.optim.AdamW8bit(params, max_grad_norm=0.1)
    scaler = torch.amp.GradScaler(backend.device.type, init_scale=1024.0)
    scaler.scale(torch.zeros((), device=backend.device))
    for step in range(2):
        scaled_step(optimizer, scaler, params, step)
    run(plain, 2)
    for a, b in zip(params, plain_params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
