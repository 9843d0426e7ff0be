"""The optimizers and blockwise quantization, each against a few lines of plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewright import optim

from . import Probe

Make = Callable[[list[Tensor]], Any]

_COUNT = 5000
_STEPS = 5


def _sample(device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-6, 0, _COUNT)
    return (torch.randn(_COUNT, generator=generator) * spread).to(device)


def _check_quantize(device: torch.device) -> tuple[float, float]:
    values = _sample(device, 0)
    codes, state = optim.quantize_blockwise(values, blocksize=256)
    back = optim.dequantize_blockwise(codes, state)
    table = optim.create_dynamic_map(signed=True).to(device, torch.float64)
    padded = torch.cat([values, values.new_zeros(-_COUNT % 256)]).view(-1, 256)
    scale = padded.abs().amax(dim=1).repeat_interleave(256)[:_COUNT].double()
    nearest = (values.double() / scale)[:, None].sub(table).abs().min(dim=1).values
    ours = (back.double() - values.double()).abs() / scale
    return float((ours - nearest).max()), 1e-6


def _check_32bit(ours: str, theirs: str, **options: Any) -> Probe:
    def check(device: torch.device) -> tuple[float, float]:
        make = getattr(optim, ours)
        return _difference(device, lambda p: make(p, optim_bits=32, **options), theirs, options), 1e-5

    return check


def _check_8bit(ours: str, theirs: str, bound: float, **options: Any) -> Probe:
    def check(device: torch.device) -> tuple[float, float]:
        make = getattr(optim, ours)
        return _difference(device, lambda p: make(p, min_8bit_size=1, **options), theirs, options), bound

    return check


def _difference(device: torch.device, make: Make, name: str, options: dict[str, Any]) -> float:
    """Largest relative difference of the total weight change from the plain torch optimizer's."""
    start = _sample(device, 1)
    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    pair = [(ours, make([ours])), (theirs, _plain(name, [theirs], options))]
    for step in range(_STEPS):
        grad = _sample(device, 2 + step)
        for param, optimizer in pair:
            param.grad = grad.clone()
            optimizer.step()
    moved = (theirs.detach() - start).norm()
    return float((ours.detach() - theirs.detach()).norm() / moved)


class _PlainLion:
    """Lion from its paper (arXiv 2302.06675), in five lines of torch."""

    def __init__(self, params: list[Tensor], *, lr: float, betas: tuple[float, float], weight_decay: float):
        self.params, self.lr, self.betas, self.decay = params, lr, betas, weight_decay
        self.momenta = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self) -> None:
        for param, momentum in zip(self.params, self.momenta, strict=True):
            assert param.grad is not None
            param.mul_(1 - self.lr * self.decay)
            param.sub_(self.lr * momentum.lerp(param.grad, 1 - self.betas[0]).sign())
            momentum.lerp_(param.grad, 1 - self.betas[1])


def _plain(name: str, params: list[Tensor], options: dict[str, Any]) -> Any:
    return _PlainLion(params, **options) if name == "Lion" else getattr(torch.optim, name)(params, **options)


_ADAM = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
_SGD = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
PROBES: dict[str, Probe] = {
    "quantize_blockwise": _check_quantize,
    "AdamW, 32-bit": _check_32bit("AdamW", "AdamW", **_ADAM),
    "Lion, 32-bit": _check_32bit("Lion", "Lion", **_ADAM),
    "AdamW8bit": _check_8bit("AdamW8bit", "AdamW", 0.05, **_ADAM),
    "Adam8bit": _check_8bit("Adam8bit", "Adam", 0.05, **_ADAM),
    "Lion8bit": _check_8bit("Lion8bit", "Lion", 0.2, **_ADAM),
    "SGD8bit": _check_8bit("SGD8bit", "SGD", 0.02, **_SGD),
}
