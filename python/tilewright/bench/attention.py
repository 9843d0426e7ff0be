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
from .case import OURS, Call, Case, Contender, Plan, full, grouped, peer, short

PEERS = ("torch", "flash-attn")
GPU_PEERS = ("flash-attn",)
_WINDOW = 512
_DENSITIES = (50, 25, 10)
_LONGEST = {"cpu": 2048, "cuda": 32768}  # of a model's sequence, so that a call takes a second at most
_FORWARD_FLOPS, _BACKWARD_FLOPS = 4, 10  # a pair and an element of the head


def cases(plan: Plan) -> list[Case]:
    """All cases of the family; none for a model without attention."""
    if plan.model:
        return _of_model(plan)
    shape = (1, 32, 32768, 128) if plan.on_gpu else (1, 8, 1024 if plan.quick else 4096, 64)
    wide = _Inputs(plan.device, plan.wide, shape)
    if plan.quick:
        return [
            *grouped("dense and windowed", [_window(wide, _WINDOW, compiled=False), _full(wide)]),
            *grouped("sparse", [_sparse(wide, 25, 64, grad) for grad in (False, True)]),
            *grouped("estimators", [_estimator(wide, estimate.antidiagonal)]),
            *grouped("masks", attention_masks.cases(plan)),
        ]
    every = [_Inputs(plan.device, dtype, shape) for dtype in plan.dtypes]
    dense = [_window(inputs, _WINDOW) for inputs in every]
    dense += [_full(inputs, grad=grad) for grad in (False, True) for inputs in every]
    longer = _Inputs(plan.device, plan.wide, (*shape[:2], shape[2] * (1 if plan.on_gpu else 2), shape[3]))
    return [
        *grouped("dense and windowed", dense),
        *grouped("sparse", [*_sparse_cases(wide, (64, 128)), _permuted(longer)]),
        *grouped("estimators", _estimators(wide)),
        *grouped("masks", attention_masks.cases(plan)),
    ]


def _of_model(plan: Plan) -> list[Case]:
    """A layer's attention over as long a sequence as the model knows and the device bears."""
    facts = plan.model.attention if plan.model else None
    if facts is None:
        return []
    length = min(facts.length, _LONGEST[plan.device.type])
    shape = (1, facts.heads, length, facts.head_dim)
    every = [_Inputs(plan.device, dtype, shape, facts.kv_heads) for dtype in plan.dtypes]
    dense = [_full(inputs, grad, facts.causal) for grad in (False, True) for inputs in every]
    window = facts.window if 0 < facts.window < length else _WINDOW
    if facts.causal and window < length:
        dense += [_window(inputs, window) for inputs in every]
    sparse, estimators = _sparse_cases(every[0], (64,)), []
    if facts.causal:
        sparse, estimators = [*sparse, _permuted(every[0])], _estimators(every[0])
    return [
        *grouped("dense and windowed", dense),
        *grouped("sparse", sparse),
        *grouped("estimators", estimators),
    ]


class _Inputs:
    """q, k, v and the gradient of out, made when a contender first asks for them.

    `shape` is q's (batch, heads, length, head_dim); k and v have `kv_heads` heads, q's if not given.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int], kv_heads: int = 0
    ) -> None:
        self.device, self.dtype, self.shape = device, dtype, shape
        self.kv_heads = kv_heads or shape[1]
        self._made: list[Tensor] = []

    def tensors(self, grad: bool = False) -> list[Tensor]:
        if not self._made:
            generator = torch.Generator(self.device).manual_seed(0)
            for heads in (self.shape[1], self.kv_heads, self.kv_heads, self.shape[1]):
                shape = (self.shape[0], heads, *self.shape[2:])
                made = torch.randn(shape, generator=generator, device=self.device)
                self._made.append(made.to(self.dtype))
        q, k, v, dout = self._made
        return [t.detach().requires_grad_(grad) for t in (q, k, v)] + [dout]

    def pairs(self, share: float = 1.0) -> float:
        return self.shape[0] * self.shape[1] * self.shape[2] ** 2 * share

    def flops(self, share: float, grad: bool) -> float:
        return self.pairs(share) * self.shape[3] * (_BACKWARD_FLOPS if grad else _FORWARD_FLOPS)

    def sizes(self, **more: object) -> dict[str, object]:
        grouped_heads = {"kv heads": self.kv_heads} if self.kv_heads != self.shape[1] else {}
        return {"shape": "x".join(map(str, self.shape)), **grouped_heads, "dtype": full(self.dtype), **more}

    def title(self) -> str:
        few = f", {self.kv_heads} kv heads" if self.kv_heads != self.shape[1] else ""
        return f"{'x'.join(map(str, self.shape))}{few}, {full(self.dtype)}"


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """torch's SDPA, whose math wants to be told of shared key heads."""
    few = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, **few)


def _flash(causal: bool, window: int = 0) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """flash-attn's: (batch, length, heads, head_dim), and a window that counts the keys left of a query's."""
    attend = peer("flash_attn", "flash_attn_func")
    left = {"window_size": (window - 1, 0)} if window else {}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attend(*(t.transpose(1, 2) for t in (q, k, v)), causal=causal, **left)
        return out.transpose(1, 2)

    return call


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


