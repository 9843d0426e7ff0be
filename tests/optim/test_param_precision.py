"""Stochastic rounding of 16-bit parameters."""

import pytest
import torch
from optim_cases import CASES, OPTIMIZERS, assert_same_bits, make, parameters, run, set_grads, snapshot

import tilewright as tw

HALVES = [torch.float16, torch.bfloat16]


def one_sgd_step(start: float, change: float, dtype: torch.dtype, numel: int, device, **more) -> torch.Tensor:
    """`numel` copies of `start`, each moved by `change` in float32 and rounded once."""
    p = torch.nn.Parameter(torch.full((numel,), start, dtype=dtype, device=device))
    p.grad = torch.full_like(p, 1.0)
    optimizer = tw.optim.SGD8bit(
        [p], lr=abs(change), momentum=0.9, maximize=change > 0, min_8bit_size=0, **more
    )
    optimizer.step()
    return p.detach().cpu()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("start", "fraction"),
    [(1.0, 0.25), (-1.0, 0.75), (3.0, 0.01), (-1000.0, 0.5), (2.0**-20, 0.3), (2.0**-13, 0.9)],
)
def test_rounding_is_unbiased_and_goes_to_a_neighbour(
    backend, dtype: torch.dtype, start: float, fraction: float
) -> None:
    numel = 20_000
    begin = torch.tensor(start, dtype=dtype)
    neighbour = torch.nextafter(begin, torch.tensor(0.0, dtype=dtype))
    gap = float(neighbour.double() - begin.double())
    change = float(torch.tensor(gap * fraction, dtype=torch.float32))
    result = one_sgd_step(start, change, dtype, numel, backend.device, param_precision="stochastic", seed=3)
    assert set(result.double().tolist()) <= {float(begin), float(neighbour)}
    share = float((result == neighbour).double().mean())
    probability = change / gap
    assert abs(share - probability) <= 4 * (probability * (1 - probability) / numel) ** 0.5 + 2.0**-16


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_exact_results_are_left_alone(backend, dtype: torch.dtype) -> None:
    result = one_sgd_step(1.0, -0.5, dtype, 1000, backend.device, param_precision="stochastic", seed=0)
    assert bool((result == 0.5).all())


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd_nesterov"])
def test_float32_parameters_do_not_notice(backend, name: str) -> None:
    results = []
    for more in ({}, {"param_precision": "stochastic", "seed": 1}):
        params = parameters([300, 4097], torch.float32, backend.device)
        optimizer = make(CASES[name], params, **more)
        run(optimizer, 2)
        results.append(snapshot(optimizer))
    assert_same_bits(*results)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["adamw", "lion", "sgd_decay"])
def test_results_depend_on_the_seed_and_nothing_else(backend, name: str, dtype: torch.dtype) -> None:
    results = []
    for seed in (5, 5, 6):
        params = parameters([300, 4097], dtype, backend.device)
        optimizer = make(CASES[name], params, param_precision="stochastic", seed=seed)
        run(optimizer, 2)
        results.append(snapshot(optimizer))
    assert_same_bits(results[0], results[1])
    assert not torch.equal(results[0][0], results[2][0])


def test_results_do_not_depend_on_the_company(backend) -> None:
    """A parameter is rounded alike whether or not others have gradients and whatever the groups are."""
    results = []
    for others in (False, True):
        params = parameters([300, 5000, 700], torch.bfloat16, backend.device)
        groups = [{"params": params}] if others else [{"params": params[:1]}, {"params": params[1:]}]
        optimizer = tw.optim.AdamW8bit(groups, lr=1e-3, param_precision="stochastic", seed=1)
        for step in range(3):
            set_grads(params, step)
            if not others:
                params[1].grad = None
            optimizer.step()
        results.append(params[2].detach().clone())
    assert torch.equal(*results)


