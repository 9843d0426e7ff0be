"""TILEWRIGHT_DEBUG=1: what it says, what it keeps, and that a kept call can be made again.

The variable counts when ops are registered, so what is watched runs in a process of its own; kept calls are
made again here, where nothing is watched.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tilewright as tw
from tilewright import _debug
from tilewright.testing import replay

FAMILIES = (tw.attention, tw.optim, tw.prune, tw.scan)  # importing them registers every op

# Each case has a directory of its own; what it says goes to the last line, as JSON.
CASES = """
import json, os
import torch
import tilewright as tw
import tilewright.testing
from tilewright.attention import BlockMask, block_sparse_attention

# A state that overflows float32, from inputs that are transposed and expanded.
a = torch.full((3, 5, 40), 1e30).transpose(1, 2)
b = torch.linspace(1, 2, 40)[None, :, None].expand(3, 40, 5)


def overflow(): tw.scan.linear_scan(a, b)

def emulated():
    with tilewright.testing.emulated(seed=3, multiprocessors=7):
        overflow()

def refused():
    tw.scan.linear_scan(a[:1], b[:1], cu_seqlens=torch.tensor([0, 50]))

def written():
    state, x = torch.arange(16.0).reshape(1, 2, 8), torch.full((1, 2), 3e38)
    weights = torch.ones(2, 8), torch.full((1, 8), 9.0), torch.ones(1, 8)
    tw.scan.selective_state_update(state, x, torch.ones(1, 2), *weights)

def optimizer():
    p = torch.nn.Parameter(torch.linspace(-1, 1, 5000).reshape(50, 100))
    optimizer = tw.optim.AdamW8bit([p], lr=1e-3)
    p.grad = p.detach().clone()
    optimizer.step()
    optimizer.param_groups[0].update(lr=1e3, weight_decay=1e38)
    optimizer.step()

def unwritable():
    open("unwritable", "w").close()
    overflow()

def many():
    for _ in range(10):
        try:
            overflow()
        except FloatingPointError:
            pass
    overflow()

def by_contract():
    q = torch.randn(1, 2, 64, 16, requires_grad=True)
    empty = BlockMask.from_dense(torch.zeros(1, 1, 2, 2, dtype=torch.bool), 32)
    out, lse = block_sparse_attention(q, q, q, empty, return_lse=True)
    assert lse.isneginf().all()
    out.sum().backward()
    u, B = torch.randn(1, 3, 50, requires_grad=True), torch.randn(1, 4, 50)
    ends = torch.tensor([0, 1, 3, 50])
    tw.scan.selective_scan(u, u.detach().abs(), -torch.ones(3, 4), B, B, cu_seqlens=ends).sum().backward()

def by_its_inputs():
    assert tw.scan.linear_scan(torch.ones(1, 9, 1), torch.full((1, 9, 1), torch.inf)).isinf().all()


said = {}
for case in (overflow, emulated, refused, written, optimizer, unwritable, many, by_contract, by_its_inputs):
    os.environ["TILEWRIGHT_DEBUG_DIR"] = case.__name__
    try:
        case()
    except (FloatingPointError, ValueError) as error:
        said[case.__name__] = f"{type(error).__name__}: {error}"
print(json.dumps(said))
"""

COMPILED = """
import torch, tilewright as tw
a = torch.full((1, 9, 1), 1e30)
torch.compile(tw.scan.linear_scan, fullgraph=True)(a, a)
"""

OFF = """
import sys
import torch
from tilewright import _backend, _library, optim, scan
assert "tilewright._debug" not in sys.modules
given = []
register = _library._library.impl
def note(name, implementation, key, **options):
    given.append(implementation)
    register(name, implementation, key, **options)
