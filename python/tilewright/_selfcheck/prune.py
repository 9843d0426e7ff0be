"""Masks and sparse layers with their gradients, against plain torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tilewright.nn import ActivationSparseLinear, BlockSparseLinear, SemiStructuredLinear
from tilewright.prune import Block, mask

from . import Probe

_OUT, _IN, _TOKENS = 72, 96, 21


def _linear(device: torch.device, pattern: str | Block, sparsity: float | None) -> nn.Linear:
    """A layer with zeros, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(_IN, _OUT)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(_OUT, _IN, generator=generator))
        linear.bias.copy_(torch.randn(_OUT, generator=generator))
        linear.to(device)
        linear.weight.mul_(mask(linear.weight, pattern, sparsity))
    return linear


def _compared(layer: nn.Module, linear: nn.Linear, device: torch.device) -> float:
    """The largest error of y and dx, as a share of the largest entry."""
    dense = linear.double()
    worst = 0.0
    for tokens in (1, _TOKENS):
        x = torch.randn(tokens, _IN, generator=torch.Generator().manual_seed(tokens)).to(device)
        ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        found, truth = layer(ours), dense(exact)
        results = [(found, truth)]
        weight = torch.ones_like(truth)
        pairs = [torch.autograd.grad(y, v, weight.to(y)) for y, v in ((found, ours), (truth, exact))]
        results.append((pairs[0][0], pairs[1][0]))
        worst = max(worst, *(_error(a, b) for a, b in results))
    return worst


def _error(found: Tensor, truth: Tensor) -> float:
    return float((found.detach().double() - truth.detach()).abs().max() / truth.detach().abs().max())


def _check_blocks(device: torch.device) -> tuple[float, float]:
    linear = _linear(device, Block(8, 16), 0.5)
    return _compared(BlockSparseLinear.from_linear(linear), linear, device), 1e-5


def _check_semi_structured(device: torch.device) -> tuple[float, float]:
    linear = _linear(device, "2:4", None)
    return _compared(SemiStructuredLinear.from_linear(linear), linear, device), 1e-5


def _check_activations(device: torch.device) -> tuple[float, float]:
    linear = _linear(device, "2:4", None)
    return _compared(ActivationSparseLinear.from_linear(linear, 0.0), linear, device), 1e-5


def _check_masks(device: torch.device) -> tuple[float, float]:
    weight = torch.randn(_OUT, _IN, generator=torch.Generator().manual_seed(1))
    kept = mask(weight.to(device), "2:4").cpu().view(-1, 4)
    size = weight.abs().view(-1, 4)
    expected = torch.zeros_like(kept).scatter_(1, size.topk(2).indices, True)
    return float((kept != expected).sum()), 0.0


PROBES: dict[str, Probe] = {
    "pruning masks": _check_masks,
    "BlockSparseLinear": _check_blocks,
    "SemiStructuredLinear": _check_semi_structured,
    "ActivationSparseLinear": _check_activations,
}
