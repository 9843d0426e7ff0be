"""The chart: a row a case, a dot a contender at its time relative to ours, cases beside their like.

The same figure is the PNG and, as SVG with its text left as text, a part of the HTML page.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterable
from itertools import chain
from typing import Any

from .case import OURS
from .environment import device_name
from .report import compared, groups, time_text

Case = dict[str, Any]

_OURS_COLOUR, _LINES = "#d1495b", "#8a8f98"
_COLOURS = {
    "torch": "#3a7ca5", "transformers": "#e09f3e", "bitsandbytes": "#5f8f57", "torchao": "#8e6bbf",
    "mambapy": "#5f8f57", "mamba-ssm": "#8e6bbf", "causal-conv1d": "#b5651d", "flash-attn": "#8e6bbf",
}  # fmt: skip
_MARKERS = "oDs^v"
_ROW, _HEAD = 0.24, 0.8  # inches of a row, and of what stands above a panel's rows


def png(record: dict[str, Any]) -> bytes:
    """The chart of a result that has something of ours in it.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    return _saved(record, "png")


def svg(record: dict[str, Any]) -> str:
    """The same, to be put into a page: ids begin with the family's name, the background is the page's."""
    text = _saved(record, "svg").decode()
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{record['family']}-", text)
    return text[text.index("<svg") :]


def shown(record: dict[str, Any]) -> list[Case]:
    """The cases that have a row: those of which ours and something beside it were timed."""
    return [case for case in record["cases"] if compared(case)]


def _saved(record: dict[str, Any], form: str) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "font.size": 8, "font.family": "sans-serif"}):
        figure = _drawn(plt, record)
        buffer = io.BytesIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type")) if form == "svg" else None
        figure.savefig(buffer, format=form, dpi=130, transparent=form == "svg", metadata=nothing)
        plt.close(figure)
    return buffer.getvalue()


def _drawn(plt: Any, record: dict[str, Any]) -> Any:
    panels = groups(shown(record))
    columns = _columns(panels)
    heights = [[_ROW * len(panels[name]) + _HEAD for name in column] for column in columns]
    size = (9.0 if len(columns) == 1 else 14.4, max(map(sum, heights)) + 0.7)
    figure = plt.figure(figsize=size, layout="constrained")
    figure.suptitle(f"{record['family']}: {device_name(record)}", fontsize=9, color=_LINES)
    grid = figure.add_gridspec(1, len(columns))
    for place, (column, tall) in enumerate(zip(columns, heights, strict=True)):
        below = max(map(sum, heights)) - sum(tall)  # so that rows are as high in every column
        inner = grid[place].subgridspec(
            len(column) + bool(below), 1, height_ratios=[*tall, *[below] * bool(below)]
        )
        for number, name in enumerate(column):
            axis = figure.add_subplot(inner[number])
            _panel(axis, name, panels[name])
        axis.set_xlabel("time relative to tilewright, logarithmic; right of the red line: slower", fontsize=8)
    return figure


def _columns(panels: dict[str, list[Case]]) -> list[list[str]]:
    """The panels in order, in one column if they are few, else in two about as long as each other."""
    names = list(panels)
    rows = [len(panels[name]) + _HEAD / _ROW for name in names]
    if sum(rows) < 24 or len(names) == 1:
        return [names]
    cut = min(range(1, len(names)), key=lambda n: max(sum(rows[:n]), sum(rows[n:])))
    return [names[:cut], names[cut:]]


def _panel(axis: Any, title: str, cases: list[Case]) -> None:
    labels, common = _labels([case["title"] for case in cases])
    styles = _styles(chain.from_iterable(compared(case).items() for case in cases))
    reach = []
    for place, case in enumerate(cases):
        ours = case["contenders"][OURS]["median_ms"]
        for name, row in compared(case).items():
            low, middle, high = (row[key] / ours for key in ("q1_ms", "median_ms", "q3_ms"))
            axis.plot([low, high], [place, place], color=styles[name]["color"], linewidth=1.5, alpha=0.6)
            axis.plot(middle, place, label=name, **styles[name])
            reach += [low, high]
        axis.text(
            1.015, place, time_text(ours), transform=axis.get_yaxis_transform(), fontsize=7.5, va="center"
        )
    axis.axvline(1, color=_OURS_COLOUR, linewidth=1.2, zorder=0)
    axis.set(xscale="log", xlim=(min(0.7, min(reach) / 1.2), max(1.5, max(reach) * 1.2)))
    axis.set_ylim(len(cases) - 0.4, -0.6)
    axis.set_yticks(range(len(cases)), [textwrap.fill(label, 46) for label in labels], fontsize=7.5)
    axis.tick_params(axis="both", length=0, colors="#333333")
    axis.grid(axis="both", color=_LINES, alpha=0.25, linewidth=0.6)
    axis.set_axisbelow(True)
    _ticks(axis)
    axis.spines[:].set_visible(False)
    known = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    columns = max(1, min(3, 66 // (max(map(len, known)) + 4)))
    above = 5 + 12 * -(-len(known) // columns)  # points, for the legend
    axis.set_title(_heading(title, common), fontsize=9, fontweight="bold", loc="left", pad=above)
    axis.annotate(
        "ours", (1.015, 1), (0, above), xycoords="axes fraction", textcoords="offset points", fontsize=7.5,
        color=_OURS_COLOUR,
    )  # fmt: skip
    axis.legend(
        known.values(), known, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.1, ncols=columns,
        frameon=False, fontsize=7.5, handletextpad=0.1, columnspacing=1.0,
    )  # fmt: skip


def _heading(group: str, common: list[str]) -> str:
    """The group, and what all its titles say beside it."""
    more = [part for part in common if part not in group]
    return textwrap.fill(", ".join([group, *more] if group else more), 52)


def _ticks(axis: Any) -> None:
    """Few enough to be read: powers of ten where the axis is long, 1, 2 and 5 of them where it is short."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    low, high = axis.get_xlim()
    subs = (1.0,) if math.log10(high / low) > 2.5 else (1.0, 2.0, 5.0)
    axis.xaxis.set_major_locator(LogLocator(subs=subs))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")


def _labels(titles: list[str]) -> tuple[list[str], list[str]]:
    """The titles without the parts they all have, and those parts."""
    parts = [title.split(", ") for title in titles]
    common = [part for part in parts[0] if all(part in each for each in parts)] if len(parts) > 1 else []
    return [", ".join(p for p in each if p not in common) or ", ".join(each) for each in parts], common


def _styles(rows: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """A colour a library, a marker a way of using it; yardsticks are hollow."""
    found: dict[str, dict[str, Any]] = {}
    used: dict[str, int] = {}
    for name, row in rows:
        if name in found:
            continue
        owner = OURS if name.startswith(OURS) else name.partition(",")[0]
        colour = _OURS_COLOUR if owner == OURS else _COLOURS.get(owner, _LINES)
        marker = _MARKERS[used.get(owner, 0) % len(_MARKERS)]
        used[owner] = used.get(owner, 0) + 1
        face = "none" if row.get("yardstick") else colour
        found[name] = {
            "color": colour,
            "marker": marker,
            "markersize": 5.5,
            "linestyle": "none",
            "markerfacecolor": face,
        }
    return found
