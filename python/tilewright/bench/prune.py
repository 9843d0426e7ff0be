"""The pruning family's cases: sparse layers beside dense ones, and how masks are found."""

from __future__ import annotations

import torch

from . import prune_activation, prune_block_sparse, prune_masks, prune_semi
from .case import Case

PEERS = ("torch",)


def cases(device: torch.device, quick: bool) -> list[Case]:
    """All cases of the family for a device; `quick` shrinks the work."""
    return [
        *prune_block_sparse.cases(device, quick),
        *prune_semi.cases(device, quick),
        *prune_activation.cases(device, quick),
        *prune_masks.cases(device, quick),
    ]
