"""A Mamba-2 block between its projections, as one differentiable step."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import FLOATS, check_count, check_device, check_dtype, check_number, check_shape, check_tensor
from .._library import differentiates
from .conv import check_activation, check_weight, one_dtype
from .dense import linear
from .norm import gated_rms_norm, prepared
from .ops.mamba2 import Mamba2Inner
from .ssd import (
    check_options,
    check_sizes,
    check_state_dtype,
    checked_seq_idx,
    initial_states_of,
    limits,
    weight,
)

_fwd = torch.ops.tilewright.mamba2_inner_fwd.default


@overload
def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, dt_bias: Tensor, A: Tensor, D: Tensor,
    chunk_size: int, initial_states: Tensor | None = ..., seq_idx: Tensor | None = ...,
    dt_limit: tuple[float, float] = ..., return_final_states: Literal[False] = ...,
    activation: str | None = ..., rmsnorm_weight: Tensor | None = ..., rmsnorm_eps: float = ...,
    outproj_weight: Tensor | None = ..., outproj_bias: Tensor | None = ..., headdim: int | None = ...,
    ngroups: int = ..., norm_before_gate: bool = ..., state_dtype: torch.dtype | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, dt_bias: Tensor, A: Tensor, D: Tensor,
    chunk_size: int, initial_states: Tensor | None = ..., seq_idx: Tensor | None = ...,
    dt_limit: tuple[float, float] = ..., *, return_final_states: Literal[True],
    activation: str | None = ..., rmsnorm_weight: Tensor | None = ..., rmsnorm_eps: float = ...,
    outproj_weight: Tensor | None = ..., outproj_bias: Tensor | None = ..., headdim: int | None = ...,
    ngroups: int = ..., norm_before_gate: bool = ..., state_dtype: torch.dtype | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, dt_bias: Tensor, A: Tensor, D: Tensor,
    chunk_size: int, initial_states: Tensor | None = ..., seq_idx: Tensor | None = ...,
    dt_limit: tuple[float, float] = ..., return_final_states: bool = ...,
    activation: str | None = ..., rmsnorm_weight: Tensor | None = ..., rmsnorm_eps: float = ...,
    outproj_weight: Tensor | None = ..., outproj_bias: Tensor | None = ..., headdim: int | None = ...,
    ngroups: int = ..., norm_before_gate: bool = ..., state_dtype: torch.dtype | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """All of a Mamba-2 block between its projections; arguments as mamba_ssm's function of this name.

    The input is cut into z, (x, B, C) and dt; (x, B, C) go through the causal convolution; `ssd_chunk_scan`
    follows, then the gated RMS norm (or, without its weight, the gate alone) and the output projection.

    Args:
        zxbcdt: ``(batch, length, 2 * extra + 2 * dim + 2 * ngroups * state + heads)``, dim = heads * headdim.
            The first 2 * extra columns, if any, become ``silu(first half) * second half`` in front of the
            result.
        conv1d_weight: ``(dim + 2 * ngroups * state, width)``.
        conv1d_bias: ``(dim + 2 * ngroups * state,)`` or None.
        dt_bias: ``(heads,)``.
        A: ``(heads,)``.
        D: ``(heads,)``, then `headdim` is needed, or ``(heads, headdim)``.
        chunk_size: as in `ssd_chunk_scan`, which also explains initial_states, seq_idx, dt_limit,
            return_final_states and state_dtype. The convolution starts from zeros.
        initial_states: ``(batch, heads, headdim, state)``.
        seq_idx: ``(batch, length)``, int32 or int64.
        dt_limit: smallest and largest dt.
        return_final_states: also return the final states.
        activation: of the convolution: None, "silu" or "swish".
        rmsnorm_weight: ``(dim,)``. None: no norm.
        rmsnorm_eps: added to the mean square.
        outproj_weight: ``(out, extra + dim)``. None: no projection.
        outproj_bias: ``(out,)``, only with `outproj_weight`.
        headdim: channels in a head.
        ngroups: groups of B and C, and of the norm.
        norm_before_gate: ``norm(y) * silu(z)``, else ``norm(y * silu(z))``.
        state_dtype: dtype in which states are returned.

    Returns:
        ``(batch, length, extra + dim)``, or ``(batch, length, out)``; with the final states if asked.

    Raises:
        TypeError, ValueError: as `ssd_chunk_scan` and `causal_conv1d`, and for sizes that do not add up.

    Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060).
    """
    heads, dim, extra = _split_sizes(zxbcdt, conv1d_weight, D, headdim, ngroups)
    _check_tail(zxbcdt, extra + dim, outproj_weight, outproj_bias)
    if rmsnorm_weight is not None:
        check_tensor("rmsnorm_weight", rmsnorm_weight)
        check_dtype("rmsnorm_weight", rmsnorm_weight, FLOATS)
        check_device("rmsnorm_weight", rmsnorm_weight, zxbcdt.device, "zxbcdt")
        check_shape("rmsnorm_weight", rmsnorm_weight, (dim,), "(dim,)")
        rmsnorm_eps = check_number("rmsnorm_eps", rmsnorm_eps, "[0, inf)")
    check_count("chunk_size", chunk_size)
    check_state_dtype(state_dtype)
    if extra > 0:
        mlp, zxbcdt = torch.split(zxbcdt, [2 * extra, zxbcdt.shape[2] - 2 * extra], dim=-1)
    norm = None
    if rmsnorm_weight is not None:
        norm = GatedNorm(rmsnorm_weight, rmsnorm_eps, dim // ngroups, norm_before_gate)
    out, final_states = mamba2_inner(
        zxbcdt,
        conv1d_weight,
        conv1d_bias,
        A,
        D,
        dt_bias,
        heads,
        ngroups,
        norm,
        activation=activation,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
    )
    if extra > 0:
        first, second = mlp.chunk(2, dim=-1)
        out = torch.cat([F.silu(first) * second, out], dim=-1)
    if outproj_weight is not None:
        out = linear(out, outproj_weight, outproj_bias)
    if not return_final_states:
        return out
    return out, final_states if state_dtype is None else final_states.to(state_dtype)


class GatedNorm(NamedTuple):
    """The norm behind the scan: what `gated_rms_norm` takes, and callable like the module it stands for."""

    weight: Tensor
    eps: float
    group_size: int | None
    norm_before_gate: bool

    def __call__(self, y: Tensor, z: Tensor) -> Tensor:
        """The norm of y, gated by z."""
        return gated_rms_norm(y, self.weight, z, *self[1:])


def mamba2_inner(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor | None,
    heads: int,
    groups: int,
    norm: GatedNorm | None,
    *,
    activation: str | None = "silu",
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
) -> tuple[Tensor, Tensor]:
    """Convolution, scan and gated norm (without `norm`: the gate) of a first projection's output.

    The same kernels as `causal_conv1d`, `ssd_chunk_scan` and `gated_rms_norm`, hence the same bits. Each
    gradient is written where it belongs in that of zxbcdt, which autograd would put together by copying.

    Args:
        zxbcdt: ``(batch, length, dim + channels + heads)``: z; x, B and C; dt.
        conv1d_weight: ``(channels, width)``.
        conv1d_bias: ``(channels,)``.
        A: as this and the others are in `mamba_split_conv1d_scan_combined`.

    Returns:
        ``(batch, length, dim)``, and the final states (without elements unless asked for).
    """
    silu = check_activation(activation)
    check_dtype("zxbcdt", zxbcdt, FLOATS if zxbcdt.is_cpu else FLOATS[:3])
    convolved = conv1d_weight.shape[0]
    dim = zxbcdt.shape[2] - convolved - heads
    z, xBC, dt = zxbcdt.detach().split_with_sizes([dim, convolved, heads], -1)
    check_weight(conv1d_weight, conv1d_bias, xBC.mT, "conv1d_")
    x, B, C = xBC.split_with_sizes([dim, (convolved - dim) // 2, (convolved - dim) // 2], -1)
    by_head, B, C = (torch.unflatten(t, -1, (n, -1)) for t, n in ((x, heads), (B, groups), (C, groups)))
    check_sizes(by_head, dt, A, B, C)
    check_options(by_head, D, None, dt_bias)
    lowest, highest = limits(dt_limit)
    seq_idx = checked_seq_idx(seq_idx, by_head)
    initial_states = initial_states_of(initial_states, by_head, B, None)
    norm_weight, eps, group, norm_before_gate = norm or (None, 0.0, dim, False)
    if norm_weight is not None:
        norm_weight, eps, group = prepared(x, norm_weight, z, eps, group, norm_before_gate)
    wide = torch.promote_types(zxbcdt.dtype, torch.float32)
    tensors = (
        zxbcdt,
        *one_dtype(conv1d_weight, conv1d_bias),
        weight(A, wide),
        weight(D, wide),
        weight(dt_bias, wide),
        norm_weight,
        weight(initial_states, wide),
        seq_idx,
    )
    options = (groups, silu, lowest, highest, group, norm_before_gate, eps, return_final_states)
    if differentiates(*tensors):
        out, states = Mamba2Inner.apply(*tensors, options)  # type: ignore[no-untyped-call]
    else:
        out, states, *_ = _fwd(*tensors, *options, False)
    return out, states


def _split_sizes(
    zxbcdt: Tensor, conv1d_weight: Tensor, D: Tensor, headdim: int | None, ngroups: int
) -> tuple[int, int, int]:
    """Heads, channels of all, and half of the columns in front that are not the scan's."""
    for name, value, axes in (("zxbcdt", zxbcdt, 3), ("conv1d_weight", conv1d_weight, 2)):
        check_tensor(name, value)
        if value.dim() != axes:
            raise ValueError(f"{name} must have {axes} axes, got shape {tuple(value.shape)}")
    check_tensor("D", D)
    check_count("ngroups", ngroups)
    if headdim is not None:
        check_count("headdim", headdim)
    if D.dim() == 2:
        if headdim is not None and headdim != D.shape[1]:
            raise ValueError(f"D must have shape (heads, headdim) = (heads, {headdim}), got {tuple(D.shape)}")
        heads, headdim = D.shape
    elif D.dim() != 1 or headdim is None:
        raise ValueError(
            f"D must have shape (heads, headdim), or (heads,) with headdim given; got shape {tuple(D.shape)} "
            f"and headdim {headdim}"
        )
    else:
        heads = D.shape[0]
    dim, convolved = heads * headdim, conv1d_weight.shape[0]
    if convolved <= dim or (convolved - dim) % (2 * ngroups) != 0:
        raise ValueError(
            f"conv1d_weight must have heads * headdim + 2 * ngroups * state rows, got {convolved} for "
            f"{heads} heads of {headdim} and {ngroups} groups"
        )
    extra = zxbcdt.shape[2] - dim - convolved - heads
    if extra < 0 or extra % 2 != 0:
        raise ValueError(
            f"zxbcdt must have {dim + convolved + heads} columns, or an even number more, "
            f"got {zxbcdt.shape[2]}"
        )
    return heads, dim, extra // 2


def _check_tail(x: Tensor, columns: int, weight: Tensor | None, bias: Tensor | None) -> None:
    """Refuses an output projection that torch would refuse in other words, after the scan."""
    if weight is None:
        if bias is not None:
            raise ValueError("outproj_bias is given, but outproj_weight is None: it would have no effect")
        return
    check_tensor("outproj_weight", weight)
    if weight.dim() != 2 or weight.shape[1] != columns:
        raise ValueError(
            f"outproj_weight must have shape (out, extra + dim) = (out, {columns}), got {tuple(weight.shape)}"
        )
    given = [("outproj_weight", weight)]
    if bias is not None:
        check_tensor("outproj_bias", bias)
        check_shape("outproj_bias", bias, weight.shape[:1], "(out,)")
        given.append(("outproj_bias", bias))
    for name, value in given:
        check_device(name, value, x.device, "zxbcdt")
        if not torch.is_autocast_enabled(x.device.type):
            check_dtype(name, value, (x.dtype,))
