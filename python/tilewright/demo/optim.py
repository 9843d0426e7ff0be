"""`tilewright demo optim`: one model, one text, two optimizers, side by side."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tilewright._results import check_writable
from tilewright.bench import environment

from .language_model import ByteLanguageModel
from .plot import plot
from .show import comparison, print_files, progress_bars, write_record
from .text import load_text, random_batches, windows
from .training import Training, cosine, settled

THEIRS, OURS = "torch AdamW", "tilewright AdamW8bit"
SCHEMA = 1
_BATCH, _LENGTH = 16, 64
_SETTINGS: dict[str, Any] = {"lr": 2e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
_WARM_UP = 40
_SLICE = 10
_CURVE_POINTS = 6


def result(training: Training) -> dict[str, Any]:
    """The numbers of the table, and the curves."""
    return {
        "train_loss": round(statistics.fmean(training.losses[-50:]), 4),
        "validation_loss": round(training.final(), 4),
        "state_bytes": training.state_bytes(),
        "step_ms": settled(training.step_ms, _SLICE),
        "optimizer_ms": settled(training.optimizer_ms, _SLICE),
        "losses": [round(loss, 4) for loss in training.losses],
        "validation": [(step, round(loss, 4)) for step, loss in training.validation],
    }


def run(steps: int | None, seeds: Sequence[int], out: Path, quick: bool = False) -> int:
    """Trains for each seed with both optimizers; prints a table, writes `optim.json` and `.png` into `out`.

    Args:
        steps: training steps per optimizer and seed; None: 800, or 60 if `quick`.
        seeds: of the initial weights and the batches; with several, the spread of the final loss is reported.
        out: folder for the results, made if missing.
        quick: a few seconds, which show that it runs.

    Returns:
        0, or 1 if a training diverged.
    """
    check_writable(out)
    steps = steps or (60 if quick else 800)
    console = Console()
    started = time.perf_counter()
    train, held_out = load_text()
    parameters = sum(p.numel() for p in ByteLanguageModel().parameters())
    console.print(
        f"A byte-level language model of {parameters / 1e6:.2f}M parameters, "
        f"{len(train) / 1e3:.0f} kB of text, {steps} steps of {_BATCH} x {_LENGTH} bytes, "
        f"{torch.get_num_threads()} threads.\n"
        "Same weights, same batches, the two optimizers turn by turn:",
        highlight=False,
    )
    runs = []
    with progress_bars(console) as progress:
        task = progress.add_task("", total=2 * steps * len(seeds))

        def on_slice(trainings: dict[str, Training]) -> None:
            losses = ", ".join(
                f"{name.split()[0]} {statistics.fmean(t.losses[-_SLICE:]):.3f}"
                for name, t in trainings.items()
            )
            progress.update(task, advance=2 * _SLICE, description=f"loss: {losses}")

        for seed in seeds:
            runs.append({"seed": seed, **train_both(seed, steps, train, held_out, on_slice)})
        progress.update(task, completed=2 * steps * len(seeds))
    record = {
        "schema": SCHEMA, "demo": "optim", **environment.describe(torch.device("cpu")), "steps": steps,
        "parameters": parameters, "settings": {**_SETTINGS, "batch": _BATCH, "length": _LENGTH},
        "spread": spread(runs), "seconds": round(time.perf_counter() - started, 1), "runs": runs,
    }  # fmt: skip
    results = write_record(record, out)
    print_table(record, console)
    print_files(results, plot(record, out / "optim.png"), console)
    return int(not all(math.isfinite(r[name]["validation_loss"]) for r in runs for name in (THEIRS, OURS)))


def train_both(
    seed: int,
    steps: int,
    train: torch.Tensor,
    held_out: torch.Tensor,
    on_slice: Callable[[dict[str, Training]], None] = lambda trainings: None,
) -> dict[str, Any]:
    """Trains the same initial model on the same batches with each optimizer; a result per optimizer.

    The two take turns of a few steps, so that whatever else the machine does falls on both alike.
    """
    from tilewright.optim import AdamW8bit

    torch.manual_seed(seed)
    model = ByteLanguageModel(length=_LENGTH)
    twin = copy.deepcopy(model)
    rate = cosine(steps, min(_WARM_UP, steps // 4))
    optimizers = {
        THEIRS: torch.optim.AdamW(model.parameters(), **_SETTINGS, fused=True),
        OURS: AdamW8bit(twin.parameters(), **_SETTINGS),
    }
    trainings = {
        name: Training(of, optimizer, rate, ByteLanguageModel.loss)
        for of, (name, optimizer) in zip((model, twin), optimizers.items(), strict=True)
    }
    batches = random_batches(train, _BATCH, _LENGTH, seed)
    validation = windows(held_out, _LENGTH, 64)
    every = max(_SLICE, steps // _CURVE_POINTS // _SLICE * _SLICE)
    for first in range(0, steps, _SLICE):
        turn = [next(batches) for _ in range(min(_SLICE, steps - first))]
        for training in trainings.values():
            for batch in turn:
                training.step(*batch)
            done = first + len(turn)
            if done % every == 0 or done == steps:
                training.validate(validation)
        on_slice(trainings)
    return {name: result(training) for name, training in trainings.items()}


def spread(runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """How the final validation loss varies with the seed and between the optimizers; None for one seed."""
    if len(runs) < 2:
        return None
    final = {name: [run[name]["validation_loss"] for run in runs] for name in (THEIRS, OURS)}
    gaps = [ours - theirs for ours, theirs in zip(final[OURS], final[THEIRS], strict=True)]
    return {
        "seeds": len(runs),
        "std": {name: round(statistics.stdev(values), 4) for name, values in final.items()},
        "range": {name: [min(values), max(values)] for name, values in final.items()},
        "gap_mean": round(statistics.fmean(gaps), 4),
        "gap_std": round(statistics.stdev(gaps), 4),
    }


def print_table(record: dict[str, Any], console: Console) -> None:
    """Prints the comparison (means over the seeds) and says in words what it shows."""
    console.print(comparison(("", THEIRS, OURS, "change"), summary_rows(record)))
    for line in verdicts(record):
        console.print(line, highlight=False)


def summary_rows(record: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The table's lines: what, theirs, ours; then the difference of losses, the ratio of all else."""
    shown = {
        "train loss, last 50 steps": ("train_loss", "{:.4f}"),
        "validation loss": ("validation_loss", "{:.4f}"),
        "optimizer state": ("state_bytes", "{:.2f} MB"),
        "ms per step": ("step_ms", "{:.2f}"),
        "ms per optimizer step": ("optimizer_ms", "{:.2f}"),
    }
    rows = []
    for title, (key, pattern) in shown.items():
        theirs, ours = (
            _mean(record, name, key) / (1e6 if key == "state_bytes" else 1) for name in (THEIRS, OURS)
        )
        change = f"{ours - theirs:+.4f}" if key.endswith("loss") else f"{ours / theirs:.2f}x"
        rows.append((title, pattern.format(theirs), pattern.format(ours), change))
    return rows


def verdicts(record: dict[str, Any]) -> list[str]:
    """The comparison in sentences, the unfavourable ones too."""
    gap = _mean(record, OURS, "validation_loss") - _mean(record, THEIRS, "validation_loss")
    lines = [f"Validation loss: {gap:+.4f} nats per byte with 8-bit states."]
    if record["spread"]:
        found = record["spread"]
        lines.append(
            f"Over {found['seeds']} seeds its standard deviation is {found['std'][THEIRS]:.4f} with 32-bit, "
            f"{found['std'][OURS]:.4f} with 8-bit; 8-bit minus 32-bit at the same seed is "
            f"{found['gap_mean']:+.4f} (+- {found['gap_std']:.4f})."
        )
    for key, what in (("optimizer_ms", "the optimizer step"), ("step_ms", "a whole training step")):
        ratio = _mean(record, OURS, key) / _mean(record, THEIRS, key)
        slower = ", so it is SLOWER" if ratio > 1.02 else ""
        lines.append(f"Time: {what} takes {ratio:.2f}x as long with 8-bit states{slower}.")
    return lines


def _mean(record: dict[str, Any], name: str, key: str) -> float:
    return statistics.fmean(run[name][key] for run in record["runs"])
