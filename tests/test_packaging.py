"""The installed package: its metadata, what the compiled modules need, that importing it does no harm."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tilewright
from tilewright import _C, _C_emulated

ROOT = Path(__file__).resolve().parent.parent


def run_python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints; a failure shows its traceback."""
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def run_script(name: str, *arguments: str | Path) -> None:
    command = [sys.executable, ROOT / "scripts" / name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_versions_agree():
    assert tilewright.__version__ == importlib.metadata.version("tilewright")
    assert tilewright.__version__ == _C.build_info()["version"] == _C_emulated.build_info()["version"]


def test_metadata():
    metadata = importlib.metadata.metadata("tilewright")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(required) == ["numpy", "rich", "torch>=2.6"]


def test_package_is_typed():
    assert importlib.resources.files("tilewright").joinpath("py.typed").is_file()


def test_console_script():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="tilewright")
    assert script.value == "tilewright.cli:main"
    assert callable(script.load())


def test_compiled_modules_need_and_export_nothing_of_torch_or_cuda():
    run_script("check_binary.py", _C.__file__, _C_emulated.__file__)


def test_sources_keep_the_rules():
    run_script("check_sources.py")


def test_modules_say_what_they_are():
    assert not _C.build_info()["emulated"]
    assert _C_emulated.build_info()["emulated"]
    assert not _C_emulated.build_info()["cuda"]


def test_import_without_a_visible_device():
    code = "import tilewright.optim; print(tilewright._C.cuda_runtime()['devices'])"
    assert run_python(code, CUDA_VISIBLE_DEVICES="") == "0"


@pytest.mark.parametrize("first", ["torch", "tilewright._C", "numpy", "tilewright.optim"])
def test_any_import_order(first):
    code = f"""
import {first}, tilewright.optim, torch
print(tilewright.optim.quantize_blockwise(torch.ones(300))[0].numel())
"""
    assert run_python(code) == "300"


def test_one_openmp_runtime():
    """Two would keep two thread pools that fight over the cores."""
    code = """
import torch, tilewright.optim
maps = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
print(len(maps))
"""
    assert run_python(code) == "1"


@pytest.mark.parametrize("used_before_fork", [False, True])
def test_fork_after_import(used_before_fork):
    """No lock or thread pool of the parent may be waited for, whether the child sets one thread or not."""
    code = f"""
import os, signal, torch, tilewright.optim as optim
torch.set_num_threads(2)
def work():
    codes, state = optim.quantize_blockwise(torch.linspace(-1, 1, 1_000_000))
    return float(optim.dequantize_blockwise(codes, state)[-1])
if {used_before_fork}:
    work()
child = os.fork()
if child == 0:
    signal.alarm(20)
    found = [work()]
    torch.set_num_threads(1)
    os._exit(0 if [*found, work()] == [1.0, 1.0] else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print(work())
"""
    assert run_python(code) == "1.0"


def test_import_leaves_cuda_alone():
    """A process may fork after the import only if nothing has opened the driver."""
    code = """
import os, torch, tilewright.optim
def target(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:  # the descriptor that listed the others
        return ""
opened = [target(fd) for fd in os.listdir("/proc/self/fd")]
print(torch.cuda.is_initialized(), any("nvidia" in path for path in opened))
"""
    assert run_python(code) == "False False"


@pytest.mark.parametrize("level", _C.cpu_levels())
def test_level_can_be_forced(level):
    assert run_python("from tilewright import _C; print(_C.cpu_level())", TILEWRIGHT_CPU=level) == level


def test_unknown_level_is_refused_with_the_allowed_ones():
    code = """
try:
    from tilewright import _C
    _C.cpu_level()
except (ValueError, ImportError) as error:
    print(error)
"""
    message = run_python(code, TILEWRIGHT_CPU="sse9")
    assert "sse9" in message
    assert "baseline" in message
