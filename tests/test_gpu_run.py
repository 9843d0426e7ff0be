"""`make gpu` where something hangs, crashes or loses the GPU: what it found stays, the rest still runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest_plugins = ["pytester"]
SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
TESTS = """
    import os, pytest, torch

    @pytest.mark.parametrize("case", range(2))
    def test_passes(case):
        pass

    @pytest.mark.slow
    def test_takes_seconds():
        pass

    def test_loses_the_context(monkeypatch):
        def synchronize():
            raise RuntimeError("an illegal memory access was encountered")
        torch.cuda.synchronize = synchronize
        assert False, "wrong numbers"
"""


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The two modules of scripts/ that a run consists of."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import gpu
    import gpu_tests

    yield gpu, gpu_tests
    for module in ("gpu", "gpu_tests", "build_tree"):
        sys.modules.pop(module, None)


def test_a_run_goes_on_behind_the_test_that_ended_it(
    pytester: pytest.Pytester, scripts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    gpu, gpu_tests = scripts
    pytester.makeini("[pytest]\nmarkers = slow")
    module = pytester.makepyfile(TESTS).name
    options = ["-p", "gpu_tests", "--progress", "tests.jsonl"]
    with Path("tests.jsonl").open("w") as file:  # as a test leaves it that hung
        file.write(f'{{"test": "{module}::test_passes[1]", "outcome": "started", "why": ""}}\n{{"te')
        file.write("\n")
    assert pytester.runpytest_inprocess(*options).ret == gpu_tests.CONTEXT_LOST
    found = gpu_tests.read(Path("tests.jsonl"))
    assert list(found) == [
        f"{module}::{name}" for name in ("test_passes[1]", "test_passes[0]", "test_loses_the_context")
    ]
    assert "wrong numbers" in found[f"{module}::test_loses_the_context"]["why"]
    assert gpu.stuck(found) == [f"{module}::test_passes[1]"]
    pytester.runpytest_inprocess(*options).assert_outcomes(passed=1)
    assert gpu_tests.read(Path("tests.jsonl"))[f"{module}::test_takes_seconds"]["outcome"] == "passed"


def test_of_each_function_the_first_case(pytester: pytest.Pytester, scripts: Any) -> None:
    pytester.makepyfile(
        "import pytest\n@pytest.mark.parametrize('case', range(5))\ndef test_it(case): assert case == 0"
    )
    options = ["-p", "gpu_tests", "--progress", "tests.jsonl", "--cases", "1"]
    pytester.runpytest_inprocess(*options).assert_outcomes(passed=1)


@pytest.mark.parametrize(("left", "quiet"), [(0.5, 60), (60, 0.5)])
def test_what_does_not_end_is_killed(
    left: float, quiet: float, tmp_path: Path, scripts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, _ = scripts
    monkeypatch.setattr(gpu, "QUIET_SECONDS", quiet)
    begin = time.monotonic()
    run = gpu.Run("optim", None, tmp_path, begin + left)
    with (tmp_path / "log").open("w") as run.log:
        status = run.command([sys.executable, "-c", "import time; print('begun'); time.sleep(50)"])
    assert status == gpu.OUT_OF_TIME
    assert time.monotonic() < begin + 30
    assert "gpu: " in (tmp_path / "log").read_text()


def test_a_command_that_ends_is_heard_to_its_end(tmp_path: Path, scripts: Any) -> None:
    gpu, _ = scripts
    run = gpu.Run("optim", None, tmp_path, time.monotonic() + 60)
    with (tmp_path / "log").open("w") as run.log:
        assert (
            run.command([sys.executable, "-c", "print('a' * 100000); print('end'); raise SystemExit(3)"]) == 3
        )
    assert run.tail[-2] == "end"
    assert len((tmp_path / "log").read_text()) > 100000
