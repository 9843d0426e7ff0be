"""Giving the layers of a model the shapes of a state dict."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .structure import find_structure
from .surgery import Group, Journal, is_depthwise, slots


def resize(model: nn.Module, state: Mapping[str, Tensor], journal: Journal) -> list[Group]:
    """Makes all parameters and buffers as large as in the state dict; returns the structure of before."""
    groups = find_structure(model).groups
    smaller = {group: _units(group, state) for group in groups}
    for path, module in model.named_modules():
        _resize_module(path, module, state, journal)
    for group, units in smaller.items():
        for owner, name, amount in group.counts:
            journal.attribute(owner, name, getattr(owner, name) - amount * (group.units - units))
    return groups


def _units(group: Group, state: Mapping[str, Tensor]) -> int:
    """How many of a group's units the state dict has."""
    for cut in group.cuts:
        name, dim, value = next(cut.tensors())
        saved = state.get(f"{cut.path}.{name}")
        if saved is None or saved.dim() != value.dim():
            continue
        size, whole = len(cut.position) // group.units, value.shape[dim]
        if len(cut.position) == whole and saved.shape[dim] % size == 0:
            return min(saved.shape[dim] // size, group.units)
    return group.units


def _resize_module(path: str, module: nn.Module, state: Mapping[str, Tensor], journal: Journal) -> None:
    prefix = f"{path}." if path else ""
    for side in ("in", "out"):
        layout = slots(module, side)
        if layout is None:
            continue
        lengths = {
            state[f"{prefix}{name}"].shape[dim]
            for name, dim in layout.tensors
            if isinstance(getattr(module, name, None), Tensor)
            and f"{prefix}{name}" in state
            and state[f"{prefix}{name}"].dim() == getattr(module, name).dim()
        }
        if len(lengths) > 1:
            raise ValueError(f"{path}: its tensors in the state dict do not agree on {layout.sizes[0]}")
        if not lengths:
            continue
        length = lengths.pop()
        old = getattr(module, layout.sizes[0])
        if length == old:
            continue
        if length > old:
            raise ValueError(f"{path}: its {layout.sizes[0]} is {old}, and {length} in the state dict")
        if isinstance(module, nn.GroupNorm):
            journal.attribute(module, "num_groups", length // (old // module.num_groups))
        for size in layout.sizes:
            journal.attribute(module, size, length)
        if is_depthwise(module):
            break
    stores = [(name, value) for name, value in (*module._parameters.items(), *module._buffers.items())]
    for name, value in stores:
        saved = state.get(f"{prefix}{name}")
        if value is None or saved is None or saved.shape == value.shape:
            continue
        if saved.dim() != value.dim() or any(a > b for a, b in zip(saved.shape, value.shape, strict=True)):
            raise ValueError(
                f"{prefix}{name}: {tuple(saved.shape)} in the state dict, which is not smaller "
                f"than {tuple(value.shape)}"
            )
        journal.tensor(module, name, torch.empty(saved.shape, dtype=value.dtype, device=value.device))
