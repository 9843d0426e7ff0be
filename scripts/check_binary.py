"""Check what a built extension needs and shows: it must import on any machine and beside any torch.

Usage: python scripts/check_binary.py [--require-cuda sm_90a] FILE.so...
"""

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

VERBATIM = argparse.RawDescriptionHelpFormatter
# libgomp-<hash> is a bundled copy: a second OpenMP runtime in the process.
FORBIDDEN = re.compile(r"lib(torch|c10|cudart|cuda|nvrtc|python)|libgomp-")


def output(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout


def cuobjdump() -> str | None:
    packaged = Path(sysconfig.get_path("purelib")).glob("nvidia/**/bin/cuobjdump")
    return shutil.which("cuobjdump") or next(map(str, packaged), None)


def complaints(library: Path) -> list[str]:
    needed = re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "--dynamic", library))
    found = [f"needs {name}" for name in needed if FORBIDDEN.match(name)]
    for line in output("nm", "--dynamic", "--defined-only", library).splitlines():
        symbol = line.split()[-1]
        if not symbol.startswith("PyInit_"):
            found.append(f"exports {symbol}")
    return found


def lacks_cuda(library: Path, arch: str) -> list[str]:
    if ".nv_fatbin" not in output("readelf", "--sections", "--wide", library):
        return ["holds no CUDA code"]
    tool = cuobjdump()
    if tool is None:
        return [f"cannot be searched for {arch}: put cuobjdump on PATH, or pip install nvidia-cuda-cuobjdump"]
    found = sorted(set(re.findall(r"sm_\w+(?=\.cubin)", output(tool, "--list-elf", library))))
    return [] if arch in found else [f"holds code for {', '.join(found)}, not for {arch}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=VERBATIM)
    parser.add_argument("libraries", nargs="+", type=Path, metavar="FILE.so")
    parser.add_argument("--require-cuda", metavar="ARCH", help="ARCH, as sm_90a, must be in _C")
    options = parser.parse_args()
    failed = False
    for library in options.libraries:
        found = complaints(library)
        if options.require_cuda and library.name.startswith("_C."):
            found += lacks_cuda(library, options.require_cuda)
        failed = failed or bool(found)
        print(f"{library.name}: {'; '.join(found) or 'fine'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
