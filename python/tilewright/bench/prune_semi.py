"""The semi-structured linear layer beside F.linear of the same dtype: one token, and many."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright.nn import SemiStructuredLinear
from tilewright.prune import mask

from .case import OURS, Case, Contender

Call = Callable[[], object]


def cases(device: torch.device, quick: bool) -> list[Case]:
    """2:4 in float32 and bfloat16, of a large language model's size."""
    size = (1024, 2816) if quick else (4096, 11008)
    dtypes = (torch.float32, torch.bfloat16)
    forward = [_forward(device, *size, tokens, dtype) for tokens in (1, 64, 512) for dtype in dtypes]
    return [*forward, *(_backward(device, *size, 512, dtype) for dtype in dtypes)]


def _layer(device: torch.device, out: int, into: int, dtype: torch.dtype) -> torch.nn.Linear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, into, generator=generator) / into**0.5
    layer = torch.nn.Linear(into, out, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight.masked_fill(~mask(weight, "2:4"), 0).to(device, dtype))
    return layer


def _x(device: torch.device, tokens: int, into: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens, into, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def _forward(device: torch.device, out: int, into: int, tokens: int, dtype: torch.dtype) -> Case:
    def ours() -> Call:
        layer = SemiStructuredLinear.from_linear(_layer(device, out, into, dtype), "2:4")
        layer.requires_grad_(False)
        x = _x(device, tokens, into, dtype)
        return lambda: layer(x)

    def theirs() -> Call:
        weight = _layer(device, out, into, dtype).weight.detach()
        x = _x(device, tokens, into, dtype)
        return lambda: F.linear(x, weight)

    ends = tokens * (out + into) * dtype.itemsize
    contenders = [
        Contender(OURS, ours, out * into * dtype.itemsize / 2 + out * into / 8 + ends),
        Contender("torch, F.linear", theirs, out * into * dtype.itemsize + ends),
    ]
    name = str(dtype).removeprefix("torch.")
    sizes: dict[str, object] = {"out": out, "in": into, "tokens": tokens, "pattern": "2:4", "dtype": name}
    title = f"2:4 linear {out} x {into}, {tokens} token{'s' * (tokens > 1)}, {name}"
    return Case(f"prune-2to4-{tokens}-{name}", title, contenders, flops=out * into * tokens, sizes=sizes)


def _backward(device: torch.device, out: int, into: int, tokens: int, dtype: torch.dtype) -> Case:
    """Gradients of x and of the weight; in F.linear's that of the whole weight."""

    def call_of(layer: torch.nn.Module) -> Call:
        x = _x(device, tokens, into, dtype).requires_grad_()
        y = layer(x)
        inputs, dy = [x, *layer.parameters()], _x(device, tokens, out, dtype)
        return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)

    def ours() -> Call:
        return call_of(SemiStructuredLinear.from_linear(_layer(device, out, into, dtype), "2:4"))

    def theirs() -> Call:
        return call_of(_layer(device, out, into, dtype))

    name = str(dtype).removeprefix("torch.")
    sizes: dict[str, object] = {"out": out, "in": into, "tokens": tokens, "pattern": "2:4", "dtype": name}
    title = f"2:4 linear {out} x {into}, backward, {tokens} tokens, {name}"
    contenders = [Contender(OURS, ours), Contender("torch, F.linear", theirs)]
    return Case(f"prune-2to4-backward-{name}", title, contenders, flops=2 * out * into * tokens, sizes=sizes)
