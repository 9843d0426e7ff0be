"""Masks combine as sets of elements do."""

import pytest
import torch
from block_mask_cases import check, random_mask
from hypothesis import given
from hypothesis import strategies as st

from tilewright.attention import BlockMask

seeds = st.integers(0, 10_000)
sizes = st.sampled_from(
    [(1, 1, 16, 16), (40, 70, 16, 16), (64, 96, 32, 16), (70, 130, 16, 48), (100, 33, 80, 16)]
)


@given(seed=seeds, size=sizes)
def test_operators_are_those_of_the_elements(seed: int, size: tuple[int, int, int, int]) -> None:
    a, b = random_mask(seed, *size), random_mask(seed + 1, *size, heads=2)
    check(a & b, a.to_mask() & b.to_mask())
    check(a | b, a.to_mask() | b.to_mask())
    check(~a, ~a.to_mask())
    assert (a == b) == (a.shape == b.shape and torch.equal(a.to_mask(), b.to_mask()))


@given(seed=seeds, size=sizes)
def test_laws(seed: int, size: tuple[int, int, int, int]) -> None:
    a, b, c = (random_mask(seed + i, *size) for i in range(3))
    everything = a | ~a
    nothing = a & ~a
    assert bool(everything.to_mask().all())
    assert not bool(nothing.to_mask().any())
    assert (nothing.density, len(nothing.tables), len(everything.tables)) == (0.0, 0, 0)
    assert ~~a == a
    assert a & a == a | a == a
    assert a & b == b & a
    assert a | b == b | a
    assert (a & b) & c == a & (b & c)
    assert a & (b | c) == a & b | a & c
    assert a | b & c == (a | b) & (a | c)
    assert ~(a & b) == ~a | ~b
    assert a | a & b == a
    assert everything & a == a
    assert nothing | a == a


@pytest.mark.parametrize("size", [(70, 130, 16, 48), (64, 64, 32, 32)], ids=str)
def test_on_all_backends(backend, size: tuple[int, int, int, int]) -> None:
    a = random_mask(1, *size, heads=2).to(backend.device)
    b = random_mask(2, *size).to(backend.device)
    for result, seen in [
        (a & b, a.to_mask() & b.to_mask()),
        (a | b, a.to_mask() | b.to_mask()),
        (~a, ~a.to_mask()),
    ]:
        assert torch.equal(result.validate().to_mask(), seen)
        assert result.device == a.device


def test_batches_and_heads_broadcast() -> None:
    per_batch = BlockMask.prefix_lm(90, [3, 50, 90], block_size=16)
    per_head = BlockMask.bigbird(90, heads=4, block_size=16, random_blocks=1)
    both = per_batch & per_head
    assert both.shape == (3, 4, 6, 6)
    check(both, per_batch.to_mask() & per_head.to_mask())


def test_combined_tables_are_few() -> None:
    window = BlockMask.sliding_window(1 << 13, 1000)
    documents = BlockMask.document([0, 1 << 12, 1 << 13])
    assert len((window & documents).tables) == 3
    assert len((window | BlockMask.causal(1 << 13)).tables) == 1
    assert (window & BlockMask.causal(1 << 13)) == window


def test_masks_that_do_not_fit() -> None:
    mask = BlockMask.causal(100, block_size=16)
    cases = [
        (BlockMask.causal(100, block_size=32), r"block_size, got \(16, 16\) and \(32, 32\)"),
        (BlockMask.causal(101, 100, block_size=16), "q_len, got 100 and 101"),
        (BlockMask.causal(100, 101, block_size=16), "kv_len, got 100 and 101"),
    ]
    for other, message in cases:
        with pytest.raises(ValueError, match="masks combined by & must have the same " + message):
            mask & other
    with pytest.raises(ValueError, match=r"combined by \| must have the same batch size or 1, got 2 and 3"):
        BlockMask.prefix_lm(100, [1, 2], block_size=16) | BlockMask.prefix_lm(100, [1, 2, 3], block_size=16)
    with pytest.raises(ValueError, match="same number of heads or 1, got 2 and 3"):
        BlockMask.bigbird(100, heads=2) & BlockMask.bigbird(100, heads=3)
    with pytest.raises(TypeError, match="unsupported operand"):
        mask & 3
