"""Pruning in one shot by second moments of the inputs: what stays makes up for what goes (SparseGPT)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import (
    FLOATS,
    check_count,
    check_device,
    check_dtype,
    check_number,
    check_shape,
    check_tensor,
    suggests_keywords,
)  # fmt: skip
from .mask_ops import prune_best
from .masks import check_sparsity
from .obs_ops import prune_obs_panel
from .patterns import Block, NOfM, Pattern, parse_pattern

_WIDEST_PANEL = 512


@suggests_keywords
def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    pattern: str | Pattern,
    sparsity: float | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    *,
    name: str = "weight",
) -> tuple[Tensor, Tensor]:
    """A weight with zeros in place, and its mask, chosen so that the layer's outputs change little.

    Args:
        weight: (out, in, ...), float32, float16, bfloat16, or float64 on a CPU. It is not changed.
        hessian: (in, in), symmetric: the sum or mean of x x^T over the layer's calibration inputs x, in any
            scale. An input that is always 0 has a zero on the diagonal; its weights are worth nothing and
            become 0.
        pattern: "n:m", "element", "column" or a `Block` of at most 512 columns.
        sparsity: The share of the units that is removed, 0 <= sparsity < 1, from each panel of columns alike,
            and rounded so that the sum is as in `mask`. With "n:m" it may be left out.
        block_size: Columns of a panel, 1 to 512: within it the mask is chosen at once (n:m: group by group).
            It is rounded up to whole units.
        damping: This times the mean of the hessian's diagonal is added to the diagonal.
        name: What messages call the weight.

    Returns:
        The new weight, of weight's shape and dtype, and the bool mask, True where kept.

    The removed weight of a row with the smallest error w^2 / [H^-1]_ii goes; the errors are taken in by the
    columns to its right. Reckoned in float32, and in float64 if weight or hessian are. `torch.compile` is not
    supported.

    Frantar and Alistarh, "SparseGPT: massive language models can be accurately pruned in one-shot", 2023.
    """
    how = parse_pattern(pattern)
    check_tensor(name, weight)
    check_dtype(name, weight, FLOATS)
    how.check(weight.shape, name)
    share = _share(how, sparsity)
    work = weight.detach().flatten(1)
    _check_hessian(hessian, work, name)
    check_count("block_size", block_size, _WIDEST_PANEL)
    width = _panel_width(how, work, block_size)
    _check_finite(name, work)
    dtype = torch.promote_types(torch.promote_types(weight.dtype, hessian.dtype), torch.float32)
    work = work.to(dtype, copy=True, memory_format=torch.contiguous_format)
    factor = _factor(hessian.detach().to(dtype), work, check_number("damping", damping, "[0, inf)"))
    kept = torch.empty(work.shape, dtype=torch.bool, device=work.device)
    removed = _Removed(how, work, share)
    for first in range(0, work.shape[1], width):
        last = min(first + width, work.shape[1])
        panel, corner = work[:, first:last], factor[first:last, first:last]
        if isinstance(how, Block):
            kept[:, first:last] = removed.choose(panel, corner, first, last, name)
        n, m = (how.n, how.m) if isinstance(how, NOfM) else (0, 0)
        errors = torch.empty_like(panel, memory_format=torch.contiguous_format)
        prune_obs_panel(panel, corner, kept[:, first:last], errors, n, m)
        work[:, last:].addmm_(errors, factor[first:last, last:], alpha=-1)
    return work.to(weight.dtype).view(weight.shape), kept.view(weight.shape)


class _Removed:
    """How many units each panel loses, and which."""

    def __init__(self, pattern: Pattern, weight: Tensor, share: float) -> None:
        if isinstance(pattern, Block):
            self.rows, self.columns = pattern.sizes(weight.shape)
            self.down, self.across = pattern.units(weight.shape)
            self.share = share

    def up_to(self, column: int) -> int:
        """Units removed left of a column."""
        units = self.down * -(-column // self.columns)
        return min(round(self.share * units), max(self.down * self.across - 1, 0))

    def choose(self, panel: Tensor, corner: Tensor, first: int, last: int, name: str) -> Tensor:
        units = self.down * (-(-last // self.columns) - first // self.columns)
        count = units - (self.up_to(last) - self.up_to(first))
        if count <= 0:
            return torch.zeros(panel.shape, dtype=torch.bool, device=panel.device)
        score = "sum" if self.rows == self.columns == 1 else "squares"
        by = corner.diagonal().reciprocal()
        mask: Tensor = prune_best(
            [panel], [], [by], score, 2.0, self.rows, self.columns, count, False, 0, [name]
        )[0]
        return mask


def _share(pattern: Pattern, sparsity: float | None) -> float:
    if isinstance(pattern, NOfM):
        pattern.check_sparsity(sparsity)
        return 0.0
    if pattern.columns is None or pattern.columns > _WIDEST_PANEL:
        raise ValueError(
            f"pattern: sparsegpt takes units of at most {_WIDEST_PANEL} columns, got '{pattern}':"
            " where all of a row goes, none of its weights is left to make up for it"
        )
    return check_sparsity(sparsity, pattern)


def _panel_width(pattern: Pattern, weight: Tensor, block_size: int) -> int:
    unit = pattern.m if isinstance(pattern, NOfM) else pattern.sizes(weight.shape)[1]
    width = -(-block_size // unit) * unit
    return width if width <= _WIDEST_PANEL else _WIDEST_PANEL // unit * unit


def _check_hessian(hessian: Any, weight: Tensor, name: str) -> None:
    check_tensor("hessian", hessian)
    check_dtype("hessian", hessian, FLOATS)
    check_device("hessian", hessian, weight.device, name)
    check_shape("hessian", hessian, (weight.shape[1], weight.shape[1]), "(in, in)")
    _check_finite("hessian", hessian)
    if bool((hessian.diagonal() < 0).any()):
        raise ValueError("hessian: has negative numbers on its diagonal, a sum of x x^T has none")


def _check_finite(name: str, tensor: Tensor) -> None:
    bad = (~tensor.isfinite()).nonzero()
    if len(bad):
        place = ", ".join(map(str, bad[0].tolist()))
        raise ValueError(f"{name}: holds {len(bad)} non-finite values, first at ({place})")


def _factor(hessian: Tensor, weight: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the damped hessian's inverse; weights of dead inputs become 0."""
    hessian = hessian.clone(memory_format=torch.contiguous_format)
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    alive = (~dead).sum().clamp(min=1)
    damp = damping * diagonal.sum() / alive
    hessian.masked_fill_(dead[:, None] | dead[None, :], 0)
    diagonal.masked_fill_(dead, 1)
    diagonal.add_(damp)
    weight.masked_fill_(dead, 0)
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if not int(failed):
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if int(failed):
        raise ValueError(
            f"hessian: is not positive definite with damping {damping:g}: raise damping, or use float64"
        )
    factor: Tensor = upper.contiguous()
    return factor
