"""The attention family's cases: kernels beside SDPA and FlexAttention, sparse beside full, masks, estimators.

FLOPs, counted for the pairs of query and key that are seen: forward 4 head_dim, backward 10 head_dim (five
products). Bytes are not the matter: K and V are read from caches by every block of queries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright.attention import (
    BlockMask,
    block_sparse_attention,
    estimate,
    permuted_block_sparse_attention,
)

from . import attention_masks
from .case import OURS, Case, Contender

PEERS = ("torch",)
_WINDOW = 512
_DENSITIES = (50, 25, 10)
_FORWARD_FLOPS, _BACKWARD_FLOPS = 4, 10  # a pair and an element of the head

Call = Callable[[], object]


def cases(device: torch.device, quick: bool) -> list[Case]:
    """All cases of the family for a device; `quick` shrinks the work."""
    on_gpu = device.type == "cuda"
    shape = (1, 32, 32768, 128) if on_gpu else (1, 8, 1024 if quick else 4096, 64)
    dtypes = [torch.bfloat16] if on_gpu else [torch.float32, torch.bfloat16]
    narrow = dtypes[0]
    found = [_window(device, dtype, shape) for dtype in dtypes]
    found += [_full(device, dtype, shape, grad=False) for dtype in dtypes]
    found += [_full(device, dtype, shape, grad=True) for dtype in dtypes]
    for grad in (False, True):
        for block in (64, 128):
            found += [_sparse(device, narrow, shape, density, block, grad) for density in _DENSITIES]
    found += [_permuted(device, narrow, (*shape[:2], shape[2] * (1 if on_gpu else 2), shape[3]))]
    found += _estimators(device, narrow, shape)
    return [*found, *attention_masks.cases(device, quick)]


class _Inputs:
    """q, k, v and the gradient of out, made when a contender first asks for them."""

    def __init__(self, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
        self.device, self.dtype, self.shape = device, dtype, shape
        self._made: list[Tensor] = []

    def tensors(self, grad: bool = False) -> list[Tensor]:
        if not self._made:
            generator = torch.Generator(self.device).manual_seed(0)
            for _ in range(4):
                made = torch.randn(self.shape, generator=generator, device=self.device)
                self._made.append(made.to(self.dtype))
        q, k, v, dout = self._made
        return [t.detach().requires_grad_(grad) for t in (q, k, v)] + [dout]

    def pairs(self, share: float = 1.0) -> float:
        return self.shape[0] * self.shape[1] * self.shape[2] ** 2 * share

    def flops(self, share: float, grad: bool) -> float:
        return self.pairs(share) * self.shape[3] * (_BACKWARD_FLOPS if grad else _FORWARD_FLOPS)

    def sizes(self, **more: object) -> dict[str, object]:
        return {"shape": "x".join(map(str, self.shape)), "dtype": _name(self.dtype), **more}

    def title(self) -> str:
        return f"{'x'.join(map(str, self.shape))}, {_name(self.dtype)}"


def _call(inputs: _Inputs, grad: bool, attend: Callable[[Tensor, Tensor, Tensor], Any]) -> Call:
    """One forward, or one backward of a graph that is kept."""
    q, k, v, dout = inputs.tensors(grad)
    if not grad:
        return lambda: attend(q, k, v)
    out = attend(q, k, v)
    return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)


def _ours(inputs: _Inputs, mask: Callable[[], BlockMask], grad: bool = False) -> Call:
    made = mask()
    return _call(inputs, grad, lambda q, k, v: block_sparse_attention(q, k, v, made))


def _all(inputs: _Inputs, block: int = 128) -> BlockMask:
    length = inputs.shape[2]
    blocks = torch.ones(-(-length // block), -(-length // block), dtype=torch.bool, device=inputs.device)
    return BlockMask.from_dense(blocks, block, length, length)


def _window(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> Case:
    inputs, length = _Inputs(device, dtype, shape), shape[2]

    def ours() -> Call:
        return _ours(inputs, lambda: BlockMask.sliding_window(length, _WINDOW, device=device))

    def flex() -> Call:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (i - j < _WINDOW)

        mask = create_block_mask(sees, None, None, length, length, device=str(device))
        compiled: Any = torch.compile(flex_attention)
        return _call(inputs, False, lambda q, k, v: compiled(q, k, v, block_mask=mask))

    def dense() -> Call:
        i = torch.arange(length, device=device)
        distance = i[:, None] - i
        mask = (distance >= 0) & (distance < _WINDOW)
        return _call(inputs, False, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask))

    contenders = [
        Contender(OURS, ours),
        Contender("torch, FlexAttention compiled", flex),
        Contender("torch, SDPA with a mask", dense),
    ]
    seen = min(_WINDOW, length)
    share = (seen * length - seen * (seen - 1) / 2) / length**2
    return Case(
        f"window-{_short(dtype)}",
        f"causal window of {_WINDOW}, {inputs.title()}",
        contenders,
        inputs.flops(share, False),
        sizes=inputs.sizes(window=_WINDOW),
    )


def _full(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int], grad: bool) -> Case:
    inputs = _Inputs(device, dtype, shape)
    contenders = [
        Contender(OURS, lambda: _ours(inputs, lambda: _all(inputs), grad)),
        Contender("torch, SDPA", lambda: _call(inputs, grad, F.scaled_dot_product_attention)),
    ]
    kind, words = ("-backward", "backward") if grad else ("", "forward")
    title = f"all blocks, {words}, {inputs.title()}"
    flops = inputs.flops(1.0, grad)
    return Case(f"full-{_short(dtype)}{kind}", title, contenders, flops, sizes=inputs.sizes())


def _random_blocks(inputs: _Inputs, density: int, block: int) -> BlockMask:
    """As many blocks in every row, others for every head."""
    blocks = -(-inputs.shape[2] // block)
    generator = torch.Generator().manual_seed(0)
    ranks = torch.rand(1, inputs.shape[1], blocks, blocks, generator=generator).argsort(-1)
    kept = ranks < max(1, round(blocks * density / 100))
    return BlockMask.from_dense(kept.to(inputs.device), block, inputs.shape[2], inputs.shape[2])


def _sparse(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    density: int,
    block: int,
    grad: bool,
) -> Case:
    inputs = _Inputs(device, dtype, shape)
    contenders = [
        Contender(OURS, lambda: _ours(inputs, lambda: _random_blocks(inputs, density, block), grad)),
        Contender(f"{OURS}, all blocks", lambda: _ours(inputs, lambda: _all(inputs, block), grad)),
    ]
    words = "backward" if grad else "forward"
    blocks = -(-shape[2] // block)
    share = max(1, round(blocks * density / 100)) / blocks
    return Case(
        f"density-{density}-block-{block}" + ("-backward" if grad else ""),
        f"{density}% of the blocks of {block}, {words}, {inputs.title()}",
        contenders,
        inputs.flops(share, grad),
        sizes=inputs.sizes(density=round(share, 4), block=block),
    )


def planted(inputs: _Inputs) -> list[Tensor]:
    """q, k, v in which one key of 16, anywhere, draws nearly all attention beside a query's neighbours."""
    q, k, v, _ = inputs.tensors()
    generator = torch.Generator(inputs.device).manual_seed(1)
    batch, heads, length, dim = inputs.shape
    direction = torch.randn(1, heads, 1, dim, generator=generator, device=inputs.device)
    direction = direction / direction.norm(dim=-1, keepdim=True)
    heavy = torch.rand(batch, heads, length, 1, generator=generator, device=inputs.device) < 1 / 16
    lift = dim**0.25 * 2.75
    return [(q + lift * direction).to(q), torch.where(heavy, k + lift * direction, k).to(k), v]


