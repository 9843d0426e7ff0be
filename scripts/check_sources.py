"""Check the rules of the C++ sources that no compiler checks. Usage: python scripts/check_sources.py"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
FAMILIES = ("attention", "optim", "scan", "prune")
SUFFIXES = {".h", ".cpp", ".cu"}
MAX_LINES = 600
# pattern, the folders where it is allowed, why it is not allowed elsewhere
RULES = [
    (r"<<<", ("device",), "launch through device/launch.h: it takes the stream and reports errors"),
    (r"__shared__", ("device", "emulator"), "use device/smem.h: the emulator knows no other shared memory"),
    (r"__CUDA_ARCH__|__CUDACC__", ("device",), "the emulator would compile the guarded code away"),
    (r"cuda_bf16\.h|cuda_fp16\.h", ("device",), "use device/half.h: the emulator has no such header"),
    (r"\basm\b|__asm__", ("device", "emulator"), "instructions belong in device/"),
    (r"#include\s*[<\"](torch|ATen|c10)/", (), "one binary serves every torch: no torch header"),
]


def without_comments(text: str) -> str:
    """The code alone, its line numbers kept."""
    text = re.sub(r"/\*.*?\*/", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL)
    return re.sub(r"//.*", "", text)


def strangers(room: str) -> tuple[str, ...]:
    """The folders whose headers a file in this folder may not include."""
    if room in FAMILIES:
        return (*(family for family in FAMILIES if family != room), "bindings")
    return (*FAMILIES, "bindings") if room in ("core", "device", "emulator") else ()


def complaints(path: Path) -> Iterator[str]:
    room = path.relative_to(CSRC).parts[0]
    code = without_comments(path.read_text())
    lines = code.splitlines()
    if len(lines) > MAX_LINES:
        yield f"{path}: {len(lines)} lines, at most {MAX_LINES} are allowed"
    for number, line in enumerate(lines, start=1):
        for pattern, allowed, why in RULES:
            if room not in allowed and re.search(pattern, line):
                yield f"{path}:{number}: {line.strip()}: {why}"
        include = re.match(r'\s*#include\s*"(\w+)/', line)
        if include and include[1] in strangers(room):
            yield f"{path}:{number}: {line.strip()}: {room}/ may not know {include[1]}/"


def main() -> int:
    paths = sorted(path for path in CSRC.rglob("*") if path.suffix in SUFFIXES)
    found = [complaint for path in paths for complaint in complaints(path)]
    print(*found, f"check_sources: {len(paths)} files, {len(found)} complaints", sep="\n")
    return 1 if found or not paths else 0


if __name__ == "__main__":
    sys.exit(main())
