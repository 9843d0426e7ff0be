"""Runs a model on calibration data and keeps sums of what its layers see, never what they saw."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from .. import _models
from .._models import call
from .layers import Target

Loss = Callable[[nn.Module, Any], Tensor]
_ROWS = 8192  # of a layer's input taken at a time, so that a copy of it in float64 stays small


class Calibration:
    """Data, and how a model is run on one batch of it.

    Args:
        model: the model.
        data: one batch (a tensor, a tuple of positional or a dict of keyword arguments), an iterable of
            batches, or a function that is called with the model and runs it. An iterator is read once
            and its batches are kept, since some methods need several passes.
        loss_fn: called with the model and a batch, returns the loss. None: the model's own, which models of
            transformers return when a batch has `labels`.
        progress: whether to show a progress bar. None: on a terminal.
    """

    def __init__(
        self, model: nn.Module, data: Any, loss_fn: Loss | None = None, progress: bool | None = None
    ) -> None:
        self.model = model
        self.runs_itself = callable(data) and not isinstance(data, (Iterable, nn.Module))
        self.loss_fn = loss_fn
        self.progress = progress
        if self.runs_itself:
            self.data = data
        elif isinstance(data, (Tensor, tuple, Mapping)):
            self.data = [data]
        elif isinstance(data, Iterable):
            self.data = list(data) if isinstance(data, Iterator) else data
        else:
            raise TypeError(
                "calibration must be a batch (tensor, tuple or dict), an iterable of batches or a function "
                f"that runs the model, got {type(data).__name__}"
            )

    def batches(self, doing: str | None) -> Iterator[Any]:
        """One pass over the data, with a progress bar of that title; raises ValueError if there is none."""
        if self.runs_itself:
            yield self.data
            return
        total = len(self.data) if hasattr(self.data, "__len__") else None
        wanted = self.progress if doing else False
        with progress_bar(doing or "", total, wanted) as advance:
            empty = True
            for batch in self.data:
                empty = False
                yield batch
                advance()
        if empty:
            raise ValueError("calibration has no batches")

    def forward(self, batch: Any) -> None:
        """Runs the model for what its layers see."""
        if self.runs_itself:
            result = batch(self.model)
            if inspect.isgenerator(result):
                for _ in result:
                    pass
        elif self.loss_fn is not None:
            self.loss_fn(self.model, batch)
        else:
            call(self.model, batch)

    def losses(self, batch: Any, with_gradient: bool = True) -> Iterator[Tensor]:
        """The loss of a batch; of a function that runs the model itself, each that it yields."""
        if self.runs_itself:
            result = batch(self.model)
            found = result if inspect.isgenerator(result) else [result]
        else:
            found = [loss_of(self.model, batch, self.loss_fn)]
        for loss in found:
            usable = isinstance(loss, Tensor) and loss.numel() == 1
            if not usable or (with_gradient and not loss.requires_grad):
                raise ValueError(
                    "a loss is needed, a tensor of one element with a gradient: give loss_fn=, batches with "
                    f"labels, or a calibration function that yields losses; got {_described(loss)}"
                )
            yield loss

    def output(self, batch: Any) -> Tensor:
        """The model's first floating-point output, or its logits."""
        outputs: list[Any] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append(output)

        handle = self.model.register_forward_hook(keep)
        try:
            self.forward(batch)
        finally:
            handle.remove()
        if not outputs:
            raise ValueError("calibration does not call the model")
        return _main_tensor(outputs[-1])


