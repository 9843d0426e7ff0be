"""The selective scan of Mamba."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from .. import _backend
from .._checks import (
    FLOATS,
    INTEGERS,
    check_cu_seqlens,
    check_device,
    check_dtype,
    check_shape,
    check_tensor,
)
from .ops import selective as ops
from .ops.sequences import sequence_count


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ...,
    z: Tensor | None = ..., delta_bias: Tensor | None = ..., delta_softplus: bool = ...,
    return_last_state: Literal[False] = ...,
    *, initial_state: Tensor | None = ..., cu_seqlens: Tensor | None = ..., reverse: bool = ...,
    order: Tensor | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ...,
    z: Tensor | None = ..., delta_bias: Tensor | None = ..., delta_softplus: bool = ...,
    *, return_last_state: Literal[True],
    initial_state: Tensor | None = ..., cu_seqlens: Tensor | None = ..., reverse: bool = ...,
    order: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ...,
    z: Tensor | None = ..., delta_bias: Tensor | None = ..., delta_softplus: bool = ...,
    return_last_state: bool = ...,
    *, initial_state: Tensor | None = ..., cu_seqlens: Tensor | None = ..., reverse: bool = ...,
    order: Tensor | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    order: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Runs a state space model whose step size, input and output maps change from token to token.

    For every channel d and state n, over the tokens t of a sequence::

        dt = delta[t] + delta_bias, then softplus(dt) if delta_softplus
        h[n] = exp(dt * A[n]) * h[n] + dt * B[t, n] * u[t]
        y[t] = sum over n of C[t, n] * h[n], + D * u[t]
        out[t] = y[t] * silu(z[t])

    With a complex A the sum over n is twice its real part. Arithmetic and states are float32 for inputs of
    half precision.

    Args:
        u: input, ``(batch, dim, length)``, float32, float16 or bfloat16; float64 on the CPU. Any strides
            here and below: transposed and expanded views are read where they are.
        delta: step size before bias and softplus, shaped like u.
        A: ``(dim, states)``, float32 or complex64 (float64 or complex128 with a float64 u), up to 256
            states.
        B: input map. Constant: ``(dim, states)`` of A's dtype. Changing with the token:
            ``(batch, states, length)``, or ``(batch, groups, states, length)`` where channel d belongs to
            group ``d // (dim // groups)``. With a complex A the latter two are real and twice as long, real
            and imaginary parts alternating along the last axis.
        C: output map, likewise, and independently of B.
        D: weight of the input in the output, ``(dim,)``.
        z: gate, shaped like u.
        delta_bias: ``(dim,)``.
        delta_softplus: whether dt goes through softplus.
        return_last_state: whether to return the states after the last token too.
        initial_state: states before the first token, ``(sequences, dim, states)``; zeros if None.
        cu_seqlens: where packed sequences start and end, ``(sequences + 1,)``, int32 or int64: 0 first, the
            length last, increasing strictly. Needs a batch of 1. None: every batch row is a sequence.
        reverse: visit the tokens of each sequence from its last to its first.
        order: the token visited at each step, ``(length,)`` or ``(batch, length)``, int32 or int64, a
            permutation of 0 to length - 1. Outputs are at the places of their tokens. Together with
            `reverse` it is walked from its end; with `cu_seqlens`, sequences are stretches of steps.

    Returns:
        ``out``, ``(batch, dim, length)`` of u's dtype; with `return_last_state` the pair of it and the
        states after the last token visited, ``(sequences, dim, states)``, float32 or complex64 (double for
        double inputs).

    Raises:
        TypeError: an argument that is not a tensor, or of a dtype that is not one of the above.
        ValueError: a shape, device or value that is not one of the above.
        NotImplementedError: the gradient of a gradient.

    All floating point tensors but A may be of other precisions: delta, z and a changing B and C are cast to
    u's dtype, and D, delta_bias, initial_state and a constant B and C to A's, or float32 under a complex A.
    float16 and bfloat16 A's become float32. float64 does not mix with others. Autocast changes nothing: u's
    dtype decides.

    Gradients flow to all floating point inputs, from both outputs, and are the same from run to run. Checking
    the values of `cu_seqlens` and `order` waits for the device. vmap and torch.func.grad are not supported.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752);
    positional arguments as mamba_ssm's selective_scan_fn.
    """
    for name, value in (("u", u), ("delta", delta), ("A", A), ("B", B), ("C", C)):
        check_tensor(name, value)
    check_dtype("u", u, FLOATS)
    if u.dim() != 3 or u.shape[1] == 0:
        raise ValueError(f"u must have shape (batch, dim, length), dim > 0, got {tuple(u.shape)}")
    A = _matching_weight(A, u)
    batch, dim, length = u.shape
    steps = (batch, dim, length)
    delta = _like_u("delta", delta, u)
    check_shape("delta", delta, steps, "(batch, dim, length)")
    if z is not None:
        check_tensor("z", z)
        z = _like_u("z", z, u)
        check_shape("z", z, steps, "(batch, dim, length)")
    B = _projection("B", B, u, A)
    C = _projection("C", C, u, A)
    B, C = _same_groups(B, C, dim)
    real = torch.float64 if u.dtype == torch.float64 else torch.float32
    if D is not None:
        D = _per_channel("D", D, u, real)
    if delta_bias is not None:
        delta_bias = _per_channel("delta_bias", delta_bias, u, real)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, u.device, "u")
        cu_seqlens = cu_seqlens.to(torch.int64)
        if batch != 1:
            raise ValueError(f"cu_seqlens needs a batch of 1, which holds all sequences, got {batch}")
    if order is not None:
        check_tensor("order", order)
        check_device("order", order, u.device, "u")
        check_dtype("order", order, INTEGERS)
        order = order.to(torch.int64)
        if tuple(order.shape) not in ((length,), (batch, length)):
            raise ValueError(
                f"order must have shape (length,) = ({length},) or (batch, length) = ({batch}, {length}), "
                f"got {tuple(order.shape)}"
            )
    if initial_state is not None:
        check_tensor("initial_state", initial_state)
        initial_state = _cast("initial_state", initial_state, A.dtype)
        sequences = sequence_count(batch, cu_seqlens)
        check_shape("initial_state", initial_state, (sequences, *A.shape), "(sequences, dim, states)")
        check_device("initial_state", initial_state, u.device, "u")
    out, last_state = ops.selective_scan(
        (u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, order),
        bool(delta_softplus),
        bool(reverse),
        bool(return_last_state),
    )
    return (out, last_state) if return_last_state else out