def _window(inputs: _Inputs, window: int, compiled: bool = True) -> Case:
    """`compiled` also times FlexAttention, which takes many seconds to compile."""
    length, device = inputs.shape[2], inputs.device

    def ours() -> Call:
        return _ours(inputs, lambda: BlockMask.sliding_window(length, window, device=device))

    def flex() -> Call:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (i - j < window)

        mask = create_block_mask(sees, None, None, length, length, device=str(device))
        attend: Any = torch.compile(flex_attention)
        shared = inputs.kv_heads != inputs.shape[1]
        return _call(inputs, False, lambda q, k, v: attend(q, k, v, block_mask=mask, enable_gqa=shared))

    def dense() -> Call:
        i = torch.arange(length, device=device)
        distance = i[:, None] - i
        mask = (distance >= 0) & (distance < window)
        return _call(inputs, False, lambda q, k, v: _dense(q, k, v, mask))

    contenders = [
        Contender(OURS, ours),
        *([Contender("torch, FlexAttention compiled", flex)] if compiled else []),
        Contender("torch, SDPA with a mask", dense),
        Contender("flash-attn", lambda: _call(inputs, False, _flash(True, window))),
    ]
    seen = min(window, length)
    share = (seen * length - seen * (seen - 1) / 2) / length**2
    return Case(
        f"window-{short(inputs.dtype)}",
        f"causal window of {window}, {inputs.title()}",
        contenders,
        inputs.flops(share, False),
        sizes=inputs.sizes(window=window),
    )


def _full(inputs: _Inputs, grad: bool = False, causal: bool = False) -> Case:
    def ours() -> Call:
        length = inputs.shape[2]
        if causal:
            return _ours(inputs, lambda: BlockMask.causal(length, device=inputs.device), grad)
        return _ours(inputs, lambda: _all(inputs), grad)

    contenders = [
        Contender(OURS, ours),
        Contender("torch, SDPA", lambda: _call(inputs, grad, lambda q, k, v: _dense(q, k, v, causal=causal))),
        Contender("flash-attn", lambda: _call(inputs, grad, _flash(causal))),
    ]
    kind, words = ("-backward", "backward") if grad else ("", "forward")
    what, share = ("causal", (1 + 1 / inputs.shape[2]) / 2) if causal else ("all blocks", 1.0)
    return Case(
        f"{'causal' if causal else 'full'}-{short(inputs.dtype)}{kind}",
        f"{what}, {words}, {inputs.title()}",
        contenders,
        inputs.flops(share, grad),
        sizes=inputs.sizes(),
    )


def _random_blocks(inputs: _Inputs, density: int, block: int) -> BlockMask:
    """As many blocks in every row, others for every head."""
    blocks = -(-inputs.shape[2] // block)
    generator = torch.Generator().manual_seed(0)
    ranks = torch.rand(1, inputs.shape[1], blocks, blocks, generator=generator).argsort(-1)
    kept = ranks < max(1, round(blocks * density / 100))
    return BlockMask.from_dense(kept.to(inputs.device), block, inputs.shape[2], inputs.shape[2])


def _sparse_cases(inputs: _Inputs, blocks: tuple[int, ...]) -> list[Case]:
    return [
        _sparse(inputs, density, block, grad)
        for grad in (False, True)
        for block in blocks
        for density in _DENSITIES
    ]


def _sparse(inputs: _Inputs, density: int, block: int, grad: bool) -> Case:
    contenders = [
        Contender(OURS, lambda: _ours(inputs, lambda: _random_blocks(inputs, density, block), grad)),
        Contender(f"{OURS}, all blocks", lambda: _ours(inputs, lambda: _all(inputs, block), grad)),
    ]
    words = "backward" if grad else "forward"
    blocks = -(-inputs.shape[2] // block)
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
    (batch, heads, length, dim), kv_heads = inputs.shape, inputs.kv_heads
    direction = torch.randn(1, kv_heads, 1, dim, generator=generator, device=inputs.device)
    direction = direction / direction.norm(dim=-1, keepdim=True)
    heavy = torch.rand(batch, kv_heads, length, 1, generator=generator, device=inputs.device) < 1 / 16
    lift = dim**0.25 * 2.75
    queries = q + lift * direction.repeat_interleave(heads // kv_heads, 1)
    return [queries.to(q), torch.where(heavy, k + lift * direction, k).to(k), v]


def _dense_of_planted(inputs: _Inputs, yardstick: bool) -> Contender:
    def dense() -> Call:
        q, k, v = planted(inputs)
        return lambda: _dense(q, k, v, causal=True)

    return Contender("torch, SDPA causal", dense, yardstick=yardstick)


def _permuted(inputs: _Inputs) -> Case:
    def ours() -> Call:
        q, k, v = planted(inputs)
        return lambda: permuted_block_sparse_attention(q, k, v, block_size=64, segment_size=512)

    contenders = [Contender(OURS, ours), _dense_of_planted(inputs, yardstick=False)]
    title = f"permuted_block_sparse_attention, planted keys, {inputs.title()}"
    return Case("permuted", title, contenders, inputs.flops(0.5, False), sizes=inputs.sizes())


def _estimator(inputs: _Inputs, estimator: Callable[..., BlockMask]) -> Case:
    def ours() -> Call:
        q, k, _ = planted(inputs)
        return lambda: estimator(q, k)

    name = estimator.__name__
    title = f"estimate.{name}, beside the attention it saves, {inputs.title()}"
    contenders = [Contender(OURS, ours), _dense_of_planted(inputs, yardstick=True)]
    return Case(f"estimate-{name.replace('_', '-')}", title, contenders, sizes=inputs.sizes())


def _estimators(inputs: _Inputs) -> list[Case]:
    found = (estimate.mean_pool_top_p, estimate.max_pool_top_k, estimate.antidiagonal, estimate.top_k)
    return [_estimator(inputs, estimator) for estimator in found]
