"""A pytest plugin for test runs that may be cut short at any test: by a hang, a crash, the end of the time.

    PYTHONPATH=scripts pytest -p gpu_tests --progress tests.jsonl -m cuda tests/optim

Each test leaves a line when it starts and one when it ends, so a run that is started again with the same file
goes on behind the test that killed it. The first case of each test function comes first, then the second of
each, slow ones behind the others: whatever time there is, it reaches everything once. A kernel that fails
takes the CUDA context with it, so that all later tests of the process would fail: the run then ends, to be
started again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

CONTEXT_LOST = 86  # exit status: start again


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--progress", type=Path, metavar="JSONL", help="what each test came to, line by line")
    parser.addoption("--cases", type=int, metavar="N", help="of each test function the first N cases")
    parser.addoption("--shard", default="0/1", metavar="I/N", help="every N-th test, from number I on")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--progress"):
        shard, shards = map(int, config.getoption("--shard").split("/"))
        progress = Progress(config.getoption("--progress"), config.getoption("--cases"), shard, shards)
        config.pluginmanager.register(progress)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The last line of each test; a run killed while it wrote leaves half a line, which is none."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        found[entry["test"]] = entry
    return found


class Progress:
    """Writes the lines, and leaves out the tests that have some."""

    def __init__(self, path: Path, cases: int | None, shard: int, shards: int) -> None:
        self.cases, self.shard, self.shards = cases, shard, shards
        self.known = read(path)
        self.file = path.open("a", buffering=1, encoding="utf-8")
        self.failed = False

    def note(self, test: str, outcome: str, seconds: float = 0.0, why: str = "") -> None:
        entry = {"test": test, "outcome": outcome, "seconds": round(seconds, 2), "why": why}
        self.file.write(json.dumps(entry) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        seen: Counter[str] = Counter()

        def places() -> Iterator[tuple[int, bool, int]]:
            for index, item in enumerate(items):
                function = item.nodeid.partition("[")[0]
                yield seen[function], item.get_closest_marker("slow") is not None, index
                seen[function] += 1

        order = sorted(places())
        if self.cases is not None:
            order = [place for place in order if place[0] < self.cases]
        chosen = [items[index] for *_, index in order[self.shard :: self.shards]]
        items[:] = [item for item in chosen if item.nodeid not in self.known]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.note(nodeid, "started")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            why = "" if report.passed else str(report.longrepr)[-2000:]
            self.note(report.nodeid, report.outcome, report.duration, why)
            self.failed = self.failed or report.failed

    def pytest_runtest_logfinish(self) -> None:
        if not self.failed:
            return
        self.failed = False
        try:
            torch.cuda.synchronize()
        except Exception as error:
            pytest.exit(f"the CUDA context is lost: {error}", returncode=CONTEXT_LOST)
