"""A run of `tilewright bench`: what it refuses, and what is on disk however it ends."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright import _families, _results
from tilewright.bench import chart, compare, page, report, runner
from tilewright.bench.case import OURS, Case, Contender, Plan, Unavailable, peer

CPU = torch.device("cpu")


def row(median: float, **more: Any) -> dict[str, Any]:
    """A timed row whose quartiles lie a tenth on either side."""
    return {
        "status": "ok", "median_ms": median, "q1_ms": 0.9 * median, "q3_ms": 1.1 * median,
        "ours_over_this": 1.0 / median, **more,
    }  # fmt: skip


@pytest.fixture
def record() -> dict[str, Any]:
    """A result in which ours needs 1 ms."""
    missing = {"status": "not available: not installed"}
    rows = {OURS: row(1.0), "torch": row(4.0), "torch, clone": row(0.5, yardstick=True), "mambapy": missing}
    cases = [
        {"name": f"c{n}", "title": f"a <case>, {n} tokens, fp32", "group": group, "sizes": {"n": n},
         "flops": None, "copy_gb_per_s": None, "contenders": dict(rows)}
        for n, group in enumerate(("one", "one", "two"))
    ]  # fmt: skip
    return {
        "schema": 1, "family": "scan", "quick": True, "preset": None,
        "command": "tilewright bench scan --quick",
        "date": "2026-01-02T03:04:05+00:00", "threads": 2, "commit": "abc", "complete": True,
        "device": {"kind": "cpu", "name": "A CPU", "cores": 2, "level": "avx2"},
        "versions": {"torch": "2.13"},
        "needs_gpu": ["mamba-ssm"], "cases": cases,
    }  # fmt: skip


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two families of two cases that take no time."""

    class Family:
        PEERS = ("torch", "flash-attn")
        GPU_PEERS = ("flash-attn",)

        def __init__(self, name: str) -> None:
            self.name = name

        def cases(self, plan: Plan) -> list[Case]:
            def missing() -> Any:
                raise Unavailable("not installed")

            rows = [Contender(OURS, lambda: lambda: None), Contender("torch", lambda: lambda: None)]
            rows.append(Contender("flash-attn", missing))
            return [Case(f"{self.name}-{n}", f"case {n}", rows, group="all") for n in range(2)]

    monkeypatch.setattr(_families, "load", lambda package, family: Family(family))


def run(out: Path, **options: Any) -> int:
    return runner.run(["optim", "scan"], "cpu", quick=True, out=out, **options)


@pytest.mark.usefixtures("few_cases")
def test_a_run_leaves_a_file_a_family_and_one_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path) == 0
    found = json.loads((tmp_path / "scan-quick-cpu.json").read_text())
    assert found["complete"]
    assert found["needs_gpu"] == ["flash-attn"]
    assert found["command"] == "tilewright bench --device cpu --quick"
    assert set(found["cases"][0]["contenders"]) == {OURS, "torch"}
    text = (tmp_path / "report-quick-cpu.html").read_text()
    assert all(f'<h2 id="{family}">' in text for family in ("optim", "scan"))
    assert "flash-attn: on a GPU alone" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*")), "no temporary file stays"


@pytest.mark.usefixtures("few_cases")
def test_only_the_peers_that_were_asked_for(tmp_path: Path) -> None:
    assert run(tmp_path, peers=["none"], only=["scan-1"]) == 0
    found = json.loads((tmp_path / "scan-quick-cpu.json").read_text())
    assert [list(case["contenders"]) for case in found["cases"]] == [[OURS]]
    assert found["command"] == "tilewright bench --device cpu --peers none --cases scan-1 --quick"
    assert not (tmp_path / "optim-quick-cpu.json").exists()


@pytest.mark.usefixtures("few_cases")
def test_an_interrupted_run_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, path = runner.run_case, tmp_path / "optim-quick-cpu.json"

    def interrupted(case: Case, *rest: Any) -> dict[str, Any]:
        if case.name == "optim-1":
            kept = json.loads(path.read_text())  # as a killed process would leave it
            assert [case["name"] for case in kept["cases"]] == ["optim-0"]
            raise KeyboardInterrupt
        return whole(case, *rest)

    monkeypatch.setattr(runner, "run_case", interrupted)
    assert run(tmp_path) == runner.INTERRUPTED
    found = compare.load(path)
    assert not found["complete"]
    assert len(found["cases"]) == 1
    assert "Interrupted" in (tmp_path / "report-quick-cpu.html").read_text()
    assert not (tmp_path / "scan-quick-cpu.json").exists()


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    _results.write(path, b"old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _results.write(path, b"new")
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]
    assert path.read_bytes() == b"old"
    _results.write(path, b"new")
    assert path.read_bytes() == b"new"
    (tmp_path / "other").write_bytes(b"")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.usefixtures("few_cases")
