"""What all tests share: the `backend` fixture, hypothesis profiles, what a machine without CUDA skips."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from hypothesis import HealthCheck, settings

import tilewright.testing
from backends import BACKENDS, Backend
from tilewright import _C, _library

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--poisoned", action="store_true", help="new memory holds NaN in all tests (nightly)")


@contextmanager
def _filled_memory() -> Iterator[None]:
    """torch.empty gives NaN, and workspaces bytes of 255: what reads before it writes is found out."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    direct = _library._new
    torch.use_deterministic_algorithms(True, warn_only=True)
    _library._new = _library._new_strided  # the other is not filled
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        _library._new = direct


@pytest.fixture(autouse=True)
def _poisoned_if_asked(request: pytest.FixtureRequest) -> Iterator[None]:
    with _filled_memory() if request.config.getoption("--poisoned") else nullcontext():
        yield


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory holds NaN while the test runs."""
    with _filled_memory():
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects what needs a device this machine lacks; a skip would look like a gap in the tests."""
    if torch.cuda.is_available():
        return
    needs_cuda = [item for item in items if item.get_closest_marker("cuda")]
    if needs_cuda:
        config.hook.pytest_deselected(items=needs_cuda)
        items[:] = [item for item in items if not item.get_closest_marker("cuda")]
