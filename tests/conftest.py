"""What all tests share: the `backend` fixture, hypothesis profiles, what a machine without CUDA skips."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from hypothesis import HealthCheck, settings

import tilewright.testing
from backends import BACKENDS, Backend
from tilewright import _C

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=30, database=None)
settings.register_profile(
    "nightly", deadline=None, max_examples=500, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


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
