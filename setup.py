"""Drives CMake; everything else is in pyproject.toml.

Environment: TILEWRIGHT_CUDA=AUTO|ON|OFF, TILEWRIGHT_CUDA_ARCHS, TILEWRIGHT_FAMILIES, TILEWRIGHT_EMULATED=1,
TILEWRIGHT_SANITIZE=1 (see CMakeLists.txt), MAX_JOBS and CUDACXX.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OPTIONS = {  # name -> its value where the environment says nothing
    "TILEWRIGHT_CUDA": "AUTO",
    "TILEWRIGHT_CUDA_ARCHS": "80;90a-real",
    "TILEWRIGHT_FAMILIES": "attention;optim;scan;prune",
    "TILEWRIGHT_EMULATED": "0",
    "TILEWRIGHT_SANITIZE": "0",
}


def option(name: str) -> str:
    return os.environ.get(name) or OPTIONS[name]


def stable_pybind11(build_dir: Path) -> Path:
    """Copy pybind11's headers into the build tree.

    pip's isolated environment is in a new place each time; headers that move would rebuild every file.
    """
    import pybind11

    copy = build_dir / f"pybind11-{pybind11.__version__}"
    if not copy.exists():
        shutil.copytree(pybind11.get_include(), copy)
    return copy


class CMakeBuild(build_ext):
    def build_extensions(self) -> None:
        sanitize = "-sanitize" if option("TILEWRIGHT_SANITIZE") == "1" else ""
        build_dir = ROOT / "build" / f"{sys.implementation.cache_tag}{sanitize}"
        build_dir.mkdir(parents=True, exist_ok=True)
        ninja = shutil.which("ninja")
        configure = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", build_dir]
        configure += [f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-DPYBIND11_INCLUDE={stable_pybind11(build_dir)}"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        configure += [f"-D{name}={option(name)}" for name in OPTIONS]
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        for command in (configure, ["cmake", "--build", build_dir, *jobs]):
            if subprocess.run(command).returncode:
                sys.exit("tilewright: the build failed; CMake's own message is above.")
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh = target.with_suffix(".new")  # a running process may have the old one mapped
            shutil.copy2(build_dir / target.name, fresh)
            fresh.replace(target)


names = ["_C", "_C_emulated"] if option("TILEWRIGHT_EMULATED") == "1" else ["_C"]
setup(
    ext_modules=[Extension(f"tilewright.{name}", sources=[]) for name in names],
    cmdclass={"build_ext": CMakeBuild},
)
