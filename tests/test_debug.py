"""TILEWRIGHT_DEBUG=1: what it says, what it keeps, and that a kept call can be made again.

The variable counts when ops are registered, so each program here runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tilewright as tw
from tilewright import _debug
from tilewright.testing import replay

FAMILIES = (tw.attention, tw.optim, tw.prune, tw.scan)  # importing them registers every op

# A state that overflows float32, from inputs that are transposed and expanded.
OVERFLOW = """
import torch, tilewright as tw
a = torch.full((3, 40, 5), 1e30).transpose(1, 2).contiguous().transpose(1, 2)
b = torch.linspace(1, 2, 40)[None, :, None].expand(3, 40, 5)
tw.scan.linear_scan(a, b)
"""


def run(program: str, folder: Path, debug: str = "1", **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TILEWRIGHT_DEBUG": debug, "TILEWRIGHT_DEBUG_DIR": "", **variables}
    command = [sys.executable, *([program] if program.endswith(".py") else ["-c", program])]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def only_call(folder: Path) -> Path:
    (call,) = (folder / "tilewright-debug").iterdir()
    return call


def test_an_infinity_is_found_at_its_op_and_the_kept_call_gives_the_same_bits(tmp_path: Path) -> None:
    finished = run(OVERFLOW, tmp_path)
    last = finished.stderr.strip().splitlines()[-1]
    kept = only_call(tmp_path)
    assert last.startswith(
        "FloatingPointError: tilewright::linear_scan_fwd: result 0 holds 0 NaN and 570 infinite values, "
        "the first at (0, 2, 0), and all it was given is finite"
    )
    assert f"tilewright-debug/{kept.name}/replay.py" in last
    # As tensors were given: not one element more is kept, and strides come back, also those of 0.
    memory = torch.load(kept / "tensors.pt", weights_only=True)
    assert {name: value.numel() for name, value in memory.items()} == {"a": 600, "b": 40}
    call = json.loads((kept / "call.json").read_text())
    assert call["arguments"]["b"]["stride"] == [0, 1, 0]
    assert call["arguments"]["dim"] == 1
    assert json.loads((kept / "info.json").read_text())["versions"]["torch"]

    again = run(str(kept / "replay.py"), tmp_path)
    assert again.returncode == 0, again.stderr
    assert "b: float32 [3, 40, 5], strides [0, 1, 0], on cpu" in again.stdout
    assert again.stdout.endswith("now:  the same results, bit for bit\n")
    only_call(tmp_path)  # a replay keeps nothing


def test_an_exception_keeps_its_type_and_the_kept_call_raises_it_again(tmp_path: Path) -> None:
    finished = run(
        """
import torch, tilewright as tw
from tilewright.scan import selective_state_update
state, x = torch.zeros(2, 4, 8), torch.ones(2, 4)
try:
    selective_state_update(state, x, x, torch.ones(4, 8), torch.ones(2, 8), torch.ones(2, 7))
except ValueError as error:
    print(error)
""",
        tmp_path,
    )
    assert finished.returncode == 0, finished.stderr
    message, note = finished.stdout.strip().splitlines()
    kept = only_call(tmp_path)
    assert (
        note
        == f"tilewright::selective_state_update: `python {Path('tilewright-debug') / kept.name}/replay.py` makes the call again"
    )
    again = run(str(kept / "replay.py"), tmp_path)
    assert again.returncode == 0, again.stderr
    then, now = again.stdout.splitlines()[-2:]
    assert then.removeprefix("then:").strip() == now.removeprefix("now:").strip() == f"ValueError: {message}"


def test_what_a_call_writes_to_is_kept_as_it_was_before(tmp_path: Path) -> None:
    finished = run(
        """
import torch, tilewright as tw
state = torch.arange(16.0).reshape(1, 2, 8).clone()
x = torch.full((1, 2), 3e38)
tw.scan.selective_state_update(state, x, x.clamp(max=1), torch.ones(2, 8), torch.full((1, 8), 9.0), torch.ones(1, 8))
""",
        tmp_path,
    )
    assert "selective_state_update: result 0 holds" in finished.stderr
    kept = only_call(tmp_path)
    memory = torch.load(kept / "tensors.pt", weights_only=True)
    torch.testing.assert_close(memory["state"], torch.arange(16.0), rtol=0, atol=0)
    assert run(str(kept / "replay.py"), tmp_path).returncode == 0


def test_steps_of_optimizers_are_watched_too(tmp_path: Path) -> None:
    finished = run(
        """
import torch, tilewright as tw
p = torch.nn.Parameter(torch.linspace(-1, 1, 5000).reshape(50, 100))
optimizer = tw.optim.AdamW8bit([p], lr=1e-3)
for scale in (1.0, 1.0, 1e30):
    p.grad = scale * p.detach()
    optimizer.step()
