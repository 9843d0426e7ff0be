"""The command `tilewright info`: what it asks, prints and returns. Standard library only."""

from __future__ import annotations

import json
import textwrap
import time
from typing import Any

from tilewright import _info, _selfcheck
from tilewright._verdict import failed, verdicts


def run(*, as_json: bool, check: bool) -> int:
    """Prints the report as it comes, or as JSON at the end; returns 1 if something is broken, else 0."""
    report: dict[str, Any] = {probe.__name__: {"error": "was not reached"} for probe in _info.SECTIONS}
    for title, section in _selfcheck.sections():
        report[title] = section
        if not as_json:
            print(format_section(title, section), end="\n\n", flush=True)
    report["verdict"] = verdicts(report)
    if not as_json:
        print(format_section("verdict", report["verdict"]), flush=True)
    fine = not any(words.startswith("broken") for words in report["verdict"].values())
    if check:
        report["checks"] = _checks(fine, quiet=as_json)
        fine = fine and all(found["passed"] for found in report["checks"])
    if as_json:
        print(json.dumps(report, indent=2))
    return int(not fine)


def _checks(fine: bool, quiet: bool) -> list[dict[str, Any]]:
    """Runs and prints the checks, unless it is known what they would stumble over."""

    def say(words: str) -> None:
        if not quiet:
            print(_ascii(words), flush=True)

    if not fine:
        say("\nchecks\n  not run: first mend what the verdict calls broken")
        return []
    start, results = time.perf_counter(), []
    say("\nchecks: each op once, against plain torch")
    for found in _selfcheck.checks():
        results.append(found)
        word = "ok" if found["passed"] else "FAILED"
        say(f"  {word:<7}{found['device']:<5} {found['name']:<33}{found['detail']}")
    failures = [f"{found['name']} ({found['device']})" for found in results if not found["passed"]]
    if failures:
        say(f"\n{len(failures)} of {len(results)} checks FAILED: {', '.join(failures)}.")
        say("Please report it, with all that stands above.")
    else:
        say(f"\nAll {len(results)} checks passed, in {time.perf_counter() - start:.1f} s.")
    return results


def format_section(title: str, section: Any) -> str:
    """A section of the report as aligned text for a terminal; what no ASCII terminal shows is escaped."""
    lines = _lines(section, 1) if title != "verdict" else _sentences(section)
    return _ascii("\n".join([title, *lines]))


def _ascii(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode("ascii")


def _sentences(verdict: dict[str, str]) -> list[str]:
    """Each sentence beside its subject, in lines of at most 100 characters."""
    lines = []
    for subject, sentence in verdict.items():
        first, *more = textwrap.wrap(sentence, 82, break_long_words=False, break_on_hyphens=False)
        lines += [f"  {subject:<16}{first}", *(" " * 18 + line for line in more)]
    return lines


def _lines(value: Any, depth: int) -> list[str]:
    pad = "  " * depth
    if isinstance(value, list):
        return [f"{pad}{item}" for item in value] or [f"{pad}none"]
    if not value or failed(value):
        return [f"{pad}{_word(value) if value else 'none'}"]
    lines = []
    for key, entry in value.items():
        nested = entry if _is_table_list(entry) else [entry] if isinstance(entry, dict) else []
        if nested and not failed(nested[0]):
            lines += [f"{pad}{key}", *(line for item in nested for line in _lines(item, depth + 1))]
        else:
            lines.append(f"{pad}{key:<16}{_word(entry)}")
    return lines


def _is_table_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _word(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    if isinstance(value, dict):
        return f"failed: {value['error']}"
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
