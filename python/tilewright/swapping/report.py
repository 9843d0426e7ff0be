"""What a swap did, what it left alone and why, and the way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from html import escape
from os import PathLike
from types import TracebackType
from typing import Any

from .._tables import count, folded, table

FAMILIES = (
    "Mamba layers of transformers and mamba_ssm",
    "linear layers with zeros in blocks or n:m (tilewright.prune makes them)",
    "large float32 linear layers, on CPUs with AVX-512 that are not Intel's",
    "attention layers of transformers (with attention=tilewright.attention.BlockSparse(...))",
)


@dataclass(frozen=True)
class Measured:
    """How fast a linear layer is at a number of tokens.

    Attributes:
        tokens: rows of its input.
        form: what runs there: "dense", or a sparse form such as "blocks of 16x16" or "2:4".
        ms_dense: milliseconds of the dense layer.
        ms: of what runs now; the same if that is dense.
    """

    tokens: int
    form: str
    ms_dense: float
    ms: float

    def __str__(self) -> str:
        if self.form == "dense":
            return f"{self.tokens}: dense"
        return f"{self.tokens}: {self.ms_dense:.3g} -> {self.ms:.3g}"


@dataclass(frozen=True)
class Swapped:
    """One layer that now runs on tilewright's kernels.

    Attributes:
        path: the layer's name in the model, as in ``model.named_modules()``.
        layer: its class.
        op: the op that replaces its inner loop.
        kernel: what runs it where the layer's weights are now, such as ``cpu-avx512_bf16`` or ``cuda-sm90``;
            of a linear layer also in which form.
        measured: of a linear layer, its times at the numbers of tokens it was measured at.
    """

    path: str
    layer: str
    op: str
    kernel: str
    measured: tuple[Measured, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """One layer that could have been swapped and was not.

    Attributes:
        path: the layer's name in the model.
        layer: its class.
        why: what kept it from being swapped.
    """

    path: str
    layer: str
    why: str


@dataclass(frozen=True)
class SwapReport:
    """The result of :func:`tilewright.swap`; ``print`` it for tables.

    As a context manager it takes the swap back at the end of the block: ``with tilewright.swap(model):``.

    Attributes:
        swapped: the layers that were swapped; with ``dry_run`` those that would be.
        skipped: the layers of a kind that is known, but that were left alone.
        dense: names of linear layers without zeros worth a kernel.
        norms: names of the RMS norms beside swapped Mamba layers, which take one pass each way now.
        dry_run: whether nothing was changed.
        warnings: what to look out for, such as a transformers newer than those that were tested.
    """

    swapped: list[Swapped] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    dense: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    dry_run: bool = False
    warnings: list[str] = field(default_factory=list)
    _undo: list[Callable[[], object]] = field(default_factory=list, repr=False, compare=False)

    def undo(self) -> None:
        """Takes back what this call swapped, as far as it is still there; other calls' swaps stay.

        Raises:
            TypeError: as :func:`tilewright.unswap`.
        """
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def __enter__(self) -> SwapReport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_undo": []}  # a copy is a record, and undoes nothing

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return {
            "dry_run": self.dry_run,
            "swapped": [
                {**asdict(entry), "measured": [asdict(times) for times in entry.measured]}
                for entry in self.swapped
            ],
            "skipped": [asdict(entry) for entry in self.skipped],
            "dense": list(self.dense),
            "norms": list(self.norms),
            "warnings": list(self.warnings),
        }

    def to_json(self, path: str | PathLike[str] | None = None) -> str:
        """The report as JSON, written to a file if there is a path."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text + "\n")
        return text

    def __str__(self) -> str:
        lines = [self._summary()]
        for headings, rows in self._tables():
            lines += table(headings, rows)
        return "\n".join([*lines, *self._notes()])

    def _repr_html_(self) -> str:
        """For notebooks."""
        parts = [f"<p>{escape(self._summary())}</p>"]
        for headings, rows in self._tables():
            head = "".join(f"<th>{escape(cell)}</th>" for cell in headings)
            body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
            parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
        return "".join([*parts, *(f"<p>{escape(note)}</p>" for note in self._notes() if note)])

    def _summary(self) -> str:
        verb = "would be swapped" if self.dry_run else "swapped"
        return f"{count(self.swapped, 'layer')} {verb}, {count(self.skipped, 'layer')} left as they were."

    def _tables(self) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
        timed = any(entry.measured for entry in self.swapped)
        done = folded([
            (s.path, (s.layer, s.op, s.kernel, *(("; ".join(map(str, s.measured)),) if timed else ())))
            for s in self.swapped
        ])  # fmt: skip
        left = folded([(s.path, (s.layer, s.why)) for s in self.skipped])
        times = ("tokens: ms dense -> now",) if timed else ()
        found = [
            (("layer", "class", "op", "kernel", *times), done),
            (("left alone", "class", "why"), left),
        ]
        return [(headings, rows) for headings, rows in found if rows]

    def _notes(self) -> list[str]:
        notes = []
        if self.norms:
            notes = [
                "",
                f"{count(self.norms, 'RMS norm')} beside them in one pass each way (gated_rms_norm).",
            ]
        if self.dense:
            notes += ["", f"{count(self.dense, 'linear layer')} left dense: no zeros in the weight."]
        for warning in self.warnings:
            notes += ["", warning]
        if not self.swapped and not self.skipped:
            notes += ["", "Nothing here is for tilewright's kernels. What it swaps:"]
            notes += [f"- {family}" for family in FAMILIES]
        return notes
