"""What estimators of block masks need as torch ops: schema, implementation, fake kernels.

    tilewright::select_blocks    of each row of scores the best candidates keep their codes
    tilewright::position_tables  bit tables of blocks whose keys are in any order, causal by position

None of them is differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backend
from .._library import define


def _fake_select_blocks(scores: Tensor, candidates: Tensor, count: int, mass: float) -> Tensor:
    shape = [max(a, b) if a and b else 0 for a, b in zip(scores.shape, candidates.shape, strict=True)]
    return candidates.new_empty(shape)


def _select_blocks(scores: Tensor, candidates: Tensor, count: int, mass: float) -> Tensor:
    codes, threads = _fake_select_blocks(scores, candidates, count, mass), _backend.num_threads()
    workspace = scores.new_empty(12 * codes.shape[3] * max(threads, 1), dtype=torch.uint8)
    _backend.C.select_blocks(scores, candidates, codes, count, mass, workspace, threads)
    return codes


def _fake_position_tables(
    positions: Tensor, pairs: Tensor, q_len: int, block_q: int, block_kv: int
) -> Tensor:
    batch, heads, _ = positions.shape
    return positions.new_empty((batch * heads * len(pairs), block_q, -(-block_kv // 32)))


def _position_tables(positions: Tensor, pairs: Tensor, q_len: int, block_q: int, block_kv: int) -> Tensor:
    tables = _fake_position_tables(positions, pairs, q_len, block_q, block_kv)
    _backend.C.position_tables(positions, pairs, tables, q_len, block_kv, _backend.num_threads())
    return tables


define(
    "select_blocks(Tensor scores, Tensor candidates, int count, float mass) -> Tensor",
    _select_blocks,
    _fake_select_blocks,
)
define(
    "position_tables(Tensor positions, Tensor pairs, int q_len, int block_q, int block_kv) -> Tensor",
    _position_tables,
    _fake_position_tables,
)

select_blocks = torch.ops.tilewright.select_blocks.default
position_tables = torch.ops.tilewright.position_tables.default
