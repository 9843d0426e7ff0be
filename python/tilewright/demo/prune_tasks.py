"""What `tilewright demo prune` prunes: a classifier of handwritten digits, a byte-level language model.

Both models are called with keyword arguments and return their loss when these have labels, as models of
transformers do.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .host import NO_SPECIAL_BYTES, transformers_for
from .text import load_text, random_batches, windows

Batch = dict[str, Tensor]
_DIGITS_BATCH = 128
_WARM_UP = 10


@dataclass(frozen=True)
class Size:
    """How much is done: widths and depth of the models, training and repair steps, the text's batches."""

    width: int
    hidden: int
    intermediate: int
    layers: int
    digits_steps: int
    text_steps: int
    digits_repair: int
    text_repair: int
    batch: int
    length: int
    held_out: int
    many: int
    seconds: float


FULL = Size(
    width=1024, hidden=256, intermediate=1024, layers=3, digits_steps=150, text_steps=220,
    digits_repair=200, text_repair=60, batch=8, length=128, held_out=12, many=256, seconds=0.4,
)  # fmt: skip
QUICK = Size(
    width=128, hidden=64, intermediate=128, layers=1, digits_steps=25, text_steps=6,
    digits_repair=5, text_repair=3, batch=2, length=32, held_out=1, many=32, seconds=0.01,
)  # fmt: skip


@dataclass
class Task:
    """A model and its real data.

    Attributes:
        name: in the results.
        title: what it is, in words.
        unit: what a forward pass is counted in: a row of a linear layer's input.
        measure: what `quality` gives: "accuracy", a share, or "loss", nats per byte.
        model: untrained.
        batches: to train with, endless.
        held_out: to judge by.
        inputs: by number of units, what forward passes are timed on.
        steps, lr: of the training.
        repair_steps: of the repair, or of the training on after channels left.
    """

    name: str
    title: str
    unit: str
    measure: str
    model: nn.Module
    batches: Iterator[Batch]
    held_out: list[Batch]
    inputs: dict[int, Batch]
    steps: int
    repair_steps: int
    lr: float

    def train(
        self, model: nn.Module, steps: int, lr: float, on_step: Callable[[float], None] = lambda loss: None
    ) -> None:
        """Some steps of AdamW with 8-bit states, up in a few and then down to a tenth of the rate."""
        from tilewright.optim import AdamW8bit

        model.train()
        optimizer = AdamW8bit(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.05)
        for step in range(steps):
            share = min(1.0, (step + 1) / _WARM_UP) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = lr * share
            optimizer.zero_grad()
            loss = model(**next(self.batches))["loss"]
            loss.backward()
            optimizer.step()
            on_step(float(loss.detach()))
        model.eval()

    @torch.no_grad()
    def quality(self, model: nn.Module) -> float:
        """The share of images that are recognised, or the mean loss, of data the model was not trained on."""
        model.eval()
        if self.measure == "loss":
            return sum(float(model(**batch)["loss"]) for batch in self.held_out) / len(self.held_out)
        right = [(model(**batch)["logits"].argmax(-1) == batch["labels"]).float() for batch in self.held_out]
        return float(torch.cat(right).mean())

    def calibration(self, count: int) -> list[Batch]:
        """Some batches to weigh inputs by, and to repair with."""
        return [next(self.batches) for _ in range(count)]


class DigitsClassifier(nn.Module):
    """Images `(n, 64)` to logits of ten digits: linear layers with ReLU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(64, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Any:
        """Logits; with labels a dict of loss and logits."""
        x = F.relu(self.first(images))
        for layer in self.hidden:
            x = F.relu(layer(x))
        logits = self.head(x)
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def _needed(module: str, package: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"`tilewright demo prune` {what}, which is not installed: pip install {package}"
        ) from error


def digits_task(size: Size, seed: int, steps: int | None) -> Task:
    """scikit-learn's 1797 images of handwritten digits, 8 x 8 pixels; a fifth of them is held out."""
    _needed("torch_pruning", "torch-pruning", "takes channels out with torch-pruning")
    datasets = _needed("sklearn.datasets", "scikit-learn", "reads the handwritten digits of scikit-learn")
    found = datasets.load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(found.target), generator=generator)
    images = torch.from_numpy(found.data).float()[order] / 16
    labels = torch.from_numpy(found.target).long()[order]
    cut = len(order) * 4 // 5
    torch.manual_seed(seed)
    return Task(
        name="digits",
        title=f"a classifier of {len(order)} handwritten digits, layers of {size.width}",
        unit="image",
        measure="accuracy",
        model=DigitsClassifier(size.width),
        batches=_digit_batches(images[:cut], labels[:cut], generator),
        held_out=[{"images": images[cut:], "labels": labels[cut:]}],
        inputs={n: {"images": images[:n]} for n in (1, size.many)},
        steps=steps or size.digits_steps,
        repair_steps=size.digits_repair,
        lr=2e-3,
    )


def _digit_batches(images: Tensor, labels: Tensor, generator: torch.Generator) -> Iterator[Batch]:
    while True:
        chosen = torch.randint(len(labels), (_DIGITS_BATCH,), generator=generator)
        yield {"images": images[chosen], "labels": labels[chosen]}


def text_task(size: Size, seed: int, steps: int | None) -> Task:
    """A Llama of transformers for bytes, on Python's documentation."""
    transformers = transformers_for("prune")
    train, held_out = load_text()
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=size.hidden, intermediate_size=size.intermediate, num_hidden_layers=size.layers,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False, **NO_SPECIAL_BYTES,
    )  # fmt: skip
    tokens = held_out[: size.many].long()[None]
    batches = random_batches(train, size.batch, size.length, seed)
    judged = windows(held_out, size.length, 16)[: size.held_out]
    return Task(
        name="text",
        title=f"a Llama of transformers for bytes, width {size.hidden}, MLPs of {size.intermediate}",
        unit="byte",
        measure="loss",
        model=transformers.LlamaForCausalLM(config),
        batches=(_labelled(x) for x, _ in batches),
        held_out=[_labelled(x) for x, _ in judged],
        inputs={n: {"input_ids": tokens[:, :n]} for n in (1, size.many)},
        steps=steps or size.text_steps,
        repair_steps=size.text_repair,
        lr=2e-3,
    )


def _labelled(inputs: Tensor) -> Batch:
    """The model itself shifts the labels by one."""
    return {"input_ids": inputs, "labels": inputs}
