"""Weights and runs that the tests of semi-structured layers share."""

from __future__ import annotations

import torch
from torch import Tensor

from reference import prune_semi_structured as reference
from tilewright.prune.ops import semi_structured as ops
from tilewright.prune.semi_structured import compress_weight

HALVES = [torch.float16, torch.bfloat16]
FLOATS = [torch.float32, *HALVES]
ATOL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def n_of(pattern: str) -> tuple[int, int]:
    """(n, m)."""
    n, m = map(int, pattern.split(":"))
    return n, m


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def pruned(out: int, columns: int, pattern: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A weight that keeps the n largest of each group."""
    n, m = n_of(pattern)
    weight = random(out, columns, dtype=dtype, seed=seed)
    groups = weight.unflatten(1, (-1, m))
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.abs().topk(n, -1).indices, True)
    return groups.masked_fill(~kept, 0).flatten(1)


class Run:
    """y, dx, dW (dense) and db of a layer, by the ops or by plain torch in a dtype."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor, activation: str) -> None:
        self.inputs = x, weight, bias, dy
        self.activation = activation

    def plain(self, dtype: torch.dtype) -> list[Tensor]:
        x, weight, bias, dy = (None if t is None else t.detach().to(dtype) for t in self.inputs)
        leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
        y = reference.linear(leaves[0], leaves[1], bias, self.activation)
        dx, dw, *db = torch.autograd.grad(y, leaves, dy)
        return [y.detach(), dx, dw * (self.inputs[1] != 0), *db]

    def ours(self, pattern: str, device: torch.device) -> list[Tensor]:
        n, m = n_of(pattern)
        x, weight, bias, dy = self.inputs
        values, indices = compress_weight(weight.to(device), pattern)
        x = x.detach().to(device).requires_grad_()
        leaves = [x, values.requires_grad_()]
        if bias is not None:
            bias = bias.detach().to(device).requires_grad_()
            leaves.append(bias)
        y = ops.linear(x, values, indices, bias, n, m, self.activation)
        dx, dvalues, *db = torch.autograd.grad(y, leaves, dy.to(device))
        dw = ops.decompress(dvalues, indices, n, m)
        return [t.detach().cpu() for t in (y, dx, dw, *db)]


def check_close(found: list[Tensor], plain: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    for name, ours, theirs, truth in zip(("y", "dx", "dw", "db"), found, plain, exact, strict=False):
        assert (ours.dtype, ours.shape) == (dtype, truth.shape), name
        if truth.numel() == 0:
            continue
        error = (ours.double() - truth).abs().max()
        allowed = 2 * (theirs.double() - truth).abs().max() + ATOL[dtype] * max(1.0, float(truth.abs().max()))
        assert error <= allowed, (name, float(error), float(allowed))
