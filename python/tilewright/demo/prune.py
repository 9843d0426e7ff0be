"""`tilewright demo prune`: two trained models, pruned in three ways, repaired, and made faster by it."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

from tilewright._results import check_writable
from tilewright.bench import environment
from tilewright.bench.timing import measure

from .host import without_warnings
from .plot import plot_prune
from .prune_tasks import FULL, QUICK, Size, Task, digits_task, text_task
from .show import print_files, write_record

SCHEMA = 1
DENSE, BLOCKS, TWO_OF_FOUR, CHANNELS = "dense", "blocks 75%", "2:4", "channels 50%"
ZEROS_ALONE = "blocks, not compressed"
_BLOCK, _SPARSITY, _RATIO = 16, 0.75, 0.5
_REPAIR_LR = 2e-3
_CALIBRATION = 8
# compress() compares outputs itself; what it changes beyond rounding shows here too.
_SAME = {"accuracy": 0.005, "loss": 1e-3}
_SLOWER = 0.97

Say = Callable[[str], None]


def run(steps: int | None, seeds: Sequence[int], out: Path, quick: bool = False) -> int:
    """Trains, prunes, repairs and times; prints tables, writes `prune.json` and `.png` into `out`.

    Args:
        steps: training steps of each model; None: 150 and 220, or a few if `quick`.
        seeds: of the initial weights and the batches. Only the first is used.
        out: folder for the results, made if missing.
        quick: a few seconds, which show that it runs.

    Returns:
        0, or 1 if a training diverged or a compressed model does not compute what the pruned one does.

    Raises:
        OSError: `out` cannot be written to.
        ImportError: scikit-learn, torch-pruning or transformers is not installed; says which.
    """
    check_writable(out)
    size, seed = QUICK if quick else FULL, seeds[0]
    console, started = Console(), time.perf_counter()
    with without_warnings("prune"):
        tasks = [digits_task(size, seed, steps), text_task(size, seed, steps)]
        announce(tasks, console)
        results = {task.name: _with_progress(task, size, console) for task in tasks}
    peers = ["transformers", "scikit-learn", "torch-pruning"]
    record = {
        "schema": SCHEMA, "demo": "prune", **environment.describe(torch.device("cpu"), peers), "seed": seed,
        "settings": {**vars(size), "block": _BLOCK, "sparsity": _SPARSITY, "ratio": _RATIO},
        "seconds": round(time.perf_counter() - started, 1), "tasks": results,
    }  # fmt: skip
    results_file = write_record(record, out)
    print_table(record, console)
    print_files(results_file, plot_prune(record, out / "prune.png"), console)
    return int(not all(is_sound(result) for result in results.values()))


def announce(tasks: list[Task], console: Console) -> None:
    """Says what is going to be done."""
    console.print(
        f"Two models are trained, {torch.get_num_threads()} threads: "
        + "; ".join(f"{task.title}, {_parameters(task.model) / 1e6:.2f}M parameters" for task in tasks)
        + f".\nEach is pruned in three ways: {_SPARSITY:.0%} of the {_BLOCK} x {_BLOCK} blocks, two of every "
        f"four weights, and {_RATIO:.0%} of channels and heads, which leave. "
        "Then each is repaired, put into its fastest form, and timed beside the dense one.",
        highlight=False,
    )


def run_task(task: Task, size: Size, say: Say) -> dict[str, Any]:
    """All rows of one model's table."""
    start = time.perf_counter()
    say("training")
    task.train(task.model, task.steps, task.lr, lambda loss: say(f"training, loss {loss:.3f}"))
    dense = task.quality(task.model)
    models: dict[str, nn.Module] = {DENSE: task.model}
    rows = {DENSE: _row(task.model, task.model, {"pruned": dense, "repaired": dense, "final": dense})}
    for name in (BLOCKS, TWO_OF_FOUR):
        models[name], rows[name], plain = _sparse(task, name, size, say)
        if name == BLOCKS:
            models[ZEROS_ALONE] = plain
    models[CHANNELS], rows[CHANNELS] = _smaller(task, size, say)
    say("timing")
    times = {count: _times(models, inputs, size.seconds) for count, inputs in task.inputs.items()}
    for name, row in rows.items():
        row["ms"] = {str(count): found[name] for count, found in times.items()}
    return {
        "title": task.title, "measure": task.measure, "unit": task.unit, "steps": task.steps, "rows": rows,
        "zeros_alone_ms": {str(count): found[ZEROS_ALONE] for count, found in times.items()},
        "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def _sparse(task: Task, name: str, size: Size, say: Say) -> tuple[nn.Module, dict[str, Any], nn.Module]:
    """Zeros by Wanda, repaired by PERP, in the fastest exact form; and the model before that last step."""
    from tilewright import prune

    model = copy.deepcopy(task.model)
    batches = task.calibration(max(_CALIBRATION, task.repair_steps))
    say(f"{name}: pruning")
    pattern = prune.Block(_BLOCK, _BLOCK) if name == BLOCKS else name
    sparsity = _SPARSITY if name == BLOCKS else None
    prune.prune(model, pattern, sparsity, "wanda", batches[:_CALIBRATION], progress=False)
    quality = {"pruned": task.quality(model)}
    say(f"{name}: repair")
    settings = prune.Perp(steps=task.repair_steps, lr=_REPAIR_LR, max_trainable=None)
    prune.repair(model, batches, settings, progress=False)
    quality["repaired"] = task.quality(model)
    kept = sum(int(parameter.count_nonzero()) for parameter in model.parameters())
    plain = copy.deepcopy(model)
    say(f"{name}: compressing")
    report = prune.compress(
        model, max(task.inputs.items())[1], tokens=list(task.inputs), seconds=size.seconds / 2, progress=False
    )
    quality["final"] = task.quality(model)
    row = _row(task.model, model, quality)
    row["kept"] = kept / _parameters(task.model)
    row["layers"] = [
        {"name": layer.name, "kernel": layer.kernel, "why": layer.why} for layer in report.layers
    ]
    return model, row, plain


def _smaller(task: Task, size: Size, say: Say) -> tuple[nn.Module, dict[str, Any]]:
    """Channels and heads leave; what is left is an ordinary model, trained a little more."""
    from tilewright import prune

    model = copy.deepcopy(task.model)
    say(f"{CHANNELS}: shrinking")
    prune.shrink(model, max(task.inputs.items())[1], _RATIO)
    quality = {"pruned": task.quality(model)}
    say(f"{CHANNELS}: training on")
    task.train(model, task.repair_steps, task.lr / 2)
    quality["repaired"] = quality["final"] = task.quality(model)
    return model, _row(task.model, model, quality)


def _row(dense: nn.Module, model: nn.Module, quality: dict[str, float]) -> dict[str, Any]:
    tensors = [*model.parameters(), *model.buffers()]
    return {
        "kept": _parameters(model) / _parameters(dense),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "quality": quality,
        "layers": [],
    }


def _times(models: dict[str, nn.Module], inputs: dict[str, Any], seconds: float) -> dict[str, float]:
    """Milliseconds of a forward pass, medians of turns."""

    def call_of(model: nn.Module) -> Callable[[], object]:
        return lambda: model(**inputs)

    calls = {name: call_of(model.eval()) for name, model in models.items()}
    with torch.inference_mode():
        start = time.perf_counter()
        calls[DENSE]()
        inner = max(1, min(20, int(1e-3 / (time.perf_counter() - start))))
        found = measure(calls, torch.device("cpu"), inner=inner, budget=seconds, minimum=5, maximum=101)
    return {name: round(statistics.median(timing.wall) * 1e3, 4) for name, timing in found.items()}


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _with_progress(task: Task, size: Size, console: Console) -> dict[str, Any]:
    columns = (TextColumn(f"{task.name:<7}"), BarColumn(pulse_style="bar.complete"), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console) as progress:
        bar = progress.add_task("", total=None)
        result = run_task(task, size, lambda text: progress.update(bar, description=text))
        progress.update(bar, total=1, completed=1, description="done")
    return result


def is_sound(result: dict[str, Any]) -> bool:
    """Whether all numbers are finite, and compression changed nothing but the time."""
    for row in result["rows"].values():
        quality = row["quality"]
        if not all(math.isfinite(value) for value in quality.values()):
            return False
        if abs(quality["final"] - quality["repaired"]) > _SAME[result["measure"]]:
            return False
    return True


def print_table(record: dict[str, Any], console: Console) -> None:
    """A table a model, and what it shows in words."""
    for result in record["tasks"].values():
        counts = list(result["rows"][DENSE]["ms"])
        units = " and ".join(_count(int(count), result["unit"]) for count in counts)
        console.print(
            f"[bold]{result['title']}[/bold]\n"
            f"{result['measure'].capitalize()} of held-out data; milliseconds for {units}, and speed.",
            highlight=False,
        )
        headings = ["", "kept", "pruned", "repaired", "MB"]
        for count in counts:
            headings += [f"ms, {count}", "speed"]
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for index, heading in enumerate(headings):
            table.add_column(heading, justify="right" if index else "left", no_wrap=True)
        for cells in summary_rows(result):
            table.add_row(*cells)
        console.print(table)
        for line in verdicts(result):
            console.print(line, highlight=False)
        console.print()


def summary_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table's lines: what, share of parameters kept, quality, bytes, then time and speed by count."""
    dense = result["rows"][DENSE]
    rows = []
    for name, row in result["rows"].items():
        quality = [_quality(result, row["quality"][stage]) for stage in ("pruned", "repaired")]
        cells = [name, f"{row['kept']:.0%}", *(quality if name != DENSE else ["", quality[1]])]
        cells.append(f"{row['bytes'] / 1e6:.1f}")
        for count, ms in row["ms"].items():
            cells += [f"{ms:.3g}", f"{dense['ms'][count] / ms:.2f}x"]
        rows.append(tuple(cells))
    return rows


def verdicts(result: dict[str, Any]) -> list[str]:
    """The comparison in sentences, the unfavourable ones too."""
    dense, lines = result["rows"][DENSE], []
    for name, row in result["rows"].items():
        if name == DENSE:
            continue
        stages = [_quality(result, value) for value in (dense["quality"]["final"], *row["quality"].values())]
        left = [layer for layer in row["layers"] if layer["kernel"] == DENSE]
        speeds = ", ".join(_speeds(result, row["ms"], _SLOWER))
        if left and len(left) == len(row["layers"]):
            speeds = "all layers stay dense, and take the time that dense layers take"
        lines.append(
            f"{name}: {result['measure']} {stages[0]} dense, {stages[1]} pruned, {stages[2]} repaired; "
            f"{speeds}."
        )
        if left:
            lines.append(
                f"   {len(left)} of {len(row['layers'])} pruned layers stay dense: sparse does not pay. "
                f"{left[-1]['name']}: {left[-1]['why']}."
            )
    alone = ", ".join(_speeds(result, result["zeros_alone_ms"], 0.0))
    lines.append(f"Zeros that stay in dense layers save nothing: with those of the blocks {alone}.")
    if not is_sound(result):
        lines.append("WRONG: a loss is no number, or compression changed what a model computes.")
    return lines


def _speeds(result: dict[str, Any], ms: dict[str, float], slower: float) -> list[str]:
    """How fast compared to dense, for each number of units."""
    found = []
    for count, value in ms.items():
        ratio = result["rows"][DENSE]["ms"][count] / value
        mark = " (SLOWER)" if ratio < slower else ""
        found.append(f"{ratio:.2f}x as fast{mark} at {_count(int(count), result['unit'])}")
    return found


def _quality(result: dict[str, Any], value: float) -> str:
    return f"{value:.1%}" if result["measure"] == "accuracy" else f"{value:.3f}"


def _count(count: int, unit: str) -> str:
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"
