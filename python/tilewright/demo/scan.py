"""`tilewright demo scan`: a Mamba language model of transformers, as it comes and swapped."""

from __future__ import annotations

import copy
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from tilewright.bench import environment

from .host import NO_SPECIAL_BYTES, transformers_for, without_warnings
from .plot import plot_scan
from .text import load_text, random_batches, windows

THEIRS, OURS = "transformers", "tilewright.swap"
SCHEMA = 1
_MODEL: dict[str, Any] = {"hidden_size": 192, "num_hidden_layers": 3, "initializer_range": 0.02}
_SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
_FINAL_LR = 3e-4
# Rounding alone makes the losses of so few steps differ by some 1e-6; a wrong gradient shows at once.
_SAME_LOSS = 1e-3
# Seconds after which transformers' model stops early: on a busy machine a step of it can take half a minute.
_PATIENCE = 30
_ROUNDS = 3
_PROMPT_BYTES, _TEMPERATURE = 384, 0.7


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


@dataclass
class Training:
    """One model being trained, and what was seen on the way."""

    model: nn.Module
    steps: int
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **_SETTINGS)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.steps, _FINAL_LR)

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """Forward, backward and update, timed."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = _loss(self.model, inputs, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.step_ms.append((time.perf_counter() - start) * 1e3)
        self.schedule.step()
        self.losses.append(loss.item())

    def validate(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        """Notes the mean loss over all bytes of `batches`."""
        self.model.eval()
        with torch.no_grad():
            total = sum(_loss(self.model, *batch).item() * batch[1].numel() for batch in batches)
        self.model.train()
        self.validation.append((len(self.losses), total / sum(targets.numel() for _, targets in batches)))

    def parameters(self) -> int:
        """How many the model has."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def result(self, common: int) -> dict[str, Any]:
        """The numbers of the table, and the curves. A step's time is that of steps taken turn by turn."""
        settled = self.step_ms[min(1, common - 1) : common]
        return {
            "step_ms": round(statistics.median(settled), 3),
            "seconds": round(sum(self.step_ms) / 1e3, 1),
            "losses": self.losses,
            "validation": [(step, round(loss, 4)) for step, loss in self.validation],
        }


class TokenClock:
    """A streamer for `generate` that notes when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called with the prompt, then with every token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last token."""

    def gaps_ms(self) -> list[float]:
        """Between one token and the next; reading the prompt, which comes before the first, is left out."""
        return [(b - a) * 1e3 for a, b in itertools.pairwise(self.times[1:])]


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
        ImportError: transformers is not installed.
        ValueError: the layers of the transformers that is installed cannot be swapped.
    """
    size, seed = _QUICK if quick else _FULL, seeds[0]
    console = Console()
    started = time.perf_counter()
    with without_warnings("scan"):
        trainings = {name: Training(model, steps or size.steps) for name, model in make_models(seed).items()}
        train, held_out = load_text()
        announce(trainings[OURS], len(train), size, console)
        if len(seeds) > 1:
            console.print(f"Only seed {seed} is used: both models compute the same with any.")
        out.mkdir(parents=True, exist_ok=True)
        common = train_both(trainings, train, held_out, size, seed, console)
        generation = generate_both(trainings[OURS].model, prompt_of(held_out), size.generated, seed)
    record = {
        "schema": SCHEMA, "demo": "scan", **environment.describe(torch.device("cpu"), ["transformers"]),
        "steps": trainings[OURS].steps, "seed": seed, "parameters": trainings[OURS].parameters(),
        "settings": {**_MODEL, **_SETTINGS, "batch": size.batch, "length": size.length},
        "seconds": round(time.perf_counter() - started, 1), "generation": generation,
        "training": {name: training.result(common) for name, training in trainings.items()},
    }  # fmt: skip
    (out / "scan.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    print_table(record, console)
    console.print(
        f"results  {out / 'scan.json'}\n{plot_scan(record, out / 'scan.png')}",
        highlight=False,
        soft_wrap=True,
    )
    return int(not (loss_difference(record) <= _SAME_LOSS and math.isfinite(_validation_loss(record))))


def announce(training: Training, text_bytes: int, size: Size, console: Console) -> None:
    """Says what is going to be trained, on what, how."""
    console.print(
        f"transformers' MambaForCausalLM for bytes, {training.parameters() / 1e6:.2f}M parameters, "
        f"{text_bytes / 1e3:.0f} kB of text, {size.batch} x {size.length} bytes a step, "
        f"{torch.get_num_threads()} threads.\n"
        "Same weights, same batches: a few steps as it comes and after tilewright.swap(model), turn by turn; "
        f"then the swapped model alone, {training.steps} steps in all.",
        highlight=False,
    )


def make_models(seed: int) -> dict[str, nn.Module]:
    """transformers' model with random weights, and a swapped copy of it."""
    from tilewright.swapping import swap

    transformers = transformers_for("scan")
    torch.manual_seed(seed)
    stock = transformers.MambaForCausalLM(transformers.MambaConfig(**_MODEL, **NO_SPECIAL_BYTES)).train()
    swapped = copy.deepcopy(stock)
    report = swap(swapped)
    if report.skipped or not report.swapped:
        raise ValueError(
            f"the layers of transformers {transformers.__version__} cannot be swapped:\n{report}"
        )
    return {THEIRS: stock, OURS: swapped}


