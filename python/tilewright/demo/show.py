"""How demonstrations talk: bars while they work, a table of two sides, where the results are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from tilewright._results import write


def progress_bars(console: Console) -> Progress:
    """Share done, bar, seconds gone and left, and what is being done."""
    columns = (TextColumn("{task.percentage:>3.0f}%"), BarColumn(pulse_style="bar.complete"))
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, *times, TextColumn("{task.description}"), console=console)


def comparison(headings: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> Table:
    """A table whose first `words` columns hold words, and the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < words else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def ratio_row(title: str, pattern: str, theirs: float, ours: float) -> tuple[str, str, str, str]:
    """A line of a comparison: what, theirs, ours, ours as a multiple of theirs."""
    return title, pattern.format(theirs), pattern.format(ours), f"{ours / theirs:.3g}x"


def speed(theirs: float, ours: float) -> str:
    """How fast ours is, by the milliseconds of both; plain words where it is slower."""
    ratio = theirs / ours
    return f"{ratio:.3g} times as fast" if ratio >= 0.98 else f"SLOWER ({1 / ratio:.2f}x as long)"


def print_text(title: str, text: str, console: Console) -> None:
    """Text as it is, indented."""
    console.print(f"\n{title}\n")
    console.print(Padding(Text(text.strip("\n")), (0, 0, 0, 4), expand=False))


def write_record(record: dict[str, Any], out: Path) -> Path:
    """Writes the results into `out`; returns the file's path."""
    path = out / f"{record['demo']}.json"
    write(path, (json.dumps(record) + "\n").encode())
    return path


def print_files(results: Path, plot: str, console: Console) -> None:
    """Says where the results and the plot are."""
    console.print(f"results  {results}\n{plot}", highlight=False, soft_wrap=True)
