"""Elements behind the 2^31st of the scans' tensors; on the emulator, the same at sizes that it can do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from backends import LARGE, Backend
from tilewright.scan import causal_conv1d, linear_scan, selective_scan, selective_state_update

pytestmark = LARGE


def check(call: Callable[..., Tensor], *tensors: Tensor) -> None:
    """The last sequence of a batch gets what it gets alone, and so do its gradients; the others are zero."""
    generator = torch.Generator().manual_seed(0)
    for t in tensors:
        t.zero_()
        t[-1] = torch.rand(t.shape[1:], generator=generator).to(t)

    def run(*tensors: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = call(*leaves)
        weights = torch.zeros_like(out)
        weights[-1] = torch.rand(out.shape[1:], generator=torch.Generator().manual_seed(1)).to(out)
        return [out.detach(), *torch.autograd.grad(out, leaves, weights)]

    for found, alone in zip(run(*tensors), run(*(t[-1:].clone() for t in tensors)), strict=True):
        torch.testing.assert_close(found[-1:], alone)
        assert len(found) == 1 or not found[0].any()


def empty(backend: Backend, large: int, small: int, *shape: int) -> Tensor:
    """A tensor of bfloat16 of so many sequences."""
    batch = large if backend.name == "cuda" else small
    return torch.empty(batch, *shape, dtype=torch.bfloat16, device=backend.device)


@pytest.mark.parametrize("dim", [1, 2])
def test_linear_scan(backend: Backend, dim: int) -> None:
    a, b = (empty(backend, 2**31 // (512 * 768) + 3, 2, 512 if backend.name == "cuda" else 40, 768)[:, :, :]
            for _ in range(2))  # fmt: skip
    check(lambda a, b: linear_scan(a, b, dim=dim), a, b)


@pytest.mark.parametrize("columns", [False, True])
def test_causal_conv1d(backend: Backend, columns: bool) -> None:
    length = 4096 if backend.name == "cuda" else 40
    x = empty(backend, 2**31 // (256 * 4096) + 3, 2, *((length, 256) if columns else (256, length)))
    weight = torch.linspace(-1, 1, 256 * 4, device=backend.device).view(256, 4).bfloat16()
    check(lambda x: causal_conv1d(x.mT if columns else x, weight, activation="silu"), x)


def test_selective_scan(backend: Backend) -> None:
    length = 4096 if backend.name == "cuda" else 40
    u, delta = (empty(backend, 2**31 // (256 * 4096) + 3, 2, 256, length) for _ in range(2))
    A = -torch.arange(1.0, 17, device=backend.device).expand(256, 16)
    B, C = (empty(backend, len(u), 2, 16, length) for _ in range(2))
    check(lambda u, delta, B, C: selective_scan(u, delta, A, B, C, delta_softplus=True), u, delta, B, C)


def test_selective_state_update(backend: Backend) -> None:
    """The state, which is written in place."""
    shape = (
        2**31 // (2048 * 128) + 3 if backend.name == "cuda" else 3,
        2048 if backend.name == "cuda" else 40,
    )
    state = torch.zeros(*shape, 128, dtype=torch.bfloat16, device=backend.device)
    g = torch.Generator().manual_seed(0)
    state[-1] = torch.rand(state.shape[1:], generator=g).to(state)
    x, dt = (torch.rand(shape, generator=g).to(state) for _ in range(2))
    A = -torch.rand(shape[1], 128, generator=g).to(backend.device)
    B, C = (torch.rand(shape[0], 128, generator=g).to(state) for _ in range(2))
    alone = state[-1:].clone()
    y = selective_state_update(state, x, dt, A, B, C)
    expected = selective_state_update(alone, x[-1:], dt[-1:], A, B[-1:], C[-1:])
    torch.testing.assert_close(y[-1:], expected)
    torch.testing.assert_close(state[-1:], alone)
