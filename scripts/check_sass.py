"""Check that the Hopper kernels multiply and copy by Hopper's own instructions: *_sm90.cu.o in build trees.

Usage: python scripts/check_sass.py PATH...    (build trees or objects)
"""

import argparse
import re
import sys
from pathlib import Path

from check_binary import cuobjdump, output

VERBATIM = argparse.RawDescriptionHelpFormatter
ARCH = "sm_90a"
# What must be there and what must not: a kernel on a slower path computes the same.
WANTED = {
    "HGMMA": "products of a warpgroup",
    "UTMALDG": "tiles by the copy engine",
    "USETMAXREG": "registers that warpgroups hand over",
}
UNWANTED = {"HMMA": "products of a warp", "LDL": "loads of spilled registers", "STL": "stores of them"}


def complaints(sass: str) -> list[str]:
    """What is wrong with the code of one object, in words."""
    names = set(re.findall(r"\b([A-Z][A-Z0-9]+)(?:\.[\w.]+)? ", sass))
    found = [f"no {name} ({what})" for name, what in WANTED.items() if name not in names]
    return found + [f"{name} ({what})" for name, what in UNWANTED.items() if name in names]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=VERBATIM)
    parser.add_argument("paths", nargs="+", type=Path, help="build trees or objects")
    options = parser.parse_args()
    trees = [sorted(path.rglob("*_sm90.cu.o")) if path.is_dir() else [path] for path in options.paths]
    # The emulator's objects have the same names.
    objects = [path for tree in trees for path in tree if ".nv_fatbin" in output("readelf", "-SW", path)]
    tool = cuobjdump()
    if tool is None or not objects:
        why = (
            "no *_sm90.cu.o with CUDA code here"
            if tool
            else "no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        )
        print(f"check_sass: {why}", file=sys.stderr)
        return 1
    failed = False
    for path in objects:
        found = complaints(output(tool, "--dump-sass", "--gpu-architecture", ARCH, path))
        failed = failed or bool(found)
        print(f"{path.name}: {'; '.join(found) or 'fine'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
