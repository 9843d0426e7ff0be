"""A Mamba-2 block as one differentiable step, with its projections or without."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import (
    FLOATS,
    INTEGERS,
    check_count,
    check_device,
    check_dtype,
    check_number,
    check_shape,
    check_tensor,
    fits,
)
from .._library import differentiates
from .conv import MAX_WIDTH, check_activation, one_dtype
from .dense import linear, may_be_part
from .norm import checked_options, gated_rms_norm, weight_beside
from .ops.mamba2 import Mamba2Inner
from .ssd import check_state_dtype, limits, weight

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
    out_proj = None if outproj_weight is None else Linear(outproj_weight, outproj_bias)
    is_last = extra == 0 and out_proj is not None and may_be_part(zxbcdt, *out_proj)
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
        out_proj=out_proj if is_last else None,
        activation=activation,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
    )
    if extra > 0:
        first, second = mlp.chunk(2, dim=-1)
        out = torch.cat([F.silu(first) * second, out], dim=-1)
    if out_proj is not None and not is_last:
        out = linear(out, *out_proj)
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


class Linear(NamedTuple):
    """A projection's weight, (outputs, inputs), and bias; a torch.nn.Linear will do in its place."""

    weight: Tensor
    bias: Tensor | None


def mamba2_inner(
    x: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor | None,
    heads: int,
    groups: int,
    norm: GatedNorm | None,
    *,
    in_proj: Any = None,
    out_proj: Any = None,
    A_is_log: bool = False,
    activation: str | None = "silu",
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
) -> tuple[Tensor, Tensor]:
    """Convolution, scan, gated norm (without `norm`: the gate), and the projections before and behind them.

    The same kernels as `causal_conv1d`, `ssd_chunk_scan` and `gated_rms_norm`, hence the same bits (where
    zxbcdt does not lie in rows, those of a copy that does). Each gradient is written where it belongs in that
    of zxbcdt, which autograd would put together by copying.

    Args:
        x: ``(batch, length, features)``, with `in_proj`; without it zxbcdt, ``(batch, length, dim + channels
            + heads)``: z; x, B and C; dt.
        conv1d_weight: ``(channels, width)`` or ``(channels, 1, width)``.
        conv1d_bias: ``(channels,)``.
        A: as this and the others are in `mamba_split_conv1d_scan_combined`.
        in_proj, out_proj: anything with a weight and a bias that `dense.may_be_part`.
        A_is_log: whether `A` is the logarithm of its negative.

    Returns:
        ``(batch, length, dim)``, or what `out_proj` makes of it, and the final states (without elements
        unless asked for).
    """
    silu = check_activation(activation)
    check_dtype("zxbcdt", x, FLOATS if x.is_cpu else FLOATS[:3])
    columns = x.shape[2] if in_proj is None else in_proj.weight.shape[0]
    dim = columns - conv1d_weight.shape[0] - heads
    tensors: dict[str, Any] = {
        "conv1d_weight": conv1d_weight, "conv1d_bias": conv1d_bias, "A": A, "D": D, "dt_bias": dt_bias,
        "norm.weight": None if norm is None else norm.weight, "initial_states": initial_states,
        "seq_idx": seq_idx,
    }  # fmt: skip
    _check_inner(x, dim, heads, groups, tensors)
    lowest, highest = limits(dt_limit)
    norm_weight, eps, group, norm_before_gate = norm or (None, 0.0, dim, False)
    if norm_weight is not None:
        eps, group = checked_options(dim, eps, group, norm_before_gate)
        norm_weight = weight_beside(x.dtype, norm_weight)
    wide = torch.promote_types(x.dtype, torch.float32)
    arguments = (
        x,
        *((None, None) if in_proj is None else (in_proj.weight, in_proj.bias)),
        *((None, None) if out_proj is None else (out_proj.weight, out_proj.bias)),
        *one_dtype(conv1d_weight, conv1d_bias),
        weight(A, wide),
        weight(D, wide),
        weight(dt_bias, wide),
        norm_weight,
        weight(initial_states, wide),
        None if seq_idx is None else seq_idx.to(torch.int64).contiguous(),
    )
    options = (groups, A_is_log, silu, lowest, highest, group, norm_before_gate, eps, return_final_states)
    if differentiates(*arguments):
        out, final_states = Mamba2Inner.apply(*arguments, options)  # type: ignore[no-untyped-call]
    else:
        out, final_states, *_ = _fwd(*arguments, *options, False)
    return out, final_states


def _check_inner(x: Tensor, dim: int, heads: int, groups: int, tensors: dict[str, Any]) -> None:
    """Refuses tensors that do not fit each other, by sizes alone: zxbcdt itself may not be there yet."""
    taps = tensors["conv1d_weight"]
    channels, width, shared = taps.shape[0], taps.shape[-1], taps.shape[0] - dim
    if dim < 1 or dim % heads or heads % groups or shared < 1 or shared % (2 * groups):
        raise ValueError(
            f"zxbcdt of {dim + channels + heads} columns, conv1d_weight of {channels} rows, {heads} heads "
            f"and {groups} groups do not fit together"
        )
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"conv1d_weight must have 1 to {MAX_WIDTH} taps (width), got {width}")
    head_dim, states = dim // heads, shared // (2 * groups)
    has_axis, is_wide = taps.dim() == 3, isinstance(tensors["D"], Tensor) and tensors["D"].dim() == 2
    fitting: dict[str, tuple[tuple[int, ...], str]] = {
        "conv1d_weight": ((channels, 1, width) if has_axis else (channels, width), "(channels, width)"),
        "conv1d_bias": ((channels,), "(channels,)"),
        "A": ((heads,), "(heads,)"),
        "D": ((heads, head_dim) if is_wide else (heads,), "(heads,) or (heads, headdim)"),
        "dt_bias": ((heads,), "(heads,)"),
        "norm.weight": ((dim,), "(dim,)"),
        "initial_states": ((x.shape[0], heads, head_dim, states), "(batch, heads, headdim, state)"),
        "seq_idx": (tuple(x.shape[:2]), "(batch, length)"),
    }
    convolving = FLOATS[3:] if x.dtype == torch.float64 else FLOATS[:3]
    allowed = {"seq_idx": INTEGERS, "conv1d_weight": convolving, "conv1d_bias": convolving}
    for name, value in tensors.items():
        shape, meaning = fitting[name]
        if (value is None and name not in ("A", "D")) or fits(
            value, allowed.get(name, FLOATS), shape, x.device
        ):
            continue
        check_tensor(name, value)
        check_dtype(name, value, allowed.get(name, FLOATS))
        check_device(name, value, x.device, "zxbcdt")
        check_shape(name, value, shape, meaning)


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
