"""Packed sequences as a torch op.

    tilewright::sequence_numbers  the number of the sequence that each step belongs to, from cu_seqlens

An op, because it looks at values: `torch.compile` need not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import check_boundaries
from ..._library import define


def _numbers(cu_seqlens: Tensor, length: int) -> Tensor:
    check_boundaries(cu_seqlens, length)
    steps = torch.arange(length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return (torch.searchsorted(cu_seqlens, steps, right=True, out_int32=True) - 1).unsqueeze(0)


def _fake_numbers(cu_seqlens: Tensor, length: int) -> Tensor:
    return cu_seqlens.new_empty((1, length), dtype=torch.int32)


define("sequence_numbers(Tensor cu_seqlens, SymInt length) -> Tensor", _numbers, _fake_numbers)

sequence_numbers = torch.ops.tilewright.sequence_numbers.default
