"""The SSD scan of Mamba-2, and the whole Mamba-2 block tail built on it."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import (
    FLOATS,
    INTEGERS,
    check_count,
    check_cu_seqlens,
    check_device,
    check_dtype,
    check_number,
    check_shape,
    check_tensor,
)
from .conv import causal_conv1d, check_weight
from .dense import linear
from .norm import gated_rms_norm
from .ops.ssd import SsdChunkScan


@overload
def ssd_chunk_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = ...,
    z: Tensor | None = ..., dt_bias: Tensor | None = ..., initial_states: Tensor | None = ...,
    seq_idx: Tensor | None = ..., cu_seqlens: Tensor | None = ..., dt_softplus: bool = ...,
    dt_limit: tuple[float, float] = ..., return_final_states: Literal[False] = ...,
    return_varlen_states: Literal[False] = ..., state_dtype: torch.dtype | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def ssd_chunk_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = ...,
    z: Tensor | None = ..., dt_bias: Tensor | None = ..., initial_states: Tensor | None = ...,
    seq_idx: Tensor | None = ..., cu_seqlens: Tensor | None = ..., dt_softplus: bool = ...,
    dt_limit: tuple[float, float] = ..., *, return_final_states: Literal[True],
    return_varlen_states: Literal[False] = ..., state_dtype: torch.dtype | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def ssd_chunk_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = ...,
    z: Tensor | None = ..., dt_bias: Tensor | None = ..., initial_states: Tensor | None = ...,
    seq_idx: Tensor | None = ..., cu_seqlens: Tensor | None = ..., dt_softplus: bool = ...,
    dt_limit: tuple[float, float] = ..., return_final_states: Literal[False] = ...,
    *, return_varlen_states: Literal[True], state_dtype: torch.dtype | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def ssd_chunk_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = ...,
    z: Tensor | None = ..., dt_bias: Tensor | None = ..., initial_states: Tensor | None = ...,
    seq_idx: Tensor | None = ..., cu_seqlens: Tensor | None = ..., dt_softplus: bool = ...,
    dt_limit: tuple[float, float] = ..., *, return_final_states: Literal[True],
    return_varlen_states: Literal[True], state_dtype: torch.dtype | None = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
@overload
def ssd_chunk_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = ...,
    z: Tensor | None = ..., dt_bias: Tensor | None = ..., initial_states: Tensor | None = ...,
    seq_idx: Tensor | None = ..., cu_seqlens: Tensor | None = ..., dt_softplus: bool = ...,
    dt_limit: tuple[float, float] = ..., return_final_states: bool = ...,
    return_varlen_states: bool = ..., state_dtype: torch.dtype | None = ...,
) -> Tensor | tuple[Tensor, ...]: ...  # fmt: skip
def ssd_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Mamba-2's scan; arguments as `mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined`.

    For every head, with a state h of (head_dim, state)::

        dt = clamp(softplus(dt + dt_bias), *dt_limit)        softplus and bias if asked
        h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] (outer) B[t]
        y[t] = h[t] C[t] + D x[t]
        out[t] = y[t] * silu(z[t])

    Args:
        x: ``(batch, length, heads, head_dim)``, float32, float16, bfloat16, or float64 on a CPU; any strides.
        dt: ``(batch, length, heads)``; computed with in float32, whatever its dtype.
        A: ``(heads,)``, usually negative; float32, as D and dt_bias are (others are converted).
        B: ``(batch, length, groups, state)``; `heads` is a multiple of `groups`, and head h reads group
            ``h // (heads // groups)``. Converted to x's dtype, as C and z are.
        C: as B.
        chunk_size: any positive number. It does not change the result, and the kernels here choose their own.
        D: ``(heads,)`` or ``(heads, head_dim)``.
        z: as x.
        dt_bias: ``(heads,)``.
        initial_states: ``(batch, heads, head_dim, state)``. With `cu_seqlens` one per sequence, or one, which
            is then the first sequence's. Default: zeros.
        seq_idx: int32 or int64 ``(batch, length)``. The state is dropped before each step whose value is not
            that of the step before; the initial state belongs to what comes first, whatever its number.
        cu_seqlens: int32 or int64 ``(sequences + 1,)``, increasing strictly from 0 to length; batch must be
            1. Sequence s is steps ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]`` and starts from its own initial
            state. Looking at the values waits for a CUDA device, except while a CUDA graph is captured: there
            they are trusted; wrong ones give wrong numbers, no crash.
        dt_softplus: whether dt goes through softplus.
        dt_limit: smallest and largest dt.
        return_final_states: also return the states after the last step of each batch row, or sequence.
        return_varlen_states: also return the states after the last step of each sequence; needs `cu_seqlens`.
        state_dtype: dtype in which states are returned. Default: float32, in which they are computed (float64
            where x is).

    Returns:
        out, ``(batch, length, heads, head_dim)`` of x's dtype; with states a tuple: (out, final_states),
        (out, varlen_states) or (out, final_states, varlen_states), each
        ``(batch or sequences, heads, head_dim, state)``.

    Gradients flow to all floating-point arguments, also from the returned states. There is no second
    derivative, vmap or torch.func.grad. Autocast changes nothing here: x keeps its dtype, states are float32.

    Raises:
        TypeError: a tensor is none, or has a dtype that is not allowed.
        ValueError: a shape, device or `cu_seqlens` that does not fit, or an option that is not allowed.
        NotImplementedError: a second derivative is asked for.

    With `cu_seqlens`, mamba_ssm wants `return_varlen_states` and lets the state run on from sequence to
    sequence, unless `seq_idx` says the same; here `cu_seqlens` alone separates sequences, its states are
    differentiable, and final_states are those of every sequence (mamba_ssm: of the last one, here
    ``final_states[-1:]``).

    Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060).
    """
    _check_sizes(x, dt, A, B, C)
    check_count("chunk_size", chunk_size)
    _check_options(x, D, z, dt_bias)
    lowest, highest = limits(dt_limit)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x.device, "x")
        if x.shape[0] != 1:
            raise ValueError(f"cu_seqlens needs batch 1, got x of shape {tuple(x.shape)}")
    elif return_varlen_states:
        raise ValueError("return_varlen_states needs cu_seqlens, got None")
    if seq_idx is not None:
        check_tensor("seq_idx", seq_idx)
        check_dtype("seq_idx", seq_idx, INTEGERS)
        check_shape("seq_idx", seq_idx, x.shape[:2], "(batch, length)")
        check_device("seq_idx", seq_idx, x.device, "x")
        seq_idx = seq_idx.to(torch.int64).contiguous()
    if state_dtype is not None and state_dtype not in FLOATS:
        raise TypeError(f"state_dtype must be a floating-point dtype or None, got {state_dtype}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    out, states = SsdChunkScan.apply(  # type: ignore[no-untyped-call]
        x,
        dt.to(wide),
        A.to(wide).contiguous(),
        B.to(x.dtype),
        C.to(x.dtype),
        _weight(D, wide),
        None if z is None else z.to(x.dtype),
        _weight(dt_bias, wide),
        _weight(_initial(initial_states, x, B, cu_seqlens), wide),
        seq_idx,
        None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous(),
        bool(dt_softplus),
        lowest,
        highest,
        return_final_states or return_varlen_states,
    )
    wanted = int(return_final_states) + int(return_varlen_states)
    if wanted == 0:
        return out  # type: ignore[no-any-return]
    if state_dtype is not None:
        states = states.to(state_dtype)
    return (out, *[states] * wanted)


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
    heads, head_dim, states, extra = _split_sizes(zxbcdt, conv1d_weight, D, headdim, ngroups)
    dim, both = heads * head_dim, ngroups * states
    _check_tail(zxbcdt, extra + dim, outproj_weight, outproj_bias)
    if rmsnorm_weight is not None:
        check_tensor("rmsnorm_weight", rmsnorm_weight)
        check_dtype("rmsnorm_weight", rmsnorm_weight, FLOATS)
        check_device("rmsnorm_weight", rmsnorm_weight, zxbcdt.device, "zxbcdt")
        check_shape("rmsnorm_weight", rmsnorm_weight, (dim,), "(dim,)")
        rmsnorm_eps = check_number("rmsnorm_eps", rmsnorm_eps, "[0, inf)")
    mlp, z, xBC, dt = torch.split(zxbcdt, [2 * extra, dim, dim + 2 * both, heads], dim=-1)
    check_dtype("zxbcdt", zxbcdt, FLOATS)
    check_weight(conv1d_weight, conv1d_bias, xBC.transpose(1, 2), "conv1d_")
    xBC = causal_conv1d(xBC.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation=activation)
    x, B, C = torch.split(xBC.transpose(1, 2), [dim, both, both], dim=-1)
    gate = _split_last(z, heads, head_dim) if rmsnorm_weight is None else None
    scanned = ssd_chunk_scan(
        _split_last(x, heads, head_dim),
        dt,
        A,
        _split_last(B, ngroups, states),
        _split_last(C, ngroups, states),
        chunk_size,
        D=D,
        z=gate,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
        state_dtype=state_dtype,
    )
    out, final_states = scanned if isinstance(scanned, tuple) else (scanned, None)
    out = out.flatten(-2)
    if rmsnorm_weight is not None:
        out = gated_rms_norm(out, rmsnorm_weight, z, rmsnorm_eps, dim // ngroups, norm_before_gate)
    if extra > 0:
        first, second = mlp.chunk(2, dim=-1)
        out = torch.cat([F.silu(first) * second, out], dim=-1)
    if outproj_weight is not None:
        out = linear(out, outproj_weight, outproj_bias)
    return (out, final_states) if return_final_states else out


def _check_sizes(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
    for name, value in (("x", x), ("dt", dt), ("A", A), ("B", B), ("C", C)):
        check_tensor(name, value)
        check_dtype(name, value, FLOATS)
        check_device(name, value, x.device, "x")
    if x.dtype == torch.float64 and x.is_cuda:
        raise TypeError("x must have dtype float32, float16, bfloat16 on a CUDA device, got float64")
    if x.dim() != 4 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(
            f"x must have shape (batch, length, heads, head_dim) with heads and head_dim at least 1, "
            f"got {tuple(x.shape)}"
        )
    batch, length, heads, _ = x.shape
    check_shape("dt", dt, (batch, length, heads), "(batch, length, heads)")
    check_shape("A", A, (heads,), "(heads,)")
    if B.dim() != 4 or B.shape[:2] != x.shape[:2] or B.shape[2] == 0 or B.shape[3] == 0:
        raise ValueError(
            f"B must have shape (batch, length, groups, state) = ({batch}, {length}, >= 1, >= 1), "
            f"got {tuple(B.shape)}"
        )
    if heads % B.shape[2] != 0:
        raise ValueError(f"B has {B.shape[2]} groups, which do not divide the {heads} heads of x")
    check_shape("C", C, B.shape, "that of B")


def _check_options(x: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None) -> None:
    for name, value in (("D", D), ("z", z), ("dt_bias", dt_bias)):
        if value is not None:
            check_tensor(name, value)
            check_dtype(name, value, FLOATS)
            check_device(name, value, x.device, "x")
    heads, head_dim = x.shape[2:]
    if D is not None and tuple(D.shape) not in ((heads,), (heads, head_dim)):
        raise ValueError(
            f"D must have shape (heads,) = ({heads},) or (heads, head_dim) = ({heads}, {head_dim}), "
            f"got {tuple(D.shape)}"
        )
    if z is not None:
        check_shape("z", z, x.shape, "that of x")
    if dt_bias is not None:
        check_shape("dt_bias", dt_bias, (heads,), "(heads,)")


def limits(dt_limit: tuple[float, float]) -> tuple[float, float]:
    """The smallest and largest step size, as two numbers."""
    try:
        lowest, highest = (float(limit) for limit in dt_limit)
    except (TypeError, ValueError):
        raise ValueError(f"dt_limit must be two numbers, got {dt_limit!r}") from None
    if not lowest <= highest:
        raise ValueError(f"dt_limit must be (smallest, largest), got {dt_limit!r}")
    return lowest, highest


def _initial(states: Tensor | None, x: Tensor, B: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """The initial states of every sequence."""
    if states is None:
        return None
    check_tensor("initial_states", states)
    check_dtype("initial_states", states, FLOATS)
    check_device("initial_states", states, x.device, "x")
    each = (x.shape[2], x.shape[3], B.shape[3])
    if cu_seqlens is None:
        check_shape("initial_states", states, (x.shape[0], *each), "(batch, heads, head_dim, state)")
        return states
    sequences = cu_seqlens.shape[0] - 1
    if states.dim() == 4 and states.shape[0] == 1 and sequences > 1:
        check_shape("initial_states", states, (1, *each), "(1, heads, head_dim, state)")
        return torch.cat([states, states.new_zeros(sequences - 1, *each)])
    check_shape("initial_states", states, (sequences, *each), "(sequences, heads, head_dim, state)")
    return states


def _weight(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else value.to(dtype).contiguous()


def _split_sizes(
    zxbcdt: Tensor, conv1d_weight: Tensor, D: Tensor, headdim: int | None, ngroups: int
) -> tuple[int, int, int, int]:
    """Heads, channels in a head, states, and half of the columns in front that are not the scan's."""
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
    return heads, headdim, (convolved - dim) // (2 * ngroups), extra // 2


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


def _split_last(t: Tensor, outer: int, inner: int) -> Tensor:
    return t.view(*t.shape[:-1], outer, inner)
