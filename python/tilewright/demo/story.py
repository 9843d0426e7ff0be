"""`tilewright demo`: one hybrid language model, swapped, trained, pruned, repaired and compressed.

Each step is compared with the one before it: the same weights and the same text, turn by turn in one process.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from tilewright._results import check_writable
from tilewright.bench import environment
from tilewright.bench.timing import measure

from .host import (
    NO_SPECIAL_BYTES,
    decoded,
    generate,
    prompt_of,
    swapped_copy,
    transformers_for,
    without_warnings,
)
from .plot import plot_story
from .show import print_files, progress_bars, write_record
from .story_report import COMPRESS, OPTIMIZER, PRUNE, REPAIR, SWAP, WHOLE, WINDOW, is_sound, print_table
from .text import load_text, random_batches, windows
from .training import Training, cosine, mean_loss, settled

SCHEMA = 1
Batches = Iterator[tuple[Tensor, Tensor]]
_SETTINGS: dict[str, Any] = {"lr": 2e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
_WARM_UP = 20
_SPARSITY = 0.75
_PRUNED = ("*.feed_forward.*", "*.in_proj", "*.out_proj")
_CALIBRATION = 8
# Seconds after which transformers' own Mamba stops early: on a busy machine a step of it can take a minute.
_PATIENCE = 30
_ROUNDS, _TEMPERATURE = 3, 0.7


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
        hidden, intermediate, layers: the model; every second layer is attention.
        batch, length: rows of a training step, and their bytes.
        common, steps: training steps with transformers' own Mamba; in all.
        long, long_steps: bytes of a row on which dense attention meets the window, and steps with both.
        window, sink, block: the mask.
        held_out: bytes to judge by.
        sparse_block, repair_steps: what is pruned as a whole; steps of the repair.
        generated: bytes.
        seconds: for each thing timed.
    """

    hidden: int
    intermediate: int
    layers: int
    batch: int
    length: int
    common: int
    steps: int
    long: int
    long_steps: int
    window: int
    sink: int
    block: int
    held_out: int
    sparse_block: int
    repair_steps: int
    generated: int
    seconds: float


_FULL = Size(
    hidden=256, intermediate=1024, layers=4, batch=2, length=256, common=5, steps=450,
    long=4096, long_steps=12, window=512, sink=64, block=64, held_out=5 * 4096,
    sparse_block=16, repair_steps=200, generated=320, seconds=1.0,
)  # fmt: skip
_QUICK = Size(
    hidden=64, intermediate=128, layers=2, batch=2, length=32, common=2, steps=20,
    long=256, long_steps=2, window=32, sink=16, block=16, held_out=512,
    sparse_block=16, repair_steps=4, generated=24, seconds=0.02,
)  # fmt: skip


def run(steps: int | None, seeds: Sequence[int], out: Path, quick: bool = False) -> int:
    """Tells the story; prints a table, writes `story.json` and `.png` into `out`.

    Args:
        steps: training steps on short rows; None: 450, or 20 if `quick`.
        seeds: of the initial weights and the batches; the first is used.
        out: folder for the results, made if missing.
        quick: a few seconds, which show that it runs.

    Returns:
        0, or 1 if a swapped or compressed model computes something else, or a loss is no number.

    Raises:
        OSError: `out` cannot be written to.
        ImportError: transformers is not installed.
        ValueError: the layers of the transformers that is installed cannot be swapped.
        KeyboardInterrupt: after what was finished by then is printed and written.
    """
    check_writable(out)
    size, console, started = _QUICK if quick else _FULL, Console(), time.perf_counter()
    steps = steps or size.steps
    with without_warnings("story"):
        model = make_model(seeds[0], size)
        record: dict[str, Any] = {
            "schema": SCHEMA, "demo": "story",
            **environment.describe(torch.device("cpu"), ["transformers"]),
            "steps": steps, "seed": seeds[0], "parameters": _parameters(model), "seconds": 0.0,
            "settings": {**vars(size), **_SETTINGS, "sparsity": _SPARSITY}, "stages": {},
        }  # fmt: skip
        announce(record, console)
        try:
            for name, result in stages(model, steps, seeds[0], size, console):
                took = time.perf_counter() - started - record["seconds"]
                record["stages"][name] = {**result, "seconds": round(took, 1)}
                record["seconds"] = round(time.perf_counter() - started, 1)
                write_record(record, out)
        except KeyboardInterrupt:
            if record["stages"]:
                finish(record, out, console)
            raise
    finish(record, out, console)
    return int(not is_sound(record))


