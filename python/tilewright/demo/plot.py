"""The demonstration's picture: both loss curves, how far apart they are, what each costs."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

_INK, _GRID = "#333333", "#e6e6e6"
_STYLES = (
    {"color": "#30638e", "linewidth": 4.0, "alpha": 0.55},
    {"color": "#d1495b", "linewidth": 1.5, "alpha": 1.0},
)


def plot(record: dict[str, Any], path: Path) -> str:
    """Draws the first seed's run; returns the line to print: where it is, or why there is none."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = {name: result for name, result in record["runs"][0].items() if name != "seed"}
    figure = plt.figure(figsize=(10, 5.4), layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=[5, 1, 1], height_ratios=[3.2, 1])
    curves = figure.add_subplot(grid[0, 0])
    _draw_curves(curves, results)
    _draw_difference(figure.add_subplot(grid[1, 0], sharex=curves), results)
    _draw_bars(figure.add_subplot(grid[:, 1]), results, "state_bytes", 1e-6, "optimizer state, MB")
    _draw_bars(figure.add_subplot(grid[:, 2]), results, "optimizer_ms", 1.0, "optimizer step, ms")
    figure.suptitle(
        f"Byte-level language model, {record['parameters'] / 1e6:.2f}M parameters, Python's documentation",
        fontsize=11, color=_INK,
    )  # fmt: skip
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return f"plot     {path}"


def smoothed(values: list[float], reach: int = 20) -> list[float]:
    """Mean over `reach` neighbours on either side: no lag, so that it meets the validation points."""
    return [
        statistics.fmean(values[max(0, index - reach) : index + reach + 1]) for index in range(len(values))
    ]


def _draw_curves(axis: Any, results: dict[str, Any]) -> None:
    for (name, result), style in zip(results.items(), _STYLES, strict=True):
        steps = range(1, len(result["losses"]) + 1)
        axis.plot(steps, result["losses"], color=style["color"], linewidth=0.5, alpha=0.18)
        axis.plot(
            steps, smoothed(result["losses"]), label=f"{name}: training, smoothed (raw behind)", **style
        )
    for (name, result), style, marker in zip(results.items(), _STYLES, ("o", "x"), strict=True):
        size = 6 if marker == "o" else 5
        axis.plot(*zip(*result["validation"], strict=True), marker, color=style["color"], markersize=size,
                  markerfacecolor="white", markeredgewidth=1.6, label=f"{name}: validation")  # fmt: skip
    lows = [min(result["losses"]) for result in results.values()]
    highs = [max(smoothed(result["losses"])) for result in results.values()]
    axis.set_ylim(min(lows) - 0.1, min(max(highs), 4.0))
    axis.set_ylabel("loss, nats per byte")
    axis.tick_params(labelbottom=False)
    axis.legend(frameon=False, fontsize=8.5)
    _tidy(axis)


def _draw_difference(axis: Any, results: dict[str, Any]) -> None:
    (theirs, ours), style = results.values(), _STYLES[1]
    difference = [b - a for a, b in zip(theirs["losses"], ours["losses"], strict=True)]
    steps = range(1, len(difference) + 1)
    axis.axhline(0, color=_INK, linewidth=0.8)
    axis.plot(steps, difference, color=style["color"], linewidth=0.5, alpha=0.3)
    axis.plot(steps, smoothed(difference), color=style["color"], linewidth=1.5)
    reach = max(0.02, 1.2 * max(map(abs, smoothed(difference))))
    axis.set_ylim(-reach, reach)
    axis.set_ylabel("8-bit minus\n32-bit")
    axis.set_xlabel("training step")
    _tidy(axis)


def _draw_bars(axis: Any, results: dict[str, Any], key: str, scale: float, title: str) -> None:
    for position, (result, style) in enumerate(zip(results.values(), _STYLES, strict=True)):
        value = result[key] * scale
        axis.bar(position, value, width=0.7, color=style["color"])
        axis.annotate(
            f"{value:.3g}", (position, value), (0, 4), textcoords="offset points", ha="center", fontsize=9
        )
    axis.set_xticks([0, 1], ["32-bit", "8-bit"])
    axis.set_title(title, fontsize=9.5, color=_INK)
    axis.set_yticks([])
    axis.margins(y=0.08)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _tidy(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color=_GRID, linewidth=0.7)
    axis.set_axisbelow(True)
