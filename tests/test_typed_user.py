"""Code of a user: it runs, and in `make lint` mypy --strict finds the types that are written here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import tilewright as tw
from tilewright.attention import BlockMask, BlockSparse, block_sparse_attention, estimate
from tilewright.optim import QuantState

if TYPE_CHECKING:
    from typing_extensions import assert_type
else:

    def assert_type(value: Any, kind: Any) -> None:
        """Only mypy looks."""


def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))


def test_info_and_swap() -> None:
    assert_type(tw.info(), dict[str, Any])
    assert_type(tw.__version__, str)
    report = tw.swap(model(), attention=BlockSparse(BlockMask.sliding_window, window=16))
    assert_type(report, tw.SwapReport)
    assert_type(tw.unswap(model()), int)


def test_optim() -> None:
    net, x = model(), torch.randn(4, 32)
    optimizer = tw.optim.AdamW8bit(net.parameters(), lr=1e-3, betas=(0.9, 0.95), max_grad_norm=1.0)
    assert_type(optimizer, tw.optim.AdamW8bit)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = net(x).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        return loss

    assert_type(optimizer.step(closure), Tensor)
    optimizer.step()
    codes, state = tw.optim.quantize_blockwise(x)
    assert_type(codes, Tensor)
    assert_type(state, QuantState)
    assert_type(tw.optim.dequantize_blockwise(codes, state), Tensor)


def test_scan() -> None:
    x = torch.rand(2, 8, 5)
    assert_type(tw.scan.linear_scan(x, x), Tensor)
    out = tw.scan.selective_scan(x, x, -torch.ones(8, 4), torch.ones(2, 4, 5), torch.ones(2, 4, 5))
    assert_type(out, Tensor | tuple[Tensor, Tensor])
    assert_type(tw.nn.Mamba(16).d_state, int)


def test_attention() -> None:
    q = torch.randn(1, 2, 64, 16)
    mask = BlockMask.causal(64, block_size=16) & BlockMask.sliding_window(64, 32, block_size=16)
    assert_type(mask, BlockMask)
    assert_type(mask.density, float)
    assert_type(estimate.top_k(q, q, count=2, block_size=16), BlockMask)
    assert_type(block_sparse_attention(q, q, q, mask), Tensor | tuple[Tensor, Tensor])


def test_prune() -> None:
    net, x = model(), torch.randn(4, 32)
    assert_type(tw.prune.mask(torch.randn(32, 32), tw.prune.Block(8, 8), 0.5), Tensor)
    assert_type(tw.prune.prune(net, "2:4"), tw.prune.PruneReport)
    assert_type(tw.prune.shrink(model(), x, 0.5), tw.prune.ShrinkReport)
    pruned = net[0]
    assert isinstance(pruned, torch.nn.Linear)
    sparse = tw.nn.SemiStructuredLinear.from_linear(pruned, "2:4")
    assert_type(sparse, tw.nn.SemiStructuredLinear)
    assert_type(sparse.to_linear(), torch.nn.Linear)
