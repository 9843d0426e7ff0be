"""What all tests share: the `backend` fixture, hypothesis profiles, what a machine without CUDA skips."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, settings

import tilewright.testing
from tilewright import _C

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=30, database=None)
settings.register_profile(
    "nightly", deadline=None, max_examples=500, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


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


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Runs the test on each CPU level this machine has, on the emulator, and on CUDA where there is a device.

    A missing emulated module is an error, never fewer tests: `make test` builds it.
    """
    chosen = Backend(request.param)
    level = _C.cpu_level()
    try:
        if chosen.is_cpu:
            _C.set_cpu_level(chosen.name.removeprefix("cpu-"))
        with tilewright.testing.emulated() if chosen.name == "emulated" else nullcontext():
            yield chosen
    finally:
        _C.set_cpu_level(level)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects what needs a device this machine lacks; a skip would look like a gap in the tests."""
    if torch.cuda.is_available():
        return
    needs_cuda = [item for item in items if item.get_closest_marker("cuda")]
    if needs_cuda:
        config.hook.pytest_deselected(items=needs_cuda)
        items[:] = [item for item in items if not item.get_closest_marker("cuda")]
