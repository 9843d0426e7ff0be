"""`tilewright demo optim`: one model, one text, two optimizers, side by side."""

from __future__ import annotations

import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tilewright.bench import environment

from .language_model import ByteLanguageModel, mean_loss
from .plot import plot
from .text import load_text, random_batches, windows

THEIRS, OURS = "torch AdamW", "tilewright AdamW8bit"
SCHEMA = 1
_BATCH, _LENGTH = 16, 64
_SETTINGS: dict[str, Any] = {"lr": 2e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
_WARM_UP, _FINAL_LR = 40, 0.1
_SLICE = 10
_CURVE_POINTS = 6


@dataclass
class Training:
    """One model being trained by one optimizer, and what was seen on the way."""

    name: str
    model: ByteLanguageModel
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    optimizer_ms: list[float] = field(default_factory=list)

    def step(self, inputs: torch.Tensor, targets: torch.Tensor, lr: float) -> None:
        """Forward, backward and update, timed."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        start = time.perf_counter()
        loss = self.model.loss(inputs, targets)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        before = time.perf_counter()
        self.optimizer.step()
        end = time.perf_counter()
        self.losses.append(loss.item())
        self.step_ms.append((end - start) * 1e3)
        self.optimizer_ms.append((end - before) * 1e3)

    def state_bytes(self) -> int:
        """Bytes of all state that grows with the model (a quantization map is shared, and counts once)."""
        tensors = [
            t
            for state in self.optimizer.state.values()
            for t in state.values()
            if isinstance(t, torch.Tensor)
        ]
        return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())

    def result(self) -> dict[str, Any]:
        """The numbers of the table, and the curves."""
        settled = slice(min(_SLICE, len(self.step_ms) // 2), None)
        return {
            "train_loss": round(statistics.fmean(self.losses[-50:]), 4),
            "validation_loss": round(self.validation[-1][1], 4),
            "state_bytes": self.state_bytes(),
            "step_ms": round(statistics.median(self.step_ms[settled]), 3),
            "optimizer_ms": round(statistics.median(self.optimizer_ms[settled]), 3),
            "losses": [round(loss, 4) for loss in self.losses],
            "validation": [(step, round(loss, 4)) for step, loss in self.validation],
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
    out.mkdir(parents=True, exist_ok=True)
    runs = []
    bar = (TextColumn("{task.percentage:>3.0f}%"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*bar, TextColumn("{task.description}"), console=console) as progress:
        task = progress.add_task("", total=2 * steps * len(seeds))

        def on_slice(trainings: list[Training]) -> None:
            losses = ", ".join(
                f"{t.name.split()[0]} {statistics.fmean(t.losses[-_SLICE:]):.3f}" for t in trainings
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
    (out / "optim.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    print_table(record, console)
    console.print(
        f"results  {out / 'optim.json'}\n{plot(record, out / 'optim.png')}", highlight=False, soft_wrap=True
    )
    return int(not all(math.isfinite(r[name]["validation_loss"]) for r in runs for name in (THEIRS, OURS)))


def train_both(
    seed: int,
    steps: int,
    train: torch.Tensor,
    held_out: torch.Tensor,
    on_slice: Callable[[list[Training]], None] = lambda trainings: None,
) -> dict[str, Any]:
    """Trains the same initial model on the same batches with each optimizer; a result per optimizer.

    The two take turns of a few steps, so that whatever else the machine does falls on both alike.
    """
    from tilewright.optim import AdamW8bit

    torch.manual_seed(seed)
    model = ByteLanguageModel(length=_LENGTH)
    twin = copy.deepcopy(model)
    trainings = [
        Training(THEIRS, model, torch.optim.AdamW(model.parameters(), **_SETTINGS, fused=True)),
        Training(OURS, twin, AdamW8bit(twin.parameters(), **_SETTINGS)),
    ]
    batches = random_batches(train, _BATCH, _LENGTH, seed)
    validation = windows(held_out, _LENGTH, 64)
    every = max(_SLICE, steps // _CURVE_POINTS // _SLICE * _SLICE)
    for first in range(0, steps, _SLICE):
        turn = [next(batches) for _ in range(min(_SLICE, steps - first))]
        for training in trainings:
            for offset, batch in enumerate(turn):
                training.step(*batch, _learning_rate(first + offset, steps))
            done = first + len(turn)
            if done % every == 0 or done == steps:
                training.validation.append((done, mean_loss(training.model, validation)))
        on_slice(trainings)
    return {training.name: training.result() for training in trainings}


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
    rows = summary_rows(record)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for index, heading in enumerate(("", THEIRS, OURS, "change")):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
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


def _learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    peak = float(_SETTINGS["lr"])
    warm_up = min(_WARM_UP, steps // 4)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * (_FINAL_LR + (1 - _FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress)))
