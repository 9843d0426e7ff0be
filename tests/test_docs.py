"""The documents: their examples run, their links lead somewhere, their numbers are the result files'."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from inspect import ismodule
from pathlib import Path

import pytest

from tilewright import _C
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


@pytest.mark.parametrize("module", ["attention", "nn", "optim", "prune", "scan"])
def test_every_public_name_has_its_place_in_the_api_pages(module: str) -> None:
    page = (ROOT / "docs" / "api" / f"{module}.md").read_text()
    public = import_module(f"tilewright.{module}")
    for name in public.__all__:
        if not ismodule(getattr(public, name)):
            assert f"::: tilewright.{module}.{name}\n" in f"{page}\n", f"docs/api/{module}.md lacks {name}"


def test_every_example_has_its_place_in_the_documents() -> None:
    page = (ROOT / "docs" / "examples.md").read_text()
    for path in (ROOT / "examples").glob("*.py"):
        assert f"(../examples/{path.name})" in page


@pytest.mark.parametrize(
    "message",
    [
        "holds no CUDA kernels: move the tensors to the CPU",
        "float64 has no CUDA kernel: move the tensors to the CPU",
        "environment variable TILEWRIGHT_CPU",
        "second derivatives are not supported",
        "found no nvcc (12.1 or newer)",
        "OpenMP runtimes are loaded",
        "the compiled extension does not import",
    ],
)
def test_troubleshooting_quotes_messages_that_exist(message: str) -> None:
    assert message in (ROOT / "docs" / "troubleshooting.md").read_text()
    sources = (path for folder in ("python", "csrc", "cmake") for path in (ROOT / folder).rglob("*.*"))
    texts = (path.read_text() for path in sources if path.suffix in {".py", ".h", ".cpp", ".cu", ".cmake"})
    assert any(message in text for text in texts)


def recorded() -> Iterator[tuple[str, str, str]]:
    """Kernel, record and the tests that it names."""
    for path in sorted((ROOT / "bench" / "results").glob("*/*-support.json")):
        for kernel, dtypes in json.loads(path.read_text())["kernels"].items():
            for cell in (cell for backends in dtypes.values() for cell in backends.values()):
                yield from ((kernel, path.name, test) for test in cell.values())


def test_the_support_matrix_is_that_of_the_records() -> None:
    command = [sys.executable, ROOT / "scripts" / "support_matrix.py", "--check"]
    assert subprocess.run(command).returncode == 0, "run python scripts/support_matrix.py"


def test_the_support_matrix_rests_on_tests_that_exist() -> None:
    for record, test in {(record, test) for _, record, test in recorded()}:
        path, name = test.split("::")
        source = (ROOT / path).read_text() if (ROOT / path).exists() else ""
        assert f"def {name}(" in source, (
            f"{record} names {test}, which is gone: record it anew (docs/support.md)"
        )


def test_the_support_matrix_knows_every_kernel() -> None:
    no_kernels = "workspace|cpu_level|^build_info|^cuda_runtime|^emulat|builtin_map|dynamic_map"
    kernels = {name for name in dir(_C) if callable(getattr(_C, name)) and not re.search(no_kernels, name)}
    kernels -= {"OptimizerPlan"} | {name for name in kernels if name.startswith("_")}
    assert kernels <= {kernel for kernel, _, _ in recorded()}


def test_numbers_are_those_of_the_result_files() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "update_docs.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, f"run python bench/update_docs.py; stale: {done.stdout}{done.stderr}"
