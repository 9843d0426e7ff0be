"""`tilewright demo attention`: a Llama of transformers for long text, dense and with a sliding window."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from tilewright._results import check_writable
from tilewright.attention import BlockMask, BlockSparse
from tilewright.bench import environment

from .estimators import measure
from .host import NO_SPECIAL_BYTES, swapped_copy, transformers_for, without_warnings
from .plot import plot_attention
from .show import comparison, print_files, progress_bars, ratio_row, speed, write_record
from .text import load_text, random_batches, windows
from .training import Training, next_byte_loss, settled

THEIRS, OURS = "dense SDPA", "sliding window"
SCHEMA = 1
_MODEL: dict[str, Any] = {
    "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 512, "initializer_range": 0.06,
}  # fmt: skip
_SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
_WARM_UP = 8
# Seconds of dense steps after which both stop, on a machine that is busy with something else.
_PATIENCE = 80


@dataclass(frozen=True)
class Size:
    """How much is done, and the mask: text a step, steps, rows of validation; what a query sees."""

    length: int
    steps: int
    validation: int
    window: int
    sink: int
    block: int

    def spec(self) -> BlockSparse:
        """What the swapped model's layers get."""
        return BlockSparse(
            BlockMask.sliding_window, window=self.window, sink=self.sink, block_size=self.block
        )

    def masks(self) -> dict[str, BlockMask]:
        """What each side's queries see."""
        own = BlockMask.sliding_window(self.length, self.window, sink=self.sink, block_size=self.block)
        return {THEIRS: BlockMask.causal(self.length, block_size=self.block), OURS: own}


_FULL = Size(length=4096, steps=70, validation=6, window=512, sink=64, block=64)
_QUICK = Size(length=256, steps=6, validation=1, window=32, sink=16, block=16)


def make_training(model: nn.Module, steps: int) -> Training:
    """AdamW; the rate goes up in a few steps, then down to a tenth."""

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / _WARM_UP) * max(0.1, 1 - step / steps)

    return Training(model, torch.optim.AdamW(model.parameters(), **_SETTINGS), rate)


def result(training: Training, kept: int) -> dict[str, Any]:
    """The numbers of the table, and the curve."""
    return {
        **{name: settled(getattr(training, name)) for name in ("forward_ms", "backward_ms", "step_ms")},
        "losses": training.losses,
        "validation": round(training.final(), 4),
        "bytes_kept": kept,
    }


def run(steps: int | None, seeds: Sequence[int], out: Path, quick: bool = False) -> int:
    """Trains both models; prints a table, writes `attention.json` and `.png` into `out`.

    Args:
        steps: training steps of each; None: 70, or 6 if `quick`.
        seeds: of the initial weights and the batches. Only the first is used.
        out: folder for the results, made if missing.
        quick: a few seconds, which show that it runs.

    Returns:
        0, or 1 if a training diverged.

    Raises:
        OSError: `out` cannot be written to.
        ImportError: transformers is not installed.
        ValueError: the layers of the transformers that is installed cannot be swapped.
        RuntimeError: the swapped layers do not compute what SDPA does under the same mask.
    """
    check_writable(out)
    size, seed = _QUICK if quick else _FULL, seeds[0]
    console, started = Console(), time.perf_counter()
    with without_warnings("attention"):
        train, held_out = load_text()
        models = make_models(seed, size, train[: size.length][None].long())
        steps = steps or size.steps
        trainings = {name: make_training(model, steps) for name, model in models.items()}
        announce(trainings[OURS], len(train), size, console)
        batches = random_batches(train, 1, size.length, seed)
        kept = {name: bytes_kept(model, *next(batches)) for name, model in models.items()}
        train_both(trainings, batches, steps, console)
        for training in trainings.values():
            training.validate(windows(held_out, size.length, 1)[: size.validation])
        estimators = measure(trainings[THEIRS].model, windows(held_out, size.length, 1)[0][0], size.block)
    record = {
        "schema": SCHEMA, "demo": "attention",
        **environment.describe(torch.device("cpu"), ["transformers"]),
        "steps": len(trainings[OURS].losses), "seed": seed, "parameters": trainings[OURS].parameters(),
        "settings": {**_MODEL, **_SETTINGS, **vars(size), "batch": 1},
        "masks": {name: described(mask) for name, mask in size.masks().items()},
        "training": {name: result(t, kept[name]) for name, t in trainings.items()},
        "estimators": estimators,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    results = write_record(record, out)
    print_table(record, console)
    print_files(results, plot_attention(record, size.masks(), out / "attention.png"), console)
    return int(not all(math.isfinite(training.final()) for training in trainings.values()))


def announce(training: Training, text_bytes: int, size: Size, console: Console) -> None:
    """Says what is going to be trained, on what, how."""
    console.print(
        f"transformers' LlamaForCausalLM for bytes, {training.parameters() / 1e6:.2f}M parameters, "
        f"{text_bytes / 1e3:.0f} kB of text, {size.length} bytes a step, {torch.get_num_threads()} threads.\n"
        f"Same weights, same batches, turn by turn: attention as it comes, and after\n"
        f"  tilewright.swap(model, attention=BlockSparse(BlockMask.sliding_window, window={size.window}, "
        f"sink={size.sink}, block_size={size.block}))\n"
        "which was verified: the swapped layers compute what SDPA does under the same mask.",
        highlight=False,
    )


def make_models(seed: int, size: Size, example: Tensor) -> dict[str, nn.Module]:
    """transformers' model with random weights, and a copy of it that was swapped and verified."""
    transformers = transformers_for("attention")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**_MODEL, **NO_SPECIAL_BYTES, max_position_embeddings=size.length)
    stock = transformers.LlamaForCausalLM(config).train()
    example_inputs = {"input_ids": example, "use_cache": False}
    return {THEIRS: stock, OURS: swapped_copy(stock, attention=size.spec(), verify=example_inputs)}


