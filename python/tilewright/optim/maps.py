"""The 8-bit dynamic map, and the one copy of it that all states on a device share."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .. import _backend
from .._checks import check_tensor

_shared: dict[tuple[torch.device, bool, ModuleType], Tensor] = {}  # of each extension


def create_dynamic_map(signed: bool = True) -> Tensor:
    """The 256 values an 8-bit code stands for, ascending, bit for bit those of bitsandbytes.

    Args:
        signed: values in (-1, 1] (code 127 is 0, code 255 is 1); otherwise in [0, 1] (code 0 is 0).

    Returns:
        float32 ``(256,)`` on the CPU.

    Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861), section 2.
    """
    return torch.tensor(_backend.C.dynamic_map(signed), dtype=torch.float32)


def shared_map(device: torch.device, signed: bool) -> Tensor:
    """The built-in map on `device`: every caller gets the same tensor, which nobody may write to.

    The extension knows the tensor by its address, so that a kernel whose map lies on a GPU can tell the
    built-in map (computed) from a foreign one (looked up) without reading it back.
    """
    key = (device, signed, _backend.C)
    found = _shared.get(key)
    if found is None:
        found = create_dynamic_map(signed).to(device)
        _backend.C.register_builtin_map(found, signed)
        _shared[key] = found
    return found


def is_shared_map(code: Tensor, signed: bool) -> bool:
    """Whether `code` is (a view of) the tensor that `shared_map` gives out for its device."""
    found = _shared.get((code.device, signed, _backend.C))
    return found is not None and (code is found or code.data_ptr() == found.data_ptr())


def resolve_map(code: Tensor, signed: bool, device: torch.device) -> Tensor:
    """`code` on `device`: the shared tensor if its values are the built-in map's, else a copy of its own.

    Raises:
        ValueError: unless `code` holds 256 finite, ascending float32 values.
    """
    check_map(code)
    values = code.detach().cpu()
    if bool((values[1:] < values[:-1]).any()) or not bool(torch.isfinite(values).all()):
        raise ValueError("a quantization map must hold finite values in ascending order")
    if torch.equal(values, create_dynamic_map(signed)):
        return shared_map(device, signed)
    return values.to(device, copy=True)


def check_map(code: Tensor) -> None:
    """Refuses what cannot be a map, by what is known without reading its values."""
    check_tensor("code", code)
    if code.dtype != torch.float32 or code.shape != (256,):
        raise ValueError(f"code must hold 256 float32 values, got {code.dtype} of shape {tuple(code.shape)}")
