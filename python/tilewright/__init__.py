"""Handwritten CUDA and C++ kernels that drop into existing PyTorch models.

``tilewright.optim``
    8-bit blockwise optimizers and quantization, with bitsandbytes' arguments and checkpoints.
``tilewright.scan``
    Selective scans (Mamba), linear scans, causal convolutions: forward, backward and decode steps.
``tilewright.nn``
    Drop-in modules.
``tilewright.info()``
    What was built, what this machine offers, and whether they fit.

On the command line: ``tilewright info``, ``tilewright demo``, ``tilewright bench``.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from tilewright._info import info

if TYPE_CHECKING:
    from tilewright import nn, optim, scan

__version__ = "0.1.0"
__all__ = ["__version__", "info", "nn", "optim", "scan"]


def __getattr__(name: str) -> ModuleType:
    # Families load when first used, so that `tilewright info` can report on a broken torch or extension.
    if name in ("nn", "optim", "scan"):
        return import_module(f"tilewright.{name}")
    raise AttributeError(f"module 'tilewright' has no attribute {name!r}")
