"""Where zeros may lie: blocks of any size, rows, columns, single elements, or n of every m neighbours.

A pattern divides a weight (out, in) into units that are kept or removed as a whole (`Block`), or says how
many of each m neighbours in a row stay (`NOfM`). Weights of more axes, such as a convolution's (out, in,
height, width), are seen as matrices (out, in * height * width).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._checks import check_count, nearest

LARGEST_GROUP = 32
_FORMS = "'n:m' (such as '2:4'), 'row', 'column', 'element' or a tilewright.prune.Block(rows, columns)"


def matrix_shape(shape: Sequence[int], name: str = "weight") -> tuple[int, int]:
    """(out, in) of a weight of that shape."""
    if len(shape) < 2:
        raise ValueError(f"{name} must have shape (out, in, ...), got {tuple(shape)}")
    columns = 1
    for size in shape[1:]:
        columns *= size
    return shape[0], columns


@dataclass(frozen=True)
class Block:
    """Units of `rows` x `columns` neighbours; None is as far as the weight goes.

    ``Block(16, 16)`` are blocks, ``Block(64, None)`` heads of 64 rows, ``Block(1, None)`` rows,
    ``Block(None, 1)`` columns, ``Block(1, 1)`` elements. Units at the lower and right edge hold what is left
    there.
    """

    rows: int | None
    columns: int | None

    def __post_init__(self) -> None:
        for name, value in (("rows", self.rows), ("columns", self.columns)):
            if value is not None:
                check_count(f"Block: {name}, unless it is None,", value)

    def __str__(self) -> str:
        names = {(1, None): "row", (None, 1): "column", (1, 1): "element"}
        rows, columns = ("all" if size is None else str(size) for size in (self.rows, self.columns))
        return names.get((self.rows, self.columns), f"block {rows}x{columns}")

    def sizes(self, shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of a unit in a weight of that shape, at least 1 each."""
        out, features = matrix_shape(shape)
        return self.rows or max(out, 1), self.columns or max(features, 1)

    def units(self, shape: Sequence[int]) -> tuple[int, int]:
        """How many units lie below and beside each other in a weight of that shape."""
        out, features = matrix_shape(shape)
        rows, columns = self.sizes(shape)
        return -(-out // rows), -(-features // columns)

    def check(self, shape: Sequence[int], name: str = "weight") -> None:
        """Raises ValueError where a weight of that shape cannot have this pattern: blocks fit everywhere."""
        matrix_shape(shape, name)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a weight of that shape can have this pattern."""
        return len(shape) >= 2

    def check_mask(self, mask: Tensor, name: str = "mask") -> None:
        """Raises ValueError where units are kept in part, and says how many."""
        down, across = self.units(mask.shape)
        rows, columns = self.sizes(mask.shape)
        kept = mask.flatten(1).to(torch.int64)
        padding = (0, across * columns - kept.shape[1], 0, down * rows - kept.shape[0])
        present = torch.nn.functional.pad(torch.ones_like(kept), padding)
        sums = [
            x.view(down, rows, across, columns).sum((1, 3))
            for x in (torch.nn.functional.pad(kept, padding), present)
        ]
        broken = int(((sums[0] != 0) & (sums[0] != sums[1])).sum())
        if broken:
            raise ValueError(
                f"{name}: {broken} of {down * across} units of pattern '{self}' are kept in part"
            )


@dataclass(frozen=True)
class NOfM:
    """Of every `m` neighbours in a row, from its start on, `n` are kept."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m <= LARGEST_GROUP:
            raise ValueError(
                f"pattern '{self}': needs 1 <= n < m <= {LARGEST_GROUP}, got n = {self.n}, m = {self.m}"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def check(self, shape: Sequence[int], name: str = "weight") -> None:
        """Raises ValueError where a weight of that shape cannot have this pattern."""
        features = matrix_shape(shape, name)[1]
        if features % self.m:
            raise ValueError(
                f"{name}: pattern '{self}' needs rows of a multiple of {self.m}, got {features} columns"
                f" in shape {tuple(shape)}"
            )

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a weight of that shape can have this pattern."""
        return len(shape) >= 2 and matrix_shape(shape)[1] % self.m == 0

    def check_sparsity(self, sparsity: float | None) -> None:
        """Raises ValueError for a sparsity that is not this pattern's own; None is."""
        removed = 1 - self.n / self.m
        if sparsity is not None and abs(sparsity - removed) > 1e-6:
            raise ValueError(
                f"sparsity: pattern '{self}' removes {removed:g}, got {sparsity!r}: leave it out"
            )

    def check_mask(self, mask: Tensor, name: str = "mask") -> None:
        """Raises ValueError where more than n of m neighbours are kept, and says how often."""
        self.check(mask.shape, name)
        kept = mask.reshape(-1, self.m).sum(1)
        broken = int((kept > self.n).sum())
        if broken:
            raise ValueError(f"{name}: {broken} of {len(kept)} groups keep more than {self}")


Pattern: TypeAlias = Block | NOfM

_NAMED = {"row": Block(1, None), "column": Block(None, 1), "element": Block(1, 1)}


def parse_pattern(pattern: Any) -> Pattern:
    """The pattern meant by "2:4", "n:m", "row", "column", "element", a `Block` or an `NOfM`."""
    if isinstance(pattern, (Block, NOfM)):
        return pattern
    if not isinstance(pattern, str):
        raise TypeError(f"pattern must be {_FORMS}, got {pattern!r}")
    if pattern in _NAMED:
        return _NAMED[pattern]
    numbers = pattern.split(":")
    if len(numbers) != 2 or not all(number.isascii() and number.isdigit() for number in numbers):
        raise ValueError(f"pattern must be {_FORMS}, got {pattern!r}{nearest(pattern, _NAMED)}")
    return NOfM(int(numbers[0]), int(numbers[1]))
