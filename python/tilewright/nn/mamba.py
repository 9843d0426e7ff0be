"""Mamba: the selective state space block."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import _backend, scan
from .._checks import check_count, check_tensor, suggests_keywords
from .._models import is_plain_linear, original_class
from ..scan import dense
from ..scan.conv import MAX_WIDTH
from .inference import conv_step, keep_last, states_of
from .packing import packing_of

_STEP_SEQUENCES = 8  # more of them make the projections products of matrices, which libraries do better


@suggests_keywords
class Mamba(nn.Module):
    """Mamba's block: project, convolve, scan, gate, project; a stand-in for ``mamba_ssm.Mamba``.

    Parameters have mamba_ssm's names and shapes, so that its checkpoints load.

    Args:
        d_model: features of input and output.
        d_state: states of every channel, up to 256.
        d_conv: width of the convolution, up to 8.
        expand: channels inside, as a multiple of `d_model`.
        dt_rank: rank of the step size's projection; "auto": ``ceil(d_model / 16)``.
        dt_min, dt_max: the step size starts log-uniform between these, and not below `dt_init_floor`.
        dt_init: weights of its projection: "random" (uniform) or "constant".
        dt_scale: of these weights.
        dt_init_floor: see `dt_min`.
        conv_bias, bias: whether the convolution, and the outer projections, have biases.
        use_fast_path: whether a training step computes intermediate results again instead of keeping them.
        layer_idx: the layer's number in a model; needed with `inference_params`.
        device, dtype: of the parameters; A_log and D are float32 all the same.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dt_init not in ("random", "constant"):
            raise ValueError(f'dt_init must be "random" or "constant", got {dt_init!r}')
        check_count("d_model", d_model)
        check_count("d_state", d_state, _backend.C.SELECTIVE_SCAN_MAX_STATES)
        check_count("d_conv", d_conv, MAX_WIDTH)
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = width_of(expand, d_model)
        self.dt_rank = rank_of(dt_rank, d_model)
        self.use_fast_path, self.layer_idx, self.activation = use_fast_path, layer_idx, "silu"

        of: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **of)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias, **of
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **of)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **of)
        scale = dt_scale * self.dt_rank**-0.5
        with torch.no_grad():
            weight = self.dt_proj.weight
            weight.uniform_(-scale, scale) if dt_init == "random" else weight.fill_(scale)
            self.dt_proj.bias.copy_(initial_dt_bias(self.d_inner, dt_min, dt_max, dt_init_floor, device))
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]
        rates = torch.arange(1, d_state + 1, dtype=torch.float32, device=device).log()
        self.A_log = nn.Parameter(rates.repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner, dtype=torch.float32, device=device))
        for parameter in (self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **of)

    def forward(
        self,
        hidden_states: Tensor,
        inference_params: Any = None,
        *,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Maps ``(batch, length, d_model)`` to the same shape.

        Args:
            hidden_states: the input.
            inference_params: keeps the states between calls: an object with ``seqlen_offset`` (tokens seen so
                far) and ``key_value_memory_dict``, as mamba_ssm's InferenceParams. With an offset the input
                goes on where the last one ended, whatever its length.
            seq_idx: ``(1, length)``: the sequence that each token of packed ones belongs to.
            cu_seqlens: ``(sequences + 1,)``: where packed sequences start and end, increasing strictly from 0
                to the length, at which it looks. Give one of the two.
        """
        check_tokens("hidden_states", hidden_states, self.d_model)
        packing = packing_of(seq_idx, cu_seqlens, hidden_states, "hidden_states")
        if packing is not None and inference_params is not None:
            raise NotImplementedError("packed sequences do not go with inference_params")
        numbers, ends = (None, None) if packing is None else (packing.seq_idx, packing.ends())
        batch, length, _ = hidden_states.shape
        conv_state = ssm_state = None
        if inference_params is not None:
            conv_state, ssm_state = self._get_states_from_cache(inference_params, batch)
            if length == 1 and inference_params.seqlen_offset > 0 and not torch.is_grad_enabled():
                return self.step(hidden_states, conv_state, ssm_state)[0]
        xz = projected(self.in_proj, hidden_states).transpose(1, 2)
        A, D, bias = -torch.exp(wide(self.A_log)), wide(self.D), wide(self.dt_proj.bias)
        whole = conv_state is None and packing is None
        if whole and self.use_fast_path and can_fuse(self.x_proj, self.dt_proj, self.out_proj):
            return scan.mamba_inner(
                xz, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight,
                self.out_proj.weight, self.out_proj.bias, A, D=D, delta_bias=bias, delta_softplus=True,
            )  # fmt: skip
        x, z = xz.chunk(2, dim=1)
        before = initial = None
        if conv_state is not None and ssm_state is not None and inference_params.seqlen_offset > 0:
            # Copies: both are overwritten below, and a backward pass needs them as they were.
            before, initial = conv_state[..., 1:].clone(), ssm_state.clone()
        weight = self.conv1d.weight.squeeze(1)
        u = scan.causal_conv1d(x, weight, self.conv1d.bias, numbers, before, activation="silu")
        dt, B, C = self._projected(u.transpose(1, 2))
        arguments = (u, dt.transpose(1, 2), A, B.transpose(1, 2), C.transpose(1, 2), D, z, bias, True)
        if conv_state is None or ssm_state is None:
            y = scan.selective_scan(*arguments, cu_seqlens=ends)
        else:
            y, last = scan.selective_scan(*arguments, True, initial_state=initial)
            keep_last(conv_state, x, go_on=inference_params.seqlen_offset > 0)
            ssm_state.copy_(last)
        return projected(self.out_proj, y.transpose(1, 2))

    def step(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token, ``(batch, 1, d_model)``; both states are updated in place and returned."""
        check_tokens("hidden_states", hidden_states, self.d_model, one=True)
        if not torch.is_grad_enabled() and can_step(self, hidden_states, conv_state):
            return step_of(self, hidden_states, conv_state, ssm_state), conv_state, ssm_state
        x, z = projected(self.in_proj, hidden_states[:, 0]).chunk(2, dim=-1)
        u = conv_step(self.conv1d, x, conv_state)
        dt, B, C = self._projected(u)
        A, D, bias = -torch.exp(wide(self.A_log)), wide(self.D), wide(self.dt_proj.bias)
        y = scan.selective_state_update(ssm_state, u, dt, A, B, C, D, z=z, dt_bias=bias, dt_softplus=True)
        return projected(self.out_proj, y).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Zeroed states: conv ``(batch, d_inner, d_conv)``, ssm ``(batch, d_inner, d_state)``.

        `max_seqlen` is taken for the sake of attention layers: these states do not grow.
        """
        conv, weight = self.conv1d.weight, self.dt_proj.weight
        rows = (batch_size, self.d_inner)
        return (
            torch.zeros(*rows, self.d_conv, device=conv.device, dtype=dtype or conv.dtype),
            torch.zeros(*rows, self.d_state, device=weight.device, dtype=dtype or weight.dtype),
        )

    def _projected(self, u: Tensor) -> tuple[Tensor, ...]:
        """Step size, B and C of every token, the features last."""
        sizes = [self.dt_rank, self.d_state, self.d_state]
        dt, B, C = torch.split(projected(self.x_proj, u), sizes, dim=-1)
        return without_bias(self.dt_proj, dt), B, C

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        return states_of(self, inference_params, batch_size, initialize_states)


def initial_dt_bias(
    count: int, low: float, high: float, floor: float, device: torch.device | str | None
) -> Tensor:
    """What softplus maps to step sizes that are log-uniform between `low` and `high`."""
    if not 0 < low <= high:
        raise ValueError(f"dt_min and dt_max must be positive and increasing, got {low!r} and {high!r}")
    dt = torch.empty(count, dtype=torch.float32, device=device).uniform_(math.log(low), math.log(high)).exp()
    dt = dt.clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))


def wide(weight: Tensor) -> Tensor:
    """Weights of the recurrence are float32 at least."""
    return weight if weight.dtype == torch.float64 else weight.float()


def can_fuse(*linears: Any) -> bool:
    """Whether to train from the projections' weights."""
    return torch.is_grad_enabled() and all(is_plain(linear) for linear in linears)


def is_plain(linear: Any) -> bool:
    """Whether calling this layer only multiplies by its weight: no adapters, hooks, offloading."""
    return original_class(linear) is nn.Linear and runs_its_forward_alone(linear)


def runs_its_forward_alone(module: Any) -> bool:
    """Whether calling this module is calling its class's forward: no hooks, no offloading."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def projected(linear: Any, x: Tensor) -> Tensor:
    """What the layer makes of x; one that is swapped has kernels of its own."""
    if type(linear) is nn.Linear and is_plain(linear):
        return dense.linear(x, linear.weight, linear.bias)
    return linear(x)  # type: ignore[no-any-return]


def parts_of_op(x: Tensor, *linears: Any) -> list[nn.Linear | None]:
    """Those layers whose products may be part of a larger op on what is like x; None: it has to be called."""

    def may_be(linear: Any) -> bool:
        if not (is_plain_linear(linear) and runs_its_forward_alone(linear)):
            return False
        return dense.may_be_part(x, linear.weight, linear.bias)

    return [linear if may_be(linear) else None for linear in linears]


def can_step(layer: Any, hidden_states: Tensor, conv_state: Tensor) -> bool:
    """Whether `mamba_step` takes the token: few sequences, plain projections, one dtype."""
    dtype = hidden_states.dtype
    linears = (layer.in_proj, layer.x_proj, layer.dt_proj, layer.out_proj)
    return (
        hidden_states.shape[0] <= _STEP_SEQUENCES
        and conv_state.dtype == dtype == layer.conv1d.weight.dtype
        and all(is_plain(linear) and linear.weight.dtype == dtype for linear in linears)
        and not torch.is_autocast_enabled(hidden_states.device.type)
    )


def step_of(layer: Any, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor, **norms: Any) -> Tensor:
    """One token (batch, 1, d_model) through the layer's weights; moves both states on."""
    out = scan.mamba_step(
        hidden_states[:, 0], conv_state, ssm_state, layer.in_proj.weight, layer.in_proj.bias,
        layer.conv1d.weight.squeeze(1), layer.conv1d.bias, layer.x_proj.weight, layer.dt_proj.weight,
        layer.dt_proj.bias, layer.A_log, layer.D, layer.out_proj.weight, layer.out_proj.bias, **norms,
    )  # fmt: skip
    return out.unsqueeze(1)


def without_bias(dt_proj: Any, dt: Tensor) -> Tensor:
    """The step size's projection; its bias comes inside the scan."""
    if original_class(dt_proj) is nn.Linear:
        return dense.linear(dt, dt_proj.weight)
    # A quantized or adapted layer has to be called.
    return dt_proj(dt) - dt_proj.bias  # type: ignore[no-any-return]


def check_tokens(name: str, value: Any, d_model: int, *, one: bool = False) -> None:
    """Refuses what is no batch of tokens."""
    check_tensor(name, value)
    if value.dim() != 3 or value.shape[2] != d_model:
        raise ValueError(
            f"{name} must have shape (batch, length, d_model) = (batch, length, {d_model}), "
            f"got {tuple(value.shape)}"
        )
    if one and value.shape[1] != 1:
        raise ValueError(f"step takes one token, got {value.shape[1]}: forward takes more")


def width_of(expand: float, d_model: int) -> int:
    """Channels inside the block."""
    if not isinstance(expand, (int, float)) or int(expand * d_model) < 1:
        raise ValueError(f"expand must be a number that gives at least one channel, got {expand!r}")
    return int(expand * d_model)


def rank_of(dt_rank: int | str, d_model: int) -> int:
    """The rank of the step size's projection."""
    if dt_rank == "auto":
        return math.ceil(d_model / 16)
    if isinstance(dt_rank, str):
        raise ValueError(f'dt_rank must be "auto" or a positive int, got {dt_rank!r}')
    check_count("dt_rank", dt_rank)
    return dt_rank
