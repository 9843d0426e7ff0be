"""SparseGPT from the optimal brain surgeon's formula: no Cholesky factor, an inverse for every column."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def inverses(hessian: Tensor) -> list[Tensor]:
    """Of the columns from i on, for each i."""
    return [torch.linalg.inv(hessian[i:, i:]) for i in range(len(hessian))]


def remove(
    weight: Tensor, hessian: Tensor, width: int, choose: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Columns from left to right; every `width` columns `choose` makes the mask of the next ones.

    It is given their weights as they are by then and the root of the inverse's diagonal, 1 a column.
    """
    weight = weight.clone()
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    found = inverses(hessian)
    roots = torch.stack([x[0, 0] for x in found]).sqrt()
    for i, inverse in enumerate(found):
        if i % width == 0:
            mask[:, i : i + width] = choose(weight[:, i : i + width], roots[i : i + width])
        error = torch.where(mask[:, i], 0, weight[:, i]) / inverse[0, 0]
        weight[:, i:] -= error[:, None] * inverse[0]
        weight[:, i] *= mask[:, i]
    return weight, mask


def damped(hessian: Tensor, damping: float) -> Tensor:
    """What sparsegpt makes of a hessian: dead inputs apart from the others, damping on the diagonal."""
    hessian = hessian.clone()
    dead = hessian.diagonal() == 0
    damp = damping * hessian.diagonal().sum() / (~dead).sum()
    hessian[dead] = 0
    hessian[:, dead] = 0
    hessian.diagonal()[dead] = 1
    hessian.diagonal().add_(damp)
    return hessian
