"""How results are shown: the terminal table, Markdown for the docs, the chart."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .case import OURS
from .environment import device_name

_COLOURS = {"torch": "#30638e", "torch, all fp32": "#7fa3c4", "bitsandbytes": "#6f7a88", "torchao": "#b3bac3"}
_OURS_COLOUR, _OURS_TOO_COLOUR = "#d1495b", "#e5a9b1"
_LEGEND = (
    "spread: half of the samples lie in so wide a band; GB/s: bytes that must move, by formula, per second; "
    "roofline: GB/s over that of a plain copy timed in between (which on a CPU reads what it overwrites, so "
    "work in place can exceed 100%); ratio: tilewright's time over this row's"
)


def print_table(record: dict[str, Any], console: Console) -> None:
    """Prints a section per case, a row per contender."""
    table = Table(
        title=f"tilewright bench {record['family']}\n{device_name(record)}",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        title_justify="left",
    )
    for index, heading in enumerate(_headings(record)):
        width = len(heading) if index else None
        table.add_column(heading, justify="right" if index else "left", no_wrap=True, min_width=width)
    failures = []
    for case in record["cases"]:
        table.add_row(case["title"], style="bold")
        for name, row in case["contenders"].items():
            table.add_row(
                f"  {name}", *_cells(name, row, record), style="dim" if row["status"] != "ok" else ""
            )
            if row["status"] != "ok":
                failures.append(f"{case['name']}, {name}: {row['status'].splitlines()[0][:200]}")
        table.add_section()
    console.print(table)
    for failure in failures:
        console.print(failure, style="yellow", highlight=False)
    console.print(_LEGEND, highlight=False, style="dim")


def markdown(record: dict[str, Any]) -> str:
    """The same table for a README, with what it was measured on below it."""
    headings = _headings(record)
    lines = ["| " + " | ".join(headings) + " |", "| :-- |" + " --: |" * (len(headings) - 1)]
    for case in record["cases"]:
        lines.append(f"| **{case['title']}** |" + " |" * (len(headings) - 1))
        for name, row in case["contenders"].items():
            lines.append(f"| {name} | " + " | ".join(_cells(name, row, record)) + " |")
    return "\n".join(lines) + f"\n\n{conditions(record)}\n\n{_LEGEND[0].upper()}{_LEGEND[1:]}.\n"


def conditions(record: dict[str, Any]) -> str:
    """One line: device, versions, commit and date of a result."""
    versions = ", ".join(
        f"{name} {version}" for name, version in record["versions"].items() if version and name != "numpy"
    )
    copies = [case["copy_gb_per_s"] for case in record.get("cases", []) if case.get("copy_gb_per_s")]
    copy = f"copy {statistics.median(copies):.0f} GB/s; " if copies else ""
    commit = f"commit {record['commit'] or 'unknown'}"
    return f"{device_name(record)}; {copy}{versions}; {commit}; {record['date'][:10]}."


def plot(record: dict[str, Any], path: Path) -> str:
    """Draws the chart; returns the line to print: where it is, or why there is none."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = [case for case in record["cases"] if case["contenders"].get(OURS, {}).get("status") == "ok"]
    if not cases:
        return "no plot: nothing of tilewright was timed"
    rows = sum(len(_timed(case)) + 1.4 for case in cases)
    figure, axis = plt.subplots(figsize=(8.5, 1.0 + 0.24 * rows), layout="constrained")
    position, labels = 0.0, {}
    for case in cases:
        axis.text(
            0.0,
            position,
            case["title"],
            transform=axis.get_yaxis_transform(),
            fontsize=9,
            fontweight="bold",
            va="center",
        )
        for name, row in _timed(case).items():
            position += 1
            labels[position] = name
            _lollipop(axis, position, name, row)
        position += 1.4
    slowest = max(1 / row["ours_over_this"] for case in cases for row in _timed(case).values())
    fastest = min(1 / row["ours_over_this"] for case in cases for row in _timed(case).values())
    axis.axvline(1, color=_OURS_COLOUR, linewidth=0.8, zorder=0)
    axis.set(xscale="log", xlim=(min(0.45, fastest / 2), slowest * 2.2), ylim=(position - 0.6, -0.8))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.set_xlabel("time relative to tilewright, logarithmic (right of the red line: slower)", fontsize=9)
    axis.set_yticks(list(labels), labels.values(), fontsize=8)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_title(device_name(record), fontsize=9, color="#555555")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return f"plot     {path}"


def time_text(milliseconds: float) -> str:
    """Three digits with the unit that suits them."""
    value, unit = (milliseconds * 1e3, "us") if milliseconds < 0.1 else (milliseconds, "ms")
    if value >= 1000 and unit == "ms":
        value, unit = value / 1e3, "s"
    digits = max(0, 2 - (len(str(int(value))) - 1)) if value >= 1 else 3
    return f"{value:.{digits}f} {unit}"


def _lollipop(axis: Any, position: float, name: str, row: dict[str, Any]) -> None:
    relative = 1 / row["ours_over_this"]
    ours = _OURS_COLOUR if name == OURS else _OURS_TOO_COLOUR
    colour = ours if name.startswith(OURS) else _COLOURS.get(name, "#999999")
    axis.plot([1, relative], [position, position], color=colour, linewidth=3.5, solid_capstyle="butt")
    axis.plot(relative, position, "o", color=colour, markersize=7)
    shift, side = (9, "left") if relative >= 0.97 else (-9, "right")
    axis.annotate(
        time_text(row["median_ms"]), (relative, position), (shift, 0), textcoords="offset points",
        va="center", ha=side, fontsize=8, color="#333333",
    )  # fmt: skip


def _timed(case: dict[str, Any]) -> dict[str, Any]:
    return {name: row for name, row in case["contenders"].items() if row["status"] == "ok"}


def _has_wall_clock(record: dict[str, Any]) -> bool:
    return bool(record["device"]["kind"] == "cuda")


def _headings(record: dict[str, Any]) -> list[str]:
    wall = ["wall clock"] if _has_wall_clock(record) else []
    return ["", "median", "spread", *wall, "GB/s", "roofline", "ratio"]


def _cells(name: str, row: dict[str, Any], record: dict[str, Any]) -> list[str]:
    if row["status"] != "ok":
        return [row["status"].partition(":")[0], *[""] * (len(_headings(record)) - 2)]
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
