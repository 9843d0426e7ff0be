"""What each block of queries sees, element by element and one block after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def elements(sees: Callable[[int, int], bool], q_len: int, kv_len: int) -> Tensor:
    """Bool (q_len, kv_len) of a predicate over (query, key)."""
    rows = [[bool(sees(q, k)) for k in range(kv_len)] for q in range(q_len)]
    return torch.tensor(rows, dtype=torch.bool).reshape(q_len, kv_len)


def kinds(seen: Tensor, block_q: int, block_kv: int) -> Tensor:
    """For each block of a mask (q_len, kv_len): 0 absent, 1 full, 2 partial."""
    q_len, kv_len = seen.shape
    rows = []
    for q in range(0, q_len, block_q):
        blocks = [seen[q : q + block_q, k : k + block_kv] for k in range(0, kv_len, block_kv)]
        rows.append([0 if not block.any() else 1 if block.all() else 2 for block in blocks])
    return torch.tensor(rows, dtype=torch.int64).reshape(-(-q_len // block_q), -(-kv_len // block_kv))


def lists(codes: Tensor) -> list[list[tuple[int, int]]]:
    """For each row of codes (rows, columns): (column, code - 2) of those that are not zero."""
    return [[(j, code - 2) for j, code in enumerate(row) if code] for row in codes.tolist()]
