"""What the optimizers and the quantizer compute, from their formulas, in the dtype of the tensors given.

In float64 it is the truth; in float32 it is what plain PyTorch would make of the same formulas.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass
class Options:
    kind: str = "adamw"  # adam, adamw, lion or sgd
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.9
    dampening: float = 0.0
    nesterov: bool = False
    maximize: bool = False


def update(o: Options, t: int, p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step, the t-th (from 1), of one tensor: the new (p, m, v). Lion and SGD leave v alone."""
    if o.maximize:
        g = -g
    if o.kind in ("adam", "sgd"):
        g = g + o.weight_decay * p
    else:
        p = p * (1 - o.lr * o.weight_decay)
    b1, b2 = o.betas
    if o.kind in ("adam", "adamw"):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        return p - o.lr / (1 - b1**t) * m / (v.sqrt() / (1 - b2**t) ** 0.5 + o.eps), m, v
    if o.kind == "lion":
        direction = torch.sign(b1 * m + (1 - b1) * g)
        return p - o.lr * direction, b2 * m + (1 - b2) * g, v
    m = g if t == 1 else o.momentum * m + (1 - o.dampening) * g
    return p - o.lr * (g + o.momentum * m if o.nesterov else m), m, v


def clip_coefficient(grads: list[Tensor], max_norm: float) -> float:
    norm = sum(float(g.double().square().sum()) for g in grads) ** 0.5
    return min(1.0, max_norm / (norm + 1e-6))


def dynamic_map(signed: bool) -> Tensor:
    """The dynamic map in float64, by its definition."""
    values = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade if signed else 2 ** (decade + 1)
        for i in range(count):
            middle = 0.1 + 0.9 * (i + 0.5) / count
            values.append(middle * 10.0 ** (decade - 6))
            if signed:
                values.append(-values[-1])
    return torch.tensor(sorted(values), dtype=torch.float64)


def block_absmax(x: Tensor, blocksize: int) -> Tensor:
    """The largest magnitude in each block of a flattened tensor; NaN, or else inf, wins."""
    flat = x.flatten().double()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % blocksize)).view(-1, blocksize)
    return padded.abs().amax(dim=1) if flat.numel() else flat.new_empty(0)


def expand(absmax: Tensor, numel: int, blocksize: int) -> Tensor:
    return absmax.repeat_interleave(blocksize)[:numel]


def nearest_codes(x: Tensor, code: Tensor) -> Tensor:
    """For each of x, float64 in [-1, 1], the nearest of 256 ascending values; ties go toward zero."""
    code = code.double()
    upper = torch.searchsorted(code, x).clamp(1, 255)
    lower = upper - 1
    to_upper, to_lower = (code[upper] - x).abs(), (x - code[lower]).abs()
    tie_up = (to_upper == to_lower) & (code[upper].abs() < code[lower].abs())
    return torch.where((to_upper < to_lower) | tie_up, upper, lower).to(torch.uint8)


def quantize(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Codes and absmax of a finite tensor."""
    absmax = block_absmax(x, blocksize)
    scale = expand(absmax, x.numel(), blocksize)
    scaled = torch.where(scale > 0, x.flatten().double() / scale, torch.zeros_like(scale))
    return nearest_codes(scaled, code).view(x.shape), absmax


def dequantize(codes: Tensor, code: Tensor, absmax: Tensor, blocksize: int) -> Tensor:
    values = code.double()[codes.flatten().long()] * expand(absmax.double(), codes.numel(), blocksize)
    return values.view(codes.shape)


def keep_positive(codes: Tensor, x: Tensor) -> Tensor:
    """Codes of the unsigned map in which a positive value has at least code 1."""
    return torch.where((x.flatten() > 0) & (codes.flatten() == 0), 1, codes.flatten()).view_as(codes)
