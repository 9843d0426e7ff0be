"""What estimators of block masks choose, by sorting and by loops, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def best(scores: Tensor, candidates: Tensor, count: int, mass: float) -> Tensor:
    """The codes of a row's best candidates: `count` of them, or the fewest that sum up to `mass`."""
    numbers = [i for i in range(len(scores)) if candidates[i] != 0]
    numbers.sort(key=lambda i: -float(scores[i]))  # stable: the first of equal ones stays the first
    total, kept = sum(float(scores[i]) for i in numbers), 0.0
    out = torch.zeros_like(candidates)
    for rank, i in enumerate(numbers):
        if rank >= count if count else mass < 1 and kept >= mass * total:
            break
        out[i] = candidates[i]
        kept += float(scores[i])
    return out


def block_means(x: Tensor, block: int) -> Tensor:
    return torch.stack([part.double().mean(-2) for part in x.split(block, dim=-2)], dim=-2)


def antidiagonal_masses(q: Tensor, k: Tensor, block: int, stride: int, scale: float) -> Tensor:
    """Masses (nq, nk) of one head with as many queries as keys, causal; whole blocks alone."""
    tiles = q.shape[0] // stride
    scores = torch.full((tiles, tiles), -math.inf, dtype=torch.float64)
    for i in range(tiles):
        for j in range(i + 1):
            pairs = [(i * stride + stride - 1 - t, j * stride + t) for t in range(stride)]
            scores[i, j] = scale * sum(float(q[a].double() @ k[b].double()) for a, b in pairs) / stride
    mass, per = scores.softmax(-1), block // stride
    return mass.unflatten(0, (-1, per)).sum(1).unflatten(1, (-1, per)).sum(2)
