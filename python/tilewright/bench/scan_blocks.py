"""Whole blocks between a Mamba layer's projections: mamba_inner, and mamba_split_conv1d_scan_combined.

Elements a token that must move, each written and read once where it goes from one product to the next:

    mamba_inner    xz; u, delta and y; dt, B and C; out    2 inner + 2 (3 inner + rank + 2 states) + hidden
    split          zxbcdt; x, B, C behind the convolution; y before and behind the norm; out
                   (2 inner + 2 states + heads) + 2 (inner + 2 states) + 4 inner + hidden

and the weights, once a call. Training reads each of them again and writes a gradient of its size: three times
as much. FLOPs: 2 a weight of a projection and token, the convolution's 2 width + 4 a channel, the scan's own
(scan_selective.py, scan_ssd.py) and 12 a channel for the gated norm; training three times the first two and
what the scans say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import OURS, Call, Case, Contender, Plan, full, peer
from .presets import MODELS, Scan
from .scan_selective import mambapy_scan
from .scan_selective import token_flops as selective_flops
from .scan_ssd import token_flops as ssd_flops
from .scan_ssd import transformers_scan

_WIDTH, _CHUNK = 4, 256
_CONV_FLOPS, _NORM_FLOPS = 2 * _WIDTH + 4, 12


def cases(plan: Plan) -> list[Case]:
    """A block of the model, or of mamba-130m and of mamba2-130m; forward, and with all gradients."""
    models = [plan.model] if plan.model else [MODELS["mamba-130m"], MODELS["mamba2-130m"]]
    batch, length = (8, 2048) if plan.on_gpu else (1, 128 if plan.quick else 512)
    block = {"mamba": _inner, "mamba2": _split}
    return [
        block[model.family](plan, model.hidden, model.scan, batch, length, train)
        for model in models
        if model.scan
        for train in ((False,) if plan.quick else (False, True))
    ]


def _normal(plan: Plan, *shape: int, dtype: torch.dtype | None = None, seed: int = 0) -> Tensor:
    """As a trained layer's: about 1 for activations, and weights that keep it so."""
    generator = torch.Generator(plan.device).manual_seed(seed)
    scale = shape[-1] ** -0.5 if len(shape) == 2 else 1.0
    made = torch.randn(shape, generator=generator, device=plan.device) * scale
    return made.to(dtype or plan.wide)


def _setup(make: Callable[[], dict[str, Tensor]], run: Callable[..., Any], train: bool) -> Call:
    """`run` gets the tensors by name."""
    tensors = make()
    if not train:
        return torch.no_grad()(lambda: run(**tensors))
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    weight = torch.ones_like(run(**tensors).detach())
    return lambda: torch.autograd.grad(run(**tensors), leaves, weight)


def _case(
    plan: Plan, hidden: int, scan: Scan, name: str, batch: int, length: int, train: bool, columns: int,
    weights: int, scan_flops: float, rows: dict[str, Callable[[], Call]],
) -> Case:  # fmt: skip
    """`columns`: elements a token that move; `weights`: of projections; `scan_flops` a token, all of them."""
    passes, tokens = 3 if train else 1, batch * length
    moved = float(passes * (tokens * columns + weights) * plan.wide.itemsize)
    channels = scan.inner + (2 * scan.states if scan.heads else 0)
    flops = tokens * (passes * (2.0 * weights + channels * _CONV_FLOPS) + scan_flops)
    sizes = {"batch": batch, "length": length, "hidden": hidden, "inner": scan.inner}
    words = f"{batch} x {length}, {scan.inner} channels"
    return Case(
        name + ("-training" if train else ""),
        f"{name.replace('-', '_')}{' + backward' if train else ''}, {words}, {full(plan.wide)}",
        [Contender(who, setup, moved) for who, setup in rows.items()],
        flops,
        sizes={**sizes, "states": scan.states, "heads": scan.heads, "dtype": full(plan.wide)},
    )


