"""What the tests hold of each kernel: device, dtype, check. Seen while they run, never declared.

    PYTHONPATH=scripts pytest -p support_matrix --support bench/results/cpu/support.json   # record
    python scripts/support_matrix.py                                                       # write the page
    python scripts/support_matrix.py --check                                               # is it current?

As a pytest plugin it watches the entry points of the compiled extension: which kernel a test that passed
called, on which backend, with which dtype, and whether the test also called a float64 reference, gradcheck,
opcheck or torch.compile(fullgraph=True). A cell of docs/support.md is there only if such a test is.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "support.md"
RESULTS = ROOT / "bench" / "results"
BLOCK = re.compile(r"(<!-- support -->\n).*?(<!-- end -->)", re.DOTALL)
NO_KERNEL = re.compile(
    r"workspace|^(set_)?cpu_level|^emulator|^build_info|^cuda_runtime|builtin_map|dynamic_map"
)
WRITE_SECONDS = 10
LEVELS = ("cpu-baseline", "cpu-avx2", "cpu-avx512", "cpu-avx512_bf16")
CHECKS = ("gradcheck", "opcheck", "compile")
DTYPES = {
    "float64": "fp64",
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "complex64": "complex",
    "integers": "integers",
}
# A kernel belongs to the first family whose pattern its name fits.
FAMILIES = {
    "Optimizers": "quantize|optimizer",
    "Scans": "scan|conv1d|state_update|mamba_step|mamba2|rms_norm|matmul",
    "Attention": "^block_sparse_(fwd|bwd)|block_lists|block_codes|select_blocks|position_tables",
    "Pruning": "",
}


# ---- recording: the pytest plugin ---------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support", type=Path, metavar="JSON", help="record which kernels the tests hold")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--support"):
        config.pluginmanager.register(Recorder(config.getoption("--support").resolve()))


class Recorder:
    """Watches the extension while tests run, and writes what the passed ones did."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written = time.monotonic()
        self.conditions = conditions()
        self.calls: set[tuple[str, str, str, str]] = (
            set()
        )  # of the test at hand: kernel, dtype, backend, check
        self.checks: list[str] = []  # under way: gradcheck, opcheck, compile
        self.saw_reference = False
        self.by_test: dict[str, set[tuple[str, str, str, str]]] = {}
        self.with_reference: set[str] = set()

    def pytest_collection_finish(self) -> None:
        from tilewright import _C

        for name in ("tilewright._C", "tilewright._C_emulated"):  # a build for a GPU alone lacks the second
            if find_spec(name):
                self._watch_kernels(import_module(name), _C.cpu_level)
        for owner, name in ((torch.autograd, "gradcheck"), (torch.library, "opcheck")):
            setattr(owner, name, self._marking(getattr(owner, name), name))
        torch.compile = self._watch_compile(torch.compile)  # type: ignore[assignment]
        self._watch_references()

    def pytest_runtest_logstart(self) -> None:
        self.calls, self.checks, self.saw_reference = set(), [], False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" or not report.passed:
            return
        test = report.nodeid.partition("[")[0]
        self.by_test.setdefault(test, set()).update(self.calls)
        if self.saw_reference:
            self.with_reference.add(test)
        if time.monotonic() > self.written + WRITE_SECONDS:  # a crash costs what came since
            self.pytest_sessionfinish()

    def pytest_sessionfinish(self) -> None:
        self.written = time.monotonic()
        kernels: dict[str, Any] = {}
        for test in sorted(self.by_test):
            for kernel, dtype, backend, check in self.by_test[test]:
                checks = [check, "reference"] if test in self.with_reference else [check]
                cell = kernels.setdefault(kernel, {}).setdefault(dtype, {}).setdefault(backend, {})
                for each in checks:
                    cell.setdefault(each, test)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(
            json.dumps({**self.conditions, "kernels": kernels}, indent=1, sort_keys=True) + "\n"
        )

    def note(self, kernel: str, backend: str, arguments: Any) -> None:
        found = {str(t.dtype).removeprefix("torch.") for t in tensors_in(arguments)}
        if found:
            self.calls.update((kernel, dtype_of(found), backend, check) for check in ["called", *self.checks])

    def _watch_kernels(self, module: ModuleType, level: Callable[[], str]) -> None:
        def backend(arguments: Any) -> str:
            if module.__name__.endswith("_emulated"):
                return "emulated"
            return "cuda" if any(t.is_cuda for t in tensors_in(arguments)) else f"cpu-{level()}"

        def watched(kernel: str, function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def call(*args: Any, **kwargs: Any) -> Any:
                result = function(*args, **kwargs)  # what is refused is not noted
                self.note(kernel, backend((args, kwargs)), (args, kwargs))
                return result

            return call

        for name in [name for name in dir(module) if not name.startswith("_") and not NO_KERNEL.search(name)]:
            value = getattr(module, name)
            if callable(value) and not isinstance(value, type):
                setattr(module, name, watched(name, value))

        if not hasattr(module, "OptimizerPlan"):  # a build of other families
            return

        class Plan(module.OptimizerPlan):  # type: ignore[name-defined, misc]
            def __init__(self, kind: str) -> None:
                super().__init__(kind)
                self.kind = kind

            bind = watched_plan(self, backend, module.OptimizerPlan.bind)

        module.OptimizerPlan = Plan  # type: ignore[attr-defined]

    def _marking(self, function: Callable[..., Any], check: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.checks.append(check)
            try:
                return function(*args, **kwargs)
            finally:
                self.checks.remove(check)

        return call

    def _watch_compile(self, compile_: Callable[..., Any]) -> Callable[..., Any]:
        """After a compilation without breaks a test runs what it compiled, and the same beside it."""

        @functools.wraps(compile_)
        def call(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("fullgraph"):
                self.checks.append("compile")
            return compile_(*args, **kwargs)

        return call

    def _watch_references(self) -> None:
        """Lets every function of tests/reference tell that it was called, under whatever name it is held."""
        for name, module in list(sys.modules.items()):
            if re.match(r"(tests\.)?reference\.", name):
                for value in list(vars(module).values()):
                    if (
                        isinstance(value, FunctionType)
                        and value.__module__ == name
                        and not value.__code__.co_freevars
                    ):
                        self._tell_calls(value)

    def _tell_calls(self, function: FunctionType) -> None:
        inner = FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__
        )
        inner.__kwdefaults__ = function.__kwdefaults__

        def note_and_call(*args: Any, **kwargs: Any) -> Any:
            self.saw_reference = True
            return inner(*args, **kwargs)

        # A new body for the same object: tables and defaults that hold the function are watched, too.
        key = f"_watched_{function.__name__}"
        function.__globals__[key] = note_and_call
        body: dict[str, Any] = {}
        exec(f"def call(*args, **kwargs): return {key}(*args, **kwargs)", body)
        function.__code__, function.__defaults__, function.__kwdefaults__ = body["call"].__code__, None, None


def watched_plan(recorder: Recorder, backend: Callable[[Any], str], bind: Callable[..., Any]) -> Any:
    """``OptimizerPlan.bind``, which is given all tensors of a step."""

    def call(self: Any, *args: Any) -> Any:
        result = bind(self, *args)
        recorder.note(f"optimizer_{self.kind}", backend(args), args)
        return result

    return call


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors among the arguments, however nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def dtype_of(found: set[str]) -> str:
    """One dtype for a call: a half type beside float32 counts as that, complex beside real as complex."""
    order = ("float16", "bfloat16", "complex128", "complex64", "float64", "float32")
    return next((dtype for dtype in order if dtype in found), "integers")


def conditions() -> dict[str, Any]:
    """Where and of which commit the record is."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        commit = done.stdout.strip()
    except OSError:  # no git here
        commit = ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"date": today, "commit": commit or None, "torch": torch.__version__, "gpu": gpu}


# ---- the page -----------------------------------------------------------------------------------------


def merged(device: str) -> dict[str, Any]:
    """Kernel to dtype to backend to check to test, and the date, of all records made on a device."""
    kernels: dict[str, Any] = {}
    for path in sorted((RESULTS / device).glob("*-support.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        for kernel, dtypes in record["kernels"].items():
            for dtype, backends in dtypes.items():
                for backend, checks in backends.items():
                    cell = kernels.setdefault(kernel, {}).setdefault(dtype, {}).setdefault(backend, {})
                    cell.update(checks)
                    cell["date"] = max(record["date"], cell.get("date", ""))
    return kernels


def family_of(kernel: str) -> str:
    return next(family for family, pattern in FAMILIES.items() if re.search(pattern, kernel))


def held(dtypes: dict[str, Any], backends: tuple[str, ...]) -> str:
    """The dtypes tested on some backends: first those held against a float64 reference, then the others."""
    signs: dict[str, list[str]] = {"●": [], "○": []}
    for dtype, name in DTYPES.items():
        cells = [dtypes[dtype][backend] for backend in backends if backend in dtypes.get(dtype, {})]
        if cells:
            share = "" if len(cells) == len(backends) else f" ({len(cells)}/{len(backends)})"
            signs["●" if any("reference" in cell for cell in cells) else "○"].append(name + share)
    return "<br>".join(f"{sign} {', '.join(names)}" for sign, names in signs.items() if names)


def on_gpu(dtypes: dict[str, Any]) -> str:
    dates = [backends["cuda"]["date"] for backends in dtypes.values() if "cuda" in backends]
    return f"{held(dtypes, ('cuda',))}<br>{max(dates)}" if dates else "not yet run"


def row(kernel: str, cpu: dict[str, Any], gpu: dict[str, Any]) -> str:
    exact = [cell for dtype in ("float64", "complex128") for cell in cpu.get(dtype, {}).values()]
    everything = [cell for backends in cpu.values() for cell in backends.values()]
    checks = [
        "✓" if any(c in cell for cell in (exact if c == "gradcheck" else everything)) else "" for c in CHECKS
    ]
    cells = [f"`{kernel}`", held(cpu, LEVELS), held(cpu, ("emulated",)), *checks, on_gpu(gpu)]
    return f"| {' | '.join(cells)} |"


def tables() -> str:
    """A table a family."""
    cpu, gpu = merged("cpu"), merged("h200")
    head = f"| kernel | CPU | CUDA, emulated | {' | '.join(CHECKS)} | GPU |"
    rule = f"| :-- | :-- | :-- |{' :-: |' * len(CHECKS)} :-- |"
    parts = []
    for family in FAMILIES:
        kernels = sorted(kernel for kernel in cpu | gpu if family_of(kernel) == family)
        rows = [row(kernel, cpu.get(kernel, {}), gpu.get(kernel, {})) for kernel in kernels]
        parts.append("\n".join([f"## {family}", "", head, rule, *rows]))
    return "\n\n".join(parts)


def main(arguments: list[str]) -> int:
    before = PAGE.read_text(encoding="utf-8")
    after = BLOCK.sub(lambda match: f"{match[1]}\n{tables()}\n\n{match[2]}", before)
    if "--check" not in arguments:
        PAGE.write_text(after, encoding="utf-8")
    return int("--check" in arguments and before != after)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
