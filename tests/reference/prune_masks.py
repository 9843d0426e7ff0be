"""Scores of the units of a weight and masks of the best, from their definitions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def unit_scores(
    weight: Tensor,
    rows: int,
    columns: int,
    criterion: str,
    norm: Tensor | None = None,
    gradient: Tensor | None = None,
    p: float = 2,
) -> Tensor:
    """(units down, units across) in the weight's dtype; each unit is a slice of the weight."""
    units = []
    for top in range(0, weight.shape[0], rows):
        for left in range(0, weight.shape[1], columns):
            part = slice(top, top + rows), slice(left, left + columns)
            if criterion == "taylor":
                units.append((weight[part] * gradient[part]).sum().abs())
            elif criterion == "lp":
                units.append(torch.linalg.vector_norm(weight[part], p))
            else:
                by = norm[None, left : left + columns] if norm is not None else 1
                units.append((weight[part].abs() * by).sum())
    down, across = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    return torch.stack(units).view(down, across) if units else weight.new_empty(down, across)


def kept_units(units: int, sparsity: float) -> int:
    """round(sparsity * units) go, but never all."""
    return max(units - round(sparsity * units), min(units, 1))


def best(scores: Tensor, kept: int) -> Tensor:
    """The `kept` highest of all; of equals the first."""
    values = scores.double().cpu().numpy().ravel()
    mask = np.zeros(values.size, dtype=bool)
    mask[np.argsort(-values, kind="stable")[:kept]] = True
    return torch.from_numpy(mask).view(scores.shape)


def best_of_rows(scores: Tensor, kept: int) -> Tensor:
    return torch.stack([best(row, kept) for row in scores]) if len(scores) else scores.bool()


def n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    return best_of_rows(scores.reshape(-1, m), n).view(scores.shape)


def expand(units: Tensor, rows: int, columns: int, shape: tuple[int, int]) -> Tensor:
    whole = units.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return whole[: shape[0], : shape[1]]


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 with Python's integers."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k0, b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k1, a & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c
