"""Estimators of block masks: the choice of blocks against sorting, each estimator against its formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tilewright.testing
from reference import estimate as reference
from tilewright.attention import BlockMask, estimate

select_blocks = torch.ops.tilewright.select_blocks
ESTIMATORS: list[Callable[..., BlockMask]] = [
    estimate.mean_pool_top_p,
    estimate.max_pool_top_k,
    estimate.antidiagonal,
    estimate.top_k,
]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(
    batch: int = 1, heads: int = 4, kv_heads: int = 2, q_len: int = 100, kv_len: int = 100, dim: int = 16
) -> tuple[Tensor, Tensor]:
    return normal(batch, heads, q_len, dim), normal(batch, kv_heads, kv_len, dim, seed=1)


def assert_selected(scores: Tensor, candidates: Tensor, count: int, mass: float) -> None:
    found = select_blocks(scores, candidates, count, mass)
    shape = torch.broadcast_shapes(scores.shape, candidates.shape)
    scores, candidates = scores.expand(shape).cpu(), candidates.expand(shape).cpu()
    rows = zip(scores.flatten(0, 2), candidates.flatten(0, 2), strict=True)
    expected = [reference.best(row, codes, count, mass) for row, codes in rows]
    assert found.shape == shape
    assert torch.equal(found.cpu().flatten(0, 2), torch.stack(expected))


@pytest.mark.parametrize("blocks", [1, 7, 31, 32, 33, 65, 129])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32], ids=str)
def test_choice_by_count_and_by_mass(backend, blocks: int, dtype: torch.dtype) -> None:
    scores = (normal(2, 3, 5, blocks).abs() * 64).round() / 64  # ties, and sums that are exact
    candidates = torch.randint(0, 4, (1, 1, 5, blocks), generator=torch.Generator().manual_seed(2)).to(dtype)
    scores, candidates = scores.to(backend.device), candidates.to(backend.device)
    for count in (1, 3, blocks, blocks + 5):
        assert_selected(scores, candidates, count, 0.0)
    for mass in (0.25, 0.5, 0.9, 1.0):
        assert_selected(scores, candidates, 0, mass)


def test_choice_reads_any_strides(backend) -> None:
    scores = normal(5, 9, 2, 3).abs().permute(2, 3, 0, 1).to(backend.device)
    candidates = torch.ones(9, 5, dtype=torch.uint8).t()[None, None].expand(2, 1, 5, 9).to(backend.device)
    assert_selected(scores, candidates, 4, 0.0)
    assert_selected(scores, candidates, 0, 0.7)


def test_ties_go_to_the_first(backend) -> None:
    scores, candidates = torch.zeros(1, 1, 1, 40), torch.ones(1, 1, 1, 40, dtype=torch.uint8)
    scores[..., 30] = 1.0
    found = select_blocks(scores.to(backend.device), candidates.to(backend.device), 3, 0.0)
    assert found.flatten().nonzero().flatten().tolist() == [0, 1, 30]


def test_negative_scores_zeros_and_infinities_are_ordered(backend) -> None:
    scores = torch.tensor([-math.inf, -2.0, 0.0, -0.0, 3.0, math.inf, -1.0]).view(1, 1, 1, -1)
    candidates = torch.ones(1, 1, 1, 7, dtype=torch.uint8)
    order = []
    for count in range(1, 8):
        found = select_blocks(scores.to(backend.device), candidates.to(backend.device), count, 0.0)
        order.append((set(found.flatten().nonzero().flatten().tolist()) - set(order)).pop())
    assert order == [5, 4, 2, 3, 6, 1, 0]


def test_nan_is_the_best_and_keeps_all_by_mass(backend) -> None:
    scores = torch.rand(1, 1, 1, 50, generator=torch.Generator().manual_seed(0))
    scores[..., 17] = math.nan
    candidates = torch.ones(1, 1, 1, 50, dtype=torch.uint8)
    scores, candidates = scores.to(backend.device), candidates.to(backend.device)
    assert select_blocks(scores, candidates, 1, 0.0).flatten().nonzero().item() == 17
    assert select_blocks(scores, candidates, 0, 0.5).all()


def test_choice_is_the_same_on_repeat_and_for_any_number_of_threads() -> None:
    scores = normal(2, 4, 200, 300).abs()
    candidates = torch.ones(1, 1, 200, 300, dtype=torch.uint8)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            found.append(select_blocks(scores, candidates, 0, 0.6))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("block", [(16, 16), (32, 16), (16, 48), (256, 256)])
def test_tables_by_position(backend, block: tuple[int, int]) -> None:
    q_len, kv_len = 40, 90
    positions = torch.stack(
        [torch.randperm(kv_len, generator=torch.Generator().manual_seed(s)) for s in range(6)]
    )
    positions = positions.view(2, 3, kv_len).int()
    pairs = torch.cartesian_prod(torch.arange(-(-q_len // block[0])), torch.arange(-(-kv_len // block[1])))
    pairs = pairs.int()
    tables = torch.ops.tilewright.position_tables(
        positions.to(backend.device), pairs.to(backend.device), q_len, *block
    ).cpu()
    tables = tables.view(6, len(pairs), block[0], -1)
    for head in range(6):
        for number, (i, j) in enumerate(pairs.tolist()):
            queries = torch.arange(i * block[0], (i + 1) * block[0])[:, None] + kv_len - q_len
            keys = positions.flatten(0, 1)[head, j * block[1] : (j + 1) * block[1]]
            seen = torch.zeros(block[0], tables.shape[3] * 32, dtype=torch.int64)
            seen[:, : len(keys)] = keys <= queries
            words = (seen.view(block[0], -1, 32) << torch.arange(32)).sum(-1)
            assert torch.equal(tables[head, number].long() & 0xFFFFFFFF, words)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(100, 100), (96, 96), (33, 100), (1, 65), (100, 40), (7, 7)])
def test_masks_are_sound(
    backend, estimator: Callable[..., BlockMask], causal: bool, lengths: tuple[int, int]
) -> None:
    q, k = make(2, 4, 2, *lengths)
    q, k = q.to(backend.device), k.to(backend.device)
    mask = estimator(q, k, block_size=(16, 32), causal=causal)
    mask.validate()
    assert (mask.q_len, mask.kv_len) == lengths
    assert mask.shape[:2] == (2, 2 if estimator is estimate.top_k else 4)
    full = BlockMask.causal(*lengths, block_size=(16, 32)) if causal else None
    if full is not None:
        seen = mask.to_mask().cpu()
        assert not (seen & ~full.to_mask()).any()
        last = torch.arange(lengths[0]) + lengths[1] - lengths[0]
        rows = (last >= 0).nonzero().flatten()
        assert seen[:, :, rows, last[rows]].all()  # a query sees itself
    elif estimator is not estimate.top_k:
        assert mask.to_dense()[..., 0].all()  # the sink


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda f: f.__name__)
def test_empty(estimator: Callable[..., BlockMask]) -> None:
    for lengths in ((0, 0), (0, 32), (32, 0)):
        mask = estimator(*make(1, 2, 1, *lengths), block_size=16, causal=False)
        assert mask.density == 0 or lengths[0] * lengths[1] > 0


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_and_strides(estimator: Callable[..., BlockMask], dtype: torch.dtype) -> None:
    q, k = (t.to(dtype) for t in make())
    mask = estimator(q, k, block_size=16)
    spread = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k)]
    assert estimator(*spread, block_size=16) == mask


def test_mean_pool_is_its_formula() -> None:
    q, k = make(1, 4, 2, 112, 112)
    mask = estimate.mean_pool_top_p(q, k, block_size=16, threshold=0.6, sink_blocks=0, local_blocks=0)
    found = mask.to_dense()
    means = [reference.block_means(t, 16) for t in (q, k.repeat_interleave(2, 1))]
    scores = means[0] @ means[1].mT / 4
    later = torch.ones(7, 7, dtype=torch.bool).triu(1)
    masses = scores.masked_fill(later, -math.inf).softmax(-1)
    for head in range(4):
        for row in range(7):
            kept = reference.best(masses[0, head, row], ~later[row], 0, 0.6)
            assert torch.equal(found[0, head, row], kept)


def test_antidiagonal_is_its_formula() -> None:
    q, k = make(1, 2, 1, 96, 96)
    mask = estimate.antidiagonal(
        q, k, block_size=16, stride=8, threshold=0.7, sink_blocks=0, local_blocks=0
    ).to_dense()
    for head in range(2):
        masses = reference.antidiagonal_masses(q[0, head], k[0, 0], 16, 8, 0.25)
        for row in range(6):
            candidates = torch.arange(6) <= row
            assert torch.equal(mask[0, head, row], reference.best(masses[row], candidates, 0, 0.7))


def test_antidiagonal_goes_on_where_the_queries_are_the_last_ones() -> None:
    q, k = make(1, 2, 1, 128, 128)
    whole = estimate.antidiagonal(q, k, block_size=16, threshold=0.7)
    for length in (64, 32):  # tiles and blocks begin at the same places
        part = estimate.antidiagonal(q[:, :, -length:], k, block_size=16, threshold=0.7)
        assert torch.equal(part.to_dense(), whole.to_dense()[:, :, -length // 16 :])


@pytest.mark.parametrize("estimator", [estimate.max_pool_top_k, estimate.top_k], ids=lambda f: f.__name__)
def test_counts_are_exact(estimator: Callable[..., BlockMask]) -> None:
    q, k = make(2, 4, 2, 160, 160)
    for count in (1, 2, 5, 20):
        counts = estimator(q, k, block_size=16, count=count, sink_blocks=0).q2k_counts
        assert torch.equal(counts, torch.arange(1, 11).clamp(max=count).int().expand_as(counts))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda f: f.__name__)
def test_a_needle_is_found(estimator: Callable[..., BlockMask]) -> None:
    q, k = make(1, 2, 2, 512, 512)
    k = k * 0.1
    needle = torch.nn.functional.normalize(normal(16, seed=9), dim=0)
    k[:, :, 100] = 60 * needle
    q = 0.2 * q + 3 * needle
    options: dict[str, Any] = (
        {"count": 4} if estimator in (estimate.max_pool_top_k, estimate.top_k) else {"threshold": 0.8}
    )
    mask = estimator(q, k, block_size=32, **options)
    assert mask.to_dense()[:, :, 3:, 3].all()
    assert float(estimate.kept_mass(q, k, mask)[:, :, 128:].min()) > 0.9


def test_more_threshold_keeps_more_and_all_is_all() -> None:
    q, k = make(1, 4, 2, 256, 256)
    for estimator in (estimate.mean_pool_top_p, estimate.antidiagonal):
        densities = [estimator(q, k, block_size=16, threshold=t).density for t in (0.2, 0.5, 0.8, 1.0)]
        assert densities == sorted(densities)
        assert densities[-1] == BlockMask.causal(256, block_size=16).density


@pytest.mark.parametrize("causal", [True, False])
def test_kept_mass_is_that_of_dense_attention(causal: bool) -> None:
    q, k = make(1, 4, 2, 50, 80)
    mask = estimate.mean_pool_top_p(q, k, block_size=16, threshold=0.5, causal=causal)
    scores = q.double() @ k.repeat_interleave(2, 1).double().mT / 4
    if causal:
        scores.masked_fill_(torch.ones(50, 80, dtype=torch.bool).triu(31), -math.inf)
    expected = (scores.softmax(-1) * mask.to_mask()).sum(-1)
    torch.testing.assert_close(
        estimate.kept_mass(q, k, mask, causal=causal).double(), expected, atol=1e-5, rtol=0
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    q_len=st.integers(1, 90),
    more=st.integers(0, 60),
    blocks=st.tuples(st.sampled_from([16, 32, 48]), st.sampled_from([16, 32, 64])),
    estimator=st.sampled_from(ESTIMATORS),
    sink=st.integers(0, 2),
    local=st.integers(0, 2),
)
def test_any_lengths(q_len, more, blocks, estimator, sink, local) -> None:
    q, k = make(1, 2, 1, q_len, q_len + more)
    mask = estimator(q, k, block_size=blocks, sink_blocks=sink, local_blocks=local)
    assert not (mask.to_mask() & ~BlockMask.causal(q_len, q_len + more, block_size=blocks).to_mask()).any()
    assert mask.to_dense().any(-1).all()
    if sink:
        assert mask.to_mask()[..., 0].all()


def test_estimators_need_no_gradient() -> None:
    q, k = (t.requires_grad_() for t in make())
    assert not estimate.mean_pool_top_p(q, k, block_size=16).q2k_counts.requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": 3}, TypeError, "q must be a tensor"),
        ({"q": torch.zeros(1, 4, 100)}, ValueError, "q must have shape"),
        ({"k": torch.zeros(1, 3, 100, 16)}, ValueError, "k has 3 heads, which do not divide"),
        ({"k": torch.zeros(1, 2, 100, 8)}, ValueError, "k must have the batch size and head_dim"),
        ({"k": torch.zeros(1, 2, 100, 16).double()}, TypeError, "k must have the dtype of q"),
        ({"block_size": 24}, ValueError, "block_size"),
        ({"threshold": 0}, ValueError, r"threshold must be a number in \(0, 1\]"),
        ({"threshold": 1.5}, ValueError, "threshold must be a number"),
        ({"sink_blocks": -1}, ValueError, "sink_blocks must be an int"),
        ({"local_blocks": 1.5}, TypeError, "local_blocks must be an int"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k = make()
    arguments = {"q": q, "k": k, "block_size": 16} | change
    with pytest.raises(error, match=message):
        estimate.mean_pool_top_p(**arguments)


def test_bad_counts_and_strides() -> None:
    q, k = make()
    with pytest.raises(ValueError, match="count"):
        estimate.top_k(q, k, count=0)
    with pytest.raises(ValueError, match="stride must divide"):
        estimate.antidiagonal(q, k, block_size=16, stride=5)


def test_opcheck() -> None:
    scores, candidates = normal(1, 2, 3, 9).abs(), torch.ones(1, 1, 3, 9, dtype=torch.uint8)
    torch.library.opcheck(select_blocks.default, (scores, candidates, 2, 0.0))
    positions, pairs = (
        torch.arange(32, dtype=torch.int32).view(1, 1, 32),
        torch.zeros(1, 2, dtype=torch.int32),
    )
    torch.library.opcheck(torch.ops.tilewright.position_tables.default, (positions, pairs, 32, 16, 16))


def test_same_bits_for_any_seed() -> None:
    q, k = make()
    found = []
    for seed in range(3):
        with tilewright.testing.emulated(seed=seed):
            found.append(estimate.mean_pool_top_p(q, k, block_size=16, threshold=0.5).to_dense())
    assert all(torch.equal(found[0], other) for other in found[1:])
