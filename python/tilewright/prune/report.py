"""What pruning did to a model: a table, JSON, a picture, and the way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .._tables import count, folded, table
from .layers import Skipped

_INK, _GRID, _COLOURS = "#333333", "#e6e6e6", ("#30638e", "#d1495b")


@dataclass(frozen=True)
class PrunedLayer:
    """One pruned layer.

    Attributes:
        name: its name in the model.
        shape: of its weight, (outputs, inputs).
        pattern: what was pruned together: "2:4", "block 16x16", "row", "column", "element".
        criterion: what decided.
        weights: number of its weights.
        zeros: how many of them the mask prunes.
        distortion: relative error of the layer's output on the calibration inputs, as the dense model meets
            them: sum (y - y')^2 / sum y^2, without bias. None: not measured.
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    criterion: str
    weights: int
    zeros: int
    distortion: float | None = None

    @property
    def density(self) -> float:
        """Share of the weights that are kept."""
        return 1.0 - self.zeros / self.weights if self.weights else 1.0


@dataclass(frozen=True)
class RepairReport:
    """What a repair trained, and what it gained.

    Attributes:
        method: "perp".
        steps: of the optimizer.
        layers: names of the layers with a low-rank update, which is merged.
        rank: of the updates; 0: there were none.
        trained: number of parameters that were trained.
        trained_share: that number over all parameters of the model.
        loss_before: mean loss over the data before the repair; without dropout, as `loss_after`.
        loss_after: the same after it, with the updates merged.
        losses: of every step.
    """

    method: str
    steps: int
    layers: list[str]
    rank: int
    trained: int
    trained_share: float
    loss_before: float
    loss_after: float
    losses: list[float] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        return (
            f"repaired by {self.method}: loss {self.loss_before:.4g} -> {self.loss_after:.4g} in "
            f"{self.steps} steps, {self.trained} parameters trained ({100 * self.trained_share:.2g}%), "
            f"rank {self.rank} in {count(self.layers, 'layer')}"
        )


@dataclass
class PruneReport:
    """The result of :func:`tilewright.prune.prune`; ``print`` it for a table.

    Attributes:
        layers: what was pruned, in the model's order.
        skipped: the linear layers that were left dense, and why.
        allocation: how the sparsity was shared out: "uniform", "erk", "distortion", or "global".
        distortion: relative error of the model's output on the calibration data, sum (f - f')^2 / sum f^2,
            before any repair; of a gradual pruning, by its last step alone. None: not measured.
        predicted_distortion: the sum of what each layer alone would cost, which `allocation="distortion"`
            minimised; None for others.
        history: of a gradual pruning, (step, sparsity) of each pruning.
        repair: what `repair` did; None: nothing was repaired.
    """

    layers: list[PrunedLayer]
    skipped: list[Skipped] = field(default_factory=list)
    allocation: str = "uniform"
    distortion: float | None = None
    predicted_distortion: float | None = None
    history: list[tuple[int, float]] = field(default_factory=list)
    repair: RepairReport | None = None
    _undo: Callable[[], None] | None = field(default=None, repr=False, compare=False)

    @property
    def weights(self) -> int:
        """Number of weights of the pruned layers."""
        return sum(layer.weights for layer in self.layers)

    @property
    def zeros(self) -> int:
        """How many of them are pruned."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def density(self) -> float:
        """Share of the weights of these layers that are kept."""
        return 1.0 - self.zeros / self.weights if self.weights else 1.0

    def undo(self) -> None:
        """Gives every pruned weight the value it had, to the bit, and the layers the masks they had.

        Pruning alone leaves kept weights as they are, so only pruned values were put aside, and undo writes
        these back; if you have trained since, kept weights stay as trained. Where kept weights changed, too
        (SparseGPT, a repair, a gradual pruning that trains), whole tensors were put aside and come back: the
        weights, and all parameters and buffers of the model where it was trained.

        Raises:
            RuntimeError: it was undone already, a layer has been pruned again since (undo that first), or
                the report comes from a file or a copy.
        """
        if self._undo is None:
            raise RuntimeError("nothing to undo: it was undone already, or the report is a copy")
        self._undo()
        self._undo = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_undo": None}  # a copy of the report has no hold on the model

    def __str__(self) -> str:
        lines = [
            f"{count(self.layers, 'layer')} pruned, {count(self.skipped, 'layer')} left dense: "
            f"{self.zeros} of {self.weights} weights are zero, density {self.density:.4f}."
        ]
        if self.distortion is not None:
            predicted = self.predicted_distortion
            summed = "" if predicted is None else f" (sum of the layers': {predicted:.3g})"
            lines.append(f"The model's output differs by {self.distortion:.3g} of its square{summed}.")
        if self.repair is not None:
            lines.append(str(self.repair)[:1].upper() + str(self.repair)[1:] + ".")
        lines += table(
            ("layer", "outputs x inputs", "pattern", "criterion", "density", "zeros", "distortion"),
            [
                (
                    layer.name, f"{layer.shape[0]} x {layer.shape[1]}", layer.pattern, layer.criterion,
                    f"{layer.density:.4f}", str(layer.zeros), shown(layer.distortion),
                )
                for layer in self.layers
            ],
            right="lrllrrr",
        )  # fmt: skip
        lines += table(("left dense", "why"), folded([(entry.name, (entry.why,)) for entry in self.skipped]))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        entries = {key: value for key, value in vars(self).items() if not key.startswith("_")}
        return {
            **entries,
            "layers": [{**asdict(layer), "density": layer.density} for layer in self.layers],
            "skipped": [asdict(entry) for entry in self.skipped],
            "repair": None if self.repair is None else asdict(self.repair),
            "weights": self.weights,
            "zeros": self.zeros,
            "density": self.density,
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """`to_dict` as JSON; written to `path`, if given."""
        return written(json.dumps(self.to_dict(), indent=2), path)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draws density and distortion of every layer with matplotlib (the extra `plot`).

        Args:
            path: a file to save the picture to, such as ``"pruned.png"``. None: it is not saved.

        Returns:
            matplotlib's figure.
        """
        measured = any(layer.distortion is not None for layer in self.layers)
        figure, axes = bar_figure("PruneReport.plot", len(self.layers), 2 if measured else 1)
        names = [layer.name for layer in self.layers]
        bars(axes[0], names, [layer.density for layer in self.layers], "share of weights kept", _COLOURS[0])
        axes[0].set_xlim(0, 1)
        if measured:
            distortions = [layer.distortion or 0.0 for layer in self.layers]
            bars(axes[1], names, distortions, "relative output error", _COLOURS[1])
            axes[1].tick_params(labelleft=False)
        return saved(figure, path)


def shown(value: float | None, digits: int = 3) -> str:
    """A cell of a table; empty for what was not measured."""
    return "" if value is None else f"{value:.{digits}g}"


def written(text: str, path: str | Path | None) -> str:
    """The text, also in a file if a path is given."""
    if path is not None:
        Path(path).write_text(text + "\n", encoding="utf-8")
    return text


def bar_figure(what: str, rows: int, columns: int) -> tuple[Any, list[Any]]:
    """A figure for horizontal bars, a row a layer, and its axes; needs no display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{what} needs matplotlib: pip install 'tilewright[plot]'") from error
    figure = Figure(figsize=(5.0 * columns + 2.0, 1.2 + 0.22 * max(rows, 4)), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)
    return figure, list(axes[0])


def bars(axis: Any, names: list[str], values: list[float], title: str, colour: str) -> None:
    """Horizontal bars, the first on top."""
    axis.barh(range(len(names)), values, color=colour, height=0.7)
    axis.set_yticks(range(len(names)), names, fontsize=8, color=_INK)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_title(title, fontsize=9.5, color=_INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", color=_GRID, linewidth=0.7)
    axis.set_axisbelow(True)


def saved(figure: Any, path: str | Path | None) -> Any:
    """The figure, saved if a path is given."""
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
