"""The story on its real text and its real model, in a few steps; what it says when something is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tilewright import cli
from tilewright.demo import plot, story, story_report

needs_transformers = pytest.mark.usefixtures("transformers5")


def record(step_ms: float = 2.0, loss: float = 3.0, compressed: float = 1.2) -> dict[str, Any]:
    """A result in which transformers took 100 ms for a step and had losses of 4 and 3."""
    stages = {
        story_report.SWAP: {
            "step_ms": [100.0, step_ms],
            "losses": [[4.0, 3.0], [4.0, loss]],
            "training_loss": [3.0, loss],
        },
        story_report.OPTIMIZER: {
            "step_ms": [50.0, 50.0],
            "optimizer_ms": [2.0, 1.0],
            "state_bytes": [8e6, 2e6],
            "validation": [1.0, 1.001],
        },
        story_report.WINDOW: {"step_ms": [900.0, 600.0], "density": [0.5, 0.125], "validation": [1.0, 1.1]},
        story_report.PRUNE: {"validation": [1.1, 3.0]},
        story_report.REPAIR: {"validation": [3.0, 1.2]},
        story_report.COMPRESS: {
            "bytes": [16e6, 8e6],
            "read_ms": [300.0, 150.0],
            "token_ms": [2.0, 1.0],
            "validation": [1.2, compressed],
            "kernels": {"dense": 3, "blocks of 16x16": 5},
        },
        story_report.WHOLE: {
            "bytes": [16e6, 8e6],
            "read_ms": [900.0, 150.0],
            "token_ms": [4.0, 1.0],
            "validation": [1.1, compressed],
            "prompt": "    [bold]def[/bold]\n",
            "sample": "return",
        },
    }
    sizes = {"batch": 2, "length": 256, "long": 4096, "window": 512, "sparsity": 0.75}
    return {
        "demo": "story", "steps": 9, "parameters": 10, "seconds": 1.0, "settings": sizes, "stages": stages
    }  # fmt: skip


@needs_transformers
def test_the_whole_story(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "story.json").read_text())
    stages = found["stages"]
    assert list(stages) == list(record()["stages"])
    assert story_report.loss_difference(found) < 1e-4
    assert max(stages[story_report.OPTIMIZER]["validation"]) < 5.0, "it learned something"
    before, after = stages[story_report.OPTIMIZER]["state_bytes"]
    assert after < 0.5 * before
    before, after = stages[story_report.WINDOW]["density"]
    assert after < 0.6 * before
    dense, pruned = stages[story_report.PRUNE]["validation"]
    assert pruned > dense
    assert stages[story_report.REPAIR]["validation"][1] < pruned
    assert sum(stages[story_report.COMPRESS]["kernels"].values()) == 8, "two MLPs, a Mamba's two projections"
    said = capsys.readouterr().out
    assert "ms to generate a byte" in said
    assert "How the small model goes on" in said
    pytest.importorskip("matplotlib")
    assert (tmp_path / "story.png").stat().st_size > 20_000


@needs_transformers
def test_an_interrupted_story_leaves_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(story, "train_8bit", interrupted)
    assert cli.main(["demo", "story", "--quick", "--out", str(tmp_path)]) == 130
    assert list(json.loads((tmp_path / "story.json").read_text())["stages"]) == [story_report.SWAP]
    printed = capsys.readouterr()
    assert "swap Mamba" in printed.out
    assert "interrupted" in printed.err


@pytest.mark.parametrize("steps", ["0", "many"])
def test_steps_that_are_no_number_are_refused(steps: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["demo", "--steps", steps])
    assert f"must be a whole number, 1 or more, got '{steps}'" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_said_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--out", str(tmp_path / "file")]) == 1
    printed = capsys.readouterr()
    assert "results cannot be written there" in printed.err
    assert printed.out == ""


def test_without_transformers_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 1
    assert "not installed: pip install transformers" in capsys.readouterr().err


def test_the_table_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    story_report.print_table(record(), Console(width=80))
    said = capsys.readouterr().out
    assert "…" not in said
    lines = [line.split() for line in said.splitlines()]
    assert ["AdamW8bit", "optimizer", "state,", "MB", "8.00", "2.00", "0.25x"] in lines
    assert ["[bold]def[/bold]"] in lines


def test_slower_and_wrong_are_said_plainly() -> None:
    good = " ".join(story_report.verdicts(record()))
    assert "differ by at most 0e+00" in good
    assert "Of 8 pruned layers 5 run in a sparse form" in good
    assert "The price: +0.100 nats per byte" in good
    assert "SLOWER" not in good
    assert "WRONG" not in good
    bad = story_report.verdicts(record(step_ms=200.0))
    assert "SLOWER than before: ms per step (swap Mamba)" in bad[-1]
    for wrong in (record(loss=3.5), record(loss=float("nan")), record(compressed=1.3)):
        assert not story_report.is_sound(wrong)
        assert "WRONG" in story_report.verdicts(wrong)[-1]


@pytest.mark.parametrize("stages", [1, 4, 7])
def test_the_picture_of_what_there_is(stages: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found, path = record(), tmp_path / "story.png"
    found["stages"] = dict(list(found["stages"].items())[:stages])
    assert plot.plot_story(found, path) == f"plot     {path}"


@needs_transformers
def test_weights_in_transformers_own_layers_compute_the_same() -> None:
    model = story.make_model(0, story._QUICK).eval()
    text = torch.arange(64)[None]
    with torch.no_grad():
        swapped = story.swapped_copy(model)
        own = story.stock_copy(swapped)(text, use_cache=False).logits
        torch.testing.assert_close(own, model(text, use_cache=False).logits, rtol=0, atol=0)
        torch.testing.assert_close(swapped(text, use_cache=False).logits, own, rtol=1e-4, atol=1e-5)
