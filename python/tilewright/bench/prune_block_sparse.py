"""Block-sparse linear layers beside the dense layer of the same size and dtype.

Bytes of a call, each once, with e the bytes of an element:

    forward, one token      the kept values, x and y    e (density out in + in + out)
    forward, more tokens    the same, x and y a token
    both gradients          values, x, dz, dx, dvalues
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from .case import OURS, Case, Contender

Call = Callable[[], object]
_ZEROS = (0.75, 0.9)


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Forward at one, some and many tokens; then both gradients."""
    size = 1024 if quick else 4096
    dtypes = [torch.float32, torch.bfloat16]
    blocks, tokens = [16, 32, 64], [1, 64, 512]
    if device.type == "cuda":
        dtypes, blocks, tokens = [torch.bfloat16], [32, 64, 128], [1, 512, 4096]
    if quick:
        blocks, tokens = blocks[1:2], tokens[1:2]
    found = [
        _forward(device, size, block, zeros, count, dtype)
        for dtype in dtypes
        for count in tokens
        for block in blocks
        for zeros in _ZEROS
    ]
    found += [
        _backward(device, size, block, zeros, count, dtype)
        for dtype in dtypes
        for count in tokens
        if count > 1
        for block in dict.fromkeys((blocks[0], blocks[-1]))
        for zeros in _ZEROS
    ]
    return found


@lru_cache(maxsize=2)
def _layers(
    device: torch.device, size: int, block: int, zeros: float, dtype: torch.dtype
) -> tuple[nn.Linear, nn.Module]:
    from tilewright.nn import BlockSparseLinear

    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(size // block, size // block, generator=generator)
    count = round((1 - zeros) * kept.numel())
    present = kept >= kept.flatten().topk(count).values[-1]
    layer = BlockSparseLinear(size, size, present, block, bias=False, device=device, dtype=dtype)
    return layer.to_linear(), layer


def _random(device: torch.device, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def _names(block: int, zeros: float, tokens: int, dtype: torch.dtype) -> tuple[str, str]:
    short = {"float32": "fp32", "bfloat16": "bf16"}[str(dtype).removeprefix("torch.")]
    name = f"b{block}-{zeros * 100:.0f}-{tokens}-{short}"
    return name, f"blocks {block}, {zeros:.0%} zeros, {tokens} token{'s' if tokens > 1 else ''}, {short}"


def _sizes(size: int, block: int, zeros: float, tokens: int, dtype: torch.dtype) -> dict[str, object]:
    name = str(dtype).removeprefix("torch.")
    return {"out": size, "in": size, "block": block, "zeros": zeros, "tokens": tokens, "dtype": name}


def _forward(
    device: torch.device, size: int, block: int, zeros: float, tokens: int, dtype: torch.dtype
) -> Case:
    def setup(which: int) -> Call:
        layer = _layers(device, size, block, zeros, dtype)[which]
        x = _random(device, tokens, size, dtype)

        def run() -> object:
            with torch.no_grad():
                return layer(x)

        return run

    activations = 2 * tokens * size
    kept = round((1 - zeros) * size * size)
    contenders = [
        Contender(OURS, lambda: setup(1), (kept + activations) * dtype.itemsize),
        Contender("torch", lambda: setup(0), (size * size + activations) * dtype.itemsize),
    ]
    name, title = _names(block, zeros, tokens, dtype)
    sizes = _sizes(size, block, zeros, tokens, dtype)
    flops = 2.0 * tokens * kept
    calls = 4 if tokens == 1 else 1
    return Case(f"bsr-{name}", f"block-sparse layer, {title}", contenders, flops, calls, sizes)


def _backward(
    device: torch.device, size: int, block: int, zeros: float, tokens: int, dtype: torch.dtype
) -> Case:
    def setup(which: int) -> Call:
        layer = _layers(device, size, block, zeros, dtype)[which]
        x = _random(device, tokens, size, dtype).requires_grad_()
        dy = _random(device, tokens, size, dtype)
        y = layer(x)
        inputs = [x, *layer.parameters()]
        return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)

    kept = round((1 - zeros) * size * size)
    activations = 3 * tokens * size
    contenders = [
        Contender(OURS, lambda: setup(1), (2 * kept + activations) * dtype.itemsize),
        Contender("torch", lambda: setup(0), (2 * size * size + activations) * dtype.itemsize),
    ]
    name, title = _names(block, zeros, tokens, dtype)
    sizes = _sizes(size, block, zeros, tokens, dtype)
    return Case(f"bsr-grad-{name}", f"its gradients, {title}", contenders, 4.0 * tokens * kept, sizes=sizes)
