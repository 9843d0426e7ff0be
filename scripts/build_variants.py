"""Build variants of CUDA kernels (gpu_variants.py) beside a tree that is built: only what differs.

The tree's own records say which files a constant is in, and its own commands how to compile and to link them.
All of it becomes one file for ninja, so the variants of a family are built side by side.
"""

import json
import lzma
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

from gpu_variants import Variant
from ptxas_report import demangle, parse

CONSTANT = re.compile(r"\bTW_TUNED\((\w+),")
LOOKS_BACK = 2**26  # bytes: more than an extension has
RULES = """builddir = {out}
rule compile
  command = $run
  depfile = $out.d
  deps = gcc
rule link
  command = $run
"""


def ask_ninja(tree: Path, *question: str) -> list[str]:
    """The lines that ninja answers about the CMake tree."""
    command = ["ninja", "-C", str(tree), "-t", *question]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in answer if not line.startswith("ninja: ")]


def constants_of_objects(tree: Path) -> dict[str, set[str]]:
    """Of each object: the constants in the sources it was made of."""
    known: dict[Path, set[str]] = {}
    found: dict[str, set[str]] = {}
    name = ""
    for line in ask_ninja(tree, "deps"):
        if line and not line.startswith(" "):
            name = line.partition(":")[0]
            found[name] = set()
        elif line and "/csrc/" in line:
            path = (tree / line.strip()).resolve()
            if path not in known:
                known[path] = set(CONSTANT.findall(path.read_text(encoding="utf-8")))
            found[name] |= known[path]
    return found


def write_ninja(tree: Path, module: str, variants: Iterable[Variant], out: Path) -> None:
    """Write OUT/build.ninja, which makes OUT/VARIANT/MODULE.*.so of each; `tree` is CMake's, and built.

    Raises:
        ValueError: no kernel has such a constant.
    """
    target = next(tree.glob(f"{module}.*.so")).name
    *compiles, link = ask_ninja(tree, "commands", target)
    commands = {found[1]: line for line in compiles if (found := re.search(r" -o (\S+\.cu\.o)\b", line))}
    used = {name: found for name, found in constants_of_objects(tree).items() if name in commands}
    lines = [RULES.format(out=out)]
    for variant in variants:
        if missing := variant.constants.keys() - set().union(*used.values()):
            raise ValueError(f"{variant.name}: no kernel has a constant {', '.join(sorted(missing))}")
        flags = [f"-DTW_TUNE_{name}={value}" for name, value in variant.constants.items()]
        own = {
            name: str(out / variant.name / Path(name).name)
            for name, constants in used.items()
            if constants & variant.constants.keys()
        }
        for name, path in own.items():
            run = " ".join([commands[name].replace(name, path), *flags])
            lines += [f"build {path}: compile", f"  run = {escaped(run)}"]
        result = out / variant.name / target
        run = " ".join({**own, target: str(result)}.get(word, word) for word in link.split(" "))
        lines += [
            f"build {result}: link {' '.join(own.values())} | {tree / target}",
            f"  run = {escaped(run)}",
        ]
    out.mkdir(parents=True, exist_ok=True)
    for variant in variants:
        (out / variant.name).mkdir(exist_ok=True)
    (out / "build.ninja").write_text("\n".join(lines) + "\n")


def build_command(tree: Path, out: Path) -> list[str]:
    """Builds them, those that fail aside; the tree's commands expect to run in the tree."""
    return ["ninja", "-C", str(tree), "-f", str(out / "build.ninja"), "-k", "0"]


def escaped(command: str) -> str:
    return command.replace("$", "$$")


def kernels(logs: Iterable[Path]) -> dict[str, dict[str, int]]:
    """What ptxas said of each kernel, by name."""
    found = [kernel for log in logs for kernel in parse(log.read_text())]
    names = demangle([kernel.name for kernel in found]) if found else []
    return {
        f"{name} {kernel.arch}": {
            "registers": kernel.registers, "spilled": kernel.spills, "shared": kernel.shared
        }
        for name, kernel in zip(names, found, strict=True)
    }  # fmt: skip


def differences(tree: Path, directory: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Of the kernels in a variant's files, those for which ptxas had other numbers than for the default."""
    logs = sorted(directory.glob("*.cu.o.log"))
    usual = kernels(path for log in logs for path in tree.rglob(log.name) if ".dir" in str(path))
    changed = kernels(logs)
    return {
        name: {"default": usual.get(name, {}), "variant": numbers}
        for name, numbers in changed.items()
        if usual.get(name) != numbers
    }


def gather(tree: Path, variants: Iterable[Variant], out: Path, folder: Path) -> list[str]:
    """Put what was built into FOLDER, as VARIANT.so and VARIANT.json; returns the names of what was not."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    missing = []
    for variant in variants:
        if module := next((out / variant.name).glob("_C.*.so"), None):
            shutil.copy2(module, folder / f"{variant.name}.so")
            found = differences(tree, out / variant.name)
            (folder / f"{variant.name}.json").write_text(json.dumps(found, indent=1) + "\n")
        else:
            missing.append(variant.name)
    return missing


def pack(folder: Path) -> None:
    """Write FOLDER.tar.xz, to travel: most of a variant is as in the one before, if one looks back so far."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 1, "dict_size": LOOKS_BACK}]
    with (
        lzma.open(packed(folder), "wb", filters=filters) as file,
        tarfile.open(fileobj=file, mode="w") as tar,
    ):
        tar.add(folder, folder.name)


def unpack(folder: Path) -> None:
    """Make FOLDER of what has travelled."""
    with tarfile.open(packed(folder)) as tar:
        tar.extractall(folder.parent, filter="data")


def packed(folder: Path) -> Path:
    return folder.with_suffix(".tar.xz")
