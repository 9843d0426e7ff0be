"""The gated RMS norm of Mamba-2 blocks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._checks import (
    FLOATS,
    check_count,
    check_device,
    check_dtype,
    check_flag,
    check_number,
    check_shape,
    check_tensor,
)
from .._library import differentiates
from .ops.norm import GatedRmsNorm

_fwd = torch.ops.tilewright.gated_rms_norm_fwd.default


def gated_rms_norm(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """RMS norm over groups of channels, gated by z before or after it, in one pass each way.

        out = x * rsqrt(mean(x ** 2) + eps) * weight * silu(z)                  the norm before the gate
        v = x * silu(z);  out = v * rsqrt(mean(v ** 2) + eps) * weight          the gate before the norm

    Computed in float32 whatever the dtypes (float64 for float64), rounded once. The backward pass keeps x,
    weight, z and a number a group, and computes the rest again.

    Args:
        x: ``(..., dim)``; float32, float16, bfloat16, or float64 on a CPU. Rows that lie at one distance from
            each other, such as slices of a wider tensor, are read where they lie; other strides are copied.
        weight: ``(dim,)``; another dtype than x's or float32 is converted.
        z: the gate, of x's shape; converted to x's dtype. None: no gate.
        eps: added to the mean square.
        group_size: channels that share a scale, which divide dim. None: all.
        norm_before_gate: whether the norm comes first. Without z it changes nothing.

    Returns:
        ``(..., dim)`` of x's dtype, contiguous.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype than those above.
        ValueError: a shape, device or number that is not one of the above.
        NotImplementedError: the gradient is asked for its own gradient.

    Differentiable in x, weight and z. Under autocast it computes with the dtypes it is given. vmap and
    torch.func are not supported.

    Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060); as mamba_ssm's `rmsnorm_fn`, without bias.
    """
    _check_inputs(x, weight, z)
    eps, group_size = checked_options(x.shape[-1], eps, group_size, norm_before_gate)
    weight = weight_beside(x.dtype, weight)
    arguments = (x, weight, None if z is None else z.to(x.dtype), eps, group_size, norm_before_gate)
    if differentiates(x, weight, z):
        return GatedRmsNorm.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]
    return _fwd(*arguments)[0]  # type: ignore[no-any-return]


def checked_options(
    dim: int, eps: float, group_size: int | None, norm_before_gate: bool
) -> tuple[float, int]:
    """eps and group_size as the kernels take them."""
    if type(eps) is not float or not 0.0 <= eps < math.inf:  # in a decode step check_number would show
        eps = check_number("eps", eps, "[0, inf)")
    check_flag("norm_before_gate", norm_before_gate)
    if group_size is None:
        group_size = dim
    check_count("group_size", group_size)
    if dim % group_size != 0:
        raise ValueError(f"group_size must divide the {dim} channels of x, got {group_size}")
    return eps, group_size


def weight_beside(dtype: torch.dtype, weight: Tensor) -> Tensor:
    """The weight as the kernels read it with inputs of this dtype."""
    if dtype == torch.float64 or weight.dtype not in (dtype, torch.float32):
        weight = weight.to(torch.promote_types(dtype, torch.float32))
    return weight.contiguous()


def _check_inputs(x: Any, weight: Any, z: Any) -> None:
    check_tensor("x", x)
    check_dtype("x", x, FLOATS if x.is_cpu else FLOATS[:3])
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape (..., dim) with dim at least 1, got {tuple(x.shape)}")
    for name, value, shape, meaning in (
        ("weight", weight, x.shape[-1:], "(dim,)"),
        ("z", z, x.shape, "that of x"),
    ):
        if value is None and name == "z":
            continue
        check_tensor(name, value)
        check_dtype(name, value, FLOATS)
        check_device(name, value, x.device, "x")
        check_shape(name, value, shape, meaning)
