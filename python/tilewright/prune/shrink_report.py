"""What left a model, what stayed and why, and the way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any

from .._tables import table


@dataclass(frozen=True)
class Shrunk:
    """One group of units of which some left.

    Attributes:
        name: the module they belong to: an attention layer, an MLP, or the layer that makes the channels.
        kind: "heads", "width" or "channels".
        total: units before: key/value heads with their query heads, neurons, channels.
        kept: units now.
        layers: the layers that lost slices, by their paths.
        parameters_before, parameters: of the tensors that lost slices. A tensor that lost inputs in one group
            and outputs in another counts in both; the totals of the report count it once.
        flops_before, flops: of the linear layers and convolutions among `layers`, on the example inputs:
            multiplications and additions.
        removed: the units that left, ascending.
        note: what is not plain to see.
    """

    name: str
    kind: str
    total: int
    kept: int
    layers: list[str]
    parameters_before: int
    parameters: int
    flops_before: int
    flops: int
    removed: list[int] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class Unshrunk:
    """One group that stayed whole, and why."""

    name: str
    why: str


@dataclass(eq=False)
class ShrinkReport:
    """The result of :func:`tilewright.prune.shrink`; ``print`` it for a table.

    Attributes:
        shrunk: the groups that lost units.
        skipped: those that did not, with the reason.
        criterion: how the units were chosen.
        parameters_before, parameters: of the whole model.
        flops_before, flops: of one forward pass on the example inputs, as torch counts them.
        reload: None if the model's config says how it looks now (or it has none); else why it cannot.
        verified: whether the outputs were found equal to those of the masked model.
    """

    shrunk: list[Shrunk] = field(default_factory=list)
    skipped: list[Unshrunk] = field(default_factory=list)
    criterion: str = "magnitude"
    parameters_before: int = 0
    parameters: int = 0
    flops_before: int = 0
    flops: int = 0
    reload: str | None = None
    verified: bool = False
    _undo: Callable[[], None] | None = field(default=None, repr=False)

    def undo(self) -> None:
        """Gives the model back what it lost: the same parameters, which optimizers of before hold still.

        What they were trained to since then in the smaller model is lost. A second call does nothing.
        """
        if self._undo is not None:
            self._undo()
            self._undo = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return {
            "criterion": self.criterion,
            "parameters_before": self.parameters_before,
            "parameters": self.parameters,
            "flops_before": self.flops_before,
            "flops": self.flops,
            "reload": self.reload,
            "verified": self.verified,
            "shrunk": [asdict(group) for group in self.shrunk],
            "skipped": [asdict(group) for group in self.skipped],
        }

    def to_json(self, path: str | PathLike[str] | None = None) -> str:
        """The report as JSON, written to a file if there is a path."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text + "\n")
        return text

    def __str__(self) -> str:
        lines = [
            f"{len(self.shrunk)} group{'' if len(self.shrunk) == 1 else 's'} shrunk by {self.criterion}: "
            f"parameters {_change(self.parameters_before, self.parameters)}, "
            f"FLOPs {_change(self.flops_before, self.flops)}."
        ]
        lines += table(
            ("group", "what", "kept", "parameters", "FLOPs", "note"),
            [
                (
                    group.name or "(the model)",
                    group.kind,
                    f"{group.kept}/{group.total}",
                    _change(group.parameters_before, group.parameters),
                    _change(group.flops_before, group.flops),
                    group.note,
                )
                for group in self.shrunk
            ],
        )
        lines += table(("left whole", "why"), [(s.name or "(the model)", s.why) for s in self.skipped])
        if self.reload is not None:
            lines += ["", f"from_pretrained cannot load it: {self.reload}. tilewright.prune.load_shrunk can."]
        return "\n".join(lines)

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """Bars of the share each group kept; a matplotlib figure, saved if there is a path."""
        from matplotlib.figure import Figure

        groups = self.shrunk
        figure = Figure(figsize=(8, 1 + 0.28 * max(len(groups), 1)), layout="constrained")
        axes = figure.subplots()
        colors = {"heads": "tab:blue", "width": "tab:orange", "channels": "tab:green"}
        names = [group.name or "(the model)" for group in groups]
        axes.barh(names, [1.0] * len(groups), color="0.9")
        for kind in dict.fromkeys(group.kind for group in groups):
            own = [group for group in groups if group.kind == kind]
            axes.barh(
                [group.name or "(the model)" for group in own],
                [group.kept / group.total for group in own],
                color=colors[kind],
                label=kind,
            )
        axes.invert_yaxis()
        axes.set_xlabel("share kept")
        axes.set_title(
            f"parameters {_change(self.parameters_before, self.parameters)}, "
            f"FLOPs {_change(self.flops_before, self.flops)}"
        )
        if groups:
            axes.legend()
        if path is not None:
            figure.savefig(path)
        return figure


def _change(before: int, after: int) -> str:
    share = f" ({after / before:.0%})" if before else ""
    return f"{_short(before)} -> {_short(after)}{share}"


def _short(count: int) -> str:
    for size, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**4, "k")):
        if count >= size:
            return f"{count / (1000 if unit == 'k' else size):.3g}{unit}"
    return str(count)
