"""A Mamba-2 block as torch ops: convolution, SSD scan, gated norm or gate, and the projections around them.

    tilewright::mamba2_inner_fwd  the result, final states (empty unless wanted), what the backward op needs
    tilewright::mamba2_inner_bwd  the gradients asked for

Each is one call of the extension. The kernels are those of `conv`, `ssd` and `norm`; each writes its gradient
where it belongs in that of zxbcdt, where autograd would have each make its own, and then copy them together.
Projections take part where our product is the faster one; where it is not, they are torch's, around the call.

Weights are of the dtypes that `mamba2.py` casts to.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _backend
from ..._library import define
from ..dense import is_free, linear_gradients, product, suits
from .norm import in_rows
from .sequences import kept_chunks

_INPUTS = (
    "Tensor input, Tensor? in_weight, Tensor? in_bias, Tensor? out_weight, Tensor? out_bias, "
    "Tensor conv_weight, Tensor? conv_bias, Tensor A, Tensor D, Tensor? dt_bias, Tensor? norm_weight, "
    "Tensor? initial_states, Tensor? seq_idx, int groups, bool A_is_log, bool silu, float dt_min, "
    "float dt_max, int norm_group, bool norm_before_gate"
)
_DIFFERENTIABLE = 12  # of the inputs, the first ones
_KEPT = ("zxbcdt", "inner", "xBC", "chunk_states", "y", "rstd", "rate")  # what backward needs beside them


class _Block(NamedTuple):
    """The inputs in the order of the schema."""

    input: Tensor  # of in_proj, or zxbcdt
    in_weight: Tensor | None
    in_bias: Tensor | None
    out_weight: Tensor | None
    out_bias: Tensor | None
    conv_weight: Tensor  # (channels, width), or with an axis of one between, as torch.nn.Conv1d has it
    conv_bias: Tensor | None
    A: Tensor
    D: Tensor
    dt_bias: Tensor | None
    norm_weight: Tensor | None
    initial_states: Tensor | None
    seq_idx: Tensor | None
    groups: int
    A_is_log: bool
    silu: bool
    dt_min: float
    dt_max: float
    norm_group: int
    norm_before_gate: bool

    def columns(self) -> int:
        """Of zxbcdt."""
        return self.input.shape[2] if self.in_weight is None else self.in_weight.shape[0]

    def options(self) -> tuple[Any, ...]:
        """As the kernels take them."""
        return (self.groups, *self[-5:])

    def step_size(self, zxbcdt: Tensor) -> Tensor | None:
        """dt as wide as A; None where it can be read in its place."""
        if zxbcdt.dtype == self.A.dtype:
            return None
        return zxbcdt[..., -self.A.shape[0] :].to(self.A.dtype)


_INPUT_COUNT = len(_Block._fields)
_NAMES = _Block._fields[: _DIFFERENTIABLE + 1]


def _multiplies() -> bool:
    """Whether the extension's call may do products."""
    return is_free() and not _backend.is_emulated()


