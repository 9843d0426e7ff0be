"""The attention demonstration on its real text, in a few steps; what it says when something is wrong."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tilewright import cli, swapping
from tilewright.demo import attention, plot

needs_transformers = pytest.mark.usefixtures("transformers5")


def record(step_ms: float = 20.0, validation: float = 3.0) -> dict[str, Any]:
    """A result in which dense steps took 100 ms, and the validation loss was 3."""

    def side(step: float, loss: float) -> dict[str, Any]:
        return {
            "step_ms": step, "forward_ms": step / 2, "backward_ms": step / 2, "losses": [4.0, loss],
            "validation": loss, "bytes_kept": 5_000_000,
        }  # fmt: skip

    return {
        "steps": 2,
        "parameters": 10,
        "settings": {"window": 32, "sink": 16, "length": 256},
        "masks": {attention.THEIRS: {"density": 0.5}, attention.OURS: {"density": 0.2}},
        "training": {attention.THEIRS: side(100.0, 3.0), attention.OURS: side(step_ms, validation)},
        "estimators": {"top_k": [{"setting": 4, "density": 0.25, "mass": 0.875, "ms": 1.0}] * 2},
        "peak_rss_bytes": 700_000_000,
    }


@needs_transformers
def test_the_whole_demonstration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert attention.run(steps=3, seeds=[0], out=tmp_path, quick=True) == 0
    found = json.loads((tmp_path / "attention.json").read_text())
    theirs, ours = found["training"][attention.THEIRS], found["training"][attention.OURS]
    assert (len(theirs["losses"]), len(ours["losses"])) == (3, 3)
    assert theirs["losses"][0] == pytest.approx(ours["losses"][0], abs=0.05), "untrained, both guess"
    assert ours["validation"] < 5.0, "it learned something"
    assert found["masks"][attention.OURS]["density"] < found["masks"][attention.THEIRS]["density"]
    assert ours["bytes_kept"] > 1e6
    for rows in found["estimators"].values():
        masses = [row["mass"] for row in rows]
        assert masses == sorted(masses)
        assert all(0 < mass <= 1.0001 for mass in masses)
        assert rows[0]["density"] < rows[-1]["density"]
    said = capsys.readouterr().out
    assert "ms per training step" in said
    pytest.importorskip("matplotlib")
    assert (tmp_path / "attention.png").stat().st_size > 20_000


@needs_transformers
def test_both_stop_where_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_PATIENCE", 0)
    models = attention.make_models(0, attention._QUICK, torch.arange(256)[None])
    trainings = {name: attention.make_training(model, 3) for name, model in models.items()}
    batch = torch.arange(256)[None], torch.arange(256)[None]
    attention.train_both(trainings, iter([batch] * 3), 3, Console(quiet=True))
    assert [len(training.losses) for training in trainings.values()] == [1, 1]


@needs_transformers
def test_layers_that_cannot_be_swapped_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    left = swapping.SwapReport(skipped=[swapping.Skipped("layers.0", "LlamaAttention", "it is too old")])
    monkeypatch.setattr(swapping, "swap", lambda model, **options: left)
    with pytest.raises(ValueError, match=r"cannot be swapped:(?s:.*)it is too old"):
        attention.make_models(0, attention._QUICK, torch.arange(256)[None])


def test_without_transformers_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli.main(["demo", "attention", "--quick", "--out", str(tmp_path)]) == 1
    assert "`tilewright demo attention` needs a model" in capsys.readouterr().err


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    attention.print_table(record(), Console(width=100))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["ms", "per", "training", "step", "100", "20", "0.2x"] in lines
    assert ["validation", "loss,", "step", "2", "3.0000", "3.0000", "+0.0000"] in lines


def test_slower_and_worse_are_said_plainly() -> None:
    good = attention.verdicts(record(validation=2.5))
    assert "is 5 times as fast" in good[0]
    assert "0.5000 lower with the window" in good[1]
    bad = attention.verdicts(record(step_ms=200.0, validation=3.5))
    assert "SLOWER (2.00x as long)" in bad[0]
    assert "0.5000 HIGHER with the window" in bad[1]


def test_what_a_forward_pass_keeps() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, inputs: torch.Tensor, use_cache: bool) -> Any:
            one_hot = torch.nn.functional.one_hot(inputs, 256).float()
            return type("Output", (), {"logits": super().forward(one_hot)})

    kept = attention.bytes_kept(Doubled(256, 256), torch.zeros(1, 8).long(), torch.zeros(1, 8).long())
    assert 2 * 8 * 256 * 4 <= kept < 4 * 8 * 256 * 4, "what came in, and the logarithms of probabilities"


def test_the_picture_of_a_result(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "attention.png"
    assert plot.plot_attention(record(), attention._QUICK.masks(), path) == f"plot     {path}"


def test_an_untrained_model_has_no_validation() -> None:
    assert math.isnan(attention.make_training(torch.nn.Linear(1, 1), 1).final())