def bytes_kept(model: nn.Module, inputs: Tensor, targets: Tensor) -> int:
    """What a forward pass keeps for the backward pass, parameters aside."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = next_byte_loss(model, inputs, targets)  # noqa: F841  it holds what was kept
    return sum(found.values())


def train_both(trainings: dict[str, Training], batches: Any, steps: int, console: Console) -> None:
    """A step each over the same batch, so that whatever else the machine does falls on both alike."""
    with progress_bars(console) as progress:
        task = progress.add_task("", total=steps)
        for step in range(1, steps + 1):
            batch = next(batches)
            for training in trainings.values():
                training.step(*batch)
            losses = ", ".join(f"{name} {training.losses[-1]:.3f}" for name, training in trainings.items())
            progress.update(task, advance=1, description=f"step {step}: {losses}")
            if sum(trainings[THEIRS].step_ms) > 1e3 * _PATIENCE:
                break
        progress.update(task, total=step)


def described(mask: BlockMask) -> dict[str, Any]:
    """A mask's numbers."""
    return {"density": round(mask.density, 4), "block_size": mask.block_size, "bytes": mask.nbytes}


def print_table(record: dict[str, Any], console: Console) -> None:
    """Prints the comparison, and says in words what it shows."""
    console.print(comparison(("", THEIRS, OURS, "change"), summary_rows(record)))
    console.print(estimator_table(record))
    for line in verdicts(record):
        console.print(line, highlight=False)
    console.print()


def summary_rows(record: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The table's lines: what, theirs, ours; then the difference of losses, the ratio of all else."""
    theirs, ours = (record["training"][name] for name in (THEIRS, OURS))
    density = [record["masks"][name]["density"] for name in (THEIRS, OURS)]
    a, b = theirs["losses"][-1], ours["losses"][-1]
    x, y = theirs["validation"], ours["validation"]
    return [
        ratio_row("density, share of blocks", "{:.4f}", *density),
        ratio_row("ms per training step", "{:.0f}", theirs["step_ms"], ours["step_ms"]),
        ratio_row("   forward", "{:.0f}", theirs["forward_ms"], ours["forward_ms"]),
        ratio_row("   backward", "{:.0f}", theirs["backward_ms"], ours["backward_ms"]),
        ratio_row("MB kept for backward", "{:.0f}", theirs["bytes_kept"] / 1e6, ours["bytes_kept"] / 1e6),
        (f"loss, step {record['steps']}", f"{a:.4f}", f"{b:.4f}", f"{b - a:+.4f}"),
        (f"validation loss, step {record['steps']}", f"{x:.4f}", f"{y:.4f}", f"{y - x:+.4f}"),
    ]


def estimator_table(record: dict[str, Any]) -> Table:
    """What each estimator keeps of the dense model's attention, for which share of the causal blocks."""
    title = "On the dense model's heads: attention kept, % / causal blocks read, %"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), title=title, title_justify="left")
    table.add_column("estimator", no_wrap=True)
    settings = max(len(found) for found in record["estimators"].values())
    for index in range(settings):
        table.add_column("fewer" if index == 0 else "more" if index == settings - 1 else "", justify="right")
    for name, found in record["estimators"].items():
        cells = (f"{100 * row['mass']:.1f} / {100 * row['density']:.0f}" for row in found)
        table.add_row(name, *cells)
    return table


def verdicts(record: dict[str, Any]) -> list[str]:
    """The comparison in sentences, the unfavourable ones too."""
    theirs, ours = (record["training"][name] for name in (THEIRS, OURS))
    settings = record["settings"]
    difference = ours["validation"] - theirs["validation"]
    ratio = speed(theirs["step_ms"], ours["step_ms"])
    side = "HIGHER" if difference > 0 else "lower"
    return [
        f"Time: a whole training step is {ratio} with the window; that counts all else of the model, too.",
        f"Loss: after {record['steps']} steps the validation loss is {abs(difference):.4f} {side} with the "
        f"window. A query sees {settings['window']} bytes before it and the first {settings['sink']}, "
        f"instead of up to {settings['length']}; so short a training shows no more than that it learns.",
        "Memory: neither side forms the matrix of scores, so what they keep for the backward pass hardly "
        f"differs. The whole process, both models and optimizers, had {record['peak_rss_bytes'] / 1e6:.0f} "
        "MB at its peak.",
    ]
