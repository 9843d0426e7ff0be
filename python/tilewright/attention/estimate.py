"""Which blocks of keys matter to a block of queries: block masks made from q and k.

    mean_pool_top_p   mean query against mean key, the best blocks up to a share of the probability
    max_pool_top_k    mean query against every key, the best of each block; a fixed number of blocks
    antidiagonal      XAttention: sums along antidiagonals of the scores, up to a share of the probability
    top_k             MoBA: mean query of a group of heads against mean key; a fixed number of blocks
    kept_mass         what share of the attention a mask keeps

Estimators look at q and k under `torch.no_grad()` and wait for no device. A query's own blocks and the first
ones are always seen.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATS, check_count, check_device, check_dtype, check_number, check_tensor, check_type
from . import builders
from .block_sparse import block_sparse_attention, scale_of
from .codes import FULL, Draft, Geometry, once
from .mask import BlockMask, BlockSize, check_block_size, mask_of
from .select_ops import select_blocks


@torch.no_grad()
def mean_pool_top_p(
    q: Tensor,
    k: Tensor,
    *,
    block_size: BlockSize = 128,
    threshold: float = 0.9,
    causal: bool = True,
    scale: float | None = None,
    sink_blocks: int = 1,
    local_blocks: int = 1,
) -> BlockMask:
    """Keeps the blocks that a softmax over block means puts `threshold` of its mass on.

    A block's score is the product of its mean query and its mean key; the fewest blocks whose softmax of
    scores sums up to `threshold` are seen, and the sink and the local blocks beside them.

    Args:
        q: ``(batch, heads, q_len, head_dim)``, float32, float16, bfloat16, or float64 on a CPU.
        k: ``(batch, kv_heads, kv_len, head_dim)``, kv_heads dividing heads.
        block_size: 16 to 256, a multiple of 16, or a pair of such numbers for queries and keys.
        threshold: share of the estimated probability to keep, above 0 and up to 1 (all visible blocks).
        causal: hide the keys after a query; the last query and the last key are at the same position.
        scale: of the scores; default ``1 / sqrt(head_dim)``.
        sink_blocks: blocks at the start that are always seen.
        local_blocks: blocks up to a query's own that are always seen (causal alone).

    Returns:
        A mask (batch, heads) which is causal itself if `causal`: its diagonal blocks are partial.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, dtype, device or range; it is named.

    Source: the selection of PBS-Attn (arXiv 2510.21270) and, without its test of similarity, of SpargeAttn
    (arXiv 2502.18137).
    """
    plan = _plan(q, k, block_size, causal, scale, sink_blocks, local_blocks)
    check_number("threshold", threshold, "(0, 1]")
    scores = pooled(q, plan.geometry.block_q) @ of_heads(pooled(k, plan.geometry.block_kv), q).mT
    return plan.by_mass(plan.softmax(scores * plan.scale), threshold)


@torch.no_grad()
def max_pool_top_k(
    q: Tensor,
    k: Tensor,
    *,
    block_size: BlockSize = 128,
    count: int = 16,
    causal: bool = True,
    sink_blocks: int = 1,
    local_blocks: int = 1,
) -> BlockMask:
    """Keeps the `count` blocks in which some key matches the mean query best.

    A block's score is the largest product of the mean query with a key of the block, so one strong key is
    enough. Costs a 1 / block_size of dense attention's scores. Arguments as `mean_pool_top_p`, and:

    Args:
        q: as there.
        k: as there.
        block_size: as there.
        count: blocks for each block of queries, the sink and local ones included; fewer where fewer are
            visible. Ties go to the earlier block.
        causal: as there.
        sink_blocks: as there.
        local_blocks: as there.

    Source: token scores, max-pooled over blocks, as MiniMax's sparse attention (arXiv 2606.13392) selects.
    """
    plan = _plan(q, k, block_size, causal, None, sink_blocks, local_blocks)
    check_count("count", count)
    means, block = pooled(q, plan.geometry.block_q), plan.geometry.block_kv
    keys = k.float()
    best = []
    for head in range(q.shape[1]):  # a head at a time: scores of all would be as large as many k
        key = keys[:, head // (q.shape[1] // k.shape[1])]
        scores = torch.nn.functional.pad(means[:, head] @ key.mT, (0, -k.shape[2] % block), value=-math.inf)
        best.append(torch.unflatten(scores, -1, (-1, block)).amax(-1))
    return plan.by_count(torch.stack(best, 1), count)


@torch.no_grad()
def antidiagonal(
    q: Tensor,
    k: Tensor,
    *,
    block_size: BlockSize = 128,
    stride: int = 8,
    threshold: float = 0.9,
    causal: bool = True,
    scale: float | None = None,
    sink_blocks: int = 1,
    local_blocks: int = 1,
) -> BlockMask:
    """Keeps the blocks that hold `threshold` of the probability as sampled along antidiagonals.

    The scores are cut into tiles of stride x stride; each stands for the mean of its antidiagonal, which
    meets every row, every column and so every vertical or slanted line in it. A softmax over the tiles of a
    row gives the mass of each, which is summed over blocks. Costs 1 / stride of dense attention's scores.
    Arguments as `mean_pool_top_p`, and:

    Args:
        q: as there.
        k: as there.
        block_size: as there.
        stride: side of the tiles; it divides both block sizes.
        threshold: as there.
        causal: as there.
        scale: as there.
        sink_blocks: as there.
        local_blocks: as there.

    Source: XAttention (arXiv 2503.16428).
    """
    plan = _plan(q, k, block_size, causal, scale, sink_blocks, local_blocks)
    check_number("threshold", threshold, "(0, 1]")
    check_count("stride", stride)
    geometry = plan.geometry
    if geometry.block_q % stride or geometry.block_kv % stride:
        raise ValueError(f"stride must divide the block sizes {block_size!r}, got {stride}")
    offset = geometry.kv_len - geometry.q_len  # the position of the first query
    before = offset % stride  # zeros in front of the queries, so that tiles begin at the same positions
    rows, columns = _tiles(q, stride, before, backwards=True), _tiles(k, stride, 0)
    later = torch.ones(rows.shape[2], columns.shape[2], dtype=torch.bool, device=q.device)
    later = later.triu((offset - before) // stride + 1) & causal
    masses = []
    for head in range(q.shape[1]):
        key = columns[:, head // (q.shape[1] // k.shape[1])]
        scores = rows[:, head] @ key.mT * (plan.scale / stride)
        mass = scores.masked_fill_(later, -math.inf).softmax(-1).masked_fill(later, 0.0)
        masses.append(_block_sums(mass, geometry, stride))
    return plan.by_mass(torch.stack(masses, 1), threshold)


@torch.no_grad()
def top_k(
    q: Tensor,
    k: Tensor,
    *,
    block_size: BlockSize = 128,
    count: int = 8,
    causal: bool = True,
    sink_blocks: int = 0,
    local_blocks: int = 1,
) -> BlockMask:
    """Keeps the `count` blocks whose mean key matches the mean query of a whole group of heads best.

    All query heads that share a key head share a mask, whose heads are those of k. Arguments as
    `mean_pool_top_p`, and:

    Args:
        q: as there.
        k: as there.
        block_size: as there.
        count: blocks for each block of queries, the sink and local ones included; fewer where fewer are
            visible. Ties go to the earlier block.
        causal: as there.
        sink_blocks: as there.
        local_blocks: as there.

    Source: MoBA (arXiv 2502.13189), with a gate for a block of queries in place of one for each query.
    """
    plan = _plan(q, k, block_size, causal, None, sink_blocks, local_blocks)
    check_count("count", count)
    means = pooled(q, plan.geometry.block_q)
    if k.shape[1]:
        means = torch.unflatten(means, 1, (k.shape[1], -1)).mean(2)
    return plan.by_count(means @ pooled(k, plan.geometry.block_kv).mT, count)


@torch.no_grad()
def kept_mass(
    q: Tensor, k: Tensor, block_mask: BlockMask, *, scale: float | None = None, causal: bool = True
) -> Tensor:
    """The share of each query's attention that a mask keeps: 1 is all, measured against dense attention.

    Args:
        q: ``(batch, heads, q_len, head_dim)``.
        k: ``(batch, kv_heads, kv_len, head_dim)``.
        block_mask: what is kept.
        scale: of the scores; default ``1 / sqrt(head_dim)``.
        causal: measure against causal attention; the mask is composed with it too.

    Returns:
        float32 ``(batch, heads, q_len)``, ``exp(lse of the mask - lse of all)``. Takes the time of dense
        attention without values.
    """
    check_q_k(q, k)
    check_type("block_mask", block_mask, BlockMask, "tilewright.attention.BlockMask")
    full = _full(block_mask.block_size, q, k)
    value = k.new_zeros((*k.shape[:3], 8))
    lse = [
        block_sparse_attention(q, k, value, mask, scale=scale, causal=causal, return_lse=True)[1]
        for mask in (block_mask, full)
    ]
    return torch.where(lse[1] == -math.inf, 1.0, (lse[0] - lse[1]).exp()).float()


# ---- what they share ----


class _Plan:
    """The visible blocks of an estimate, those that are always seen, and the way from scores to a mask."""

    def __init__(self, geometry: Geometry, visible: Draft, always: Tensor, scale: float) -> None:
        self.geometry, self.visible, self.always, self.scale = geometry, visible, always, scale

    def softmax(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(self.visible.codes == 0, -math.inf).softmax(-1)

    def by_mass(self, masses: Tensor, share: float) -> BlockMask:
        codes = select_blocks(masses, self.visible.codes, 0, share)
        return self._mask(torch.where(self.always, self.visible.codes, codes))

    def by_count(self, scores: Tensor, count: int) -> BlockMask:
        return self._mask(
            select_blocks(scores.masked_fill(self.always, math.inf), self.visible.codes, count, 0.0)
        )

    def _mask(self, codes: Tensor) -> BlockMask:
        return mask_of(Draft(codes, self.visible.tables), self.geometry)


def _plan(
    q: Any, k: Any, block_size: Any, causal: bool, scale: Any, sink_blocks: Any, local_blocks: Any
) -> _Plan:
    """Checks what all estimators take."""
    check_q_k(q, k)
    for name, value in (("sink_blocks", sink_blocks), ("local_blocks", local_blocks)):
        check_count(name, value, lowest=0)
    geometry = Geometry(*check_block_size(block_size), q.shape[2], k.shape[2])
    visible, always = _fixed(geometry.sizes, bool(causal), sink_blocks, local_blocks, q.device)
    return _Plan(geometry, visible, always, scale_of(scale, q))


def check_q_k(q: Any, k: Any) -> None:
    """Refuses what is no pair of queries and keys."""
    for name, tensor in (("q", q), ("k", k)):
        check_tensor(name, tensor)
        check_dtype(name, tensor, FLOATS)
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have shape (batch, heads, length, head_dim), got {tuple(tensor.shape)}"
            )
    check_device("k", k, q.device, "q")
    if k.dtype != q.dtype:
        raise TypeError(f"k must have the dtype of q, {q.dtype}, got {k.dtype}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"k must have the batch size and head_dim of q, {q.shape[0]} and {q.shape[3]}, "
            f"got {tuple(k.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k has {k.shape[1]} heads, which do not divide the {q.shape[1]} heads of q")


@once
def _fixed(
    sizes: tuple[int, int, int, int], causal: bool, sink: int, local: int, device: torch.device
) -> tuple[Draft, Tensor]:
    """What does not depend on q and k: the visible blocks, and those of them that are always seen."""
    geometry = Geometry(*sizes)
    with torch.device("cpu"), torch.inference_mode(False):
        shape = (1, 1, geometry.q_blocks, geometry.kv_blocks)
        if causal:
            visible = builders.causal(geometry)
        else:
            codes = torch.full(shape, FULL, dtype=torch.uint8)
            visible = Draft(codes, geometry.no_tables(codes.device))
        block = torch.arange(geometry.kv_blocks)
        always = (block < sink).expand(shape).clone()
        if causal:  # the last visible blocks of a row are around its queries' own
            seen = (visible.codes != 0).sum(-1, keepdim=True)
            first = torch.arange(geometry.q_blocks)[:, None] * geometry.block_q
            own = (first + geometry.kv_len - geometry.q_len).clamp(min=0) // geometry.block_kv
            always |= (block >= own - (local - 1)) & (block < seen) & (local > 0)
        always &= visible.codes != 0
    codes = visible.codes.contiguous().to(device)
    return Draft(codes, visible.tables.to(device)), always.to(device)


def _full(block_size: tuple[int, int], q: Tensor, k: Tensor) -> BlockMask:
    geometry = Geometry(*block_size, q.shape[2], k.shape[2])
    return mask_of(_fixed(geometry.sizes, False, 0, 0, q.device)[0], geometry)


def pooled(x: Tensor, block: int) -> Tensor:
    """float32 means (batch, heads, blocks, head_dim) of blocks of rows, the last one may be shorter."""
    whole = x.shape[2] // block * block
    parts = [torch.unflatten(x[:, :, :whole], 2, (-1, block)).mean(3, dtype=torch.float32)] if whole else []
    if whole < x.shape[2]:
        parts.append(x[:, :, whole:].mean(2, keepdim=True, dtype=torch.float32))
    return torch.cat(parts, 2) if parts else x.new_empty((*x.shape[:2], 0, x.shape[3]), dtype=torch.float32)


def of_heads(x: Tensor, q: Tensor) -> Tensor:
    """A row of key heads for each query head."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1) if x.shape[1] != q.shape[1] else x


def _tiles(x: Tensor, stride: int, before: int, *, backwards: bool = False) -> Tensor:
    """float32 (batch, heads, tiles, stride * head_dim): rows of a tile side by side, zeros at the ends."""
    after = -(x.shape[2] + before) % stride
    padded = torch.nn.functional.pad(x.float(), (0, 0, before, after))
    rows = torch.unflatten(padded, 2, (-1, stride))
    return (rows.flip(3) if backwards else rows).flatten(3)


def _block_sums(mass: Tensor, geometry: Geometry, stride: int) -> Tensor:
    """Sums over blocks of the masses (batch, rows of tiles, columns of tiles)."""
    for axis, blocks, block in (
        (1, geometry.q_blocks, geometry.block_q),
        (2, geometry.kv_blocks, geometry.block_kv),
    ):
        tiles = block // stride
        missing = blocks * tiles - mass.shape[axis]  # -1: queries that were moved out of the last block
        pad = (0, missing) if axis == 2 else (0, 0, 0, missing)
        padded = torch.nn.functional.pad(mass, pad)
        mass = torch.unflatten(padded, axis, (blocks, tiles)).sum(axis + 1)
    return mass
