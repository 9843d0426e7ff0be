"""Several sequences one behind the other in a row of tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import INTEGERS, check_cu_seqlens, check_device, check_dtype, check_shape, check_tensor
from ..scan.ops.sequences import sequence_numbers


class Packing(NamedTuple):
    """Where the sequences lie.

    Attributes:
        seq_idx: ``(batch, length)``: the number of the sequence that each token belongs to.
        cu_seqlens: ``(sequences + 1,)``: where they start and end, if that was given.
    """

    seq_idx: Tensor
    cu_seqlens: Tensor | None

    def ends(self) -> Tensor:
        """Where the sequences of one row start and end."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens
        batch, length = self.seq_idx.shape
        if batch != 1:
            raise NotImplementedError(f"seq_idx needs a batch of 1 in a Mamba-1 layer, got {batch}")
        if length == 0:
            return self.seq_idx.new_zeros(1)
        starts = torch.nonzero(self.seq_idx[0, 1:] != self.seq_idx[0, :-1]).flatten() + 1
        return F.pad(F.pad(starts, (1, 0)), (0, 1), value=length)


def packing_of(seq_idx: Tensor | None, cu_seqlens: Tensor | None, x: Tensor, owner: str) -> Packing | None:
    """Checks what a layer was given beside x, its argument `owner`; None where each row is one sequence."""
    if seq_idx is not None and cu_seqlens is not None:
        raise ValueError("seq_idx and cu_seqlens say the same: give one of them, got both")
    batch, length, _ = x.shape
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x.device, owner)
        if batch != 1:
            raise ValueError(f"cu_seqlens needs a batch of 1, which holds all sequences, got {batch}")
        return Packing(sequence_numbers(cu_seqlens, length), cu_seqlens)
    if seq_idx is None:
        return None
    check_tensor("seq_idx", seq_idx)
    check_dtype("seq_idx", seq_idx, INTEGERS)
    check_shape("seq_idx", seq_idx, (batch, length), "(batch, length)")
    check_device("seq_idx", seq_idx, x.device, owner)
    return Packing(seq_idx, None)
