"""Registration of torch ops: one call gives an op its schema, its implementation and its fake kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler

from . import _backend
from ._checks import PLAIN

_library: Any = torch.library.Library("tilewright", "FRAGMENT")  # type: ignore[no-untyped-call]


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers ``torch.ops.tilewright.<name in the schema>`` for CPU and CUDA tensors.

    With TILEWRIGHT_DEBUG it is watched; what it may return that is not finite is for `_debug._EXEMPT`.
    """
    name = schema.partition("(")[0]
    if _backend.DEBUG:
        from ._debug import watched

        implementation = watched(schema, implementation)
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"tilewright::{name}", fake, lib=_library)


def differentiates(*tensors: Tensor | None) -> bool:
    """Whether a call must go through its autograd function: someone may ask for a gradient or a tangent.

    An op alone would give a result without the tangent, which forward mode takes for a tangent of zero; the
    function refuses it.
    """
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_transformed() -> bool:
    """Whether forward mode, torch.func, a tracer or a dispatch mode, as FLOP counters are, is at work."""
    if forward_ad._current_level >= 0 or torch._C._get_tracing_state():
        return True
    if torch._C._len_torch_dispatch_stack():
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None


def _questions() -> tuple[Callable[[], Any], ...] | None:
    """What torch is asked before an op is left out: each answers 0, False or None; None on an older torch."""
    try:
        return (
            torch._C._is_any_autocast_enabled,
            torch._C._len_torch_function_stack,
            torch._C._len_torch_dispatch_stack,
            torch._C._functorch.peek_interpreter_stack,
            torch._C._get_tracing_state,
        )
    except AttributeError:
        return None


_asked = None if _backend.DEBUG else _questions()
_is_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_dynamo_compiling


def is_direct(*tensors: Tensor | None) -> bool:
    """Whether an op would be nothing but its implementation, on CPU tensors, and may be left out.

    It may not where something takes part or looks on: autograd, forward mode, autocast, subclasses,
    torch.func, modes, torch.compile, a tracer, a profiler. The way through torch's dispatcher is short, but
    code that has left the caches costs as much time as megabytes of weights.
    """
    if _is_compiling() or _asked is None:
        return False
    for question in _asked:
        if question():
            return False
    if forward_ad._current_level >= 0 or profiler._is_profiler_enabled:
        return False
    differentiable = _is_grad_enabled()
    for t in tensors:
        if t is None:
            continue
        if type(t) not in PLAIN or not t.is_cpu or t.is_neg() or (differentiable and t.requires_grad):
            return False
    return True


def autocast(x: Tensor, *weights: Tensor | None) -> tuple[Any, ...]:
    """A layer's input and weights in autocast's dtype, as `F.linear` has them; float64 and integers stay."""
    kind = x.device.type
    is_cast = x.is_floating_point() and not any(
        t is not None and t.dtype == torch.float64 for t in (x, *weights)
    )
    if not (is_cast and torch.is_autocast_enabled(kind)):
        return x, *weights
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t is None else t.to(dtype) for t in (x, *weights))


def _new_strided(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype)


# What compiled graphs allocate by: no dispatcher, no parser of arguments.
_new = getattr(getattr(torch._C._dynamo, "guards", None), "_empty_strided_cpu", _new_strided)


def new_on_cpu(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor, as torch.empty makes it, for calls that are direct."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size or 1
    return _new(shape, tuple(reversed(strides)), dtype)


def nothing(*arguments: Any) -> None:
    """The fake kernel of an op that only writes into its arguments."""
    return None
