"""`prune`: a model's linear layers get zeros, at once or by and by; all of it or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._checks import check_tensor
from . import allocation as sharing
from . import distortion
from .calibration import Calibration, Loss, gradients, input_norms, second_moments, shared_inputs
from .changes import Change, revert_all
from .layers import Names, Skipped, Target, find_targets
from .masked import bake_torch_masks, clear_optimizer, drop_mask, mask_of, set_mask
from .masks import CRITERIA, global_masks, mask, scores
from .obs import sparsegpt
from .patterns import Block, NOfM, Pattern, parse_pattern
from .perp import Perp, restore, run_perp, settings_of
from .report import PrunedLayer, PruneReport
from .schedules import Cubic

Allocation = Literal["uniform", "erk", "distortion"]
Scope = Literal["layer", "row", "global"]

_ALL_CRITERIA = (*CRITERIA, "sparsegpt")
_CALIBRATED = ("wanda", "taylor", "sparsegpt")
_GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99)
_LARGEST_GRID = 200


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
    grid: Sequence[float] = _GRID,
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
            embed_out, head, lm_head, output_projection, qa_outputs or score. Name other output layers in
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
    job = _Job(
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
        model, pattern, sparsity, criterion, calibration, allocation, include, exclude, optimizer, scope,
            loss_fn, seed, p, grid, progress: as of `prune`.

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
        grid: Sequence[float] = _GRID,
        progress: bool | None = None,
    ) -> None:
        _check_optimizer(optimizer)
        model = getattr(model, "_orig_mod", model)
        self._job = _Job(
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


class _Job:
    """What is to be pruned, and how; `prune_to` decides on masks, and changes nothing."""

    def __init__(
        self,
        model: nn.Module,
        pattern: str | Pattern,
        sparsity: float | None,
        criterion: str,
        calibration: Any,
        allocation: str,
        *,
        scope: str | None,
        loss_fn: Loss | None,
        seed: int | None,
        p: float,
        grid: Sequence[float],
        progress: bool | None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.model, self.pattern, self.criterion = model, parse_pattern(pattern), criterion
        self.allocation, self.scope, self.p = allocation, scope, p
        self._check_choices(sparsity, calibration is not None, seed)
        self.calibration = None
        if calibration is not None:
            self.calibration = Calibration(model, calibration, loss_fn, progress)
        self.grid = _checked_grid(grid)
        self.seed = seed
        self.targets: list[Target] = []
        self.skipped: list[Skipped] = []

    def _check_choices(self, sparsity: float | None, calibrated: bool, seed: int | None) -> None:
        criterion, allocation, scope = self.criterion, self.allocation, self.scope
        if criterion not in _ALL_CRITERIA:
            raise ValueError(f"criterion must be one of {', '.join(_ALL_CRITERIA)}, got {criterion!r}")
        if allocation not in ("uniform", "erk", "distortion"):
            raise ValueError(f"allocation must be 'uniform', 'erk' or 'distortion', got {allocation!r}")
        if scope not in (None, "layer", "row", "global"):
            raise ValueError(f"scope must be 'layer', 'row', 'global' or None, got {scope!r}")
        for what, value in (("criterion", criterion), ("allocation", allocation)):
            if value in (*_CALIBRATED, "distortion") and not calibrated:
                raise ValueError(f"{what} {value!r} needs calibration=")
        if seed is not None and criterion != "random":
            raise ValueError(f"seed is for criterion 'random', not for {criterion!r}")
        if isinstance(self.pattern, NOfM):
            self._check_n_of_m(sparsity)
            return
        if isinstance(sparsity, bool) or not isinstance(sparsity, Real):
            raise TypeError(f"sparsity must be a number, 0 <= sparsity < 1, got {sparsity!r}")
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must be a number, 0 <= sparsity < 1, got {sparsity!r}")
        if scope == "global" and allocation != "uniform":
            raise ValueError(
                f"scope 'global' shares sparsity out itself: leave out allocation={allocation!r}"
            )
        if criterion == "sparsegpt" and (allocation == "distortion" or scope is not None):
            raise ValueError("criterion 'sparsegpt' has its own scope, and no allocation by distortion")

    def _check_n_of_m(self, sparsity: float | None) -> None:
        assert isinstance(self.pattern, NOfM)
        removed = 1 - self.pattern.n / self.pattern.m
        if sparsity is not None and not (isinstance(sparsity, Real) and abs(sparsity - removed) < 1e-6):
            raise ValueError(
                f"pattern '{self.pattern}' prunes {removed:g}, not {sparsity!r}: leave sparsity out"
            )
        for what, value, default in (("allocation", self.allocation, "uniform"), ("scope", self.scope, None)):
            if value != default:
                raise ValueError(
                    f"pattern '{self.pattern}' prunes every group alike: leave out {what}={value!r}"
                )

    def check_schedule(self, schedule: Any, final: float) -> None:
        """Refuses what cannot be pruned by and by."""
        if not isinstance(schedule, Cubic):
            raise TypeError(f"schedule must be a tilewright.prune.Cubic, got {type(schedule).__name__}")
        if isinstance(self.pattern, NOfM):
            raise ValueError(f"pattern '{self.pattern}' has one sparsity: it cannot follow a schedule")
        if schedule.start > final:
            raise ValueError(f"schedule: start {schedule.start} is above the final sparsity {final}")

    def find(self, include: Names, exclude: Names) -> None:
        """Finds the layers, and checks that all of them can be pruned."""
        self.targets, self.skipped = find_targets(self.model, include, exclude)
        if self.criterion == "random" and self.seed is None:
            self.seed = int(torch.randint(1 << 62, ()).item())
        for target in self.targets:
            check_tensor(f"{target.name}: weight", target.weight)
            self.pattern.check(target.matrix.shape, target.name)
            weight = target.weight.detach()
            if weight.numel() and not torch.linalg.vector_norm(weight, torch.inf).isfinite():
                broken = weight.numel() - int(weight.isfinite().sum())
                raise ValueError(f"{target.name}: {broken} of {weight.numel()} weights are not finite")

    def clear(self, optimizer: Optimizer | None) -> None:
        """Makes the optimizer, if there is one, forget pruned weights."""
        if optimizer is not None:
            clear_optimizer(optimizer, [module for target in self.targets for module in target.modules])

    def prune_to(self, sparsity: float | None) -> tuple[list[Change], PruneReport]:
        """The changes that make the layers so sparse, not applied, and the report of them."""
        predicted = None
        if self.criterion == "sparsegpt":
            changes = self._by_sparsegpt(self._shares(sparsity, None)[0])
        else:
            facts = self._facts()
            shares, predicted = self._shares(sparsity, facts)
            if self.scope == "global":
                masks = self._global_masks(sparsity, facts)
            else:
                masks = [self._mask(index, share, facts) for index, share in enumerate(shares)]
            changes = [Change(target, kept) for target, kept in zip(self.targets, masks, strict=True)]
        measured: tuple[Sequence[float | None], float | None] = ([None] * len(changes), None)
        if self.calibration is not None:
            measured = distortion.measure(self.calibration, changes)
        name = "global" if self.scope == "global" else self.allocation
        report = PruneReport(
            [self._layer(change, error) for change, error in zip(changes, measured[0], strict=True)],
            self.skipped, name, measured[1], predicted,
        )  # fmt: skip
        return changes, report

    def _layer(self, change: Change, error: float | None) -> PrunedLayer:
        rows, columns = change.target.matrix.shape
        zeros = change.mask.numel() - int(change.mask.sum())
        name, pattern = change.target.name, str(self.pattern)
        return PrunedLayer(name, (rows, columns), pattern, self.criterion, rows * columns, zeros, error)

    def _facts(self) -> _Facts:
        """What the criterion needs to know of the data."""
        if self.criterion == "wanda":
            assert self.calibration is not None
            return _Facts(input_norms(self.calibration, self.targets), None)
        if self.criterion == "taylor":
            assert self.calibration is not None
            return _Facts(None, gradients(self.calibration, self.targets))
        return _Facts(None, None)

    def _shares(
        self, sparsity: float | None, facts: _Facts | None
    ) -> tuple[list[float | None], float | None]:
        """The sparsity of each layer, and the distortion that goes with it."""
        if self.allocation == "uniform" or sparsity is None:
            return [sparsity] * len(self.targets), None
        assert isinstance(self.pattern, Block)
        layers = []
        for target in self.targets:
            down, across = self.pattern.units(target.matrix.shape)
            rows, columns = target.matrix.shape
            layers.append(sharing.Share((rows, columns), down * across))
        predicted = None
        if self.allocation == "erk":
            kept = sharing.erk(layers, sparsity)
        else:
            assert facts is not None
            kept, predicted = self._by_distortion(layers, sparsity, facts)
        shares = [(layer.units - units) / layer.units for layer, units in zip(layers, kept, strict=True)]
        return list(shares), predicted

    def _by_distortion(
        self, layers: list[sharing.Share], sparsity: float, facts: _Facts
    ) -> tuple[list[int], float]:
        assert self.calibration is not None
        points = [0.0, *sorted({*self.grid, sparsity} - {0.0})]

        def masks(index: int) -> list[Tensor]:
            found = [torch.ones_like(self.targets[index].matrix, dtype=torch.bool)]
            for point in points[1:]:
                found.append(found[-1] & self._mask(index, point, facts))
            return found

        curves, weights = distortion.curves(self.calibration, self.targets, masks, len(points))
        kept = [
            [min(layer.units, max(1, round(size / layer.unit))) for size in sizes]
            for layer, sizes in zip(layers, weights, strict=True)
        ]
        return sharing.by_distortion(layers, curves, kept, sparsity)

    def _options(self, index: int, facts: _Facts) -> dict[str, Any]:
        if self.criterion == "lp":
            return {"p": self.p}
        if self.criterion == "random":
            assert self.seed is not None
            return {"seed": (self.seed + index * 0x9E3779B97F4A7C15) % (1 << 63)}
        return facts.of(index)

    def _mask(self, index: int, sparsity: float | None, facts: _Facts) -> Tensor:
        """The mask of one layer; what was pruned before stays pruned, and counts."""
        target = self.targets[index]
        former = _former_mask(target)
        scope: Any = self.scope
        if self.criterion == "random" and former is not None:
            return former & self._random_mask(index, sparsity, former)
        found = mask(
            target.matrix, self.pattern, sparsity, self.criterion,
            scope=scope, name=target.name, **self._options(index, facts),
        )  # fmt: skip
        return found if former is None else found & former

    def _random_mask(self, index: int, sparsity: float | None, former: Tensor) -> Tensor:
        """Random scores know nothing of weights: units that are pruned already get the lowest ones here."""
        name, scope = self.targets[index].name, self.scope
        block = self.pattern if isinstance(self.pattern, Block) else Block(1, 1)
        options = self._options(index, _Facts(None, None))
        drawn = scores(former.float(), "random", pattern=block, **options)
        rows, columns = block.sizes(former.shape)
        present = scores(former.float(), pattern=block) > 0
        ranked = torch.where(present, drawn + 1.0, 0.0)
        pattern = "element" if isinstance(self.pattern, Block) else self.pattern
        kept = mask(ranked, pattern, sparsity, scope=scope, name=name)  # type: ignore[arg-type]
        spread = kept.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        return spread[: former.shape[0], : former.shape[1]]

    def _global_masks(self, sparsity: float | None, facts: _Facts) -> list[Tensor]:
        assert sparsity is not None
        weights = {target.name: target.matrix for target in self.targets}
        options: dict[str, Any] = {"p": self.p} if self.criterion == "lp" else {}
        if self.criterion == "random":
            options["seed"] = self.seed
        for key, values in (("activation_norms", facts.norms), ("gradients", facts.gradients)):
            if values is not None:
                options[key] = dict(zip(weights, values, strict=True))
        masks = global_masks(weights, self.pattern, sparsity, self.criterion, **options)
        former = [_former_mask(target) for target in self.targets]
        return [
            found if before is None else found & before
            for found, before in zip(masks.values(), former, strict=True)
        ]

    def _by_sparsegpt(self, shares: Sequence[float | None]) -> list[Change]:
        """Layer by layer in the order in which they run, each with the inputs that pruned layers give it."""
        assert self.calibration is not None
        share_of = dict(zip(map(id, self.targets), shares, strict=True))
        changes: dict[int, Change] = {}
        try:
            for group in shared_inputs(self.calibration, self.targets):
                moments = second_moments(self.calibration, group)
                for target in group:
                    change = _sparsegpt_change(target, moments, self.pattern, share_of[id(target)])
                    changes[id(target)] = change
                    change.apply()
        finally:
            revert_all(list(changes.values()))
        return [changes[id(target)] for target in self.targets]


@dataclass(frozen=True)
class _Facts:
    """What calibration found: of each target the norms of its inputs, or the gradient of its weight."""

    norms: list[Tensor] | None
    gradients: list[Tensor] | None

    def of(self, index: int) -> dict[str, Tensor]:
        if self.norms is not None:
            return {"activation_norm": self.norms[index]}
        return {} if self.gradients is None else {"gradient": self.gradients[index]}


def _sparsegpt_change(target: Target, moments: Tensor, pattern: Pattern, sparsity: float | None) -> Change:
    try:
        values, kept = sparsegpt(target.matrix, moments, pattern, sparsity, name=target.name)
    except ValueError as error:
        raise ValueError(f"{target.name}: {error}") from error
    former = _former_mask(target)
    return Change(target, kept if former is None else kept & former, values)


def _former_mask(target: Target) -> Tensor | None:
    former = mask_of(target.modules[0])
    return None if former is None else target.as_matrix(former)


def _at_once(
    job: _Job, sparsity: float | None, undo: list[Callable[[], None]]
) -> tuple[list[Change], PruneReport]:
    """Prunes; `undo` learns how to take it back."""
    changes, report = job.prune_to(sparsity)
    undo.append(lambda: revert_all(changes))
    for change in changes:
        change.commit()
    return changes, report


def _gradually(
    job: _Job,
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
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")


def _checked_grid(grid: Sequence[float]) -> tuple[float, ...]:
    points = tuple(float(point) for point in grid)
    if len(points) > _LARGEST_GRID or not all(0.0 <= point < 1.0 for point in points):
        raise ValueError(f"grid must be at most {_LARGEST_GRID} sparsities from 0 to below 1, got {grid!r}")
    return points
