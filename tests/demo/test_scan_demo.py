"""The Mamba demonstration on its real text, in a few steps; what it says when something is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tilewright import cli, swapping
from tilewright.demo import plot, scan, text

needs_transformers = pytest.mark.usefixtures("transformers5")


@pytest.fixture
def short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    train, held_out = text.load_text()
    monkeypatch.setattr(scan, "load_text", lambda: (train, held_out[:2000]))


def record(step_ms: float = 2.0, token_ms: float = 0.5, loss: float = 3.0) -> dict[str, Any]:
    """A result in which transformers took 100 ms for a step, 1 ms for a token, and had losses of 4 and 3."""
    return {
        "steps": 4,
        "parameters": 10,
        "settings": {"batch": 2, "length": 50},
        "training": {
            scan.THEIRS: {"step_ms": 100.0, "losses": [4.0, 3.0], "validation": []},
            scan.OURS: {
                "step_ms": step_ms,
                "seconds": 9.0,
                "losses": [4.0, loss, 2.0, 1.0],
                "validation": [(4, 1.5)],
            },
        },
        "generation": {
            "prompt": "    [bold]def[/bold]\n",
            "sample": "return",
            "tokens": 8,
            "same_tokens": 7,
            "token_ms": {scan.THEIRS: 1.0, scan.OURS: token_ms},
        },
    }


@needs_transformers
@pytest.mark.usefixtures("short_text")
def test_the_whole_demonstration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scan.run(steps=8, seeds=[0], out=tmp_path, quick=True) == 0
    found = json.loads((tmp_path / "scan.json").read_text())
    theirs, ours = found["training"][scan.THEIRS], found["training"][scan.OURS]
    assert (len(theirs["losses"]), len(ours["losses"])) == (3, 8)
    assert theirs["losses"] == pytest.approx(ours["losses"][:3], abs=1e-4)
    assert ours["validation"][-1][0] == 8
    assert ours["validation"][-1][1] < 5.0, "it learned something"
    assert found["generation"]["same_tokens"] > 0
    assert found["versions"]["transformers"]
    said = capsys.readouterr().out
    assert "tokens per second, training" in said
    pytest.importorskip("matplotlib")
    assert (tmp_path / "scan.png").stat().st_size > 20_000


@needs_transformers
@pytest.mark.usefixtures("short_text")
def test_models_that_differ_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = scan.make_models(0)
    with torch.no_grad():
        next(models[scan.OURS].parameters()).mul_(1.5)
    monkeypatch.setattr(scan, "make_models", lambda seed: models)
    assert scan.run(steps=2, seeds=[0], out=tmp_path, quick=True) == 1


@needs_transformers
def test_no_patience_still_compares_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_PATIENCE", 0)
    train, held_out = text.load_text()
    size = scan.Size(steps=3, common=3, batch=1, length=16, validations=1, generated=1)
    trainings = {name: scan.make_training(model, 3) for name, model in scan.make_models(0).items()}
    assert scan.train_both(trainings, 3, train, held_out[:500], size, 0, Console(quiet=True)) == 2
    assert [len(training.losses) for training in trainings.values()] == [2, 3]


@needs_transformers
def test_layers_that_cannot_be_swapped_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    left = swapping.SwapReport(skipped=[swapping.Skipped("layers.0", "MambaMixer", "it is too old")])
    monkeypatch.setattr(swapping, "swap", lambda model: left)
    with pytest.raises(ValueError, match=r"cannot be swapped:(?s:.*)it is too old"):
        scan.make_models(0)


def test_without_transformers_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli.main(["demo", "scan", "--quick", "--out", str(tmp_path)]) == 1
    assert "not installed: pip install transformers" in capsys.readouterr().err


def test_the_table_and_the_text_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    scan.print_table(record(), Console(width=100))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["ms", "per", "training", "step", "100.0", "2.0", "0.02x"] in lines
    assert ["tokens", "per", "second,", "training", "1000", "50000", "50x"] in lines
    assert ["[bold]def[/bold]"] in lines


def test_slower_and_wrong_are_said_plainly() -> None:
    good = " ".join(scan.verdicts(record()))
    assert "50 times as fast" in good
    assert "4 of them took 9 s, and would have taken 8 min as it came." in good
    assert "the first 7 are the same" in good
    assert "SLOWER" not in good
    assert "WRONG" not in good
    bad = scan.verdicts(record(step_ms=200.0, token_ms=1.5, loss=3.5))
    assert "5.0e-01, more than rounding: one of them is WRONG." in bad[0]
    assert "a training step is SLOWER (2.00x as long)" in bad[1]
    assert "a generated token is SLOWER (1.50x as long)" in bad[2]


def test_a_loss_that_is_no_number_is_no_agreement() -> None:
    assert not scan.loss_difference(record(loss=float("nan"))) <= 1.0


def test_the_picture_of_a_result(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plot.plot_scan(record(), tmp_path / "scan.png") == f"plot     {tmp_path / 'scan.png'}"
