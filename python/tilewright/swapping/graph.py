"""Swapped attention inside of graphs that torch.compile makes, for whole sequences.

    tilewright::model_blocks  the lists and tables of the mask of blocks that a layer gets

A graph knows a `BlockSparse` by its number. Where lengths alone make the mask, the graph holds it. Else the
op makes it, of what the graph hands on: q and k for an estimator, and which tokens are padding, or a mask of
elements. There is a graph for each length.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._library import define
from ..attention import BlockMask, BlockSparse, block_sparse_attention

Function = TypeVar("Function", bound=Callable[..., Any])


def outside(function: Function) -> Function:
    """Left out of compiled graphs; where one is to be whole, torch says why it cannot be."""
    reason = (
        "graphs hold swapped attention of whole sequences: no decode steps, no verify, and no padding or "
        "window of the model's with permuted_block_sparse_attention"
    )
    known = "reason" in inspect.signature(torch.compiler.disable).parameters  # not to torch 2.6
    return torch.compiler.disable(function, **({"reason": reason} if known else {}))  # type: ignore[no-untyped-call, no-any-return]


def attention(
    spec: BlockSparse, q: Tensor, k: Tensor, v: Tensor, mask: Any, causal: bool, scale: float, softcap: float
) -> Tensor:
    """(batch, heads, length, value_dim); `causal` says what a layer without a mask is."""
    heads, length, dim, kv_heads = (len(range(n)) for n in (*q.shape[1:], k.shape[1]))  # symbols to numbers
    if spec.takes == "attention":
        return spec.attention(q, k, v, scale)
    if spec.takes == "lengths" and mask is None:
        blocks = _static_blocks(spec.number, length, causal, q.device)
        return block_sparse_attention(q, k, v, blocks, scale=scale, softcap=softcap)
    padding = elements = None
    if isinstance(mask, Tensor):
        elements, causal = mask, False
    elif mask is not None:
        if mask.plain is None:
            elements = mask.for_implementation("sdpa", torch.float32)
        else:
            causal, padding = mask.plain, mask.padding
    mask_heads, block_q, block_kv = _static_sizes(
        spec.number, heads, kv_heads, length, dim, q.dtype, q.device
    )

    # Made for each layer: to keep it for the next is a side effect, which checkpointed layers must not have.
    lists = torch.ops.tilewright.model_blocks(
        q.detach(), k.detach(), padding, elements, spec.number, causal, mask_heads, block_q, block_kv
    )
    q_counts, q_indices, q_bits, k_counts, k_indices, k_bits, tables = lists
    q2k, k2q = (q_counts, q_indices, q_bits), (k_counts, k_indices, k_bits)
    blocks = BlockMask(*q2k, *k2q, tables, (block_q, block_kv), length, length)
    within = causal and spec.takes == "tensors" and elements is None
    return block_sparse_attention(q, k, v, blocks, scale=scale, softcap=softcap, causal=within)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _static_blocks(number: int, length: int, causal: bool, device: torch.device) -> BlockMask:
    """The mask of a specification for a compiled graph, made once, while the graph is."""
    return _blocks(number, length, causal, device)


@outside
def _blocks(number: int, length: int, causal: bool, device: torch.device) -> BlockMask:
    spec = BlockSparse.of_number(number)
    mask = spec.of_lengths(length, length, device)
    return mask & BlockMask.causal(length, block_size=mask.block_size, device=device) if causal else mask


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _static_sizes(
    number: int, heads: int, kv_heads: int, length: int, dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[int, int, int]:
    """Heads and block size of the masks of a specification, found by having it make one."""
    return _sizes(number, heads, kv_heads, length, dim, dtype, device)


@outside
def _sizes(
    number: int, heads: int, kv_heads: int, length: int, dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[int, int, int]:
    spec = BlockSparse.of_number(number)
    if spec.takes == "lengths":
        mask = spec.of_lengths(length, length, device)
    else:
        q, k = (torch.zeros(1, n, length, dim, dtype=dtype, device=device) for n in (heads, kv_heads))
        mask = spec.of_tensors(q, k, True)
    return mask.shape[1], *mask.block_size


@outside
def _model_blocks(
    q: Tensor,
    k: Tensor,
    padding: Tensor | None,
    elements: Tensor | None,
    number: int,
    causal: bool,
    heads: int,
    block_q: int,
    block_kv: int,
) -> tuple[Tensor, ...]:
    from .model_mask import of_elements, plain_mask

    spec = BlockSparse.of_number(number)
    if elements is not None:
        mask = of_elements(elements, spec, q, k, causal)
    else:
        made = plain_mask(q, k, causal, padding)
        mask = made.estimated(spec.of_tensors(q, k, causal)) if spec.takes == "tensors" else made.blocks(spec)
    if mask.shape[1] not in (1, heads) or mask.block_size != (block_q, block_kv):
        raise ValueError(
            f"{spec} returned a mask of {mask.shape[1]} heads and blocks of {mask.block_size}, but one of "
            f"{heads} heads and blocks of {(block_q, block_kv)} when the graph was compiled"
        )
    draft = mask._draft()
    codes = draft.codes.expand(q.shape[0], heads, -1, -1)
    rows, columns = codes.shape[2:]
    lists = torch.ops.tilewright.block_lists(codes, max(1, columns), max(1, rows), True)
    # A copy, for a graph may write over it, and one more: where all blocks are full there is none.
    return (*lists, torch.nn.functional.pad(draft.tables, (0, 0, 0, 0, 0, 1)))


def _fake_model_blocks(
    q: Tensor,
    k: Tensor,
    padding: Tensor | None,
    elements: Tensor | None,
    number: int,
    causal: bool,
    heads: int,
    block_q: int,
    block_kv: int,
) -> tuple[Tensor, ...]:
    rows, columns = -(-q.shape[2] // block_q), -(-k.shape[2] // block_kv)
    found = []
    for counts, capacity in ((rows, columns), (columns, rows)):
        shape = (q.shape[0], heads, counts)
        listed = [q.new_empty((*shape, max(1, capacity)), dtype=torch.int32) for _ in range(2)]
        found += [q.new_empty(shape, dtype=torch.int32), *listed]
    tables = torch.library.get_ctx().new_dynamic_size()
    return (*found, q.new_empty((tables, block_q, -(-block_kv // 32)), dtype=torch.int32))


define(
    "model_blocks(Tensor q, Tensor k, Tensor? padding, Tensor? elements, int number, bool causal, int heads, "
    "int block_q, int block_kv) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _model_blocks,
    _fake_model_blocks,
)
