"""Semi-structured weights and the linear layer with them, from the definitions, in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "none": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}


def kept_positions(kept: list[bool], n: int) -> list[int]:
    """Of one group: those that are kept, and the first others until there are n."""
    chosen = [i for i, keeps in enumerate(kept) if keeps]
    others = [i for i, keeps in enumerate(kept) if not keeps]
    return sorted(chosen + others[: n - len(chosen)])


def compress(dense: Tensor, kept: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """(values, indices), a bit at a time."""
    out, columns = dense.shape
    values = torch.zeros(out, columns // m * n, dtype=dense.dtype)
    indices = torch.zeros(out, -(-columns // 8), dtype=torch.uint8)
    for row in range(out):
        for group in range(columns // m):
            begin = group * m
            for slot, at in enumerate(kept_positions(kept[row, begin : begin + m].tolist(), n)):
                values[row, group * n + slot] = dense[row, begin + at]
                if (n, m) == (2, 4):
                    indices[row, begin // 8] += at << (begin % 8 + 2 * slot)
                else:
                    indices[row, (begin + at) // 8] += 1 << (begin + at) % 8
    return values, indices


def decompress(values: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    """The dense weight."""
    out, columns = values.shape[0], values.shape[1] // n * m
    dense = torch.zeros(out, columns, dtype=values.dtype)
    for row in range(out):
        for group in range(columns // m):
            begin = group * m
            if (n, m) == (2, 4):
                nibble = int(indices[row, begin // 8]) >> begin % 8 & 15
                places = [nibble & 3, nibble >> 2]
            else:
                places = [i for i in range(m) if int(indices[row, (begin + i) // 8]) >> (begin + i) % 8 & 1]
            for slot, at in enumerate(places):
                dense[row, begin + at] = values[row, group * n + slot]
    return dense


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """activation(x W^T + bias) of the dense weight."""
    return ACTIVATIONS[activation](F.linear(x, weight, bias))
