"""Block-sparse linear layers beside the dense layer of the same size and dtype.

Bytes of a call, each once, with e the bytes of an element:

    forward, one token      the kept values, x and y    e (density out in + in + out)
    forward, more tokens    the same, x and y a token
    both gradients          values, x, dz, dx, dvalues

With one token, layers take turns as in a model that decodes, so their weights come from memory; beside them a
sum over as many bytes, which is nothing but reading them.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import torch
from torch import nn

from .case import OURS, Call, Case, Contender, Plan, full, of_tokens, short
from .prune_layers import (
    Size,
    by_onednn,
    decoding,
    forward,
    gradients,
    onednn_forward,
    onednn_gradients,
    random,
    reading,
    sizes,
)


def forward_cases(plan: Plan) -> list[Case]:
    """At one, some and many tokens."""
    dtypes, tokens, blocks, zeros = _variety(plan)
    return [
        _forward(plan.device, size, *each)
        for size in _sizes(plan)
        for each in product(dtypes, tokens, blocks, zeros)
    ]


def gradient_cases(plan: Plan) -> list[Case]:
    """Both gradients, at some and many tokens, of the smallest and of the largest blocks."""
    dtypes, tokens, blocks, zeros = _variety(plan)
    ends = dict.fromkeys((blocks[0], blocks[-1]))
    return [
        _backward(plan.device, size, *each)
        for size in _sizes(plan)
        for each in product(dtypes, tokens[1:], ends, zeros)
    ]


def _sizes(plan: Plan) -> list[Size]:
    return sizes(plan, (1024, 1024) if plan.quick else (4096, 4096))


def _variety(plan: Plan) -> tuple[list[torch.dtype], list[int], list[int], list[float]]:
    """Dtypes, tokens, blocks and shares of zeros: all of them only at one size."""
    tokens, blocks = ([1, 512, 4096], [32, 64, 128]) if plan.on_gpu else ([1, 64, 512], [16, 32, 64])
    if plan.quick or plan.model:
        return plan.dtypes[: 1 if plan.quick else 2], tokens[:2], blocks[1:2], [0.9]
    return plan.dtypes, tokens, blocks, [0.75, 0.9]


@lru_cache(maxsize=2)
def _layers(
    device: torch.device, size: Size, block: int, zeros: float, dtype: torch.dtype
) -> tuple[nn.Linear, nn.Module]:
    from tilewright.nn import BlockSparseLinear

    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(size.out // block, size.into // block, generator=generator)
    count = round((1 - zeros) * kept.numel())
    present = kept >= kept.flatten().topk(count).values[-1]
    layer = BlockSparseLinear(size.into, size.out, present, block, bias=False, device=device, dtype=dtype)
    return layer.to_linear(), layer


def _names(size: Size, block: int, zeros: float, tokens: int, dtype: torch.dtype) -> tuple[str, str]:
    name = f"b{block}-{zeros * 100:.0f}-{tokens}-{short(dtype)}{size.tag}"
    which = f"{size.out} x {size.into}, " if size.tag else ""
    return name, f"{which}blocks {block}, {zeros:.0%} zeros, {of_tokens(tokens)}, {short(dtype)}"


def _facts(size: Size, block: int, zeros: float, tokens: int, dtype: torch.dtype) -> dict[str, object]:
    shape = {"out": size.out, "in": size.into}
    return {**shape, "block": block, "zeros": zeros, "tokens": tokens, "dtype": full(dtype)}


def _forward(
    device: torch.device, size: Size, dtype: torch.dtype, tokens: int, block: int, zeros: float
) -> Case:
    def setup(which: int, weights: int) -> Call:
        layer = _layers(device, size, block, zeros, dtype)[which]
        x = random(device, tokens, size.into, dtype)
        return decoding(layer, x, weights * dtype.itemsize) if tokens == 1 else forward(layer, x)

    def onednn() -> Call:
        dense, _ = _layers(device, size, block, zeros, dtype)
        return onednn_forward(dense, random(device, tokens, size.into, dtype))

    activations = tokens * (size.out + size.into)
    kept = round((1 - zeros) * size.weights)
    dense_bytes = (size.weights + activations) * dtype.itemsize
    contenders = [
        Contender(OURS, lambda: setup(1, kept), (kept + activations) * dtype.itemsize),
        Contender("torch", lambda: setup(0, size.weights), dense_bytes),
        *by_onednn(device, dtype, onednn, dense_bytes),
        *([reading(device, kept * dtype.itemsize)] if tokens == 1 else []),
    ]
    name, title = _names(size, block, zeros, tokens, dtype)
    facts = _facts(size, block, zeros, tokens, dtype)
    calls = 16 if tokens == 1 else 1
    return Case(f"bsr-{name}", f"block-sparse layer, {title}", contenders, 2.0 * tokens * kept, calls, facts)


def _backward(
    device: torch.device, size: Size, dtype: torch.dtype, tokens: int, block: int, zeros: float
) -> Case:
    def setup(which: int) -> Call:
        layer = _layers(device, size, block, zeros, dtype)[which]
        return gradients(layer, random(device, tokens, size.into, dtype))

    def onednn() -> Call:
        dense, _ = _layers(device, size, block, zeros, dtype)
        return onednn_gradients(dense, random(device, tokens, size.into, dtype))

    kept = round((1 - zeros) * size.weights)
    activations = tokens * (2 * size.into + size.out)
    dense_bytes = (2 * size.weights + activations) * dtype.itemsize
    contenders = [
        Contender(OURS, lambda: setup(1), (2 * kept + activations) * dtype.itemsize),
        Contender("torch", lambda: setup(0), dense_bytes),
        *by_onednn(device, dtype, onednn, dense_bytes),
    ]
    name, title = _names(size, block, zeros, tokens, dtype)
    facts = _facts(size, block, zeros, tokens, dtype)
    return Case(
        f"bsr-grad-{name}",
        f"block-sparse layer, gradients, {title}",
        contenders,
        4.0 * tokens * kept,
        sizes=facts,
    )
