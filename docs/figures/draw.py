"""Draws docs/kernels/README.md's figures: how each family's kernel works, its roofline from bench/results.

python docs/figures/draw.py
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from update_docs import RESULTS, best_rates, roofline_points  # noqa: E402

# Light colours, and what they become where the reader's system is dark; the paper goes with them.
LIGHT = {"paper": "#fbfcfe", "ink": "#1f2533", "faint": "#8a93a3", "line": "#d3d9e3", "cell": "#eef1f6"}
DARK = {"paper": "#22262f", "ink": "#e4e8f0", "faint": "#98a1b2", "line": "#4a5262", "cell": "#323846"}
BLUE, ORANGE, GREEN, VIOLET = "#4f7fe0", "#e08a3c", "#3fa37a", "#9a6fd0"
PAPER, INK, FAINT, LINE, CELL = LIGHT.values()

matplotlib.rcParams.update(
    {
        "svg.hashsalt": "tilewright",
        "svg.fonttype": "path",
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": LINE,
        "axes.facecolor": PAPER,
        "figure.facecolor": PAPER,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "grid.color": LINE,
    }
)


def save(figure: Figure, name: str) -> None:
    """Writes an SVG whose colours follow the reader's system."""
    path = HERE / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight", pad_inches=0.15)
    plt.close(figure)
    svg = path.read_text(encoding="utf-8")
    for key, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{key})")
    rules = [
        ":root{" + ";".join(f"--{key}:{colour}" for key, colour in table.items()) + "}"
        for table in (LIGHT, DARK)
    ]
    style = f"<style>{rules[0]}@media (prefers-color-scheme: dark){{{rules[1]}}}</style>"
    path.write_text(re.sub(r"(<svg[^>]*>)", rf"\1{style}", svg, count=1), encoding="utf-8")


def canvas(width: float, height: float, ax: Axes | None = None) -> Axes:
    """Axes in units of a tenth of an inch or so, without frame."""
    if ax is None:
        ax = plt.figure(figsize=(width / 10, height / 10)).add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.axis("off")
    return ax


def box(
    ax: Axes, x: float, y: float, w: float, h: float, text: str = "", colour: str = CELL, size: float = 10
) -> None:
    """A rounded box with text in its middle; on colours of their own the text is white."""
    style = "round,pad=0,rounding_size=0.7"
    ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=style, facecolor=colour, edgecolor=LINE, linewidth=1))
    ink = INK if colour in (CELL, PAPER) else "white"
    ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size, color=ink, linespacing=1.35)


def arrow(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = FAINT, bend: float = 0
) -> None:
    """An arrow from start to end."""
    style = {"arrowstyle": "-|>", "color": colour, "lw": 1.4, "connectionstyle": f"arc3,rad={bend}"}
    ax.annotate("", end, start, arrowprops=style)


def note(
    ax: Axes, x: float, y: float, text: str, size: float = 9, colour: str = FAINT, **options: object
) -> None:
    """Words beside the boxes."""
    ax.text(
        x, y, text, fontsize=size, color=colour, linespacing=1.4, **{"ha": "left", "va": "center", **options}
    )


def optim() -> None:
    """A tile of 256 parameters on its way through a step, and the bytes that cross the bus."""
    ax = canvas(106, 45)
    note(ax, 2, 42, "memory", 10, INK)
    note(ax, 24, 42, "registers or first cache: one tile of 256 parameters", 10, INK)
    ax.add_patch(Rectangle((22.5, 1), 57, 38.5, facecolor="none", edgecolor=LINE, linestyle="--"))
    for y, name, colour in (
        (32, "codes of m, v", VIOLET),
        (24.5, "scales", VIOLET),
        (15, "gradient", ORANGE),
        (5, "parameter", BLUE),
    ):
        box(ax, 2, y, 15, 5.5, name, colour, 9.5)
    box(ax, 26, 28, 13, 8, "decode\ncode × scale")
    box(ax, 44, 14, 16, 12, "m ← β₁m + (1−β₁)g\nv ← β₂v + (1−β₂)g²", size=9)
    box(ax, 44, 4, 16, 6.5, "p ← p − η m̂ / √v̂", size=9.5)
    box(ax, 64, 28, 13, 8, "new scale,\nencode")
    for start, end in (
        ((17, 34.7), (26, 33)), ((17, 27.2), (26, 30.5)), ((39, 30.5), (48, 26)), ((17, 17.7), (44, 19)),
        ((17, 7.7), (44, 7.2)), ((52, 14), (52, 10.5)), ((57, 26), (64, 31)),
    ):  # fmt: skip
        arrow(ax, start, end)
    box(ax, 85, 29.5, 17, 5.5, "codes, scales", VIOLET, 9.5)
    box(ax, 85, 5, 17, 5.5, "parameter", BLUE, 9.5)
    arrow(ax, (77, 32), (85, 32))
    arrow(ax, (60, 7.5), (85, 7.7))
    note(ax, 62, 20, "the step uses m and v\nbefore they are rounded", 8.5)
    note(ax, 93.5, 42, "memory", 10, INK, ha="center")
    note(
        ax,
        93.5,
        20,
        "read + written,\nfp32, bytes each:\n16.06  AdamW8bit\n28       fp32 states",
        9,
        INK,
        ha="center",
    )
    save(ax.figure, "optim")