def finish(record: dict[str, Any], out: Path, console: Console) -> None:
    """The table, the plot, and where they are."""
    print_table(record, console)
    print_files(write_record(record, out), plot_story(record, out / "story.png"), console)


def announce(record: dict[str, Any], console: Console) -> None:
    """Says what is going to be done, and in how few lines."""
    size = record["settings"]
    console.print(
        f"transformers' JambaForCausalLM (Mamba and attention layers in turn) for bytes, "
        f"{record['parameters'] / 1e6:.2f}M parameters, on Python's documentation, "
        f"{torch.get_num_threads()} threads. Each step beside the one before it, turn by turn:\n"
        "  tw.swap(model)\n"
        "  tw.optim.AdamW8bit(model.parameters(), ...)\n"
        "  tw.swap(model, attention=BlockSparse(BlockMask.sliding_window, "
        f"window={size['window']}, sink={size['sink']}, ...))\n"
        f"  tw.prune.prune(model, Block({size['sparse_block']}, {size['sparse_block']}), {size['sparsity']}, "
        '"wanda", batches, ...)\n'
        "  tw.prune.repair(model, batches, ...)\n"
        "  tw.prune.compress(model, text, ...)",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def make_model(seed: int, size: Size) -> nn.Module:
    """transformers' hybrid with random weights: Mamba, attention, Mamba, ..., an MLP after each."""
    transformers = transformers_for("story")
    torch.manual_seed(seed)
    config = transformers.JambaConfig(
        hidden_size=size.hidden, intermediate_size=size.intermediate, num_hidden_layers=size.layers,
        num_attention_heads=4, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1,
        num_experts=1, num_experts_per_tok=1, **NO_SPECIAL_BYTES,
    )  # fmt: skip
    model: nn.Module = transformers.JambaForCausalLM(config).train()
    return model


def stages(
    model: nn.Module, steps: int, seed: int, size: Size, console: Console
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each step of the story gained, as it is finished."""
    train, held_out = load_text()
    judged = windows(held_out[: size.held_out + 1], size.length, 64)
    judged_long = windows(held_out[: size.held_out + 1], size.long, 1)
    short = random_batches(train, size.batch, size.length, seed)
    long = random_batches(train, 1, size.long, seed)

    yield SWAP, swap_mamba(model, short, size, console)
    model, result = train_8bit(swapped_copy(model), short, steps, size, judged, console)
    yield OPTIMIZER, result
    model, result = put_window(model, long, size, judged_long, console)
    yield WINDOW, result

    dense, batches = copy.deepcopy(model), [next(long)[0] for _ in range(_CALIBRATION)]
    quality = {"dense": mean_loss(model, judged_long)}
    prune_blocks(model, batches, size)
    quality[PRUNE] = mean_loss(model, judged_long)
    yield PRUNE, {"validation": [quality["dense"], quality[PRUNE]]}
    repair(model, [next(short)[0] for _ in range(size.repair_steps)], size)
    quality[REPAIR] = mean_loss(model, judged_long)
    yield REPAIR, {"validation": [quality[PRUNE], quality[REPAIR]]}

    zeros, text = copy.deepcopy(model), held_out[: size.long].long()[None]
    kernels = compress(model, text, size)
    quality[COMPRESS] = mean_loss(model, judged_long)
    models, prompt = {"stock": stock_copy(dense), PRUNE: zeros, COMPRESS: model}, prompt_of(held_out)
    with console.status("timing"):
        found = {"read_ms": read_ms(models, text, size), "token_ms": token_ms(models, prompt, size)}
    found["bytes"] = {name: _bytes(of) for name, of in models.items()}
    yield (
        COMPRESS,
        {
            **{name: [values[PRUNE], values[COMPRESS]] for name, values in found.items()},
            "validation": [quality[REPAIR], quality[COMPRESS]],
            "kernels": kernels,
        },
    )
    torch.manual_seed(seed)
    sample, _ = generate(model, prompt, size.generated, do_sample=True, temperature=_TEMPERATURE)
    yield (
        WHOLE,
        {
            **{name: [values["stock"], values[COMPRESS]] for name, values in found.items()},
            "validation": [quality["dense"], quality[COMPRESS]],
            "prompt": decoded(prompt.tolist()),
            "sample": decoded(sample),
        },
    )


def train_turn_by_turn(
    trainings: Sequence[Training],
    batches: Batches,
    steps: int,
    title: str,
    console: Console,
    patience: float = math.inf,
) -> None:
    """A step each over the same batch, so that whatever else the machine does falls on all alike."""
    with progress_bars(console) as progress:
        task = progress.add_task(title, total=steps)
        for step in range(1, steps + 1):
            batch = next(batches)
            for training in trainings:
                training.step(*batch)
            losses = " and ".join(f"{training.losses[-1]:.3f}" for training in trainings)
            progress.update(task, advance=1, description=f"{title}: step {step}, losses {losses}")
            if step > 1 and sum(trainings[0].step_ms) > 1e3 * patience:
                break
        progress.update(task, total=step)


def swap_mamba(model: nn.Module, batches: Batches, size: Size, console: Console) -> dict[str, Any]:
    """The model as it comes, and with its Mamba layers swapped, for a few steps."""
    pair = [
        Training(
            of, torch.optim.AdamW(of.parameters(), **_SETTINGS, fused=True), cosine(size.steps, _WARM_UP)
        )
        for of in (copy.deepcopy(model), swapped_copy(model))
    ]
    train_turn_by_turn(pair, batches, size.common, SWAP, console, _PATIENCE)
    losses = [training.losses for training in pair]
    result = {"losses": losses, "training_loss": [found[-1] for found in losses]}
    return _compared(pair, size.batch * size.length) | result


def train_8bit(
    model: nn.Module,
    batches: Batches,
    steps: int,
    size: Size,
    judged: list[tuple[Tensor, Tensor]],
    console: Console,
) -> tuple[nn.Module, dict[str, Any]]:
    """Trains a model with torch's AdamW, a copy of it with ours; returns the copy."""
    from tilewright.optim import AdamW8bit

    twin, rate = copy.deepcopy(model), cosine(steps, min(_WARM_UP, steps // 4))
    pair = [
        Training(model, torch.optim.AdamW(model.parameters(), **_SETTINGS, fused=True), rate),
        Training(twin, AdamW8bit(twin.parameters(), **_SETTINGS), rate),
    ]
    train_turn_by_turn(pair, batches, steps, OPTIMIZER, console)
    for training in pair:
        training.validate(judged)
    result = {
        "state_bytes": [training.state_bytes() for training in pair],
        "optimizer_ms": [settled(training.optimizer_ms) for training in pair],
        "losses": [[round(loss, 4) for loss in training.losses] for training in pair],
    }
    return twin, _compared(pair, size.batch * size.length) | result


def put_window(
    model: nn.Module, batches: Batches, size: Size, judged: list[tuple[Tensor, Tensor]], console: Console
) -> tuple[nn.Module, dict[str, Any]]:
    """Trains on long rows with dense attention, and a copy with a window; returns the copy."""
    from tilewright.attention import BlockMask, BlockSparse
    from tilewright.optim import AdamW8bit

    window = BlockSparse(BlockMask.sliding_window, window=size.window, sink=size.sink, block_size=size.block)
    settings = {**_SETTINGS, "lr": _SETTINGS["lr"] / 4}
    example = {"input_ids": next(batches)[0][:, : 3 * size.window], "use_cache": False}
    pair = [
        Training(of, AdamW8bit(of.parameters(), **settings), cosine(size.long_steps, 2))
        for of in (model, swapped_copy(model, attention=window, verify=example))
    ]
    train_turn_by_turn(pair, batches, size.long_steps, WINDOW, console)
    for training in pair:
        training.validate(judged)
    masks = (
        BlockMask.causal(size.long, block_size=size.block),
        window.of_lengths(size.long, size.long, torch.device("cpu")),
    )
    return pair[1].model, _compared(pair, size.long) | {"density": [round(mask.density, 4) for mask in masks]}


def _compared(pair: Sequence[Training], row_bytes: int) -> dict[str, Any]:
    """What a step over so many bytes took, and the validation loss where there is one."""
    step_ms = [settled(training.step_ms) for training in pair]
    found = {"step_ms": step_ms, "bytes_per_s": [round(row_bytes * 1e3 / ms, 1) for ms in step_ms]}
    if pair[0].validation:
        found["validation"] = [round(training.final(), 4) for training in pair]
    return found


def _labelled(inputs: Tensor) -> dict[str, Tensor]:
    """As models of transformers take them, who shift the labels by one themselves."""
    return {"input_ids": inputs, "labels": inputs}


def prune_blocks(model: nn.Module, batches: list[Tensor], size: Size) -> None:
    """Most blocks of the MLPs and of Mamba's projections become zero, those that Wanda thinks least of."""
    from tilewright import prune

    block, calibration = prune.Block(size.sparse_block, size.sparse_block), [_labelled(x) for x in batches]
    prune.prune(model, block, _SPARSITY, "wanda", calibration, include=_PRUNED)


def repair(model: nn.Module, batches: list[Tensor], size: Size) -> None:
    """PERP: norms, biases and a low-rank update of what was kept."""
    from tilewright import prune

    settings = prune.Perp(steps=size.repair_steps, lr=_SETTINGS["lr"], max_trainable=None)
    prune.repair(model, [_labelled(x) for x in batches], settings)


def compress(model: nn.Module, text: Tensor, size: Size) -> dict[str, int]:
    """Each pruned layer takes the form that is fastest for so long a text; returns the forms."""
    from tilewright import prune

    inputs = {"input_ids": text, "use_cache": False}
    report = prune.compress(model.eval(), inputs, seconds=size.seconds / 5)
    return dict(Counter(layer.kernel for layer in report.layers))


def stock_copy(model: nn.Module) -> nn.Module:
    """The same weights in transformers' own layers."""
    from tilewright.swapping import unswap

    twin = copy.deepcopy(model)
    unswap(twin)
    return twin


def read_ms(models: dict[str, nn.Module], text: Tensor, size: Size) -> dict[str, float]:
    """Milliseconds of a forward pass over a long text."""

    def call_of(model: nn.Module) -> Callable[[], object]:
        return lambda: model(text, use_cache=False)

    calls = {name: call_of(model.eval()) for name, model in models.items()}
    with torch.inference_mode():
        found = measure(calls, torch.device("cpu"), budget=size.seconds, minimum=3)
    return {name: round(statistics.median(timing.wall) * 1e3, 3) for name, timing in found.items()}


def token_ms(models: dict[str, nn.Module], prompt: Tensor, size: Size) -> dict[str, float]:
    """Milliseconds of a generated byte."""
    gaps: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(_ROUNDS):
        for name, model in models.items():
            gaps[name] += generate(model, prompt, size.generated // 4, do_sample=False)[1]
    return {name: round(statistics.median(found), 3) for name, found in gaps.items()}


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
