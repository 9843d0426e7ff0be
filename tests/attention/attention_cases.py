"""Block masks and inputs for the tests of attention."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright.attention import BlockMask


def _listed(codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, indices and tables (-1: full) of the blocks of each row; codes: 0 absent, 1 full, 2 + table."""
    counts = (codes != 0).sum(-1)
    capacity = max(int(counts.max()) if counts.numel() else 0, 1)
    order = torch.argsort((codes == 0).int(), dim=-1, stable=True)[..., :capacity]
    if order.shape[-1] == 0:
        order = order.new_zeros((*order.shape[:-1], capacity))
        return counts.int(), order.int(), order.int()
    bits = codes.gather(-1, order) - 2
    return counts.int(), order.int().contiguous(), bits.int().contiguous()


def lists_of(visible: Tensor, block_q: int, block_kv: int) -> BlockMask:
    """The block mask of a mask (Bm, Hm, q_len, kv_len) of elements; each partial block has its own table."""
    batch, heads, q_len, kv_len = visible.shape
    nq, nk = -(-q_len // block_q), -(-kv_len // block_kv)
    padded = torch.zeros(batch, heads, nq * block_q, nk * block_kv, dtype=torch.bool)
    padded[:, :, :q_len, :kv_len] = visible
    exists = torch.zeros(nq * block_q, nk * block_kv, dtype=torch.bool)
    exists[:q_len, :kv_len] = True

    def blocks(t: Tensor) -> Tensor:
        return t.unflatten(-1, (nk, block_kv)).unflatten(-3, (nq, block_q)).transpose(-3, -2)

    elements = blocks(padded)
    any_seen = elements.flatten(-2).any(-1)
    full = (elements | ~blocks(exists)).flatten(-2).all(-1) & any_seen
    codes = any_seen.long()
    partial = any_seen & ~full
    codes[partial] = torch.arange(int(partial.sum())) + 2
    tables = elements[partial]
    words = (block_kv + 31) // 32
    bits = torch.zeros(len(tables), block_q, words * 32, dtype=torch.int64)
    bits[..., :block_kv] = tables.long()
    packed = (bits.unflatten(-1, (words, 32)) << torch.arange(32)).sum(-1)
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()
    q2k, k2q = _listed(codes), _listed(codes.mT)
    none = len(tables) == 0
    return BlockMask(
        q2k[0], q2k[1], None if none else q2k[2], k2q[0], k2q[1], None if none else k2q[2],
        packed, (block_q, block_kv), q_len, kv_len,
    )  # fmt: skip


def window(q_len: int, kv_len: int, width: int) -> Tensor:
    """Causal, the last `width` keys of each query."""
    i, j = torch.arange(q_len)[:, None] + kv_len - q_len, torch.arange(kv_len)
    return (j <= i) & (j > i - width)


def random_mask(
    batch: int, heads: int, q_len: int, kv_len: int, block_q: int, block_kv: int, seed: int = 0
) -> Tensor:
    """Absent, full and partial blocks; some rows and columns are empty, whole blocks of them too."""
    generator = torch.Generator().manual_seed(seed)
    nq, nk = -(-q_len // block_q), -(-kv_len // block_kv)
    kind = torch.randint(0, 3, (batch, heads, nq, nk), generator=generator)
    if nq > 2:
        kind[..., 1, :] = 0
    if nk > 2:
        kind[..., 2] = 0
    kind = kind.repeat_interleave(block_q, 2).repeat_interleave(block_kv, 3)[:, :, :q_len, :kv_len]
    element = torch.rand(batch, heads, q_len, kv_len, generator=generator) < 0.4
    element[..., 3::7, :] = False
    element[..., 5::11] = False
    return (kind == 1) | ((kind == 2) & element)


def make(
    batch: int,
    heads: int,
    kv_heads: int,
    q_len: int,
    kv_len: int,
    head_dim: int,
    value_dim: int,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in float64, with values that half types hold exactly."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().to(torch.float16).double()

    return (
        normal(batch, heads, q_len, head_dim),
        normal(batch, kv_heads, kv_len, head_dim),
        normal(batch, kv_heads, kv_len, value_dim),
    )