_library._library.impl = note
def kernel(x): return x.clone()
_library.define("unwatched(Tensor x) -> Tensor", kernel, kernel)
assert given[:2] == [kernel, kernel]
assert type(_backend.optimizer_plan("adam")) is _backend.C.OptimizerPlan
assert scan.linear_scan(torch.full((1, 9, 1), 1e30), torch.ones(1, 9, 1)).isinf().any()
"""


def run(program: str, folder: Path, debug: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TILEWRIGHT_DEBUG": debug, "TILEWRIGHT_DEBUG_DIR": ""}
    command = [sys.executable, *([program] if program.endswith(".py") else ["-c", program])]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False
    )


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Where the cases ran, and what each raised."""
    folder = tmp_path_factory.mktemp("watched")
    finished = run(CASES, folder, debug="1")
    assert finished.returncode == 0, finished.stderr
    return folder, json.loads(finished.stdout.splitlines()[-1])


def the_call(watched: tuple[Path, dict[str, str]], case: str) -> tuple[Path, dict[str, Any]]:
    (kept,) = (watched[0] / case).iterdir()
    return kept, json.loads((kept / "call.json").read_text())


def test_an_infinity_is_named_with_its_op_and_place(watched: tuple[Path, dict[str, str]]) -> None:
    kept, call = the_call(watched, "overflow")
    assert watched[1]["overflow"] == (
        "FloatingPointError: tilewright::linear_scan_fwd: result 0 holds 570 infinite values, "
        "the first at (0, 2, 0), though all it was given is finite; "
        f"`python overflow/{kept.name}/replay.py` makes the call again"
    )
    assert call["threads"] == torch.get_num_threads()
    assert any("in overflow" in line for line in call["stack"])
    assert json.loads((kept / "info.json").read_text())["packages"]["torch"] == torch.__version__


def test_tensors_are_kept_as_they_lie(watched: tuple[Path, dict[str, str]]) -> None:
    kept, call = the_call(watched, "overflow")
    memory = torch.load(kept / "tensors.pt", weights_only=True)
    assert {name: value.numel() for name, value in memory.items()} == {"a": 600, "b": 40}
    assert call["arguments"]["a"]["stride"] == [200, 1, 40]
    assert call["arguments"]["b"]["stride"] == [0, 1, 0]
    assert (call["arguments"]["h0"], call["arguments"]["dim"]) == (None, 1)


@pytest.mark.parametrize("alignment", [0, 4, 28, 60])
def test_memory_begins_where_it_did(alignment: int) -> None:
    memory = torch.arange(100.0)
    facts = {"tensor": "x", "shape": [5, 9], "stride": [11, 1], "device": "cpu", "alignment": alignment}
    value = _debug._restored(facts, {"x": memory}, None)
    assert value.data_ptr() % 64 == alignment
    assert torch.equal(value, memory.as_strided((5, 9), (11, 1)))


def test_the_script_makes_the_call_again(watched: tuple[Path, dict[str, str]]) -> None:
    kept, _ = the_call(watched, "overflow")
    again = run(str(kept / "replay.py"), watched[0], debug="1")
    assert again.returncode == 0, again.stderr
    assert "  b: float32 [3, 40, 5], strides [0, 1, 0], on cpu\n  h0 = None\n" in again.stdout
    assert again.stdout.endswith("now:  the same results, bit for bit\n")
    the_call(watched, "overflow")  # and keeps nothing