def train_both(
    trainings: dict[str, Training], train: Tensor, held_out: Tensor, size: Size, seed: int, console: Console
) -> int:
    """Trains both for the first steps, then the swapped model alone; returns how many steps both took."""
    batches = random_batches(train, size.batch, size.length, seed)
    bar = (TextColumn("{task.percentage:>3.0f}%"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*bar, TextColumn("{task.description}"), console=console) as progress:
        common = _turn_by_turn(trainings, batches, min(size.common, trainings[OURS].steps), progress)
        _alone(trainings[OURS], batches, windows(held_out, size.length, 64), size.validations, progress)
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
    batches: Iterator[tuple[Tensor, Tensor]],
    validation: list[tuple[Tensor, Tensor]],
    validations: int,
    progress: Progress,
) -> None:
    """The rest of the steps, with a look at the validation loss now and then."""
    first, last = len(training.losses) + 1, training.steps
    task = progress.add_task("swapped", total=last - first + 1)
    for step in range(first, last + 1):
        training.step(*next(batches))
        if step % max(1, last // validations) == 0 and step < last:
            training.validate(validation)
        loss = statistics.fmean(training.losses[-20:])
        progress.update(task, advance=1, description=f"swapped: step {step}, loss {loss:.3f}")
    training.validate(validation)


def prompt_of(text: Tensor) -> Tensor:
    """The first lines of `text`."""
    return text[: bytes(text[:_PROMPT_BYTES].tolist()).rindex(b"\n") + 1]


def generate_both(swapped: nn.Module, prompt: Tensor, count: int, seed: int) -> dict[str, Any]:
    """A sample of the trained model's text; the time of a token, swapped and with transformers' own code."""
    from tilewright.swapping import unswap

    models = {THEIRS: copy.deepcopy(swapped), OURS: swapped}
    unswap(models[THEIRS])
    torch.manual_seed(seed)
    sample, _ = _generate(swapped, prompt, count, do_sample=True, temperature=_TEMPERATURE)
    likeliest: dict[str, list[int]] = {}
    token_ms: dict[str, list[float]] = {THEIRS: [], OURS: []}
    for _ in range(_ROUNDS):
        for name, model in models.items():
            likeliest[name], gaps = _generate(model, prompt, count, do_sample=False)
            token_ms[name] += gaps
    differing = [at for at, (a, b) in enumerate(zip(*likeliest.values(), strict=True)) if a != b]
    return {
        "prompt": _decoded(prompt.tolist()),
        "sample": _decoded(sample),
        "tokens": count,
        "same_tokens": min(differing, default=count),
        "token_ms": {name: round(statistics.median(gaps), 3) for name, gaps in token_ms.items()},
    }


def print_table(record: dict[str, Any], console: Console) -> None:
    """Prints the comparison, says in words what it shows, and then what the model wrote."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for index, heading in enumerate(("", THEIRS, OURS, "change")):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in summary_rows(record):
        table.add_row(*row)
    console.print(table)
    for line in verdicts(record):
        console.print(line, highlight=False)
    for title, key in (
        ("Text it was not trained on:", "prompt"),
        ("How the trained model goes on:", "sample"),
    ):
        console.print(f"\n{title}\n")
        console.print(Padding(Text(record["generation"][key].strip("\n")), (0, 0, 0, 4), expand=False))
    console.print()


def summary_rows(record: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The table's lines: what, theirs, ours; then the difference of losses, the ratio of all else."""
    theirs, ours = record["training"][THEIRS], record["training"][OURS]
    step_ms, token_ms = (theirs["step_ms"], ours["step_ms"]), record["generation"]["token_ms"]
    tokens = record["settings"]["batch"] * record["settings"]["length"] * 1e3
    last = len(theirs["losses"]) - 1
    a, b = theirs["losses"][last], ours["losses"][last]
    return [
        _row("ms per training step", "{:.1f}", *step_ms),
        _row("tokens per second, training", "{:.0f}", *(tokens / ms for ms in step_ms)),
        _row("ms per generated token", "{:.2f}", token_ms[THEIRS], token_ms[OURS]),
        (f"loss, step {last + 1}", f"{a:.6f}", f"{b:.6f}", f"{b - a:+.1e}"),
        (f"largest difference, steps 1 to {last + 1}", "", "", f"{loss_difference(record):.1e}"),
        (f"validation loss, step {record['steps']}", "-", f"{_validation_loss(record):.4f}", ""),
    ]


def _row(title: str, pattern: str, theirs: float, ours: float) -> tuple[str, str, str, str]:
    return title, pattern.format(theirs), pattern.format(ours), f"{ours / theirs:.3g}x"


def verdicts(record: dict[str, Any]) -> list[str]:
    """The comparison in sentences, the unfavourable ones too."""
    generation, steps, length = record["generation"], record["steps"], record["settings"]["length"]
    step_ms = {name: result["step_ms"] for name, result in record["training"].items()}
    seconds = record["training"][OURS]["seconds"]
    difference, common = loss_difference(record), len(record["training"][THEIRS]["losses"])
    wrong = "" if difference <= _SAME_LOSS else ", more than rounding: one of them is WRONG"
    return [
        f"Losses: over the {common} steps that both took they differ by at most {difference:.1e}{wrong}.",
        f"Time: a training step is {_speed(step_ms)} when swapped; "
        f"{steps} of them took {_duration(seconds)}, and would have taken "
        f"{_duration(seconds * step_ms[THEIRS] / step_ms[OURS])} as it came.",
        f"Time: a generated token is {_speed(generation['token_ms'])} when swapped; "
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


def _speed(ms: dict[str, float]) -> str:
    ratio = ms[THEIRS] / ms[OURS]
    return f"{ratio:.3g} times as fast" if ratio >= 0.98 else f"SLOWER ({1 / ratio:.2f}x as long)"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy, in nats per byte."""
    logits: Tensor = model(inputs, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _generate(model: Any, prompt: Tensor, count: int, **how: Any) -> tuple[list[int], list[float]]:
    """The tokens that the model appends to the prompt, and the milliseconds between them."""
    clock = TokenClock()
    output = model.eval().generate(prompt[None].long(), max_new_tokens=count, streamer=clock, **how)
    return output[0, len(prompt) :].tolist(), clock.gaps_ms()


def _decoded(values: list[int]) -> str:
    """Text that is safe to print: an untrained model writes control characters, too."""
    text = bytes(values).decode(errors="replace")
    return "".join(
        char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text
    )
