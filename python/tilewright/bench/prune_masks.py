"""How long masks take to make, beside torch.nn.utils.prune and the same by torch.topk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewright.prune import Block, global_masks, mask, sparsegpt

from .case import OURS, Call, Case, Contender, Plan, full
from .prune_layers import Size, random, sizes


def cases(plan: Plan) -> list[Case]:
    """Masks of one large weight, of a model its largest, and of many weights at once."""
    device = plan.device
    if plan.quick:
        (size,) = sizes(plan, (1024, 1024))
        return [_n_of_m(device, size, torch.float32), _blocks(device, size)]
    size = sizes(plan, (4096, 4096))[0]
    found = [_n_of_m(device, size, dtype) for dtype in (torch.float32, torch.bfloat16)]
    found += [_blocks(device, size), _rows(device, size), _wanda(device, size)]
    return found if plan.model else [*found, _global(device, 24), _sparsegpt(device, 1024)]


def _weight(device: torch.device, size: Size, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return random(device, size.out, size.into, dtype, seed)


def _topk_mask(scores: Tensor, kept: int) -> Tensor:
    """The last axis' best, as torch.topk finds them."""
    chosen = scores.topk(kept, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)


def _n_of_m(device: torch.device, size: Size, dtype: torch.dtype) -> Case:
    def ours() -> Call:
        w = _weight(device, size, dtype)
        return lambda: mask(w, "2:4")

    def theirs() -> Call:
        w = _weight(device, size, dtype)
        return lambda: _topk_mask(w.abs().view(-1, 4), 2).view(size.out, size.into)

    moved = size.weights * (dtype.itemsize + 1)
    contenders = [Contender(OURS, ours, moved), Contender("torch, topk", theirs, moved)]
    name = full(dtype)
    sizes: dict[str, object] = {"rows": size.out, "columns": size.into, "pattern": "2:4", "dtype": name}
    return Case(
        f"prune-mask-2to4-{name}", f"2:4 mask of {size.out} x {size.into}, {name}", contenders, sizes=sizes
    )


def _blocks(device: torch.device, size: Size) -> Case:
    side, sparsity = 16, 0.9
    down, across = size.out // side, size.into // side
    kept = down * across - round(sparsity * down * across)

    def ours() -> Call:
        w = _weight(device, size)
        return lambda: mask(w, Block(side, side), sparsity, "lp")

    def theirs() -> Call:
        w = _weight(device, size)

        def by_topk() -> Tensor:
            norms = w.view(down, side, across, side).square().sum((1, 3)).view(-1)
            units = _topk_mask(norms, kept).view(down, 1, across, 1)
            return units.expand(down, side, across, side).reshape(w.shape)

        return by_topk

    moved = size.weights * 5
    contenders = [Contender(OURS, ours, moved), Contender("torch, topk", theirs, moved)]
    sizes: dict[str, object] = {"rows": size.out, "columns": size.into, "block": side, "sparsity": sparsity}
    title = f"mask of {size.out} x {size.into}, blocks {side} x {side}, {sparsity:.0%} removed"
    return Case("prune-mask-block", title, contenders, sizes=sizes, flops=2 * size.weights)


def _rows(device: torch.device, size: Size) -> Case:
    sparsity = 0.5

    def ours() -> Call:
        w = _weight(device, size)
        return lambda: mask(w, "row", sparsity, "lp")

    def theirs() -> Call:
        from torch.nn.utils.prune import LnStructured

        w = _weight(device, size)
        ones = torch.ones_like(w)
        method: Any = LnStructured(sparsity, 2, 0)
        return lambda: method.compute_mask(w, ones)

    moved = size.weights * 5
    contenders = [Contender(OURS, ours, moved), Contender("torch, nn.utils.prune", theirs, moved)]
    sizes: dict[str, object] = {"rows": size.out, "columns": size.into, "sparsity": sparsity}
    title = f"mask of {size.out} x {size.into}, whole rows, {sparsity:.0%} removed"
    return Case("prune-mask-rows", title, contenders, sizes=sizes, flops=2 * size.weights)


def _wanda(device: torch.device, size: Size) -> Case:
    def ours() -> Call:
        w, norm = _weight(device, size), random(device, 1, size.into, torch.float32, 0)[0].abs()
        return lambda: mask(w, "element", 0.5, "wanda", norm)

    def theirs() -> Call:
        w, norm = _weight(device, size), random(device, 1, size.into, torch.float32, 0)[0].abs()
        return lambda: _topk_mask(w.abs() * norm, size.into // 2)

    moved = size.weights * 5
    contenders = [Contender(OURS, ours, moved), Contender("torch, topk", theirs, moved)]
    sizes: dict[str, object] = {"rows": size.out, "columns": size.into, "sparsity": 0.5, "scope": "row"}
    title = f"mask of {size.out} x {size.into} by Wanda, half of each row"
    return Case("prune-mask-wanda", title, contenders, sizes=sizes, flops=size.weights)


def _global(device: torch.device, layers: int) -> Case:
    rows, columns, sparsity = 2048, 2048, 0.9
    units = layers * rows * columns

    def weights() -> list[Tensor]:
        return [random(device, rows, columns, torch.float32, seed) for seed in range(layers)]

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
        w, x = (random(device, rows, size, torch.float32, seed) for seed, rows in enumerate((size, 2 * size)))
        hessian = x.T @ x
        return lambda: sparsegpt(w, hessian, "2:4")

    sizes: dict[str, object] = {"rows": size, "columns": size, "pattern": "2:4"}
    title = f"SparseGPT 2:4 of {size} x {size}"
    # Two factorisations and an inverse, and the products with the columns right of each panel.
    flops = 5 / 3 * size**3 + size**3
    return Case("prune-sparsegpt", title, [Contender(OURS, ours)], sizes=sizes, flops=flops)
