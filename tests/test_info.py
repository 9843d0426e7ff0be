"""`tilewright.info` must answer whatever is broken, and its verdicts must say what to change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tilewright
from tilewright import _C, _backend, _info, _selfcheck, _verdict
from tilewright._selfcheck.__main__ import check, probes
from tilewright.optim import maps

CUDA_BUILD = {"cuda": True, "cuda_archs": "80;90a-real", "cudart": 13000, "cpu_levels": ["baseline"]}
DRIVER_580 = {"driver": 13000, "runtime": 13000, "devices": 1, "error": None}
TORCH_CUDA = {"built_for": "13.0", "available": True, "devices": [{"name": "H200", "capability": [9, 0]}]}


def test_info_is_plain_data_without_failed_sections() -> None:
    report = json.loads(json.dumps(tilewright.info()))
    assert report["verdict"]["extension"].startswith("ok")
    assert report["cpu"]["level"] in report["cpu"]["levels_usable"]
    assert all("error" not in section for section in report.values())


def test_every_name_of_the_extension_is_used_by_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no check runs, `tilewright info --check` cannot vouch for."""
    used = set()

    class Recorder:
        def __getattr__(self, name: str) -> object:
            used.add(name)
            return getattr(_C, name)

    recorder = Recorder()
    monkeypatch.setattr(_backend, "C", recorder)
    monkeypatch.setattr(_backend, "_C", recorder)  # or it would pass for the emulator
    monkeypatch.setattr(maps, "_shared", {})  # which are registered once a process
    results = {name: check(probe, "cpu") for name, probe in probes().items()}
    assert {name: found for name, found in results.items() if not found["passed"]} == {}
    kernels = {name for name in dir(_C) if name[0].islower()}
    no_kernels = {"build_info", "cpu_level", "cpu_levels", "set_cpu_level", "cuda_runtime"}
    only_on_a_gpu = {"block_sparse_fwd_sm90", "linear_scan_workspace"}
    assert kernels - used == no_kernels | only_on_a_gpu


# What a sitecustomize module does to an interpreter before anything else runs.
BREAKAGE = {
    "no torch": "sys.modules['torch'] = None",
    "no numpy": "sys.modules['numpy'] = None",
    "extension without libgomp": """
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "tilewright._C":
            raise ImportError("libgomp.so.1: cannot open shared object file: No such file or directory")
sys.meta_path.insert(0, Finder())""",
    "extension that kills the process": """
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "tilewright._C":
            os.kill(os.getpid(), signal.SIGILL)
sys.meta_path.insert(0, Finder())""",
    "no /proc": """
real = builtins.open
def no_proc(path, *arguments, **options):
    if str(path).startswith("/proc"):
        raise FileNotFoundError(2, "No such file or directory", path)
    return real(path, *arguments, **options)
builtins.open = no_proc""",
    "nothing": "",
}


