"""How results are put into words: the terminal table, Markdown for the docs, what a table sums up to."""

from __future__ import annotations

import statistics
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tilewright._tables import count

from .case import OURS
from .environment import device_name

LEGEND = (
    "spread: half of the samples lie in so wide a band; GB/s: bytes that must move, by formula, per second; "
    "roofline: GB/s over that of a plain copy timed in between (which on a CPU reads what it overwrites, so "
    "work in place can exceed 100%); ratio: tilewright's time over this row's"
)


def print_table(record: dict[str, Any], console: Console) -> None:
    """Prints a section per case, a row per contender; below it what was not timed, why, and a summary."""
    table = Table(
        title=f"tilewright bench {record['family']}\n{device_name(record)}",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        title_justify="left",
    )
    for index, heading in enumerate(headings(record)):
        if index:  # numbers stay whole, however narrow the terminal: titles give way
            width = max(len(heading), 8 if heading in ("median", "wall clock") else 0)
            table.add_column(heading, justify="right", no_wrap=True, min_width=width)
        else:
            table.add_column(heading)
    for case in record["cases"]:
        table.add_row(case["title"], style="bold")
        for name, row in case["contenders"].items():
            table.add_row(
                f"  {name}", *cells(name, row, record), style="dim" if row["status"] != "ok" else ""
            )
        table.add_section()
    console.print(table)
    for line in not_timed(record):
        console.print(line, style="yellow", highlight=False)
    console.print(LEGEND, highlight=False, style="dim")
    for line in verdict(record):
        console.print(line, highlight=False)


def markdown(record: dict[str, Any]) -> str:
    """The same table for a README, with what it was measured on below it."""
    columns = headings(record)
    lines = ["| " + " | ".join(columns) + " |", "| :-- |" + " --: |" * (len(columns) - 1)]
    for case in record["cases"]:
        lines.append(f"| **{case['title']}** |" + " |" * (len(columns) - 1))
        for name, row in case["contenders"].items():
            lines.append(f"| {name} | " + " | ".join(cells(name, row, record)) + " |")
    return "\n".join(lines) + f"\n\n{conditions(record)}\n\n{LEGEND[0].upper()}{LEGEND[1:]}.\n"


def conditions(record: dict[str, Any]) -> str:
    """One line: device, versions, commit and date of a result."""
    versions = ", ".join(
        f"{name} {version}" for name, version in record["versions"].items() if version and name != "numpy"
    )
    copies = [case["copy_gb_per_s"] for case in record.get("cases", []) if case.get("copy_gb_per_s")]
    copy = f"copy {statistics.median(copies):.0f} GB/s; " if copies else ""
    commit = f"commit {record['commit'] or 'unknown'}"
    return f"{device_name(record)}; {copy}{versions}; {commit}; {record['date'][:10]}."


def not_timed(record: dict[str, Any]) -> list[str]:
    """A line for every contender that is missing or failed, with the reason, however many cases it had."""
    found: dict[tuple[str, str], list[str]] = {}
    for case in record["cases"]:
        for name, row in case["contenders"].items():
            if row["status"] != "ok":
                reason = row["status"].splitlines()[0][:200]
                found.setdefault((name, reason), []).append(case["name"])
    lines = [f"{name}: {reason} ({_few(cases)})" for (name, reason), cases in found.items()]
    if record.get("needs_gpu"):
        lines.append(f"{', '.join(record['needs_gpu'])}: on a GPU alone")
    return lines


def verdict(record: dict[str, Any]) -> list[str]:
    """How often ours was faster than the best peer, and by how much over all; nothing without a peer."""
    pairs = [(case["contenders"][OURS], best) for case in record["cases"] if (best := best_peer(case))]
    if not pairs:
        return []
    faster, same, slower = map([word(*reversed(pair)) for pair in pairs].count, ("faster", "same", "slower"))
    ratio = statistics.geometric_mean(best["median_ms"] / ours["median_ms"] for ours, best in pairs)
    tally = f"faster in {faster}, as fast in {same}, slower in {slower}"
    times = f"{ratio:.3g} times as fast by the geometric mean"
    return [f"{count(pairs, 'case')} with a peer; beside the best one tilewright is {tally}; {times}"]


def best_peer(case: dict[str, Any]) -> dict[str, Any] | None:
    """The fastest row of another library that does the same work; None without one or without ours."""
    peers = [
        row for name, row in compared(case).items() if not name.startswith(OURS) and not row.get("yardstick")
    ]
    return min(peers, key=lambda row: float(row["median_ms"]), default=None)


def compared(case: dict[str, Any]) -> dict[str, Any]:
    """The rows that were timed beside ours; none if ours was not."""
    timed = {name: row for name, row in case["contenders"].items() if row["status"] == "ok"}
    return {name: row for name, row in timed.items() if name != OURS} if OURS in timed else {}


def word(first: dict[str, Any], second: dict[str, Any]) -> str:
    """What the second is beside the first: faster or slower only if the middle halves do not overlap."""
    if second["q3_ms"] < first["q1_ms"]:
        return "faster"
    return "slower" if second["q1_ms"] > first["q3_ms"] else "same"


def groups(cases: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The cases by their heading, in order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        found.setdefault(case.get("group", ""), []).append(case)
    return found


def time_text(milliseconds: float) -> str:
    """Three digits with the unit that suits them."""
    value, unit = (milliseconds * 1e3, "us") if milliseconds < 0.1 else (milliseconds, "ms")
    if value >= 1000 and unit == "ms":
        value, unit = value / 1e3, "s"
    digits = max(0, 2 - (len(str(int(value))) - 1)) if value >= 1 else 3
    return f"{value:.{digits}f} {unit}"


def headings(record: dict[str, Any]) -> list[str]:
    """Of the table's columns; the first, that of the names, has none."""
    wall = ["wall clock"] if _has_wall_clock(record) else []
    return ["", "median", "spread", *wall, "GB/s", "roofline", "ratio"]


def cells(name: str, row: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """A contender's, behind its name."""
    if row["status"] != "ok":
        return [row["status"].partition(":")[0], *[""] * (len(headings(record)) - 2)]
    wall = [time_text(row["wall_median_ms"])] if _has_wall_clock(record) else []
    ratio = row.get("ours_over_this")
    return [
        time_text(row["median_ms"]),
        f"{(row['q3_ms'] - row['q1_ms']) / row['median_ms']:.0%}",
        *wall,
        f"{row['gb_per_s']:.3g}" if "gb_per_s" in row else "",
        f"{row['roofline']:.0%}" if "roofline" in row else "",
        "" if name == OURS or ratio is None else f"{ratio:.2f}x" if ratio >= 0.1 else f"{ratio:.3f}x",
    ]


def _has_wall_clock(record: dict[str, Any]) -> bool:
    return bool(record["device"]["kind"] == "cuda")


def _few(names: list[str]) -> str:
    return names[0] if len(names) == 1 else count(names, "case")
