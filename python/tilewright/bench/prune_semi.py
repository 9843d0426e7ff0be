"""The semi-structured linear layer beside F.linear of the same dtype: one token, and many."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tilewright.nn import SemiStructuredLinear
from tilewright.prune import mask

from .case import OURS, Call, Case, Contender, Plan, full, of_tokens
from .prune_layers import Size, gradients, random, sizes

_BOTH = (torch.float32, torch.bfloat16)


def cases(plan: Plan) -> list[Case]:
    """2:4 in float32 and bfloat16, of a large language model's size; then both gradients."""
    device = plan.device
    if plan.quick:
        (size,) = sizes(plan, (1024, 2816))
        return [_forward(device, size, 1, dtype) for dtype in _BOTH] + [_backward(device, size, 64, _BOTH[0])]
    tokens, found = (1, 512) if plan.model else (1, 64, 512), []
    for size in sizes(plan, (4096, 11008)):
        found += [_forward(device, size, count, dtype) for count in tokens for dtype in _BOTH]
        found += [_backward(device, size, 512, dtype) for dtype in _BOTH]
    return found


def _layer(device: torch.device, size: Size, dtype: torch.dtype) -> torch.nn.Linear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size.out, size.into, generator=generator) / size.into**0.5
    layer = torch.nn.Linear(size.into, size.out, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight.masked_fill(~mask(weight, "2:4"), 0).to(device, dtype))
    return layer


def _facts(size: Size, tokens: int, dtype: torch.dtype) -> dict[str, object]:
    return {"out": size.out, "in": size.into, "tokens": tokens, "pattern": "2:4", "dtype": full(dtype)}


def _forward(device: torch.device, size: Size, tokens: int, dtype: torch.dtype) -> Case:
    def ours() -> Call:
        layer = SemiStructuredLinear.from_linear(_layer(device, size, dtype), "2:4")
        layer.requires_grad_(False)
        x = random(device, tokens, size.into, dtype)
        return lambda: layer(x)

    def theirs() -> Call:
        weight = _layer(device, size, dtype).weight.detach()
        x = random(device, tokens, size.into, dtype)
        return lambda: F.linear(x, weight)

    ends = tokens * (size.out + size.into) * dtype.itemsize
    contenders = [
        Contender(OURS, ours, size.weights * dtype.itemsize / 2 + size.weights / 8 + ends),
        Contender("torch, F.linear", theirs, size.weights * dtype.itemsize + ends),
    ]
    title = f"2:4 linear {size.out} x {size.into}, {of_tokens(tokens)}, {full(dtype)}"
    name, flops = f"prune-2to4-{tokens}-{full(dtype)}{size.tag}", size.weights * tokens
    return Case(name, title, contenders, flops=flops, sizes=_facts(size, tokens, dtype))


def _backward(device: torch.device, size: Size, tokens: int, dtype: torch.dtype) -> Case:
    """Gradients of x and of the weight; in F.linear's that of the whole weight."""

    def call_of(layer: torch.nn.Module) -> Call:
        return gradients(layer, random(device, tokens, size.into, dtype))

    def ours() -> Call:
        return call_of(SemiStructuredLinear.from_linear(_layer(device, size, dtype), "2:4"))

    def theirs() -> Call:
        return call_of(_layer(device, size, dtype))

    title = f"2:4 linear {size.out} x {size.into}, backward, {of_tokens(tokens)}, {full(dtype)}"
    contenders = [Contender(OURS, ours), Contender("torch, F.linear", theirs)]
    name, flops = f"prune-2to4-backward-{full(dtype)}{size.tag}", 2 * size.weights * tokens
    return Case(name, title, contenders, flops=flops, sizes=_facts(size, tokens, dtype))
