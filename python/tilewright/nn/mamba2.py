"""Mamba-2: the block around the structured state space dual."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import scan
from .._checks import check_count, check_tensor, suggests_keywords
from ..scan.conv import MAX_WIDTH
from ..scan.mamba2 import GatedNorm, mamba2_inner
from ..scan.ssd import limits
from .inference import conv_step, keep_last, states_of
from .mamba import (
    check_tokens,
    initial_dt_bias,
    parts_of_op,
    projected,
    runs_its_forward_alone,
    wide,
    width_of,
)
from .packing import packing_of


@suggests_keywords
class RMSNormGated(nn.Module):
    """RMS norm over groups of features, with a gate before or after it.

    Args:
        hidden_size: features.
        eps: added to the mean square.
        group_size: features that share a scale; None: all.
        norm_before_gate: whether ``norm(x) * silu(z)`` instead of ``norm(x * silu(z))``.
        device, dtype: of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.eps, self.group_size, self.norm_before_gate = eps, group_size or hidden_size, norm_before_gate

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalizes x ``(..., hidden_size)``, gated by z of the same shape; computes in float32."""
        return scan.gated_rms_norm(x, self.weight, z, self.eps, self.group_size, self.norm_before_gate)


@suggests_keywords
class Mamba2(nn.Module):
    """Mamba-2's block: project, convolve, scan in chunks, gate and norm, project; as ``mamba_ssm.Mamba2``.

    Parameters have mamba_ssm's names and shapes, so that its checkpoints load.

    Args:
        d_model: features of input and output.
        d_state: states of every channel.
        d_conv: width of the convolution, up to 8.
        conv_init: its weights start uniform between minus and plus this; None: as torch.nn.Conv1d.
        expand: channels inside, as a multiple of `d_model`.
        headdim: channels of a head.
        d_ssm: channels that the state space model gets, the others being a gated MLP; None: all.
        ngroups: groups of heads that share B and C.
        A_init_range: A starts uniform between these, negated.
        D_has_hdim: whether D has a weight a channel, not a head.
        rmsnorm, norm_before_gate: whether there is a norm before the last projection, and where its gate is.
        dt_min, dt_max: the step size starts log-uniform between these, and not below `dt_init_floor`.
        dt_init_floor: see `dt_min`.
        dt_limit: the step size is clamped to this.
        bias, conv_bias: whether the projections, and the convolution, have biases.
        chunk_size: tokens that the scan takes at once.
        use_mem_eff_path: for the sake of mamba_ssm's signature: there is one way here, whatever it says.
        layer_idx: the layer's number in a model; needed with `inference_params`.
        process_group, sequence_parallel: leave them as they are: this module is not distributed.
        device, dtype: of the parameters.

    Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: Any = None,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if process_group is not None or sequence_parallel is not True:
            raise NotImplementedError(
                "process_group must be None and sequence_parallel True: nothing is distributed"
            )
        check_count("d_conv", d_conv, MAX_WIDTH)
        for name, count in (
            ("d_model", d_model), ("d_state", d_state), ("headdim", headdim), ("ngroups", ngroups),
            ("chunk_size", chunk_size), ("d_ssm", 1 if d_ssm is None else d_ssm),
        ):  # fmt: skip
            check_count(name, count)
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = width_of(expand, d_model)
        self.headdim, self.ngroups = headdim, ngroups
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        if self.d_ssm % headdim or self.d_ssm > self.d_inner:
            raise ValueError(
                f"d_ssm must be a multiple of headdim = {headdim}, up to {self.d_inner}, got {self.d_ssm}"
            )
        self.nheads = self.d_ssm // headdim
        if self.nheads % ngroups:
            raise ValueError(f"ngroups must divide the {self.nheads} heads, got {ngroups}")
        if not 0 < A_init_range[0] <= A_init_range[1]:
            raise ValueError(f"A_init_range must be positive and increasing, got {A_init_range}")
        self.D_has_hdim, self.rmsnorm, self.norm_before_gate = D_has_hdim, rmsnorm, norm_before_gate
        self.dt_limit = limits(dt_limit)
        self.chunk_size, self.activation = chunk_size, "silu"
        self.use_mem_eff_path, self.layer_idx = use_mem_eff_path, layer_idx

        of: dict[str, Any] = {"device": device, "dtype": dtype}
        conv_dim = self.d_ssm + 2 * ngroups * d_state
        self.in_proj = nn.Linear(
            d_model, 2 * self.d_inner + 2 * ngroups * d_state + self.nheads, bias=bias, **of
        )
        self.conv1d = nn.Conv1d(
            conv_dim, conv_dim, d_conv, groups=conv_dim, padding=d_conv - 1, bias=conv_bias, **of
        )
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        dtype_of_weights = self.in_proj.weight.dtype
        dt_bias = initial_dt_bias(self.nheads, dt_min, dt_max, dt_init_floor, device)
        A = torch.empty(self.nheads, dtype=torch.float32, device=device).uniform_(*A_init_range)
        self.dt_bias = nn.Parameter(dt_bias.to(dtype_of_weights))
        self.A_log = nn.Parameter(A.log().to(dtype_of_weights))
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads, device=device))
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        if rmsnorm:
            self.norm = RMSNormGated(self.d_ssm, 1e-5, self.d_ssm // ngroups, norm_before_gate, **of)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **of)

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
    ) -> Tensor:
        """Maps ``(batch, length, d_model)``, with `seqlen` ``(batch * seqlen, d_model)``, to the same shape.

        Args:
            u: the input.
            seqlen: the length, where batch and length are one axis.
            seq_idx: ``(batch, length)``: the sequence that each token of packed ones belongs to.
            cu_seqlens: ``(sequences + 1,)``: the same for one row, as where they start and end, increasing
                strictly from 0 to the length, at which it looks. Give one of the two.
            inference_params: keeps the states between calls: an object with ``seqlen_offset`` (tokens seen so
                far) and ``key_value_memory_dict``, as mamba_ssm's InferenceParams. With an offset the input
                goes on where the last one ended, whatever its length.
        """
        rows = u if seqlen is None else split_rows(u, seqlen)
        check_tokens("u", rows, self.d_model)
        packing = packing_of(seq_idx, cu_seqlens, rows, "u")
        if inference_params is None:
            out = self._whole(rows, None if packing is None else packing.seq_idx)
        elif packing is None:
            out = self._cached(rows, inference_params)
        else:
            raise NotImplementedError("packed sequences do not go with inference_params")
        return out if seqlen is None else out.flatten(0, 1)

    def step(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token, ``(batch, 1, d_model)``; both states are updated in place and returned."""
        check_tokens("hidden_states", hidden_states, self.d_model, one=True)
        mlp, z, xbc, dt = self._parts(projected(self.in_proj, hidden_states[:, 0]))
        x, B, C = self._heads(conv_step(self.conv1d, xbc, conv_state))
        bias: Tensor | None = self.dt_bias
        if self.dt_limit != (0.0, float("inf")):
            dt, bias = F.softplus(wide(dt) + wide(self.dt_bias)).clamp(*self.dt_limit), None
        y = scan.selective_state_update(
            ssm_state, x, dt.unsqueeze(-1).expand(-1, -1, self.headdim),
            (-torch.exp(wide(self.A_log)))[:, None, None].expand(-1, self.headdim, self.d_state), B, C,
            self._skip() if self.D_has_hdim else self.D[:, None].expand(-1, self.headdim),
            z=None if self.rmsnorm else torch.unflatten(z, -1, (self.nheads, self.headdim)),
            dt_bias=None if bias is None else bias[:, None].expand(-1, self.headdim),
            dt_softplus=bias is not None,
        )  # fmt: skip
        return self._projected(y.flatten(1), z, mlp).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Zeroed states: conv ``(batch, channels, d_conv)``, ssm ``(batch, nheads, headdim, d_state)``.

        `max_seqlen` is taken for the sake of attention layers: these states do not grow.
        """
        conv, weight = self.conv1d.weight, self.in_proj.weight
        conv_state = torch.zeros(
            batch_size, self.d_conv, conv.shape[0], device=conv.device, dtype=dtype or conv.dtype
        ).transpose(1, 2)
        ssm_state = torch.zeros(
            (batch_size, self.nheads, self.headdim, self.d_state),
            device=weight.device,
            dtype=dtype or weight.dtype,
        )
        return conv_state, ssm_state

    def _whole(self, rows: Tensor, seq_idx: Tensor | None) -> Tensor:
        """An input without a cache."""
        norm = self._gated_norm()
        if self.rmsnorm and norm is None:
            mlp, z, xbc, dt = self._parts(projected(self.in_proj, rows))
            y = self._scan(self._convolved(xbc, seq_idx, None), dt, z, seq_idx=seq_idx)
            return self._projected(y.flatten(2), z, mlp)
        mlp_part, extra = None, 2 * (self.d_inner - self.d_ssm)
        in_proj, out_proj = (None, None) if extra else parts_of_op(rows, self.in_proj, self.out_proj)
        x = rows if in_proj is not None else projected(self.in_proj, rows)
        if extra:
            mlp_part, x = torch.split(x, [extra, x.shape[-1] - extra], dim=-1)
        y, _ = mamba2_inner(
            x, self.conv1d.weight, self.conv1d.bias, self.A_log, self._skip(), self.dt_bias, self.nheads,
            self.ngroups, norm, in_proj=in_proj, out_proj=out_proj, A_is_log=True, seq_idx=seq_idx,
            dt_limit=self.dt_limit,
        )  # fmt: skip
        return y if out_proj is not None else self._with_mlp(y, mlp_part)

    def _cached(self, rows: Tensor, inference_params: Any) -> Tensor:
        """An input that starts or goes on with the states kept."""
        batch, length, _ = rows.shape
        go_on = inference_params.seqlen_offset > 0
        conv_state, ssm_state = self._get_states_from_cache(inference_params, batch)
        if length == 1 and go_on and not torch.is_grad_enabled():
            return self.step(rows, conv_state, ssm_state)[0]
        mlp, z, xbc, dt = self._parts(projected(self.in_proj, rows))
        # Copies: both are overwritten below, and a backward pass needs them as they were.
        before, initial = (conv_state[..., 1:].clone(), ssm_state.clone()) if go_on else (None, None)
        convolved = self._convolved(xbc, None, before)
        y, last = self._scan(convolved, dt, z, initial_states=initial, return_final_states=True)
        keep_last(conv_state, xbc.transpose(1, 2), go_on=go_on)
        ssm_state.copy_(last)
        return self._projected(y.flatten(2), z, mlp)

    def _parts(self, zxbcdt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The first projection's output: the MLP's gate and value, the gate, the convolution's input, dt."""
        mlp = self.d_inner - self.d_ssm
        sizes = [2 * mlp, self.d_ssm, self.d_ssm + 2 * self.ngroups * self.d_state, self.nheads]
        mlp_part, z, xbc, dt = torch.split(zxbcdt, sizes, dim=-1)
        return mlp_part, z, xbc, dt

    def _convolved(self, xbc: Tensor, seq_idx: Tensor | None, before: Tensor | None) -> Tensor:
        weight = self.conv1d.weight.squeeze(1)
        out = scan.causal_conv1d(
            xbc.transpose(1, 2), weight, self.conv1d.bias, seq_idx, before, activation="silu"
        )
        return out.transpose(1, 2)

    def _heads(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., heads, headdim), B and C (..., groups, states), as views."""
        states, groups = self.ngroups * self.d_state, (self.ngroups, self.d_state)
        x, B, C = torch.split(xbc, [self.d_ssm, states, states], dim=-1)
        x = torch.unflatten(x, -1, (self.nheads, self.headdim))
        return x, torch.unflatten(B, -1, groups), torch.unflatten(C, -1, groups)

    def _scan(self, xbc: Tensor, dt: Tensor, z: Tensor, **options: Any) -> Any:
        x, B, C = self._heads(xbc)
        return scan.ssd_chunk_scan(
            x, dt, -torch.exp(wide(self.A_log)), B, C, self.chunk_size, D=self._skip(),
            z=None if self.rmsnorm else torch.unflatten(z, -1, (self.nheads, self.headdim)),
            dt_bias=self.dt_bias, dt_softplus=True, dt_limit=self.dt_limit, **options,
        )  # fmt: skip

    def _skip(self) -> Tensor:
        return torch.unflatten(self.D, 0, (self.nheads, self.headdim)) if self.D_has_hdim else self.D

    def _projected(self, y: Tensor, z: Tensor, mlp: Tensor) -> Tensor:
        """Norm, the MLP's part beside it, and the last projection."""
        if self.rmsnorm:
            y = (self._gated_norm() or self.norm)(y, z)
        return self._with_mlp(y, mlp)

    def _with_mlp(self, y: Tensor, mlp: Tensor | None) -> Tensor:
        if mlp is not None and mlp.shape[-1]:
            gate, value = mlp.chunk(2, dim=-1)
            y = torch.cat([F.silu(gate) * value, y], dim=-1)
        return projected(self.out_proj, y)

    def _gated_norm(self) -> GatedNorm | None:
        """What the norm computes; None where there is none, or calling it does more or other things."""
        if not (self.rmsnorm and type(self.norm) is RMSNormGated and runs_its_forward_alone(self.norm)):
            return None
        norm = self.norm
        return GatedNorm(norm.weight, norm.eps, norm.group_size, norm.norm_before_gate)

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        return states_of(self, inference_params, batch_size, initialize_states)


def split_rows(u: Tensor, seqlen: int) -> Tensor:
    """(batch * seqlen, d_model) as (batch, seqlen, d_model)."""
    check_tensor("u", u)
    check_count("seqlen", seqlen)
    if u.dim() != 2:
        raise ValueError(f"u must have shape (batch * seqlen, d_model) with seqlen, got {tuple(u.shape)}")
    if u.shape[0] % seqlen:
        raise ValueError(f"seqlen must divide the {u.shape[0]} rows of u, got {seqlen}")
    return torch.unflatten(u, 0, (-1, seqlen))
