"""What is to be pruned, and how: the decisions behind `prune` and `Pruner`; they change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._checks import check_choice, check_number, check_tensor, check_type
from . import allocation as sharing
from . import distortion
from .calibration import Calibration, Loss, gradients, input_norms, second_moments, shared_inputs
from .changes import Change, revert_all
from .layers import Names, Skipped, Target, find_targets
from .masked import clear_optimizer, mask_of
from .masks import CRITERIA, global_masks, mask, scores
from .obs import sparsegpt
from .patterns import Block, NOfM, Pattern, parse_pattern
from .report import PrunedLayer, PruneReport
from .schedules import Cubic

Allocation = Literal["uniform", "erk", "distortion"]
Scope = Literal["layer", "row", "global"]

GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99)
_LARGEST_GRID = 200
_ALL_CRITERIA = (*CRITERIA, "sparsegpt")
_CALIBRATED = ("wanda", "taylor", "sparsegpt")


class Job:
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
        check_type("model", model, nn.Module, "torch.nn.Module")
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
        check_choice("criterion", criterion, _ALL_CRITERIA)
        check_choice("allocation", allocation, get_args(Allocation))
        check_choice("scope", scope, (*get_args(Scope), None))
        for what, value in (("criterion", criterion), ("allocation", allocation)):
            if value in (*_CALIBRATED, "distortion") and not calibrated:
                raise ValueError(f"{what} {value!r} needs calibration=")
        if seed is not None and criterion != "random":
            raise ValueError(f"seed is for criterion 'random', not for {criterion!r}")
        if isinstance(self.pattern, NOfM):
            self._check_n_of_m(sparsity)
            return
        check_number("sparsity", sparsity, "[0, 1)")
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
        check_type("schedule", schedule, Cubic, "tilewright.prune.Cubic")
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
        zeros = change.mask.numel() - int(change.mask.count_nonzero())
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
        shares = [
            (layer.units - units) / max(layer.units, 1) for layer, units in zip(layers, kept, strict=True)
        ]
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


def _checked_grid(grid: Sequence[float]) -> tuple[float, ...]:
    points = tuple(float(point) for point in grid)
    if len(points) > _LARGEST_GRID or not all(0.0 <= point < 1.0 for point in points):
        raise ValueError(f"grid must be at most {_LARGEST_GRID} sparsities from 0 to below 1, got {grid!r}")
    return points
