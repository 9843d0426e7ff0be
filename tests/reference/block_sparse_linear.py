"""The block-sparse linear layer in float64, with the dense weight, and what its blocks are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = {
    "none": lambda z: z,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """(y, z): z = x W^T + bias, y = activation(z), in the dtype of the inputs."""
    z = x @ weight.T
    if bias is not None:
        z = z + bias
    return ACTIVATIONS[activation](z), z


def blocks(weight: Tensor, present: Tensor, block: tuple[int, int]) -> Tensor:
    """The blocks of a weight where they are present, one by one, zeros where they stick out."""
    height, width = block
    found = []
    for row, column in present.nonzero().tolist():
        piece = weight[row * height : (row + 1) * height, column * width : (column + 1) * width]
        full = weight.new_zeros(height, width)
        full[: piece.shape[0], : piece.shape[1]] = piece
        found.append(full)
    return torch.stack(found) if found else weight.new_zeros(0, height, width)


def dense(shape: tuple[int, int], present: Tensor, block: tuple[int, int]) -> Tensor:
    """Which elements of a matrix lie in blocks that are present."""
    full = present.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return full[: shape[0], : shape[1]]