def _inner(plan: Plan, hidden: int, scan: Scan, batch: int, length: int, train: bool) -> Case:
    inner, states, rank = scan.inner, scan.states, -(-hidden // 16)

    def tensors() -> dict[str, Tensor]:
        wide = torch.float32
        return {
            "xz": _normal(plan, batch, 2 * inner, length),
            "conv1d_weight": _normal(plan, inner, 1, _WIDTH) / 2,
            "conv1d_bias": _normal(plan, inner, seed=1),
            "x_proj_weight": _normal(plan, rank + 2 * states, inner, seed=2),
            "delta_proj_weight": _normal(plan, inner, rank, seed=3),
            "out_proj_weight": _normal(plan, hidden, inner, seed=4),
            "A": -torch.arange(1.0, states + 1, device=plan.device).repeat(inner, 1),
            "D": torch.ones(inner, device=plan.device),
            "delta_bias": _normal(plan, inner, dtype=wide, seed=5) - 4,
        }

    def ours() -> Call:
        from tilewright.scan import mamba_inner

        return _setup(tensors, lambda **given: mamba_inner(**given, out_proj_bias=None), train)

    def mambapy() -> Call:
        selective_scan = mambapy_scan()

        def block(
            xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor, x_proj_weight: Tensor,
            delta_proj_weight: Tensor, out_proj_weight: Tensor, A: Tensor, D: Tensor, delta_bias: Tensor,
        ) -> Tensor:  # fmt: skip
            x, z = xz.chunk(2, dim=1)
            u = _conv(x, conv1d_weight, conv1d_bias)
            dt, B, C = torch.split(x_proj_weight @ u, [rank, states, states], dim=1)
            y = selective_scan(u, delta_proj_weight @ dt, A, B, C, D, z, delta_bias, delta_softplus=True)
            return F.linear(y.transpose(1, 2), out_proj_weight)

        return _setup(tensors, block, train)

    def mamba_ssm() -> Call:
        block = peer("mamba_ssm.ops.selective_scan_interface", "mamba_inner_fn")
        return _setup(tensors, lambda **given: block(**given, out_proj_bias=None), train)

    between = rank + 2 * states
    return _case(
        plan, hidden, scan, "mamba-inner", batch, length, train,
        columns=2 * inner + 2 * (3 * inner + between) + hidden,
        weights=inner * (between + rank + hidden),
        scan_flops=inner * selective_flops(states, train),
        rows={OURS: ours, "mambapy": mambapy, "mamba-ssm": mamba_ssm},
    )  # fmt: skip


def _split(plan: Plan, hidden: int, scan: Scan, batch: int, length: int, train: bool) -> Case:
    inner, states, heads = scan.inner, scan.states, scan.heads
    channels = inner + 2 * states

    def tensors() -> dict[str, Tensor]:
        wide = torch.float32
        return {
            "zxbcdt": _normal(plan, batch, length, 2 * inner + 2 * states + heads),
            "conv1d_weight": _normal(plan, channels, _WIDTH),
            "conv1d_bias": _normal(plan, channels, seed=1),
            "dt_bias": _normal(plan, heads, dtype=wide, seed=2) - 4,
            "A": -torch.arange(1.0, heads + 1, device=plan.device),
            "D": torch.ones(heads, device=plan.device),
            "rmsnorm_weight": torch.ones(inner, device=plan.device, dtype=plan.wide),
            "outproj_weight": _normal(plan, hidden, inner, seed=3),
        }

    def fused(block: Callable[..., Any]) -> Call:
        options: dict[str, Any] = {"chunk_size": _CHUNK, "headdim": scan.head_dim, "norm_before_gate": False}
        return _setup(tensors, lambda **given: block(**given, **options), train)

    def ours() -> Call:
        from tilewright.scan import mamba_split_conv1d_scan_combined

        return fused(mamba_split_conv1d_scan_combined)

    def transformers() -> Call:
        """Its chunked scan between the convolution, the norm and the projection by torch."""
        chunk_scan = transformers_scan()

        def block(
            zxbcdt: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor,
            rmsnorm_weight: Tensor, outproj_weight: Tensor,
        ) -> Tensor:  # fmt: skip
            z, xBC, dt = torch.split(zxbcdt, [inner, channels, heads], dim=-1)
            xBC = _conv(xBC.transpose(1, 2), conv1d_weight[:, None], conv1d_bias).transpose(1, 2)
            x, B, C = torch.split(xBC, [inner, states, states], dim=-1)
            y = chunk_scan(
                x.view(*x.shape[:2], heads, -1), dt=dt, A=A, B=B[:, :, None], C=C[:, :, None],
                chunk_size=_CHUNK, D=D, dt_bias=dt_bias, dt_softplus=True,
            )  # fmt: skip
            y = (y[0] if isinstance(y, tuple) else y).flatten(2).to(z.dtype) * F.silu(z)
            return F.linear(F.rms_norm(y, (inner,), rmsnorm_weight, 1e-6), outproj_weight)

        return _setup(tensors, block, train)

    return _case(
        plan, hidden, scan, "mamba-split-conv1d-scan-combined", batch, length, train,
        columns=2 * inner + 2 * states + heads + 2 * channels + 4 * inner + hidden,
        weights=inner * hidden,
        scan_flops=heads * ssd_flops(scan.head_dim, states, heads, train)
        + (3 if train else 1) * inner * _NORM_FLOPS,
        rows={
            OURS: ours,
            "transformers": transformers,
            "mamba-ssm": lambda: fused(
                peer("mamba_ssm.ops.triton.ssd_combined", "mamba_split_conv1d_scan_combined")
            ),
        },
    )  # fmt: skip


def _conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(batch, channels, length), causal, behind SiLU."""
    padded = F.conv1d(x, weight, bias, padding=_WIDTH - 1, groups=x.shape[1])
    return F.silu(padded[..., : x.shape[-1]])
