"""The attention family's benchmark cases: what they count, and that planted keys are what they are for."""

from __future__ import annotations

import pytest
import torch

from tilewright.attention import BlockMask, block_sparse_attention
from tilewright.attention.permuted import choose
from tilewright.bench import attention
from tilewright.bench.attention import planted

CPU = torch.device("cpu")


@pytest.mark.parametrize("block", [64, 128])
def test_flops_are_those_of_the_blocks_that_are_kept(block: int) -> None:
    inputs = attention._Inputs(CPU, torch.float32, (1, 8, 4096, 64))
    for density in (50, 25, 10):
        mask = attention._random_blocks(inputs, density, block)
        case = attention._sparse(inputs, density, block, grad=False)
        assert case.flops == pytest.approx(mask.density * 8 * 4096**2 * 4 * 64)
        assert set(mask.q2k_counts.flatten().tolist()) == {round(4096 // block * density / 100)}


def test_flops_of_a_window() -> None:
    case = attention._window(attention._Inputs(CPU, torch.float32, (1, 2, 1000, 64)), 512)
    seen = BlockMask.sliding_window(1000, 512).to_mask().sum().item()
    assert case.flops == pytest.approx(2 * seen * 4 * 64)


@pytest.mark.slow
def test_planted_keys_need_few_blocks_once_sorted() -> None:
    """At most 30% of the causal blocks keep at least 90% of the attention, and unsorted they would not."""
    q, k, _ = planted(attention._Inputs(CPU, torch.float32, (1, 8, 8192, 64)))
    value = k.new_zeros((*k.shape[:3], 8))
    causal = BlockMask.causal(8192, block_size=64)
    dense = block_sparse_attention(q, k, value, causal, return_lse=True)[1]
    _, keys, mask = choose(q, k, 64, 512, 0.9, True, 1 / 8)
    kept = block_sparse_attention(q, keys, value, mask, return_lse=True)[1]
    assert float((kept - dense).exp().mean()) >= 0.9
    assert mask.density / causal.density <= 0.3
