"""Block masks, block-sparse attention and its gradients, and what estimators choose, against plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tilewright.attention import (
    BlockMask,
    block_sparse_attention,
    estimate,
    permuted_block_sparse_attention,
)

from . import Probe

_HEADS, _KV_HEADS, _LENGTH, _DIM = 4, 2, 150, 24


def _inputs(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v; of values that bfloat16 holds, so that every dtype starts from the same."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, _LENGTH, _DIM) for heads in (_HEADS, _KV_HEADS, _KV_HEADS)]
    made = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    return [t.to(device, dtype).requires_grad_() for t in made]


def _window() -> BlockMask:
    return BlockMask.sliding_window(_LENGTH, 40, sink=3, block_size=(32, 16))


def _plain(inputs: list[Tensor], seen: Tensor) -> Tensor:
    q, k, v = inputs
    k, v = (t.repeat_interleave(_HEADS // _KV_HEADS, 1) for t in (k, v))
    scores = (q @ k.mT / math.sqrt(_DIM)).masked_fill(~seen, -math.inf)
    return scores.softmax(-1) @ v


def _error(found: Tensor, truth: Tensor) -> float:
    return float((found.double().cpu() - truth).abs().max() / truth.abs().max())


def _attention(dtype: torch.dtype, bound: float) -> Probe:
    def check(device: torch.device) -> tuple[float, float]:
        ours, exact = _inputs(device, dtype), _inputs(torch.device("cpu"), torch.float64)
        q, k, v = ours
        out = block_sparse_attention(q, k, v, _window().to(device))
        assert isinstance(out, Tensor)
        truth = _plain(exact, _window().to_mask())
        weight = torch.randn(truth.shape, generator=torch.Generator().manual_seed(9)).bfloat16()
        found = [out, *torch.autograd.grad(out, ours, weight.to(out))]
        expected = [truth, *torch.autograd.grad(truth, exact, weight.to(truth))]
        errors = [_error(a.detach(), b.detach()) for a, b in zip(found, expected, strict=True)]
        return max(errors), bound

    return check


def _check_packed(device: torch.device) -> tuple[float, float]:
    """Sequences end to end, each of which sees itself alone."""
    q, k, v = (t.detach() for t in _inputs(device, torch.float32))
    ends = torch.tensor([0, 50, 51, _LENGTH])
    mask = BlockMask.causal(_LENGTH, block_size=32).to(device)
    packed = ends.to(device, torch.int32)
    out = block_sparse_attention(q, k, v, mask, cu_seqlens_q=packed, cu_seqlens_k=packed)
    assert isinstance(out, Tensor)
    document = torch.searchsorted(ends, torch.arange(_LENGTH), right=True)
    seen = (document[:, None] == document) & torch.ones(_LENGTH, _LENGTH, dtype=torch.bool).tril()
    return _error(out, _plain([t.double().cpu() for t in (q, k, v)], seen)), 1e-5


def _check_masks(device: torch.device) -> tuple[float, float]:
    position = torch.arange(_LENGTH)
    distance = position[:, None] - position
    seen = (distance >= 0) & ((distance < 40) | (position < 3))
    mask = _window().to(device)
    same = [(mask | ~mask).to_mask().all(), torch.equal(mask.to_mask()[0, 0].cpu(), seen)]
    return float(not all(same)), 0.0


def _check_estimators(device: torch.device) -> tuple[float, float]:
    """What is kept when all is to be kept: all of it, with the keys in any order."""
    q, k, v = (t.detach() for t in _inputs(device, torch.float32))
    causal = torch.ones(_LENGTH, _LENGTH, dtype=torch.bool).tril()
    truth = _plain([t.double().cpu() for t in (q, k, v)], causal)
    out = permuted_block_sparse_attention(q, k, v, block_size=16, segment_size=64, threshold=1.0)
    assert isinstance(out, Tensor)
    mask = estimate.mean_pool_top_p(q, k, block_size=16, threshold=1.0)
    lost = 1 - float(estimate.kept_mass(q, k, mask).min())
    return max(lost, float((out.double().cpu() - truth).abs().max())), 1e-5


PROBES: dict[str, Probe] = {
    "BlockMask": _check_masks,
    "block_sparse_attention": _attention(torch.float32, 1e-5),
    "block_sparse_attention, bfloat16": _attention(torch.bfloat16, 2e-2),
    "block_sparse_attention, packed": _check_packed,
    "mask estimators": _check_estimators,
}
