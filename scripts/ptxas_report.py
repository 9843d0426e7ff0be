"""Registers, spills and shared memory of each CUDA kernel, as `ptxas -v` told them when it was compiled.

Usage: python scripts/ptxas_report.py [--no-spills] PATH...    (build trees or log files)

What ptxas warns of is shown last: that it runs products of warpgroups one by one (C7510 and its neighbours),
or passes over setmaxnreg (C7508). Such a kernel computes the same, far slower.
"""

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

VERBATIM = argparse.RawDescriptionHelpFormatter
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
ADVICE = re.compile(r"\((C75\d\d)\).*|setmaxnreg ignored.*")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass
class Kernel:
    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0


def parse(text: str) -> list[Kernel]:
    kernels: list[Kernel] = []
    for line in text.splitlines():
        if entry := ENTRY.search(line):
            kernels.append(Kernel(*entry.groups()))
        elif kernels and (sizes := SPILLS.search(line)):
            kernels[-1].stack = int(sizes[1])
            kernels[-1].spills = int(sizes[2]) + int(sizes[3])
        elif kernels and (used := re.search(r"Used (\d+) registers", line)):
            kernels[-1].registers = int(used[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernels[-1].shared = int(shared[1]) if shared else 0
    return kernels


def demangle(names: list[str]) -> list[str]:
    shown = subprocess.run(["c++filt", "--no-params", *names], capture_output=True, text=True, check=True)
    return [name.replace("(anonymous namespace)::", "") for name in shown.stdout.splitlines()]


def logs(paths: list[Path]) -> list[Path]:
    return [log for path in paths for log in (sorted(path.rglob("*.cu.o.log")) if path.is_dir() else [path])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=VERBATIM)
    parser.add_argument("paths", nargs="+", type=Path, help="build trees or log files")
    parser.add_argument("--no-spills", action="store_true", help="fail at spills, warnings, or no kernel")
    options = parser.parse_args()
    texts = [log.read_text() for log in logs(options.paths)]
    kernels = [kernel for text in texts for kernel in parse(text)]
    advice = [found[0] for text in texts for found in ADVICE.finditer(text)]
    if not kernels:
        print("ptxas_report: no kernel was compiled here", file=sys.stderr)
        return 1 if options.no_spills else 0
    print("registers  spilled  stack  shared  arch     kernel")
    for kernel, name in zip(kernels, demangle([kernel.name for kernel in kernels]), strict=True):
        sizes = f"{kernel.registers:9}  {kernel.spills:7}  {kernel.stack:5}  {kernel.shared:6}"
        print(f"{sizes}  {kernel.arch:7}  {name}")
    spilling = sum(kernel.spills > 0 for kernel in kernels)
    for line in advice:
        print(f"ptxas: {line}")
    print(f"ptxas_report: {len(kernels)} kernels, {spilling} with spills, {len(advice)} warnings")
    return 1 if options.no_spills and (spilling or advice) else 0


if __name__ == "__main__":
    sys.exit(main())
