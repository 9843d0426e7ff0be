"""The demonstrations' pictures: the loss curves of both sides, and what each costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

_INK, _GRID = "#333333", "#e6e6e6"
_STYLES = (
    {"color": "#30638e", "linewidth": 4.0, "alpha": 0.55},
    {"color": "#d1495b", "linewidth": 1.5, "alpha": 1.0},
)


def plot(record: dict[str, Any], path: Path) -> str:
    """Draws `demo optim`'s first seed; returns the line to print: where it is, or why there is none."""
    return _saved(_draw_optim, record, path)


def plot_scan(record: dict[str, Any], path: Path) -> str:
    """Draws `demo scan`; returns the line to print: where it is, or why there is none."""
    return _saved(_draw_scan, record, path)


def plot_attention(record: dict[str, Any], masks: dict[str, Any], path: Path) -> str:
    """Draws `demo attention` and its masks; returns the line to print."""
    return _saved(lambda figure, found: _draw_attention(figure, found, masks), record, path)


def plot_prune(record: dict[str, Any], path: Path) -> str:
    """Draws `demo prune`; returns the line to print."""
    return _saved(_draw_prune, record, path)


def plot_story(record: dict[str, Any], path: Path) -> str:
    """Draws what is there of `demo`'s story; returns the line to print."""
    return _saved(_draw_story, record, path)


def smoothed(values: list[float], reach: int = 20) -> list[float]:
    """Mean over `reach` neighbours on either side: no lag, so that it meets the validation points."""
    return [
        statistics.fmean(values[max(0, index - reach) : index + reach + 1]) for index in range(len(values))
    ]


def _saved(draw: Callable[[Any, dict[str, Any]], None], record: dict[str, Any], path: Path) -> str:
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(10, 5.4), layout="constrained")
    draw(figure, record)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return f"plot     {path}"


def _draw_optim(figure: Any, record: dict[str, Any]) -> None:
    results = {name: result for name, result in record["runs"][0].items() if name != "seed"}
    grid = figure.add_gridspec(2, 3, width_ratios=[5, 1, 1], height_ratios=[3.2, 1])
    curves, labels = figure.add_subplot(grid[0, 0]), ["32-bit", "8-bit"]
    _draw_curves(curves, results)
    _draw_difference(figure.add_subplot(grid[1, 0], sharex=curves), results)
    for column, (key, scale, title) in enumerate(
        (("state_bytes", 1e-6, "optimizer state, MB"), ("optimizer_ms", 1.0, "optimizer step, ms")), start=1
    ):
        values = [result[key] * scale for result in results.values()]
        _draw_bars(figure.add_subplot(grid[:, column]), values, labels, title)
    _draw_title(figure, f"Byte-level language model, {record['parameters'] / 1e6:.2f}M parameters")


def _draw_scan(figure: Any, record: dict[str, Any]) -> None:
    results = record["training"]
    grid = figure.add_gridspec(1, 3, width_ratios=[5, 1, 1])
    _draw_common_steps(figure.add_subplot(grid[0]), results)
    steps = [result["step_ms"] / 1e3 for result in results.values()]
    tokens = list(record["generation"]["token_ms"].values())
    for column, (values, title) in enumerate(
        ((steps, "a training\nstep, s"), (tokens, "a generated\ntoken, ms")), start=1
    ):
        _draw_bars(figure.add_subplot(grid[column]), values, ["as it\ncomes", "swapped"], title)
    _draw_title(figure, f"Byte-level Mamba of transformers, {record['parameters'] / 1e6:.2f}M parameters")


def _draw_attention(figure: Any, record: dict[str, Any], masks: dict[str, Any]) -> None:
    results = record["training"]
    grid = figure.add_gridspec(2, 2, width_ratios=[3, 1], height_ratios=[1, 1.2])
    curves, below = figure.add_subplot(grid[0, 0]), grid[1, :].subgridspec(1, len(masks) + 1)
    for (name, result), style in zip(results.items(), _STYLES, strict=True):
        curves.plot(range(1, len(result["losses"]) + 1), result["losses"], label=f"{name}: training", **style)
        curves.plot(record["steps"], result["validation"], "o", color=style["color"], markerfacecolor="white")
    curves.set_xlabel("training step (circles: validation)")
    curves.set_ylabel("loss, nats per byte")
    curves.legend(frameon=False, fontsize=8.5)
    _tidy(curves)
    times = [result["step_ms"] for result in results.values()]
    _draw_bars(figure.add_subplot(grid[0, 1]), times, ["dense", "window"], "a training step, ms")
    for column, (name, mask) in enumerate(masks.items()):
        axis = mask.plot(ax=figure.add_subplot(below[column]))
        axis.set_title(f"{name}: density {mask.density:.3f}", fontsize=9.5, color=_INK)
    _draw_estimators(figure.add_subplot(below[len(masks)]), record["estimators"])
    parameters = record["parameters"] / 1e6
    _draw_title(figure, f"Byte-level Llama of transformers, {parameters:.2f}M parameters")


