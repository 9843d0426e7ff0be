"""Block-sparse layers that the tests of several files use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tests.reference import block_sparse_linear as reference
from torch import Tensor

from tilewright.prune import block_pattern


@dataclass
class Layer:
    """A weight with blocks, in both forms."""

    weight: Tensor
    present: Tensor
    values: Tensor
    pattern: Tensor

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block."""
        return tuple(self.values.shape[1:])


def make_layer(
    out: int,
    into: int,
    block: tuple[int, int],
    density: float,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Layer:
    """Some blocks of a random weight; every third block row is empty where density allows one."""
    generator = torch.Generator().manual_seed(seed)
    grid = (-(-out // block[0]), -(-into // block[1]))
    present = torch.rand(grid, generator=generator) < density
    if 0 < density < 1:
        present[2::3] = False
    weight = torch.randn(out, into, generator=generator) / max(into * density, 1) ** 0.5
    weight = (weight * reference.dense((out, into), present, block)).to(dtype)
    crow_indices, col_indices = block_pattern.lists_of(present)
    pattern = block_pattern.kernel_pattern(crow_indices, col_indices, grid[1])
    values = reference.blocks(weight, present, block)
    return Layer(weight.to(device), present.to(device), values.to(device), pattern.to(device))


def random(*shape: int, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 1) -> Tensor:
    """Normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)
