"""Check what `make wheel` made: size, tag, linked libraries, and a fresh environment that uses it.

Usage: python scripts/check_wheel.py dist [--torch torch==2.13.0]

The environment sees no compiler and no nvcc: nothing may be built when the wheel is installed or used.
"""

import argparse
import json
import os
import re
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
from tilewright.attention import BlockMask, block_sparse_attention

weight = torch.nn.Parameter(torch.ones(64, 256))
optimizer = tw.optim.AdamW8bit([weight], lr=0.1)
weight.grad = torch.ones_like(weight)
optimizer.step()
assert (weight < 1).all()

q = torch.randn(1, 2, 100, 32, requires_grad=True)
block_sparse_attention(q, q, q, BlockMask.sliding_window(100, 30, block_size=32)).sum().backward()
assert q.grad.isfinite().all()

layer = tw.nn.Mamba(16)
layer(torch.randn(2, 50, 16)).sum().backward()
assert all(p.grad.isfinite().all() for p in layer.parameters())

model = torch.nn.Sequential(torch.nn.Linear(256, 256))
tw.prune.prune(model, tw.prune.Block(16, 16), 0.75)
sparse = tw.nn.BlockSparseLinear.from_linear(model[0])
x = torch.randn(4, 256)
torch.testing.assert_close(sparse(x), model(x))
print("each family works: an 8-bit AdamW step, attention in a window, a Mamba layer, a pruned layer")
"""


def run(*command: str | Path, **options: object) -> str:
    print("+", *("..." if "\n" in str(word) else word for word in command), flush=True)
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, **options).stdout


def only(dist: Path, pattern: str) -> Path:
    found = list(dist.glob(pattern))
    if len(found) != 1:
        sys.exit(f"check_wheel: expected one {pattern} in {dist}, found {len(found)}")
    return found[0].resolve()


def check_file(wheel: Path, folder: str) -> None:
    """Its size, its tag, and what its modules need and export."""
    megabytes = wheel.stat().st_size / 1e6
    print(f"{wheel.name}: {megabytes:.1f} MB")
    if megabytes > MAX_MEGABYTES:
        sys.exit(f"check_wheel: at most {MAX_MEGABYTES} MB are allowed")
    if not re.search(r"-manylinux_\d+_\d+_\w+\.whl$", wheel.name):
        sys.exit("check_wheel: the name says no glibc version: put it through `auditwheel repair`")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(f"{folder}/wheel")
    modules = list(Path(folder, "wheel", "tilewright").glob("*.so"))
    print(run(sys.executable, SCRIPTS / "check_binary.py", *modules), end="")


def check_use(wheel: Path, torch: str, folder: str) -> None:
    """A few lines of each family, and every kernel's own check, where PATH holds no compiler."""
    run(sys.executable, "-m", "venv", f"{folder}/venv")
    bin = f"{folder}/venv/bin"
    bare = {**os.environ, "PATH": bin, "PYTHONPATH": ""}
    pip = [f"{bin}/python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    run(*pip, "--only-binary", ":all:", torch, wheel, env=bare)
    print(run(f"{bin}/python", "-c", SMOKE_TEST, cwd=folder, env=bare), end="")
    facts = json.loads(run(f"{bin}/tilewright", "info", "--check", "--json", cwd=folder, env=bare))
    for subject, words in facts["verdict"].items():
        print(f"  {subject}: {words}")
    print(f"  {len(facts['checks'])} kernels checked, with torch {facts['packages']['torch']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=VERBATIM)
    parser.add_argument("dist", type=Path)
    parser.add_argument("--torch", default="torch", help="what pip installs as torch")
    options = parser.parse_args()
    only(options.dist, "tilewright-*.tar.gz")
    wheel = only(options.dist, "tilewright-*.whl")
    with tempfile.TemporaryDirectory() as folder:
        check_file(wheel, folder)
        check_use(wheel, options.torch, folder)
    print("check_wheel: fine")


if __name__ == "__main__":
    main()
