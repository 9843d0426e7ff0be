"""Handwritten CUDA and C++ kernels that drop into existing PyTorch models.

``tilewright.attention``
    Block-sparse attention, its masks, and which of them a model's layers get.
``tilewright.optim``
    8-bit blockwise optimizers and quantization, with bitsandbytes' arguments and checkpoints.
``tilewright.prune``
    Structured pruning of models, and the sparse layers that make it pay.
``tilewright.scan``
    Selective scans (Mamba), linear scans, causal convolutions: forward, backward and decode steps.
``tilewright.nn``
    Drop-in modules.
``tilewright.swap(model)``, ``tilewright.unswap(model)``
    These kernels in a model that exists already, and out of it again; attention under a mask of yours.
``tilewright.info()``
    What was built, what this machine offers, and whether they fit.

``tilewright.testing``
    CUDA kernels on a CPU for tests, and calls that TILEWRIGHT_DEBUG=1 kept, made again.

On the command line: ``tilewright info``, ``tilewright demo``, ``tilewright bench``.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tilewright._info import info

if TYPE_CHECKING:
    from tilewright import attention, compat, nn, optim, prune, scan, testing
    from tilewright.swapping import SwapReport, swap, unswap

__version__ = "0.1.0"
__all__ = [
    "SwapReport",
    "__version__",
    "attention",
    "compat",
    "info",
    "nn",
    "optim",
    "prune",
    "scan",
    "swap",
    "testing",
    "unswap",
]


def __getattr__(name: str) -> Any:
    # Families load when first used, so that `tilewright info` can report on a broken torch or extension.
    if name in ("attention", "compat", "nn", "optim", "prune", "scan", "testing"):
        return import_module(f"tilewright.{name}")
    if name in ("SwapReport", "swap", "unswap"):
        return getattr(import_module("tilewright.swapping"), name)
    raise AttributeError(
        f"module 'tilewright' has no attribute {name!r}", name=name, obj=sys.modules[__name__]
    )


def __dir__() -> list[str]:
    return __all__