def test_steps_and_parameters_are_rounded_independently() -> None:
    params = [torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = tw.optim.SGD8bit(
        params, lr=2.0**-9, momentum=0.5, dampening=0.5, param_precision="stochastic", seed=0
    )
    seen = []
    for _ in range(2):
        for p in params:
            p.data.fill_(1.0)
            p.grad = torch.ones_like(p)
        optimizer.step()
        seen += [p.detach().clone() == 1.0 for p in params]
    for i, left in enumerate(seen):
        assert 0.45 < float(left.double().mean()) < 0.55
        for right in seen[:i]:
            assert float((left == right).double().mean()) < 0.55


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_threads(threads: int) -> None:
    def result() -> list[torch.Tensor]:
        params = parameters([100_000, 30_000], torch.bfloat16, torch.device("cpu"))
        optimizer = tw.optim.AdamW8bit(params, param_precision="stochastic", seed=1)
        run(optimizer, 2)
        return snapshot(optimizer)

    expected, before = result(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same_bits(result(), expected)
    finally:
        torch.set_num_threads(before)


def test_weight_decay_of_bf16_parameters_is_not_lost() -> None:
    """bitsandbytes (like any rounding to nearest) leaves 1.0 at 1.0 for ever: lr * weight_decay < 2**-9."""

    def after_decay(**more) -> torch.Tensor:
        p = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        p.grad = torch.zeros_like(p)
        optimizer = tw.optim.AdamW8bit([p], lr=1e-4, weight_decay=0.1, **more)
        for _ in range(1000):
            optimizer.step()
        return p.detach().double()

    assert bool((after_decay() == 1.0).all())
    assert abs(float(after_decay(param_precision="stochastic", seed=0).mean()) - 0.990) < 5e-4


def test_a_seed_is_drawn_from_torchs_generator() -> None:
    def seed() -> int:
        return tw.optim.AdamW8bit(
            [torch.nn.Parameter(torch.ones(3))], param_precision="stochastic"
        ).param_groups[0]["seed"]

    torch.manual_seed(0)
    first = seed()
    assert seed() != first
    torch.manual_seed(0)
    assert seed() == first


def test_no_random_number_is_drawn_without_need() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    for optimizer in OPTIMIZERS.values():
        optimizer([torch.nn.Parameter(torch.ones(3))])
    assert torch.equal(torch.rand(1), expected)


def test_one_group_alone_may_round_stochastically() -> None:
    params = parameters([300, 300], torch.bfloat16, torch.device("cpu"))
    nearest = parameters([300, 300], torch.bfloat16, torch.device("cpu"))
    groups = [{"params": params[:1]}, {"params": params[1:], "param_precision": "stochastic"}]
    optimizer = tw.optim.AdamW8bit(groups)
    assert [group["seed"] is None for group in optimizer.param_groups] == [True, False]
    run(optimizer, 1)
    run(tw.optim.AdamW8bit(nearest), 1)
    assert torch.equal(params[0], nearest[0])
    assert not torch.equal(params[1], nearest[1])


def test_seeds_that_cannot_be() -> None:
    p = [torch.nn.Parameter(torch.ones(3))]
    with pytest.raises(ValueError, match="seed has no effect"):
        tw.optim.AdamW8bit(p, seed=1)
    with pytest.raises(ValueError, match="seed must be an int from 0 to"):
        tw.optim.AdamW8bit(p, param_precision="stochastic", seed=-1)
    with pytest.raises(TypeError, match="seed must be an int"):
        tw.optim.AdamW8bit(p, param_precision="stochastic", seed=1.5)
    with pytest.raises(ValueError, match="param_precision must be 'nearest' or 'stochastic', got 'kahan'"):
        tw.optim.AdamW8bit(p, param_precision="kahan")
    optimizer = tw.optim.AdamW8bit(p, param_precision="stochastic", seed=1)
    with pytest.raises(ValueError, match="share one seed"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "seed": 2})