""",
        tmp_path,
    )
    assert "FloatingPointError: tilewright::optimizer_step: states[0]" in finished.stderr
    kept = only_call(tmp_path)
    again = run(str(kept / "replay.py"), tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "states[0][absmax1]: float32 [20], strides [1], on cpu" in again.stdout


@pytest.mark.parametrize("order", ["1", "2"])
def test_a_call_on_the_emulator_is_made_again_there(tmp_path: Path, order: str) -> None:
    program = OVERFLOW.replace("tw.scan.linear_scan(a, b)", "import tilewright.testing") + (
        f"with tilewright.testing.emulated(seed={order}, multiprocessors=7):\n    tw.scan.linear_scan(a, b)\n"
    )
    assert "linear_scan_fwd: result 0 holds" in run(program, tmp_path).stderr
    kept = only_call(tmp_path)
    call = json.loads((kept / "call.json").read_text())
    assert call["emulated"] == {"seed": int(order), "multiprocessors": 7, "compute_capability": 80}
    again = run(str(kept / "replay.py"), tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr


def test_values_that_are_infinite_by_contract_or_by_their_inputs_pass(tmp_path: Path) -> None:
    finished = run(
        """
import torch, tilewright as tw
from tilewright.attention import BlockMask, block_sparse_attention
q = torch.randn(1, 2, 64, 16, requires_grad=True)
empty = BlockMask.from_dense(torch.zeros(1, 1, 2, 2, dtype=torch.bool), 32)
out, lse = block_sparse_attention(q, q, q, empty, return_lse=True)
assert lse.isneginf().all()
out.sum().backward()
x = torch.randn(1, 3, 50, requires_grad=True)
packed = tw.scan.selective_scan(x, x.detach().abs(), -torch.ones(3, 4), torch.randn(1, 4, 50),
    torch.randn(1, 4, 50), cu_seqlens=torch.tensor([0, 1, 3, 50]))
packed.sum().backward()
assert tw.scan.linear_scan(torch.ones(1, 9, 1), torch.full((1, 9, 1), torch.inf)).isinf().all()
""",
        tmp_path,
    )
    assert finished.returncode == 0, finished.stderr
    assert not (tmp_path / "tilewright-debug").exists()


@pytest.mark.slow
def test_compiled_functions_are_watched(tmp_path: Path) -> None:
    compiled = OVERFLOW.replace(
        "tw.scan.linear_scan(a, b)", "torch.compile(tw.scan.linear_scan, fullgraph=True)(a, b)"
    )
    assert "tilewright::linear_scan_fwd: result 0 holds" in run(compiled, tmp_path).stderr
    assert run(str(only_call(tmp_path) / "replay.py"), tmp_path).returncode == 0


def test_only_so_many_calls_are_kept_where_one_says(tmp_path: Path) -> None:
    program = OVERFLOW.replace(
        "tw.scan.linear_scan(a, b)",
        """
for _ in range(12):
    try:
        tw.scan.linear_scan(a, b)
    except FloatingPointError as error:
        message = str(error)
print(message)
""",
    )
    finished = run(program, tmp_path, TILEWRIGHT_DEBUG_DIR=str(tmp_path / "a" / "b"))
    assert len(list((tmp_path / "a" / "b").iterdir())) == 10
    assert finished.stdout.endswith(
        f"the call was not kept, because {tmp_path / 'a' / 'b'} holds 10 already\n"
    )


def test_a_directory_that_cannot_be_written_does_not_hide_the_error(tmp_path: Path) -> None:
    (tmp_path / "tilewright-debug").write_text("a file is in the way")
    finished = run(OVERFLOW, tmp_path)
    assert "infinite values" in finished.stderr
    assert "the call was not kept in tilewright-debug: FileExistsError" in finished.stderr


@pytest.mark.parametrize("debug", ["", "0"])
def test_off_it_adds_nothing(tmp_path: Path, debug: str) -> None:
    finished = run(
        OVERFLOW
        + """
import sys
from tilewright import _backend, _library
from tilewright.optim import AdamW8bit
assert "tilewright._debug" not in sys.modules
given = []
_library._library.impl = lambda name, implementation, key: given.append(implementation)
def kernel(x): return x
_library.define("unwatched(Tensor x) -> Tensor", kernel, kernel)
assert given == [kernel, kernel]
assert type(_backend.optimizer_plan("adam")) is _backend.C.OptimizerPlan
""",
        tmp_path,
        debug,
    )
    assert finished.returncode == 0, finished.stderr
    assert not (tmp_path / "tilewright-debug").exists()


def test_exemptions_name_ops_and_places_that_are_there() -> None:
    for op, places in [*_debug._EXEMPT.items(), *_debug._UNREAD.items()]:
        schema = getattr(torch.ops.tilewright, op).default._schema
        names = {argument.name for argument in schema.arguments}
        for place in places:
            assert place in names or (isinstance(place, int) and place < len(schema.returns)), (op, place)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        replay(tmp_path / "nowhere")
