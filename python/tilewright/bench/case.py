"""What a benchmark measures: a case, the contenders that do the same work, and what cases are made for."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .presets import Model

OURS = "tilewright"

Call = Callable[[], object]


@dataclass(frozen=True)
class Changing:
    """A call whose result is what it changes: `changed` gives those tensors."""

    call: Call
    changed: Callable[[], list[Tensor]]

    def __call__(self) -> object:
        """The call, to be timed."""
        return self.call()


class Unavailable(Exception):
    """Raised by a contender's setup: the peer is missing here, or cannot do this case. Says why."""


@dataclass(frozen=True)
class Contender:
    """One way of doing a case's work.

    `setup` imports what it needs, allocates, and returns the call to be timed. `bytes` is what one call must
    read and write, by formula, each byte once; None where the case is not about memory. A `yardstick` does
    other work (a part of it, a plain copy, what it saves): it is shown beside the rest, and wins nothing.
    """

    name: str
    setup: Callable[[], Call]
    bytes: float | None = None
    yardstick: bool = False

    @property
    def owner(self) -> str:
        """The library: what stands before a comma of its name, or we."""
        return OURS if self.name.startswith(OURS) else self.name.partition(",")[0]


@dataclass(frozen=True)
class Case:
    """One line of the report: work of a stated size, and who does it. Ours is the first contender.

    `flops` counts multiplications, additions, divisions and square roots of one call, by formula.
    `calls` is for work so short that one call cannot be timed: that many make one sample.
    `group` is the heading under which the chart shows it, beside its like.
    """

    name: str
    title: str
    contenders: list[Contender]
    flops: float | None = None
    calls: int = 1
    sizes: dict[str, object] = field(default_factory=dict)
    group: str = ""


@dataclass(frozen=True)
class Plan:
    """What a family makes its cases for.

    `quick` asks for a few that represent it, small ones; a `model` for the sizes of its layers.
    """

    device: torch.device
    quick: bool = False
    model: Model | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether the cases are for a GPU: larger, and in bfloat16."""
        return self.device.type == "cuda"

    @property
    def wide(self) -> torch.dtype:
        """float32; bfloat16 on a GPU, where nobody trains in float32."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Those of the cases that show what a dtype does."""
        return [torch.bfloat16] if self.on_gpu else [torch.float32, torch.bfloat16]


def grouped(group: str, cases: Iterable[Case]) -> list[Case]:
    """The cases, under one heading."""
    return [replace(case, group=group) for case in cases]


def peer(module: str, *names: str) -> Any:
    """A peer's module, or what it holds under the first of `names` that is there.

    Raises:
        Unavailable: if it is not installed, cannot be imported, or has none of them.
    """
    library = module.partition(".")[0]
    _silence(library)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == library:
            raise Unavailable("not installed") from None
        raise Unavailable(f"cannot be imported: {error}") from None
    except Exception as error:  # a peer built for another torch fails with whatever its loader raises
        raise Unavailable(f"cannot be imported: {error}") from None
    _silence(library)
    for name in names:
        if hasattr(found, name):
            return getattr(found, name)
    if names:
        raise Unavailable(f"{module} has no {' or '.join(names)}")
    return found


def _silence(library: str) -> None:
    """What a peer logs is no part of a result; some set their level anew when they are imported."""
    for name in (library, "torch", "torchao"):  # transformers imports torchao
        logging.getLogger(name).setLevel(logging.ERROR)


def short(dtype: torch.dtype) -> str:
    """`fp32`, `bf16`, `fp16`."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def full(dtype: torch.dtype) -> str:
    """`float32`, `bfloat16`, `float16`."""
    return str(dtype).removeprefix("torch.")


def of_tokens(count: int) -> str:
    """`1 token`, `4 tokens`."""
    return f"{count} token{'' if count == 1 else 's'}"
