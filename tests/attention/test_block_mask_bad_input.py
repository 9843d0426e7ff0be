"""What BlockMask says of arguments that are wrong."""

from dataclasses import replace

import pytest
import torch
from block_mask_cases import random_mask
from torch.nn.attention import flex_attention

import tilewright.testing
from tilewright.attention import BlockMask

COUNTS, INDICES = torch.tensor([2, 1]), torch.tensor([[0, 2], [1, 9]])
BLOCKS = torch.ones(2, 3, dtype=torch.bool)
TABLE = torch.ones(1, 16, 16, dtype=torch.bool)


def from_lists(counts=COUNTS, indices=INDICES, block_size=16, *, kv_len=48, **rest) -> BlockMask:
    return BlockMask.from_lists(counts, indices, block_size, kv_len=kv_len, **rest)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: BlockMask.causal(8, block_size=24),
            ValueError,
            "block_size must be a multiple of 16 from 16 to 256, got 24",
        ),
        (lambda: BlockMask.causal(8, block_size=(16, 272)), ValueError, r"block_size .* got \(16, 272\)"),
        (lambda: BlockMask.causal(8, block_size=0), ValueError, "block_size must be a multiple of 16"),
        (lambda: BlockMask.causal(8, block_size=16.0), TypeError, "block_size must be an int or a pair"),
        (
            lambda: BlockMask.causal(8, block_size=(16, 16, 16)),
            TypeError,
            "block_size must be an int or a pair",
        ),
        (lambda: BlockMask.causal(-1), ValueError, "seq_len must be an int of at least 0, got -1"),
        (lambda: BlockMask.causal(4, -1), ValueError, "kv_len must be an int of at least 0, got -1"),
        (lambda: BlockMask.causal(2.5), TypeError, "seq_len must be an int of at least 0, got 2.5"),
        (lambda: BlockMask.sliding_window(8, 0), ValueError, "window must be a positive int, got 0"),
        (
            lambda: BlockMask.sliding_window(8, 1, sink=-1),
            ValueError,
            "sink must be an int of at least 0",
        ),
        (lambda: BlockMask.dilated(8, 1, 0), ValueError, "dilation must be a positive int, got 0"),
        (
            lambda: BlockMask.prefix_lm(8, 9),
            ValueError,
            r"prefix must be between 0 and seq_len = 8, got \[9\]",
        ),
        (lambda: BlockMask.prefix_lm(8, [1, -2]), ValueError, "prefix must be between 0 and seq_len"),
        (lambda: BlockMask.prefix_lm(8, 0.5), TypeError, "prefix must be integers, got dtype float32"),
        (lambda: BlockMask.document([1, 4]), ValueError, "cu_seqlens must be .* start at 0 and never fall"),
        (
            lambda: BlockMask.document([0, 4, 2]),
            ValueError,
            "cu_seqlens must be .* start at 0 and never fall",
        ),
        (lambda: BlockMask.document([]), ValueError, "cu_seqlens must be .* start at 0 and never fall"),
        (lambda: BlockMask.document(torch.zeros(2, 2).long()), ValueError, "cu_seqlens must be"),
        (lambda: BlockMask.block_diagonal(8, 0), ValueError, "chunk must be a positive int, got 0"),
        (lambda: BlockMask.bigbird(8, window=2), ValueError, "window must be odd, got 2"),
        (lambda: BlockMask.bigbird(8, heads=0), ValueError, "heads must be a positive int, got 0"),
        (
            lambda: BlockMask.bigbird(8, random_blocks=-1),
            ValueError,
            "random_blocks must be an int",
        ),
        (lambda: BlockMask.bigbird(8, block_size=(16, 16)), TypeError, "block_size must be one number"),
        (
            lambda: BlockMask.from_dense(BLOCKS.float(), 16),
            TypeError,
            "blocks must have dtype bool, got float32",
        ),
        (lambda: BlockMask.from_dense([[True]], 16), TypeError, "blocks must be a tensor, got list"),
        (lambda: BlockMask.from_dense(BLOCKS[0], 16), ValueError, r"blocks must have shape .* got \(3,\)"),
        (
            lambda: BlockMask.from_dense(BLOCKS, 16, q_len=33),
            ValueError,
            "q_len must be 17 to 32 for 2 blocks of 16, got 33",
        ),
        (
            lambda: BlockMask.from_dense(BLOCKS, 16, kv_len=32),
            ValueError,
            "kv_len must be 33 to 48 for 3 blocks of 16, got 32",
        ),
        (
            lambda: BlockMask.from_torch(BLOCKS),
            TypeError,
            "block_mask must be a torch.nn.attention.flex_attention.BlockMask",
        ),
        (lambda: from_lists(COUNTS.float()), TypeError, "counts must have dtype int32 or int64, got float32"),
        (
            lambda: from_lists(indices=INDICES.bool()),
            TypeError,
            "indices must have dtype int32 or int64, got bool",
        ),
        (lambda: from_lists(indices=INDICES[:1]), ValueError, r"indices must have shape counts' \(1, 1, 2\)"),
        (lambda: from_lists(kv_len=2.0), TypeError, "kv_len must be an int of at least 0"),
        (lambda: from_lists(q_len=40), ValueError, "q_len must be 17 to 32 for 2 blocks of 16, got 40"),
        (lambda: from_lists(bits=INDICES), ValueError, "bits and tables go together"),
        (lambda: from_lists(tables=TABLE), ValueError, "bits and tables go together"),
        (
            lambda: from_lists(bits=INDICES[:, :1], tables=TABLE),
            ValueError,
            "bits must have the shape of indices",
        ),
        (
            lambda: from_lists(bits=INDICES, tables=TABLE[:, :8]),
            ValueError,
            r"tables must be bool \(T, 16, 16\) or int32 \(T, 16, 1\), got bool",
        ),
        (
            lambda: from_lists(bits=INDICES, tables=TABLE.long()),
            ValueError,
            "tables must be bool .* got int64",
        ),
    ],
)
def test_messages(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


BAD_LISTS = [
    (
        {"counts": torch.tensor([3, 1])},
        "list 0 of batch 0, head 0 is wrong .its count is negative or exceeds",
    ),
    ({"counts": torch.tensor([2, -1])}, "list 1 of batch 0, head 0 is wrong .its count is negative"),
    ({"counts": torch.tensor([2, 2**32 + 1])}, "list 1 .*its count is negative or exceeds the capacity"),
    (
        {"counts": torch.tensor([2, 2])},
        "list 1 of batch 0, head 0 is wrong .it names a block that does not exist",
    ),
    (
        {"indices": torch.tensor([[0, 2], [-1, 9]])},
        "list 1 of batch 0, head 0 is wrong .it names a block that does",
    ),
    (
        {"indices": torch.tensor([[0, 2**32], [1, 9]])},
        "list 0 of batch 0, head 0 is wrong .it names a block that does",
    ),
    (
        {"indices": torch.tensor([[2, 2], [1, 9]])},
        "list 0 of batch 0, head 0 is wrong .it names a block more than once",
    ),
    (
        {"bits": torch.tensor([[0, -1], [1, 9]]), "tables": TABLE},
        "list 1 .*it names a bit table that does not exist",
    ),
    (
        {"bits": torch.tensor([[0, -2], [0, 9]]), "tables": TABLE},
        "list 0 .*it names a bit table that does not exist",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD_LISTS)
def test_bad_lists_raise_on_a_cpu(change, message: str) -> None:
    with pytest.raises(ValueError, match=f"counts, indices and bits: {message}"):
        from_lists(**change)


@pytest.mark.parametrize(("change", "message"), BAD_LISTS)
def test_bad_lists_are_dropped_on_a_gpu_and_validate_raises(change, message: str) -> None:
    with tilewright.testing.emulated():
        mask = from_lists(**change)
        with pytest.raises(ValueError, match=f"given to from_lists: {message}"):
            mask.validate()
        rest = replace(mask, _flags=None).validate()
        assert int(rest.q2k_counts.sum()) <= 3
        assert from_lists().validate() is not None


def test_flex_masks_of_other_sizes() -> None:
    for size in (8, 512):
        theirs = flex_attention.create_block_mask(
            lambda b, h, q, k: q >= k, None, None, 1024, 1024, device="cpu", BLOCK_SIZE=size
        )
        with pytest.raises(ValueError, match=r"block_mask\.BLOCK_SIZE must be a multiple of 16"):
            BlockMask.from_torch(theirs)


def test_validate_finds_what_was_changed(backend) -> None:
    mask = random_mask(4, 200, 300, 16, 16).to(backend.device)
    row = int(mask.q2k_counts.argmax())
    assert int(mask.q2k_counts.max()) >= 2

    def changed(name: str, edit) -> BlockMask:
        tensor = getattr(mask, name).clone()
        edit(tensor)
        return replace(mask, **{name: tensor})

    def swap(t: torch.Tensor) -> None:
        t[0, 0, row, :2] = t[0, 0, row, :2].flip(0)

    def first(value: int):
        return lambda t: t[0, 0, row].__setitem__(0, value)

    for wrong, message in [
        (changed("q2k_indices", swap), "q2k_indices must be ascending"),
        (changed("q2k_indices", first(99)), f"q2k: list {row} .*names a block that does not exist"),
        (changed("q2k_bits", first(7)), f"q2k: list {row} .*names a bit table that does not exist"),
        (changed("k2q_counts", lambda t: t.zero_()), "k2q must hold the same blocks as q2k"),
        (replace(mask, q2k_indices=mask.q2k_indices.long()), "q2k_indices must be contiguous int32"),
        (
            replace(mask, q2k_bits=None),
            "q2k_bits must be a tensor exactly if there are tables, of which there are 3",
        ),
        (replace(mask, kv_len=400), r"must have \(13, 25\) rows to fit the lengths, got \(13, 19\)"),
        (replace(mask, block_size=(16, 20)), "block_size must be a multiple of 16"),
    ]:
        with pytest.raises(ValueError, match=message):
            wrong.validate()
