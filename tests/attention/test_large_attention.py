"""Elements behind the 2^31st of attention's tensors; on the emulator, the same at sizes that it can do."""

from __future__ import annotations

import pytest
import torch
from attention_cases import lists_of
from torch import Tensor

from backends import LARGE, Backend
from tilewright.attention import block_sparse_attention


@LARGE
@pytest.mark.parametrize("block", [64, 48])
def test_elements_beyond_32_bits(backend: Backend, block: int) -> None:
    """Heads behind the 2^31st element get what they get alone."""
    batch, heads, length, dim = (64, 32, 8256, 128) if backend.name == "cuda" else (1, 2, 192, 128)
    mask = lists_of(torch.eye(length, dtype=torch.bool)[None, None], block, block).to(backend.device)
    q, k, v, dout = (
        torch.zeros(batch, heads, length, dim, dtype=torch.bfloat16, device=backend.device) for _ in range(4)
    )
    generator = torch.Generator().manual_seed(0)
    for t in (q, k, v, dout):
        t[-1, -1] = torch.randn(length, dim, generator=generator).to(t)

    def last(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
        leaves = [t.requires_grad_() for t in (q, k, v)]
        out = block_sparse_attention(*leaves, mask)
        found = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
        assert all(t.shape == q.shape for t in found)
        assert not any(t[0, 0].any() for t in found if heads > 1 and t.shape[1] > 1)
        return [t[-1, -1].clone() for t in found]

    alone = last(*(t[-1:, -1:].clone() for t in (q, k, v, dout)))
    for found, expected in zip(last(q, k, v, dout), alone, strict=True):
        torch.testing.assert_close(found, expected)