def _dense(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _scratch_like(x: Tensor) -> Callable[[int], Tensor]:
    return lambda count: x.new_empty(count, dtype=torch.uint8)


def _empty(block: _Block, return_final_states: bool, keep_y: bool) -> tuple[Tensor, ...]:
    """The result, the final states and what is kept, by the names in `_KEPT`: unwritten, but for the rate."""
    x, (heads,) = block.input, block.A.shape
    channels = block.conv_weight.shape[0]
    dim = block.columns() - channels - heads
    batch, length = x.shape[:2]
    head_dim, states = dim // heads, (channels - dim) // (2 * block.groups)
    normed, projected = block.norm_weight is not None, block.out_weight is not None
    wide = block.A.dtype

    def rows(width: int, wanted: bool = True) -> Tensor:
        return x.new_empty((batch, length, width) if wanted else (0,))

    return (
        rows(dim if block.out_weight is None else block.out_weight.shape[0]),
        x.new_empty((batch, heads, head_dim, states) if return_final_states else (0,), dtype=wide),
        rows(block.columns(), block.in_weight is not None),
        rows(dim, projected),
        rows(channels),
        x.new_empty((kept_chunks(x, None), heads, states, head_dim), dtype=wide),
        rows(dim, normed or keep_y),
        x.new_empty(batch * length * (dim // block.norm_group) if normed else 0, dtype=wide),
        -torch.exp(block.A) if block.A_is_log else x.new_empty(0, dtype=wide),
    )


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    block = _Block(*arguments[:_INPUT_COUNT])
    eps, return_final_states, keep_y = arguments[_INPUT_COUNT:]
    results = list(_empty(block, return_final_states, keep_y))
    out, final_states, zxbcdt, inner, xBC, chunk_states, y, rstd, rate = results
    x = in_rows(block.input)
    if x.shape[0] == 0 or x.shape[1] == 0:
        if return_final_states:
            states = block.initial_states
            final_states.zero_() if states is None else final_states.copy_(states)
        return tuple(results)
    by_call = _multiplies()
    in_call = by_call and block.in_weight is not None and suits(x, block.in_weight)
    out_call = by_call and block.out_weight is not None and suits(inner, block.out_weight)
    if block.in_weight is None:
        zxbcdt = x
    elif not in_call:
        zxbcdt = results[2] = product(x, block.in_weight, block.in_bias)
    tensors: dict[str, Any] = dict(zip(_NAMES, block, strict=False))
    tensors |= {name: _dense(tensors[name]) for name in ("in_bias", "conv_bias", "out_bias")}
    tensors |= {
        "input": x, "in_weight": block.in_weight if in_call else None, "zxbcdt": zxbcdt, "xBC": xBC,
        "A": rate if block.A_is_log else block.A, "dt": block.step_size(zxbcdt),
        "out_weight": block.out_weight if out_call else None, "out": out if out_call else None,
        "inner": out if block.out_weight is None else inner, "chunk_states": chunk_states,
        "y": y if y.numel() else None, "rstd": rstd,
        "final_states": final_states if return_final_states else None,
    }  # fmt: skip
    _backend.C.mamba2_inner_fwd(tensors, _scratch_like(x), _backend.num_threads(), eps, *block.options())
    if block.out_weight is not None and not out_call:
        results[0] = product(inner, block.out_weight, block.out_bias)
    return tuple(results)


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    return _empty(_Block(*arguments[:_INPUT_COUNT]), *arguments[-2:])


def _backward(dout: Tensor, dfinal_states: Tensor | None, *arguments: Any) -> list[Tensor]:
    block, needed = _Block(*arguments[:_INPUT_COUNT]), arguments[-1]
    kept = dict(zip(_KEPT, arguments[_INPUT_COUNT:-1], strict=True))
    need = dict(zip(_NAMES, needed, strict=False))
    if dout.shape[0] == 0 or dout.shape[1] == 0:
        found = _without_tokens(block, dfinal_states)
    else:
        if kept["chunk_states"].shape[0] < kept_chunks(dout, None):  # a GPU's call, made again on a CPU
            eps = 0.0  # whatever: it is the states that are wanted
            again = _forward(*arguments[:_INPUT_COUNT], eps, False, False)
            kept["chunk_states"] = again[2 + _KEPT.index("chunk_states")]
        found = _with_tokens(block, kept, need, dout, dfinal_states)
    nothing = dout.new_empty(0)
    return [
        gradient if wanted and gradient is not None else nothing.new_empty(0)
        for wanted, gradient in ((need[name], found.get(name)) for name in _NAMES[:_DIFFERENTIABLE])
    ]


def _without_tokens(block: _Block, dfinal_states: Tensor | None) -> dict[str, Tensor | None]:
    inputs: tuple[Any, ...] = block[:_DIFFERENTIABLE]
    found = {
        name: None if value is None else torch.zeros_like(value)
        for name, value in zip(_NAMES, inputs, strict=False)
    }
    if dfinal_states is not None and block.initial_states is not None:
        found["initial_states"] = dfinal_states.clone()  # they are the initial ones
    return found


def _with_tokens(
    block: _Block, kept: dict[str, Tensor], need: dict[str, bool], dout: Tensor, dfinal_states: Tensor | None
) -> dict[str, Tensor | None]:
    """The gradients by their inputs' names, those that are not needed among them."""
    reaches_in = need["input"] or need["in_weight"] or need["in_bias"]
    of_conv = reaches_in or need["conv_weight"] or need["conv_bias"]
    of_scan = of_conv or any(need[name] for name in ("A", "D", "dt_bias", "initial_states"))
    of_inner, by_call = of_scan or need["norm_weight"], _multiplies()
    x, zxbcdt, dout = block.input, kept["zxbcdt"], in_rows(dout)
    found: dict[str, Tensor | None] = {}
    out_call = False
    if block.out_weight is not None:
        out_call = by_call and of_inner and suits(dout, block.out_weight.t())
        wanted = (of_inner and not out_call, need["out_weight"] and not out_call, need["out_bias"])
        inner, found["out_weight"], found["out_bias"] = linear_gradients(
            dout, kept["inner"], block.out_weight, wanted
        )
        dout = dout if inner is None else inner
    if not of_inner:
        return found
    in_call = False
    if block.in_weight is None:
        zxbcdt = in_rows(x)
    elif reaches_in and not need["in_bias"]:
        in_call = by_call and suits(zxbcdt, block.in_weight.t())
    wanted_of_call = {
        "input": in_call and need["input"], "in_weight": in_call and need["in_weight"],
        "out_weight": out_call and need["out_weight"], "conv_weight": of_conv, "conv_bias": of_conv,
        "A": of_scan, "D": of_scan, "dt_bias": of_scan, "norm_weight": True, "initial_states": of_scan,
    }  # fmt: skip
    inputs: dict[str, Any] = dict(zip(_NAMES, block, strict=False))
    written: dict[str, Any] = {
        name: inputs[name].new_empty(inputs[name].shape) if wanted and inputs[name] is not None else None
        for name, wanted in wanted_of_call.items()
    }
    dzxbcdt = None if in_call else zxbcdt.new_empty(zxbcdt.shape)
    dt = block.step_size(zxbcdt)
    ddt = None if dt is None else torch.empty_like(dt)
    tensors: dict[str, Any] = inputs | kept | {f"d{name}": t for name, t in written.items()}
    tensors |= {
        "input": in_rows(x) if written["in_weight"] is not None else None,
        "in_weight": block.in_weight if in_call else None, "zxbcdt": zxbcdt,
        "conv_bias": _dense(block.conv_bias),
        "A": kept["rate"] if block.A_is_log else block.A, "dt": dt, "ddt": ddt, "dzxbcdt": dzxbcdt,
        "out_weight": block.out_weight if out_call else None, "dout": dout, "dfinal_states": dfinal_states,
    }  # fmt: skip
    _backend.C.mamba2_inner_bwd(tensors, _scratch_like(x), _backend.num_threads(), *block.options())
    found |= {name: gradient for name, gradient in written.items() if gradient is not None}
    if block.A_is_log and of_scan:
        found["A"] = written["A"] * kept["rate"]
    if ddt is not None and dzxbcdt is not None:
        dzxbcdt[..., -ddt.shape[2] :] = ddt
    if block.in_weight is None:
        found["input"] = dzxbcdt
    elif dzxbcdt is not None:
        wanted = (need["input"], need["in_weight"], need["in_bias"])
        found["input"], found["in_weight"], found["in_bias"] = linear_gradients(
            dzxbcdt, x, block.in_weight, wanted
        )
    return found


def _fake_backward(dout: Tensor, dfinal_states: Tensor | None, *arguments: Any) -> list[Tensor]:
    inputs, needed = arguments[:_DIFFERENTIABLE], arguments[-1]
    return [
        value.new_empty(value.shape) if wanted else dout.new_empty(0)
        for value, wanted in zip(inputs, needed, strict=True)
    ]


define(
    f"mamba2_inner_fwd({_INPUTS}, float eps, bool return_final_states, bool keep_y) "
    f"-> ({', '.join(['Tensor'] * (2 + len(_KEPT)))})",
    _forward,
    _fake_forward,
)
define(
    f"mamba2_inner_bwd(Tensor dout, Tensor? dfinal_states, {_INPUTS}, "
    f"{', '.join(f'Tensor {name}' for name in _KEPT)}, bool[] needed) -> Tensor[]",
    _backward,
    _fake_backward,
)

_fwd = torch.ops.tilewright.mamba2_inner_fwd.default
_bwd = torch.ops.tilewright.mamba2_inner_bwd.default


class Mamba2Inner(torch.autograd.Function):
    """(out, final_states) of the op's tensors, in their order, and its options, up to return_final_states."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Runs the op and keeps its inputs and what lies between its kernels."""
        tensors, options = list(arguments[:-1]), arguments[-1]
        out, final_states, *others = _fwd(*tensors, *options, True)
        kept = list(others)
        # What only the gradient of a projection's weight is made of is not kept for one that is frozen.
        x, in_weight = tensors[:2]
        if in_weight is not None and not ctx.needs_input_grad[1]:
            tensors[0] = x.new_empty(1).expand(x.shape)
        if not ctx.needs_input_grad[3]:
            kept[_KEPT.index("inner")] = x.new_empty(0)
        ctx.save_for_backward(*tensors, *kept)
        ctx.options, ctx.shape = options[:-2], out.shape
        ctx.set_materialize_grads(False)
        ctx.has_final_states = options[-1]
        if not options[-1]:
            ctx.mark_non_differentiable(final_states)
        return out, final_states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the differentiable inputs."""
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "a Mamba-2 block has no second derivative: call backward without create_graph"
            )
        saved = ctx.saved_tensors
        inputs, kept = saved[: -len(_KEPT)], saved[-len(_KEPT) :]
        dout, dfinal_states = grads[0], grads[1] if ctx.has_final_states else None
        if dout is None:
            dout = inputs[0].new_zeros(()).expand(ctx.shape)
        if dfinal_states is not None:
            dfinal_states = dfinal_states.contiguous()
        needed = list(ctx.needs_input_grad[:_DIFFERENTIABLE])
        kind = dout.device.type
        mixes = torch.is_autocast_enabled(kind)  # then torch's products would not be of the op's dtype
        with torch.autocast(kind, enabled=False) if mixes else nullcontext():
            found = _bwd(dout, dfinal_states, *inputs, *ctx.options, *kept, needed)
        results = [gradient if wanted else None for gradient, wanted in zip(found, needed, strict=True)]
        return (*results, *[None] * (len(ctx.needs_input_grad) - _DIFFERENTIABLE))
