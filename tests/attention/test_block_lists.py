"""The kernels that build lists from a map of codes, and a map from lists."""

import pytest
import torch
from block_mask_cases import read_lists
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tilewright.testing
from reference import block_mask as reference
from tilewright import _C, _backend

SIZES = [(1, 1), (1, 7), (7, 1), (63, 65), (65, 63), (64, 64), (127, 129), (129, 260)]
ops = torch.ops.tilewright


def random_codes(
    shape: tuple[int, ...], density: float, largest: int = 6, dtype: torch.dtype = torch.uint8
) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    present = torch.rand(shape, generator=generator) < density
    return (torch.randint(1, largest + 1, shape, generator=generator) * present).to(dtype)


def expected_lists(codes: Tensor) -> list[list[tuple[int, int]]]:
    return [row for batch in codes.cpu() for head in batch for row in reference.lists(head)]


def check_lists(codes: Tensor, with_bits: bool = True) -> None:
    lists = ops.block_lists(codes, codes.shape[3], codes.shape[2], with_bits)
    for got, of in ((lists[:3], codes), (lists[3:], codes.transpose(2, 3))):
        counts, indices, bits = (tensor.cpu() for tensor in got)
        expected = expected_lists(of)
        if not with_bits:
            expected = [[(block, -1) for block, _ in row] for row in expected]
        assert read_lists(counts, indices, bits if with_bits else None) == expected
    for counts, listed in zip(ops.block_counts(codes), (lists[0], lists[3]), strict=True):
        assert torch.equal(counts, listed)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_lists_hold_what_the_map_holds(
    backend, size: tuple[int, int], density: float, dtype: torch.dtype
) -> None:
    codes = random_codes((2, 2, *size), density, dtype=dtype).to(backend.device)
    check_lists(codes)
    check_lists(codes, with_bits=False)


@pytest.mark.parametrize("size", [(2047, 70), (70, 2049)], ids=str)
def test_long_axes(backend, size: tuple[int, int]) -> None:
    check_lists(random_codes((1, 1, *size), 0.1).to(backend.device))


@pytest.mark.parametrize("shape", [(1, 1, 0, 5), (1, 1, 5, 0), (0, 1, 3, 3), (1, 0, 3, 3)], ids=str)
def test_empty_maps(backend, shape: tuple[int, ...]) -> None:
    check_lists(torch.ones(shape, dtype=torch.uint8, device=backend.device))


def test_maps_of_bools_hold_full_blocks(backend) -> None:
    codes = random_codes((1, 2, 33, 70), 0.5).to(backend.device) > 0
    lists = ops.block_lists(codes, 70, 33, False)
    dense = ops.block_codes(lists[0], lists[1], None, 70, 0)[0]
    assert torch.equal(dense == 1, codes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32], ids=str)
@pytest.mark.parametrize("view", ["transposed", "sliced", "expanded", "permuted"])
def test_strides_are_honoured(backend, view: str, dtype: torch.dtype) -> None:
    codes = random_codes((2, 3, 70, 41), 0.4, dtype=dtype).to(backend.device)
    views = {
        "transposed": codes.transpose(2, 3),
        "sliced": codes[:, :, ::2, 3::3],
        "expanded": codes[:1, :, :1].expand(2, 3, 9, 41),
        "permuted": codes.permute(3, 1, 0, 2)[:3],
    }
    check_lists(views[view])


def test_what_exceeds_the_capacity_is_left_out(backend) -> None:
    codes = torch.ones(1, 1, 40, 70, dtype=torch.uint8, device=backend.device)
    counts, indices, bits, *_ = ops.block_lists(codes, 5, 40, True)
    assert bool((counts == 5).all())
    assert bool((indices == torch.arange(5, device=backend.device)).all())
    assert bool((bits == -1).all())


def test_threads_and_runs_give_the_same_bits(backend, monkeypatch) -> None:
    codes = random_codes((1, 3, 200, 300), 0.3).to(backend.device)
    results = []
    for threads in (1, 2, 3, 1):
        monkeypatch.setattr(_backend, "num_threads", lambda threads=threads: threads)
        lists = ops.block_lists(codes, 300, 200, True)
        results.append([read_lists(*(t.cpu() for t in part)) for part in (lists[:3], lists[3:])])
    assert all(result == results[0] for result in results)


def test_seeds_of_the_emulator_give_the_same_lists() -> None:
    codes = random_codes((1, 1, 70, 300), 0.3)
    for seed in range(3):
        with tilewright.testing.emulated(seed=seed):
            check_lists(codes)


