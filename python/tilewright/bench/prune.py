"""The pruning family's cases: whole models, sparse layers beside dense ones, how masks are found."""

from __future__ import annotations

from . import prune_activation, prune_block_sparse, prune_masks, prune_models, prune_semi
from .case import Case, Plan, grouped
from .prune_layers import sizes

PEERS = ("torch", "transformers")
GPU_PEERS = ()


def cases(plan: Plan) -> list[Case]:
    """All cases of the family; none for a model none of whose layers fits."""
    if not sizes(plan, (1, 1)):
        return []
    return [
        *grouped("whole models", prune_models.cases(plan)),
        *grouped("block-sparse layers", prune_block_sparse.forward_cases(plan)),
        *grouped("block-sparse layers, gradients", prune_block_sparse.gradient_cases(plan)),
        *grouped("2:4 layers", prune_semi.cases(plan)),
        *grouped("activation-sparse layers", prune_activation.cases(plan)),
        *grouped("masks", prune_masks.cases(plan)),
    ]
