"""What a swap did, and what it left alone and why."""

from __future__ import annotations

from dataclasses import dataclass, field

from .._tables import count, table


@dataclass(frozen=True)
class Swapped:
    """One layer that now runs on tilewright's kernels.

    Attributes:
        path: the layer's name in the model, as in ``model.named_modules()``.
        layer: its class.
        op: the op that replaces its inner loop.
        kernel: what runs it where the layer's weights are now, such as ``cpu-avx512_bf16`` or ``cuda-sm90``.
    """

    path: str
    layer: str
    op: str
    kernel: str


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
    """The result of :func:`tilewright.swap`; ``print`` it for a table.

    Attributes:
        swapped: the layers that were swapped; with ``dry_run`` those that would be.
        skipped: the layers of a kind that is known, but that were left alone.
        dry_run: whether nothing was changed.
    """

    swapped: list[Swapped] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    dry_run: bool = False

    def __str__(self) -> str:
        verb = "would be swapped" if self.dry_run else "swapped"
        lines = [f"{count(self.swapped, 'layer')} {verb}, {count(self.skipped, 'layer')} left as they were."]
        lines += table(
            ("layer", "class", "op", "kernel"), [(s.path, s.layer, s.op, s.kernel) for s in self.swapped]
        )
        lines += table(("left alone", "class", "why"), [(s.path, s.layer, s.why) for s in self.skipped])
        if not self.swapped and not self.skipped:
            lines.append("The model has no layer that tilewright knows; docs/swap.md lists those it does.")
        return "\n".join(lines)
