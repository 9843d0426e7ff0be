"""How long block masks take to make, beside torch's `create_block_mask`."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright.attention import BlockMask

from .case import OURS, Call, Case, Contender, Plan

_WINDOW = 4096


def cases(plan: Plan) -> list[Case]:
    """A window over a long sequence, and the lists of a large map of blocks."""
    if plan.quick:  # nothing that has to be compiled first
        return [_dense(plan.device, 512)]
    return [_window(plan.device, 131072), _dense(plan.device, 2048)]


def _window(device: torch.device, length: int) -> Case:
    def ours() -> Call:
        return lambda: BlockMask.sliding_window(length, _WINDOW, device=device)

    def theirs() -> Call:
        from torch.nn.attention.flex_attention import create_block_mask

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (i - j < _WINDOW)

        return lambda: create_block_mask(sees, None, None, length, length, device=str(device), _compile=True)

    contenders = [Contender(OURS, ours), Contender("torch, create_block_mask compiled", theirs)]
    title = f"mask of a causal window of {_WINDOW} over {length} tokens"
    return Case("mask-window", title, contenders, sizes={"length": length, "window": _WINDOW, "block": 128})


def _dense(device: torch.device, blocks: int) -> Case:
    def kept() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return (torch.rand(blocks, blocks, generator=generator) < 0.25).to(device)

    def ours() -> Call:
        dense = kept()
        return lambda: BlockMask.from_dense(dense, 64)

    def theirs() -> Call:
        from torch.nn.attention.flex_attention import BlockMask as FlexMask

        dense = kept()

        def lists() -> object:
            order = dense.int().argsort(dim=-1, descending=True, stable=True).int()
            return FlexMask.from_kv_blocks(dense.sum(-1, dtype=torch.int32)[None, None], order[None, None])

        return lists

    contenders = [Contender(OURS, ours), Contender("torch, from_kv_blocks", theirs)]
    title = f"lists of {blocks} x {blocks} blocks, a quarter kept"
    return Case("mask-from-dense", title, contenders, sizes={"blocks": blocks, "density": 0.25})
