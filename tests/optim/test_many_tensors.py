"""Models that exceed what one launch can be told: 3840 tensors or 384 parameter groups."""

from __future__ import annotations

import pytest
import torch

import tilewright as tw


def _tensors(count: int, device: torch.device | str) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(3 + i % 5, generator=generator).to(device)) for i in range(count)]


def _set_grads(params: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device)


def _assert_close(ours: list[torch.nn.Parameter], theirs: list[torch.nn.Parameter]) -> None:
    left, right = (torch.cat([p.detach().cpu() for p in params]) for params in (ours, theirs))
    torch.testing.assert_close(left, right, rtol=0, atol=2e-6)


def _check_steps(
    ours: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    theirs: list[torch.nn.Parameter],
    exact: torch.optim.Optimizer,
    max_grad_norm: float | None,
) -> None:
    """Two steps of both, the second's gradients clipped by torch."""
    for seed in range(2):
        _set_grads(ours, seed)
        _set_grads(theirs, seed)
        optimizer.step()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(theirs, max_grad_norm)
        exact.step()
    _assert_close(ours, theirs)


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_more_tensors_than_one_launch_takes(backend, max_grad_norm) -> None:
    ours, theirs = _tensors(3900, backend.device), _tensors(3900, "cpu")
    optimizer = tw.optim.AdamW8bit(ours, lr=1e-2, max_grad_norm=max_grad_norm)
    exact = torch.optim.AdamW(theirs, lr=1e-2)
    _check_steps(ours, optimizer, theirs, exact, max_grad_norm)


def test_more_groups_than_one_launch_takes(backend) -> None:
    ours, theirs = _tensors(400, backend.device), _tensors(400, "cpu")
    rates = [1e-3 * (1 + i % 7) for i in range(400)]
    optimizer = tw.optim.AdamW8bit([{"params": [p], "lr": lr} for p, lr in zip(ours, rates, strict=True)])
    exact = torch.optim.AdamW([{"params": [p], "lr": lr} for p, lr in zip(theirs, rates, strict=True)])
    _check_steps(ours, optimizer, theirs, exact, None)


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_small_tensors_among_large_ones(backend, max_grad_norm) -> None:
    """A warp's next tile may lie in this row or hundreds further, before, in or behind the 32 it looks at."""
    sizes = [*[1] * 40, 60_000, *[257, 5, 512] * 30, 300_000, *[3] * 31, 70_000, 1]
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(size, generator=generator) for size in sizes]
    ours, theirs = ([torch.nn.Parameter(v.to(d)) for v in values] for d in (backend.device, "cpu"))
    optimizer = tw.optim.AdamW(ours, lr=1e-2, max_grad_norm=max_grad_norm)
    exact = torch.optim.AdamW(theirs, lr=1e-2)
    _check_steps(ours, optimizer, theirs, exact, max_grad_norm)
