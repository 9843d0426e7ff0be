"""How many sequences and chunks there are, and packed sequences as a torch op.

    tilewright::sequence_numbers  the number of the sequence that each step belongs to, from cu_seqlens

An op, because it looks at values: `torch.compile` need not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _backend
from ..._checks import check_boundaries
from ..._library import define


def sequence_count(batch: int, cu_seqlens: Tensor | None) -> int:
    """Sequences with a state each: one a batch row, or as many as are packed."""
    return batch if cu_seqlens is None else cu_seqlens.shape[0] - 1


def chunk_count(batch: int, length: int, cu_seqlens: Tensor | None, chunk: int) -> int:
    """Numbers that chunks of `chunk` steps may have; of packed sequences not every number is a chunk's."""
    if cu_seqlens is None:
        return batch * ((length + chunk - 1) // chunk)
    return length // chunk + sequence_count(batch, cu_seqlens)


def kept_chunks(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """Chunks whose states Mamba-2's scan keeps for backward: on a GPU none, they are computed again."""
    if x.is_cuda or _backend.is_emulated():
        return 0
    return chunk_count(x.shape[0], x.shape[1], cu_seqlens, _backend.C.SSD_CHUNK)


def _numbers(cu_seqlens: Tensor, length: int) -> Tensor:
    check_boundaries(cu_seqlens, length)
    steps = torch.arange(length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return (torch.searchsorted(cu_seqlens, steps, right=True, out_int32=True) - 1).unsqueeze(0)


def _fake_numbers(cu_seqlens: Tensor, length: int) -> Tensor:
    return cu_seqlens.new_empty((1, length), dtype=torch.int32)


define("sequence_numbers(Tensor cu_seqlens, SymInt length) -> Tensor", _numbers, _fake_numbers)

sequence_numbers = torch.ops.tilewright.sequence_numbers.default
