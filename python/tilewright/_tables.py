"""Plain-text tables of reports."""

from __future__ import annotations

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


def _fit(cell: str, width: int, side: str) -> str:
    return cell.rjust(width) if side == "r" else cell.ljust(width)
