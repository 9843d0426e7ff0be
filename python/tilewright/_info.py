"""What is installed, what was built, and what works here: the facts behind `tilewright info`.

Standard library only at import, and every probe is guarded: a broken torch, driver or extension shows as
an `error` entry of its own section and never hides the others.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from tilewright._verdict import verdicts

PEERS = (
    "accelerate",
    "bitsandbytes",
    "causal-conv1d",
    "flash-attn",
    "mamba-ssm",
    "mambapy",
    "torch-pruning",
    "torchao",
    "transformers",
)
_VARIABLES = re.compile(
    r"(TILEWRIGHT|OMP|GOMP|KMP)_\w+|MKL_NUM_THREADS|CUDA_VISIBLE_DEVICES|LD_\w+|PYTHONPATH"
)
_CPU_FEATURES = {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_vbmi2"}
_CPU_FEATURES |= {"amx_tile", "asimd", "sve"}


def info() -> dict[str, Any]:
    """Returns everything `tilewright info` prints, as plain data that `json.dumps` takes.

    Sections: `versions`, `environment` (variables that change how it runs), `peers`, `packages`, `cpu`,
    `build`, `cuda`, `openmp`, and `verdict`: a sentence a subject, `ok` where nothing is to be done.
    A section whose probe failed is `{"error": "ImportError: ..."}`; this function itself never raises.
    """
    report = {probe.__name__: guarded(probe) for probe in SECTIONS}
    return {**report, "verdict": verdicts(report)}


def versions() -> dict[str, Any]:
    """tilewright and where it lies, Python, and the platform."""
    from tilewright import __version__

    return {
        "tilewright": __version__,
        "from": str(Path(__file__).resolve().parent),
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
    }


def environment() -> dict[str, str]:
    """The variables set here that change what is loaded, how it is compiled or how many threads it uses."""
    return {name: os.environ[name] for name in sorted(os.environ) if _VARIABLES.fullmatch(name)}


def packages() -> dict[str, Any]:
    """Versions of the packages that every install has, as they are when imported."""
    return {name: guarded(partial(_imported, name)) for name in ("torch", "numpy", "rich")}


def build() -> dict[str, Any]:
    """What was compiled into the extension; raises what its import raises."""
    return dict(_extension().build_info())


def cpu() -> dict[str, Any]:
    """The processor, its vector features, and the kernel level chosen for it."""
    found: dict[str, Any] = cpu_facts()
    found["threads"] = guarded(_torch_threads)
    found["level"] = guarded(lambda: _extension().cpu_level())
    found["levels_usable"] = guarded(lambda: list(_extension().cpu_levels()))
    found["level_forced"] = os.environ.get("TILEWRIGHT_CPU")
    return found


def cpuinfo() -> Iterator[tuple[str, str]]:
    """What Linux says of the processors, line by line; nothing where it does not."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                key, _, value = line.partition(":")
                yield key.strip(), value.strip()
    except OSError:
        pass


def cpu_facts() -> dict[str, Any]:
    """Model name, core count and the vector features the kernels could use."""
    model, flags = platform.processor() or platform.machine(), set()
    for key, value in cpuinfo():
        if key == "model name":
            model = value
        elif key in ("flags", "Features"):
            flags.update(value.split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    features = sorted(_CPU_FEATURES & flags)
    return {"model": model, "machine": platform.machine(), "cores": cores, "features": features}


def cuda() -> dict[str, Any]:
    """Driver, runtimes and devices, as the system, the extension and torch each see them.

    `driver` and `runtime` of the extension are CUDA versions as CUDA counts them: 13000 is 13.0.
    """
    return {
        "driver": _driver_release(),
        "extension": guarded(
            lambda: {key: found or None for key, found in _extension().cuda_runtime().items()}
        ),
        "torch": guarded(_torch_cuda),
    }


def _driver_release() -> str | None:
    """The NVIDIA driver's own version, such as 580.95.05; None where none is loaded."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return found.group() if found else None


def openmp() -> list[str]:
    """Paths of the OpenMP runtimes loaded in this process, after torch and the extension are."""
    guarded(lambda: importlib.import_module("torch"))
    guarded(_extension)
    with open("/proc/self/maps", encoding="utf-8") as file:
        paths = {line.split(maxsplit=5)[5].strip() for line in file if line.count("/")}
    names = ("libgomp", "libiomp", "libomp")
    return sorted(path for path in paths if os.path.basename(path).startswith(names))


def peers() -> dict[str, str | None]:
    """Versions of the libraries tilewright is compared with or plugs into; None where not installed."""
    return {name: distribution_version(name) for name in PEERS}


def distribution_version(name: str) -> str | None:
    """Installed version without importing the package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extension() -> ModuleType:
    return importlib.import_module("tilewright._C")


def _imported(name: str) -> str:
    """The version of a package that imports."""
    module = importlib.import_module(name)
    return str(getattr(module, "__version__", None) or distribution_version(name))


def _torch_threads() -> int:
    return int(importlib.import_module("torch").get_num_threads())


def _torch_cuda() -> dict[str, Any]:
    torch = importlib.import_module("torch")
    available, devices = torch.cuda.is_available(), []
    for index in range(torch.cuda.device_count() if available else 0):
        device = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": device.name,
                "capability": [device.major, device.minor],
                "memory_gib": round(device.total_memory / 2**30, 1),
                "multiprocessors": device.multi_processor_count,
            }
        )
    return {"built_for": torch.version.cuda, "available": available, "devices": devices}


def guarded(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except (Exception, SystemExit) as error:
        return {"error": f"{type(error).__name__}: {error}"}


SECTIONS: tuple[Callable[[], Any], ...] = (versions, environment, peers, packages, cpu, build, cuda, openmp)
