"""torch.nn.attention.flex_attention's names, with this package's kernels under `flex_attention`.

One line moves code over::

    from tilewright.compat.flex_attention import create_block_mask, flex_attention

Every other name of torch's module is here too, and is torch's own: masks are made as before.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, overload
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as _flex
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, create_mask, or_masks

from .. import attention
from .._checks import check_tensor

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BlockMask", "and_masks", "create_block_mask", "create_mask", "flex_attention", "or_masks"]

_WHOLE = 1 << 30  # the block size of torch's mask that masks nothing
_converted: WeakKeyDictionary[BlockMask, attention.BlockMask] = WeakKeyDictionary()


@overload
def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, score_mod: Callable[..., Tensor] | None = ...,
    block_mask: BlockMask | attention.BlockMask | None = ..., scale: float | None = ...,
    enable_gqa: bool = ..., return_lse: Literal[False] = ..., kernel_options: Any = ..., *,
    return_aux: None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, score_mod: Callable[..., Tensor] | None = ...,
    block_mask: BlockMask | attention.BlockMask | None = ..., scale: float | None = ...,
    enable_gqa: bool = ..., *, return_lse: Literal[True], kernel_options: Any = ..., return_aux: None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, score_mod: Callable[..., Tensor] | None = ...,
    block_mask: BlockMask | attention.BlockMask | None = ..., scale: float | None = ...,
    enable_gqa: bool = ..., return_lse: Literal[False] = ..., kernel_options: Any = ..., *,
    return_aux: _flex.AuxRequest,
) -> tuple[Tensor, _flex.AuxOutput]: ...  # fmt: skip
@overload
def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, score_mod: Callable[..., Tensor] | None = ...,
    block_mask: BlockMask | attention.BlockMask | None = ..., scale: float | None = ...,
    enable_gqa: bool = ..., return_lse: bool = ..., kernel_options: Any = ..., *,
    return_aux: _flex.AuxRequest | None = ...,
) -> Tensor | tuple[Tensor, Tensor | _flex.AuxOutput]: ...  # fmt: skip
def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None = None,
    block_mask: BlockMask | attention.BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,
    *,
    return_aux: Any = None,
) -> Tensor | tuple[Tensor, Tensor | _flex.AuxOutput]:
    """Attention under a block mask, with torch's arguments; forward and backward, compiled or not.

    Args:
        query: ``(batch, heads, q_len, head_dim)``.
        key: ``(batch or 1, kv_heads, kv_len, head_dim)``.
        value: ``(batch or 1, kv_heads, kv_len, value_dim)``.
        score_mod: None; the kernels compute no functions of the caller's.
        block_mask: torch's, whose block size is 16 to 256 and which is converted once for each object, or a
            `tilewright.attention.BlockMask`. None: every query sees every key. What its mask_mod reads is
            read then: if that changes later, make a new mask.
        scale: of the scores; default ``1 / sqrt(head_dim)``.
        enable_gqa: allow fewer heads in key and value than in query.
        return_lse: also return the logarithm of each query's sum of exponentials, as torch before 2.10 does.
        kernel_options: for torch's kernels; nothing here is tuned by them.
        return_aux: torch's AuxRequest: lse alone.

    Returns:
        The output ``(batch, heads, q_len, value_dim)``; with `return_lse` (output, lse); with `return_aux`
        (output, AuxOutput).

    Raises:
        NotImplementedError: `score_mod`, or `return_aux` with max_scores.
        ValueError: heads that differ without `enable_gqa`, both `return_lse` and `return_aux`, or what
            :func:`tilewright.attention.block_sparse_attention` refuses.
        TypeError: a block_mask of another kind.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have shape (batch, heads, length, dim), got {tuple(tensor.shape)}")
    _check_options(score_mod, return_lse, return_aux)
    heads, kv_heads = query.shape[1], key.shape[1]
    if not enable_gqa and heads != kv_heads:
        raise ValueError(
            f"query has {heads} heads and key has {kv_heads}: with enable_gqa=True these may differ"
        )
    if key.shape[0] == value.shape[0] == 1 and block_mask is not None:
        key = key.expand(query.shape[0], -1, -1, -1)
        value = value.expand(query.shape[0], -1, -1, -1)
    mask = _mask(block_mask, query, key)
    want_lse = return_lse or (return_aux is not None and return_aux.lse)
    if scale is None:
        scale = 1 / math.sqrt(query.shape[3])
    out, lse = attention.block_sparse_attention(query, key, value, mask, scale=scale, return_lse=True)
    if return_aux is not None:
        return out, _flex.AuxOutput(lse=lse if want_lse else None, max_scores=None)
    return (out, lse) if want_lse else out


def _check_options(score_mod: Any, return_lse: bool, return_aux: Any) -> None:
    if score_mod is not None:
        raise NotImplementedError(
            "score_mod must be None: these kernels are compiled ahead of time and cannot run a function of "
            "yours. A mask belongs into block_mask (create_block_mask), a soft cap into "
            "tilewright.attention.block_sparse_attention(softcap=...)"
        )
    if return_lse and return_aux is not None:
        raise ValueError("return_lse and return_aux do not go together: give return_aux=AuxRequest(lse=True)")
    if return_aux is not None and return_aux.max_scores:
        raise NotImplementedError("return_aux must not ask for max_scores: the kernels keep lse alone")


def _mask(block_mask: Any, query: Tensor, key: Tensor) -> attention.BlockMask:
    if isinstance(block_mask, attention.BlockMask):
        return block_mask
    if block_mask is not None and not isinstance(block_mask, BlockMask):
        raise TypeError(
            "block_mask must be None, torch's BlockMask or a tilewright.attention.BlockMask, "
            f"got {type(block_mask).__name__}"
        )
    if block_mask is None or tuple(block_mask.BLOCK_SIZE) == (_WHOLE, _WHOLE):
        blocks = [-(-length // 128) for length in (query.shape[2], key.shape[2])]
        whole = torch.ones(blocks, dtype=torch.bool, device=query.device)
        return attention.BlockMask.from_dense(whole, 128, query.shape[2], key.shape[2])
    return _convert(block_mask)  # type: ignore[no-any-return]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _convert(block_mask: BlockMask) -> attention.BlockMask:
    if block_mask not in _converted:
        _converted[block_mask] = attention.BlockMask.from_torch(block_mask)
    return _converted[block_mask]


def __getattr__(name: str) -> Any:
    return getattr(_flex, name)
