"""Fail if an object file built for one ISA level defines a symbol that other code could pick up.

The linker keeps one copy of each weak symbol. If that copy comes from an object compiled for AVX-512, a
baseline caller crashes on a machine without AVX-512. So each symbol of an ISA object lives in
tilewright::...::<isa>. Usage: python scripts/check_isa_leak.py BUILD_DIR...
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

VERBATIM = argparse.RawDescriptionHelpFormatter
# A pointer to the exception personality routine: data, and the same in every object.
ALLOWED = re.compile(r"DW\.ref\.")


def namespaces(mangled: str) -> list[str]:
    """The names a mangled symbol is nested in: _ZN10tilewright4avx24sqrtEf -> [tilewright, avx2, sqrt]."""
    match = re.match(r"_Z(?:T[VIST]|G[VR]|T[hvWH])?Z*N[rVKRO]*", mangled)
    names: list[str] = []
    rest = mangled[match.end() :] if match else ""
    while digits := re.match(r"\d+", rest):
        end = digits.end() + int(digits[0])
        names.append(rest[digits.end() : end])
        rest = rest[end:]
    return names


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def leaks(object_file: Path, isa: str) -> list[str]:
    found = []
    for line in output("nm", "--defined-only", object_file).splitlines():
        *_, kind, symbol = line.split()
        shared = kind.isupper() or kind in "wvu"
        inside = namespaces(symbol)[:1] == ["tilewright"] and isa in namespaces(symbol)
        if shared and not inside and not ALLOWED.match(symbol):
            found.append(f"{kind} {symbol}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=VERBATIM)
    parser.add_argument("build_dirs", nargs="+", type=Path, metavar="BUILD_DIR")
    build_dirs = parser.parse_args().build_dirs
    objects = sorted(path for folder in build_dirs for path in folder.rglob("isa_*.dir/**/*.o"))
    if not objects:
        print("check_isa_leak: no ISA object files here; build first", file=sys.stderr)
        return 1
    bad = 0
    for path in objects:
        folder = next(part for part in path.parts if part.startswith("isa_"))
        isa = folder.removeprefix("isa_").removesuffix(".dir")
        for leak in leaks(path, isa):
            bad += 1
            kind, symbol = leak.split()
            print(f"{path.name} ({isa}): {kind} {output('c++filt', symbol).strip()}")
    print(f"check_isa_leak: {len(objects)} object files, {bad} leaks")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
