"""The lists of block masks as torch ops: schema, implementation, fake kernels.

    tilewright::block_counts  how long the lists of a map of codes are, both ways
    tilewright::block_lists   the lists of a map of codes, both ways
    tilewright::block_codes   the map of codes of lists, and what is wrong with them

A map of codes is (batch, heads, query blocks, key blocks): 0 absent, 1 full, 2 + t partial, with bit table t.
None of them is differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backend
from .._library import define

NARROW_TABLES = 253  # with more of them codes are int32 instead of uint8


def code_dtype(tables: int) -> torch.dtype:
    """The dtype of codes that name so many tables."""
    return torch.uint8 if tables <= NARROW_TABLES else torch.int32


def _block_counts(codes: Tensor) -> tuple[Tensor, Tensor]:
    q2k, k2q = _fake_block_counts(codes)
    _backend.C.block_lists(codes, q2k, None, None, k2q, None, None, _backend.num_threads())
    return q2k, k2q


def _new_lists(codes: Tensor, rows: int, capacity: int, with_bits: bool) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*codes.shape[:2], rows)
    counts = codes.new_empty(shape, dtype=torch.int32)
    indices = codes.new_empty((*shape, capacity), dtype=torch.int32)
    return counts, indices, torch.empty_like(indices) if with_bits else indices.new_empty((0,))


def _allocate(
    codes: Tensor, q_capacity: int, kv_capacity: int, with_bits: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        *_new_lists(codes, codes.shape[2], q_capacity, with_bits),
        *_new_lists(codes, codes.shape[3], kv_capacity, with_bits),
    )


def _block_lists(
    codes: Tensor, q_capacity: int, kv_capacity: int, with_bits: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    lists = _allocate(codes, q_capacity, kv_capacity, with_bits)
    q_bits, kv_bits = (lists[2], lists[5]) if with_bits else (None, None)
    threads = _backend.num_threads()
    _backend.C.block_lists(codes, lists[0], lists[1], q_bits, lists[3], lists[4], kv_bits, threads)
    return lists


def _block_codes(
    counts: Tensor, indices: Tensor, bits: Tensor | None, blocks: int, tables: int
) -> tuple[Tensor, Tensor]:
    codes, flags = _fake_block_codes(counts, indices, bits, blocks, tables)
    counts, indices = counts.contiguous(), indices.contiguous()
    bits = None if bits is None else bits.contiguous()
    _backend.C.block_codes(counts, indices, bits, tables, codes, flags, _backend.num_threads())
    return codes, flags


def _fake_block_counts(codes: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, rows, columns = codes.shape
    q2k = codes.new_empty((batch, heads, rows), dtype=torch.int32)
    return q2k, codes.new_empty((batch, heads, columns), dtype=torch.int32)


def _fake_block_codes(
    counts: Tensor, indices: Tensor, bits: Tensor | None, blocks: int, tables: int
) -> tuple[Tensor, Tensor]:
    codes = counts.new_empty((*counts.shape, blocks), dtype=code_dtype(tables))
    return codes, counts.new_empty(counts.shape)


define("block_counts(Tensor codes) -> (Tensor, Tensor)", _block_counts, _fake_block_counts)
define(
    "block_lists(Tensor codes, int q_capacity, int kv_capacity, bool with_bits) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _block_lists,
    _allocate,
)
define(
    "block_codes(Tensor counts, Tensor indices, Tensor? bits, int blocks, int tables) -> (Tensor, Tensor)",
    _block_codes,
    _fake_block_codes,
)