def test_a_folder_that_cannot_be_written_to_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "run_case", lambda *_: pytest.fail("work was begun"))
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OSError, match=r"--out .*file: results cannot be written there: it is a file"):
        run(file)
    with pytest.raises(OSError, match=r"--out .*below: results cannot be written there: Not a directory"):
        run(file / "below")


def test_quick_is_a_few_cases_of_every_family() -> None:
    for device in ("cpu", "cuda"):
        found = [_families.load("bench", family).cases(Plan(torch.device(device), quick=True))
                 for family in _families.present("bench")]  # fmt: skip
        assert all(3 <= len(cases) <= 15 for cases in found)
        compiled = ("compiled", "torch, masked")
        assert not any(
            c.name.endswith(compiled) for cases in found for case in cases for c in case.contenders
        )


def test_a_missing_peer_says_so_and_a_broken_one_why() -> None:
    with pytest.raises(Unavailable, match=r"^not installed$"):
        peer("no_such_library.inner", "function")
    with pytest.raises(Unavailable, match=r"^cannot be imported: No module named 'json.nothing'"):
        peer("json.nothing")
    with pytest.raises(Unavailable, match=r"^json has no this or that$"):
        peer("json", "this", "that")
    assert peer("json", "this", "loads") is json.loads


def test_the_verdict_counts_peers_alone(record: dict[str, Any]) -> None:
    assert report.verdict(record) == [
        "3 cases with a peer; beside the best one tilewright is faster in 3, as fast in 0, slower in 0; "
        "4 times as fast by the geometric mean"
    ]
    assert report.not_timed(record) == [
        "mambapy: not available: not installed (3 cases)", "mamba-ssm: on a GPU alone"
    ]  # fmt: skip
    for case in record["cases"]:
        del case["contenders"]["torch"]
    assert report.verdict(record) == []


def test_the_page_needs_nothing_but_itself(record: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    other = {**record, "family": "optim"}
    text = page.html([record, other])
    assert not re.search(r'(src|href)="https?:|url\(http|@import|<script|<link', text)
    ids = re.findall(r'\sid="([^"]*)"', text)
    assert len(ids) == len(set(ids)), "two charts in a page share no id"
    assert text.count("<svg") == 2
    for said in (
        "a &lt;case&gt;, 0 tokens",
        "4.00 ms",
        "tilewright bench scan --quick",
        "commit abc",
        "dark",
    ):
        assert said in text


def test_a_page_without_matplotlib_says_so(record: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert "matplotlib was not installed" in page.html([record])


def test_the_chart_has_a_row_a_case(record: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    assert chart.png(record).startswith(b"\x89PNG")
    text = chart.svg(record)
    assert all(f">{label}<" in text for label in ("0 tokens", "1 tokens", "torch, clone"))
    del record["cases"][0]["contenders"][OURS]
    assert [case["name"] for case in chart.shown(record)] == ["c1", "c2"]


def test_compare_sums_up_ours_and_the_others(
    record: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = tmp_path / "a.json", tmp_path / "b.json"
    before.write_text(json.dumps(record))
    for case in record["cases"]:
        case["contenders"][OURS] = row(0.5)
    after.write_text(json.dumps({**record, "threads": 4}))
    assert compare.run(before, after) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "tilewright: B takes 0.50x the time of A (geometric mean); 3 faster, 0 same, 0 slower" in said
    assert "the others: B takes 1.00x" in said
    assert "note: threads differs: 2 and 4" in said
    after.write_text(json.dumps({**record, "schema": 7}))
    with pytest.raises(ValueError, match=r"b.json has schema 7; this version reads 1"):
        compare.run(before, after)


def test_results_that_cannot_be_written_are_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"--out .*file/results: results cannot be written there: Not a dir"):
        _results.check_writable(tmp_path / "file" / "results")