def _draw_estimators(axis: Any, estimators: dict[str, list[dict[str, float]]]) -> None:
    for name, rows in estimators.items():
        axis.plot(
            [row["density"] for row in rows], [row["mass"] for row in rows], "o-", label=name, markersize=3
        )
    axis.set_title("of the dense model's attention", fontsize=9.5, color=_INK)
    axis.set_xlabel("causal blocks read")
    axis.set_ylabel("attention kept")
    axis.legend(frameon=False, fontsize=7.5)
    _tidy(axis)


def _draw_prune(figure: Any, record: dict[str, Any]) -> None:
    tasks = record["tasks"]
    grid = figure.add_gridspec(len(tasks), 2)
    for number, (name, result) in enumerate(tasks.items()):
        _draw_quality(figure.add_subplot(grid[number, 0]), name, result)
        _draw_speeds(figure.add_subplot(grid[number, 1]), result)
    figure.suptitle("Pruned, repaired, compressed", fontsize=11, color=_INK)


# A step of the story and what it gains: in words, scale, what it is before and after, what less of it is.
_GAINS = {
    ("swap Mamba", "step_ms"): (
        "Mamba layers swapped:\ntraining step, ms",
        1.0,
        ("stock", "swapped"),
        "faster",
    ),
    ("AdamW8bit", "state_bytes"): ("AdamW8bit:\noptimizer state, MB", 1e-6, ("32-bit", "8-bit"), "smaller"),
    ("window", "step_ms"): ("windowed attention:\ntraining step, ms", 1.0, ("dense", "window"), "faster"),
    ("compress", "bytes"): ("pruned, compressed:\nmodel, MB", 1e-6, ("dense", "sparse"), "smaller"),
    ("compress", "read_ms"): ("pruned, compressed:\nreading, ms", 1.0, ("dense", "sparse"), "faster"),
    ("compress", "token_ms"): ("pruned, compressed:\nwriting a byte, ms", 1.0, ("dense", "sparse"), "faster"),
}


def _draw_story(figure: Any, record: dict[str, Any]) -> None:
    """Above: what each step gains; below: what it costs."""
    stages = record["stages"]
    gains = {key: shown for key, shown in _GAINS.items() if key[0] in stages}
    losses = {name: found["validation"] for name, found in stages.items() if "validation" in found}
    losses.pop("start to end", None)
    above, *below = figure.subfigures(2, 1, height_ratios=[1.5, 1]) if losses else [figure]
    for axis, ((stage, measure), (title, scale, labels, word)) in zip(
        above.subplots(1, len(gains), squeeze=False)[0], gains.items(), strict=True
    ):
        before, after = (value * scale for value in stages[stage][measure])
        _draw_bars(axis, [before, after], list(labels), title)
        axis.set_xlabel(_factor(before, after, word), fontsize=13, fontweight="bold", color=_INK, labelpad=5)
    if losses:
        _draw_losses(below[0].subplots(), losses)
    figure.suptitle(_finding(stages), fontsize=13, color=_INK)


def _factor(before: float, after: float, word: str) -> str:
    """How many times less it is now."""
    if after > 1.03 * before:
        return f"{after / before:.2g}x {'SLOWER' if word == 'faster' else 'LARGER'}"
    return f"{before / after:.2g}x {word}" if before > 1.03 * after else "the same"


def _finding(stages: dict[str, Any]) -> str:
    """The story in one line, as far as it goes."""
    parts = []
    if "swap Mamba" in stages:
        before, after = stages["swap Mamba"]["step_ms"]
        parts.append(f"Trained {before / after:.2g}x as fast")
    if "AdamW8bit" in stages:
        before, after = stages["AdamW8bit"]["state_bytes"]
        parts.append(f"{after / before:.0%} of the optimizer state")
    if "start to end" in stages:
        whole = stages["start to end"]
        (stock, final), (before, after) = whole["bytes"], whole["validation"]
        parts += [f"{final / stock:.0%} of the model's bytes", f"validation loss {after - before:+.2f}"]
    return ", ".join(parts)


def _draw_losses(axis: Any, losses: dict[str, list[float]]) -> None:
    """The validation loss before and after each step that can change it."""
    for place, pair in enumerate(losses.values()):
        axis.plot((place - 0.2, place + 0.2), pair, color=_INK, linewidth=1, zorder=1)
        for x, value, style in zip((-0.2, 0.2), pair, _STYLES, strict=True):
            axis.plot(place + x, value, "o", color=style["color"], markersize=8)
            axis.annotate(
                f"{value:.2f}", (place + x, value), (40 * x, -3), textcoords="offset points",
                ha="left" if x > 0 else "right", fontsize=9.5,
            )  # fmt: skip
    axis.set_xticks(range(len(losses)), losses)
    axis.set_xlim(-0.6, len(losses) - 0.4)
    axis.set_ylabel("nats per byte")
    axis.set_title("what it costs: validation loss before and after each step", fontsize=9.5, color=_INK)
    lowest, highest = min(map(min, losses.values())), max(map(max, losses.values()))
    room = max(0.2 * (highest - lowest), 0.2)  # so that a difference of some thousandths looks like one
    axis.set_ylim(lowest - room, highest + room)
    _tidy(axis)


