"""A Mamba block between its two projections, as one differentiable step that keeps little for backward."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .._checks import FLOATS, check_device, check_dtype, check_shape, check_tensor
from .._library import differentiates
from .conv import MAX_WIDTH
from .dense import linear, product
from .ops import conv, selective  # noqa: F401  (they register the ops used below)

_conv_fwd = torch.ops.tilewright.causal_conv1d_fwd.default
_conv_bwd = torch.ops.tilewright.causal_conv1d_bwd.default
_scan_fwd = torch.ops.tilewright.selective_scan_fwd.default
_scan_bwd = torch.ops.tilewright.selective_scan_bwd.default


def mamba_inner(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Runs a Mamba block from the output of its first projection to that of its last.

        x, z = the two halves of xz's channels
        u = silu(causal_conv1d(x))
        dt, B, C = parts of x_proj_weight @ u
        delta = delta_proj_weight @ dt
        y = selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        out = out_proj_weight @ y + out_proj_bias

    Args:
        xz: ``(batch, 2 * dim, length)``, any strides; a projection's output, transposed, is read as it is.
        conv1d_weight: ``(dim, 1, width)`` or ``(dim, width)``, width 1 to 8.
        conv1d_bias: ``(dim,)``.
        x_proj_weight: ``(rank + 2 * states, dim)``; for complex A states count twice (real, imaginary).
        delta_proj_weight: ``(dim, rank)``.
        out_proj_weight: ``(features, dim)``.
        out_proj_bias: ``(features,)``.
        A: ``(dim, states)``, float32 or complex64 (float64 or complex128 with a float64 xz).
        B, C: as for :func:`selective_scan`, instead of those computed from u.
        D, delta_bias: ``(dim,)``.
        B_proj_bias, C_proj_bias: ``(states,)``, added to the computed B and C.
        delta_softplus: whether the step size goes through softplus.
        checkpoint_lvl: 0 keeps u and delta for the backward pass, 1 computes them again there.
        b_rms_weight, c_rms_weight: ``(states,)``: B and C go through an RMS norm with these weights.
        dt_rms_weight: the same for the step size. ``(dim,)``: after delta_proj_weight, as mamba_ssm does.
            ``(rank,)``, if rank is not dim: before it, as the FalconMamba and Jamba models were trained.
        b_c_dt_rms_eps: of these norms.

    Returns:
        ``(batch, length, features)``.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device than these.
        NotImplementedError: the gradient of a gradient.

    Under autocast xz and the projections get its dtype; A, D, delta_bias and the recurrence stay float32.
    Gradients flow to all tensors, those of the norms' weights and through the norms included.

    Source: Gu and Dao (arXiv 2312.00752); arguments as mamba_ssm's mamba_inner_fn.
    """
    for name, value in (
        ("xz", xz), ("conv1d_weight", conv1d_weight), ("x_proj_weight", x_proj_weight),
        ("delta_proj_weight", delta_proj_weight), ("out_proj_weight", out_proj_weight), ("A", A),
    ):  # fmt: skip
        check_tensor(name, value)
    if out_proj_bias is not None:
        check_tensor("out_proj_bias", out_proj_bias)
        check_dtype("out_proj_bias", out_proj_bias, FLOATS)
    device = xz.device.type
    if torch.is_autocast_enabled(device) and xz.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        xz, out_proj_weight = xz.to(dtype), out_proj_weight.to(dtype)
        x_proj_weight, delta_proj_weight = x_proj_weight.to(dtype), delta_proj_weight.to(dtype)
        out_proj_bias = None if out_proj_bias is None else out_proj_bias.to(dtype)
    if out_proj_bias is not None:
        out_proj_bias = out_proj_bias.to(xz.dtype)
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"checkpoint_lvl must be 0 or 1, got {checkpoint_lvl!r}")
    tensors = _Tensors(
        xz, conv1d_weight.squeeze(1) if conv1d_weight.dim() == 3 else conv1d_weight, conv1d_bias,
        x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, _wide(A), B, C, D, delta_bias,
        B_proj_bias, C_proj_bias, b_rms_weight, c_rms_weight, dt_rms_weight,
    )  # fmt: skip
    _check(tensors)
    tensors = _cast(tensors)
    eps = float(b_c_dt_rms_eps)
    with torch.autocast(device, enabled=False):
        if differentiates(*tensors):
            result: Tensor = _MambaInner.apply(delta_softplus, checkpoint_lvl > 0, eps, *tensors)  # type: ignore[no-untyped-call]
            return result
        return _forward(tensors, delta_softplus, eps, keep=False)[0]


