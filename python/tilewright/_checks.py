"""What public functions say about a wrong argument: its name, what came, what is allowed."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def check_count(name: str, value: Any, highest: int | None = None) -> None:
    """Refuses what is no integer of at least 1, and at most `highest`."""
    allowed = "a positive int" if highest is None else f"an int from 1 to {highest}"
    integral = isinstance(value, (int, torch.SymInt, Integral))
    if isinstance(value, bool) or not integral:
        raise TypeError(f"{name} must be {allowed}, got {value!r}")
    if value < 1 or (highest is not None and value > highest):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def check_tensor(name: str, value: Any) -> None:
    """Refuses what no kernel can read: other types, other devices, sparse and quantized layouts."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not (value.is_cpu or value.is_cuda):
        raise ValueError(f"{name} must be on a CPU or CUDA device, got {value.device}")
    if value.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {value.layout}")


def check_dtype(name: str, value: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Refuses dtypes other than those allowed."""
    if value.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{name} must have dtype {names}, got {str(value.dtype).removeprefix('torch.')}")


def check_shape(name: str, value: Tensor, expected: Sequence[int], meaning: str) -> None:
    """Refuses another shape; `meaning` names the axes, such as "(batch, dim, length)"."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {meaning} = {tuple(expected)}, got {tuple(value.shape)}")


def check_device(name: str, value: Tensor, expected: torch.device, owner: str) -> None:
    """Refuses another device than that of the argument called `owner`."""
    if value.device != expected:
        raise ValueError(f"{name} is on {value.device}, but {owner} is on {expected}: move one of them")


def check_cu_seqlens(value: Any, expected: torch.device, owner: str) -> None:
    """Refuses what cannot say where packed sequences lie; its values are for `check_boundaries`."""
    check_tensor("cu_seqlens", value)
    check_dtype("cu_seqlens", value, INTEGERS)
    check_device("cu_seqlens", value, expected, owner)
    if value.dim() != 1 or value.shape[0] == 0:
        raise ValueError(f"cu_seqlens must have shape (sequences + 1,), got {tuple(value.shape)}")


def check_boundaries(cu_seqlens: Tensor, length: int) -> None:
    """Looks at the values, which waits for the device; not while a CUDA graph is captured."""
    if cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    ends = cu_seqlens.tolist()
    if ends[:1] != [0] or ends[-1] != length or not all(map(operator.lt, ends, ends[1:])):
        shown = ", ".join(map(str, ends if len(ends) <= 8 else [*ends[:4], "...", *ends[-4:]]))
        raise ValueError(f"cu_seqlens must increase strictly from 0 to the length {length}, got [{shown}]")