def scan() -> None:
    """States stay in registers while time passes; every 64th is kept for the backward pass."""
    ax = canvas(106, 48)
    left, top, cell = 24, 34, 2.55
    note(ax, left, 45.5, "time →", 10, INK)
    for chunk in range(3):
        for row in range(4):
            for step in range(8):
                x = left + chunk * 22.4 + step * cell
                shade = BLUE if (chunk, step) == (1, 3) else CELL
                ax.add_patch(
                    Rectangle(
                        (x, top - row * cell), cell, cell, facecolor=shade, edgecolor=LINE, linewidth=0.6
                    )
                )
        note(ax, left + chunk * 22.4 + 10.2, top + 5.2, f"chunk {chunk}: 64 tokens", 9, ha="center")
    note(ax, 2, top - 2.5, "16 channels:\na vector, or\nthreads", 9.5, INK)
    for chunk in (1, 2):
        x = left + chunk * 22.4 - 1.1
        ax.plot([x, x], [top - 9.5, top + 3.5], color=ORANGE, lw=2)
    note(ax, left + 22.4 - 1.1, top - 11.3, "h kept", 9, ORANGE, ha="center")
    note(ax, left + 44.8 - 1.1, top - 11.3, "h kept", 9, ORANGE, ha="center")
    box(ax, left + 22.4 + 2, 12.5, 19, 7, "h ← exp(Δ A) h + Δ B u\ny = Σ C h", BLUE, 9.5)
    arrow(ax, (left + 22.4 + 8.9, top - 7.8), (left + 22.4 + 10.5, 19.5), BLUE)
    note(ax, 2, 16, "N states of a channel:\nin registers throughout", 9.5, INK)
    note(ax, left + 47, 16, "u, Δ, z, B, C: read once\ny: written once", 9.5, INK)
    y = 5
    arrow(ax, (left + 66, y), (left + 24, y), GREEN)
    note(ax, 2, y, "backward", 9.5, INK)
    note(ax, left + 68, y, "from a kept h, the chunk's\nstates are computed again", 9)
    arrow(ax, (left + 20, y), (left + 1, y), GREEN)
    save(ax.figure, "scan")


def attention() -> None:
    """A block row walks its list of key blocks; what is not on the list is never read."""
    ax = canvas(106, 50)
    n, cell, left, bottom = 10, 3.8, 12, 4
    for i in range(n):
        for j in range(n):
            full = (0 < i - j < 3) or (j == 0 and i > 0)
            partial = i == j or i - j == 3
            colour = BLUE if full else "#7f9fe6" if partial else CELL
            y = bottom + (n - 1 - i) * cell
            ax.add_patch(
                Rectangle((left + j * cell, y), cell, cell, facecolor=colour, edgecolor=PAPER, linewidth=1)
            )
    row = 7
    y = bottom + (n - 1 - row) * cell
    ax.add_patch(Rectangle((left, y), n * cell, cell, facecolor="none", edgecolor=ORANGE, linewidth=2))
    note(ax, left + n * cell / 2, bottom + n * cell + 2.2, "blocks of keys", 9.5, INK, ha="center")
    note(ax, left - 2, bottom + n * cell / 2, "blocks of queries", 9.5, INK, ha="center", rotation=90)
    arrow(ax, (left + n * cell + 0.5, y + 2), (57, 33), ORANGE, -0.2)
    note(ax, 58, 46, "its list: 0, 4, 5, 6, 7", 10, INK)
    for k, (name, colour) in enumerate(
        (("0", BLUE), ("4", "#7f9fe6"), ("5", BLUE), ("6", BLUE), ("7", "#7f9fe6"))
    ):
        box(ax, 58 + k * 6.2, 37.5, 5.2, 5.2, name, colour)
        arrow(ax, (60.6 + k * 6.2, 37.3), (60.6 + k * 6.2, 31.2))
    box(ax, 58, 24, 30, 7, "S = Q Kᵀ, running max and sum", CELL, 9.5)
    arrow(ax, (73, 24), (73, 19.6))
    box(ax, 58, 12.5, 30, 7, "out ← rescaled out + P V", CELL, 9.5)
    arrow(ax, (73, 12.5), (73, 9))
    note(ax, 73, 6.5, "out, lse: written once", 9.5, INK, ha="center")
    note(ax, 91, 40, "full: no mask is\nlooked at\npartial: a bit\na pair", 8.8)
    note(ax, 91, 21.5, "never in memory:\nS, P", 8.8)
    save(ax.figure, "attention")


