"""`tilewright bench compare A.json B.json`: what became faster or slower, and if that can be said at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .environment import same_conditions
from .report import time_text, word

Row = dict[str, Any]


def run(before: Path, after: Path) -> int:
    """Prints B's time over A's for every case and contender that both files hold; 1 if they share none."""
    records = [load(path) for path in (before, after)]
    console = Console()
    for difference in same_conditions(*records):
        console.print(f"note: {difference}", style="yellow", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("", no_wrap=True)
    for heading, width in (("A", 8), ("B", 8), ("B / A", 6)):
        table.add_column(heading, justify="right", no_wrap=True, min_width=width)
    table.add_column("", no_wrap=True, min_width=6)
    rows = _pairs(*records)
    for case, name, first, second in rows:
        ratio = f"{second['median_ms'] / first['median_ms']:.2f}x"
        times = (time_text(row["median_ms"]) for row in (first, second))
        table.add_row(f"{case}: {name}", *times, ratio, word(first, second))
    if not rows:
        console.print("the two files have no measured case in common")
        return 1
    console.print(table)
    return 0


def load(path: Path) -> dict[str, Any]:
    """Reads a result file.

    Raises:
        ValueError: if it is not one.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict) or not {"schema", "cases", "device"} <= record.keys():
        raise ValueError(f"{path} is not a result of `tilewright bench`")
    return record


def _pairs(before: Row, after: Row) -> list[tuple[str, str, Row, Row]]:
    later = {case["name"]: case for case in after["cases"]}
    found = []
    for case in before["cases"]:
        other = later.get(case["name"], {"sizes": None, "contenders": {}})
        for name, row in case["contenders"].items():
            match = other["contenders"].get(name, {"status": "missing"})
            if case["sizes"] == other["sizes"] and row["status"] == match["status"] == "ok":
                found.append((case["name"], name, row, match))
    return found
