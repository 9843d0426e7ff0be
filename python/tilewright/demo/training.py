"""A model being trained: what a step does, and what is seen on the way."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

Loss = Callable[..., Tensor]


def next_byte_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of a model of transformers, in nats per byte."""
    logits: Tensor = model(inputs, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def cosine(steps: int, warm_up: int = 0) -> Callable[[int], float]:
    """Share of the learning rate by step: linear warm-up, then a cosine down to a tenth."""

    def rate(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        progress = (step - warm_up) / max(1, steps - warm_up)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))

    return rate


@torch.no_grad()
def mean_loss(model: nn.Module, batches: list[tuple[Tensor, Tensor]], loss: Loss = next_byte_loss) -> float:
    """Mean cross entropy over all bytes of `batches`, in evaluation mode."""
    training = model.training
    model.eval()
    total = sum(loss(model, *batch).item() * batch[1].numel() for batch in batches)
    model.train(training)
    return total / sum(targets.numel() for _, targets in batches)


@dataclass
class Training:
    """One model being trained by one optimizer, and what was seen on the way.

    Attributes:
        model: called by `loss`.
        optimizer: has the highest learning rate.
        rate: share of that rate by step, from 0.
        loss: called with model, inputs and targets.
        losses: of every step.
        validation: numbers of steps, and the mean loss after so many.
        forward_ms, backward_ms, optimizer_ms, step_ms: of every step.
    """

    model: nn.Module
    optimizer: Optimizer
    rate: Callable[[int], float]
    loss: Loss = next_byte_loss
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    forward_ms: list[float] = field(default_factory=list)
    backward_ms: list[float] = field(default_factory=list)
    optimizer_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """Forward, backward and update, timed."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.optimizer.defaults["lr"] * self.rate(len(self.losses))
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.loss(self.model, inputs, targets)
        middle = time.perf_counter()
        loss.backward()  # type: ignore[no-untyped-call]
        late = time.perf_counter()
        self.optimizer.step()
        end = time.perf_counter()
        self.losses.append(loss.item())
        self.forward_ms.append((middle - start) * 1e3)
        self.backward_ms.append((late - middle) * 1e3)
        self.optimizer_ms.append((end - late) * 1e3)
        self.step_ms.append((end - start) * 1e3)

    def validate(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        """Notes the mean loss over all bytes of `batches`."""
        self.validation.append((len(self.losses), mean_loss(self.model, batches, self.loss)))

    def final(self) -> float:
        """The last validation's loss; NaN before there is one."""
        return self.validation[-1][1] if self.validation else math.nan

    def parameters(self) -> int:
        """How many the model has."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def state_bytes(self) -> int:
        """Bytes of all state that grows with the model (a quantization map is shared, and counts once)."""
        tensors = [
            t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)
        ]
        return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def settled(milliseconds: list[float], skip: int = 1) -> float:
    """The median without the first steps, which warm up, if there are others."""
    return round(statistics.median(milliseconds[min(skip, len(milliseconds) // 2) :]), 3)
