"""PBS-Attn: keys are put into another order first, so that those that matter share blocks."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .._checks import check_count, check_device, check_number, check_tensor
from .block_sparse import block_sparse_attention, scale_of
from .codes import PARTIAL, Draft, Geometry, once
from .estimate import check_q_k, of_heads, pooled
from .mask import BlockMask, check_block_size, mask_of
from .ops import code_dtype
from .select_ops import position_tables, select_blocks


@overload
def permuted_block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, *, block_size: int = ..., segment_size: int = ...,
    threshold: float = ..., causal: bool = ..., scale: float | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def permuted_block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, *, block_size: int = ..., segment_size: int = ...,
    threshold: float = ..., causal: bool = ..., scale: float | None = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def permuted_block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, *, block_size: int = ..., segment_size: int = ...,
    threshold: float = ..., causal: bool = ..., scale: float | None = ..., return_lse: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def permuted_block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int = 128,
    segment_size: int = 256,
    threshold: float = 0.9,
    causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to the blocks that matter, after sorting the keys of each segment by how much they matter.

    Within each segment of `segment_size` keys, those that the last queries attend to most come first: heavy
    keys then share few blocks, and fewer blocks hold the same attention. The blocks of earlier segments are
    chosen by mean pooling up to `threshold` (see `estimate.mean_pool_top_p`); a query's own segment, causal
    by the keys' true positions, and the block that holds the first key are always seen. So no query sees a
    later key, and with every block kept the result is that of causal attention.

    Args:
        q: ``(batch, heads, q_len, head_dim)``, float32, float16, bfloat16, or float64 on a CPU.
        k: ``(batch, kv_heads, kv_len, head_dim)``, kv_heads dividing heads. The heads of a group share an
            order of the keys.
        v: ``(batch, kv_heads, kv_len, value_dim)``.
        block_size: 16 to 256, a multiple of 16.
        segment_size: a multiple of block_size. A shorter last segment keeps its order.
        threshold: share of the estimated probability of earlier segments to keep; 1 keeps all.
        causal: False: all segments are candidates for every query.
        scale: of the scores; default ``1 / sqrt(head_dim)``.
        return_lse: also return the log of each query's sum of exponentials over the keys it sees.

    Returns:
        out ``(batch, heads, q_len, value_dim)``, or (out, lse) as from `block_sparse_attention`.

    Gradients flow to q, k and v with the order and the choice of blocks held fixed.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, dtype, device or range; it is named.

    Source: PBS-Attn, "Sparser Block-Sparse Attention via Token Permutation" (arXiv 2510.21270).
    """
    check_q_k(q, k)
    check_number("threshold", threshold, "(0, 1]")
    check_count("segment_size", segment_size)
    block, _ = check_block_size(block_size)
    if type(block_size) is not int or segment_size % block:
        raise ValueError(
            f"segment_size must be a multiple of block_size = {block_size!r}, got {segment_size}"
        )
    if not isinstance(v, Tensor) or v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            "v must have shape (batch, kv_heads, kv_len, value_dim) to go with k, "
            f"{tuple(k.shape)}, got {tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__}"
        )
    check_tensor("v", v)
    check_device("v", v, q.device, "q")
    scale = scale_of(scale, q)
    order, keys, mask = choose(q, k, block, segment_size, threshold, bool(causal), scale)
    values: Tensor = _Rows.apply(v, order)  # type: ignore[no-untyped-call]
    return block_sparse_attention(q, keys, values, mask, scale=scale, return_lse=return_lse)


def choose(
    q: Tensor, k: Tensor, block: int, segment: int, threshold: float, causal: bool, scale: float
) -> tuple[Tensor, Tensor, BlockMask]:
    """The order of the keys, the keys in it, and the mask of their blocks that are seen."""
    order = key_order(q, k, block, segment, scale)
    keys: Tensor = _Rows.apply(k, order)  # type: ignore[no-untyped-call]
    geometry = Geometry(block, block, q.shape[2], k.shape[2])
    layout = _layout(geometry.sizes, segment, causal, q.device)
    return order, keys, _mask(q, keys, order, geometry, layout, scale, threshold)


