"""What estimators keep of the attention of a trained model's heads, for how many blocks."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.attention import BlockMask, BlockSparse, block_sparse_attention, estimate
from tilewright.attention.permuted import choose

_SHARES = (0.5, 0.7, 0.8, 0.9, 0.95)
_COUNTS = (4, 8, 12, 16, 24)

# Of q, k and a setting: the keys as they are read, and the mask of their blocks.
Choose = Callable[[Tensor, Tensor, Any], tuple[Tensor, BlockMask]]


def measure(model: nn.Module, inputs: Tensor, block: int) -> dict[str, list[dict[str, float]]]:
    """For each estimator, a row a setting: the share of causal blocks, of attention, and the milliseconds.

    Args:
        model: one that calls attention through transformers; a copy of it is looked into.
        inputs: (1, length) token numbers.
        block: size of the blocks.
    """
    layers = _queries_and_keys(model, inputs, block)
    causal = BlockMask.causal(inputs.shape[1], block_size=block)
    dense = [_lse(q, k, causal) for q, k in layers]
    return {
        name: [_row(layers, dense, causal.density, setting, chosen) for setting in settings]
        for name, (settings, chosen) in _estimators(block).items()
    }


def _estimators(block: int) -> dict[str, tuple[tuple[Any, ...], Choose]]:
    def by_share(estimator: Callable[..., BlockMask], **options: Any) -> Choose:
        return lambda q, k, share: (k, estimator(q, k, block_size=block, threshold=share, **options))

    def by_count(estimator: Callable[..., BlockMask]) -> Choose:
        return lambda q, k, count: (k, estimator(q, k, block_size=block, count=count))

    def permuted(q: Tensor, k: Tensor, share: Any) -> tuple[Tensor, BlockMask]:
        _, keys, mask = choose(q, k, block, 4 * block, share, True, 1 / math.sqrt(q.shape[3]))
        return keys, mask

    return {
        "mean_pool_top_p": (_SHARES, by_share(estimate.mean_pool_top_p)),
        "max_pool_top_k": (_COUNTS, by_count(estimate.max_pool_top_k)),
        "antidiagonal": (_SHARES, by_share(estimate.antidiagonal)),
        "top_k": (_COUNTS, by_count(estimate.top_k)),
        "permuted keys": (_SHARES, permuted),
    }


def _queries_and_keys(model: nn.Module, inputs: Tensor, block: int) -> list[tuple[Tensor, Tensor]]:
    """What each layer's attention is called with."""
    from tilewright.swapping import swap

    found = []

    def look(q: Tensor, k: Tensor) -> BlockMask:
        found.append((q.detach().clone(), k.detach().clone()))
        return BlockMask.causal(q.shape[2], k.shape[2], block_size=block)

    looked_into = copy.deepcopy(model).eval()
    swap(looked_into, attention=BlockSparse(look))
    with torch.no_grad():
        looked_into(inputs, use_cache=False)
    return found


def _lse(q: Tensor, k: Tensor, mask: BlockMask) -> Tensor:
    _, lse = block_sparse_attention(q, k, k.new_zeros((*k.shape[:3], 8)), mask, return_lse=True)
    return lse


def _row(
    layers: list[tuple[Tensor, Tensor]],
    dense: list[Tensor],
    causal_density: float,
    setting: Any,
    chosen: Choose,
) -> dict[str, float]:
    """Means over layers, heads and queries."""
    density, mass, seconds = 0.0, 0.0, 0.0
    for (q, k), lse in zip(layers, dense, strict=True):
        start = time.perf_counter()
        keys, mask = chosen(q, k, setting)
        seconds += time.perf_counter() - start
        density += mask.density / causal_density / len(layers)
        mass += float((_lse(q, keys, mask) - lse).exp().mean()) / len(layers)
    return {
        "setting": setting,
        "density": round(density, 4),
        "mass": round(mass, 4),
        "ms": round(seconds / len(layers) * 1e3, 2),
    }