def _permuted(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> Case:
    inputs = _Inputs(device, dtype, shape)

    def ours() -> Call:
        q, k, v = planted(inputs)
        return lambda: permuted_block_sparse_attention(q, k, v, block_size=64, segment_size=512)

    def dense() -> Call:
        q, k, v = planted(inputs)
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)

    contenders = [Contender(OURS, ours), Contender("torch, SDPA causal", dense)]
    title = f"permuted_block_sparse_attention, planted keys, {inputs.title()}"
    return Case("permuted", title, contenders, inputs.flops(0.5, False), sizes=inputs.sizes())


def _estimators(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> list[Case]:
    inputs = _Inputs(device, dtype, shape)

    def timed(estimator: Callable[..., BlockMask]) -> Case:
        def ours() -> Call:
            q, k, _ = planted(inputs)
            return lambda: estimator(q, k)

        def dense() -> Call:
            q, k, v = planted(inputs)
            return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)

        name = estimator.__name__
        contenders = [Contender(OURS, ours), Contender("torch, SDPA causal", dense)]
        title = f"estimate.{name}, beside the attention it saves, {inputs.title()}"
        return Case(f"estimate-{name.replace('_', '-')}", title, contenders, sizes=inputs.sizes())

    return [
        timed(estimator)
        for estimator in (
            estimate.mean_pool_top_p,
            estimate.max_pool_top_k,
            estimate.antidiagonal,
            estimate.top_k,
        )
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
