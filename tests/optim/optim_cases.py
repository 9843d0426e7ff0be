"""What the optimizer tests share: building optimizers from options, and looking into their states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import tilewright as tw
from reference import optim as reference
from reference.optim import Options
from tilewright.optim.state_io import bits_of

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [1, 255, 256, 257, 4095, 4096, 4097]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW8bit": tw.optim.AdamW8bit,
    "Adam8bit": tw.optim.Adam8bit,
    "Lion8bit": tw.optim.Lion8bit,
    "SGD8bit": lambda params, lr=1e-3, momentum=0.9, **kw: tw.optim.SGD8bit(params, lr, momentum, **kw),
}

CASES = {
    "adamw": Options("adamw", weight_decay=0.1),
    "adamw_no_decay": Options("adamw", lr=3e-2, betas=(0.8, 0.95), eps=1e-3),
    "adamw_maximize": Options("adamw", weight_decay=0.1, maximize=True),
    "adamw_zero_betas": Options("adamw", betas=(0.0, 0.0)),
    "adam": Options("adam", weight_decay=0.1),
    "adam_maximize": Options("adam", weight_decay=0.1, maximize=True),
    "lion": Options("lion", betas=(0.9, 0.99), weight_decay=0.1),
    "lion_maximize": Options("lion", betas=(0.95, 0.98), maximize=True),
    "sgd": Options("sgd", lr=1e-2),
    "sgd_decay": Options("sgd", lr=1e-2, weight_decay=0.1, dampening=0.3),
    "sgd_nesterov": Options("sgd", lr=1e-2, weight_decay=0.1, nesterov=True),
    "sgd_maximize": Options("sgd", lr=1e-2, weight_decay=0.1, maximize=True),
}


def make(o: Options, params: Any, **more: Any) -> torch.optim.Optimizer:
    """The 8-bit optimizer that a reference's options describe."""
    if o.kind == "sgd":
        return tw.optim.SGD8bit(
            params, o.lr, o.momentum, o.dampening, o.weight_decay, o.nesterov, maximize=o.maximize, **more
        )
    if o.kind == "lion":
        return tw.optim.Lion8bit(params, o.lr, o.betas, o.weight_decay, maximize=o.maximize, **more)
    chosen = tw.optim.AdamW8bit if o.kind == "adamw" else tw.optim.Adam8bit
    return chosen(params, o.lr, o.betas, o.eps, o.weight_decay, maximize=o.maximize, **more)


def parameters(
    sizes: Sequence[int | tuple[int, ...]], dtype: torch.dtype, device: torch.device, seed: int = 0
) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(size,) if isinstance(size, int) else size for size in sizes]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]


def set_grads(params: Sequence[Tensor], seed: int, scale: float = 1.0) -> None:
    """Gradients with magnitudes over several decades and some exact zeros."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        g = torch.randn(p.shape, generator=generator) * torch.exp(
            1.5 * torch.randn(p.shape, generator=generator)
        )
        g = g * (torch.rand(p.shape, generator=generator) > 0.05) * 0.1 * scale
        p.grad = torch.empty_like(p).copy_(g.clamp(-6e4, 6e4))


def along_memory(t: Tensor) -> Tensor:
    return t.detach().as_strided((t.numel(),), (1,))


def decoded(state: dict[str, Any], suffix: str) -> Tensor:
    """A moment in float64, in its parameter's shape, by the reference decoder."""
    values = state["state" + suffix].cpu()
    if bits_of(state) == 32:
        return values.double()
    flat = reference.dequantize(
        along_memory(values), state["qmap" + suffix].cpu(), state["absmax" + suffix].cpu(), 256
    )
    return flat.as_strided(values.shape, values.stride())


def moments(optimizer: torch.optim.Optimizer, p: Tensor) -> tuple[Tensor, Tensor]:
    """(m, v) in float64; zeros before the first step and where there is none."""
    zeros = torch.zeros_like(p, dtype=torch.float64, device="cpu").detach()
    state = optimizer.state.get(p)
    if not state:
        return zeros, zeros
    return decoded(state, "1"), decoded(state, "2") if "state2" in state else zeros


def snapshot(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of every parameter and state tensor, for comparing bits."""
    found = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            found.append(p.detach().clone())
            found += [value.clone() for _, value in sorted(optimizer.state.get(p, {}).items())]
    return found


def assert_same_bits(left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert (
            torch.equal(a.cpu().view(-1).view(torch.uint8), b.cpu().view(-1).view(torch.uint8))
            if (a.is_contiguous() and b.is_contiguous())
            else torch.equal(a, b)
        )


def assert_error_rule(actual: Tensor, exact: Tensor, plain: Tensor, atol: float = 0.0) -> None:
    """At most twice the error that plain PyTorch makes in the same precision."""
    error = (actual.double().cpu() - exact).abs().max() if exact.numel() else torch.tensor(0.0)
    allowed = (plain.double() - exact).abs().max() if exact.numel() else torch.tensor(0.0)
    assert float(error) <= 2 * float(allowed) + atol


def run(optimizer: torch.optim.Optimizer, steps: int, first_seed: int = 0) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        set_grads(params, first_seed + step)
        optimizer.step()
