"""The ways to run the ops that tests are held to."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tilewright import _C


@dataclass(frozen=True)
class Backend:
    """One way to run the ops: `cpu-<level>`, `emulated` (the CUDA kernels on the CPU) or `cuda`."""

    name: str

    @property
    def device(self) -> torch.device:
        """Where the tensors given to an op have to be."""
        return torch.device("cuda" if self.name == "cuda" else "cpu")

    @property
    def is_cpu(self) -> bool:
        """Whether the CPU kernels run; they alone take float64."""
        return self.name.startswith("cpu-")


CPU_BACKENDS = [f"cpu-{level}" for level in _C.cpu_levels()]
BACKENDS = [*CPU_BACKENDS, "emulated", pytest.param("cuda", marks=pytest.mark.cuda)]

# For tests whose tensors fill a GPU: there they run one at a time, and by night.
LARGE = pytest.mark.parametrize(
    "backend",
    ["emulated", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.nightly])],
    indirect=True,
)
