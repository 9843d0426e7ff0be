"""Block-sparse attention's CUDA kernels: the edges of their tiles, the memory they touch, the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import lists_of, make, random_mask, window
from test_block_sparse import LOW, NAMES, assert_same, check, results, run
from torch import Tensor

import tilewright.testing
from backends import Backend
from reference.attention import attention
from tilewright.attention import BlockMask, block_sparse_attention

GPU = ["emulated", pytest.param("cuda", marks=pytest.mark.cuda)]
pytestmark = pytest.mark.parametrize("backend", GPU, indirect=True)
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def set_multiprocessors(backend: Backend) -> Iterator[Callable[[int], None]]:
    """One, so that small grids are not cut into smaller tiles; a GPU has its own number."""
    if backend.name == "cuda":  # and the emulated module is not built there
        yield lambda count: None
        return
    from tilewright import _C_emulated

    before = _C_emulated.emulator_multiprocessors()
    _C_emulated.emulator_set_multiprocessors(1)
    yield _C_emulated.emulator_set_multiprocessors
    _C_emulated.emulator_set_multiprocessors(before)


@pytest.mark.parametrize("multiprocessors", [1, 2, 3, 100])
@pytest.mark.parametrize("head_dim", [16, 72, 136])
def test_small_grids(
    backend: Backend, set_multiprocessors: Callable[[int], None], head_dim: int, multiprocessors: int
) -> None:
    """Thread blocks of fewer rows, where larger ones would leave multiprocessors without any."""
    set_multiprocessors(multiprocessors)
    visible = random_mask(1, 1, 200, 210, 144, 256, seed=head_dim)
    check(backend, make(1, 1, 1, 200, 210, head_dim, 16), visible, (144, 256), torch.bfloat16, causal=True)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("block", [(128, 128), (96, 48)])
def test_tiles_that_are_not_cut(backend: Backend, block: tuple[int, int], head_dim: int) -> None:
    """Thread blocks for all multiprocessors of a large GPU: with fewer, it never sees the largest tiles."""
    batch, heads, q_len, kv_len = (2, 24, 389, 400) if backend.name == "cuda" else (1, 1, 133, 140)
    visible = random_mask(1, 1, q_len, kv_len, *block, seed=head_dim)
    inputs = make(batch, heads, heads, q_len, kv_len, head_dim, head_dim)
    check(backend, inputs, visible, block, torch.bfloat16)


@pytest.mark.parametrize("block_kv", [16, 48, 64, 128, 144, 256])
@pytest.mark.parametrize("block_q", [16, 48, 64, 128, 144, 256])
def test_block_sizes(backend: Backend, block_q: int, block_kv: int) -> None:
    """Tiles of keys from several blocks, blocks of several tiles, slabs that reach beyond their block."""
    visible = random_mask(1, 1, 300, 310, block_q, block_kv, seed=block_q + block_kv)
    dtype = HALVES[(block_q + block_kv) // 16 % 2]
    check(backend, make(1, 1, 1, 300, 310, 16, 16), visible, (block_q, block_kv), dtype)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(
    ("head_dim", "value_dim"),
    [
        (8, 8), (40, 64), (64, 40), (64, 64), (80, 128), (128, 8), (128, 128), (200, 136), (192, 128),
        (16, 256), (256, 256),
    ],
)  # fmt: skip
def test_head_dims(backend: Backend, head_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    visible = random_mask(1, 2, 70, 90, 32, 16, seed=head_dim)
    check(backend, make(1, 2, 1, 70, 90, head_dim, value_dim), visible, (32, 16), dtype)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("q_len", "kv_len"), [(127, 129), (128, 128), (129, 127), (31, 33), (1, 257), (257, 1)]
)
def test_edges_of_tiles(backend: Backend, q_len: int, kv_len: int, head_dim: int) -> None:
    visible = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool)
    inputs = make(1, 1, 1, q_len, kv_len, head_dim, head_dim)
    check(backend, inputs, visible, (128, 64), torch.bfloat16)
    check(backend, inputs, visible, (256, 256), torch.float16, causal=True)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("head_dim", "block"), [(64, (64, 64)), (128, (128, 128)), (128, (64, 32))])
def test_long_windows(backend: Backend, head_dim: int, block: tuple[int, int], dtype: torch.dtype) -> None:
    """Lists of many tiles; long ones where a device does the work."""
    length, width = (2049, 700) if backend.name == "cuda" else (257, 150)
    visible = window(length, length, width)[None, None]
    check(backend, make(1, 2, 1, length, length, head_dim, head_dim), visible, block, dtype)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("offset", [-40, 0, 40])
def test_causal_lists(backend: Backend, offset: int, dtype: torch.dtype) -> None:
    """What lies behind the diagonal is left out of lists of all blocks, and some rows have nothing left."""
    visible = torch.ones(1, 1, 150, 150 + offset, dtype=torch.bool)
    visible[..., 16:48] = False
    check(backend, make(1, 2, 1, 150, 150 + offset, 16, 24), visible, (48, 16), dtype, causal=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mask_heads", [1, 2, 8])
def test_heads_that_share_keys(backend: Backend, mask_heads: int, dtype: torch.dtype) -> None:
    """Eight heads to two; a list each, so a key's queries end somewhere else for every head."""
    visible = random_mask(2, mask_heads, 50, 70, 16, 32)
    whole = visible.repeat_interleave(8 // mask_heads, 1)
    inputs = make(2, 8, 2, 50, 70, 16, 16)
    low = tuple(t.to(dtype) for t in inputs)
    found = run(backend, low, lists_of(visible, 16, 32))
    exact, plain = (results(lambda *t: attention(*t, whole), given) for given in (inputs, low))
    for name in NAMES:
        finite = exact[name].isfinite()
        error, allowed = ((of[name].double() - exact[name])[finite].abs().max() for of in (found, plain))
        assert error <= 2 * allowed + 3e-6, name


def embedded(t: Tensor) -> Tensor:
    """The same tensor inside of one full of NaN, whose rows and heads go on beyond it."""
    batch, heads, length, dim = t.shape
    around = torch.full((batch, heads + 1, length + 40, dim + 8), math.nan, dtype=t.dtype, device=t.device)
    inside = around[:, :heads, 3 : length + 3, :dim]
    inside.copy_(t)
    return inside


def shifted(t: Tensor) -> Tensor:
    """The same tensor, begun at an odd element: no vector of it is aligned."""
    around = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return around[1:].view(t.shape).copy_(t)


@pytest.mark.parametrize("layout", [embedded, shifted])
@pytest.mark.parametrize("dtype", LOW)
def test_memory_around(backend: Backend, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    inputs = tuple(t.to(dtype).to(backend.device) for t in make(1, 2, 1, 45, 75, 24, 40))
    mask = lists_of(random_mask(1, 2, 45, 75, 16, 32), 16, 32)
    expected = run(backend, inputs, mask)
    assert_same(backend, run(backend, tuple(layout(t) for t in inputs), mask), expected)


@pytest.mark.parametrize("dtype", LOW)
def test_gradients_of_one_result(backend: Backend, dtype: torch.dtype) -> None:
    """An expanded gradient of out without one of lse, and the other way round."""
    visible = random_mask(1, 2, 40, 50, 16, 16)
    mask = lists_of(visible, 16, 16).to(backend.device)
    inputs = make(1, 2, 2, 40, 50, 16, 16)
    low = tuple(t.to(dtype) for t in inputs)

    def gradients(function: Any, given: tuple[Tensor, ...], which: int) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in given]
        result = function(*leaves)[which]
        total = result[result.isfinite()].sum() if which else result.sum()
        return list(torch.autograd.grad(total, leaves, materialize_grads=True))

    for which in range(2):
        there = tuple(t.to(backend.device) for t in low)
        found = gradients(lambda *t: block_sparse_attention(*t, mask, return_lse=True), there, which)
        exact, plain = (gradients(lambda *t: attention(*t, visible), g, which) for g in (inputs, low))
        for a, e, p in zip(found, exact, plain, strict=True):
            assert (a.cpu().double() - e).abs().max() <= 2 * (p.double() - e).abs().max() + 4e-6


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_same_bits(backend: Backend, head_dim: int, dtype: torch.dtype) -> None:
    """In whatever order thread blocks and threads run; a race would show."""
    inputs = tuple(t.to(dtype) for t in make(1, 2, 1, 140, 150, head_dim, 72))
    mask = lists_of(random_mask(1, 2, 140, 150, 64, 32), 64, 32)
    first = run(backend, inputs, mask, causal=True)
    for seed in range(1, 4):
        if backend.name == "cuda":
            again = run(backend, inputs, mask, causal=True)
        else:
            with tilewright.testing.emulated(seed=seed):
                again = run(backend, inputs, mask, causal=True)
        assert all(torch.equal(again[name], first[name]) for name in NAMES)


@pytest.mark.parametrize("dtype", LOW)
def test_empty_rows_and_columns(backend: Backend, dtype: torch.dtype) -> None:
    """Queries without keys and keys without queries, whole blocks of them and some in a block."""
    visible = random_mask(1, 1, 100, 120, 32, 48)
    visible[:, :, 32:64] = False
    visible[:, :, 70:80] = False
    visible[..., 48:96] = False
    visible[..., :5] = False
    inputs = make(1, 1, 1, 100, 120, 40, 40)
    found = run(backend, tuple(t.to(dtype) for t in inputs), lists_of(visible, 32, 48))
    assert not any(t.isnan().any() for t in found.values())
    assert (found["out"][:, :, 32:64] == 0).all()
    assert (found["lse"][:, :, 70:80] == -math.inf).all()
    assert (found["dq"][:, :, 70:80] == 0).all()
    assert all((found[name][:, :, 48:96] == 0).all() for name in ("dk", "dv"))
    check(backend, inputs, visible, (32, 48), dtype)


@pytest.mark.parametrize("which", [0, 3])
@pytest.mark.parametrize("wrong", [-(2**31), -1, 7, 2**30])
def test_blocks_that_do_not_exist(backend: Backend, wrong: int, which: int) -> None:
    """Nobody looks at lists on a device, but no list makes a kernel leave the tensors."""
    mask = lists_of(torch.ones(1, 1, 64, 64, dtype=torch.bool), 16, 16)

    def spoiled(indices: Tensor) -> Tensor:
        return torch.where(indices == which, wrong, indices)

    bad = replace(mask, q2k_indices=spoiled(mask.q2k_indices), k2q_indices=spoiled(mask.k2q_indices))
    inputs = tuple(t.bfloat16() for t in make(1, 1, 1, 64, 64, 16, 16))
    for options in ({}, {"causal": True}):
        found = run(backend, inputs, bad, **options)
        assert not any(t.isnan().any() for t in found.values())
    if which == 3:  # else what comes after it may be left out as well
        out, _ = attention(*(t.float() for t in inputs), (torch.arange(64) < 48).expand(1, 1, 64, 64))
        torch.testing.assert_close(run(backend, inputs, bad)["out"].float(), out, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("wrong", [-2, 10**6])
def test_tables_that_do_not_exist(backend: Backend, wrong: int) -> None:
    mask = lists_of(random_mask(1, 1, 64, 64, 16, 16, seed=1), 16, 16)
    assert mask.q2k_bits is not None
    assert mask.k2q_bits is not None
    bad = replace(
        mask,
        q2k_bits=mask.q2k_bits.masked_fill(mask.q2k_bits >= 0, wrong),
        k2q_bits=mask.k2q_bits.masked_fill(mask.k2q_bits >= 0, wrong),
    )
    found = run(backend, tuple(t.bfloat16() for t in make(1, 1, 1, 64, 64, 16, 16)), bad)
    assert not any(t.isnan().any() for t in found.values())


def test_float64_has_no_kernel(backend: Backend) -> None:
    q, k, v = (t.to(backend.device) for t in make(1, 1, 1, 20, 20, 8, 8))
    mask: BlockMask = lists_of(torch.ones(1, 1, 20, 20, dtype=torch.bool), 16, 16).to(backend.device)
    with pytest.raises(NotImplementedError, match="q: float64 has no CUDA kernel"):
        block_sparse_attention(q, k, v, mask)