def test_an_exception_keeps_its_type_and_comes_again(
    watched: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    kept, _ = the_call(watched, "refused")
    message, note = watched[1]["refused"].splitlines()
    assert message == "ValueError: cu_seqlens must increase strictly from 0 to the length 40, got [0, 50]"
    assert note == f"tilewright::linear_scan_fwd: `python refused/{kept.name}/replay.py` makes the call again"
    assert replay(kept)
    assert capsys.readouterr().out.endswith(f"then: {message}\nnow:  {message}\n")


def test_a_call_that_ends_otherwise_is_told(
    watched: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    kept, _ = the_call(watched, "optimizer")
    results = torch.load(kept / "results.pt", weights_only=True)
    changed = {**results, "params[0]": torch.zeros(50, 100)}
    try:
        torch.save(changed, kept / "results.pt")
        assert not replay(kept)
    finally:
        torch.save(results, kept / "results.pt")
    assert capsys.readouterr().out.endswith("now:  other results\n")


def test_what_a_call_writes_to_is_kept_as_it_was_before(watched: tuple[Path, dict[str, str]]) -> None:
    kept, _ = the_call(watched, "written")
    assert "selective_state_update: result 0 holds" in watched[1]["written"]
    memory = torch.load(kept / "tensors.pt", weights_only=True)
    assert torch.equal(memory["state"], torch.arange(16.0))
    assert replay(kept)


def test_steps_of_optimizers_are_watched_too(
    watched: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    kept, _ = the_call(watched, "optimizer")
    assert "FloatingPointError: tilewright::optimizer_step: " in watched[1]["optimizer"]
    assert replay(kept)
    assert "  states[0][absmax1]: float32 [20], strides [1], on cpu\n" in capsys.readouterr().out


def test_a_call_on_the_emulator_is_made_again_there(watched: tuple[Path, dict[str, str]]) -> None:
    kept, call = the_call(watched, "emulated")
    assert "linear_scan_fwd: result 0 holds" in watched[1]["emulated"]
    facts = call["emulated"]
    assert (facts["seed"], facts["multiprocessors"]) == (3, 7)
    assert replay(kept)


def test_values_that_are_infinite_by_contract_or_by_their_inputs_pass(
    watched: tuple[Path, dict[str, str]],
) -> None:
    folder, said = watched
    assert not said.keys() & {"by_contract", "by_its_inputs"}
    assert not (folder / "by_contract").exists()


def test_only_so_many_calls_are_kept(watched: tuple[Path, dict[str, str]]) -> None:
    assert len(list((watched[0] / "many").iterdir())) == 10
    assert watched[1]["many"].endswith("; the call was not kept, because many holds 10 already")


def test_a_directory_that_cannot_be_written_does_not_hide_the_error(
    watched: tuple[Path, dict[str, str]],
) -> None:
    said = watched[1]["unwritable"]
    assert "570 infinite values" in said
    assert "; the call was not kept in unwritable: FileExistsError: " in said


@pytest.mark.slow
def test_compiled_functions_are_watched(tmp_path: Path) -> None:
    assert "tilewright::linear_scan_fwd: result 0 holds" in run(COMPILED, tmp_path, debug="1").stderr
    (kept,) = (tmp_path / "tilewright-debug").iterdir()
    assert replay(kept)


def test_off_it_adds_nothing(tmp_path: Path) -> None:
    finished = run(OFF, tmp_path, debug="0")
    assert finished.returncode == 0, finished.stderr
    assert not list(tmp_path.iterdir())


def test_exemptions_name_ops_and_places_that_are_there() -> None:
    for op, places in [*_debug._EXEMPT.items(), *_debug._UNREAD.items()]:
        schema = getattr(torch.ops.tilewright, op).default._schema
        names = {argument.name for argument in schema.arguments}
        for place in places:
            assert place in names or (isinstance(place, int) and place < len(schema.returns)), (op, place)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        replay(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("failing", "said"),
    [
        (1, "device error\ntilewright::op: an earlier kernel failed, not this op"),
        (2, "device error\ntilewright::op: `python {}` makes the call again"),
    ],
)
def test_errors_that_show_while_waiting_go_to_the_op_that_caused_them(
    failing: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands for a GPU: a kernel's error comes from the wait after the op that launched it."""
    waits = 0

    def wait(arguments: Any) -> None:
        nonlocal waits
        waits += 1
        if waits == failing:
            raise RuntimeError("device error")

    monkeypatch.setattr(_debug, "_wait", wait)
    monkeypatch.setenv("TILEWRIGHT_DEBUG_DIR", str(tmp_path))
    ran = []

    def implementation(x: torch.Tensor) -> None:
        ran.append(x)

    op = _debug._watched("op", implementation, ["x"], set())
    with pytest.raises(RuntimeError) as raised:
        op(torch.ones(3))
    assert len(ran) == failing - 1
    scripts = list(tmp_path.glob("*/replay.py"))
    assert len(scripts) == failing - 1
    assert str(raised.value) == said.format(*scripts)
