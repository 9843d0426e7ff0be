"""Writes python/tilewright/_C.pyi, the signatures of the compiled extension; --check compares it instead.

Needs an extension with all families, pybind11-stubgen and ruff (`make stubs`).
"""

from __future__ import annotations

import argparse
import difflib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = Path(__file__).parent.parent / "python"
STUB = PACKAGES / "tilewright" / "_C.pyi"


def generated() -> str:
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "tilewright" / "_C.pyi"
        command = [sys.executable, "-m", "pybind11_stubgen", "tilewright._C", "--output-dir", folder]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(PACKAGES)})
        text = found.read_text()
    command = [sys.executable, "-m", "ruff", "format", f"--stdin-filename={STUB}", "-"]
    return subprocess.run(command, input=text, text=True, check=True, stdout=subprocess.PIPE).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the file is not what would be written")
    check = parser.parse_args().check
    text = generated()
    if not check:
        STUB.write_text(text)
        return 0
    kept = STUB.read_text()
    sys.stdout.writelines(
        difflib.unified_diff(kept.splitlines(True), text.splitlines(True), str(STUB), "generated now")
    )
    if kept != text:
        print(f"{STUB} is not up to date: run `make stubs`", file=sys.stderr)
    return int(kept != text)


if __name__ == "__main__":
    sys.exit(main())