def _draw_quality(axis: Any, name: str, result: dict[str, Any]) -> None:
    """From what pruning left to what the repair brought back; the dense model as a line."""
    rows = list(result["rows"].items())
    dense, pruned = rows[0][1]["quality"]["final"], rows[1:]
    axis.axhline(dense, color=_STYLES[0]["color"], linewidth=1.5, label="dense")
    for stage, fill in (("pruned", "white"), ("repaired", _STYLES[1]["color"])):
        values = [row["quality"][stage] for _, row in pruned]
        axis.plot(values, "o", color=_STYLES[1]["color"], markerfacecolor=fill, markersize=8, label=stage)
    axis.set_xticks(range(len(pruned)), [label for label, _ in pruned], fontsize=8.5)
    axis.set_xlim(-0.5, len(pruned) - 0.5)
    kind = "accuracy" if result["measure"] == "accuracy" else "loss, nats per byte"
    axis.set_title(f"{name}: {kind}", fontsize=9.5, color=_INK)
    between = (len(pruned) - 1) / len(pruned)  # the last two columns: in one, its circles look like results
    axis.legend(frameon=False, fontsize=8, loc="center", bbox_to_anchor=(between, 0.5))
    _tidy(axis)


def _draw_speeds(axis: Any, result: dict[str, Any]) -> None:
    (_, dense), *pruned = result["rows"].items()
    width = 0.8 / len(dense["ms"])
    for number, (count, style) in enumerate(zip(dense["ms"], _STYLES, strict=True)):
        places = [place + (number - (len(dense["ms"]) - 1) / 2) * width for place in range(len(pruned))]
        speeds = [dense["ms"][count] / row["ms"][count] for _, row in pruned]
        unit = result["unit"] if count == "1" else f"{result['unit']}s"
        bars = axis.bar(places, speeds, width * 0.95, color=style["color"], label=f"{count} {unit}")
        axis.bar_label(bars, fmt="%.2f", fontsize=8)
    axis.axhline(1.0, color=_INK, linewidth=0.8)
    axis.set_xticks(range(len(pruned)), [label for label, _ in pruned], fontsize=8.5)
    axis.set_title("times as fast as dense", fontsize=9.5, color=_INK)
    axis.margins(y=0.3)  # room for the legend
    axis.legend(frameon=False, fontsize=8, loc="upper center", ncols=2)
    _tidy(axis)


def _draw_title(figure: Any, text: str) -> None:
    figure.suptitle(f"{text}, Python's documentation", fontsize=11, color=_INK)


def _draw_common_steps(axis: Any, results: dict[str, Any]) -> None:
    """The few steps of the first as dots on the curve of the second; a log axis keeps them apart."""
    ((theirs, few), (ours, many)), (dots, line) = results.items(), _STYLES
    axis.plot(
        range(1, len(few["losses"]) + 1), few["losses"], "o", color=dots["color"], alpha=dots["alpha"],
        markersize=11, label=f"{theirs}: training, {len(few['losses'])} steps",
    )  # fmt: skip
    axis.plot(range(1, len(many["losses"]) + 1), many["losses"], color=line["color"], linewidth=1.0,
              label=f"{ours}: training, same batches")  # fmt: skip
    axis.plot(*zip(*many["validation"], strict=True), "o", color=_INK, markersize=6, markerfacecolor="white",
              markeredgewidth=1.6, label=f"{ours}: validation")  # fmt: skip
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.set_xlabel("training step")
    axis.set_ylabel("loss, nats per byte")
    axis.legend(frameon=False, fontsize=8.5)
    _tidy(axis)


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


def _draw_bars(axis: Any, values: list[float], labels: list[str], title: str) -> None:
    for position, (value, style) in enumerate(zip(values, _STYLES, strict=True)):
        axis.bar(position, value, width=0.7, color=style["color"])
        axis.annotate(
            f"{value:.0f}" if value >= 100 else f"{value:.3g}", (position, value), (0, 4),
            textcoords="offset points", ha="center", fontsize=9,
        )  # fmt: skip
    axis.set_xticks([0, 1], labels)
    axis.set_title(title, fontsize=9.5, color=_INK)
    axis.set_yticks([])
    axis.margins(y=0.08)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _tidy(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color=_GRID, linewidth=0.7)
    axis.set_axisbelow(True)
