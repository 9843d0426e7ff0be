"""The SSD scan of Mamba-2."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from .._checks import (
    FLOATS,
    INTEGERS,
    check_count,
    check_cu_seqlens,
    check_device,
    check_dtype,
    check_shape,
    check_tensor,
)
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
    seq_idx = _checked_seq_idx(seq_idx, x)
    check_state_dtype(state_dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    out, states = SsdChunkScan.apply(  # type: ignore[no-untyped-call]
        x,
        dt.to(wide),
        A.to(wide).contiguous(),
        B.to(x.dtype),
        C.to(x.dtype),
        weight(D, wide),
        None if z is None else z.to(x.dtype),
        weight(dt_bias, wide),
        weight(_initial_states_of(initial_states, x, B, cu_seqlens), wide),
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


def _check_sizes(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
    """Refuses inputs that do not fit each other."""
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
    """Refuses those that do not fit x, which has been checked."""
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


def _checked_seq_idx(seq_idx: Tensor | None, x: Tensor) -> Tensor | None:
    """As the kernels read them."""
    if seq_idx is None:
        return None
    check_tensor("seq_idx", seq_idx)
    check_dtype("seq_idx", seq_idx, INTEGERS)
    check_shape("seq_idx", seq_idx, x.shape[:2], "(batch, length)")
    check_device("seq_idx", seq_idx, x.device, "x")
    return seq_idx.to(torch.int64).contiguous()


def check_state_dtype(state_dtype: torch.dtype | None) -> None:
    """Refuses what states cannot be returned in."""
    if state_dtype is not None and state_dtype not in FLOATS:
        raise TypeError(f"state_dtype must be a floating-point dtype or None, got {state_dtype}")


def limits(dt_limit: tuple[float, float]) -> tuple[float, float]:
    """The smallest and largest step size, as two numbers."""
    try:
        lowest, highest = (float(limit) for limit in dt_limit)
    except (TypeError, ValueError):
        raise ValueError(f"dt_limit must be two numbers, got {dt_limit!r}") from None
    if not lowest <= highest:
        raise ValueError(f"dt_limit must be (smallest, largest), got {dt_limit!r}")
    return lowest, highest


def _initial_states_of(
    states: Tensor | None, x: Tensor, B: Tensor, cu_seqlens: Tensor | None
) -> Tensor | None:
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


def weight(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A weight or state as the kernels read it."""
    return None if value is None else value.to(dtype).contiguous()
