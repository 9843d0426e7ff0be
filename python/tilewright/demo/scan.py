"""`tilewright demo scan`: a Mamba language model of transformers, as it comes and swapped."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from tilewright._results import check_writable
from tilewright.bench import environment

from .host import (
    NO_SPECIAL_BYTES,
    decoded,
    generate,
    prompt_of,
    swapped_copy,
    transformers_for,
    without_warnings,
)
from .plot import plot_scan
from .show import (
    comparison,
    print_files,
    print_text,
    progress_bars,
    ratio_row,
    speed,
    write_record,
)
from .text import load_text, random_batches, windows
from .training import Training, cosine, settled

THEIRS, OURS = "transformers", "tilewright.swap"
SCHEMA = 1
_MODEL: dict[str, Any] = {"hidden_size": 192, "num_hidden_layers": 3, "initializer_range": 0.02}
_SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
# Rounding alone makes the losses of so few steps differ by some 1e-6; a wrong gradient shows at once.
_SAME_LOSS = 1e-3
# Seconds after which transformers' model stops early: on a busy machine a step of it can take half a minute.
_PATIENCE = 30
_ROUNDS = 3
_TEMPERATURE = 0.7


@dataclass(frozen=True)
class Size:
    """How much is done: steps in all and of both, the shape of a batch, validations, bytes to generate."""

    steps: int
    common: int
    batch: int
    length: int
    validations: int
    generated: int


_FULL = Size(steps=1500, common=8, batch=2, length=256, validations=6, generated=400)
_QUICK = Size(steps=24, common=3, batch=2, length=32, validations=1, generated=32)


def make_training(model: nn.Module, steps: int) -> Training:
    """AdamW, whose rate follows a cosine down to a tenth."""
    return Training(model, torch.optim.AdamW(model.parameters(), **_SETTINGS), cosine(steps))


def result(training: Training, common: int) -> dict[str, Any]:
    """The numbers of the table, and the curves. A step's time is that of steps taken turn by turn."""
    return {
        "step_ms": settled(training.step_ms[:common]),
        "seconds": round(sum(training.step_ms) / 1e3, 1),
        "losses": training.losses,
        "validation": [(step, round(loss, 4)) for step, loss in training.validation],
    }


def run(steps: int | None, seeds: Sequence[int], out: Path, quick: bool = False) -> int:
    """Trains and generates with both models; prints a table, writes `scan.json` and `.png` into `out`.

    Args:
        steps: training steps of the swapped model; None: 1500, or 24 if `quick`. The other takes a few.
        seeds: of the initial weights and the batches. Only the first is used: both models compute the same
            with any, so there is no spread to report.
        out: folder for the results, made if missing.
        quick: a few seconds, which show that it runs.

    Returns:
        0, or 1 if the losses of the two models differ by more than rounding, or the training diverged.

    Raises:
        OSError: `out` cannot be written to.
        ImportError: transformers is not installed.
        ValueError: the layers of the transformers that is installed cannot be swapped.
    """
    check_writable(out)
    size, seed = _QUICK if quick else _FULL, seeds[0]
    console = Console()
    started = time.perf_counter()
    with without_warnings("scan"):
        steps = steps or size.steps
        trainings = {name: make_training(model, steps) for name, model in make_models(seed).items()}
        train, held_out = load_text()
        announce(trainings[OURS], steps, len(train), size, console)
        common = train_both(trainings, steps, train, held_out, size, seed, console)
        generation = generate_both(trainings[OURS].model, prompt_of(held_out), size.generated, seed)
    record = {
        "schema": SCHEMA, "demo": "scan", **environment.describe(torch.device("cpu"), ["transformers"]),
        "steps": steps, "seed": seed, "parameters": trainings[OURS].parameters(),
        "settings": {**_MODEL, **_SETTINGS, "batch": size.batch, "length": size.length},
        "seconds": round(time.perf_counter() - started, 1), "generation": generation,
        "training": {name: result(training, common) for name, training in trainings.items()},
    }  # fmt: skip
    results = write_record(record, out)
    print_table(record, console)
    print_files(results, plot_scan(record, out / "scan.png"), console)
    return int(not (loss_difference(record) <= _SAME_LOSS and math.isfinite(_validation_loss(record))))


