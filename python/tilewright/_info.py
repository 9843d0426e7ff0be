"""What is installed, what was built, and what works here: the facts behind `tilewright info`.

Standard library only at import, and every probe is guarded: a broken torch, driver or extension shows as
an `error` entry of its own section and never hides the others.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from collections.abc import Callable
from types import ModuleType
from typing import Any

PEERS = ("bitsandbytes", "torchao", "transformers", "accelerate")
_CPU_FEATURES = {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_vbmi2"}
_CPU_FEATURES |= {"amx_tile", "asimd", "sve"}
_MINIMUM_DRIVER = {12: "525", 13: "580"}


def info() -> dict[str, Any]:
    """Returns everything `tilewright info` prints, as plain data that `json.dumps` takes.

    Sections: `versions`, `build`, `cpu`, `cuda`, `openmp`, `peers`, and `verdict` (sentences, one a subject).
    A section whose probe failed is `{"error": "ImportError: ..."}`; this function itself never raises.
    """
    report = {
        "versions": _guarded(versions),
        "build": _guarded(build),
        "cpu": _guarded(cpu),
        "cuda": _guarded(cuda),
        "openmp": _guarded(openmp),
        "peers": _guarded(peers),
    }
    report["verdict"] = {
        "extension": extension_verdict(report["build"]),
        "cuda": cuda_verdict(report["build"], report["cuda"]),
        "openmp": openmp_verdict(report["openmp"]),
    }
    return report


def versions() -> dict[str, Any]:
    """Python, platform and the packages every install has."""
    from tilewright import __version__

    found = {name: distribution_version(name) for name in ("torch", "numpy")}
    system = {"python": platform.python_version(), "platform": platform.platform()}
    return {"tilewright": __version__, **system, **found}


def build() -> dict[str, Any]:
    """What was compiled into the extension; raises what its import raises."""
    return dict(_extension().build_info())


def cpu() -> dict[str, Any]:
    """The processor, its vector features, and the kernel level chosen for it."""
    found: dict[str, Any] = cpu_facts()
    found["threads"] = _guarded(_torch_threads)
    found["level"] = _guarded(lambda: _extension().cpu_level())
    found["levels_usable"] = _guarded(lambda: list(_extension().cpu_levels()))
    found["level_forced"] = os.environ.get("TILEWRIGHT_CPU")
    return found


def cpu_facts() -> dict[str, Any]:
    """Model name, core count and the vector features the kernels could use."""
    model, flags = platform.processor() or platform.machine(), set()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() == "model name":
                    model = value.strip()
                elif key.strip() in ("flags", "Features"):
                    flags.update(value.split())
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    features = sorted(_CPU_FEATURES & flags)
    return {"model": model, "machine": platform.machine(), "cores": cores, "features": features}


def cuda() -> dict[str, Any]:
    """Driver, runtimes and devices, as the extension and torch each see them."""
    return {"extension": _guarded(lambda: dict(_extension().cuda_runtime())), "torch": _guarded(_torch_cuda)}


def openmp() -> list[str]:
    """Paths of the OpenMP runtimes loaded in this process, after torch and the extension are."""
    _guarded(lambda: importlib.import_module("torch"))
    _guarded(_extension)
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


def extension_verdict(build: dict[str, Any]) -> str:
    """One sentence: does the compiled extension import?"""
    if _failed(build):
        return (
            f"broken: the compiled extension does not import ({build['error']}). "
            "Reinstall it: `pip install --force-reinstall --no-deps .` in a source checkout."
        )
    kind = f"CPU and CUDA ({build.get('cuda_archs')})" if build.get("cuda") else "CPU only"
    return f"ok: {kind}, CPU levels {', '.join(build.get('cpu_levels', []))}."


def cuda_verdict(build: dict[str, Any], cuda: dict[str, Any]) -> str:
    """One sentence: will the kernels run on a GPU here, and if not, what to change?"""
    if _failed(build):
        return "unknown: the extension does not import."
    if not build.get("cuda"):
        return (
            "CPU only: this build has no CUDA kernels, because no usable nvcc was found when it was built "
            "(or TILEWRIGHT_CUDA=OFF was set). To have them, in a source checkout: "
            "TILEWRIGHT_CUDA=ON pip install ."
        )
    runtime, torch = cuda.get("extension", {}), cuda.get("torch", {})
    built_for = int(build.get("cudart") or 0)
    needed = _MINIMUM_DRIVER.get(built_for // 1000, "a newer one")
    driver = int(runtime.get("driver") or 0)
    if driver == 0:
        return (
            f"CPU only: CUDA kernels are built in, but no NVIDIA driver is here (needed: {needed} or newer)."
        )
    if driver // 1000 < built_for // 1000:
        return (
            f"CPU only: the driver supports CUDA {_dotted(driver)}, this build uses {_dotted(built_for)}. "
            f"Update the driver to {needed} or newer, or build with an older CUDA toolkit."
        )
    if not runtime.get("devices"):
        return f"CPU only: a driver is here, but no device is visible ({runtime.get('error') or 'none'})."
    if not torch.get("built_for"):
        return (
            "CPU only: this torch has no CUDA, so no tensor can be on the GPU. Install a CUDA build of torch."
        )
    old = [d["name"] for d in torch.get("devices", []) if tuple(d["capability"]) < (8, 0)]
    if old:
        return f"limited: compute capability 8.0 or newer is needed, and {', '.join(old)} is older."
    return (
        f"ok: driver for CUDA {_dotted(driver)}, kernels built with {_dotted(built_for)}, torch with "
        f"{torch['built_for']}; the two runtimes are separate and need not match."
    )


def openmp_verdict(copies: list[str] | dict[str, str]) -> str:
    """One sentence: do torch and tilewright share one pool of threads?"""
    if isinstance(copies, dict):
        return f"unknown: {copies['error']}"
    if len(copies) > 1:
        return (
            f"{len(copies)} OpenMP runtimes are loaded: each keeps its own pool of threads, so CPU work may "
            "slow down. The results are right."
        )
    return "ok: one OpenMP runtime, shared with torch." if copies else "no OpenMP runtime is loaded."


def format_info(report: dict[str, Any]) -> str:
    """The report as aligned text for a terminal."""
    sections = ("\n".join([title, *_lines(value, 1)]) for title, value in report.items())
    return "\n\n".join(sections)


def _lines(value: Any, depth: int) -> list[str]:
    pad = "  " * depth
    if isinstance(value, list):
        return [f"{pad}{item}" for item in value] or [f"{pad}none"]
    lines = []
    for key, entry in value.items():
        nested = entry if _is_table_list(entry) else [entry] if isinstance(entry, dict) else []
        if nested and not _failed(nested[0]):
            lines += [f"{pad}{key}", *(line for item in nested for line in _lines(item, depth + 1))]
        else:
            lines.append(f"{pad}{key:<16}{_word(entry)}")
    return lines


def _failed(section: dict[str, Any]) -> bool:
    return section.keys() == {"error"}


def _is_table_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _word(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    if isinstance(value, dict):
        return f"failed: {value['error']}"
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def _extension() -> ModuleType:
    return importlib.import_module("tilewright._C")


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


def _guarded(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
