"""Plain-text tables of reports."""

from __future__ import annotations

import math
from collections.abc import Sequence


def count(things: Sequence[object], noun: str) -> str:
    """`"1 layer"`, `"2 layers"`."""
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def table(headings: tuple[str, ...], rows: list[tuple[str, ...]], right: str = "") -> list[str]:
    """An empty line, and columns as wide as their widest cell; nothing for no rows.

    Args:
        headings: of the columns.
        rows: their cells.
        right: a character a column, "r" where it is aligned to the right; missing ones are to the left.
    """
    if not rows:
        return []
    widths = [max(len(row[column]) for row in [headings, *rows]) for column in range(len(headings))]
    sides = right.ljust(len(headings), "l")
    lines = [headings, tuple("-" * width for width in widths), *rows]
    return ["", *("  ".join(map(_fit, row, widths, sides)).rstrip() for row in lines)]


def folded(entries: Sequence[tuple[str, tuple[str, ...]]]) -> list[tuple[str, ...]]:
    """A row for each kind of entry; paths that differ in their numbers alone become one."""
    kinds: dict[tuple[tuple[str, ...], tuple[str, ...]], set[tuple[int, ...]]] = {}
    for path, cells in entries:
        parts = path.split(".")
        words = tuple("" if part.isdecimal() else part for part in parts)
        numbers = tuple(int(part) for part in parts if part.isdecimal())
        kinds.setdefault((words, cells), set()).add(numbers)
    rows = []
    for (words, cells), found in kinds.items():
        for names in map(iter, _products(found)):
            rows.append((".".join(word or next(names, "") for word in words), *cells))
    return rows


def _products(found: set[tuple[int, ...]]) -> list[tuple[str, ...]]:
    """Tuples of numbers as products of sets: one, if they are one."""
    sets = [sorted(set(column)) for column in zip(*found, strict=True)]
    if math.prod(map(len, sets)) == len(found):
        return [tuple(map(_set_name, sets))]
    return [
        (_set_name([number]), *rest)
        for number in sets[0]
        for rest in _products({numbers[1:] for numbers in found if numbers[0] == number})
    ]


def _set_name(numbers: Sequence[int]) -> str:
    """`3`, or `{0..3,7}`."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = [",".join(map(str, run)) if len(run) < 3 else f"{run[0]}..{run[-1]}" for run in runs]
    return f"{{{','.join(shown)}}}"


def _fit(cell: str, width: int, side: str) -> str:
    return cell.rjust(width) if side == "r" else cell.ljust(width)
