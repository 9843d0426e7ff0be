"""`repair`: a pruned model regains quality by training very little of it (PERP).

Kept weights W get a low-rank update that respects the mask, W + scale * (B A) * mask, which is merged in the
end; biases and the parameters of norms are trained as they are. So the optimizer's memory is small, pruned
weights stay zero, and nothing of the method is left in the model.

From Zimmer et al., "PERP: Rethinking the prune-retrain paradigm in the era of LLMs" (2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from .. import optim
from .._checks import check_choice, check_count, check_number, check_type, suggests_keywords
from .._models import is_plain_linear
from .calibration import Calibration, Loss, evaluation, progress_bar
from .layers import Target, find_targets
from .masked import mask_of
from .report import RepairReport

_WARM_UP = 0.1  # share of the steps in which the learning rate rises


@suggests_keywords
@dataclass(frozen=True)
class Perp:
    """How to repair.

    Attributes:
        steps: of the optimizer, a batch each; the data is gone through again as often as needed.
        lr: the highest learning rate; it rises over the first tenth of the steps, and then falls to 0.
        rank: of the low-rank updates, at most; 0: none.
        max_trainable: the rank is lowered, to 1 at least, until no larger share of the model's parameters
            is trained. None: it is not lowered.
        scale: what the low-rank product is multiplied by.
        biases: whether biases are trained.
        norms: whether the parameters of norms are (of modules whose class has Norm in its name).
        optimizer: "AdamW8bit", "AdamW", or a function that makes one of a list of parameters and a
            learning rate.
        seed: of the updates' initial values.
    """

    steps: int = 100
    lr: float = 1e-3
    rank: int = 16
    max_trainable: float | None = 0.01
    scale: float = 2.0
    biases: bool = True
    norms: bool = True
    optimizer: str | Callable[[list[Tensor], float], Optimizer] = "AdamW8bit"
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_count("rank", self.rank, lowest=0)
        check_number("lr", self.lr, "(0, inf)")
        if self.max_trainable is not None:
            check_number("max_trainable", self.max_trainable, "(0, 1]")
        if not callable(self.optimizer):
            check_choice("optimizer, if it is no function,", self.optimizer, ("AdamW8bit", "AdamW"))


def repair(
    model: nn.Module,
    data: Any,
    method: str | Perp = "perp",
    *,
    loss_fn: Loss | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> RepairReport:
    """Trains a few parameters of a pruned model, in place, so that it makes up for what it lost.

    Its masks are bit for bit the same afterwards, `requires_grad`, gradients and modes as they were. The
    model runs in evaluation mode: without dropout, and norms over batches use and keep their running
    statistics. An error, such as a loss that is not finite, leaves the model as it was.

    Args:
        model: a pruned model. Its masks are those of `mask_of`; a linear layer without one that has exact
            zeros counts as pruned there.
        data: one batch (a tensor, a tuple of positional or a dict of keyword arguments of the model), an
            iterable of batches, or a function that is called with the model and yields losses.
        method: "perp", or a `Perp`.
        loss_fn: called with the model and a batch, returns the loss. None: the model's own, which models of
            transformers return when a batch has labels.
        progress: whether a progress bar is shown. None: on a terminal.
        settings: of `Perp`, such as ``steps=200``.

    Returns:
        What was trained, and the loss before and after; ``print`` it.
    """
    model = getattr(model, "_orig_mod", model)
    check_type("model", model, nn.Module, "torch.nn.Module")
    how = settings_of(method, **settings)
    calibration = Calibration(model, data, loss_fn, progress)
    try:
        targets = find_targets(model, lambda name, module: True, None)[0]
    except ValueError:
        targets = []
    return run_perp(calibration, [target for target in targets if _kept(target) is not None], how)[0]


def settings_of(method: Any, **settings: Any) -> Perp:
    """The settings that "perp" or a `Perp` means."""
    if isinstance(method, Perp):
        if settings:
            raise TypeError(
                f"give settings to Perp(...), or method='perp' with settings; got both: {settings}"
            )
        return method
    if method != "perp":
        raise ValueError(f"repair must be 'perp' or a tilewright.prune.Perp, got {method!r}")
    return Perp(**settings)


def run_perp(
    calibration: Calibration, targets: Sequence[Target], settings: Perp
) -> tuple[RepairReport, list[tuple[Tensor, Tensor]]]:
    """Repairs; returns the report, and every changed tensor with its former values."""
    model = calibration.model
    plain = _plain_parameters(model, settings)
    adapters = _adapters(model, targets, plain, settings)
    trained = [*plain, *(factor for adapter in adapters for factor in (adapter.a, adapter.b))]
    if not trained:
        raise ValueError("there is nothing to train: no bias, no norm, and no pruned layer, or rank 0")
    saved: list[tuple[Tensor, Tensor]] = [(tensor, tensor.detach().clone()) for tensor in plain]
    try:
        with evaluation(model), _trains_only(model, plain):
            before = _mean_loss(calibration)
            with _adapted(adapters):
                losses = _train(calibration, trained, settings)
            for adapter in adapters:
                weight = adapter.target.weight
                saved.append((weight, weight.detach().clone()))
                adapter.merge()
            after = _mean_loss(calibration)
    except BaseException:
        restore(saved)
        raise
    parameters = sum(parameter.numel() for parameter in model.parameters())
    count = sum(parameter.numel() for parameter in trained)
    names = [adapter.target.name for adapter in adapters]
    rank = adapters[0].a.shape[0] if adapters else 0
    report = RepairReport(
        "perp", settings.steps, names, rank, count, count / parameters, before, after, losses
    )
    return report, saved


def restore(saved: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Writes former values back."""
    with torch.no_grad():
        for tensor, values in saved:
            tensor.copy_(values)


