"""Cases of the gated RMS norm: beside the same formula in plain PyTorch, and mamba_ssm's kernel.

x is a tensor of its own, as a scan makes it; z is a slice of a wider one, as a projection makes it. Elements
that move, each once: x, z and out, and with the gradient also x, z, dout, dx and dz. FLOPs, with 4 for silu
and 3 for its slope: 9 an element forward, and 20 more for the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import OURS, Call, Case, Contender, Plan, full, peer

_EPS = 1e-5
_FORWARD_FLOPS, _BACKWARD_FLOPS = 9, 20


def cases(plan: Plan) -> list[Case]:
    """The gate before the norm, as Mamba-2 has it; forward, and with the gradient."""
    channels = 1536
    if plan.model:
        if plan.model.scan is None or plan.model.family != "mamba2":
            return []
        channels = plan.model.scan.inner
    shape = (8, 2048, channels) if plan.on_gpu else (1, 512, channels)
    return [_case(plan, shape, grad) for grad in ((False,) if plan.quick else (False, True))]


def _case(plan: Plan, shape: tuple[int, int, int], grad: bool) -> Case:
    batch, length, dim = shape
    numel, dtype = batch * length * dim, plan.wide

    def step(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Call:
        generator = torch.Generator(plan.device).manual_seed(0)
        both = torch.randn((2, batch, length, 2 * dim), generator=generator, device=plan.device).to(dtype)
        x, z = both[0, ..., :dim].contiguous().requires_grad_(grad), both[1, ..., :dim].requires_grad_(grad)
        weight = torch.ones(dim, device=plan.device, dtype=dtype, requires_grad=grad)
        if not grad:
            return lambda: function(x, weight, z)
        dout = torch.full_like(x.detach(), 0.1)
        return lambda: torch.autograd.grad(function(x, weight, z), (x, weight, z), dout)

    def ours() -> Call:
        from tilewright.scan import gated_rms_norm

        return step(lambda x, weight, z: gated_rms_norm(x, weight, z, _EPS, norm_before_gate=False))

    def theirs() -> Call:
        norm: Callable[..., Any] = peer("mamba_ssm.ops.triton.layernorm_gated", "rmsnorm_fn")
        return step(lambda x, weight, z: norm(x, weight, None, z, _EPS, norm_before_gate=False))

    moved = numel * dtype.itemsize * (8 if grad else 3)
    contenders = [
        Contender(OURS, ours, moved),
        Contender("torch", lambda: step(_plain), moved),
        Contender("mamba-ssm", theirs, moved),
    ]
    name = "gated-rms-norm" + ("-grad" if grad else "")
    title = f"gated_rms_norm, {batch} x {length} x {dim}" + (", with gradient" if grad else "")
    flops = numel * (_FORWARD_FLOPS + (_BACKWARD_FLOPS if grad else 0))
    sizes = {"batch": batch, "length": length, "dim": dim, "dtype": full(dtype)}
    return Case(name, title, contenders, flops, sizes=sizes)


def _plain(x: Tensor, weight: Tensor, z: Tensor) -> Tensor:
    v = x.float() * F.silu(z.float())
    return (v * torch.rsqrt(v.square().mean(-1, keepdim=True) + _EPS) * weight.float()).to(x.dtype)
