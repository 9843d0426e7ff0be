"""The Mamba layers of Hugging Face transformers, and the norms of their models.

Their own forward runs a Python loop over the tokens where mamba_ssm is not installed, copies channel-last
views into the layout its kernels want where it is, and, in a Mamba-1 layer with a cache, starts from a zero
state when more than one token comes. The forwards here read the views as they lie and go on from the cached
state.

The cache stays transformers' own (states.py): its conv state keeps the last `conv_kernel` inputs. A decode
step writes it and the recurrent state in place, so that their addresses last; where gradients are wanted it
goes the way of longer inputs instead, which has them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _backend, scan
from .._models import ORIGINAL
from ..nn.inference import conv_step
from ..nn.mamba import (
    can_fuse,
    can_step,
    parts_of_op,
    projected,
    runs_its_forward_alone,
    step_of,
    wide,
    without_bias,
)
from ..nn.packing import Packing, packing_of
from ..scan.conv import MAX_WIDTH
from ..scan.mamba2 import GatedNorm, mamba2_inner
from .instances import Layer, Methods
from .releases import SCANS_SINCE, older
from .states import States

_ARGUMENTS = ("hidden_states", "cache_params", "attention_mask")


def layer_of(cls: type) -> Layer | None:
    """How to swap this class; None for classes that are not known."""
    package, _, name = cls.__module__.rpartition(".")
    parent, _, family = package.rpartition(".")
    if parent != "transformers.models" or name != f"modeling_{family}":
        return None
    forward = _FORWARDS.get((family, cls.__name__))
    if forward is None:
        return None
    op = "ssd_chunk_scan" if forward is _mamba2_forward else "selective_scan"
    forward = _with_offloading_hooks(forward)
    if "cache_position" in _arguments(cls)[:3]:
        forward = _behind_position(forward)
    return Layer(op, {"forward": forward}, _obstacle)


def is_norm(cls: type) -> bool:
    """Whether this is the class of an RMS norm of these models, as `NORM_METHODS` computes it."""
    package, _, name = cls.__module__.rpartition(".")
    parent, _, family = package.rpartition(".")
    known = parent == "transformers.models" and name == f"modeling_{family}" and family in MODELS
    return known and cls.__name__ in _NORMS


def _obstacle(module: Any) -> str | None:
    """What about this mixer, or the transformers it comes from, our forward does not cover."""
    old = older(SCANS_SINCE)
    if old is not None:
        return old
    named = [name for name in _arguments(type(module)) if name != "cache_position"]
    if named[:1] != ["args"] and tuple(named[:3]) != _ARGUMENTS:  # 5.14 hides them behind a decorator
        return f"its forward is not the one of transformers (arguments {', '.join(_ARGUMENTS)})"
    if module.activation not in ("silu", "swish"):
        return f"its activation is {module.activation!r}; the convolution kernels have 'silu'"
    if module.conv_kernel_size > MAX_WIDTH:
        return f"its convolution is {module.conv_kernel_size} wide; the kernels have up to {MAX_WIDTH}"
    most = _backend.C.SELECTIVE_SCAN_MAX_STATES
    if module.ssm_state_size > most:
        return f"it has {module.ssm_state_size} states a channel; the kernels have up to {most}"
    return None


def _arguments(cls: type) -> list[str]:
    return list(inspect.signature(cls.forward).parameters)[1:]  # type: ignore[attr-defined]


@functools.cache
def _behind_position(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward with the order of arguments of transformers before 5.4."""

    @functools.wraps(forward)
    def reordered(
        self: Any,
        hidden_states: Tensor,
        cache_params: Any = None,
        cache_position: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *others: Any,
        **kwargs: Any,
    ) -> Any:
        kwargs["cache_position"] = cache_position
        return forward(self, hidden_states, cache_params, attention_mask, *others, **kwargs)

    vars(reordered).pop("__wrapped__")  # whose signature is another
    return reordered


