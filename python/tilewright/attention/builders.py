"""The maps behind `BlockMask.causal` and its kin. They are made on the CPU, from closed forms.

What depends on the distance between query and key alone is worked out once for each distance between
blocks; what is left is evaluated on one block of each kind. So blocks that look alike share a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .codes import ABSENT, FULL, PARTIAL, Draft, Geometry, combine, distinct, evaluate, pack, replace, settle
from .ops import code_dtype


def band(geometry: Geometry, sees: Callable[[Tensor], Tensor]) -> Draft:
    """Query q sees key k where sees(q - k + kv_len - q_len): the last of both are at distance 0."""
    g = geometry
    if g.q_blocks == 0 or g.kv_blocks == 0:
        return Draft(
            torch.zeros(1, 1, g.q_blocks, g.kv_blocks, dtype=torch.uint8), g.no_tables(torch.device("cpu"))
        )
    step = math.gcd(g.block_q, g.block_kv)
    nearest = -(g.kv_blocks - 1) * g.block_kv  # the least distance between the first elements of two blocks
    furthest = (g.q_blocks - 1) * g.block_q
    width = g.block_q + g.block_kv - 1  # distances within a pair of blocks
    distances = torch.arange(nearest - g.block_kv + 1, furthest + g.block_q) + g.kv_len - g.q_len
    windows = sees(distances).unfold(0, width, step)  # one for each distance between blocks
    seen = windows.sum(1)
    kinds = torch.where(seen == width, FULL, torch.where(seen == 0, ABSENT, PARTIAL))
    kept, which = distinct(windows[kinds == PARTIAL])
    kinds[kinds == PARTIAL] = which + PARTIAL
    within = torch.arange(g.block_q)[:, None] - torch.arange(g.block_kv) + g.block_kv - 1
    # The map repeats along its diagonals: a view of the kinds, the keys backwards.
    size, strides = (1, 1, g.q_blocks, g.kv_blocks), (0, 0, g.block_q // step, g.block_kv // step)
    codes = kinds.to(code_dtype(len(kept))).as_strided(size, strides).flip(3)
    return Draft(codes, pack(kept[:, within]))


def columns(geometry: Geometry, firsts: Tensor) -> Draft:
    """In batch b every query sees the keys before firsts[b], int64 (batch,)."""
    g = geometry
    inside = firsts.clamp(max=g.kv_len)[:, None] - torch.arange(g.kv_blocks) * g.block_kv
    inside = torch.where(inside >= g.block_kv, g.block_kv, inside.clamp(min=0))
    lengths, which = torch.unique(inside[(inside > 0) & (inside < g.block_kv)], return_inverse=True)
    codes = (inside == g.block_kv).long()
    codes[(inside > 0) & (inside < g.block_kv)] = which + PARTIAL
    rows = torch.arange(g.block_kv) < lengths[:, None]
    tables = pack(rows[:, None].expand(-1, g.block_q, -1))
    return Draft(codes.to(code_dtype(len(lengths)))[:, None, None], tables)


def causal(geometry: Geometry) -> Draft:
    """Keys up to the query's own."""
    return settle(band(geometry, lambda distance: distance >= 0), geometry)


def sliding_window(geometry: Geometry, window: int, sink: int, is_causal: bool) -> Draft:
    """The nearest `window` keys, and the first `sink` of all."""
    near = band(geometry, lambda d: (d < window) & ((d >= 0) if is_causal else (d > -window)))
    if sink == 0 or geometry.kv_len == 0:
        return settle(near, geometry)
    reached = -(
        -min(sink, geometry.kv_len) // geometry.block_kv
    )  # blocks of keys that have a part in the sink
    first = columns(geometry, torch.tensor([sink]))
    before = band(geometry, lambda d: (d >= 0) | (not is_causal))
    parts = [Draft(draft.codes[..., :reached], draft.tables) for draft in (near, first, before)]
    inside = torch.zeros(1, 1, dtype=torch.int64)  # edges are settled together with all others
    left = combine(lambda n, f, b: n | f & b, parts, geometry, inside)
    return settle(replace(near, slice(None), slice(reached), left), geometry)


