"""The command line: what it accepts, what it says, what it returns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tilewright import _families
from tilewright.cli import main


def test_without_a_command_it_helps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "tilewright demo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["benhc"], "invalid choice: 'benhc'"),
        (["demo", "--steps", "0"], "must be a whole number, 1 or more, got '0'"),
        (["bench", "compare", "only-one.json"], "required: B.json"),
        (["bench", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["bench", "optmi"], "did you mean optim?"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["bench", "--cases", "nothing-like-it"],
            "no case matches nothing-like-it; there are: window-fp32",
        ),
        (["bench", "--peers", "apex"], "unknown peer apex; there are: torch, flash-attn, bitsandbytes"),
        (["bench", "--peers", "torhc"], "unknown peer torhc (did you mean torch?); there are: torch"),
        (
            ["bench", "--preset", "lama-8b"],
            "unknown preset lama-8b (did you mean llama-8b?); there are: llama-1b",
        ),
        (
            ["bench", "scan", "--device", "cpu", "--preset", "vit-b"],
            "vit-b has nothing for scan; it has cases for",
        ),
        (["bench", "--quick", "--preset", "vit-b"], "give one of them"),
        (["bench", "optim", "--device", "cpu", "--cases", "scan"], "no case matches scan"),
        (["bench", "compare", "missing.json", "missing.json"], "missing.json"),
    ],
)
def test_errors_name_what_was_wrong(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    device = ["--device", "cpu"] if arguments[1].startswith("-") else []
    assert main(arguments + device) == 1
    assert message in capsys.readouterr().err


def test_info_check_passes_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["info", "--check", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [check["name"] for check in report["checks"] if not check["passed"]] == []
    assert {check["name"] for check in report["checks"]} >= {"quantize_blockwise", "AdamW8bit", "SGD8bit"}
    assert status == 0


@pytest.mark.parametrize("command", ["bench", "demo"])
def test_every_family_that_is_there_is_a_target(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    for family in _families.present(command):
        assert f"{family} " in said
    assert {{"bench": "all", "demo": "story"}[command], "optim"} <= set(said.split())


def test_bench_without_a_name_lists_the_cases_of_all_families(capsys: pytest.CaptureFixture[str]) -> None:
    def names(*arguments: str) -> list[str]:
        assert main(["bench", *arguments, "--list", "--device", "cpu"]) == 0
        return [line.split()[0] for line in capsys.readouterr().out.splitlines()]

    apart = [name for family in _families.present("bench") for name in names(family)]
    assert names() == apart
    assert len(set(apart)) == len(apart)


@pytest.mark.parametrize(("name", "family"), [([], "story"), (["scan"], "scan")])
def test_demo_without_a_name_is_the_story(
    name: list[str], family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []

    class Demo:
        def run(self, *arguments: object) -> int:
            calls.append(arguments)
            return 1

    monkeypatch.setattr(_families, "load", lambda package, family: calls.append((package, family)) or Demo())
    assert main(["demo", *name, "--quick", "--seed", "3", "--out", str(tmp_path)]) == 1
    assert calls == [("demo", family), (None, range(3, 4), tmp_path, True)]


def test_only_optim_repeats_for_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--seeds", "2"])
    assert "unrecognized arguments: --seeds 2" in capsys.readouterr().err


def test_compare_refuses_other_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    path.write_text("[1, 2]")
    assert main(["bench", "compare", str(path), str(path)]) == 1
    assert "is not a result of `tilewright bench`" in capsys.readouterr().err