def info_when(broken: str, folder: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    """Exit status and words of `tilewright info` in an interpreter that is broken in this way."""
    (folder / "sitecustomize.py").write_text(f"import builtins, os, signal, sys\n{BREAKAGE[broken]}")
    path = os.pathsep.join([str(folder), str(Path(tilewright.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-m", "tilewright", "info", *arguments],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": path, **variables},
        timeout=300,
    )
    words = done.stdout.decode("ascii")
    assert all(f"\n{probe.__name__}\n" in f"\n{words}" for probe in _info.SECTIONS), done.stderr
    return done.returncode, " ".join(words.partition("\nverdict\n")[2].split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "status", "expected"),
    [
        ("no torch", 1, "Install anew: pip install --force-reinstall torch"),
        ("no numpy", 1, "Install anew: pip install --force-reinstall numpy"),
        ("extension without libgomp", 1, "apt-get install libgomp1"),
        ("extension that kills the process", 1, "the process was ended by SIGILL"),
        ("no /proc", 0, "ok: kernels of level"),
    ],
)
def test_info_prints_whatever_is_broken(broken: str, status: int, expected: str, tmp_path: Path) -> None:
    found, verdict = info_when(broken, tmp_path)
    assert expected in verdict
    assert found == status


@pytest.mark.slow
def test_checks_are_not_run_where_something_is_broken(tmp_path: Path) -> None:
    status, verdict = info_when("nothing", tmp_path, "--check", TILEWRIGHT_CPU="sse9")
    assert "cpu broken: ValueError: environment variable TILEWRIGHT_CPU: got 'sse9'" in verdict
    assert "checks not run" in verdict
    assert status == 1


@pytest.mark.slow
def test_info_prints_to_a_terminal_of_the_last_century(tmp_path: Path) -> None:
    variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "HOME": "/nonexistent"}
    status, verdict = info_when("nothing", tmp_path, OMP_PLACES="\N{SNOWMAN}", **variables)
    assert "extension ok" in verdict
    assert status == 0


def test_a_check_that_kills_its_process_is_one_failure_among_results(monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
import json, os, signal, sys
for number in range(int(sys.argv[2]), 3):
    print(json.dumps({{"begin": {{"name": str(number), "device": "cpu"}}}}), flush=True)
    if number == 1:
        print("a library says something")
        os.kill(os.getpid(), signal.SIGSEGV)
    print(json.dumps({{"found": {{"passed": True, "detail": "", "seconds": 0.0}}}}), flush=True)
"""
    monkeypatch.setattr(_selfcheck, "_START", script)
    results = list(_selfcheck.checks())
    assert [(found["name"], found["passed"]) for found in results] == [("0", True), ("1", False), ("2", True)]
    assert "SIGSEGV" in results[1]["detail"]


def test_a_process_that_never_begins_is_one_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_selfcheck, "_START", "raise ImportError('no such luck')")
    (only,) = _selfcheck.checks()
    assert (only["name"], only["passed"], only["detail"]) == ("import", False, "ImportError: no such luck")


def test_extension_verdict_tells_the_wrong_python_from_none(tmp_path: Path, monkeypatch) -> None:
    missing = {"error": "ModuleNotFoundError: No module named 'tilewright._C'"}
    monkeypatch.setattr(_verdict, "__file__", str(tmp_path / "_verdict.py"))
    assert "holds no compiled module" in _verdict.extension_verdict(missing)
    (tmp_path / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    assert "There is _C.cpython-39-x86_64-linux-gnu.so, for another Python" in _verdict.extension_verdict(
        missing
    )
    assert "compiled for tilewright 0.0.1" in _verdict.extension_verdict({"version": "0.0.1"})
    too_new = {"error": "ImportError: /lib/libc.so.6: version `GLIBC_2.38' not found"}
    assert "built on a newer Linux" in _verdict.extension_verdict(too_new)


@pytest.mark.parametrize(("torch", "expected"), [("2.5.1+cu121", "older than 2.6"), ("2.10.0", "ok")])
def test_packages_verdict(torch: str, expected: str) -> None:
    assert expected in _verdict.packages_verdict({"torch": torch, "numpy": "2.0", "rich": "14"})


@pytest.mark.parametrize(
    ("build", "runtime", "torch", "expected"),
    [
        ({"error": "ImportError: x"}, {}, {}, "unknown"),
        ({"cuda": False}, {}, {}, "TILEWRIGHT_CUDA=ON"),
        (
            CUDA_BUILD,
            {"driver": 0, "devices": 0, "error": "no driver"},
            {},
            "no NVIDIA driver is here (needed: 580",
        ),
        (CUDA_BUILD, {**DRIVER_580, "driver": 12080}, TORCH_CUDA, "Update the driver to 580"),
        (CUDA_BUILD, {**DRIVER_580, "devices": 0}, TORCH_CUDA, "no device is visible"),
        (CUDA_BUILD, DRIVER_580, {"built_for": None}, "Install a CUDA build of torch"),
        (
            CUDA_BUILD,
            DRIVER_580,
            {**TORCH_CUDA, "devices": [{"name": "T4", "capability": [7, 5]}]},
            "8.0 or newer is needed, and T4 is older",
        ),
        (CUDA_BUILD, DRIVER_580, {**TORCH_CUDA, "available": False}, "is_available() is False"),
        (
            {**CUDA_BUILD, "cuda_archs": "90a-real"},
            DRIVER_580,
            {**TORCH_CUDA, "devices": [{"name": "A100", "capability": [8, 0]}]},
            "code for 90a-real, none of which runs on A100 (8.0). In a source checkout: TILEWRIGHT_CUDA=ON "
            'TILEWRIGHT_CUDA_ARCHS="80"',
        ),
        (CUDA_BUILD, DRIVER_580, {**TORCH_CUDA, "built_for": "12.8"}, "ok: driver for CUDA 13.0"),
    ],
)
def test_cuda_verdict(build: dict, runtime: dict, torch: dict, expected: str) -> None:
    assert expected in _verdict.cuda_verdict(build, {"extension": runtime, "torch": torch})


@pytest.mark.parametrize(
    ("archs", "runs_on", "not_on"),
    [
        ("80 90a-real", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], [(7, 5)]),
        ("80-real", [(8, 0), (8, 6)], [(9, 0)]),
        ("90a-real", [(9, 0)], [(8, 0), (10, 0)]),
        ("80-virtual", [(8, 0), (9, 0)], [(7, 0)]),
        ("120a-real", [(12, 0)], [(12, 1), (9, 0)]),
    ],
)
def test_which_devices_run_code_for_an_architecture(archs: str, runs_on: list, not_on: list) -> None:
    assert all(_verdict.has_code(archs, *device) for device in runs_on)
    assert not any(_verdict.has_code(archs, *device) for device in not_on)


def test_openmp_verdict_counts_runtimes() -> None:
    assert _verdict.openmp_verdict(["/a/libgomp.so.1"]).startswith("ok")
    assert _verdict.openmp_verdict(["/a/libgomp.so.1", "/b/libiomp5.so"]).startswith("2 OpenMP runtimes")
