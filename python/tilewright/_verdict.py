"""What the facts of `tilewright info` mean: a sentence a subject, and what to do where it is not `ok`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

_MINIMUM_DRIVER = {12: "525", 13: "580"}
_REINSTALL = "Install it anew, in a source checkout with: pip install --force-reinstall --no-deps ."


def verdicts(report: dict[str, Any]) -> dict[str, str]:
    """The sentence on each subject, from the sections of `info`; they begin with one of

    `ok`, `CPU only`, `limited`, `broken` (nothing works before that is mended) and `unknown`.
    """
    build = report["build"]
    return {
        "packages": packages_verdict(report["packages"]),
        "extension": extension_verdict(build),
        "cpu": cpu_verdict(report["cpu"]),
        "cuda": cuda_verdict(build, report["cuda"]),
        "openmp": openmp_verdict(report["openmp"]),
    }


def failed(section: Any) -> bool:
    """Whether a probe could not say, which its `error` explains."""
    return isinstance(section, dict) and section.keys() == {"error"}


def packages_verdict(imported: dict[str, Any]) -> str:
    """One sentence: are the packages there that every install has, and do they import?

    `imported` has a version, or why there is none, by the name of each package.
    """
    if failed(imported):
        return f"broken: they do not import ({imported['error']})."
    broken = [name for name, found in imported.items() if failed(found)]
    if broken:
        reasons = "; ".join(f"{name} does not import ({imported[name]['error']})" for name in broken)
        return f"broken: {reasons}. Install anew: pip install --force-reinstall {' '.join(broken)}"
    if tuple(map(int, re.findall(r"\d+", imported["torch"])[:2])) < (2, 6):
        return f"broken: torch {imported['torch']} is older than 2.6. Update it: pip install 'torch>=2.6'"
    return "ok: torch, numpy and rich import."


def extension_verdict(build: dict[str, Any]) -> str:
    """One sentence: does the compiled extension import, and is it of this version?"""
    from tilewright import __version__

    if failed(build):
        return f"broken: the compiled extension does not import ({build['error']}). {_remedy(build['error'])}"
    if build.get("version") != __version__:
        return f"broken: compiled for tilewright {build.get('version')}, not {__version__}. {_REINSTALL}"
    kind = f"CPU and CUDA ({build.get('cuda_archs')})" if build.get("cuda") else "CPU only"
    return f"ok: {kind}, CPU levels {', '.join(build.get('cpu_levels', []))}."


def _remedy(error: str) -> str:
    """What to do about an extension that does not import."""
    package = Path(__file__).resolve().parent
    modules = sorted(path.name for path in package.glob("_C.*.so"))
    if "libgomp" in error:
        return "Install the OpenMP runtime: apt-get install libgomp1, or dnf install libgomp."
    if "GLIBC" in error:  # of the C library and, as GLIBCXX, of the C++ library
        return "It was built on a newer Linux than this: build it here, in a source checkout: pip install ."
    if "No module named 'tilewright._C'" not in error:
        return _REINSTALL
    if not modules:
        return f"{package} holds no compiled module: {_REINSTALL[0].lower()}{_REINSTALL[1:]}"
    tag = sys.implementation.cache_tag
    return f"There is {', '.join(modules)}, for another Python than this {tag}. {_REINSTALL}"


def cpu_verdict(cpu: dict[str, Any]) -> str:
    """One sentence: which kernels run on this CPU, and with how many threads?"""
    if failed(cpu):
        return f"unknown: {cpu['error']}"
    level, usable, threads = cpu["level"], cpu["levels_usable"], cpu["threads"]
    if failed(usable):
        return "unknown: the extension does not import."
    if failed(level):
        return f"broken: {level['error']}. Unset TILEWRIGHT_CPU."
    why = "the best for this CPU"
    if level != usable[-1]:
        why = f"because TILEWRIGHT_CPU says so; the best for this CPU is {usable[-1]}"
    share = "" if failed(threads) else f" {threads} of {cpu['cores']} cores are used."
    return f"ok: kernels of level {level}, {why}.{share}"


def cuda_verdict(build: dict[str, Any], cuda: dict[str, Any]) -> str:
    """One sentence: will the kernels run on a GPU here, and if not, what to change?"""
    if failed(build):
        return "unknown: the extension does not import."
    if not build.get("cuda"):
        return (
            "CPU only: this build has no CUDA kernels, because no usable nvcc was found when it was built "
            "(or TILEWRIGHT_CUDA=OFF was set). To have them, in a source checkout: "
            "TILEWRIGHT_CUDA=ON pip install ."
        )
    if failed(cuda):
        return f"unknown: {cuda['error']}"
    return _driver_verdict(build, cuda["extension"]) or _torch_verdict(build, cuda)


def _driver_verdict(build: dict[str, Any], runtime: dict[str, Any]) -> str | None:
    """What keeps the driver from running this build."""
    if failed(runtime):
        return f"unknown: the extension does not say ({runtime['error']})."
    built_for = int(build.get("cudart") or 0)
    needed = _MINIMUM_DRIVER.get(built_for // 1000, "a newer one")
    driver = int(runtime.get("driver") or 0)
    if driver == 0:
        return (
            f"CPU only: CUDA kernels are built in, but no NVIDIA driver is here (needed: {needed} or newer)."
        )
    if driver // 1000 < built_for // 1000:
        return (
            f"CPU only: the driver supports CUDA {_cuda(driver)}, this build uses {_cuda(built_for)}. "
            f"Update the driver to {needed} or newer, or build with an older CUDA toolkit."
        )
    if not runtime.get("devices"):
        return f"CPU only: a driver is here, but no device is visible ({runtime.get('error') or 'none'})."
    return None


def _torch_verdict(build: dict[str, Any], cuda: dict[str, Any]) -> str:
    """The driver is fine: is torch, and is there code for the devices?"""
    torch, driver = cuda["torch"], cuda["extension"]["driver"]
    if failed(torch):
        return f"unknown: torch does not say ({torch['error']})."
    if not torch.get("built_for"):
        return (
            "CPU only: this torch has no CUDA, so no tensor can be on the GPU. Install a CUDA build of torch."
        )
    if not torch.get("available"):
        return (
            f"CPU only: torch is built for CUDA {torch['built_for']}, but torch.cuda.is_available() is "
            "False. Install a build of torch for this driver."
        )
    devices = torch.get("devices", [])
    old = [d["name"] for d in devices if tuple(d["capability"]) < (8, 0)]
    if old:
        return f"limited: compute capability 8.0 or newer is needed, and {', '.join(old)} is older."
    archs = str(build.get("cuda_archs"))
    without = [d for d in devices if not has_code(archs, *d["capability"])]
    if without:
        named = ", ".join(f"{d['name']} ({_dotted(*d['capability'])})" for d in without)
        wanted = ";".join(sorted({"{}{}".format(*d["capability"]) for d in without}))
        return (
            f"limited: this build has code for {archs}, none of which runs on {named}. In a source checkout: "
            f'TILEWRIGHT_CUDA=ON TILEWRIGHT_CUDA_ARCHS="{wanted}" pip install .'
        )
    return (
        f"ok: driver for CUDA {_cuda(driver)}, kernels built with {_cuda(build['cudart'])}, "
        f"torch with {torch['built_for']}; the two runtimes are separate and need not match."
    )


def has_code(archs: str, major: int, minor: int) -> bool:
    """Whether a device runs what was compiled for `archs`, in CMake's notation.

    Binary code runs on devices of its major version from its own minor one on, PTX (no suffix, or -virtual)
    on all newer ones, and what is for 90a on 9.0 alone.
    """
    for number, special, kind in re.findall(r"(\d+)([af]?)(-real|-virtual)?", archs):
        own = divmod(int(number), 10)
        if own == (major, minor):
            return True
        if not special and own < (major, minor) and (kind != "-real" or own[0] == major):
            return True
    return False


def openmp_verdict(copies: list[str] | dict[str, str]) -> str:
    """One sentence: do torch and tilewright share one pool of threads?"""
    if isinstance(copies, dict):
        return f"unknown: {copies['error']}"
    if len(copies) > 1:
        return (
            f"{len(copies)} OpenMP runtimes are loaded: each keeps its own pool of threads, so CPU work may "
            "slow down. The results are right. OMP_WAIT_POLICY=passive keeps idle threads off the cores."
        )
    return "ok: one OpenMP runtime, shared with torch." if copies else "no OpenMP runtime is loaded."


def _dotted(major: int, minor: int) -> str:
    return f"{major}.{minor}"


def _cuda(version: int) -> str:
    return _dotted(version // 1000, version % 1000 // 10)
