"""`tilewright.info` must answer whatever is broken, and its verdicts must say what to change."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import tilewright
from tilewright import _info

CUDA_BUILD = {"cuda": True, "cuda_archs": "80;90a-real", "cudart": 13000, "cpu_levels": ["baseline"]}
DRIVER_580 = {"driver": 13000, "runtime": 13000, "devices": 1, "error": None}
TORCH_CUDA = {"built_for": "13.0", "available": True, "devices": [{"name": "H200", "capability": [9, 0]}]}


def test_info_is_plain_data_without_failed_sections() -> None:
    report = json.loads(json.dumps(tilewright.info()))
    assert report["verdict"]["extension"].startswith("ok")
    assert report["cpu"]["level"] in report["cpu"]["levels_usable"]
    assert all("error" not in section for section in report.values())


def test_text_names_every_section() -> None:
    text = _info.format_info(tilewright.info())
    for section in ("versions", "build", "cpu", "cuda", "openmp", "peers", "verdict"):
        assert f"\n{section}\n" in f"\n{text}\n"


@pytest.mark.parametrize("broken", ["tilewright._C", "torch"])
def test_info_prints_when_an_import_fails(broken: str) -> None:
    script = (
        f"import sys; sys.modules[{broken!r}] = None\n"
        "from tilewright.cli import main\n"
        "status = main(['info']); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "verdict" in done.stdout, done.stderr
    if broken == "tilewright._C":
        assert done.returncode == 1
        assert "broken: the compiled extension does not import" in done.stdout


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
        (CUDA_BUILD, DRIVER_580, {**TORCH_CUDA, "built_for": "12.8"}, "ok: driver for CUDA 13.0"),
    ],
)
def test_cuda_verdict(build: dict, runtime: dict, torch: dict, expected: str) -> None:
    assert expected in _info.cuda_verdict(build, {"extension": runtime, "torch": torch})


def test_openmp_verdict_counts_runtimes() -> None:
    assert _info.openmp_verdict(["/a/libgomp.so.1"]).startswith("ok")
    assert _info.openmp_verdict(["/a/libgomp.so.1", "/b/libiomp5.so"]).startswith("2 OpenMP runtimes")