class _Adapter:
    """A low-rank update of one weight, at its kept places alone."""

    def __init__(
        self, target: Target, kept: Tensor, rank: int, scale: float, generator: torch.Generator
    ) -> None:
        self.target, self.kept, self.scale = target, kept, scale
        rows, columns = target.matrix.shape
        bound = 1.0 / math.sqrt(columns)
        a = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)
        self.a = a.to(kept.device).requires_grad_(True)
        self.b = torch.zeros(rows, rank, device=kept.device, requires_grad=True)

    def matrix(self) -> Tensor:
        """The updated weight, through which gradients reach the factors."""
        weight = self.target.matrix
        with torch.autocast(weight.device.type, enabled=False):
            update = (self.b @ self.a).mul(self.scale).masked_fill(~self.kept, 0.0)
        return weight + update.to(weight.dtype)

    def forward_of(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """The layer's forward with the updated weight."""
        return lambda input: F.linear(input, self.matrix(), module.bias)  # type: ignore[arg-type]

    @torch.no_grad()
    def merge(self) -> None:
        """Writes the update into the weight; pruned weights are zero before and after."""
        weight = self.matrix().masked_fill_(~self.kept, 0.0)
        if not weight.isfinite().all():
            raise ValueError(f"{self.target.name}: its repaired weights are not finite")
        self.target.weight.copy_(self.target.as_matrix(weight))


def _plain_parameters(model: nn.Module, settings: Perp) -> list[nn.Parameter]:
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_floating_point():
                continue
            if (settings.biases and name == "bias") or (settings.norms and is_norm):
                found[id(parameter)] = parameter
    return list(found.values())


def _adapters(
    model: nn.Module, targets: Sequence[Target], plain: Sequence[Tensor], settings: Perp
) -> list[_Adapter]:
    # A layer whose class computes something else with its weight is left to its bias.
    adaptable = [target for target in targets if all(_is_plain_linear(module) for module in target.modules)]
    per_rank = sum(sum(target.matrix.shape) for target in adaptable)
    rank = settings.rank
    if rank and per_rank and settings.max_trainable is not None:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        room = settings.max_trainable * parameters - sum(parameter.numel() for parameter in plain)
        rank = max(1, min(rank, math.floor(room / per_rank)))
    if not rank:
        return []
    generator = torch.Generator().manual_seed(settings.seed)
    adapters = []
    for target in adaptable:
        kept = _kept(target)
        if kept is not None:
            adapters.append(_Adapter(target, kept, rank, settings.scale, generator))
    return adapters


def _kept(target: Target) -> Tensor | None:
    mask = mask_of(target.modules[0])
    if mask is not None:
        return target.as_matrix(mask)
    kept = target.matrix != 0
    return None if kept.all() else kept


def _is_plain_linear(module: nn.Module) -> bool:
    if "forward" in vars(module):
        return False
    if not isinstance(module, nn.Linear) or is_plain_linear(module):
        return True
    return type(module).forward is nn.Linear.forward


@contextmanager
def _trains_only(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Only these have gradients for the time being; flags and gradients come back as they were."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter in trained:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, needed, grad in before:
            parameter.requires_grad_(needed)
            parameter.grad = grad


@contextmanager
def _adapted(adapters: Sequence[_Adapter]) -> Iterator[None]:
    modules = [(module, adapter) for adapter in adapters for module in adapter.target.modules]
    try:
        for module, adapter in modules:
            module.forward = adapter.forward_of(module)
        yield
    finally:
        for module, _ in modules:
            vars(module).pop("forward", None)


def _train(calibration: Calibration, trained: list[Tensor], settings: Perp) -> list[float]:
    optimizer = _optimizer(trained, settings)
    rates = [group["lr"] for group in optimizer.param_groups]
    losses: list[float] = []
    with torch.enable_grad(), progress_bar("repair", settings.steps, calibration.progress) as advance:
        for step, loss in zip(range(settings.steps), _endless(calibration), strict=False):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * _share_of_rate(step, settings.steps)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise ValueError(f"repair: the loss of step {step + 1} is {losses[-1]}")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            advance()
    return losses


def _endless(calibration: Calibration) -> Iterator[Tensor]:
    while True:
        for batch in calibration.batches(None):
            yield from calibration.losses(batch)


def _share_of_rate(step: int, steps: int) -> float:
    rising = max(1, round(_WARM_UP * steps))
    return (step + 1) / rising if step < rising else (steps - step) / (steps - rising + 1)


def _optimizer(trained: list[Tensor], settings: Perp) -> Optimizer:
    if callable(settings.optimizer):
        return settings.optimizer(trained, settings.lr)
    if settings.optimizer == "AdamW8bit":
        return optim.AdamW8bit(trained, lr=settings.lr, weight_decay=0.0)
    return torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0)


def _mean_loss(calibration: Calibration) -> float:
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in calibration.batches("repair: loss"):
            for loss in calibration.losses(batch, with_gradient=False):
                total, count = total + float(loss), count + 1
    mean = total / max(count, 1)
    if not math.isfinite(mean):
        raise ValueError(f"repair: the mean loss is {mean}")
    return mean
