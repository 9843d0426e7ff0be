"""`prune`: a model's linear layers get zeros, at once or by and by; all of it or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._checks import check_type, suggests_keywords
from .calibration import Loss
from .changes import Change, revert_all
from .job import GRID, Allocation, Job, Scope
from .layers import Names
from .masked import bake_torch_masks, drop_mask, mask_of, set_mask
from .patterns import Pattern
from .perp import Perp, restore, run_perp, settings_of
from .report import PruneReport
from .schedules import Cubic


@suggests_keywords
def prune(
    model: nn.Module,
    pattern: str | Pattern,
    sparsity: float | None = None,
    criterion: str = "magnitude",
    calibration: Any = None,
    allocation: Allocation = "uniform",
    schedule: Cubic | None = None,
    repair: str | Perp | None = None,
    *,
    include: Names = None,
    exclude: Names = None,
    optimizer: Optimizer | None = None,
    scope: Scope | None = None,
    loss_fn: Loss | None = None,
    train: Callable[[nn.Module, int], Any] | None = None,
    seed: int | None = None,
    p: float = 2,
    grid: Sequence[float] = GRID,
    progress: bool | None = None,
) -> PruneReport:
    """Prunes a model's linear layers, in place; their zeros then stay zero in training.

    The model stays a plain model: zeros are in the weights, the masks beside them (`mask_of`), and its
    `state_dict` has the keys it had. Weights pruned before stay pruned. Masks of `torch.nn.utils.prune` are
    taken over and become plain weights. Any error leaves the model as it was.

    Args:
        model: any module.
        pattern: "n:m" keeps n of every m neighbours in a row; "row", "column", "element" and
            `Block(rows, columns)` keep or prune such units of a weight (outputs, inputs) as a whole.
        sparsity: share of the units that is pruned, 0 <= sparsity < 1. Of "n:m" it follows, and may be
            left out.
        criterion: what a unit is worth: "magnitude", "lp" (with `p`), "wanda" and "taylor" and "sparsegpt"
            (which need `calibration`; SparseGPT also updates the kept weights), "random" (with `seed`).
        calibration: one batch (a tensor, a tuple of positional or a dict of keyword arguments of the model),
            an iterable of batches, such as a list or a DataLoader, or a function that is called with the
            model and runs it. Given, the report says how far the outputs moved. The model runs in
            evaluation mode. An iterator is read once and its batches are kept.
        allocation: how layers share the sparsity: "uniform"; "erk", density proportional to
            (in + out) / (in * out); "distortion", by what pruning each layer alone does to the model's
            output, measured at the sparsities of `grid`, the sum of which is minimised.
        schedule: a `Cubic`: prunes in so many steps, each followed by `train`. For a training loop of your
            own, see `Pruner`.
        repair: "perp", or a `Perp` with other settings: trains a few parameters after the pruning, on
            `calibration` and its loss; see `repair`.
        include: which layers, by their names in ``model.named_modules()``: a pattern such as
            ``"model.layers.*.mlp.*"``, several of them, or a function of name and module. None: all
            `torch.nn.Linear` and `Conv1D` of transformers, but not the output layer: one whose weight an
            embedding has, too, that `get_output_embeddings` returns, or whose name ends in classifier,
            embed_out, head, lm_head, output_projection, qa_outputs or score; nor Mamba's dt_proj and x_proj,
            nor thin layers, with one side more than 16 times the other (routers, bottlenecks), unless the
            model has no others. The report names them with the reason. Name other output layers in
            `exclude`.
        exclude: layers to leave dense, likewise.
        optimizer: one that trains the model: what it remembers of pruned weights is cleared now. Not given,
            that happens after its next step.
        scope: units are compared within a "layer", a "row" of it, or between all layers ("global"; then
            there is no allocation). None: within layers, but single elements by "wanda" within rows.
        loss_fn: called with the model and a batch, returns the loss, for "taylor" and `repair`. None: the
            model's own loss, which models of transformers return when a batch has labels.
        train: called with the model and the number of the pruning, 1 to `schedule.steps`, after each.
        seed: of "random"; None draws one from torch's generator.
        p: of "lp", the norm's exponent.
        grid: sparsities at which "distortion" measures; `sparsity` is added to them.
        progress: whether progress bars are shown. None: on a terminal.

    Returns:
        What was pruned and what it changed; ``print`` it. Its `undo` takes the pruning back.

    Raises:
        TypeError, ValueError: arguments that cannot be used, a layer that the pattern does not fit, whose
            weights are not finite, or that calibration never reaches: the message names it.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    job = Job(
        model, pattern, sparsity, criterion, calibration, allocation,
        scope=scope, loss_fn=loss_fn, seed=seed, p=p, grid=grid, progress=progress,
    )  # fmt: skip
    _check_optimizer(optimizer)
    if (schedule is None) != (train is None):
        raise ValueError("schedule= and train= go together; for a training loop of your own, see Pruner")
    perp = None if repair is None else settings_of(repair)
    if perp is not None and calibration is None:
        raise ValueError("repair= needs calibration=, the data it trains on")
    with _all_or_nothing(model) as undo:
        job.find(include, exclude)
        taken_over = len(undo)
        if train is None:
            changes, report = _at_once(job, sparsity, undo)
        else:
            changes, report = _gradually(job, sparsity, schedule, train, optimizer, undo)
        if perp is not None:
            assert job.calibration is not None
            report.repair, saved = run_perp(job.calibration, job.targets, perp)
            undo.append(lambda: restore(saved))
        job.clear(optimizer)
        report._undo = _undo_of(model, changes, undo[taken_over:])
        return report


