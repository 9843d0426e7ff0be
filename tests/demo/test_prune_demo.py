"""The pruning demonstration on its real data, in a few steps; what it says when something is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tilewright import cli
from tilewright.demo import plot, prune

needs_all = pytest.mark.usefixtures("libraries")


@pytest.fixture
def libraries(transformers5: None) -> None:
    for name in ("sklearn", "torch_pruning"):
        pytest.importorskip(name)


def result(final: float = 0.95, ms: float = 0.5) -> dict[str, Any]:
    """Of one model: dense recognises 98% in 1 ms, with blocks 60%, then 95%."""
    rows = {
        prune.DENSE: {
            "kept": 1.0,
            "bytes": 4_000_000,
            "quality": {"pruned": 0.98, "repaired": 0.98, "final": 0.98},
            "ms": {"1": 0.1, "256": 1.0},
            "layers": [],
        },
        prune.BLOCKS: {
            "kept": 0.25,
            "bytes": 1_000_000,
            "quality": {"pruned": 0.6, "repaired": 0.95, "final": final},
            "ms": {"1": 0.2, "256": ms},
            "layers": [
                {"name": "first", "kernel": "dense", "why": "too small"},
                {"name": "second", "kernel": "blocks of 16x16", "why": "2.00x the speed of dense"},
            ],
        },
    }
    alone = {"1": 0.1, "256": 1.0}
    return {
        "title": "a model", "measure": "accuracy", "unit": "image", "rows": rows, "zeros_alone_ms": alone
    }  # fmt: skip


@needs_all
def test_the_whole_demonstration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prune.run(steps=None, seeds=[0], out=tmp_path, quick=True) == 0
    found = json.loads((tmp_path / "prune.json").read_text())
    assert list(found["tasks"]) == ["digits", "text"]
    for task in found["tasks"].values():
        assert list(task["rows"]) == [prune.DENSE, prune.BLOCKS, prune.TWO_OF_FOUR, prune.CHANNELS]
        for name, row in task["rows"].items():
            assert set(row["ms"]) == {"1", "32"}
            assert row["kept"] == 1 if name == prune.DENSE else row["kept"] < 0.8
            assert bool(row["layers"]) == (name in (prune.BLOCKS, prune.TWO_OF_FOUR))
    assert found["tasks"]["digits"]["rows"][prune.DENSE]["quality"]["final"] > 0.4, "it learned something"
    assert found["versions"]["scikit-learn"]
    said = capsys.readouterr().out
    assert "save nothing" in said
    pytest.importorskip("matplotlib")
    assert (tmp_path / "prune.png").stat().st_size > 20_000


@needs_all
@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("sklearn.datasets", "pip install scikit-learn"),
        ("torch_pruning", "pip install torch-pruning"),
        ("transformers", "pip install transformers"),
    ],
)
def test_it_says_what_to_install(
    module: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["demo", "prune", "--quick", "--out", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    prune.print_table({"tasks": {"digits": result()}}, Console(width=80))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    expected = ["blocks", "75%", "25%", "60.0%", "95.0%", "1.0", "0.2", "0.50x", "0.5", "2.00x"]
    assert expected in lines


def test_slower_and_wrong_are_said_plainly() -> None:
    good = " ".join(prune.verdicts(result()))
    assert "accuracy 98.0% dense, 60.0% pruned, 95.0% repaired" in good
    assert "0.50x as fast (SLOWER) at 1 image, 2.00x as fast at 256 images" in good
    assert "1 of 2 pruned layers stay dense: sparse does not pay. first: too small" in good
    assert "WRONG" not in good
    all_dense = result()
    all_dense["rows"][prune.BLOCKS]["layers"].pop()
    assert "all layers stay dense, and take the time that dense layers take" in prune.verdicts(all_dense)[0]
    for wrong in (result(final=0.9), result(final=float("nan"))):
        assert not prune.is_sound(wrong)
        assert "WRONG" in prune.verdicts(wrong)[-1]


def test_the_picture_of_a_result(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    record = {"tasks": {"digits": result()}}
    assert plot.plot_prune(record, tmp_path / "prune.png") == f"plot     {tmp_path / 'prune.png'}"