class _Tensors(NamedTuple):
    """The arguments that have gradients, in this order."""

    xz: Tensor
    conv_weight: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_proj: Tensor
    out_proj: Tensor
    out_bias: Tensor | None
    A: Tensor
    B: Tensor | None
    C: Tensor | None
    D: Tensor | None
    dt_bias: Tensor | None
    B_bias: Tensor | None
    C_bias: Tensor | None
    b_rms: Tensor | None
    c_rms: Tensor | None
    dt_rms: Tensor | None

    def numbers(self) -> int:
        """Columns of x_proj's output that one of B and C takes."""
        return self.A.shape[1] * (2 if self.A.is_complex() else 1)

    def norm_before(self) -> Tensor | None:
        """The weight of a norm of the step size before its projection."""
        return None if self.dt_rms is None or self.dt_rms.shape[0] == self.dt_proj.shape[0] else self.dt_rms

    def norm_after(self) -> Tensor | None:
        """The weight of one behind it."""
        return None if self.dt_rms is None or self.dt_rms.shape[0] != self.dt_proj.shape[0] else self.dt_rms


class _MambaInner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, softplus: bool, recompute: bool, eps: float, *arguments: Tensor | None) -> Tensor:
        tensors = _Tensors(*arguments)  # type: ignore[arg-type]
        out, u, delta, x_dbl, y, starts = _forward(tensors, softplus, eps, keep=True)
        kept = (None, None) if recompute else (u, delta)
        ctx.save_for_backward(*arguments, x_dbl, y, starts, *kept)
        ctx.softplus, ctx.eps = softplus, eps
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError("mamba_inner cannot be differentiated twice")
        *arguments, x_dbl, y, starts, u, delta = ctx.saved_tensors
        tensors, needed = _Tensors(*arguments), list(ctx.needs_input_grad[3:])
        with torch.autocast(dout.device.type, enabled=False):
            gradients = _backward(tensors, dout, x_dbl, y, starts, u, delta, ctx.softplus, ctx.eps, needed)
        return None, None, None, *gradients


def _forward(t: _Tensors, softplus: bool, eps: float, keep: bool) -> tuple[Tensor, ...]:
    """The output, and what backward needs: u, delta, x_dbl, the scan's output and its chunk states."""
    x, z = t.xz.chunk(2, dim=1)
    u = _conv_fwd(x, t.conv_weight, t.conv_bias, None, None, True, False)[0]
    x_dbl = product(u.transpose(1, 2), t.x_proj)
    delta = _step_size(t, x_dbl, eps)[2]
    B, C = _maps(t, x_dbl, eps)
    y, _, starts = _scan_fwd(
        u, delta.transpose(1, 2), t.A, B, C, t.D, z, t.dt_bias, None, None, None, softplus, False, False, keep
    )
    return linear(y.transpose(1, 2), t.out_proj, t.out_bias), u, delta, x_dbl, y, starts


