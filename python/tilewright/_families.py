"""The families of kernels. `bench`, `demo` and `_selfcheck` know one by a module of its name there."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

FAMILIES = {
    "attention": "block masks, block-sparse attention and estimators of what it may leave out",
    "optim": "8-bit optimizers and blockwise quantization",
    "prune": "masks, block-sparse and n:m linear layers, pruning of whole models",
    "scan": "linear and selective scans, causal convolutions",
}


def present(package: str) -> list[str]:
    """The families that ``tilewright.<package>`` has a module for; none of them is imported."""
    return [family for family in FAMILIES if find_spec(f"tilewright.{package}.{family}")]


def load(package: str, family: str) -> Any:
    """The module ``tilewright.<package>.<family>``."""
    return import_module(f"tilewright.{package}.{family}")