def loss_of(model: nn.Module, batch: Any, loss_fn: Loss | None) -> Any:
    """The loss of one batch."""
    if loss_fn is not None:
        return loss_fn(model, batch)
    output = call(model, batch)
    if isinstance(output, Mapping):
        return output.get("loss")
    return getattr(output, "loss", output)


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time being, and random numbers that nobody misses afterwards."""
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=sorted(device.index for device in devices)), _models.evaluation(model):
        yield


def input_norms(calibration: Calibration, targets: list[Target]) -> list[Tensor]:
    """Per target the 2-norm of each input over all calibration tokens; float32 (inputs,)."""
    sums = [torch.zeros(t.matrix.shape[1], dtype=torch.float64, device=t.weight.device) for t in targets]

    def see(index: int, x: Tensor) -> None:
        for rows in torch.split(x, _ROWS):
            sums[index] += rows.to(torch.float64).square_().sum(0)

    watch(calibration, targets, see, "calibration: input norms")
    for target, total in zip(targets, sums, strict=True):
        if not total.isfinite().all():
            raise ValueError(f"{target.name}: its calibration inputs are not finite")
    return [total.sqrt().float() for total in sums]


def second_moments(calibration: Calibration, targets: list[Target]) -> Tensor:
    """X^T X over all calibration tokens of layers that share an input; float32, or float64 for float64.

    The model is run up to the first of these layers only.
    """
    first = targets[0]
    size = first.matrix.shape[1]
    dtype = torch.promote_types(first.weight.dtype, torch.float32)
    total = torch.zeros(size, size, dtype=dtype, device=first.weight.device)

    def see(index: int, x: Tensor) -> None:
        for rows in torch.split(x, _ROWS):
            wide = rows.to(dtype)
            total.addmm_(wide.t(), wide)
        if not calibration.runs_itself:
            raise _Enough

    watch(calibration, [first], see, f"calibration: inputs of {first.name}")
    if not total.isfinite().all():
        raise ValueError(f"{first.name}: its calibration inputs are not finite")
    return total


def shared_inputs(calibration: Calibration, targets: list[Target]) -> list[list[Target]]:
    """The targets in the order in which they run, those together that get the very same input."""
    groups: list[list[Target]] = []
    seen: set[int] = set()
    last: list[Tensor] = []

    def see(index: int, x: Tensor) -> None:
        if index in seen:
            return
        seen.add(index)
        same = bool(last) and _same(last[0], x)
        last[:] = [x]
        if same:
            groups[-1].append(targets[index])
        else:
            groups.append([targets[index]])

    watch(calibration, targets, see, "calibration: order of the layers", once=True)
    return groups


def gradients(calibration: Calibration, targets: list[Target]) -> list[Tensor]:
    """The mean over batches of each weight's gradient, float32; the parameters' `.grad` are not touched."""
    weights = [target.weight for target in targets]
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    reached = [False] * len(weights)
    asked = [weight.requires_grad for weight in weights]
    steps = 0
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad(), evaluation(calibration.model):
            for batch in calibration.batches("calibration: gradients"):
                for loss in calibration.losses(batch):
                    steps += 1
                    found = torch.autograd.grad(loss, weights, allow_unused=True)
                    for index, grad in enumerate(found):
                        if grad is not None:
                            reached[index] = True
                            sums[index] += grad
    finally:
        for weight, needed in zip(weights, asked, strict=True):
            weight.requires_grad_(needed)
    check_reached(targets, reached)
    for target, total in zip(targets, sums, strict=True):
        if not total.isfinite().all():
            raise ValueError(f"{target.name}: the gradient of its weight is not finite")
    return [target.as_matrix(total / steps) for target, total in zip(targets, sums, strict=True)]


def watch(
    calibration: Calibration,
    targets: list[Target],
    see: Callable[[int, Tensor], None],
    doing: str,
    once: bool = False,
) -> None:
    """Runs the data through the model and shows `see` each target's inputs as (tokens, inputs).

    Raises:
        ValueError: a target got no input at all; it is named.
    """
    reached = [False] * len(targets)

    def hook(index: int) -> Callable[..., None]:
        def on_forward(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = input_of(args, kwargs)
            if x.shape[0]:
                reached[index] = True
                see(index, x)

        return on_forward

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluation(calibration.model))
        for index, target in enumerate(targets):
            for module in target.modules:
                handle = module.register_forward_pre_hook(hook(index), with_kwargs=True)
                stack.callback(handle.remove)
        for batch in calibration.batches(doing):
            with suppress(_Enough):
                calibration.forward(batch)
            if once and all(reached):
                break
    check_reached(targets, reached)


class _Enough(BaseException):
    """Ends a forward whose rest nobody needs."""


@contextmanager
def progress_bar(doing: str, total: int | None, wanted: bool | None) -> Iterator[Callable[[], None]]:
    """A function to call after each of `total` parts."""
    if not (sys.stderr.isatty() if wanted is None else wanted) or total == 1:
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=total)
        yield lambda: bar.advance(task)


def input_of(args: Any, kwargs: Any) -> Tensor:
    """What a linear layer was called with, as (tokens, inputs)."""
    x: Tensor = args[0] if args else kwargs.get("input", kwargs.get("x"))
    x = x.detach()
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


def check_reached(targets: list[Target], reached: list[bool]) -> None:
    """Raises ValueError for targets that got no input."""
    missed = [target.name for target, found in zip(targets, reached, strict=True) if not found]
    if missed:
        names = ", ".join(missed if len(missed) <= 4 else [*missed[:3], f"and {len(missed) - 3} more"])
        raise ValueError(f"calibration never reaches {names}: use other data, or exclude= what stays dense")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _main_tensor(output: Any) -> Tensor:
    if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        output = output["logits"]
    entries = output.values() if isinstance(output, Mapping) else output
    for entry in [output] if isinstance(output, Tensor) else entries:
        if isinstance(entry, Tensor) and entry.is_floating_point() and (entry.dim() > 0):
            return entry
    raise ValueError(f"the model returns no floating-point tensor, but {type(output).__name__}")


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}{'' if value.requires_grad else ' without gradient'}"
    return "None" if value is None else type(value).__name__
