"""What public functions say about a wrong argument: its name, what came, what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


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
