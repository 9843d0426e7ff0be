"""How long masks take to make, beside torch.nn.utils.prune and the same by torch.topk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewright.prune import Block, global_masks, mask, sparsegpt

from .case import OURS, Case, Contender

Call = Callable[[], object]


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Masks of one large weight, and of many weights at once."""
    size = 1024 if quick else 4096
    found = [_n_of_m(device, size, dtype) for dtype in (torch.float32, torch.bfloat16)]
    found += [_blocks(device, size), _rows(device, size), _wanda(device, size)]
    return [*found, _global(device, 1 if quick else 24), _sparsegpt(device, size // 4)]


def _weight(
    device: torch.device, rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(device, dtype)


def _topk_mask(scores: Tensor, kept: int) -> Tensor:
    """The last axis' best, as torch.topk finds them."""
    chosen = scores.topk(kept, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)


def _n_of_m(device: torch.device, size: int, dtype: torch.dtype) -> Case:
    def ours() -> Call:
        w = _weight(device, size, size, dtype)
        return lambda: mask(w, "2:4")

    def theirs() -> Call:
        w = _weight(device, size, size, dtype)
        return lambda: _topk_mask(w.abs().view(-1, 4), 2).view(size, size)

    moved = size * size * (dtype.itemsize + 1)
    contenders = [Contender(OURS, ours, moved), Contender("torch, topk", theirs, moved)]
    name = str(dtype).removeprefix("torch.")
    sizes: dict[str, object] = {"rows": size, "columns": size, "pattern": "2:4", "dtype": name}
    return Case(f"prune-mask-2to4-{name}", f"2:4 mask of {size} x {size}, {name}", contenders, sizes=sizes)


def _blocks(device: torch.device, size: int) -> Case:
    side, sparsity = 16, 0.9
    across = size // side
    kept = across * across - round(sparsity * across * across)

    def ours() -> Call:
        w = _weight(device, size, size)
        return lambda: mask(w, Block(side, side), sparsity, "lp")

    def theirs() -> Call:
        w = _weight(device, size, size)

        def by_topk() -> Tensor:
            norms = w.view(across, side, across, side).square().sum((1, 3)).view(-1)
            units = _topk_mask(norms, kept).view(across, 1, across, 1)
            return units.expand(across, side, across, side).reshape(size, size)

        return by_topk

    moved = size * size * 5
    contenders = [Contender(OURS, ours, moved), Contender("torch, topk", theirs, moved)]
    sizes: dict[str, object] = {"rows": size, "columns": size, "block": side, "sparsity": sparsity}
    title = f"mask of {size} x {size}, blocks {side} x {side}, {sparsity:.0%} removed"
    return Case("prune-mask-block", title, contenders, sizes=sizes, flops=2 * size * size)


def _rows(device: torch.device, size: int) -> Case:
    sparsity = 0.5

    def ours() -> Call:
        w = _weight(device, size, size)
        return lambda: mask(w, "row", sparsity, "lp")

    def theirs() -> Call:
        from torch.nn.utils.prune import LnStructured

        w = _weight(device, size, size)
        ones = torch.ones_like(w)
        method: Any = LnStructured(sparsity, 2, 0)
        return lambda: method.compute_mask(w, ones)

    moved = size * size * 5
    contenders = [Contender(OURS, ours, moved), Contender("torch, nn.utils.prune", theirs, moved)]
    sizes: dict[str, object] = {"rows": size, "columns": size, "sparsity": sparsity}
    title = f"mask of {size} x {size}, whole rows, {sparsity:.0%} removed"
    return Case("prune-mask-rows", title, contenders, sizes=sizes, flops=2 * size * size)


def _wanda(device: torch.device, size: int) -> Case:
    def ours() -> Call:
        w, norm = _weight(device, size, size), _weight(device, 1, size)[0].abs()
        return lambda: mask(w, "element", 0.5, "wanda", norm)

    def theirs() -> Call:
        w, norm = _weight(device, size, size), _weight(device, 1, size)[0].abs()
        return lambda: _topk_mask(w.abs() * norm, size // 2)

    moved = size * size * 5
    contenders = [Contender(OURS, ours, moved), Contender("torch, topk", theirs, moved)]
    sizes: dict[str, object] = {"rows": size, "columns": size, "sparsity": 0.5, "scope": "row"}
    title = f"mask of {size} x {size} by Wanda, half of each row"
    return Case("prune-mask-wanda", title, contenders, sizes=sizes, flops=size * size)


def _global(device: torch.device, layers: int) -> Case:
    rows, columns, sparsity = 2048, 2048, 0.9
    units = layers * rows * columns

    def weights() -> list[Tensor]:
        return [_weight(device, rows, columns, seed=seed) for seed in range(layers)]

    def ours() -> Call:
        ws = weights()
        return lambda: global_masks(ws, "element", sparsity)

    def theirs() -> Call:
        from torch.nn.utils.prune import L1Unstructured

        ws = weights()
        method: Any = L1Unstructured(sparsity)

        def at_once() -> object:  # what prune.global_unstructured does, without its hooks
            flat = torch.cat([w.view(-1) for w in ws])
            return method.compute_mask(flat, torch.ones_like(flat))

        return at_once

    moved = units * 5
    contenders = [Contender(OURS, ours, moved), Contender("torch, nn.utils.prune", theirs, moved)]
    sizes: dict[str, object] = {"elements": units, "tensors": layers, "sparsity": sparsity}
    title = f"masks of {units / 1e6:.0f}M elements of {layers} weights at once, {sparsity:.0%} removed"
    return Case("prune-mask-global", title, contenders, sizes=sizes)


def _sparsegpt(device: torch.device, size: int) -> Case:
    def ours() -> Call:
        w, x = _weight(device, size, size), _weight(device, 2 * size, size, seed=1)
        hessian = x.T @ x
        return lambda: sparsegpt(w, hessian, "2:4")

    sizes: dict[str, object] = {"rows": size, "columns": size, "pattern": "2:4"}
    title = f"SparseGPT 2:4 of {size} x {size}"
    # Two factorisations and an inverse, and the products with the columns right of each panel.
    flops = 5 / 3 * size**3 + size**3
    return Case("prune-sparsegpt", title, [Contender(OURS, ours)], sizes=sizes, flops=flops)
