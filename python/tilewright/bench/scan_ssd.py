"""Mamba-2's scan beside mamba_ssm and the plain PyTorch form that transformers runs without kernels.

A step of a head, with P = head_dim, N = state, Q = 64 (the kernels' chunk) and R heads a group, takes

    forward    2 * (2 P N + Q P / 2 + Q N / (2 R))               multiplications and additions
    backward   2 * (4 P N + Q P + 3 Q N / (2 R))                 more

and must move x and out (x, out, dout and dx in training), dt, and its share of B and C.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .case import OURS, Call, Case, Contender, Plan, full, peer

_CHUNK = 64
_USER_CHUNK = 256  # the chunk_size that models are configured with


def cases(plan: Plan) -> list[Case]:
    """Forward and training, of a model or of mamba2-130m (24 heads), on a GPU mamba2-2.7b (80 heads)."""
    batch, length, heads = (8, 4096, 80) if plan.on_gpu else (1, 256 if plan.quick else 2048, 24)
    if plan.model:
        if plan.model.family != "mamba2" or plan.model.scan is None:
            return []
        heads = plan.model.scan.heads
    return [_case(plan.device, plan.wide, batch, length, heads, train) for train in (False, True)]


def token_flops(head_dim: int, states: int, per_group: int, train: bool) -> float:
    """Of one token of one head, of which `per_group` share B and C."""
    forward = 2 * head_dim * states + _CHUNK * head_dim / 2 + _CHUNK * states / per_group / 2
    backward = 4 * head_dim * states + _CHUNK * head_dim + 3 * _CHUNK * states / per_group / 2
    return 2 * (forward + (backward if train else 0))


def _case(device: torch.device, dtype: torch.dtype, batch: int, length: int, heads: int, train: bool) -> Case:
    head_dim, states, groups = 64, 128, 1

    def arguments() -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
            made = torch.randn(shape, generator=generator, device=device).to(of)
            return made.requires_grad_(train)

        return {
            "x": normal(batch, length, heads, head_dim),
            "dt": normal(batch, length, heads),
            "A": torch.arange(1.0, heads + 1, device=device).neg().requires_grad_(train),
            "B": normal(batch, length, groups, states),
            "C": normal(batch, length, groups, states),
            "D": normal(heads, of=torch.float32),
            "dt_bias": normal(heads, of=torch.float32),
        }

    def setup(scan: Callable[..., Any]) -> Call:
        inputs = arguments()

        def forward() -> Any:
            return scan(**inputs, chunk_size=_USER_CHUNK, dt_softplus=True)

        if not train:
            return forward
        gradient = torch.randn_like(forward())

        def step() -> object:
            return torch.autograd.grad(forward(), list(inputs.values()), gradient)

        return step

    steps = batch * length
    forward_bytes = steps * (
        heads * (2 * head_dim * dtype.itemsize + 4) + 2 * groups * states * dtype.itemsize
    )
    moved = forward_bytes * (2.5 if train else 1.0)
    flops = steps * heads * token_flops(head_dim, states, heads // groups, train)
    name = full(dtype)
    what = "train" if train else "forward"
    return Case(
        f"ssd-chunk-scan-{what}-{name}",
        f"ssd_chunk_scan {what}, {batch} x {length} x {heads} heads, {name}",
        [
            Contender(OURS, lambda: setup(_ours()), moved),
            Contender("transformers", lambda: setup(transformers_scan()), moved),
            Contender("mamba-ssm", lambda: setup(_mamba_ssm()), moved),
        ],
        flops,
        sizes={
            "batch": batch, "length": length, "heads": heads, "head_dim": head_dim, "state": states,
            "groups": groups, "dtype": name,
        },
    )  # fmt: skip


def _ours() -> Callable[..., Any]:
    from tilewright.scan import ssd_chunk_scan

    return ssd_chunk_scan


def transformers_scan() -> Callable[..., Any]:
    """The torch form that its Mamba-2 falls back to."""
    scan = peer("transformers.models.mamba2.modeling_mamba2", "mamba2_chunk_scan")
    return lambda x, **options: scan(x, **options)


def _mamba_ssm() -> Callable[..., Any]:
    scan: Callable[..., Any] = peer("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    return scan
