"""The demonstration on its real text and its real model, in a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tilewright.demo import host, optim, plot, text, training
from tilewright.demo.language_model import ByteLanguageModel
from tilewright.demo.training import mean_loss


def test_the_text_is_there_and_split() -> None:
    train, held_out = text.load_text()
    assert 350_000 < len(train) < 1_000_000
    assert len(held_out) == pytest.approx(len(train) / 9, abs=10)
    assert train.dtype == torch.uint8
    assert b"class" in bytes(train[:200_000].tolist())


def test_batches_depend_on_the_seed_alone() -> None:
    train, _ = text.load_text()
    one, same, other = (next(text.random_batches(train, 4, 16, seed)) for seed in (1, 1, 2))
    assert torch.equal(one[0], same[0])
    assert not torch.equal(one[0], other[0])
    assert torch.equal(one[0][:, 1:], one[1][:, :-1]), "targets are the inputs, one byte on"


def test_windows_cover_the_data_once() -> None:
    data = torch.arange(200, dtype=torch.uint8)
    inputs = torch.cat([batch[0] for batch in text.windows(data, 16, 5)])
    assert torch.equal(inputs.flatten(), torch.arange(192))


def test_the_model_cannot_see_what_comes() -> None:
    torch.manual_seed(0)
    model = ByteLanguageModel(width=32, depth=2, heads=2, length=16)
    inputs = torch.randint(0, 256, (2, 16))
    changed = inputs.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    before, after = model(inputs), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


def test_an_untrained_model_knows_nothing() -> None:
    torch.manual_seed(0)
    _, held_out = text.load_text()
    loss = mean_loss(ByteLanguageModel(), text.windows(held_out[:2000], 64, 16), ByteLanguageModel.loss)
    assert loss == pytest.approx(torch.log(torch.tensor(256.0)).item(), abs=0.5)


def test_the_whole_demonstration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, held_out = text.load_text()
    monkeypatch.setattr(optim, "load_text", lambda: (train, held_out[:4000]))
    assert optim.run(steps=20, seeds=range(2), out=tmp_path) == 0
    record = json.loads((tmp_path / "optim.json").read_text())
    assert [run["seed"] for run in record["runs"]] == [0, 1]
    for run in record["runs"]:
        theirs, ours = run[optim.THEIRS], run[optim.OURS]
        assert len(ours["losses"]) == 20
        assert ours["validation_loss"] < 4.5, "it learned something"
        assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], abs=0.1)
        assert ours["state_bytes"] < 0.27 * theirs["state_bytes"]
    assert record["spread"]["seeds"] == 2
    assert "ms per optimizer step" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert (tmp_path / "optim.png").stat().st_size > 20_000


def test_slower_is_said_plainly() -> None:
    fast = {"validation_loss": 1.0, "optimizer_ms": 1.0, "step_ms": 10.0}
    slow = {"validation_loss": 1.1, "optimizer_ms": 2.0, "step_ms": 10.1}
    record = {"runs": [{optim.THEIRS: fast, optim.OURS: slow}], "spread": None}
    said = optim.verdicts(record)
    assert "+0.1000" in said[0]
    assert said[1] == "Time: the optimizer step takes 2.00x as long with 8-bit states, so it is SLOWER."
    assert said[2] == "Time: a whole training step takes 1.01x as long with 8-bit states."


def test_smoothing_has_no_lag() -> None:
    ramp = [float(value) for value in range(100)]
    assert plot.smoothed(ramp)[30:70] == pytest.approx(ramp[30:70])


def test_text_is_safe_to_print() -> None:
    assert host.decoded([65, 27, 10, 0xC3, 0xA9, 0xFF]) == "A\ufffd\né\ufffd"


def test_the_rate_rises_then_falls_to_a_tenth() -> None:
    rate = training.cosine(steps=100, warm_up=4)
    assert [rate(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert rate(52) == pytest.approx(0.55)
    assert rate(100) == pytest.approx(0.1)


def test_times_leave_out_what_warms_up_where_more_is_left() -> None:
    assert training.settled([90.0, 1.0, 2.0, 3.0]) == 2.0
    assert training.settled([90.0]) == 90.0


def test_a_validation_leaves_the_model_in_its_mode() -> None:
    model = ByteLanguageModel(width=32, depth=1, heads=2, length=16)
    batches = text.windows(torch.arange(200, dtype=torch.uint8), 16, 5)
    for mode in (True, False):
        mean_loss(model.train(mode), batches, ByteLanguageModel.loss)
        assert model.training is mode
