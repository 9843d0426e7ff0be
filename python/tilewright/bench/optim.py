"""The optimizer family's cases: whole-model steps, blockwise quantization, the cost of a call.

Bytes per parameter and step, read plus written, of a block of 256 with its float32 scale:

    parameter and gradient    read p, write p, read g       3 * itemsize
    an 8-bit state            read and write one code       2 + 2 * 4 / 256
    a 32-bit state            read and write one float      8
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from .case import OURS, Call, Case, Changing, Contender, Plan, grouped, peer, short

PEERS = ("torch", "bitsandbytes", "torchao")
GPU_PEERS = ()
_BLOCK = 256
_STATE8 = 2 + 2 * 4 / _BLOCK
# Per element: the moments, the update with bias corrections, the decay; decoding and scaling each state.
_FLOPS = {"adamw": 14 + 4, "lion": 9 + 2, "sgd": 6 + 2}
_ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
_LION: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.99), "weight_decay": 0.01}
_SGD: dict[str, Any] = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 0.01}

Make = Callable[[list[Tensor]], Any]
Shapes = list[tuple[int, ...]]
Norm = float | None


def cases(plan: Plan) -> list[Case]:
    """All cases of the family; for a model those whose tensors have its layers' shapes."""
    device, quick, half = plan.device, plan.quick, torch.bfloat16
    large = _shapes(plan)
    if quick:
        steps = [_adamw(device, plan.wide, large)]
    elif plan.on_gpu:
        steps = [_adamw(device, half, large), _adamw(device, half, large, max_grad_norm=1.0)]
    else:
        steps = [_adamw(device, dtype, large) for dtype in plan.dtypes]
    others = [_lion(device, plan.wide, large), _sgd(device, plan.wide, large)]
    if plan.model:
        return grouped("steps", [*steps, *others])
    small = [_small_tensors(device, fresh) for fresh in (False, True)]
    codec = [_quantize(device, plan.wide, quick), _dequantize(device, plan.wide, quick)]
    calls = [_mutating_call(device), _allocating_call(device)]
    if quick:
        small, codec, calls, others = [], codec[:1], calls[:1], []
    return [*grouped("steps", [*steps, *small, *others]), *grouped("codec", codec), *grouped("calls", calls)]