def dilated(geometry: Geometry, window: int, dilation: int, is_causal: bool) -> Draft:
    """Each `dilation`-th key, `window` of them."""

    def sees(distance: Tensor) -> Tensor:
        near = (distance.abs() < window * dilation) & (distance % dilation == 0)
        return near & (distance >= 0) if is_causal else near

    return settle(band(geometry, sees), geometry)


def prefix_lm(geometry: Geometry, prefix: Tensor) -> Draft:
    """Keys up to the query's own, and those of the prefix; int64 (batch,) or (1,)."""
    before = band(geometry, lambda distance: distance >= 0)
    return combine(torch.bitwise_or, [before, columns(geometry, prefix)], geometry)


def document(geometry: Geometry, starts: Tensor, is_causal: bool) -> Draft:
    """Keys of the query's own document. Documents lie between neighbours of `starts`, int64, from 0 on."""
    g, length = geometry, geometry.q_len
    if length == 0:
        return Draft(torch.zeros(1, 1, 0, 0, dtype=torch.uint8), g.no_tables(starts.device))
    owner = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
    q0, k0 = torch.arange(g.q_blocks)[:, None] * g.block_q, torch.arange(g.kv_blocks) * g.block_kv
    q1, k1 = (q0 + g.block_q).clamp(max=length), (k0 + g.block_kv).clamp(max=length)
    first_q, last_q, first_k, last_k = owner[q0], owner[q1 - 1], owner[k0], owner[k1 - 1]
    apart = (last_q < first_k) | (last_k < first_q)
    whole = (first_q == last_q) & (first_k == last_k) & ~apart
    after = k0 >= q1  # the keys come after the queries; at most one document is in both blocks, or
    before = q0 >= k1  # before them; else the blocks overlap
    if is_causal:
        apart, whole = apart | after, whole & (q0 >= k1 - 1)
    kinds = torch.where(whole, FULL, torch.where(apart, ABSENT, PARTIAL))
    # Blocks apart look alike if the document they share begins and ends at the same places of them.
    begin = torch.where(after, starts[last_q] - q0, starts[last_k] - k0).clamp(min=0)
    end = torch.where(after, starts[first_k + 1] - k0, starts[first_q + 1] - q0).clamp(max=256)
    alike = (begin * 257 + end) * 2 + after
    own = torch.arange(kinds.numel()).view_as(kinds) + 2 * 257 * 257
    keys = torch.where(after | before, alike, own)
    in_q, in_k = torch.arange(g.block_q)[:, None], torch.arange(g.block_kv)

    def sees(blocks: Tensor) -> Tensor:
        q = (blocks[:, 2, None, None] * g.block_q + in_q).clamp(max=length - 1)
        k = (blocks[:, 3, None, None] * g.block_kv + in_k).clamp(max=length - 1)
        same = owner[q] == owner[k]
        return same & (q >= k) if is_causal else same

    return evaluate(kinds[None, None], sees, g, keys[None, None])


def bigbird(
    geometry: Geometry, window: int, global_blocks: int, random_blocks: int, heads: int, seed: int
) -> Draft:
    """Whole blocks: near ones, the first ones (which see everything), and random ones."""
    n = geometry.q_blocks
    block = torch.arange(n)
    near = (block[:, None] - block).abs() <= (window - 1) // 2
    fixed = near | (block < global_blocks) | (block[:, None] < global_blocks)
    kept = fixed.expand(1, heads, n, n).clone()
    if random_blocks > 0 and n > 0:
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(1, heads, n, n, generator=generator).masked_fill(fixed, -1.0)
        best = scores.topk(min(random_blocks, n), dim=-1)
        kept.scatter_(-1, best.indices, kept.gather(-1, best.indices) | (best.values >= 0))
    return Draft(kept.to(torch.uint8), geometry.no_tables(kept.device))
