"""The layers of mamba_ssm, whose attributes those of `tilewright.nn` share."""

from __future__ import annotations

from typing import Any

from ..nn import Mamba, Mamba2
from .instances import Layer

_METHODS = ("forward", "step", "allocate_inference_cache", "_get_states_from_cache")
_MAMBA = (*_METHODS, "_projected")
_MAMBA2 = (*_METHODS, "_whole", "_cached", "_parts", "_convolved", "_heads", "_scan", "_skip", "_projected")


def layer_of(cls: type) -> Layer | None:
    """How to swap this class; None for classes that are not known."""
    if (cls.__module__, cls.__name__) == ("mamba_ssm.modules.mamba_simple", "Mamba"):
        return Layer("selective_scan", {name: getattr(Mamba, name) for name in _MAMBA}, _obstacle)
    if (cls.__module__, cls.__name__) == ("mamba_ssm.modules.mamba2", "Mamba2"):
        return Layer("ssd_chunk_scan", {name: getattr(Mamba2, name) for name in _MAMBA2}, _distributed)
    return None


def _obstacle(module: Any) -> str | None:
    if module.d_state > 256:
        return f"it has {module.d_state} states a channel; the kernels have up to 256"
    return None


def _distributed(module: Any) -> str | None:
    if module.process_group is not None:
        return "it is spread over a process group"
    return None
