"""What `tilewright demo` says at its end: what each step gained, and what it cost."""

from __future__ import annotations

import math
from typing import Any

import torch
from rich.console import Console

from .show import comparison, print_text

SWAP, OPTIMIZER, WINDOW = "swap Mamba", "AdamW8bit", "window"
PRUNE, REPAIR, COMPRESS, WHOLE = "prune", "repair", "compress", "start to end"
# Rounding alone makes the losses of so few steps differ by some 1e-6; compression by less.
_SAME_LOSS = 1e-3
_SLOWER = 0.97

# What is compared: its title, how it is printed, in which unit, and what kind of change is of interest.
_MEASURES: dict[str, tuple[str, str, float, str]] = {
    "state_bytes": ("optimizer state, MB", "{:.2f}", 1e-6, "size"),
    "step_ms": ("ms per step", "{:.4g}", 1.0, "time"),
    "optimizer_ms": ("   of which the optimizer", "{:.3g}", 1.0, "time"),
    "bytes_per_s": ("bytes per second", "{:.0f}", 1.0, "rate"),
    "bytes": ("model, MB", "{:.2f}", 1e-6, "size"),
    "density": ("share of blocks computed", "{:.3f}", 1.0, "size"),
    "read_ms": ("ms to read", "{:.4g}", 1.0, "time"),
    "token_ms": ("ms to generate a byte", "{:.3g}", 1.0, "time"),
    "training_loss": ("loss after the last step", "{:.4f}", 1.0, "loss"),
    "validation": ("validation loss", "{:.3f}", 1.0, "loss"),
}


def print_table(record: dict[str, Any], console: Console) -> None:
    """Prints the comparison, says in words what it shows, and then what the model wrote."""
    console.print(comparison(("step", "", "before", "after", "change"), summary_rows(record), words=2))
    for line in verdicts(record):
        console.print(line, highlight=False)
    if WHOLE in record["stages"]:
        for title, key in (
            ("Text it was not trained on:", "prompt"),
            ("How the small model goes on:", "sample"),
        ):
            print_text(title, record["stages"][WHOLE][key], console)
    console.print()


def summary_rows(record: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """The table's lines: step, what, before, after; the ratio, and for losses the difference."""
    rows = []
    for name, result in record["stages"].items():
        shown = [(key, *_MEASURES[key]) for key in _MEASURES if key in result]
        for number, (key, what, pattern, scale, kind) in enumerate(shown):
            title = "" if number else title_of(name, record)
            a, b = (value * scale for value in result[key])
            values = pattern.format(a), pattern.format(b), _change(kind, a, b)
            rows.append((title, _sized(key, what, name, record), *values))
    return rows


def title_of(name: str, record: dict[str, Any]) -> str:
    """A step's name with its setting."""
    size = record["settings"]
    return {
        WINDOW: f"window {size['window']}",
        PRUNE: f"prune {size['sparsity']:.0%}",
    }.get(name, name)


def _sized(key: str, what: str, name: str, record: dict[str, Any]) -> str:
    """What was measured, with how many bytes it was measured on."""
    size = record["settings"]
    if key == "read_ms":
        return f"{what} {size['long']} bytes"
    if key == "step_ms":
        return f"{what} of {size['long'] if name == WINDOW else size['batch'] * size['length']} bytes"
    return what


def _change(kind: str, before: float, after: float) -> str:
    if kind == "loss":
        return f"{after - before:+.3f}"
    if kind in ("size", "rate"):
        return f"{after / before:.2f}x"
    return f"{before / after:.3g}x speed"


def verdicts(record: dict[str, Any]) -> list[str]:
    """The comparison in sentences, the unfavourable ones too."""
    found, lines = record["stages"], []
    if SWAP in found:
        losses = found[SWAP]["losses"]
        lines.append(
            f"Swapping the Mamba layers changes nothing but the time: over {len(losses[0])} steps the losses "
            f"differ by at most {loss_difference(record):.0e}."
        )
    if COMPRESS in found:
        kernels = found[COMPRESS]["kernels"]
        sparse = sum(count for kernel, count in kernels.items() if kernel != "dense")
        count = sum(kernels.values())
        lines.append(
            f"All {count} pruned layers run in a sparse form."
            if sparse == count
            else f"Of {count} pruned layers {sparse} run in a sparse form; zeros in the others save nothing."
        )
    if WHOLE in found:
        before, after = found[WHOLE]["validation"]
        lines.append(f"The price: {after - before:+.3f} nats per byte against the dense model.")
    slower = [
        f"{_MEASURES[key][0].strip().removeprefix('of which ')} ({title_of(name, record)})"
        for name, result in found.items()
        for key, values in result.items()
        if _MEASURES.get(key, ("", "", 1.0, ""))[3] == "time" and values[0] / values[1] < _SLOWER
    ]
    if slower:
        lines.append(f"Does not pay here, SLOWER than before: {', '.join(slower)}.")
    if not is_sound(record):
        lines.append("WRONG: a loss is no number, or swapping or compressing changed what is computed.")
    return lines


def loss_difference(record: dict[str, Any]) -> float:
    """The largest between transformers' Mamba and the swapped one; NaN if a loss is."""
    pairs = zip(*record["stages"][SWAP]["losses"], strict=True)
    return float(torch.tensor([abs(a - b) for a, b in pairs], dtype=torch.float64).max())


def is_sound(record: dict[str, Any]) -> bool:
    """Whether what must not change a loss did not, and all losses are numbers."""
    found = record["stages"]
    losses = [loss for result in found.values() for loss in result.get("validation", [])]
    same = SWAP not in found or loss_difference(record) <= _SAME_LOSS
    if COMPRESS in found:
        before, after = found[COMPRESS]["validation"]
        same = same and abs(after - before) <= _SAME_LOSS
    return same and all(math.isfinite(loss) for loss in losses)