@pytest.mark.parametrize("tables", [4, 300])
def test_codes_come_back(backend, tables: int) -> None:
    dtype = torch.uint8 if tables < 254 else torch.int32
    codes = random_codes((2, 2, 33, 70), 0.4, tables + 1, dtype).to(backend.device)
    counts, indices, bits, *_ = ops.block_lists(codes, 70, 33, True)
    back, flags = ops.block_codes(counts, indices, bits, 70, tables)
    assert back.dtype == dtype
    assert torch.equal(back, codes)
    assert not bool(flags.any())


def test_order_does_not_matter_and_the_rest_is_not_read(backend) -> None:
    indices = torch.tensor([[[[5, 1, 3, 999], [0, -7, 2**30, 4]]]], dtype=torch.int32, device=backend.device)
    counts = torch.tensor([[[3, 1]]], dtype=torch.int32, device=backend.device)
    codes, flags = ops.block_codes(counts, indices, None, 6, 0)
    assert codes.tolist() == [[[[0, 1, 0, 1, 0, 1], [1, 0, 0, 0, 0, 0]]]]
    assert not bool(flags.any())


def test_wrong_entries_are_dropped_and_flagged(backend) -> None:
    rows = [
        ([3, 1, 0, 0], [-1] * 4, 2, 0),
        ([3, 1, 0, 0], [-1] * 4, 9, 1 | 4),  # a count above the capacity: all of them are read
        ([3, 1, 0, 2], [-1] * 4, -3, 1),
        ([6, -1, 2, 2**31 - 1], [-1] * 4, 4, 2),
        ([4, 2, 4, 4], [0, -1, 1, -1], 4, 4),
        ([4, 2, 1, 0], [0, 2, -2, 1], 4, 8),
    ]
    indices = torch.tensor([[[row[0] for row in rows]]], dtype=torch.int32, device=backend.device)
    bits = torch.tensor([[[row[1] for row in rows]]], dtype=torch.int32, device=backend.device)
    counts = torch.tensor([[[row[2] for row in rows]]], dtype=torch.int32, device=backend.device)
    codes, flags = ops.block_codes(counts, indices, bits, 6, 2)
    assert flags.flatten().tolist() == [row[3] for row in rows]
    assert codes[0, 0].tolist() == [
        [0, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 0, 2, 0],  # of a repeated one the first stays
        [3, 0, 0, 0, 2, 0],
    ]


def test_repeats_far_apart_are_found(backend) -> None:
    indices = torch.arange(200, dtype=torch.int32, device=backend.device).repeat(3, 1)[None, None]
    indices[0, 0, 1, 199] = 0
    indices[0, 0, 2, 40] = 41
    counts = torch.full((1, 1, 3), 200, dtype=torch.int32, device=backend.device)
    _, flags = ops.block_codes(counts, indices, None, 200, 0)
    assert flags.flatten().tolist() == [0, 4, 4]


@given(
    shape=st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 140), st.integers(0, 140)),
    density=st.sampled_from([0.0, 0.05, 0.5, 0.95, 1.0]),
    wide=st.booleans(),
    swap=st.booleans(),
    level=st.sampled_from(_C.cpu_levels()),
)
def test_any_map(shape: tuple[int, ...], density: float, wide: bool, swap: bool, level: str) -> None:
    before = _C.cpu_level()
    codes = random_codes(shape, density, dtype=torch.int32 if wide else torch.uint8)
    try:
        _C.set_cpu_level(level)
        check_lists(codes.transpose(2, 3) if swap else codes)
    finally:
        _C.set_cpu_level(before)


def test_opcheck() -> None:
    codes = random_codes((1, 2, 9, 11), 0.5)
    counts, indices, bits, *_ = ops.block_lists(codes, 11, 9, True)
    torch.library.opcheck(ops.block_counts, (codes,))
    torch.library.opcheck(ops.block_codes, (counts, indices, bits, 11, 5))
    # Entries beyond a count are undefined, so all are made defined here.
    full = torch.ones_like(codes)
    torch.library.opcheck(ops.block_lists, (full, 11, 9, True))
    torch.library.opcheck(ops.block_lists, (full, 11, 9, False))


def test_bad_maps() -> None:
    with pytest.raises(TypeError, match="codes: got dtype int64, allowed: bool, uint8, int32"):
        ops.block_counts(torch.ones(1, 1, 3, 4, dtype=torch.int64))
