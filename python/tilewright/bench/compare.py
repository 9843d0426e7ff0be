"""`tilewright bench compare A.json B.json`: what became faster or slower, and if that can be said at all."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .case import OURS
from .environment import device_name, same_conditions
from .report import time_text, word
from .runner import SCHEMA

Row = dict[str, Any]


def run(before: Path, after: Path) -> int:
    """Prints B's time over A's for every case and contender that both files hold, and what it sums up to.

    Returns:
        0, or 1 if the files have nothing in common.
    """
    records = [load(path) for path in (before, after)]
    console = Console()
    for difference in same_conditions(*records):
        console.print(f"note: {difference}", style="yellow", highlight=False)
    rows = _pairs(*records)
    if not rows:
        console.print("the two files have no measured case in common")
        return 1
    console.print(f"A  {_origin(before, records[0])}\nB  {_origin(after, records[1])}", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("")
    for heading, width in (("A", 8), ("B", 8), ("B / A", 6)):
        table.add_column(heading, justify="right", no_wrap=True, min_width=width)
    table.add_column("", no_wrap=True, min_width=6)
    for case, pairs in rows.items():
        table.add_row(case, style="bold")
        for name, first, second in pairs:
            times = (time_text(row["median_ms"]) for row in (first, second))
            table.add_row(f"  {name}", *times, f"{_ratio(first, second):.2f}x", word(first, second))
        table.add_section()
    console.print(table)
    for line in _totals([pair for pairs in rows.values() for pair in pairs]):
        console.print(line, highlight=False)
    return 0


def load(path: Path) -> dict[str, Any]:
    """Reads a result file.

    Raises:
        OSError, ValueError: if it cannot be read, or is not one.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OSError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict) or not {"schema", "cases", "device"} <= record.keys():
        raise ValueError(f"{path} is not a result of `tilewright bench`")
    if record["schema"] != SCHEMA:
        raise ValueError(f"{path} has schema {record['schema']!r}; this version reads {SCHEMA}")
    return record


def _origin(path: Path, record: dict[str, Any]) -> str:
    return f"{path}: {device_name(record)}, commit {record.get('commit') or 'unknown'}"


def _pairs(before: dict[str, Any], after: dict[str, Any]) -> dict[str, list[tuple[str, Row, Row]]]:
    """By the title of a case: the contenders that both files have timed, at the same sizes."""
    later = {case["name"]: case for case in after["cases"]}
    found: dict[str, list[tuple[str, Row, Row]]] = {}
    for case in before["cases"]:
        other = later.get(case["name"], {"sizes": None, "contenders": {}})
        for name, row in case["contenders"].items():
            match = other["contenders"].get(name, {"status": "missing"})
            if case["sizes"] == other["sizes"] and row["status"] == match["status"] == "ok":
                found.setdefault(case["title"], []).append((name, row, match))
    return found


def _ratio(first: Row, second: Row) -> float:
    return float(second["median_ms"] / first["median_ms"])


def _totals(pairs: list[tuple[str, Row, Row]]) -> list[str]:
    """The geometric mean of ours, and of the others, which tells how much the machine itself has changed."""
    lines = []
    for who, ours in ((OURS, True), ("the others", False)):
        chosen = [(first, second) for name, first, second in pairs if name.startswith(OURS) == ours]
        if chosen:
            words = [word(*pair) for pair in chosen]
            tally = ", ".join(f"{words.count(each)} {each}" for each in ("faster", "same", "slower"))
            mean = statistics.geometric_mean(_ratio(*pair) for pair in chosen)
            lines.append(f"{who}: B takes {mean:.2f}x the time of A (geometric mean); {tally}")
    return lines
