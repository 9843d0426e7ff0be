"""Masks made from others: a block mask, and what a model hides besides (padding, other documents)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .codes import ABSENT, FULL, PARTIAL, Draft, Geometry, combine, distinct, evaluate, pack, unpack
from .mask import BlockMask, _elements_of, check_block_size, mask_of
from .ops import code_dtype


def from_elements(seen: Tensor, block_size: int | tuple[int, int]) -> BlockMask:
    """The mask of bool (Bm, Hm, q_len, kv_len), True where the query sees the key: a byte a pair is read."""
    geometry = Geometry(*check_block_size(block_size), *seen.shape[2:])
    blocks = _in_blocks(seen, geometry)
    some = blocks.flatten(-2).any(-1)
    which = some.nonzero()
    codes = torch.zeros(some.shape, dtype=torch.int32, device=seen.device)
    codes[some] = torch.arange(len(which), dtype=torch.int32, device=seen.device) + PARTIAL
    tables = pack(blocks[some])
    return mask_of(combine(lambda table: table, [Draft(codes, tables)], geometry), geometry)


def rows(mask: BlockMask, first: int) -> Tensor:
    """Bool (Bm, Hm, q_len - first, kv_len): which keys the queries from `first` on see."""
    draft, geometry = mask._draft(), mask._geometry
    block = first // geometry.block_q
    full = unpack(geometry.existing(mask.device)[:1], geometry.block_kv)
    kinds = torch.cat([torch.zeros_like(full), full, unpack(draft.tables, geometry.block_kv)])
    elements = kinds[draft.codes[:, :, block:].long()].transpose(3, 4).flatten(4, 5).flatten(2, 3)
    start = first - block * geometry.block_q
    return elements[:, :, start : start + geometry.q_len - first, : geometry.kv_len]


def hide_keys(mask: BlockMask, visible: Tensor) -> BlockMask:
    """The mask without the keys where `visible`, bool (batch, kv_len), is False."""
    geometry = mask._geometry
    padded = torch.nn.functional.pad(visible, (0, -geometry.kv_len % geometry.block_kv))
    blocks = padded.view(-1, geometry.kv_blocks, geometry.block_kv)
    exists = torch.arange(geometry.kv_blocks * geometry.block_kv, device=visible.device) < geometry.kv_len
    whole = (blocks | ~exists.view(blocks.shape[1:])).all(-1)
    partial = blocks.any(-1) & ~whole
    kept, which = distinct(blocks[partial])
    codes = whole.to(code_dtype(len(kept)))
    codes[partial] = (which + PARTIAL).to(codes.dtype)
    tables = pack(kept[:, None].expand(-1, geometry.block_q, -1))
    return _both(mask, Draft(codes[:, None, None], tables))


def same_documents(mask: BlockMask, documents: Tensor) -> BlockMask:
    """The mask within documents: int64 (batch, length) says, never falling, which one each token is of."""
    g = mask._geometry
    length = g.q_len

    def ends(block: int, count: int) -> tuple[Tensor, Tensor]:
        first = torch.arange(count, device=documents.device) * block
        return documents[:, first], documents[:, (first + block - 1).clamp(max=length - 1)]

    (first_q, last_q), (first_k, last_k) = ends(g.block_q, g.q_blocks), ends(g.block_kv, g.kv_blocks)
    apart = (last_q[:, :, None] < first_k[:, None]) | (last_k[:, None] < first_q[:, :, None])
    whole = (first_q[:, :, None] == last_k[:, None]) & (last_q[:, :, None] == first_k[:, None])
    unseen = ~mask.to_dense().any(1)
    kinds = torch.where(apart | unseen, ABSENT, torch.where(whole, FULL, PARTIAL))
    in_q = torch.arange(g.block_q, device=documents.device)
    in_k = torch.arange(g.block_kv, device=documents.device)

    def sees(blocks: Tensor) -> Tensor:
        q = (blocks[:, 2, None] * g.block_q + in_q).clamp(max=length - 1)
        k = (blocks[:, 3, None] * g.block_kv + in_k).clamp(max=length - 1)
        batch = blocks[:, 0, None]
        return documents[batch, q][:, :, None] == documents[batch, k][:, None]

    return _both(mask, evaluate(kinds[:, None], sees, g))


def restrict(mask: BlockMask, mask_mod: Callable[..., Tensor], batch: int) -> BlockMask:
    """The mask where mask_mod(batch, head, query, key) is True; it is evaluated on the blocks seen alone."""
    seen = mask.to_dense().any(1, keepdim=True).expand(batch, -1, -1, -1)
    kinds = torch.where(seen, PARTIAL, ABSENT)
    return _both(mask, evaluate(kinds, _elements_of(mask_mod, mask._geometry), mask._geometry))


def _both(mask: BlockMask, draft: Draft) -> BlockMask:
    geometry = mask._geometry
    return mask_of(combine(torch.bitwise_and, [mask._draft(), draft], geometry), geometry)


def _in_blocks(seen: Tensor, geometry: Geometry) -> Tensor:
    g = geometry
    padded = torch.nn.functional.pad(seen, (0, -g.kv_len % g.block_kv, 0, -g.q_len % g.block_q))
    shape = (*seen.shape[:2], g.q_blocks, g.block_q, g.kv_blocks, g.block_kv)
    return padded.reshape(shape).transpose(3, 4)