def _shapes(plan: Plan) -> Shapes:
    """As many of the model's layers as come to 67M parameters (1B on a GPU), at least one."""
    if plan.model:
        layer = plan.model.parameters()
        count = sum(torch.Size(shape).numel() for shape in layer)
        return layer * max(1, min(plan.model.layers, (10**9 if plan.on_gpu else 2**26) // count))
    if plan.on_gpu:
        return [(1024, 325 if plan.quick else 3255)] * 300
    return [(1024, 1024)] * 4 if plan.quick else [(2048, 2048)] * 16


class _Model:
    """Parameters of given shapes; the gradients, which are only read, are made once for all contenders."""

    def __init__(self, device: torch.device, dtype: torch.dtype, shapes: Shapes) -> None:
        self.device, self.dtype, self.shapes = device, dtype, shapes
        self.numel = sum(int(torch.Size(shape).numel()) for shape in shapes)

    @cached_property
    def gradients(self) -> list[Tensor]:
        return self._random(self.dtype, 0.01, seed=0)

    def parameters(self) -> list[Tensor]:
        parameters = self._random(self.dtype, 1.0, seed=1)
        for parameter, gradient in zip(parameters, self.gradients, strict=True):
            parameter.requires_grad_().grad = gradient
        return parameters

    def float_parameters(self) -> list[Tensor]:
        """float32 parameters with float32 gradients, whatever the model's dtype: nothing is shared."""
        parameters = [p.requires_grad_() for p in self._random(torch.float32, 1.0, seed=1)]
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 0.01)
        return parameters

    def _random(self, dtype: torch.dtype, scale: float, seed: int) -> list[Tensor]:
        generator = torch.Generator(self.device).manual_seed(seed)
        return [
            torch.randn(shape, generator=generator, device=self.device, dtype=dtype).mul_(scale)
            for shape in self.shapes
        ]

    def sizes(self) -> dict[str, object]:
        count = self.shapes.count
        kinds = [f"{count(shape)} x {'x'.join(map(str, shape))}" for shape in dict.fromkeys(self.shapes)]
        return {"parameters": self.numel, "tensors": ", ".join(kinds), "dtype": short(self.dtype)}


def _adamw(device: torch.device, dtype: torch.dtype, shapes: Shapes, max_grad_norm: Norm = None) -> Case:
    model = _Model(device, dtype, shapes)
    base, clip_bytes = 3 * dtype.itemsize, dtype.itemsize if max_grad_norm else 0

    def ours() -> Call:
        from tilewright.optim import AdamW8bit

        optimizer = AdamW8bit(model.parameters(), **_ADAMW, max_grad_norm=max_grad_norm)
        return _stepping(optimizer, optimizer.step)

    def contender(name: str, make: Make, state_bytes: float) -> Contender:
        # Clipping by torch reads the gradients for the norm, then reads and writes them to scale them.
        total = base + state_bytes + 3 * clip_bytes
        return Contender(name, lambda: _clipped(make, model.parameters(), max_grad_norm), model.numel * total)

    contenders = [
        Contender(OURS, ours, model.numel * (base + 2 * _STATE8 + clip_bytes)),
        contender("torch", lambda p: torch.optim.AdamW(p, **_ADAMW, fused=True), 4 * dtype.itemsize),
        contender("bitsandbytes", lambda p: _bitsandbytes("AdamW8bit")(p, **_ADAMW), 2 * _STATE8),
        contender("torchao", lambda p: _torchao("AdamW8bit")(p, **_ADAMW), 2 * _STATE8),
    ]
    if dtype != torch.float32 and device.type == "cuda":
        wide_bytes = model.numel * (28 + 12 * bool(max_grad_norm))
        wide = Contender("torch, all fp32", lambda: _wide_torch(model, max_grad_norm), wide_bytes)
        contenders.insert(2, wide)
    name = f"adamw8bit-{short(dtype)}" + ("-clip" if max_grad_norm else "")
    title = f"AdamW8bit, {_count(model.numel)} {short(dtype)}" + (", clipped" if max_grad_norm else "")
    return Case(name, title, contenders, _FLOPS["adamw"] * model.numel, sizes=model.sizes())


def _wide_torch(model: _Model, max_grad_norm: Norm) -> Call:
    parameters = model.float_parameters()
    return _clipped(lambda p: torch.optim.AdamW(p, **_ADAMW, fused=True), parameters, max_grad_norm)


def _clipped(make: Make, parameters: list[Tensor], max_grad_norm: Norm) -> Call:
    optimizer = make(parameters)
    if max_grad_norm is None:
        return _stepping(optimizer, optimizer.step)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()

    return _stepping(optimizer, step)


def _stepping(optimizer: Any, step: Call) -> Changing:
    """A step, which changes parameters and states."""

    def changed() -> list[Tensor]:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        values = [value for state in optimizer.state.values() for value in state.values()]
        return parameters + [value for value in values if isinstance(value, Tensor)]

    return Changing(step, changed)


def _small_tensors(device: torch.device, fresh_gradients: bool) -> Case:
    model = _Model(device, torch.float32, [(64,)] * 300)

    def contender(name: str, make: Make) -> Contender:
        return Contender(name, lambda: _step(make, model, fresh_gradients))

    contenders = [
        contender(OURS, lambda p: _ours("AdamW8bit")(p, **_ADAMW)),
        contender("torch", lambda p: torch.optim.AdamW(p, **_ADAMW, fused=True)),
        contender("bitsandbytes", lambda p: _bitsandbytes("AdamW8bit")(p, **_ADAMW)),
        contender("torchao", lambda p: _torchao("AdamW8bit")(p, **_ADAMW)),
    ]
    suffix, words = ("-fresh-grads", ", new grads") if fresh_gradients else ("", "")
    title = f"AdamW8bit, 300 x 64 fp32{words}"
    return Case(f"adamw8bit-small-tensors{suffix}", title, contenders, calls=5, sizes=model.sizes())


def _step(make: Make, model: _Model, fresh_gradients: bool) -> Call:
    parameters = model.parameters()
    optimizer = make(parameters)
    if not fresh_gradients:
        return _stepping(optimizer, optimizer.step)
    sets = [model.gradients, [gradient.clone() for gradient in model.gradients]]

    def step() -> None:
        sets.reverse()
        for parameter, gradient in zip(parameters, sets[0], strict=True):
            parameter.grad = gradient
        optimizer.step()

    return _stepping(optimizer, step)


def _lion(device: torch.device, dtype: torch.dtype, shapes: Shapes) -> Case:
    model = _Model(device, dtype, shapes)
    bytes_moved = model.numel * (3 * dtype.itemsize + _STATE8)
    contenders = [
        _plain_step(OURS, model, lambda p: _ours("Lion8bit")(p, **_LION), bytes_moved),
        _our_adamw(model),
        _plain_step("bitsandbytes", model, lambda p: _bitsandbytes("Lion8bit")(p, **_LION), bytes_moved),
    ]
    title = f"Lion8bit, {_count(model.numel)} {short(dtype)}"
    flops = _FLOPS["lion"] * model.numel
    return Case(f"lion8bit-{short(dtype)}", title, contenders, flops, sizes=model.sizes())


def _sgd(device: torch.device, dtype: torch.dtype, shapes: Shapes) -> Case:
    model = _Model(device, dtype, shapes)
    bytes_moved = model.numel * (3 * dtype.itemsize + _STATE8)
    torch_bytes = model.numel * 5 * dtype.itemsize
    contenders = [
        _plain_step(OURS, model, lambda p: _ours("SGD8bit")(p, **_SGD), bytes_moved),
        _our_adamw(model),
        _plain_step("torch", model, lambda p: torch.optim.SGD(p, **_SGD, fused=True), torch_bytes),
        _plain_step("bitsandbytes", model, lambda p: _bitsandbytes("SGD8bit")(p, **_SGD), bytes_moved),
    ]
    title = f"SGD8bit, {_count(model.numel)} {short(dtype)}"
    flops = _FLOPS["sgd"] * model.numel
    return Case(f"sgd8bit-{short(dtype)}", title, contenders, flops, sizes=model.sizes())


def _our_adamw(model: _Model) -> Contender:
    bytes_moved = model.numel * (3 * model.dtype.itemsize + 2 * _STATE8)
    name = f"{OURS} AdamW8bit"
    return _plain_step(name, model, lambda p: _ours("AdamW8bit")(p, **_ADAMW), bytes_moved)


def _plain_step(name: str, model: _Model, make: Make, bytes_moved: float) -> Contender:
    return Contender(name, lambda: _clipped(make, model.parameters(), None), bytes_moved)


def _values(device: torch.device, dtype: torch.dtype, quick: bool) -> Tensor:
    return torch.randn(
        _codec_count(quick), generator=torch.Generator(device).manual_seed(0), device=device
    ).to(dtype)


def _codec_count(quick: bool) -> int:
    return (16 if quick else 64) * 2**20


def _quantize(device: torch.device, dtype: torch.dtype, quick: bool) -> Case:
    def setup(quantize: Callable[..., Any]) -> Call:
        values = _values(device, dtype, quick)
        codes = torch.empty(values.shape, dtype=torch.uint8, device=device)
        absmax = torch.empty(values.numel() // _BLOCK, device=device)
        call = partial(quantize, values, absmax=absmax, out=codes, blocksize=_BLOCK)
        return Changing(call, lambda: [codes, absmax])

    contenders = {
        OURS: lambda: setup(_ours("quantize_blockwise")),
        "bitsandbytes": lambda: setup(_bitsandbytes("quantize_blockwise", "bitsandbytes.functional")),
    }
    return _codec_case("quantize", contenders, dtype, quick)


def _dequantize(device: torch.device, dtype: torch.dtype, quick: bool) -> Case:
    """With `out` and, since bitsandbytes knows no `out` on a CPU, without."""

    def ours(with_out: bool) -> Call:
        codes, absmax = encoded()
        decode = _ours("dequantize_blockwise")
        out = torch.empty(codes.shape, dtype=dtype, device=device)
        if with_out:
            return lambda: decode(codes, absmax=absmax, out=out, blocksize=_BLOCK)
        state = _ours("QuantState")(absmax, codes.shape, blocksize=_BLOCK, dtype=dtype)
        return lambda: decode(codes, state)

    def theirs() -> Call:
        codes, absmax = encoded()
        decode = _bitsandbytes("dequantize_blockwise", "bitsandbytes.functional")
        state = _bitsandbytes("QuantState", "bitsandbytes.functional")(
            absmax, codes.shape, code=_ours("create_dynamic_map")().to(device), blocksize=_BLOCK, dtype=dtype
        )
        return lambda: decode(codes, state)

    def encoded() -> tuple[Tensor, Tensor]:
        codes, state = _ours("quantize_blockwise")(_values(device, torch.float32, quick), blocksize=_BLOCK)
        return codes, state.absmax

    contenders = {
        OURS: lambda: ours(True),
        f"{OURS}, allocating": lambda: ours(False),
        "bitsandbytes": theirs,
    }
    return _codec_case("dequantize", contenders, dtype, quick)


def _codec_case(
    name: str, contenders: dict[str, Callable[[], Call]], dtype: torch.dtype, quick: bool
) -> Case:
    count = _codec_count(quick)
    bytes_moved = count * (dtype.itemsize + 1 + 4 / _BLOCK)
    sizes = {"elements": count, "dtype": short(dtype), "blocksize": _BLOCK}
    title = f"{name}_blockwise, {_count(count)} {short(dtype)}"
    rows = [Contender(who, setup, bytes_moved) for who, setup in contenders.items()]
    return Case(f"{name}-{short(dtype)}", title, rows, count, sizes=sizes)


def _mutating_call(device: torch.device) -> Case:
    """One block of 64: the work is nothing, what remains is the way from Python into the kernel and back."""

    def through_torch() -> Call:
        codes, absmax, out = _tiny(device)
        operator = torch.ops.tilewright.dequantize_blockwise_out.default
        return lambda: operator(codes, absmax, None, True, 64, out)

    def binding() -> Call:
        from tilewright import _backend

        codes, absmax, out = _tiny(device)
        return lambda: _backend.C.dequantize_blockwise(codes, absmax, None, True, out, 64, 1)

    def torch_alone() -> Call:
        _, absmax, out = _tiny(device)
        return lambda: torch.mul(out, absmax, out=out)

    contenders = [
        Contender(OURS, through_torch),
        Contender(f"{OURS} binding", binding),
        Contender("torch", torch_alone, yardstick=True),
    ]
    return Case("call-mutating", "a call, in place", contenders, calls=1000, sizes={"elements": 64})


def _allocating_call(device: torch.device) -> Case:
    def through_torch() -> Call:
        codes, absmax, _ = _tiny(device)
        operator = torch.ops.tilewright.dequantize_blockwise.default  # as our own functions call it
        return lambda: operator(codes, absmax, None, True, 64, torch.float32)

    def torch_alone() -> Call:
        _, absmax, out = _tiny(device)
        return lambda: torch.mul(out, absmax)

    contenders = [Contender(OURS, through_torch), Contender("torch", torch_alone, yardstick=True)]
    return Case("call-allocating", "a call, allocating", contenders, calls=1000, sizes={"elements": 64})


def _tiny(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    _ours("dequantize_blockwise")  # registers the torch ops
    codes = torch.zeros(64, dtype=torch.uint8, device=device)
    return codes, torch.ones(1, device=device), torch.zeros(64, device=device)


def _ours(name: str) -> Any:
    from tilewright import optim

    return getattr(optim, name)


def _bitsandbytes(name: str, module: str = "bitsandbytes.optim") -> Any:
    return peer(module, name)


def _torchao(name: str) -> Any:
    return peer("torchao.optim", name)


def _count(number: int) -> str:
    return f"{number / 1e9:.1f}B" if number >= 0.95e9 else f"{number / 1e6:.0f}M"