@torch.no_grad()
def key_order(q: Tensor, k: Tensor, block: int, segment: int, scale: float) -> Tensor:
    """int64 (batch, kv_heads, kv_len): the keys of each whole segment, heaviest first, the rest as it is."""
    batch, kv_heads, kv_len, _ = k.shape
    whole = kv_len // segment * segment
    order = torch.arange(kv_len, device=k.device).expand(batch, kv_heads, kv_len).clone()
    if whole == 0 or q.shape[2] == 0:
        return order
    last = torch.unflatten(q[:, :, -block:], 1, (kv_heads, -1)).flatten(2, 3)
    scores = (last @ k[:, :, :whole].mT).float() * scale
    weight = torch.unflatten(scores.softmax(-1).mean(2), 2, (-1, segment))
    ranks = weight.argsort(dim=-1, descending=True, stable=True)
    firsts = torch.arange(0, whole, segment, device=k.device)
    order[:, :, :whole] = (ranks + firsts[:, None]).flatten(2)
    return order


class _Rows(torch.autograd.Function):
    """Rows (batch, heads, length, dim) in another order; the gradient goes back by the inverse one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return _rows(x, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        places = torch.arange(order.shape[2], device=order.device).expand_as(order)
        return _rows(grads[0], torch.empty_like(order).scatter_(2, order, places)), None


def _rows(x: Tensor, order: Tensor) -> Tensor:
    heads = torch.arange(order.shape[0] * order.shape[1], device=x.device).view(*order.shape[:2], 1)
    flat = (order + heads * order.shape[2]).flatten()
    return x.flatten(0, 2).index_select(0, flat).view(x.shape)


@once
def _layout(
    sizes: tuple[int, int, int, int], segment: int, causal: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """uint8 (nq, nk), 1 for blocks of earlier segments, and int32 (pairs, 2), the blocks seen in part."""
    g = Geometry(*sizes)
    with torch.device("cpu"), torch.inference_mode(False):
        queries = torch.arange(g.q_blocks)[:, None] * g.block_q
        first = queries + g.kv_len - g.q_len  # positions of a block's first and last query
        last = (queries + g.block_q).clamp(max=g.q_len) - 1 + g.kv_len - g.q_len
        begin = torch.arange(g.kv_blocks) * g.block_kv // segment * segment  # of a block's segment
        end = (begin + segment).clamp(max=g.kv_len)
        earlier = (end <= first + 1) if causal else torch.ones(g.q_blocks, g.kv_blocks, dtype=torch.bool)
        own = (begin <= last) & ~earlier
        return earlier.to(torch.uint8).to(device), own.nonzero().int().contiguous().to(device)


@torch.no_grad()
def _mask(
    q: Tensor,
    keys: Tensor,
    order: Tensor,
    g: Geometry,
    layout: tuple[Tensor, Tensor],
    scale: float,
    threshold: float,
) -> BlockMask:
    """The blocks that are chosen, and the own segments, as bits by position."""
    earlier, pairs = layout
    means = pooled(keys, g.block_kv)
    scores = (pooled(q, g.block_q) @ of_heads(means, q).mT) * scale
    earlier = earlier[None, None]
    masses = scores.masked_fill(earlier == 0, -math.inf).softmax(-1)
    chosen = select_blocks(masses, earlier, 0, threshold)
    heads = order.shape[1]
    if g.kv_len:  # the block that now holds the first key
        sink = (order == 0).int().argmax(-1) // g.block_kv
        sinks = torch.zeros(*order.shape[:2], g.kv_blocks, dtype=torch.bool, device=q.device)
        sinks.scatter_(2, sink[..., None], True)
        chosen = torch.where(of_heads(sinks, q)[:, :, None], earlier, chosen)
    tables = position_tables(order.int(), pairs, g.q_len, g.block_q, g.block_kv)
    codes = chosen.to(code_dtype(len(tables)))
    numbers = torch.arange(len(tables), device=q.device, dtype=codes.dtype) + PARTIAL
    numbers = numbers.view(order.shape[0], heads, len(pairs))
    rows, columns = pairs.long().unbind(1)
    codes[:, :, rows, columns] = of_heads(numbers, q)
    return mask_of(Draft(codes, tables), g)
