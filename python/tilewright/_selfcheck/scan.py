"""The scans, each with its gradients against a few lines of plain torch in float64.

In bfloat16 too where a GPU then runs another kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright import scan
from tilewright.nn import Mamba, Mamba2
from tilewright.scan import dense

from . import Probe

Arguments = dict[str, Tensor]

_BATCH, _DIM, _LENGTH, _STATES, _HEADS = 2, 24, 70, 5, 3

_selective_scan: Callable[..., Any] = partial(scan.selective_scan, delta_softplus=True)
_ssd_chunk_scan: Callable[..., Any] = partial(scan.ssd_chunk_scan, chunk_size=64)
_causal_conv1d: Callable[..., Any] = partial(scan.causal_conv1d, activation="silu")
_mamba2_block: Callable[..., Any] = partial(
    scan.mamba_split_conv1d_scan_combined, chunk_size=64, headdim=_DIM // _HEADS, norm_before_gate=False
)
_gated_rms_norm: Callable[..., Any] = partial(scan.gated_rms_norm, norm_before_gate=False)


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _compared(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    arguments: Arguments,
    dtype: torch.dtype = torch.float32,
) -> Probe:
    """The largest error of the output and of any gradient, relative to the largest entry there."""
    rounded = {name: value.to(_dtype_of(name, dtype)).double() for name, value in arguments.items()}

    def check(device: torch.device) -> tuple[float, float]:
        found = _results(ours, rounded, device, dtype)
        exact = _results(plain, rounded, torch.device("cpu"), torch.float64)
        errors = [
            (a.double().cpu() - b).abs().max() / b.abs().max() for a, b in zip(found, exact, strict=True)
        ]
        return float(max(errors)), 1e-4 if dtype == torch.float32 else 2e-2

    return check


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """What a model in `dtype` keeps an argument in: decay rates and skips stay in float32."""
    return torch.promote_types(dtype, torch.float32) if name in ("A", "D") else dtype


def _results(
    run: Callable[..., Tensor], arguments: Arguments, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    leaves = {name: v.to(device, _dtype_of(name, dtype)).requires_grad_() for name, v in arguments.items()}
    out = run(**leaves)
    weight = _normal(*out.shape, seed=99).bfloat16().to(out)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), weight)]


def _plain_linear_scan(a: Tensor, b: Tensor) -> Tensor:
    rows, h = [], torch.zeros_like(b[:, 0])
    for step in range(b.shape[1]):
        h = a[:, step] * h + b[:, step]
        rows.append(h)
    return torch.stack(rows, 1)


def _plain_selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor
) -> Tensor:
    dt, h, rows = F.softplus(delta), u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        step = dt[:, :, t, None]
        h = torch.exp(step * A) * h + step * u[:, :, t, None] * B[:, None, :, t]
        rows.append((h * C[:, None, :, t]).sum(-1))
    return (torch.stack(rows, -1) + D[:, None] * u) * F.silu(z)


def _plain_ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    h, rows = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1]), []
    for t in range(x.shape[1]):
        decay, drive = torch.exp(dt[:, t] * A), dt[:, t, :, None] * x[:, t]
        h = decay[..., None, None] * h + drive[..., None] * B[:, t, :, None]
        rows.append((h * C[:, t, :, None]).sum(-1))
    return torch.stack(rows, 1)


def _plain_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    padded = F.conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=x.shape[1])
    return F.silu(padded[..., : x.shape[2]])


def _plain_gated_norm(x: Tensor, weight: Tensor, z: Tensor) -> Tensor:
    return F.rms_norm(x * F.silu(z), weight.shape, weight, 1e-6)


def _plain_block(
    zxbcdt: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor,
    rmsnorm_weight: Tensor, outproj_weight: Tensor,
) -> Tensor:  # fmt: skip
    z, xBC, dt = torch.split(zxbcdt, [_DIM, _DIM + 2 * _STATES, _HEADS], -1)
    xBC = _plain_conv(xBC.mT, conv1d_weight, conv1d_bias).mT
    x, B, C = torch.split(xBC, [_DIM, _STATES, _STATES], -1)
    x = torch.unflatten(x, -1, (_HEADS, -1))
    y = _plain_ssd(x, F.softplus(dt + dt_bias), A, B[:, :, None], C[:, :, None]) + D[:, None] * x
    return F.linear(_plain_gated_norm(y.flatten(2), rmsnorm_weight, z), outproj_weight)


def _check_decoding(device: torch.device) -> tuple[float, float]:
    """Token by token, the two updates give what the convolution and the scan give for all tokens at once."""
    x, z, dt = (_normal(_BATCH, _DIM, 9, seed=seed).to(device, torch.float32) for seed in range(3))
    B, C = (_normal(_BATCH, _STATES, 9, seed=seed).to(device, torch.float32) for seed in (3, 4))
    A, weight = (_normal(_DIM, n, seed=5).to(device, torch.float32) for n in (_STATES, 4))
    A = -A.abs()
    conv_state, state = x.new_zeros(_BATCH, _DIM, 3), x.new_zeros(_BATCH, _DIM, _STATES)
    rows = []
    for t in range(9):
        token = scan.causal_conv1d_update(x[..., t], conv_state, weight, activation="silu")
        rows.append(
            scan.selective_state_update(
                state, token, dt[..., t], A, B[..., t], C[..., t], z=z[..., t], dt_softplus=True
            )
        )
    whole = _selective_scan(_causal_conv1d(x, weight), dt, A, B, C, z=z)
    return float((torch.stack(rows, -1) - whole).abs().max() / whole.abs().max()), 1e-4


def _check_packed(device: torch.device) -> tuple[float, float]:
    """Sequences end to end give what each gives alone."""
    x, dt = (_normal(1, _DIM, 50, seed=seed).to(device, torch.float32) for seed in range(2))
    B, C = (_normal(1, _STATES, 50, seed=seed).to(device, torch.float32) for seed in (2, 3))
    A = -_normal(_DIM, _STATES, seed=4).to(device, torch.float32).abs()
    ends = [0, 20, 21, 50]
    packed = _selective_scan(x, dt, A, B, C, cu_seqlens=torch.tensor(ends, device=device))
    pieces = [slice(start, end) for start, end in pairwise(ends)]
    alone = [_selective_scan(x[..., at], dt[..., at], A, B[..., at], C[..., at]) for at in pieces]
    whole = torch.cat(alone, -1)
    return float((packed - whole).abs().max() / whole.abs().max()), 1e-4


def _layer_step(make: Callable[[], Mamba | Mamba2]) -> Probe:
    """Token by token, a layer gives what it gives for all tokens at once."""

    def check(device: torch.device) -> tuple[float, float]:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            layer = make().to(device)
            x = _normal(_BATCH, 9, _DIM, seed=1).to(device, torch.float32)
            states = layer.allocate_inference_cache(_BATCH, 9)
            tokens = torch.cat([layer.step(x[:, t : t + 1], *states)[0] for t in range(9)], 1)
            whole = layer(x)
        return float((tokens - whole).abs().max() / whole.abs().max()), 1e-4

    return check


def _on_cpu(probe: Probe) -> Probe:
    """For what has no other kernel."""
    return lambda device: probe(torch.device("cpu"))


_TOKENS = (_BATCH, _DIM, _LENGTH)
_SEQUENCE = (_BATCH, _LENGTH, _HEADS)
_SELECTIVE = {
    "u": _normal(*_TOKENS, seed=1),
    "delta": _normal(*_TOKENS, seed=2),
    "A": -_normal(_DIM, _STATES, seed=3).abs(),
    "B": _normal(_BATCH, _STATES, _LENGTH, seed=4),
    "C": _normal(_BATCH, _STATES, _LENGTH, seed=5),
    "D": _normal(_DIM, seed=6),
    "z": _normal(*_TOKENS, seed=7),
}
_SSD = {
    "x": _normal(*_SEQUENCE, 8, seed=1),
    "dt": _normal(*_SEQUENCE, seed=2).sigmoid(),
    "A": -_normal(_HEADS, seed=3).abs(),
    "B": _normal(_BATCH, _LENGTH, 1, 16, seed=4),
    "C": _normal(_BATCH, _LENGTH, 1, 16, seed=5),
}
_BLOCK = {
    "zxbcdt": _normal(_BATCH, _LENGTH, 2 * _DIM + 2 * _STATES + _HEADS, seed=1),
    "conv1d_weight": _normal(_DIM + 2 * _STATES, 4, seed=2),
    "conv1d_bias": _normal(_DIM + 2 * _STATES, seed=3),
    "dt_bias": _normal(_HEADS, seed=4),
    "A": -_normal(_HEADS, seed=5).abs(),
    "D": _normal(_HEADS, seed=6),
    "rmsnorm_weight": _normal(_DIM, seed=7),
    "outproj_weight": _normal(50, _DIM, seed=8),
}
_LINEAR = {"a": _normal(_BATCH, _LENGTH, _DIM, seed=1).sigmoid(), "b": _normal(_BATCH, _LENGTH, _DIM, seed=2)}
_NORM = {
    "x": _normal(_BATCH, _LENGTH, _DIM, seed=1),
    "weight": _normal(_DIM, seed=2),
    "z": _normal(_BATCH, _LENGTH, _DIM, seed=3),
}
_CONV = {"x": _normal(*_TOKENS, seed=1), "weight": _normal(_DIM, 4, seed=2), "bias": _normal(_DIM, seed=3)}
_DENSE = {
    "x": _normal(_BATCH, _LENGTH, _DIM, seed=1),
    "weight": _normal(50, _DIM, seed=2),
    "bias": _normal(50, seed=3),
}
PROBES: dict[str, Probe] = {
    "linear_scan": _compared(scan.linear_scan, _plain_linear_scan, _LINEAR),
    "selective_scan": _compared(_selective_scan, _plain_selective_scan, _SELECTIVE),
    "selective_scan, bfloat16": _compared(_selective_scan, _plain_selective_scan, _SELECTIVE, torch.bfloat16),
    "selective_scan, packed": _check_packed,
    "ssd_chunk_scan": _compared(_ssd_chunk_scan, _plain_ssd, _SSD),
    "ssd_chunk_scan, bfloat16": _compared(_ssd_chunk_scan, _plain_ssd, _SSD, torch.bfloat16),
    "mamba_split_conv1d_scan_combined": _compared(_mamba2_block, _plain_block, _BLOCK),
    "causal_conv1d": _compared(_causal_conv1d, _plain_conv, _CONV),
    "gated_rms_norm": _compared(_gated_rms_norm, _plain_gated_norm, _NORM),
    "dense product": _on_cpu(_compared(dense.multiply, F.linear, _DENSE)),
    "decode steps": _check_decoding,
    "Mamba, step by step": _layer_step(lambda: Mamba(_DIM, d_state=_STATES)),
    "Mamba2, step by step": _layer_step(lambda: Mamba2(_DIM, d_state=16, headdim=8)),
}
