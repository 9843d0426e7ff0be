"""Attention with permuted keys: dense where all is kept, causal, gradients, lse, GQA."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright.attention import permuted, permuted_block_sparse_attention

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(
    heads: int = 4,
    kv_heads: int = 2,
    q_len: int = 200,
    kv_len: int = 200,
    dim: int = 16,
    value_dim: int = 24,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    shapes = [(2, heads, q_len, dim), (2, kv_heads, kv_len, dim), (2, kv_heads, kv_len, value_dim)]
    return [
        torch.randn(s, generator=torch.Generator().manual_seed(i), dtype=torch.float64).to(dtype)
        for i, s in enumerate(shapes)
    ]


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention over what is seen, causal by default, and its lse."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT / math.sqrt(q.shape[3])
    if seen is None:
        seen = torch.ones(scores.shape[2:], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    scores = scores.masked_fill(~seen, -math.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def seen_by(q: Tensor, k: Tensor, block: int, segment: int, threshold: float) -> Tensor:
    """The elements that are seen, at the keys' true positions."""
    scale = 1 / math.sqrt(q.shape[3])
    order, _, mask = permuted.choose(q, k, block, segment, threshold, True, scale)
    mask.validate()
    arranged = mask.to_mask()
    order = order.repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None].expand_as(arranged)
    return torch.zeros_like(arranged).scatter_(3, order, arranged)


@pytest.mark.parametrize("lengths", [(200, 200), (256, 256), (1, 130), (65, 190), (40, 40), (129, 129)])
@pytest.mark.parametrize("segment", [32, 64])
def test_all_blocks_are_dense_attention(backend, lengths: tuple[int, int], segment: int) -> None:
    q, k, v = (t.to(backend.device) for t in make(4, 2, *lengths))
    out, lse = permuted_block_sparse_attention(
        q, k, v, block_size=32, segment_size=segment, threshold=1.0, return_lse=True
    )
    expected = dense(q.double().cpu(), k.double().cpu(), v.double().cpu())
    torch.testing.assert_close(out.double().cpu(), expected[0], atol=3e-6, rtol=0)
    torch.testing.assert_close(lse.double().cpu(), expected[1], atol=3e-6, rtol=0)


@pytest.mark.parametrize("threshold", [0.2, 0.6, 0.9])
@pytest.mark.parametrize("lengths", [(200, 200), (70, 200)])
def test_result_and_gradients_are_those_of_what_is_seen(threshold: float, lengths: tuple[int, int]) -> None:
    q, k, v = (t.requires_grad_() for t in make(4, 2, *lengths, dtype=torch.float64))
    out, lse = permuted_block_sparse_attention(
        q, k, v, block_size=16, segment_size=48, threshold=threshold, return_lse=True
    )
    seen = seen_by(q.detach(), k.detach(), 16, 48, threshold)
    assert not seen.triu(lengths[1] - lengths[0] + 1).any()
    expected = dense(q, k, v, seen)
    torch.testing.assert_close((out, lse), expected)
    weights = torch.randn_like(out), torch.randn_like(lse)
    ours = torch.autograd.grad((out, lse), (q, k, v), weights)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, (q, k, v), weights))


def test_fewer_blocks_are_seen() -> None:
    q, k, _ = make(2, 2, 512, 512)
    shares = [float(seen_by(q, k, 32, 64, t).float().mean()) for t in (0.3, 0.6, 0.9)]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1] < 0.5


def test_own_segment_and_first_key_are_always_seen() -> None:
    q, k, _ = make(4, 2, 200, 200)
    seen = seen_by(q, k, 32, 64, 0.01)
    position = torch.arange(200)
    own = (position[:, None] // 64 == position // 64) & (position[:, None] >= position)
    assert seen[..., own].all()
    assert seen[..., 0].all()


def test_heavy_keys_come_together() -> None:
    """One key of 16 draws the attention: sorted, few blocks hold what took all of them before."""
    q, k, _ = make(2, 2, 1024, 1024)
    direction = F.normalize(torch.randn(16, generator=torch.Generator().manual_seed(5)), dim=0)
    q, k = q + 6 * direction, k.clone()
    k[:, :, ::16] += 8 * direction
    order = permuted.key_order(q, k, 32, 256, 0.25).view(2, 2, 4, 256)
    assert (order[..., :16] % 16 == 0).all()
    seen = seen_by(q, k, 32, 256, 0.9)
    scores = (q.double() @ k.double().mT / 4).masked_fill(torch.ones(1024, 1024).triu(1).bool(), -math.inf)
    assert float((scores.softmax(-1) * seen).sum(-1).mean()) > 0.9
    assert float(seen[:, :, 768:].float().mean()) < 0.35


def test_a_group_shares_its_order() -> None:
    q, k, _ = make(4, 2)
    assert permuted.key_order(q, k, 32, 64, 0.25).shape == (2, 2, 200)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    q, k, v = make(dtype=dtype)
    out = permuted_block_sparse_attention(q, k, v, block_size=32, segment_size=64, threshold=1.0)
    exact = dense(q.double(), k.double(), v.double())[0]
    plain = dense(q, k, v)[0]
    assert out.dtype == dtype
    error = (out.double() - exact).abs().max()
    assert error <= 2 * (plain.double() - exact).abs().max() + 1e-5


def test_not_causal() -> None:
    q, k, v = make(4, 2, 70, 200)
    out = permuted_block_sparse_attention(
        q, k, v, block_size=32, segment_size=64, threshold=1.0, causal=False
    )
    expected = dense(q, k, v, torch.ones(70, 200, dtype=torch.bool))[0]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_repeats_bit_for_bit_and_takes_any_strides() -> None:
    tensors = make()
    spread = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    options: dict[str, Any] = {"block_size": 32, "segment_size": 64, "threshold": 0.5}
    first = permuted_block_sparse_attention(*tensors, **options)
    for arguments in (tensors, spread):
        assert torch.equal(permuted_block_sparse_attention(*arguments, **options), first)


def test_gradcheck() -> None:
    q, k, v = (t[:1].requires_grad_() for t in make(2, 1, 20, 40, 8, 8, torch.float64))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return permuted_block_sparse_attention(
            q, k, v, block_size=16, segment_size=16, threshold=1.0, return_lse=True
        )

    assert torch.autograd.gradcheck(run, (q, k, v))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"segment_size": 48}, ValueError, "segment_size must be a multiple of block_size = 32, got 48"),
        ({"segment_size": 0}, ValueError, "segment_size"),
        ({"block_size": (32, 32)}, ValueError, "block_size"),
        ({"block_size": 20}, ValueError, "block_size"),
        ({"threshold": 0.0}, ValueError, "threshold must be a number"),
        ({"v": torch.zeros(2, 2, 100, 24)}, ValueError, "v must have shape"),
        ({"k": torch.zeros(2, 3, 200, 16)}, ValueError, "k has 3 heads"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = make()
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, "block_size": 32, "segment_size": 64} | change
    with pytest.raises(error, match=message):
        permuted_block_sparse_attention(**arguments)