def prune() -> None:
    """What is stored of a pruned weight, by blocks and 2:4, and how a product walks it."""
    ax = canvas(106, 46)
    torch.manual_seed(3)
    note(ax, 2, 43, "blocks, a quarter kept", 10, INK)
    kept, cell = torch.rand(6, 8) < 0.27, 3.6
    kept[2] = torch.tensor([False, True, False, False, False, True, True, False])
    for i in range(6):
        for j in range(8):
            y = 15.5 + (5 - i) * cell
            colour = BLUE if kept[i, j] else CELL
            ax.add_patch(
                Rectangle((2 + j * cell, y), cell, cell, facecolor=colour, edgecolor=PAPER, linewidth=1)
            )
    y = 15.5 + 3 * cell
    ax.add_patch(Rectangle((2, y), 8 * cell, cell, facecolor="none", edgecolor=ORANGE, linewidth=2))
    note(ax, 2, 12, "stored: the kept blocks, whole, and their columns", 8.8)
    for k, name in enumerate(("1", "5", "6")):
        box(ax, 37 + k * 5.4, y - 0.5, 4.6, 4.6, name, BLUE)
    arrow(ax, (31, y + 1.8), (36.6, y + 1.8), ORANGE)
    box(ax, 37, 12.5, 15.4, 7, "8 outputs × 32 tokens\nin registers", CELL, 8)
    arrow(ax, (44.7, y - 0.8), (44.7, 19.7))
    note(ax, 37, 36.5, "a row's list; only these\ncolumns of x are read", 8.8)
    note(ax, 2, 5, "FLOPs and bytes of the weight: the kept share of dense", 9.5, INK)

    note(ax, 60, 43, "2:4: of four neighbours two stay", 10, INK)
    groups = ((0, 2), (1, 3), (2, 3), (0, 1))
    for g, pair in enumerate(groups):
        for e in range(4):
            colour = VIOLET if e in pair else CELL
            ax.add_patch(
                Rectangle(
                    (60 + g * 11.6 + e * 2.6, 36), 2.6, 2.6, facecolor=colour, edgecolor=PAPER, linewidth=1
                )
            )
    for g, pair in enumerate(groups):
        for k, e in enumerate(pair):
            x = 62.6 + g * 11.6 + k * 2.6
            ax.add_patch(Rectangle((x, 26.5), 2.6, 2.6, facecolor=VIOLET, edgecolor=PAPER, linewidth=1))
            arrow(ax, (61.3 + g * 11.6 + e * 2.6, 35.8), (x + 1.3, 29.3))
            note(ax, x + 1.3, 24.6, str(e), 9, INK, ha="center")
    note(ax, 60, 20.5, "stored: values, and two bits of position each", 8.8)
    note(ax, 60, 14.5, "one token: x is brought to the values,\npicked by their positions", 9.5, INK)
    note(
        ax, 60, 7.5, "many tokens: a value times the tokens\nof its column, half the multiply-adds", 9.5, INK
    )
    save(ax.figure, "prune")


def usual_copy() -> float:
    """GB/s of the plain copy: the median of all that were timed beside the CPU results."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (RESULTS / "cpu").glob("*-cpu.json")]
    return statistics.median(c["copy_gb_per_s"] for r in records for c in r["cases"] if c["copy_gb_per_s"])


def roofline(family: str) -> None:
    """Rate over intensity of a family's main kernels, under a copy and the best rate of any of them."""
    record = json.loads((RESULTS / "cpu" / f"{family}-cpu.json").read_text(encoding="utf-8"))
    figure = plt.figure(figsize=(7.6, 3.9))
    ax = figure.add_subplot()
    best = best_rates()
    points = roofline_points(record)
    copy, low = usual_copy(), min(p.intensity for p in points) / 2
    high = max(max(p.intensity for p in points) * 3, 4 * max(best.values()) / copy)
    for dtype, colour in (("float32", BLUE), ("bfloat16", ORANGE)):
        peak = best[dtype]
        ax.plot([max(peak / copy, low), high], [peak, peak], color=colour, lw=1.2, ls="--")
        label = f"best {dtype}: {peak:.0f}"
        ax.annotate(
            label, (high, peak), (5, 0), textcoords="offset points", color=colour, va="center", fontsize=8
        )
        chosen = [p for p in points if p.dtype == dtype]
        ax.scatter([p.intensity for p in chosen], [p.rate for p in chosen], color=colour, s=34, zorder=3)
    edge = max(best.values()) / copy
    if edge > low:
        ax.plot([low, edge], [low * copy, edge * copy], color=FAINT, lw=1.4)
        middle = (low * edge) ** 0.5
        text = f"a plain copy, {copy:.0f} GB/s"
        ax.annotate(
            text,
            (middle, middle * copy),
            (-8, 8),
            textcoords="offset points",
            color=FAINT,
            ha="right",
            fontsize=8,
        )
    for number, p in enumerate(points, 1):
        ax.annotate(
            str(number), (p.intensity, p.rate), (5, -9), textcoords="offset points", fontsize=8.5, color=INK
        )
    ax.set(xscale="log", yscale="log", xlim=(low, high), xlabel="FLOPs a byte", ylabel="GFLOP/s")
    ax.set_ylim(min(p.rate for p in points) / 3, max(best.values()) * 2.2)
    ax.grid(True, which="major", lw=0.6)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    save(figure, f"roofline-{family}")


if __name__ == "__main__":
    for draw in (optim, scan, attention, prune):
        draw()
        roofline(draw.__name__)
