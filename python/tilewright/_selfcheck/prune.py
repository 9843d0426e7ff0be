"""Masks and sparse layers with their gradients, against plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tilewright.nn import ActivationSparseLinear, BlockSparseLinear, SemiStructuredLinear
from tilewright.prune import Block, mask, sparsegpt

from . import Probe

Sparse = BlockSparseLinear | SemiStructuredLinear | ActivationSparseLinear
# The sparse layer of a dense one, and its weight.
Make = Callable[[nn.Linear], tuple[Sparse, nn.Parameter]]

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


def _compared(layer: Sparse, linear: nn.Linear, weight: nn.Parameter) -> float:
    """The largest error of y, dx and the gradient of the layer's `weight`, each against its largest entry.

    Without gradients a layer may have another op, so y is made both ways.
    """
    dense, worst = copy.deepcopy(linear).double(), 0.0
    for tokens in (1, _TOKENS):
        x = torch.randn(tokens, _IN, generator=torch.Generator().manual_seed(tokens)).to(linear.weight)
        ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        found, truth = layer(ours), dense(exact)
        with torch.no_grad():
            served = layer(x)
        dx, dw = torch.autograd.grad(found.sum(), (ours, weight))
        true_dx, true_dw = torch.autograd.grad(truth.sum(), (exact, dense.weight))
        spread = copy.deepcopy(layer)  # as a layer whose weight it is, the gradient turns into a dense one
        spread.get_parameter(next(n for n, p in layer.named_parameters() if p is weight)).data = dw
        pairs = [(found, truth), (served, truth), (dx, true_dx)]
        pairs.append((spread.to_linear().weight, true_dw * (dense.weight != 0)))
        worst = max(worst, *(_error(a, b) for a, b in pairs))
    return worst


def _error(found: Tensor, truth: Tensor) -> float:
    return float((found.detach().double() - truth.detach()).abs().max() / truth.detach().abs().max())


def _layer(make: Make, pattern: str | Block, sparsity: float | None, dtype: torch.dtype) -> Probe:
    def check(device: torch.device) -> tuple[float, float]:
        linear = _linear(device, pattern, sparsity).to(dtype)
        layer, weight = make(linear)
        return _compared(layer, linear, weight), 1e-5 if dtype == torch.float32 else 2e-2

    return check


def _blocks(linear: nn.Linear) -> tuple[Sparse, nn.Parameter]:
    layer = BlockSparseLinear.from_linear(linear)
    return layer, layer.values


def _semi_structured(linear: nn.Linear) -> tuple[Sparse, nn.Parameter]:
    layer = SemiStructuredLinear.from_linear(linear)
    return layer, layer.values


def _activations(linear: nn.Linear) -> tuple[Sparse, nn.Parameter]:
    layer = ActivationSparseLinear.from_linear(linear, 0.0)
    return layer, layer.weight_t


def _check_masks(device: torch.device) -> tuple[float, float]:
    weight = torch.randn(_OUT, _IN, generator=torch.Generator().manual_seed(1))
    kept = mask(weight.to(device), "2:4").cpu().view(-1, 4)
    size = weight.abs().view(-1, 4)
    expected = torch.zeros_like(kept).scatter_(1, size.topk(2).indices, True)
    return float((kept != expected).sum()), 0.0


def _check_random_masks(device: torch.device) -> tuple[float, float]:
    """The promised count, and the same on every device; with a row's units among themselves, and without."""
    weight = torch.ones(_OUT, _IN)
    wrong = 0.0
    for scope in ("layer", "row"):
        found, expected = (
            mask(weight.to(where), "element", 0.5, "random", scope=scope, seed=3).cpu()
            for where in (device, torch.device("cpu"))
        )
        wrong += float(found.sum() != _OUT * _IN // 2) + float((found != expected).sum())
    return wrong, 0.0


def _check_sparsegpt(device: torch.device) -> tuple[float, float]:
    """With a layer's inputs it leaves less error in the outputs than the smallest weights' removal."""
    x = _inputs(200) @ _inputs(_IN)  # inputs that go together, so that others can make up for what is removed
    weight = _inputs(_OUT)
    repaired, kept = (t.cpu() for t in sparsegpt(weight.to(device), (x.T @ x).to(device), "2:4"))
    plain = weight * mask(weight, "2:4")
    errors = [float((x @ (w - weight).T).norm()) for w in (repaired, plain)]
    per_group = kept.view(-1, 4).sum(1)
    return max(errors[0] / errors[1], float((per_group != 2).any()) * 9), 0.9


def _inputs(rows: int) -> Tensor:
    return torch.randn(rows, _IN, generator=torch.Generator().manual_seed(rows))


PROBES: dict[str, Probe] = {
    "masks, 2:4": _check_masks,
    "masks, random": _check_random_masks,
    "sparsegpt": _check_sparsegpt,
    "BlockSparseLinear": _layer(_blocks, Block(8, 16), 0.5, torch.float32),
    "BlockSparseLinear, bfloat16": _layer(_blocks, Block(8, 16), 0.5, torch.bfloat16),
    "SemiStructuredLinear": _layer(_semi_structured, "2:4", None, torch.float32),
    "SemiStructuredLinear, bfloat16": _layer(_semi_structured, "2:4", None, torch.bfloat16),
    "ActivationSparseLinear": _layer(_activations, "element", 0.0, torch.float32),
    "ActivationSparseLinear, bfloat16": _layer(_activations, "element", 0.0, torch.bfloat16),
}
