"""Attention over the blocks of a mask."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .._checks import FLOATS, check_device, check_dtype, check_shape, check_tensor
from .block_sparse_ops import BlockSparseAttention
from .mask import BlockMask

_INTEGERS = (torch.int32, torch.int64)
_MAX_HEAD_DIM = 256


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, *, scale: float | None = ..., causal: bool = ...,
    softcap: float = ..., cu_seqlens_q: Tensor | None = ..., cu_seqlens_k: Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, *, scale: float | None = ..., causal: bool = ...,
    softcap: float = ..., cu_seqlens_q: Tensor | None = ..., cu_seqlens_k: Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, *, scale: float | None = ..., causal: bool = ...,
    softcap: float = ..., cu_seqlens_q: Tensor | None = ..., cu_seqlens_k: Tensor | None = ...,
    return_lse: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which each query sees the keys that a block mask shows it.

    For query i of a head, over the keys j that it sees::

        s[j]   = scale * (q[i] . k[j])                    softcap: softcap * tanh(s[j] / softcap)
        lse[i] = log(sum of exp(s[j]))                    natural logarithm
        out[i] = sum of exp(s[j] - lse[i]) * v[j]

    A query that sees no key has out 0, lse -inf, and gives no gradient.

    Args:
        q: ``(batch, heads, q_len, head_dim)``, float32, float16, bfloat16, or float64 on a CPU; any strides.
        k: ``(batch, kv_heads, kv_len, head_dim)``; `kv_heads` divides `heads`, and query head h reads head
            ``h // (heads // kv_heads)``.
        v: ``(batch, kv_heads, kv_len, value_dim)``. Head dims are multiples of 8 up to 256 and may differ.
        block_mask: a `BlockMask` for q_len queries and kv_len keys, of one batch entry or all, and of one
            head, of each key head or of each query head.
        scale: of the scores; default ``1 / sqrt(head_dim)``.
        causal: also hide the keys after a query; the last query and the last key are at the same position.
        softcap: bounds the scores; 0: none.
        cu_seqlens_q: int32 or int64 ``(sequences + 1,)``, ascending from 0 to q_len; batch must be 1. Queries
            ``cu_seqlens_q[s]`` to ``cu_seqlens_q[s + 1]`` see only keys of sequence s. The block mask still
            speaks of positions in the packed tensors; `causal` is meant within each sequence.
        cu_seqlens_k: the same for the keys. Both or neither.
        return_lse: also return lse.

    Returns:
        out, ``(batch, heads, q_len, value_dim)`` of q's dtype, laid out as q; with `return_lse` (out, lse),
        lse float32 (float64 where q is) ``(batch, heads, q_len)``.

    Gradients flow to q, k and v, from out and from lse. There is no second derivative, vmap or
    torch.func.grad. Sums are float32 (float64 where q is), and the same input gives the same bits for any
    number of threads. Under autocast q, k and v are cast to its dtype, as `scaled_dot_product_attention`
    casts them; float64 stays.

    Raises:
        TypeError: an argument is of a wrong type, or a tensor of a dtype that is not allowed.
        ValueError: a shape or device that does not fit, an option that is not allowed, or on a CPU a list of
            the mask with an index out of range or repeated.
        NotImplementedError: float64 on CUDA, or a second derivative.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor)
        check_dtype(name, tensor, FLOATS)
    q, k, v = _autocast(q, k, v)
    _check_sizes(q, k, v)
    block_q, block_kv = _check_mask(block_mask, q, k)
    scale, softcap = scale_of(scale, q), _number("softcap", softcap)
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap must be 0 (none) or a positive number, got {softcap}")
    key_from, key_to = _ranges(cu_seqlens_q, cu_seqlens_k, q, k, causal)
    out, lse = BlockSparseAttention.apply(  # type: ignore[no-untyped-call]
        q,
        k,
        v,
        block_mask.q2k_counts,
        block_mask.q2k_indices,
        block_mask.q2k_bits,
        block_mask.k2q_counts,
        block_mask.k2q_indices,
        block_mask.k2q_bits,
        block_mask.tables,
        key_from,
        key_to,
        block_q,
        block_kv,
        scale,
        softcap,
        bool(causal) and key_to is None,
    )
    return (out, lse) if return_lse else out


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def scale_of(scale: Any, q: Tensor) -> float:
    """What scores are multiplied by, checked; None is the usual one."""
    value = 1 / math.sqrt(q.shape[3]) if scale is None else _number("scale", scale)
    if not math.isfinite(value):
        raise ValueError(f"scale must be finite, got {value}")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def _check_sizes(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor, axes in (
        ("q", q, "(batch, heads, q_len, head_dim)"),
        ("k", k, "(batch, kv_heads, kv_len, head_dim)"),
        ("v", v, "(batch, kv_heads, kv_len, value_dim)"),
    ):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have shape {axes}, got {tuple(tensor.shape)}")
        dim = tensor.shape[3]
        if not 8 <= dim <= _MAX_HEAD_DIM or dim % 8 != 0:
            raise ValueError(f"{name} must have a head dim that is a multiple of 8 up to 256, got {dim}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
        check_device(name, tensor, q.device, "q")
    batch, heads, _, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    if heads == 0 or kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(f"k has {kv_heads} heads, which do not divide the {heads} heads of q")
    check_shape("k", k, (batch, kv_heads, kv_len, head_dim), "(batch, kv_heads, kv_len, head_dim)")
    check_shape("v", v, (batch, kv_heads, kv_len, v.shape[3]), "(batch, kv_heads, kv_len, value_dim)")


def _check_mask(mask: Any, q: Tensor, k: Tensor) -> tuple[int, int]:
    if not isinstance(mask, BlockMask):
        raise TypeError(f"block_mask must be a tilewright.attention.BlockMask, got {type(mask).__name__}")
    check_device("block_mask", mask.q2k_counts, q.device, "q")
    if mask.q_len != q.shape[2] or mask.kv_len != k.shape[2]:
        raise ValueError(
            f"block_mask is for {mask.q_len} queries and {mask.kv_len} keys, "
            f"but q has {q.shape[2]} and k has {k.shape[2]}"
        )
    batch, heads = mask.q2k_counts.shape[:2]
    if batch not in (1, q.shape[0]):
        raise ValueError(f"block_mask must have batch 1 or that of q, {q.shape[0]}, got {batch}")
    if heads not in (1, k.shape[1], q.shape[1]):
        raise ValueError(
            f"block_mask must have 1 head, or as many as k ({k.shape[1]}) or q ({q.shape[1]}), got {heads}"
        )
    return mask.block_size


def _check_positions(name: str, positions: Tensor, length: int, device: torch.device) -> Tensor:
    check_tensor(name, positions)
    check_dtype(name, positions, _INTEGERS)
    if positions.dim() != 1 or positions.shape[0] < 2:
        raise ValueError(f"{name} must have shape (sequences + 1,), got {tuple(positions.shape)}")
    check_device(name, positions, device, "q")
    return positions.to(torch.int64)


def _ranges(
    cu_q: Tensor | None, cu_k: Tensor | None, q: Tensor, k: Tensor, causal: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The keys that each query of packed sequences may see: from, and to, int32 (q_len,)."""
    if cu_q is None and cu_k is None:
        return None, None
    if cu_q is None or cu_k is None:
        raise ValueError("cu_seqlens_q and cu_seqlens_k go together: give both or neither")
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens_q needs batch 1, got q with batch {q.shape[0]}")
    cu_q = _check_positions("cu_seqlens_q", cu_q, q.shape[2], q.device)
    cu_k = _check_positions("cu_seqlens_k", cu_k, k.shape[2], q.device)
    if cu_q.shape != cu_k.shape:
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must be of the same length, got {len(cu_q)} and {len(cu_k)}"
        )
    return torch.ops.tilewright.key_ranges(cu_q, cu_k, q.shape[2], k.shape[2], bool(causal))  # type: ignore[no-any-return]
