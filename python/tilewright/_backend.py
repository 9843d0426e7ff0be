"""The compiled extension in use, as ``_backend.C.name(...)``: tests switch ``C`` to the emulated build."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch  # loads its OpenMP runtime first, which the extension then shares

from tilewright import _C

if TYPE_CHECKING:
    from tilewright import _C as C
else:
    C = _C

__all__ = ["DEBUG", "C", "is_emulated", "num_threads", "optimizer_plan"]

DEBUG = os.environ.get("TILEWRIGHT_DEBUG", "") not in ("", "0")
num_threads = torch.get_num_threads
emulator_seed: int | None = None  # as `testing.emulated` set it, if it did


def is_emulated() -> bool:
    """Whether CUDA kernels are being run on the CPU, CPU tensors standing for device memory."""
    return C is not _C and hasattr(C, "emulator_set_seed")


def optimizer_plan(kind: str) -> Any:
    """A plan of an optimizer's steps; if TILEWRIGHT_DEBUG is set, one that is watched."""
    if not DEBUG:
        return C.OptimizerPlan(kind)
    from ._debug import WatchedPlan

    return WatchedPlan(kind)
