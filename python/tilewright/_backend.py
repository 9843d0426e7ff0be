"""The compiled extension in use, as ``_backend.C.name(...)``: tests switch ``C`` to the emulated build."""

from __future__ import annotations

from types import ModuleType

import torch  # loads its OpenMP runtime first, which the extension then shares

from tilewright import _C

C: ModuleType = _C
num_threads = torch.get_num_threads


def is_emulated() -> bool:
    """Whether CUDA kernels are being run on the CPU, CPU tensors standing for device memory."""
    return C is not _C
