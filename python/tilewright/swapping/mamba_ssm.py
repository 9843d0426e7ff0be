"""The layers of mamba_ssm, whose attributes those of `tilewright.nn` share."""

from __future__ import annotations

from typing import Any

from .. import _backend
from ..nn import Mamba, Mamba2
from ..scan.conv import MAX_WIDTH
from ..scan.mamba2 import GatedNorm
from .instances import Layer

_METHODS = ("forward", "step", "allocate_inference_cache", "_get_states_from_cache")
_MAMBA = (*_METHODS, "_projected")
_MAMBA2 = (
    *_METHODS, "_whole", "_cached", "_parts", "_convolved", "_heads", "_scan", "_skip", "_projected",
    "_with_mlp",
)  # fmt: skip


def layer_of(cls: type) -> Layer | None:
    """How to swap this class; None for classes that are not known."""
    name = (cls.__module__, cls.__name__)
    if name == ("mamba_ssm.modules.mamba_simple", "Mamba"):
        return Layer("selective_scan", {name: getattr(Mamba, name) for name in _MAMBA}, _states)
    if name == ("mamba_ssm.modules.mamba2", "Mamba2"):
        methods = {name: getattr(Mamba2, name) for name in _MAMBA2}
        return Layer("ssd_chunk_scan", {**methods, "_gated_norm": _gated_norm}, _distributed)
    return None


def _states(module: Any) -> str | None:
    most = _backend.C.SELECTIVE_SCAN_MAX_STATES
    if module.d_state > most:
        return f"it has {module.d_state} states a channel; the kernels have up to {most}"
    return _width(module)


def _distributed(module: Any) -> str | None:
    if module.process_group is not None:
        return "it is spread over a process group"
    return _width(module)


def _width(module: Any) -> str | None:
    if module.d_conv > MAX_WIDTH:
        return f"its convolution is {module.d_conv} wide; the kernels have up to {MAX_WIDTH}"
    return None


def _gated_norm(self: Any) -> GatedNorm | None:
    """mamba_ssm's own gated norm is a Triton kernel, which runs on no CPU; others are called."""
    norm: Any = getattr(self, "norm", None)
    if (type(norm).__module__, type(norm).__name__) != ("mamba_ssm.ops.triton.layernorm_gated", "RMSNorm"):
        return None
    return GatedNorm(norm.weight, norm.eps, norm.group_size, norm.norm_before_gate)
