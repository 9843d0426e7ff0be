"""The benchmark framework: what it counts and records. No test here looks at how fast anything is."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch

from tilewright import _families
from tilewright.bench import compare, environment, optim, report, runner, timing
from tilewright.bench.case import OURS, Case, Contender, Plan, Unavailable

CPU = torch.device("cpu")


def test_every_contender_alternates_and_gets_its_share() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in ("a", "b", "c")}
    found = timing.measure(calls, CPU, budget=100.0, maximum=9)
    assert [len(found[name].wall) for name in "abc"] == [9, 9, 9]
    rounds = [order[6 + 3 * index : 9 + 3 * index] for index in range(9)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert {turn[0] for turn in rounds} == {"a", "b", "c"}, "the order rotates"


def test_a_slow_contender_sits_out_rounds_evenly() -> None:
    counts = {"slow": 0, "fast": 0}

    def slow() -> None:
        counts["slow"] += 1
        torch.zeros(2_000_000).exp_()

    def fast() -> None:
        counts["fast"] += 1

    found = timing.measure({"slow": slow, "fast": fast}, CPU, budget=1e-6, minimum=3, maximum=31)
    assert len(found["slow"].wall) == 3
    assert len(found["fast"].wall) >= 3


def test_summary_is_median_and_quartiles() -> None:
    samples = [0.001, 0.002, 0.003, 0.004, 0.010]
    assert timing.summary(samples) == pytest.approx({"q1_ms": 2.0, "median_ms": 3.0, "q3_ms": 4.0})
    assert timing.summary([0.001]) == {"q1_ms": 1.0, "median_ms": 1.0, "q3_ms": 1.0}


def test_run_case_records_ratios_failures_and_what_is_not_here() -> None:
    def missing() -> None:
        raise Unavailable("No module named 'peer'")

    def broken() -> None:
        raise RuntimeError("boom")

    tensor = torch.zeros(1000)
    contenders = [
        Contender(OURS, lambda: tensor.zero_, bytes=4000),
        Contender("torch", lambda: tensor.exp, bytes=8000),
        Contender("bitsandbytes", missing),
        Contender("torchao", broken),
    ]
    done = runner.run_case(Case("c", "a case", contenders), runner.Setting(CPU, budget=0.1, minimum=2))
    rows = done["contenders"]
    assert rows["bitsandbytes"]["status"] == "not available: No module named 'peer'"
    assert rows["torchao"]["status"] == "failed: RuntimeError: boom"
    assert rows[OURS]["ours_over_this"] == 1.0
    assert rows["torch"]["ours_over_this"] == pytest.approx(
        rows[OURS]["median_ms"] / rows["torch"]["median_ms"], rel=1e-3
    )
    assert done["copy_gb_per_s"] > 0


@pytest.mark.parametrize(
    ("case", "contender", "bytes_per_parameter"),
    [
        ("adamw8bit-fp32", OURS, 16.0625),
        ("adamw8bit-fp32", "torch", 28),
        ("adamw8bit-bf16", OURS, 10.0625),
        ("adamw8bit-bf16", "torch", 14),
        ("lion8bit-fp32", OURS, 14.03125),
        ("sgd8bit-fp32", OURS, 14.03125),
        ("sgd8bit-fp32", "torch", 20),
        ("quantize-fp32", OURS, 5.015625),
        ("dequantize-fp32", OURS, 5.015625),
    ],
)
def test_bytes_by_formula(case: str, contender: str, bytes_per_parameter: float) -> None:
    found = next(c for c in optim.cases(Plan(CPU)) if c.name == case)
    count = found.sizes.get("parameters", found.sizes.get("elements"))
    moved = next(c for c in found.contenders if c.name == contender).bytes
    assert moved == pytest.approx(count * bytes_per_parameter, rel=1e-6)


@pytest.mark.parametrize("family", _families.present("bench"))
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_ours_comes_first_in_every_case_and_the_others_are_peers(family: str, device: str) -> None:
    module = _families.load("bench", family)
    for case in module.cases(Plan(torch.device(device))):
        assert case.contenders[0].name == OURS
        for contender in case.contenders[1:]:
            assert contender.name.startswith(OURS) or contender.name.partition(",")[0] in module.PEERS


def test_clipping_is_timed_on_a_gpu() -> None:
    names = [case.name for case in optim.cases(Plan(torch.device("cuda")))]
    assert "adamw8bit-bf16-clip" in names


def test_cases_are_chosen_over_all_families() -> None:
    a, b, c = (Case(name, name, []) for name in ("adam", "scan-1", "scan-2"))
    assert runner.select({"optim": [a], "scan": [b, c]}, None) == {"optim": [a], "scan": [b, c]}
    assert runner.select({"optim": [a], "scan": [b, c]}, ["2"]) == {"scan": [c]}
    with pytest.raises(ValueError, match="no case matches x; there are: adam, scan-1"):
        runner.select({"optim": [a], "scan": [b]}, ["x"])


def test_a_run_leaves_a_result_that_can_be_compared_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = runner.run(["optim"], "cpu", quick=True, peers=["torch"], only=["call"], out=tmp_path)
    assert status == 0
    record = compare.load(tmp_path / "optim-quick-cpu.json")
    assert record["complete"]
    assert record["versions"]["torch"] == torch.__version__
    assert record["threads"] == torch.get_num_threads()
    assert len(record["cases"]) == 1
    assert compare.run(tmp_path / "optim-quick-cpu.json", tmp_path / "optim-quick-cpu.json") == 0
    assert "1.00x" in capsys.readouterr().out
    table = report.markdown(record)
    assert "| **a call, in place** |" in table
    assert "commit" in table
    pytest.importorskip("matplotlib")
    assert (tmp_path / "optim-quick-cpu.png").stat().st_size > 10_000


def test_compare_says_what_makes_results_incomparable(tmp_path: Path) -> None:
    before = {"device": environment.describe(CPU)["device"], "threads": 2, "versions": {"torch": "2.12"}}
    after = {**before, "threads": 4, "versions": {"torch": "2.13"}}
    assert environment.same_conditions(before, after) == [
        "threads differs: 2 and 4",
        "torch differs: 2.12 and 2.13",
    ]


def test_result_files_in_the_repository_are_readable() -> None:
    folder = Path(__file__).parents[2] / "bench" / "results"
    for path in folder.rglob("*.json"):
        record = json.loads(path.read_text())
        assert path.name.endswith("-support.json") or "device" in record, path


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(0.00123, "1.23 us"), (0.5, "0.500 ms"), (12.34, "12.3 ms"), (123.4, "123 ms"), (15400.0, "15.4 s")],
)
def test_times_have_three_digits(milliseconds: float, text: str) -> None:
    assert report.time_text(milliseconds) == text


def test_medians_are_medians() -> None:
    samples = timing.measure({"a": lambda: None}, CPU, budget=0.01)["a"].wall
    assert timing.summary(samples)["median_ms"] == pytest.approx(statistics.median(samples) * 1e3)
