"""Packages of other projects, by their names and signatures, with this package's kernels inside.

Code that imports mamba_ssm or causal_conv1d runs unchanged after, at the start of a program::

    import tilewright as tw
    tw.compat.install()

or, for one of them and in plain Python, ``sys.modules["mamba_ssm"] = tilewright.compat.mamba_ssm``.

``tilewright.compat.flex_attention`` has the names of torch.nn.attention.flex_attention, to import from.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings
from types import ModuleType
from typing import TYPE_CHECKING

from ..swapping.transformers import MODELS
from . import causal_conv1d, mamba_ssm

if TYPE_CHECKING:
    from . import flex_attention

__all__ = ["causal_conv1d", "flex_attention", "install", "mamba_ssm"]


def __getattr__(name: str) -> ModuleType:
    # torch's own module, whose names it has, takes a while to import.
    if name == "flex_attention":
        return importlib.import_module(f"{__name__}.flex_attention")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def install(*names: str) -> None:
    """Makes ``import mamba_ssm`` and ``import causal_conv1d`` find the modules here, in this process.

    Call it before what imports them: transformers looks for them when a model's module is imported. A model
    that is there already is better swapped with :func:`tilewright.swap`.

    Args:
        names: which of "mamba_ssm" and "causal_conv1d"; both if none is given.

    Warns where such models were imported before.

    Raises:
        ValueError: another name.
        RuntimeError: the real package was imported before.
    """
    own = {"mamba_ssm": mamba_ssm, "causal_conv1d": causal_conv1d}
    for name in names or own:
        if name not in own:
            raise ValueError(f"names must be among {sorted(own)}, got {name!r}")
        if sys.modules.get(name, own[name]) is not own[name]:
            raise RuntimeError(f"{name} is imported already: call install() before anything that imports it")
    new = [name for name in names or own if name not in sys.modules]
    late = [model for model, module in _models() if _resolved(model, module, new)]
    if late:
        warnings.warn(
            f"transformers' {', '.join(sorted(late))} had been imported before tilewright.compat.install() "
            "and keep the functions they found: import them after it, or use tilewright.swap(model)",
            stacklevel=2,
        )
    for name in names or own:
        for module in _with_submodules(own[name]):
            sys.modules[name + module.__name__.removeprefix(own[name].__name__)] = module


def _models() -> list[tuple[str, ModuleType]]:
    """The models of transformers that were imported, by name."""
    found = []
    for name, module in sys.modules.items():
        package, _, model = name.rpartition(".modeling_")
        if package == f"transformers.models.{model}":
            found.append((model, module))
    return found


def _resolved(model: str, module: ModuleType, packages: list[str]) -> bool:
    """Whether it looked for one of these packages when it was imported."""
    if model in MODELS:
        return bool(packages)
    return "causal_conv1d" in packages and hasattr(module, "causal_conv1d_fn")  # LFM2, Qwen3-Next and others


def _with_submodules(package: ModuleType) -> list[ModuleType]:
    found = pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    return [package, *(importlib.import_module(info.name) for info in found)]
