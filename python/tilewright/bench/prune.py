"""The pruning family's cases: whole models, sparse layers beside dense ones, how masks are found."""

from __future__ import annotations

import torch

from . import prune_activation, prune_block_sparse, prune_masks, prune_models, prune_semi
from .case import Case

PEERS = ("torch", "transformers")


def cases(device: torch.device, quick: bool) -> list[Case]:
    """All cases of the family for a device; `quick` shrinks the work."""
    return [
        *prune_models.cases(device, quick),
        *prune_block_sparse.cases(device, quick),
        *prune_semi.cases(device, quick),
        *prune_activation.cases(device, quick),
        *prune_masks.cases(device, quick),
    ]
