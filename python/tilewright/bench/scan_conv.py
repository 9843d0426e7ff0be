"""Cases of the causal convolution and of the decode steps: beside the same work in plain PyTorch.

Bytes of a call, each once, with e the bytes of an element of x and out:

    causal_conv1d, forward   x, out                                            2 e an element
    ... and backward         x, out, then x, dout, dx                          5 e an element
    causal_conv1d_update     the state twice, x, out; weight and bias          (2 width + 2) e a channel; 5 e
    selective_state_update   the state twice; x, dt, z, out a channel; B, C    8 bytes a state; 16; and those
    mamba_step               the weights of the layer                          e a weight
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import OURS, Call, Case, Contender, Plan, full, peer

_WIDTH = 4
_SILU_FLOPS = 4  # negation, exponential, addition, division


def convolutions(plan: Plan) -> list[Case]:
    """Both layouts, forward and with the gradient, at the size of a model's or a small Mamba's block."""
    channels = 1536
    if plan.model:
        if plan.model.scan is None:
            return []
        both = 2 * plan.model.scan.states if plan.model.family == "mamba2" else 0  # B and C go through it too
        channels = plan.model.scan.inner + both
    shape = (8 if plan.on_gpu else 1, channels, 512 if plan.quick else 2048)
    layouts = (True,) if plan.quick else (False, True)
    return [_conv(plan.device, plan.wide, shape, last, grad) for grad in (False, True) for last in layouts]


def updates(plan: Plan) -> list[Case]:
    """One token of a Mamba-1 and of a Mamba-2 model, a state so small that only the call is left, a layer."""
    device, batch = plan.device, 64 if plan.on_gpu else 1
    if plan.model:
        scan = plan.model.scan
        if scan is None:
            return []
        if plan.model.family == "mamba2":
            channels = scan.inner + 2 * scan.states
            update = _state_update(device, batch, scan.heads, scan.head_dim, scan.states)
            return [_conv_update(device, batch, channels), update]
        update = _state_update(device, batch, None, scan.inner, scan.states)
        return [_conv_update(device, batch, scan.inner), update, _layer_step(device, 1, plan.model.hidden)]
    both = [_state_update(device, batch, None, 5120, 16), _state_update(device, batch, 80, 64, 128)]
    if plan.quick:
        return both
    call = _state_update(device, 1, None, 8, 16)
    return [_conv_update(device, batch, 5120), *both, call, _layer_step(device, 1, 768)]


def _random(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)


def _conv(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], channel_last: bool, grad: bool
) -> Case:
    batch, dim, length = shape
    numel = batch * dim * length

    def tensors() -> tuple[Tensor, Tensor, Tensor]:
        x = _random(device, batch, length, dim, dtype=dtype).transpose(1, 2)
        x = x if channel_last else x.contiguous()
        weight, bias = _random(device, dim, _WIDTH, dtype=dtype), _random(device, dim, dtype=dtype)
        return x.requires_grad_(grad), weight.requires_grad_(grad), bias.requires_grad_(grad)

    def step(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Call:
        x, weight, bias = tensors()
        if not grad:
            return lambda: function(x, weight, bias)
        dout = torch.empty_like(x.detach()).fill_(0.1)
        return lambda: torch.autograd.grad(function(x, weight, bias), (x, weight, bias), dout)

    def ours() -> Call:
        from tilewright.scan import causal_conv1d

        def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
            return causal_conv1d(x, weight, bias, activation="silu")

        return step(convolve)

    def theirs() -> Call:
        convolve = peer("causal_conv1d", "causal_conv1d_fn")
        return step(lambda x, w, b: convolve(x, w, b, activation="silu"))

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        padded = F.conv1d(x, weight[:, None], bias, padding=_WIDTH - 1, groups=dim)
        return F.silu(padded[..., :length])

    moved = numel * dtype.itemsize * (5 if grad else 2)
    contenders = [
        Contender(OURS, ours, moved),
        Contender("torch", lambda: step(plain), moved),
        Contender("causal-conv1d", theirs, moved),
    ]
    layout, words = ("columns", "channel-last") if channel_last else ("rows", "channel-first")
    name = f"causal-conv1d-{layout}" + ("-grad" if grad else "")
    title = f"causal_conv1d, {words}" + (", with gradient" if grad else "")
    flops = numel * (2 * _WIDTH + _SILU_FLOPS) * (3 if grad else 1)
    sizes = {"batch": batch, "dim": dim, "length": length, "width": _WIDTH, "dtype": full(dtype)}
    return Case(name, title, contenders, flops, sizes=sizes)


def _conv_update(device: torch.device, batch: int, dim: int) -> Case:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def step(function: Callable[..., object]) -> Call:
        x, state = _random(device, batch, dim, dtype=dtype), _random(device, batch, dim, _WIDTH, dtype=dtype)
        weight, bias = _random(device, dim, _WIDTH, dtype=dtype), _random(device, dim, dtype=dtype)
        return lambda: function(x, state, weight, bias, "silu")

    def ours() -> Call:
        from tilewright.scan import causal_conv1d_update

        return step(causal_conv1d_update)

    def plain(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
        state.copy_(torch.cat([state[..., 1:], x[..., None]], dim=-1))
        return F.silu((state * weight).sum(-1) + bias)

    moved = batch * dim * (2 * _WIDTH + 2) * dtype.itemsize + dim * (_WIDTH + 1) * dtype.itemsize
    contenders = [
        Contender(OURS, ours, moved),
        Contender("torch", lambda: step(plain), moved),
        Contender("causal-conv1d", lambda: step(peer("causal_conv1d", "causal_conv1d_update")), moved),
    ]
    flops = batch * dim * (2 * _WIDTH + _SILU_FLOPS)
    sizes = {"batch": batch, "dim": dim, "width": _WIDTH, "dtype": full(dtype)}
    title = f"causal_conv1d_update, batch {batch}"
    return Case("causal-conv1d-update", title, contenders, flops, calls=100, sizes=sizes)


def _state_update(device: torch.device, batch: int, heads: int | None, dim: int, states: int) -> Case:
    channels = (dim,) if heads is None else (heads, dim)
    rows = batch * dim * (heads or 1)

    def step(function: Callable[..., object]) -> Call:
        state, B, C = (
            _random(device, *s) for s in ((batch, *channels, states), (batch, states), (batch, states))
        )
        x, z = _random(device, batch, *channels), _random(device, batch, *channels)
        if heads is None:
            dt, A = _random(device, batch, dim), -_random(device, dim, states).exp()
            D, dt_bias = _random(device, dim), _random(device, dim)
        else:
            dt = _random(device, batch, heads)[..., None].expand(batch, heads, dim)
            A = -_random(device, heads).exp()[:, None, None].expand(heads, dim, states)
            D = dt_bias = _random(device, heads)[:, None].expand(heads, dim)
        return lambda: function(state, x, dt, A, B, C, D, z, dt_bias, True)

    def ours() -> Call:
        from tilewright.scan import selective_state_update

        return step(selective_state_update)

    def plain(*arguments: Any) -> Tensor:
        state, x, dt, A, B, C, D, z, bias, _ = arguments
        dt = F.softplus(dt + bias)
        if heads is not None:
            B, C = B[:, None], C[:, None]
        state.mul_(torch.exp(dt[..., None] * A)).add_((dt * x)[..., None] * B[..., None, :])
        out: Tensor = ((state * C[..., None, :]).sum(-1) + D * x) * F.silu(z)
        return out

    def theirs() -> Call:
        return step(peer("mamba_ssm.ops.triton.selective_state_update", "selective_state_update"))

    moved = rows * (states * 8 + 16) + batch * states * 8 + (4 * dim * states if heads is None else 0)
    contenders = [
        Contender(OURS, ours, moved),
        Contender("torch", lambda: step(plain), moved),
        Contender("mamba-ssm", theirs, moved),
    ]
    kind = "mamba1" if heads is None else "mamba2"
    small = rows * states < 1024
    name = "selective-state-update-" + ("call" if small else kind)
    title = "selective_state_update, " + ("a call" if small else f"{kind}, batch {batch}")
    sizes = {"batch": batch, "heads": heads or 1, "dim": dim, "states": states, "dtype": "float32"}
    flops = rows * (5 * states + 2 * _SILU_FLOPS + (states if heads is None else 1))
    return Case(name, title, contenders, flops, calls=1000 if small else 20, sizes=sizes)


def _layer_step(device: torch.device, batch: int, width: int) -> Case:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layers = 6  # in turn, as in a model, so that no cache keeps their weights

    def step(function: Callable[..., object]) -> Call:
        from tilewright.nn import Mamba

        hidden = _random(device, batch, 1, width, dtype=dtype)
        found = [Mamba(width, device=device, dtype=dtype) for _ in range(layers)]
        states = [layer.allocate_inference_cache(batch, 0) for layer in found]

        @torch.inference_mode()
        def run() -> None:
            for layer, (conv_state, state) in zip(found, states, strict=True):
                function(layer, hidden, conv_state, state)

        return run

    def ours() -> Call:
        return step(lambda layer, *rest: layer.step(*rest))

    def plain(layer: Any, hidden: Tensor, conv_state: Tensor, state: Tensor) -> Tensor:
        x, z = layer.in_proj(hidden[:, 0]).chunk(2, dim=-1)
        conv_state.copy_(torch.cat([conv_state[..., 1:], x[..., None]], dim=-1))
        u = F.silu((conv_state * layer.conv1d.weight.squeeze(1)).sum(-1) + layer.conv1d.bias)
        dt, B, C = layer.x_proj(u).split([layer.dt_rank, layer.d_state, layer.d_state], dim=-1)
        dt = F.softplus(layer.dt_proj(dt))
        state.mul_(torch.exp(dt[..., None] * -torch.exp(layer.A_log)))
        state.add_((dt * u)[..., None] * B[:, None])
        y = ((state * C[:, None]).sum(-1) + layer.D * u) * F.silu(z)
        out: Tensor = layer.out_proj(y.to(dtype))
        return out

    inner, rank, states = 2 * width, -(-width // 16), 16
    weights = inner * (3 * width + 2 * rank + 2 * states + _WIDTH + 3)
    moved = layers * (weights * dtype.itemsize + inner * states * 4 * (1 + 2 * batch))
    contenders = [Contender(OURS, ours, moved), Contender("torch", lambda: step(plain), moved)]
    sizes = {"batch": batch, "d_model": width, "layers": layers, "dtype": full(dtype)}
    flops = layers * batch * (2 * weights + inner * 6 * states)
    return Case("mamba-step", f"mamba_step, {layers} layers of width {width}", contenders, flops, sizes=sizes)
