"""Masks that the tests of block masks share."""

from __future__ import annotations

import torch
from torch import Tensor

from reference import block_mask as reference
from tilewright.attention import BlockMask
from tilewright.attention.codes import PARTIAL


def read_lists(counts: Tensor, indices: Tensor, bits: Tensor | None) -> list[list[tuple[int, int]]]:
    """The lists of all batches and heads, one after the other: (block, table or -1)."""
    bits = torch.full_like(indices, -1) if bits is None else bits
    flat = zip(
        counts.flatten().tolist(), indices.flatten(0, 2).tolist(), bits.flatten(0, 2).tolist(), strict=True
    )
    return [list(zip(row[:count], kind[:count], strict=True)) for count, row, kind in flat]


def kinds_of(mask: BlockMask) -> Tensor:
    """0, 1 or 2 for each block that is absent, full or partial."""
    return mask._draft().codes.long().clamp(max=PARTIAL)


def check(mask: BlockMask, seen: Tensor) -> None:
    """The mask is (Bm, Hm, q_len, kv_len) or (q_len, kv_len), and no block is taken for partial in vain."""
    seen = seen[(None,) * (4 - seen.ndim)]
    assert torch.equal(mask.to_mask(), seen)
    for batch in range(seen.shape[0]):
        for head in range(seen.shape[1]):
            expected = reference.kinds(seen[batch, head], *mask.block_size)
            assert torch.equal(kinds_of(mask)[batch, head], expected)
    assert torch.equal(mask.to_dense(), kinds_of(mask) != 0)
    mask.validate()


def random_mask(seed: int, q_len: int, kv_len: int, block_q: int, block_kv: int, heads: int = 1) -> BlockMask:
    """Absent, full and partial blocks at random, listed in any order."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns, tables = -(-q_len // block_q), -(-kv_len // block_kv), 3
    order = torch.rand(1, heads, rows, columns, generator=generator).argsort(-1)
    counts = torch.randint(0, columns + 1, (1, heads, rows), generator=generator)
    bits = torch.randint(-1, tables, order.shape, generator=generator)
    seen = torch.rand(tables, block_q, block_kv, generator=generator) < 0.5
    size = (block_q, block_kv)
    return BlockMask.from_lists(counts, order, size, kv_len=kv_len, q_len=q_len, bits=bits, tables=seen)
