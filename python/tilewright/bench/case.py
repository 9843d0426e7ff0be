"""What a benchmark measures: a case, and the contenders that do the same work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

OURS = "tilewright"


class Unavailable(Exception):
    """Raised by a contender's setup: the peer is missing here, or cannot do this case. Says why."""


@dataclass(frozen=True)
class Contender:
    """One way of doing a case's work.

    `setup` imports what it needs, allocates, and returns the call to be timed. `bytes` is what one call must
    read and write, by formula, each byte once; None where the case is not about memory.
    """

    name: str
    setup: Callable[[], Callable[[], object]]
    bytes: float | None = None


@dataclass(frozen=True)
class Case:
    """One line of the report: work of a stated size, and who does it. Ours is the first contender.

    `flops` counts multiplications, additions, divisions and square roots of one call, by formula.
    `calls` is for work so short that one call cannot be timed: that many make one sample.
    """

    name: str
    title: str
    contenders: list[Contender]
    flops: float | None = None
    calls: int = 1
    sizes: dict[str, object] = field(default_factory=dict)