def announce(training: Training, steps: int, text_bytes: int, size: Size, console: Console) -> None:
    """Says what is going to be trained, on what, how."""
    console.print(
        f"transformers' MambaForCausalLM for bytes, {training.parameters() / 1e6:.2f}M parameters, "
        f"{text_bytes / 1e3:.0f} kB of text, {size.batch} x {size.length} bytes a step, "
        f"{torch.get_num_threads()} threads.\n"
        "Same weights, same batches: a few steps as it comes and after tilewright.swap(model), turn by turn; "
        f"then the swapped model alone, {steps} steps in all.",
        highlight=False,
    )


def make_models(seed: int) -> dict[str, nn.Module]:
    """transformers' model with random weights, and a swapped copy of it."""
    transformers = transformers_for("scan")
    torch.manual_seed(seed)
    stock = transformers.MambaForCausalLM(transformers.MambaConfig(**_MODEL, **NO_SPECIAL_BYTES)).train()
    return {THEIRS: stock, OURS: swapped_copy(stock)}


def train_both(
    trainings: dict[str, Training],
    steps: int,
    train: Tensor,
    held_out: Tensor,
    size: Size,
    seed: int,
    console: Console,
) -> int:
    """Trains both for the first steps, then the swapped model alone; returns how many steps both took."""
    batches = random_batches(train, size.batch, size.length, seed)
    with progress_bars(console) as progress:
        common = _turn_by_turn(trainings, batches, min(size.common, steps), progress)
        _alone(
            trainings[OURS], steps, batches, windows(held_out, size.length, 64), size.validations, progress
        )
    return common


def _turn_by_turn(
    trainings: dict[str, Training], batches: Iterator[tuple[Tensor, Tensor]], steps: int, progress: Progress
) -> int:
    """A step each over the same batch, so that whatever else the machine does falls on both alike."""
    task = progress.add_task("both", total=steps)
    for step in range(1, steps + 1):
        batch = next(batches)
        for training in trainings.values():
            training.step(*batch)
        theirs = trainings[THEIRS]
        progress.update(task, advance=1, description=f"both: step {step}, loss {theirs.losses[-1]:.3f}")
        if step > 1 and sum(theirs.step_ms) > 1e3 * _PATIENCE:
            break
    progress.update(task, total=step)
    return step


