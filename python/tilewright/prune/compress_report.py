"""What became of each pruned layer, at which measured speed, and the way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any

from .._tables import table
from .forms import DENSE


@dataclass(frozen=True)
class Compressed:
    """One linear layer with zeros.

    Attributes:
        name: its path in the model; the first, if it is in several places.
        paths: all of them.
        shape: outputs and inputs.
        density: the share of weights that its mask keeps, or that are not zero.
        pattern: what the zeros look like.
        kernel: the form it runs in: "dense", a sparse one, or several with the numbers of tokens for each.
        why: the reason, in words.
        tokens: the numbers of tokens it was timed at.
        times: milliseconds of each form at each of them.
        chosen: the form that runs at each of them.
        calls: how often one forward pass on the example inputs runs it with each number of tokens.
        bytes_dense, bytes: of its tensors, before and now.
        measured_as: the layer alike whose times these are; empty: its own.
    """

    name: str
    paths: list[str]
    shape: tuple[int, int]
    density: float
    pattern: str
    kernel: str
    why: str
    tokens: list[int] = field(default_factory=list)
    times: dict[str, dict[int, float]] = field(default_factory=dict)
    chosen: dict[int, str] = field(default_factory=dict)
    calls: dict[int, int] = field(default_factory=dict)
    bytes_dense: int = 0
    bytes: int = 0
    measured_as: str = ""

    @property
    def is_sparse(self) -> bool:
        """Whether it runs in a sparse form at some number of tokens."""
        return self.kernel != DENSE

    def ms_dense(self, tokens: int) -> float:
        """Milliseconds of the dense layer."""
        return self.times[DENSE][tokens]

    def ms(self, tokens: int) -> float:
        """Milliseconds of what runs now."""
        return self.times[self.chosen[tokens]][tokens]


@dataclass(eq=False)
class CompressReport:
    """The result of :func:`tilewright.prune.compress`; ``print`` it for a table.

    Attributes:
        layers: the linear layers with zeros, whatever became of them.
        left: names of layers without zeros.
        margin: how much faster a sparse form had to be, as a share.
        model_ms_dense, model_ms: of the whole model on the example inputs, before and now, medians of runs
            that alternated; 0 if not measured.
        error: the largest difference of an output before and after, as a share of its largest value.
    """

    layers: list[Compressed] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    margin: float = 0.03
    model_ms_dense: float = 0.0
    model_ms: float = 0.0
    error: float = 0.0
    _undo: Callable[[], None] | None = field(default=None, repr=False)

    @property
    def compressed(self) -> list[Compressed]:
        """The layers that run in a sparse form."""
        return [layer for layer in self.layers if layer.is_sparse]

    @property
    def bytes_dense(self) -> int:
        """Of the layers with zeros, before."""
        return sum(layer.bytes_dense for layer in self.layers)

    @property
    def bytes(self) -> int:
        """Of the layers with zeros, now."""
        return sum(layer.bytes for layer in self.layers)

    def totals(self) -> dict[int, tuple[float, float]]:
        """Milliseconds of all these layers at each number of tokens, dense and now."""
        found: dict[int, tuple[float, float]] = {}
        for layer in self.layers:
            for tokens in layer.chosen:
                dense, now = found.get(tokens, (0.0, 0.0))
                found[tokens] = (dense + layer.ms_dense(tokens), now + layer.ms(tokens))
        return dict(sorted(found.items()))

    def undo(self) -> None:
        """Puts the dense layers back, as they were. What the sparse ones learned since then is lost.

        A second call does nothing.
        """
        if self._undo is not None:
            self._undo()
            self._undo = None

    def explain(self, name: str) -> str:
        """In words what became of a layer, and why.

        Raises:
            KeyError: no linear layer of the model has this name.
        """
        if name in self.left:
            return f"{name} has no zeros and stays dense."
        layer = next((layer for layer in self.layers if name in layer.paths), None)
        if layer is None:
            known = ", ".join([*(layer.name for layer in self.layers), *self.left][:8])
            raise KeyError(f"no linear layer {name!r}; there are {known}")
        out, into = layer.shape
        text = [f"{name} has {into} inputs and {out} outputs; {layer.density:.1%} of its weights are kept"]
        text[0] += "." if layer.pattern == "scattered" else f", in the pattern: {layer.pattern}."
        text.append(f"It runs {layer.kernel}: {layer.why}.")
        for tokens in layer.tokens:
            times = sorted((ms[tokens], form) for form, ms in layer.times.items() if tokens in ms)
            shown = ", ".join(f"{form} {ms:.3g} ms" for ms, form in times)
            text.append(f"At {_tokens(tokens)}: {shown}; {layer.chosen[tokens]} runs.")
        if layer.measured_as:
            text.append(f"The times are those of {layer.measured_as}, a layer alike.")
        return "\n".join(text)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return {
            "margin": self.margin,
            "model_ms_dense": self.model_ms_dense,
            "model_ms": self.model_ms,
            "error": self.error,
            "bytes_dense": self.bytes_dense,
            "bytes": self.bytes,
            "totals": {str(tokens): list(ms) for tokens, ms in self.totals().items()},
            "layers": [asdict(layer) for layer in self.layers],
            "left": self.left,
        }

    def to_json(self, path: str | PathLike[str] | None = None) -> str:
        """The report as JSON, written to a file if there is a path."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text + "\n")
        return text

    def __str__(self) -> str:
        count = len(self.compressed)
        lines = [
            f"{count} of {len(self.layers)} linear layers with zeros became sparse; {len(self.left)} without "
            f"zeros left alone. {_bytes(self.bytes_dense)} -> {_bytes(self.bytes)}."
        ]
        rows: list[tuple[str, ...]] = []
        for layer in self.layers:
            for tokens in layer.tokens or [0]:
                timed = tokens in layer.chosen
                first = tokens == (layer.tokens or [0])[0]
                ratio = layer.ms_dense(tokens) / layer.ms(tokens) if timed else 1.0
                rows.append(
                    (
                        layer.name if first else "",
                        f"{layer.density:.1%}" if first else "",
                        layer.pattern if first else "",
                        str(tokens) if timed else "-",
                        layer.chosen[tokens] if timed else layer.kernel,
                        f"{layer.ms_dense(tokens):.3g}" if timed else "-",
                        f"{layer.ms(tokens):.3g}" if timed else "-",
                        f"{ratio:.2f}x" if timed else "-",
                        f"{_bytes(layer.bytes_dense)} -> {_bytes(layer.bytes)}" if first else "",
                        layer.why if first else "",
                    )
                )
        lines += table(
            ("layer", "kept", "zeros", "tokens", "runs", "dense ms", "ms", "faster", "bytes", "why"), rows
        )
        totals = self.totals()
        lines += [""] if totals else []
        for tokens, (dense, now) in totals.items():
            lines.append(
                f"All of them at {_tokens(tokens)}: {dense:.3g} -> {now:.3g} ms ({dense / now:.2f}x)."
            )
        if self.model_ms:
            lines.append(
                f"The model on the example inputs: {self.model_ms_dense:.3g} -> {self.model_ms:.3g} ms "
                f"({self.model_ms_dense / self.model_ms:.2f}x)."
            )
        return "\n".join(lines)

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """How much faster each layer is at each number of tokens; a matplotlib figure, saved to a path."""
        from matplotlib.figure import Figure

        counts = list(self.totals())
        timed = [layer for layer in self.layers if layer.chosen]
        figure = Figure(
            figsize=(8, 1.2 + 0.3 * max(len(timed), 1) * max(len(counts), 1)), layout="constrained"
        )
        axes = figure.subplots()
        height = 0.8 / max(len(counts), 1)
        for index, tokens in enumerate(counts):
            own = [(row, layer) for row, layer in enumerate(timed) if tokens in layer.chosen]
            axes.barh(
                [row + index * height for row, _ in own],
                [layer.ms_dense(tokens) / layer.ms(tokens) for _, layer in own],
                height,
                label=f"{tokens} tokens",
            )
        axes.axvline(1.0, color="0.5", linewidth=1)
        axes.set_yticks(
            [row + 0.4 - height / 2 for row in range(len(timed))], [layer.name for layer in timed]
        )
        axes.invert_yaxis()
        axes.set_xlabel("times as fast as dense")
        if counts:
            axes.legend()
        if path is not None:
            figure.savefig(path)
        return figure


def _bytes(count: int) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def _tokens(count: int) -> str:
    return f"{count} token{'s' if count > 1 else ''}"
