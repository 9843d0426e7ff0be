"""The documents: their examples run, their links lead somewhere, their numbers are the result files'."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tilewright.optim import GlobalOptimManager

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/**/*.md")])
IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


@pytest.fixture
def no_overrides_left():
    yield
    GlobalOptimManager.get_instance().initialize()


@pytest.mark.usefixtures("no_overrides_left")
@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_examples_run(path: Path) -> None:
    names: dict[str, object] = {}
    for example in re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(example, str(path), "exec"), names)


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_numbers_are_those_of_the_result_files() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "update_docs.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, f"run python bench/update_docs.py; stale: {done.stdout}{done.stderr}"