_CASTS = {
    torch.float64: (torch.float64,),
    torch.float32: (torch.float32, torch.float16, torch.bfloat16),
    torch.float16: (torch.float16, torch.float32, torch.bfloat16),
    torch.bfloat16: (torch.bfloat16, torch.float32, torch.float16),
    torch.complex64: (torch.complex64, torch.float32, torch.float16, torch.bfloat16),
    torch.complex128: (torch.complex128, torch.float64),
}


def _cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """The value in a dtype that is near enough to it."""
    if value.dtype == dtype:
        return value
    check_dtype(name, value, _CASTS[dtype])
    return value.to(dtype)


def _like_u(name: str, value: Tensor, u: Tensor) -> Tensor:
    check_device(name, value, u.device, "u")
    return _cast(name, value, u.dtype)


def _matching_weight(A: Tensor, u: Tensor) -> Tensor:
    check_device("A", A, u.device, "u")
    if A.dim() != 2 or A.shape[0] != u.shape[1]:
        raise ValueError(f"A must have shape (dim, states) = ({u.shape[1]}, states), got {tuple(A.shape)}")
    most = _backend.C.SELECTIVE_SCAN_MAX_STATES
    if not 1 <= A.shape[1] <= most:
        raise ValueError(f"A must have 1 to {most} states a channel, got {A.shape[1]}")
    if u.dtype == torch.float64:
        check_dtype("A", A, (torch.float64, torch.complex128))
        return A
    return A if A.dtype == torch.complex64 else _cast("A", A, torch.float32)


def _projection(name: str, value: Tensor, u: Tensor, A: Tensor) -> Tensor:
    """B or C, cast; which of its three shapes it has is told by its rank."""
    check_device(name, value, u.device, "u")
    batch, _, length = u.shape
    if value.dim() == 2:
        check_shape(name, value, A.shape, "(dim, states)")
        return _cast(name, value, A.dtype)
    if value.is_complex():
        raise TypeError(
            f"{name} must be real where it changes with the token, got {value.dtype}: give its real and "
            f"imaginary parts alternating, torch.view_as_real({name}).flatten(-2)"
        )
    numbers = 2 * length if A.is_complex() else length
    last = "2 * length" if A.is_complex() else "length"
    expected: tuple[int, ...] = (batch, A.shape[1], numbers)
    axes = f"(batch, states, {last})"
    if value.dim() == 4:
        expected, axes = (batch, value.shape[1], *expected[1:]), f"(batch, groups, states, {last})"
    check_shape(name, value, expected, axes)
    return _cast(name, value, u.dtype)


def _same_groups(B: Tensor, C: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Lets the one group of B serve several groups of C, and the other way round."""
    groups_B, groups_C = _groups("B", B, dim), _groups("C", C, dim)
    if groups_B == groups_C or B.dim() == 2 or C.dim() == 2:
        return B, C
    if groups_B == 1:
        return _expand(B, groups_C), C
    if groups_C == 1:
        return B, _expand(C, groups_B)
    raise ValueError(
        f"B and C must have equally many groups, or one of them 1, got {groups_B} and {groups_C}"
    )


def _groups(name: str, value: Tensor, dim: int) -> int:
    groups = value.shape[1] if value.dim() == 4 else 1
    if groups == 0 or dim % groups != 0:
        raise ValueError(f"{name} has {groups} groups, which do not divide the {dim} channels of u")
    return groups


def _expand(value: Tensor, groups: int) -> Tensor:
    grouped = value if value.dim() == 4 else value.unsqueeze(1)
    return grouped.expand(-1, groups, -1, -1)


def _per_channel(name: str, value: Tensor, u: Tensor, dtype: torch.dtype) -> Tensor:
    check_tensor(name, value)
    check_device(name, value, u.device, "u")
    check_shape(name, value, (u.shape[1],), "(dim,)")
    return _cast(name, value, dtype)
