"""Models of users: how inputs are passed to them, which tensors come back, whose code a layer runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

NOTE = "_tilewright_note"  # in vars(module) of a swapped one: what its new methods keep there, gone with them
ORIGINAL = "_tilewright_original"  # in a class that `tilewright.swap` gave a layer: the one it had


def original_class(module: nn.Module) -> Any:
    """The module's class or, if it is swapped, the one that it had."""
    cls = type(module)
    # Asked in this order since torch.compile follows no `vars` of a class everywhere.
    return vars(cls).get(ORIGINAL, cls) if hasattr(cls, ORIGINAL) else cls


def is_plain_linear(module: nn.Module) -> bool:
    """Whether this is a torch.nn.Linear, or one swapped for a dense product, with nothing beside it."""
    return type(module) is nn.Linear or (original_class(module) is nn.Linear and NOTE not in vars(module))


def check_inputs(name: str, inputs: Any) -> None:
    """Refuses what cannot be passed to a model; `name` is the argument's."""
    if not isinstance(inputs, (Tensor, tuple, list, Mapping)):
        raise TypeError(f"{name} must be a tensor, a tuple or a dict of inputs, got {type(inputs).__name__}")


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's output on a tensor, a tuple or list of positional or a dict of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def floats_of(value: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors in an output, by where they are in it."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from floats_of(entry, f"{name}.{key}")
    elif isinstance(value, (tuple, list)):
        for index, entry in enumerate(value):
            yield from floats_of(entry, f"{name}[{index}]")


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time being: dropout would make any two runs differ."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def coarsest(model: nn.Module, tolerances: Mapping[torch.dtype, float]) -> float:
    """The largest tolerance of the dtypes the model has: outputs are often widened at the end."""
    dtypes = {tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()}
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        dtypes.add(torch.bfloat16)
    return max((tolerances.get(dtype, 1e-1) for dtype in dtypes), default=1e-3)
