"""The swaps beside other releases of transformers: one of each way that its caches and masks have had."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.nightly
@pytest.mark.parametrize("release", ["4.57.6", "5.0.0", "5.4.0", "5.8.1", "5.14.1", "5.20.2"])
def test_release(release: str, tmp_path: Path) -> None:
    install = ["-m", "pip", "install", "--quiet", "--target", str(tmp_path), f"transformers=={release}"]
    subprocess.run([sys.executable, *install], check=True)
    search = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE)],
        env={**os.environ, "PYTHONPATH": search},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert found.returncode == 0, found.stdout[-10_000:]
    probe = "import transformers; print(transformers.__version__)"
    seen = subprocess.run(
        [sys.executable, "-c", probe],
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
    )
    assert seen.stdout.strip() == release
