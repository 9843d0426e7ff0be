"""Build the extension beside a view of the package, for `PYTHONPATH=DIR`: nothing is installed.

    python scripts/build_tree.py build/sanitize -DTILEWRIGHT_SANITIZE=ON -DTILEWRIGHT_EMULATED=ON

Needs cmake, ninja and pybind11, no network. The Python files are links, so edits show at once; only the
compiled modules are the tree's own.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def commands(directory: Path, options: list[str]) -> list[list[str]]:
    """The two CMake commands that build into `directory`."""
    binary = str(directory / "cmake")
    jobs = ["--parallel", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", binary]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    return [configure + options, ["cmake", "--build", binary, *jobs]]


def environment(directory: Path) -> dict[str, str]:
    """For commands that build or use the tree; the tools installed beside this python come first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    search = os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PATH": path, "PYTHONPATH": search, "PYTHONUNBUFFERED": "1"}


def lay_out(directory: Path) -> None:
    """Fill `directory`/tilewright: links to the sources, copies of the modules just built."""
    package = directory / "tilewright"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for source in (ROOT / "python" / "tilewright").iterdir():
        if source.suffix != ".so" and source.name != "__pycache__":
            (package / source.name).symlink_to(os.path.relpath(source, package))  # so that the tree can move
    for module in (directory / "cmake").glob("_C*.so"):
        shutil.copy2(module, package)


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    directory = Path(sys.argv[1]).resolve()
    for command in commands(directory, sys.argv[2:]):
        if subprocess.run(command, cwd=ROOT, env=environment(directory)).returncode:
            sys.exit("build_tree: the build failed; CMake's own message is above")
    lay_out(directory)
    print(f"build_tree: use it with PYTHONPATH={directory}")


if __name__ == "__main__":
    main()