@functools.cache
def _with_offloading_hooks(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Weights that are used without a call of their module are fetched by accelerate's hooks all the same."""
    names = ("conv1d", "dt_proj") if forward is _mamba_forward else ("conv1d",)

    @functools.wraps(forward)
    def hooked(self: Any, *arguments: Any, **kwargs: Any) -> Any:
        children = [self._modules[name] for name in names]
        children = [child for child in children if "_hf_hook" in vars(child)]
        for child in children:
            child._hf_hook.pre_forward(child)
        output = forward(self, *arguments, **kwargs)
        for child in reversed(children):
            child._hf_hook.post_forward(child, ())
        return output

    return hooked


def _mamba_forward(
    self: Any,
    hidden_states: Tensor,
    cache_params: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Mamba, FalconMamba and Jamba: projection, convolution, selective scan, gate, projection."""
    length = hidden_states.shape[1]
    mask = _padding(attention_mask, length)
    packing = _packing(kwargs, hidden_states)
    ends = _ends(packing, cache_params)
    states = _states(self, cache_params, kwargs, hidden_states)
    conv_state, state = _cached(states, length)
    if (
        conv_state is not None
        and state is not None
        and mask is None
        and can_step(self, hidden_states, conv_state)
    ):
        return step_of(self, hidden_states, conv_state, state, **_norms(self))
    xz = projected(self.in_proj, hidden_states)
    whole = cache_params is None and mask is None and packing is None
    if whole and can_fuse(self.x_proj, self.dt_proj, self.out_proj):
        return _fused_mamba(self, xz)

    x, z = xz.chunk(2, dim=-1)
    x, z = _masked(x, mask).transpose(1, 2), z.transpose(1, 2)
    weights = (-torch.exp(wide(self.A_log)), wide(self.D), wide(self.dt_proj.bias))
    if conv_state is not None and state is not None:
        u = conv_step(self.conv1d, x[..., 0], conv_state)
        u = u if mask is None else u * mask
        dt, B, C = _projected(self, u)
        A, D, bias = weights
        y = scan.selective_state_update(state, u, dt, A, B, C, D, z=z[..., 0], dt_bias=bias, dt_softplus=True)
        return projected(self.out_proj, y.unsqueeze(1))

    u = _masked(_conv(self, x, states, packing).transpose(1, 2), mask)
    dt, B, C = _projected(self, u)
    y = _scan(
        self, states, state, ends,
        u.transpose(1, 2), dt.transpose(1, 2), B.transpose(1, 2), C.transpose(1, 2), z, *weights,
    )  # fmt: skip
    return projected(self.out_proj, y.transpose(1, 2))


def _fused_mamba(self: Any, xz: Tensor) -> Tensor:
    """Training without cache and padding: intermediate results are computed again in the backward pass."""
    norms = _norms(self)
    if norms and norms["dt_rms_weight"] is None:
        norms["dt_rms_weight"] = norms["b_rms_weight"].new_ones(self.time_step_rank)
    return scan.mamba_inner(
        xz.transpose(1, 2), self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight,
        self.out_proj.weight, self.out_proj.bias, -torch.exp(wide(self.A_log)), D=wide(self.D),
        delta_bias=wide(self.dt_proj.bias), delta_softplus=True, **norms,
    )  # fmt: skip


def _norms(self: Any) -> dict[str, Any]:
    """Jamba's and FalconMamba's norms of dt, B and C, as our functions take them."""
    if not hasattr(self, "b_layernorm"):
        if not hasattr(self, "rms_eps"):
            return {}
        one = self.b_c_rms  # FalconMamba before transformers 5.15: norms without weights and modules
        return {
            "b_rms_weight": one,
            "c_rms_weight": one,
            "dt_rms_weight": None,
            "b_c_dt_rms_eps": self.rms_eps,
        }
    b, c, dt = self.b_layernorm.weight, self.c_layernorm.weight, self.dt_layernorm.weight
    if dt.shape[0] != self.time_step_rank:  # FalconMamba's norms have no weights, and dummies of any size
        dt = None
    eps = getattr(self.b_layernorm, "variance_epsilon", None) or self.b_layernorm.eps
    return {"b_rms_weight": b, "c_rms_weight": c, "dt_rms_weight": dt, "b_c_dt_rms_eps": eps}


def _projected(self: Any, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u (..., channels) -> the time step (..., channels), B and C (..., states) of every token."""
    sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
    dt, B, C = torch.split(projected(self.x_proj, u), sizes, dim=-1)
    if hasattr(self, "dt_layernorm"):
        dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
    elif hasattr(self, "rms_eps"):
        dt, B, C = (F.rms_norm(t.float(), t.shape[-1:], eps=self.rms_eps).to(t.dtype) for t in (dt, B, C))
    return without_bias(self.dt_proj, dt), B, C


def _zamba_forward(
    self: Any,
    hidden_states: Tensor,
    cache_params: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Zamba: Mamba with a projection a head, which is one scan with a group of B and C a head."""
    batch, length, _ = hidden_states.shape
    heads, width = self.n_mamba_heads, self.mamba_head_dim
    mask = _padding(attention_mask, length)
    packing = _packing(kwargs, hidden_states)
    ends = _ends(packing, cache_params)
    xz = projected(self.in_proj, hidden_states)
    xz = torch.unflatten(xz, -1, (self.intermediate_size, 2))  # a channel and its gate lie side by side
    x, z = _masked(xz[..., 0], mask).transpose(1, 2), xz[..., 1].transpose(1, 2)
    A, D, bias = -torch.exp(wide(self.A_log)), wide(self.D), wide(self.dt_proj_bias)
    states = _states(self, cache_params, kwargs, hidden_states)
    conv_state, state = _cached(states, length)
    if conv_state is not None and state is not None:
        u = conv_step(self.conv1d, x[..., 0], conv_state)
        u = u if mask is None else u * mask
        dt, B, C = _projected_by_head(self, u.unsqueeze(1))
        y = scan.selective_state_update(
            state, torch.unflatten(u, 1, (heads, width)), dt.view(batch, heads, width),
            A, B[:, 0], C[:, 0], D,
            z=torch.unflatten(z[..., 0], 1, (heads, width)), dt_bias=bias, dt_softplus=True,
        )  # fmt: skip
        return projected(self.out_proj, y.flatten(1).unsqueeze(1))

    u = _masked(_conv(self, x, states, packing).transpose(1, 2), mask)
    dt, B, C = _projected_by_head(self, u)
    y = _scan(
        self, states, state, ends,
        u.transpose(1, 2), dt.transpose(1, 2), B.permute(0, 2, 3, 1), C.permute(0, 2, 3, 1), z,
        A.flatten(0, 1), D.flatten(), bias.flatten(),
    )  # fmt: skip
    return projected(self.out_proj, y.transpose(1, 2))


def _projected_by_head(self: Any, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u (batch, length, channels) -> dt (batch, length, channels), B and C (batch, length, heads, states)."""
    heads = torch.unflatten(u, -1, (self.n_mamba_heads, self.mamba_head_dim))
    projected = torch.einsum("blhp,hrp->blhr", heads, self.x_proj_weight)
    sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
    dt, B, C = torch.split(projected, sizes, dim=-1)
    return torch.einsum("blhr,hpr->blhp", dt, self.dt_proj_weight).flatten(2), B, C


def _mamba2_forward(
    self: Any,
    hidden_states: Tensor,
    cache_params: Any = None,
    attention_mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Mamba-2 and its kin: projection, convolution, chunked scan, gated norm, projection."""
    length = hidden_states.shape[1]
    mask = _padding(attention_mask, length)
    packing = _packing({**kwargs, "seq_idx": seq_idx}, hidden_states)
    has_norm = _has_norm(self)
    norm = _gated_norm(self.norm) if has_norm else None
    if cache_params is None and mask is None and (norm is not None or not has_norm):
        return _mamba2_block(self, hidden_states, norm, None if packing is None else packing.seq_idx)
    zxbcdt = _mamba2_projected(self, hidden_states)
    z, xbc, dt = torch.split(zxbcdt, [self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
    xbc = _masked(xbc, mask)
    states = _states(self, cache_params, kwargs, hidden_states)
    conv_state, state = _cached(states, length)
    if conv_state is not None and state is not None:
        y = _mamba2_step(self, conv_state, state, xbc[:, 0], dt[:, 0], z[:, 0], mask).unsqueeze(1)
    else:
        xbc = _masked(_conv(self, xbc.transpose(1, 2), states, packing).transpose(1, 2), mask)
        x, B, C = _split_mamba2(self, xbc)
        scanned = scan.ssd_chunk_scan(
            x, dt, -torch.exp(wide(self.A_log)), B, C, self.chunk_size, D=self.D,
            z=None if has_norm else torch.unflatten(z, -1, (self.num_heads, self.head_dim)),
            dt_bias=self.dt_bias, initial_states=state, seq_idx=None if packing is None else packing.seq_idx,
            dt_softplus=True, dt_limit=_dt_limit(self), return_final_states=states is not None,
        )  # fmt: skip
        if states is None:
            y = cast(Tensor, scanned)
        else:
            y, state = scanned
            states.keep_recurrent(state)
        y = y.flatten(2)
    if has_norm:
        y = (norm or self.norm)(y, z).to(zxbcdt.dtype)
    return projected(self.out_proj, y)


def _mamba2_block(self: Any, hidden_states: Tensor, norm: GatedNorm | None, seq_idx: Tensor | None) -> Tensor:
    """A whole input as one step, with the projections that may be part of it."""
    in_proj, out_proj = parts_of_op(hidden_states, self.in_proj, self.out_proj)
    if hasattr(self, "ssm_in_multiplier"):
        in_proj = None
    x = hidden_states if in_proj is not None else _mamba2_projected(self, hidden_states)
    y, _ = mamba2_inner(
        x, self.conv1d.weight, self.conv1d.bias, self.A_log, self.D, self.dt_bias, self.num_heads,
        self.n_groups, norm, in_proj=in_proj, out_proj=out_proj, A_is_log=True, seq_idx=seq_idx,
        dt_limit=_dt_limit(self),
    )  # fmt: skip
    return y if out_proj is not None else projected(self.out_proj, y)


def _mamba2_projected(self: Any, hidden_states: Tensor) -> Tensor:
    """zxbcdt of every token."""
    if hasattr(self, "ssm_in_multiplier"):  # FalconH1
        hidden_states = projected(self.in_proj, hidden_states * self.ssm_in_multiplier)
        return cast(Tensor, hidden_states * self.mup_vector)
    return projected(self.in_proj, hidden_states)


def _mamba2_step(
    self: Any, conv_state: Tensor, state: Tensor, xbc: Tensor, dt: Tensor, z: Tensor, mask: Tensor | None
) -> Tensor:
    """One token of every sequence; writes both states."""
    heads, width = self.num_heads, self.head_dim
    xbc = conv_step(self.conv1d, xbc, conv_state)
    x, B, C = _split_mamba2(self, xbc if mask is None else xbc * mask)
    bias: Tensor | None = self.dt_bias
    low, high = _dt_limit(self)
    if low > 0 or high < float("inf"):  # as in a longer input, though transformers leaves this out
        dt, bias = F.softplus(dt.float() + wide(self.dt_bias)).clamp(low, high), None
    y = scan.selective_state_update(
        state, x, dt.unsqueeze(-1).expand(-1, -1, width),
        (-torch.exp(wide(self.A_log)))[:, None, None].expand(-1, width, self.ssm_state_size), B, C,
        self.D[:, None].expand(-1, width),
        z=None if _has_norm(self) else torch.unflatten(z, 1, (heads, width)),
        dt_bias=None if bias is None else bias[:, None].expand(-1, width), dt_softplus=bias is not None,
    )  # fmt: skip
    return y.flatten(1)


def _split_mamba2(self: Any, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the convolution made: x (..., heads, head_dim), B and C (..., groups, states), all views."""
    states = self.n_groups * self.ssm_state_size
    x, B, C = torch.split(xbc, [self.intermediate_size, states, states], dim=-1)
    x, groups = torch.unflatten(x, -1, (self.num_heads, self.head_dim)), (self.n_groups, self.ssm_state_size)
    return x, torch.unflatten(B, -1, groups), torch.unflatten(C, -1, groups)


def _dt_limit(self: Any) -> tuple[float, float]:
    """Between which numbers a step size stays."""
    if not _has_shortest_step(type(self)):
        return cast(tuple[float, float], self.time_step_limit)
    return self.config.time_step_min, float("inf")


def _has_shortest_step(cls: type) -> bool:
    """Whether a layer's step sizes are bounded from below alone, whatever limits its config has.

    transformers before 5.15 does that where it computes them itself, and leaves it to the config in a kernel.
    """
    return any(base.__name__ in ("Zamba2MambaMixer", "NemotronHMamba2Mixer") for base in cls.__mro__)


def _has_norm(self: Any) -> bool:
    return bool(getattr(self, "mamba_rms_norm", True))  # FalconH1 can do without


def _gated_norm(module: Any) -> GatedNorm | None:
    """What a gated norm computes; None where its class is not known, or calling it does more."""
    cls = type(module)
    known = cls.__name__ in _GATED_NORMS and cls.__module__.startswith("transformers.models.")
    if not (known and runs_its_forward_alone(module)):
        return None
    weight, own = module.weight, vars(module)  # asking for what it does not have costs microseconds
    group_size = own.get("group_size") or weight.shape[0] // own.get("n_groups", 1)  # FalconH1's are counted
    return GatedNorm(weight, own["variance_epsilon"], group_size, own.get("norm_before_gate", False))


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """The norm's one pass, which rounds once."""
    if hidden_states.dtype != self.weight.dtype or hidden_states.dtype == torch.float64:
        return getattr(type(self), ORIGINAL).forward(self, hidden_states)  # type: ignore[no-any-return]
    return scan.gated_rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)


def _scan(
    self: Any, states: States | None, state: Tensor | None, ends: Tensor | None,
    u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor, A: Tensor, D: Tensor, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """The scan of a whole input, on from the cached state, and back into the cache."""
    if states is None:
        return scan.selective_scan(u, dt, A, B, C, D, z, bias, True, cu_seqlens=ends)
    initial = None if state is None else state.reshape(-1, *A.shape)
    y, last = scan.selective_scan(u, dt, A, B, C, D, z, bias, True, True, initial_state=initial)
    if hasattr(self, "n_mamba_heads"):
        last = last.unflatten(1, (self.n_mamba_heads, self.mamba_head_dim))
    states.keep_recurrent(last)
    return y


def _conv(self: Any, x: Tensor, states: States | None, packing: Packing | None) -> Tensor:
    """The convolution of a whole input (batch, channels, length), with what the cache has before it."""
    length = x.shape[-1]
    if states is not None:
        x = states.keep_conv(x, self.conv_kernel_size)
    seq_idx = None if packing is None else packing.seq_idx
    weight = self.conv1d.weight.squeeze(1)
    y = scan.causal_conv1d(x, weight, self.conv1d.bias, seq_idx, activation="silu")
    return y if y.shape[-1] == length else y[..., -length:]


def _states(self: Any, cache_params: Any, kwargs: dict[str, Any], x: Tensor) -> States | None:
    """This layer's, of a model's cache and keyword arguments."""
    if cache_params is None:
        return None
    return States(cache_params, self.layer_idx, x.device, kwargs.get("cache_position"))


def _cached(states: States | None, length: int) -> tuple[Tensor | None, Tensor | None]:
    """Conv state, if a decode step may write it, and recurrent state."""
    if states is None or states.recurrent is None:
        return None, None
    if torch.is_grad_enabled():
        return None, states.recurrent.clone()  # backward needs it as it was, and the cache overwrites it
    return None if length != 1 or states.recording else states.conv, states.recurrent


def _packing(kwargs: dict[str, Any], hidden_states: Tensor) -> Packing | None:
    """From a model's keyword arguments; None where each row is one sequence."""
    return packing_of(kwargs.get("seq_idx"), kwargs.get("cu_seqlens"), hidden_states, "hidden_states")


def _ends(packing: Packing | None, cache_params: Any) -> Tensor | None:
    """Where a Mamba-1 layer's packed sequences start and end."""
    if packing is None:
        return None
    if cache_params is not None:
        raise NotImplementedError(
            "seq_idx and cu_seqlens do not go with a cache, which keeps one state a row"
        )
    return packing.ends()


def _padding(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """The mask of the tokens at hand, of one that may cover those before them too."""
    return None if attention_mask is None else attention_mask[:, -length:]


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros at padding, whose influence would otherwise last through the recurrence.

    Behind in_proj and behind the convolution: either may have a bias.
    """
    return x if mask is None else x * mask.unsqueeze(-1).to(x.dtype)


_GATED_NORMS = frozenset({
    "MambaRMSNormGated", "BambaRMSNormGated", "Zamba2RMSNormGated", "FalconH1RMSNormGated",
    "GraniteMoeHybridRMSNormGated", "NemotronHRMSNormGated",
})  # fmt: skip
_NORMS = frozenset({
    "MambaRMSNorm", "FalconMambaRMSNorm", "JambaRMSNorm", "ZambaRMSNorm", "Mamba2RMSNorm", "BambaRMSNorm",
    "Zamba2RMSNorm", "FalconH1RMSNorm", "GraniteMoeHybridRMSNorm", "NemotronHRMSNorm",
})  # fmt: skip
_FORWARDS = {  # by a model's name, which is that of its folder and file, and the class in it
    ("mamba", "MambaMixer"): _mamba_forward,
    ("falcon_mamba", "FalconMambaMixer"): _mamba_forward,
    ("jamba", "JambaMambaMixer"): _mamba_forward,
    ("zamba", "ZambaMambaMixer"): _zamba_forward,
    ("mamba2", "Mamba2Mixer"): _mamba2_forward,
    ("bamba", "BambaMixer"): _mamba2_forward,
    ("zamba2", "Zamba2MambaMixer"): _mamba2_forward,
    ("falcon_h1", "FalconH1Mixer"): _mamba2_forward,
    ("granitemoehybrid", "GraniteMoeHybridMambaLayer"): _mamba2_forward,
    ("nemotron_h", "NemotronHMamba2Mixer"): _mamba2_forward,
}
MODELS = frozenset(model for model, _ in _FORWARDS)
NORM_METHODS: Methods = {"forward": _norm_forward}
