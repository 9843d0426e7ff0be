"""Check what `python -m build` made: size, linked libraries, a fresh environment that uses it.

Usage: python scripts/check_wheel.py dist [--torch torch==2.13.0]
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
VERBATIM = argparse.RawDescriptionHelpFormatter
MAX_MEGABYTES = 60
SMOKE_TEST = """
import torch, tilewright as tw
weight = torch.nn.Parameter(torch.ones(64, 256))
optimizer = tw.optim.AdamW8bit([weight], lr=0.1)
weight.grad = torch.ones_like(weight)
optimizer.step()
assert (weight < 1).all()
print("an 8-bit AdamW step works")
"""


def run(*command: str | Path, cwd: str | Path | None = None) -> None:
    print("+", *command, flush=True)
    subprocess.run(command, check=True, cwd=cwd)


def only(dist: Path, pattern: str) -> Path:
    found = list(dist.glob(pattern))
    if len(found) != 1:
        sys.exit(f"check_wheel: expected one {pattern} in {dist}, found {len(found)}")
    return found[0].resolve()


def smoke_test(wheel: Path, torch: str, folder: str) -> None:
    run(sys.executable, "-m", "venv", f"{folder}/venv")
    python = f"{folder}/venv/bin/python"
    run(python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", torch, wheel)
    run(python, "-c", SMOKE_TEST, cwd=folder)
    run(f"{folder}/venv/bin/tilewright", "info", cwd=folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=VERBATIM)
    parser.add_argument("dist", type=Path)
    parser.add_argument("--torch", default="torch", help="what pip installs as torch")
    options = parser.parse_args()
    only(options.dist, "tilewright-*.tar.gz")
    wheel = only(options.dist, "tilewright-*.whl")
    megabytes = wheel.stat().st_size / 1e6
    print(f"{wheel.name}: {megabytes:.1f} MB")
    if megabytes > MAX_MEGABYTES:
        sys.exit(f"check_wheel: at most {MAX_MEGABYTES} MB are allowed")
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(f"{folder}/wheel")
        modules = list(Path(folder, "wheel", "tilewright").glob("*.so"))
        run(sys.executable, SCRIPTS / "check_binary.py", *modules)
        smoke_test(wheel, options.torch, folder)
    print("check_wheel: fine")


if __name__ == "__main__":
    main()
