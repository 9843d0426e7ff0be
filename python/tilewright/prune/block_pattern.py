"""Where the blocks of a block-sparse weight are, as kernels read it (csrc/prune/block_sparse_linear.h)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK_SIZES = (8, 16, 32, 64, 128)


def check_lists(crow_indices: Tensor, col_indices: Tensor, rows: int, columns: int) -> None:
    """Refuses block lists (`crow_indices`, `col_indices`) that do not describe rows x columns blocks."""
    for name, value in (("crow_indices", crow_indices), ("col_indices", col_indices)):
        if value.dtype not in (torch.int32, torch.int64) or value.dim() != 1:
            raise ValueError(
                f"{name} must be a vector of int32 or int64, got {value.dtype}, {value.dim()} axes"
            )
    if len(crow_indices) != rows + 1:
        raise ValueError(
            f"crow_indices must have {rows + 1} entries for {rows} block rows, got {len(crow_indices)}"
        )
    steps = crow_indices.diff()
    if crow_indices[0] != 0 or crow_indices[-1] != len(col_indices) or bool((steps < 0).any()):
        raise ValueError(
            f"crow_indices must ascend from 0 to the number of blocks, {len(col_indices)}; got "
            f"{crow_indices[0].item()} .. {crow_indices[-1].item()}"
        )
    if len(col_indices) == 0:
        return
    low, high = col_indices.min().item(), col_indices.max().item()
    if low < 0 or high >= columns:
        raise ValueError(f"col_indices must lie in 0 .. {columns - 1}, got {low} .. {high}")
    row = torch.repeat_interleave(torch.arange(rows, device=steps.device), steps)
    if not bool((torch.diff(row * columns + col_indices) > 0).all()):
        raise ValueError("col_indices must ascend within each block row, each column once")


def lists_of(present: Tensor) -> tuple[Tensor, Tensor]:
    """`crow_indices` and `col_indices`, int32, of a boolean matrix (block rows, block columns)."""
    counts = present.sum(1)
    crow_indices = pad(counts.cumsum(0), (1, 0))
    return crow_indices.int(), present.nonzero()[:, 1].int()


def kernel_pattern(crow_indices: Tensor, col_indices: Tensor, columns: int) -> Tensor:
    """The lists by rows and by columns, and the order of work, in one int32 vector."""
    counts = crow_indices.diff()
    rows = torch.arange(len(counts), device=counts.device)
    row = torch.repeat_interleave(rows, counts)
    t_block = torch.sort(col_indices, stable=True).indices
    t_counts = torch.bincount(col_indices, minlength=columns)
    parts = (
        crow_indices,
        col_indices,
        row,
        torch.sort(counts, descending=True, stable=True).indices,
        pad(t_counts.cumsum(0), (1, 0)),
        row[t_block],
        t_block,
        torch.sort(t_counts, descending=True, stable=True).indices,
    )
    return torch.cat([part.int() for part in parts])


def _tiles(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """A view or copy (block rows, block columns, *block) of a matrix, zeros where it sticks out."""
    height, width = block
    out, into = weight.shape
    padded = pad(weight, (0, -into % width, 0, -out % height))
    return padded.view(-(-out // height), height, -(-into // width), width).transpose(1, 2)


def present_blocks(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """Which blocks (block rows, block columns) of a matrix hold anything but zeros."""
    return (_tiles(weight, block) != 0).flatten(2).any(2)


def gather_blocks(weight: Tensor, present: Tensor, block: tuple[int, int]) -> Tensor:
    """The values (blocks, *block) at the blocks that are present."""
    return _tiles(weight, block)[present].contiguous()


def scatter_blocks(values: Tensor, present: Tensor, shape: tuple[int, int]) -> Tensor:
    """The dense matrix that `gather_blocks` came from."""
    height, width = values.shape[1:]
    tiles = values.new_zeros(*present.shape, height, width)
    tiles[present] = values
    full = tiles.transpose(1, 2).reshape(present.shape[0] * height, present.shape[1] * width)
    return full[: shape[0], : shape[1]].contiguous()
