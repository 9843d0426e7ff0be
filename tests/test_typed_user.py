"""Code of a user: it runs, and in `make lint` mypy --strict finds the types that are written here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import tilewright as tw
from tilewright.attention import (
    BlockMask,
    BlockSparse,
    block_sparse_attention,
    estimate,
    permuted_block_sparse_attention,
)
from tilewright.compat.flex_attention import flex_attention
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
    assert_type(out, Tensor)
    assert_type(tw.nn.Mamba(16).d_state, int)


def test_flags_decide_between_a_tensor_and_a_tuple() -> None:
    x, A, B, wanted = torch.rand(2, 8, 5), -torch.ones(8, 4), torch.ones(2, 4, 5), bool(torch.ones(1))
    assert_type(tw.scan.selective_scan(x, x, A, B, B, reverse=True), Tensor)
    assert_type(tw.scan.selective_scan(x, x, A, B, B, return_last_state=True), tuple[Tensor, Tensor])
    either = tw.scan.selective_scan(x, x, A, B, B, return_last_state=wanted)
    assert_type(either, Tensor | tuple[Tensor, Tensor])
    weight = torch.ones(8, 4)
    assert_type(tw.scan.causal_conv1d(x, weight, activation="silu"), Tensor)
    assert_type(tw.scan.causal_conv1d(x, weight, return_final_states=True), tuple[Tensor, Tensor])
    heads, dt, B = torch.rand(1, 6, 2, 4), torch.rand(1, 6, 2), torch.rand(1, 6, 1, 3)
    ends = torch.tensor([0, 2, 6])
    assert_type(tw.scan.ssd_chunk_scan(heads, dt, -dt[0, 0], B, B, 4), Tensor)
    out, states = tw.scan.ssd_chunk_scan(heads, dt, -dt[0, 0], B, B, 4, return_final_states=True)
    assert_type((out, states), tuple[Tensor, Tensor])
    both = tw.scan.ssd_chunk_scan(
        heads, dt, -dt[0, 0], B, B, 4, cu_seqlens=ends, return_final_states=True, return_varlen_states=True
    )
    assert_type(both, tuple[Tensor, Tensor, Tensor])


def test_attention() -> None:
    q = torch.randn(1, 2, 64, 16)
    mask = BlockMask.causal(64, block_size=16) & BlockMask.sliding_window(64, 32, block_size=16)
    assert_type(mask, BlockMask)
    assert_type(mask.density, float)
    assert_type(estimate.top_k(q, q, count=2, block_size=16), BlockMask)
    assert_type(block_sparse_attention(q, q, q, mask), Tensor)
    out, lse = block_sparse_attention(q, q, q, mask, return_lse=True)
    assert_type(out, Tensor)
    assert_type(lse, Tensor)
    assert_type(permuted_block_sparse_attention(q, q, q, block_size=16, segment_size=32), Tensor)
    both = permuted_block_sparse_attention(q, q, q, block_size=16, segment_size=32, return_lse=True)
    assert_type(both, tuple[Tensor, Tensor])
    assert_type(flex_attention(q, q, q), Tensor)
    assert_type(flex_attention(q, q, q, return_lse=True), tuple[Tensor, Tensor])


def test_prune() -> None:
    net, x = model(), torch.randn(4, 32)
    assert_type(tw.prune.mask(torch.randn(32, 32), tw.prune.Block(8, 8), 0.5), Tensor)
    weight = torch.randn(32, 32)
    assert_type(tw.prune.global_masks({"w": weight}, "row", 0.5), dict[str, Tensor])
    assert_type(tw.prune.global_masks([weight], "row", 0.5), list[Tensor])
    assert_type(tw.prune.prune(net, "2:4"), tw.prune.PruneReport)
    assert_type(tw.prune.shrink(model(), x, 0.5), tw.prune.ShrinkReport)
    pruned = net[0]
    assert isinstance(pruned, torch.nn.Linear)
    sparse = tw.nn.SemiStructuredLinear.from_linear(pruned, "2:4")
    assert_type(sparse, tw.nn.SemiStructuredLinear)
    assert_type(sparse.to_linear(), torch.nn.Linear)