def _alone(
    training: Training,
    last: int,
    batches: Iterator[tuple[Tensor, Tensor]],
    validation: list[tuple[Tensor, Tensor]],
    validations: int,
    progress: Progress,
) -> None:
    """The rest of the steps, with a look at the validation loss now and then."""
    first = len(training.losses) + 1
    task = progress.add_task("swapped", total=last - first + 1)
    for step in range(first, last + 1):
        training.step(*next(batches))
        if step % max(1, last // validations) == 0 and step < last:
            training.validate(validation)
        loss = statistics.fmean(training.losses[-20:])
        progress.update(task, advance=1, description=f"swapped: step {step}, loss {loss:.3f}")
    training.validate(validation)


def generate_both(swapped: nn.Module, prompt: Tensor, count: int, seed: int) -> dict[str, Any]:
    """A sample of the trained model's text; the time of a token, swapped and with transformers' own code."""
    from tilewright.swapping import unswap

    models = {THEIRS: copy.deepcopy(swapped), OURS: swapped}
    unswap(models[THEIRS])
    torch.manual_seed(seed)
    sample, _ = generate(swapped, prompt, count, do_sample=True, temperature=_TEMPERATURE)
    likeliest: dict[str, list[int]] = {}
    token_ms: dict[str, list[float]] = {THEIRS: [], OURS: []}
    for _ in range(_ROUNDS):
        for name, model in models.items():
            likeliest[name], gaps = generate(model, prompt, count, do_sample=False)
            token_ms[name] += gaps
    differing = [at for at, (a, b) in enumerate(zip(*likeliest.values(), strict=True)) if a != b]
    return {
        "prompt": decoded(prompt.tolist()),
        "sample": decoded(sample),
        "tokens": count,
        "same_tokens": min(differing, default=count),
        "token_ms": {name: round(statistics.median(gaps), 3) for name, gaps in token_ms.items()},
    }


def print_table(record: dict[str, Any], console: Console) -> None:
    """Prints the comparison, says in words what it shows, and then what the model wrote."""
    console.print(comparison(("", THEIRS, OURS, "change"), summary_rows(record)))
    for line in verdicts(record):
        console.print(line, highlight=False)
    for title, key in (
        ("Text it was not trained on:", "prompt"),
        ("How the trained model goes on:", "sample"),
    ):
        print_text(title, record["generation"][key], console)
    console.print()


def summary_rows(record: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The table's lines: what, theirs, ours; then the difference of losses, the ratio of all else."""
    theirs, ours = record["training"][THEIRS], record["training"][OURS]
    step_ms, token_ms = (theirs["step_ms"], ours["step_ms"]), record["generation"]["token_ms"]
    tokens = record["settings"]["batch"] * record["settings"]["length"] * 1e3
    last = len(theirs["losses"]) - 1
    a, b = theirs["losses"][last], ours["losses"][last]
    return [
        ratio_row("ms per training step", "{:.1f}", *step_ms),
        ratio_row("tokens per second, training", "{:.0f}", *(tokens / ms for ms in step_ms)),
        ratio_row("ms per generated token", "{:.2f}", token_ms[THEIRS], token_ms[OURS]),
        (f"loss, step {last + 1}", f"{a:.6f}", f"{b:.6f}", f"{b - a:+.1e}"),
        (f"largest difference, steps 1 to {last + 1}", "", "", f"{loss_difference(record):.1e}"),
        (f"validation loss, step {record['steps']}", "-", f"{_validation_loss(record):.4f}", ""),
    ]


def verdicts(record: dict[str, Any]) -> list[str]:
    """The comparison in sentences, the unfavourable ones too."""
    generation, steps, length = record["generation"], record["steps"], record["settings"]["length"]
    step_ms = {name: result["step_ms"] for name, result in record["training"].items()}
    seconds = record["training"][OURS]["seconds"]
    difference, common = loss_difference(record), len(record["training"][THEIRS]["losses"])
    wrong = "" if difference <= _SAME_LOSS else ", more than rounding: one of them is WRONG"
    return [
        f"Losses: over the {common} steps that both took they differ by at most {difference:.1e}{wrong}.",
        f"Time: a training step is {speed(*step_ms.values())} when swapped; "
        f"{steps} of them took {_duration(seconds)}, and would have taken "
        f"{_duration(seconds * step_ms[THEIRS] / step_ms[OURS])} as it came.",
        f"Time: a generated token is {speed(*generation['token_ms'].values())} when swapped; "
        f"of {generation['tokens']} likeliest tokens, the first {generation['same_tokens']} are the same.",
        "By default transformers trains in a Python loop over the text, whose backward pass grows with the "
        f"square of the length: the factor is larger for rows of more than {length} bytes, smaller for less.",
    ]


def loss_difference(record: dict[str, Any]) -> float:
    """The largest over the steps that both took; NaN if one of these losses is."""
    losses = [record["training"][name]["losses"] for name in (THEIRS, OURS)]
    return float(torch.tensor([abs(a - b) for a, b in zip(*losses, strict=False)], dtype=torch.float64).max())


def _validation_loss(record: dict[str, Any]) -> float:
    return float(record["training"][OURS]["validation"][-1][1])


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
