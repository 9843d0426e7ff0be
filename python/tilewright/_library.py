"""Registration of torch ops: one call gives an op its schema, its implementation and its fake kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from . import _backend

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


def differentiates(*tensors: torch.Tensor | None) -> bool:
    """Whether a call must go through its autograd function: someone may ask for a gradient or a tangent.

    An op alone would give a result without the tangent, which forward mode takes for a tangent of zero; the
    function refuses it.
    """
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def autocast(x: torch.Tensor, *weights: torch.Tensor | None) -> tuple[Any, ...]:
    """A layer's input and weights in autocast's dtype, as `F.linear` has them; float64 and integers stay."""
    kind = x.device.type
    is_cast = x.is_floating_point() and not any(
        t is not None and t.dtype == torch.float64 for t in (x, *weights)
    )
    if not (is_cast and torch.is_autocast_enabled(kind)):
        return x, *weights
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t is None else t.to(dtype) for t in (x, *weights))


def nothing(*arguments: Any) -> None:
    """The fake kernel of an op that only writes into its arguments."""
    return None
