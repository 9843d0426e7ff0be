"""The text to train on: the topics of Python's `help()`, which every CPython ships with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def load_text() -> tuple[Tensor, Tensor]:
    """The text as bytes: uint8 `(n,)` to train on (the first 90 %) and to validate with (the rest)."""
    from pydoc_data import topics

    # The dictionary is ordered by name; its order is fixed here so that the split is too.
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics)).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:]


def random_batches(data: Tensor, batch: int, length: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of inputs and the bytes that follow them, both int64 `(batch, length)`, by seed."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(length + 1)
    while True:
        starts = torch.randint(len(data) - length, (batch, 1), generator=generator)
        window = data[starts + offsets].long()
        yield window[:, :-1], window[:, 1:]


def windows(data: Tensor, length: int, batch: int) -> list[tuple[Tensor, Tensor]]:
    """All of `data` once, in order, without overlap: batches of inputs and the bytes that follow them."""
    count = (len(data) - 1) // length
    inputs = data[: count * length].view(count, length).long()
    targets = data[1 : count * length + 1].view(count, length).long()
    return [(inputs[at : at + batch], targets[at : at + batch]) for at in range(0, count, batch)]
