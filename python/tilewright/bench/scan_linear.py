"""Linear scans: forward, with gradient, one long sequence, a short one where torch's own loop is a peer.

Bytes per element of itemsize s, each tensor once: forward 3 s (a, b, h); with gradient 3 s + 5 s (a, g, h,
da, db). A clone moves 2 s. It finds new memory for its result, as a call without `out` does; the copy that
is the roofline has its memory already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .case import OURS, Call, Case, Contender, Plan, peer, short

_FORWARD_FLOPS, _BACKWARD_FLOPS = 2, 4  # per element


def cases(plan: Plan) -> list[Case]:
    """All linear-scan cases; no model here is made of nothing but one, so none has a case."""
    device = plan.device
    if plan.model:
        return []
    if plan.quick:
        return [_forward(device, plan.wide, (1, 1536, 1024), 2)]
    dtypes = [torch.float32, torch.bfloat16] if plan.on_gpu else [torch.float32]
    found = []
    for dtype in dtypes:
        for dim in (2, 1):
            found += [_forward(device, dtype, (8, 1536, 4096), dim)]
            found += [_gradient(device, dtype, (8, 1536, 4096), dim)]
    found.append(_forward(device, torch.float32, (1 << 24,), 0))
    return [*found, _short(device)]


class _Problem:
    """Tensors of one shape, made when a contender first asks for them."""

    def __init__(self, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], dim: int) -> None:
        self.device, self.dtype, self.shape, self.dim = device, dtype, shape, dim
        self.numel = torch.Size(shape).numel()
        self._tensors: tuple[Tensor, Tensor] | None = None

    def tensors(self) -> tuple[Tensor, Tensor]:
        if self._tensors is None:
            generator = torch.Generator(self.device).manual_seed(0)
            a = torch.rand(self.shape, generator=generator, device=self.device, dtype=self.dtype)
            b = torch.randn(self.shape, generator=generator, device=self.device, dtype=self.dtype)
            self._tensors = a, b
        return self._tensors

    def bytes(self, tensors: int) -> float:
        return tensors * self.numel * self.dtype.itemsize

    def sizes(self) -> dict[str, object]:
        return {"shape": "x".join(map(str, self.shape)), "dim": self.dim, "dtype": short(self.dtype)}

    def name(self) -> str:
        return f"{'x'.join(map(str, self.shape))} dim {self.dim}, {short(self.dtype)}"


def _forward(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], dim: int) -> Case:
    problem = _Problem(device, dtype, shape, dim)
    contenders = [
        Contender(OURS, lambda: _into(problem), problem.bytes(3)),
        Contender(f"{OURS}, allocating", lambda: _ours(problem), problem.bytes(3)),
        Contender("torch, clone", lambda: problem.tensors()[0].clone, problem.bytes(2), yardstick=True),
        Contender("torch, associative_scan", lambda: _associative_scan(problem), problem.bytes(3)),
    ]
    if len(shape) == 3:
        contenders.append(Contender("mambapy", lambda: _mambapy(problem), problem.bytes(3)))
    name = f"linear-scan-{len(shape)}d-dim{dim}-{short(dtype)}"
    title = f"linear_scan, {problem.name()}"
    return Case(name, title, contenders, _FORWARD_FLOPS * problem.numel, sizes=problem.sizes())


def _gradient(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], dim: int) -> Case:
    problem = _Problem(device, dtype, shape, dim)
    contenders = [
        Contender(OURS, lambda: _with_gradient(problem, _ours(problem)), problem.bytes(8)),
        Contender("torch, clone", lambda: problem.tensors()[0].clone, problem.bytes(2), yardstick=True),
        Contender("mambapy", lambda: _with_gradient(problem, _mambapy(problem)), problem.bytes(8)),
    ]
    name = f"linear-scan-gradient-dim{dim}-{short(dtype)}"
    title = f"linear_scan and gradient, {problem.name()}"
    flops = (_FORWARD_FLOPS + _BACKWARD_FLOPS) * problem.numel
    return Case(name, title, contenders, flops, sizes=problem.sizes())


def _short(device: torch.device) -> Case:
    """So few steps that a loop over them is what one would write."""
    problem = _Problem(device, torch.float32, (8, 64, 1024), 1)
    contenders = [
        Contender(OURS, lambda: _ours(problem), problem.bytes(3)),
        Contender("torch, a loop", lambda: _loop(problem), problem.bytes(3)),
        Contender("mambapy", lambda: _mambapy(problem), problem.bytes(3)),
    ]
    title = f"linear_scan, {problem.name()}"
    flops = _FORWARD_FLOPS * problem.numel
    return Case("linear-scan-short", title, contenders, flops, calls=10, sizes=problem.sizes())


def _ours(problem: _Problem) -> Call:
    from tilewright.scan import linear_scan

    a, b = problem.tensors()
    return lambda: linear_scan(a, b, dim=problem.dim)


def _into(problem: _Problem) -> Call:
    """Into memory that is there, as that of the copy is which says what the memory gives."""
    from tilewright.scan import linear_scan

    a, b = problem.tensors()
    out = torch.empty_like(b)
    return lambda: linear_scan(a, b, dim=problem.dim, out=out)


def _with_gradient(problem: _Problem, call: Callable[[], Any]) -> Call:
    a, b = problem.tensors()
    grad = torch.ones_like(call())

    def run() -> object:
        for leaf in (a, b):
            leaf.requires_grad_()
        try:
            return torch.autograd.grad(call(), (a, b), grad)
        finally:
            for leaf in (a, b):
                leaf.requires_grad_(False)

    return run


def _loop(problem: _Problem) -> Call:
    a, b = problem.tensors()

    def run() -> Tensor:
        h = torch.empty_like(b)
        state = torch.zeros_like(b[:, 0])
        for t in range(b.shape[1]):
            state = torch.addcmul(b[:, t], a[:, t], state)
            h[:, t] = state
        return h

    return run


def _associative_scan(problem: _Problem) -> Call:
    scan = peer("torch._higher_order_ops", "associative_scan")
    a, b = problem.tensors()

    def compose(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return second[0] * first[0], second[0] * first[1] + second[1]

    return lambda: scan(compose, (a, b), problem.dim, combine_mode="generic")


def _mambapy(problem: _Problem) -> Call:
    """Takes (batch, length, channels, states)."""
    scan = peer("mambapy.pscan", "pscan")
    a, b = problem.tensors()
    return lambda: scan(a.movedim(problem.dim, 1).unsqueeze(-1), b.movedim(problem.dim, 1).unsqueeze(-1))