def _backward(
    t: _Tensors, dout: Tensor, x_dbl: Tensor, y: Tensor, starts: Tensor,
    u: Tensor | None, delta: Tensor | None, softplus: bool, eps: float, needed: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    need = _Tensors(*needed)  # type: ignore[arg-type]
    x, z = t.xz.chunk(2, dim=1)
    if u is None:
        u = _conv_fwd(x, t.conv_weight, t.conv_bias, None, None, True, False)[0]
    dt, before, after = _step_size(t, x_dbl, eps)
    delta = after if delta is None else delta
    B, C = _maps(t, x_dbl, eps)

    dy = product(dout, t.out_proj.t())
    dout_proj = _weight_gradient(dout, y.transpose(1, 2)) if need.out_proj else None
    dout_bias = dout.sum((0, 1)) if need.out_bias else None

    # The scan's own inputs are u, delta, B, C, z; a given B or C has its gradient from here.
    optional = [t.D is not None, True, t.dt_bias is not None, False]
    found = _scan_bwd(
        dy.transpose(1, 2), None, u, delta.transpose(1, 2), t.A, B, C, t.D, z, t.dt_bias, None, None, None,
        starts, softplus, False, [True] * 5 + optional,
    )  # fmt: skip
    du, ddelta, dA, dB, dC = found[:5]
    rest = iter(found[5:])
    dD = next(rest) if t.D is not None else None
    dz = next(rest)
    dbias = next(rest) if t.dt_bias is not None else None

    dafter = ddelta.transpose(1, 2)
    dbefore, ddt_rms = dafter, None
    if (weight := t.norm_after()) is not None:
        dbefore, ddt_rms = _rms_gradient(before, weight, eps, dafter)
    ddt = product(dbefore, t.dt_proj.t())
    ddt_proj = _weight_gradient(dbefore, dt) if need.dt_proj else None
    rank, numbers = t.dt_proj.shape[1], t.numbers()
    if (weight := t.norm_before()) is not None:
        ddt, ddt_rms = _rms_gradient(x_dbl[..., :rank], weight, eps, ddt)

    dx_dbl = torch.zeros_like(x_dbl) if t.B is not None or t.C is not None else torch.empty_like(x_dbl)
    dx_dbl[..., :rank] = ddt
    dB_bias = db_rms = dC_bias = dc_rms = None
    if t.B is None:
        part = slice(rank, rank + numbers)
        dx_dbl[..., part], dB_bias, db_rms = _map_gradient(t.A, dB, x_dbl[..., part], t.B_bias, t.b_rms, eps)
    if t.C is None:
        part = slice(x_dbl.shape[-1] - numbers, None)
        dx_dbl[..., part], dC_bias, dc_rms = _map_gradient(t.A, dC, x_dbl[..., part], t.C_bias, t.c_rms, eps)

    dx_proj = _weight_gradient(dx_dbl, u.transpose(1, 2)) if need.x_proj else None
    du = (du.transpose(1, 2) + product(dx_dbl, t.x_proj.t())).transpose(1, 2)
    dx, dconv_weight, dconv_bias, _ = _conv_bwd(du, None, x, t.conv_weight, t.conv_bias, None, None, True)
    dxz = torch.cat((dx, dz), dim=1) if need.xz else None
    gradients = (
        dxz, dconv_weight, dconv_bias, dx_proj, ddt_proj, dout_proj, dout_bias, dA, dB, dC, dD, dbias,
        dB_bias, dC_bias, db_rms, dc_rms, ddt_rms,
    )  # fmt: skip
    return tuple(gradient if wanted else None for gradient, wanted in zip(gradients, needed, strict=True))


def _step_size(t: _Tensors, x_dbl: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Its low-rank form, and it before and after a norm behind the projection; all (batch, length, ...)."""
    dt = x_dbl[..., : t.dt_proj.shape[1]]
    if (weight := t.norm_before()) is not None:
        dt = _rms(dt, weight, eps)
    before = product(dt, t.dt_proj)
    if (weight := t.norm_after()) is not None:
        return dt, before, _rms(before, weight, eps)
    return dt, before, before


def _maps(t: _Tensors, x_dbl: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """B and C as the scan takes them: given ones, or (batch, states, length) views of x_dbl."""
    rank, numbers = t.dt_proj.shape[1], t.numbers()
    B, C = t.B, t.C
    if B is None:
        B = _map(t.A, x_dbl[..., rank : rank + numbers], t.B_bias, t.b_rms, eps)
    if C is None:
        C = _map(t.A, x_dbl[..., -numbers:], t.C_bias, t.c_rms, eps)
    return B, C


def _map(A: Tensor, columns: Tensor, bias: Tensor | None, rms: Tensor | None, eps: float) -> Tensor:
    if bias is not None:
        columns = columns + bias.to(columns.dtype)
    if rms is not None:
        columns = _rms(columns, rms, eps)
    if A.is_complex():  # real and imaginary parts alternate along the last axis
        return torch.unflatten(columns, -1, (-1, 2)).transpose(1, 2).flatten(2)
    return columns.transpose(1, 2)


def _map_gradient(
    A: Tensor, gradient: Tensor, columns: Tensor, bias: Tensor | None, rms: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the columns, the bias and the norm's weight."""
    if A.is_complex():
        gradient = torch.unflatten(gradient, -1, (-1, 2)).transpose(1, 2).flatten(2)
    else:
        gradient = gradient.transpose(1, 2)
    drms = None
    if rms is not None:
        shifted = columns if bias is None else columns + bias.to(columns.dtype)
        gradient, drms = _rms_gradient(shifted, rms, eps, gradient)
    dbias = None if bias is None else gradient.sum((0, 1)).to(bias.dtype)
    return gradient, dbias, drms


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def _rms_gradient(x: Tensor, weight: Tensor, eps: float, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight; the norm's scale depends on every entry of a row."""
    wide, g = _wide(x), _wide(gradient)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normal = wide * scale
    dweight = (g * normal).sum((0, 1)).to(weight.dtype)
    g = g * weight
    return (scale * (g - normal * (g * normal).mean(-1, keepdim=True))).to(x.dtype), dweight


def _weight_gradient(gradient: Tensor, values: Tensor) -> Tensor:
    """Of a linear map's weight: (batch, length, outputs) and (batch, length, inputs) -> (outputs, inputs)."""
    return product(gradient.flatten(0, 1).mT, values.flatten(0, 1).mT)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _cast(t: _Tensors) -> _Tensors:
    """Each tensor in the dtype that the kernels and the gradients above count on."""
    real = torch.float64 if t.xz.dtype == torch.float64 else torch.float32
    weight = {name: _to(getattr(t, name), real) for name in ("D", "dt_bias", "b_rms", "c_rms", "dt_rms")}
    given = {
        name: _to(value, (t.A.dtype if value.dim() == 2 else t.xz.dtype))
        for name in ("B", "C")
        if (value := getattr(t, name)) is not None
    }
    bias = t.conv_bias
    if bias is not None and bias.dtype != t.conv_weight.dtype:
        weight["conv_weight"], weight["conv_bias"] = t.conv_weight.float(), bias.float()
    changed = {**weight, **given}
    return _Tensors(*[changed.get(name, value) for name, value in zip(_Tensors._fields, t)])  # type: ignore[arg-type]  # noqa: B905


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _check(t: _Tensors) -> None:
    """Refuses what does not fit together, in the names of the public function."""
    names = (
        "xz", "conv1d_weight", "conv1d_bias", "x_proj_weight", "delta_proj_weight", "out_proj_weight",
        "out_proj_bias", "A", "B", "C", "D", "delta_bias", "B_proj_bias", "C_proj_bias", "b_rms_weight",
        "c_rms_weight", "dt_rms_weight",
    )  # fmt: skip
    for name, value in zip(names, t, strict=True):
        if value is not None:
            check_tensor(name, value)
            check_device(name, value, t.xz.device, "xz")
    check_dtype("xz", t.xz, FLOATS)
    if t.xz.dim() != 3 or t.xz.shape[1] % 2 or t.xz.shape[1] == 0:
        raise ValueError(f"xz must have shape (batch, 2 * dim, length), got {tuple(t.xz.shape)}")
    dim = t.xz.shape[1] // 2
    double = t.xz.dtype == torch.float64
    weights = (torch.float64, torch.complex128) if double else (torch.float32, torch.complex64)
    check_dtype("A", t.A, weights)
    for name, value in (("A", t.A), ("conv1d_weight", t.conv_weight), ("delta_proj_weight", t.dt_proj)):
        if value.dim() != 2 or value.shape[0] != dim:
            raise ValueError(f"{name} must have dim = {dim} rows, got shape {tuple(value.shape)}")
    if not 1 <= t.conv_weight.shape[1] <= MAX_WIDTH:
        raise ValueError(f"conv1d_weight must have a width of 1 to {MAX_WIDTH}, got {t.conv_weight.shape[1]}")
    for name, value in (("x_proj_weight", t.x_proj), ("out_proj_weight", t.out_proj)):
        if value.dim() != 2 or value.shape[1] != dim:
            raise ValueError(f"{name} must have dim = {dim} columns, got shape {tuple(value.shape)}")
    for index in range(3, 6):
        check_dtype(names[index], cast(Tensor, t[index]), (t.xz.dtype,))
    for index in (1, 2, *range(10, len(t))):
        if (given := t[index]) is not None:
            check_dtype(names[index], given, FLOATS)
    rank, numbers = t.dt_proj.shape[1], t.numbers()
    wanted = rank + numbers * ((t.B is None) + (t.C is None))
    if t.x_proj.shape[0] < wanted:
        raise ValueError(
            f"x_proj_weight must have {wanted} rows ({rank} for the step size, {numbers} for each of B and C "
            f"that is not given), got {t.x_proj.shape[0]}"
        )
    lengths = {2: dim, 6: t.out_proj.shape[0], 10: dim, 11: dim, **dict.fromkeys(range(12, 16), numbers)}
    for index, length in lengths.items():
        if t[index] is not None:
            check_shape(names[index], t[index], (length,), f"({length},)")  # type: ignore[arg-type]
    if t.dt_rms is not None and tuple(t.dt_rms.shape) not in ((dim,), (rank,)):
        raise ValueError(f"dt_rms_weight must have shape ({dim},) or ({rank},), got {tuple(t.dt_rms.shape)}")
    _check_given(t, dim)


def _check_given(t: _Tensors, dim: int) -> None:
    batch, length, states = t.xz.shape[0], t.xz.shape[2], t.A.shape[1]
    last = length * (2 if t.A.is_complex() else 1)
    for name, value, bias, rms in (("B", t.B, t.B_bias, t.b_rms), ("C", t.C, t.C_bias, t.c_rms)):
        if value is None:
            continue
        if bias is not None or rms is not None:
            raise ValueError(
                f"{name} is given, so {name}_proj_bias and {name.lower()}_rms_weight have no effect"
            )
        shapes = [(dim, states), (batch, states, last)]
        if tuple(value.shape) not in shapes:
            raise ValueError(f"{name} must have shape {shapes[0]} or {shapes[1]}, got {tuple(value.shape)}")
