"""Packages of other projects, by their names and signatures, with this package's kernels inside.

Code that imports mamba_ssm or causal_conv1d runs unchanged after, at the start of a program::

    import tilewright as tw
    tw.compat.install()

or, for one of them and in plain Python, ``sys.modules["mamba_ssm"] = tilewright.compat.mamba_ssm``.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings
from types import ModuleType

from . import causal_conv1d, mamba_ssm

__all__ = ["causal_conv1d", "install", "mamba_ssm"]


def install(*names: str) -> None:
    """Makes ``import mamba_ssm`` and ``import causal_conv1d`` find the modules here, in this process.

    Call it before what imports them: transformers looks for them when a model's module is imported. A model
    that is there already is better swapped with :func:`tilewright.swap`.

    Args:
        names: which of "mamba_ssm" and "causal_conv1d"; both if none is given.

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
    late = [name for name in sys.modules if name.startswith("transformers.models.") and "mamba" in name]
    if any(".modeling_" in name for name in late):
        warnings.warn(
            "transformers' Mamba models were imported before tilewright.compat.install() and keep the "
            "functions they found; use tilewright.swap(model) for them",
            stacklevel=2,
        )
    for name in names or own:
        for module in _with_submodules(own[name]):
            sys.modules[name + module.__name__.removeprefix(own[name].__name__)] = module


def _with_submodules(package: ModuleType) -> list[ModuleType]:
    found = pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    return [package, *(importlib.import_module(info.name) for info in found)]
