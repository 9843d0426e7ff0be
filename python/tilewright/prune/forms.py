"""The forms a linear layer with zeros can take, all of them exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from .block_pattern import BLOCK_SIZES, gather_blocks, present_blocks
from .masked import mask_of, set_mask

DENSE = "dense"
_WORTH = 0.85  # a form that stores a larger share than this is not even tried
_EXCESS = 1.3  # nor one that stores so much more than the smallest


@dataclass(frozen=True)
class Form:
    """One way to run a layer: `build` makes it; `stored` is the share of the weight it stores."""

    name: str
    stored: float
    build: Callable[[], nn.Module]


@dataclass(frozen=True)
class Findings:
    """What the zeros of a layer look like, the forms worth timing, and why others are not."""

    density: float
    pattern: str
    forms: list[Form] = field(default_factory=list)
    why_not: list[str] = field(default_factory=list)


def kept_of(linear: nn.Linear, name: str) -> Tensor:
    """Which weights count: those of its mask, or those that are not zero."""
    weight = linear.weight.detach()
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise ValueError(f"{name}: {bad} of its {weight.numel()} weights are not finite")
    mask = mask_of(linear)
    if mask is None:
        return weight != 0
    broken = int((weight[~mask] != 0).sum())
    if broken:
        raise ValueError(f"{name}: {broken} weights that its mask prunes are not zero")
    return mask


def find_forms(linear: nn.Linear, name: str) -> Findings:
    """Looks at the zeros of one layer."""
    kept = kept_of(linear, name)
    density = kept.float().mean().item() if kept.numel() else 1.0
    if bool(kept.all()):
        return Findings(1.0, "no zeros")
    blocks, block_pattern_name, why_blocks = _blocks(linear, kept, density)
    groups, group_name, why_groups = _groups(linear, kept, density)
    pattern = block_pattern_name or group_name or "scattered"
    why_not = [why for why in (why_blocks, why_groups) if why]
    return Findings(density, pattern, [*blocks, *groups], why_not)


def _blocks(linear: nn.Linear, kept: Tensor, density: float) -> tuple[list[Form], str, str]:
    """Block-sparse forms: the largest of the blocks that store least, and squares that store little more."""
    step = BLOCK_SIZES[0]
    base, shares = present_blocks(kept, (step, step)), {}
    for rows in BLOCK_SIZES:
        for columns in BLOCK_SIZES:
            present = present_blocks(base, (rows // step, columns // step))
            shares[rows, columns] = present.float().mean().item() if present.numel() else 1.0
    best = min(
        shares, key=lambda block: (round(shares[block], 6), -block[0] * block[1], abs(block[0] - block[1]))
    )
    if shares[best] > _WORTH:
        return [], "", f"zeros in blocks of 8x8 and more make up {1 - shares[(8, 8)]:.0%} only"
    squares = [(size, size) for size in reversed(BLOCK_SIZES)]
    allowed = min(shares[best] * _EXCESS, _WORTH)
    chosen = [best, *(block for block in squares if block != best and shares[block] <= allowed)]
    forms = [
        Form(
            f"blocks of {rows}x{columns}",
            shares[rows, columns],
            partial(_block_sparse, linear, (rows, columns)),
        )
        for rows, columns in chosen[:3]
    ]
    exact = abs(shares[best] - density) < 0.02
    name = f"blocks of {best[0]}x{best[1]}" if exact else ""
    return forms, name, ""


def _block_sparse(linear: nn.Linear, block: tuple[int, int]) -> nn.Module:
    from ..nn import BlockSparseLinear

    made = BlockSparseLinear.from_linear(linear, block)
    mask = mask_of(linear)
    if mask is not None:  # what is pruned inside of a block stays zero in training
        inside = gather_blocks(mask, made.block_mask, block)
        if not bool(inside.all()):
            set_mask(made, inside, "values")
    return made


def _groups(linear: nn.Linear, kept: Tensor, density: float) -> tuple[list[Form], str, str]:
    """The forms for n of every m neighbours in a row: 2:4, which has kernels of its own, and the tightest."""
    rows, columns = kept.shape
    fullest = {
        m: max(int(kept.view(rows, -1, m).sum(2).max()), 1) for m in (4, 8, 16) if rows and columns % m == 0
    }
    fitting = [
        (n, m) for m, n in fullest.items() if n / m <= min(density * _EXCESS, _WORTH) or (n <= 2 and m == 4)
    ]
    if not fitting:
        shown = ", ".join(f"{n} of {m}" for m, n in fullest.items())
        return [], "", f"its rows fit no n:m: their fullest groups keep {shown}" if shown else ""
    tightest = min(fitting, key=lambda pattern: (pattern[0] / pattern[1], pattern[1]))
    chosen = dict.fromkeys([*([(2, 4)] if fullest.get(4, 4) <= 2 else []), tightest])
    forms = [Form(f"{n}:{m}", n / m, partial(_semi_structured, linear, f"{n}:{m}", kept)) for n, m in chosen]
    return forms, f"{tightest[0]}:{tightest[1]}", ""


def _semi_structured(linear: nn.Linear, pattern: str, kept: Tensor) -> nn.Module:
    from ..nn import SemiStructuredLinear

    return SemiStructuredLinear.from_linear(linear, pattern, kept)