@suggests_keywords
class Pruner:
    """Prunes a model by and by in a training loop of yours, to ever higher sparsity on a schedule.

        schedule = tw.prune.Cubic(20, every=50)
        pruner = tw.prune.Pruner(model, "element", 0.9, schedule=schedule, optimizer=optimizer)
        for batch in data:
            ...
            optimizer.step()
            pruner.step()
        print(pruner.report)

    Args:
        schedule: when, and how much.
        model, pattern, sparsity: as of `prune`, and so are criterion, calibration, allocation, include,
            exclude, optimizer, scope, loss_fn, seed, p, grid and progress.

    Attributes:
        report: what the last pruning did; None before the first. It has no `undo`: keep a checkpoint.
        steps: how often `step` has been called.
    """

    def __init__(
        self,
        model: nn.Module,
        pattern: str | Pattern,
        sparsity: float,
        criterion: str = "magnitude",
        calibration: Any = None,
        allocation: Allocation = "uniform",
        *,
        schedule: Cubic,
        include: Names = None,
        exclude: Names = None,
        optimizer: Optimizer | None = None,
        scope: Scope | None = None,
        loss_fn: Loss | None = None,
        seed: int | None = None,
        p: float = 2,
        grid: Sequence[float] = GRID,
        progress: bool | None = None,
    ) -> None:
        _check_optimizer(optimizer)
        model = getattr(model, "_orig_mod", model)
        self._job = Job(
            model, pattern, sparsity, criterion, calibration, allocation,
            scope=scope, loss_fn=loss_fn, seed=seed, p=p, grid=grid, progress=progress,
        )  # fmt: skip
        self._job.check_schedule(schedule, sparsity)
        with _all_or_nothing(model):
            self._job.find(include, exclude)
        self._final, self._schedule, self._optimizer = sparsity, schedule, optimizer
        self.steps = 0
        self.report: PruneReport | None = None
        self._history: list[tuple[int, float]] = []

    @property
    def done(self) -> bool:
        """Whether the final sparsity has been reached."""
        return self.steps >= self._schedule.begin + self._schedule.steps * self._schedule.every

    def step(self) -> float | None:
        """Call it after each step of the optimizer; returns the sparsity if it pruned now, else None."""
        due = self._schedule.due(self.steps + 1)
        if due is None:
            self.steps += 1
            return None
        sparsity = self._schedule.sparsity(due, self._final)
        with _all_or_nothing(self._job.model) as undo:
            report = _at_once(self._job, sparsity, undo)[1]
            self._job.clear(self._optimizer)
        self.steps += 1
        self._history.append((self.steps, sparsity))
        self.report = replace(report, history=list(self._history))
        return sparsity

    def state_dict(self) -> dict[str, Any]:
        """Where in the schedule it is. The masks are in the zeros of the model's weights."""
        return {"steps": self.steps, "seed": self._job.seed, "history": list(self._history)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another was; load the model's weights, too."""
        self.steps, self._job.seed = state["steps"], state["seed"]
        self._history = [(step, sparsity) for step, sparsity in state["history"]]


def _at_once(
    job: Job, sparsity: float | None, undo: list[Callable[[], None]]
) -> tuple[list[Change], PruneReport]:
    """Prunes; `undo` learns how to take it back."""
    changes, report = job.prune_to(sparsity)
    undo.append(lambda: revert_all(changes))
    for change in changes:
        change.commit()
    return changes, report


def _gradually(
    job: Job,
    final: Any,
    schedule: Any,
    train: Callable[[nn.Module, int], Any],
    optimizer: Optimizer | None,
    undo: list[Callable[[], None]],
) -> tuple[list[Change], PruneReport]:
    """Prunes and trains by turns; `undo` learns of the whole model, since all of it may have been trained."""
    job.check_schedule(schedule, final)
    saved = [(tensor, tensor.detach().clone()) for tensor in (*job.model.parameters(), *job.model.buffers())]
    masks = [(module, mask_of(module)) for target in job.targets for module in target.modules]
    undo.append(lambda: _restore_trained(saved, masks))
    history = []
    changes: list[Change] = []
    for pruning in range(1, schedule.steps + 1):
        sparsity = schedule.sparsity(pruning, final)
        changes, report = _at_once(job, sparsity, [])
        job.clear(optimizer)
        history.append((pruning, sparsity))
        train(job.model, pruning)
    report.history = history
    return changes, report


def _restore_trained(
    saved: Sequence[tuple[Tensor, Tensor]], masks: Sequence[tuple[nn.Module, Tensor | None]]
) -> None:
    for module, _ in masks:
        drop_mask(module)
    restore(saved)
    for module, former in masks:
        if former is not None:
            set_mask(module, former)


def _undo_of(
    model: nn.Module, changes: Sequence[Change], actions: Sequence[Callable[[], None]]
) -> Callable[[], None]:
    def undo() -> None:
        present = {id(module) for module in model.modules()}
        for change in changes:
            there = all(id(module) in present for module in change.target.modules)
            if not there or not change.is_current():
                what = "was pruned again" if there else "was replaced"
                raise RuntimeError(f"{change.target.name} {what} since: take that back first")
        for back in reversed(actions):
            back()

    return undo


@contextmanager
def _all_or_nothing(model: Any) -> Iterator[list[Callable[[], None]]]:
    """Collects what takes changes back, and calls it, last first, when an exception comes by."""
    generator = torch.get_rng_state()
    undo: list[Callable[[], None]] = []
    try:
        undo += [back for _, back in bake_torch_masks(model)]
        yield undo
    except BaseException:
        for back in reversed(undo):
            back()
        torch.set_rng_state(generator)
        raise


def _check_optimizer(optimizer: Any) -> None:
    if optimizer is not None:
        check_type("optimizer", optimizer, Optimizer, "torch.optim.Optimizer")
