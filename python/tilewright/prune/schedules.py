"""How sparse a model is at each of the steps of a gradual pruning."""

from __future__ import annotations

from dataclasses import dataclass

from .._checks import check_count, check_number, suggests_keywords


@suggests_keywords
@dataclass(frozen=True)
class Cubic:
    """Fast at first, slow at the end, when every further weight matters (automated gradual pruning).

    The sparsity after the k-th of `steps` prunings is, on the way to the final one,

        final + (start - final) * (1 - k / steps)^3

    Attributes:
        steps: number of prunings; the last one reaches the final sparsity.
        start: sparsity before the first of them, [0, 1).
        begin: in a training loop, the step before the first interval of `every` steps.
        every: in a training loop, steps from one pruning to the next.

    From Zhu and Gupta, "To prune, or not to prune" (2017).
    """

    steps: int
    start: float = 0.0
    begin: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_count("every", self.every)
        check_number("start", self.start, "[0, 1)")
        check_count("begin", self.begin, lowest=0)

    def sparsity(self, pruning: int, final: float) -> float:
        """The sparsity after so many prunings, 0 to `steps`."""
        left = 1.0 - min(pruning, self.steps) / self.steps
        return final + (self.start - final) * left**3

    def due(self, step: int) -> int | None:
        """Which pruning, 1 to `steps`, comes after the training's `step`-th step; None: none."""
        pruning, rest = divmod(step - self.begin, self.every)
        return pruning if rest == 0 and 1 <= pruning <= self.steps else None
