"""Weights of which n of every m neighbours along a row are kept, in a form without the others.

The compressed form of a weight ``(out, in)`` is two plain tensors, `values` and `indices`; docs/prune/
semi_structured.md says bit by bit what they hold. Exact zeros count as pruned, -0.0 among them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import FLOATS, check_device, check_dtype, check_shape, check_tensor
from .ops import semi_structured as ops
from .patterns import NOfM, parse_pattern

_GROUPS = (4, 8, 16)  # where a pattern is looked for


def n_of_m(pattern: str | NOfM) -> NOfM:
    """The pattern meant by "2:4" and the like."""
    parsed = parse_pattern(pattern)
    if not isinstance(parsed, NOfM):
        raise ValueError(f'pattern must be "n:m" such as "2:4", got {pattern!r}')
    return parsed


class Compressed(NamedTuple):
    """A weight's compressed form.

    Attributes:
        values: ``(out, in / m * n)``: a row's kept elements in order, n of each group.
        indices: uint8 ``(out, ceil(in / 8))``: where they are.
    """

    values: Tensor
    indices: Tensor


def _check_weight(weight: Tensor, mask: Tensor | None) -> None:
    check_tensor("weight", weight)
    check_dtype("weight", weight, FLOATS)
    if weight.dim() != 2:
        raise ValueError(f"weight must have shape (out, in), got {tuple(weight.shape)}")
    if mask is None:
        return
    check_tensor("mask", mask)
    check_dtype("mask", mask, (torch.bool,))
    check_shape("mask", mask, weight.shape, "(out, in)")
    check_device("mask", mask, weight.device, "weight")
    stray = torch.nonzero((weight != 0) & ~mask)
    if len(stray):
        row, column = stray[0].tolist()
        raise ValueError(
            f"weight is not zero where the mask prunes it, at row {row}, column {column} and "
            f"{len(stray) - 1} other places: multiply it by the mask first"
        )


def _group_counts(weight: Tensor, mask: Tensor | None, m: int) -> Tensor:
    """How many elements each group keeps, (out, groups)."""
    kept = weight != 0 if mask is None else mask
    return kept.reshape(len(kept), kept.shape[1] // m, m).sum(-1)


def fitting_pattern(weight: Tensor, mask: Tensor | None = None) -> NOfM:
    """ "2:4" if the zeros allow it, else the n:m with m of 4, 8 or 16 that keeps the smallest share.

    Args:
        weight: ``(out, in)``.
        mask: bool ``(out, in)``, True where it is kept. None: where it is not zero.

    Raises:
        ValueError: no pattern represents the zeros; the message says how full the groups are.
    """
    _check_weight(weight, mask)
    out, columns = weight.shape
    fullest = {
        m: max(int(_group_counts(weight, mask, m).max()), 1) if weight.numel() else 1
        for m in _GROUPS
        if columns % m == 0
    }
    if fullest.get(4, 4) <= 2:
        return NOfM(2, 4)
    fitting = [NOfM(n, m) for m, n in fullest.items() if n < m]
    if fitting:
        return min(fitting, key=lambda p: (p.n / p.m, p.m))
    if not fullest:
        raise ValueError(
            f"weight ({out}, {columns}) fits no n:m pattern: its rows of {columns} do not divide into groups "
            f"of {', '.join(map(str, _GROUPS))}"
        )
    found = ", ".join(f"{n} of {m}" for m, n in fullest.items())
    raise ValueError(f"weight ({out}, {columns}) fits no n:m pattern: its fullest groups keep {found}")


def compress_weight(weight: Tensor, pattern: str | NOfM = "2:4", mask: Tensor | None = None) -> Compressed:
    """The kept elements of a weight and their positions; `decompress_weight` gives the same bits back.

    A group that keeps fewer than n is filled up with the first of its others, as zeros.

    Args:
        weight: ``(out, in)``, in a multiple of m; float32, float16, bfloat16, float64. Any strides.
        pattern: "n:m", 1 <= n < m <= 32.
        mask: bool ``(out, in)``, True where it is kept; it is zero elsewhere. None: where it is not zero.

    Raises:
        TypeError, ValueError: an argument that is not of its kind; a group that keeps more than n, named by
            its row and columns.
    """
    pattern = n_of_m(pattern)
    _check_weight(weight, mask)
    n, m = pattern.n, pattern.m
    if weight.shape[1] % m:
        raise ValueError(
            f"weight has rows of {weight.shape[1]} elements, which do not divide into groups of {m}"
        )
    if weight.numel():
        counts = _group_counts(weight, mask, m)
        full = torch.nonzero(counts > n)
        if len(full):
            row, group = full[0].tolist()
            raise ValueError(
                f"weight does not fit {pattern}: row {row}, group {group} (columns {group * m} to "
                f"{group * m + m - 1}) keeps {int(counts[row, group])}, and so too many do {len(full)} groups"
            )
    return Compressed(*ops.compress(weight.detach(), mask, n, m))


def decompress_weight(values: Tensor, indices: Tensor, pattern: str | NOfM = "2:4") -> Tensor:
    """The dense weight ``(out, in)``; pruned elements are +0.0."""
    pattern = n_of_m(pattern)
    check_compressed(values, indices, pattern)
    dense: Tensor = ops.decompress(values.detach().contiguous(), indices.contiguous(), pattern.n, pattern.m)
    return dense


def check_compressed(values: Tensor, indices: Tensor, pattern: NOfM) -> None:
    """Refuses what is no compressed form; looks at every position, which waits for a device."""
    check_tensor("values", values)
    check_dtype("values", values, FLOATS)
    if values.dim() != 2 or values.shape[1] % pattern.n:
        raise ValueError(
            f"values must have shape (out, in / {pattern.m} * {pattern.n}), got {tuple(values.shape)}"
        )
    check_tensor("indices", indices)
    check_dtype("indices", indices, (torch.uint8,))
    out, columns = values.shape[0], ops.columns_of(values, pattern.n, pattern.m)
    check_shape("indices", indices, (out, -(-columns // 8)), "(out, ceil(in / 8))")
    check_device("indices", indices, values.device, "values")
    wrong = torch.nonzero(wrong_groups(indices, columns, pattern))
    if len(wrong):
        row, group = wrong[0].tolist()
        raise ValueError(f"indices are not those of {pattern}: row {row}, group {group}")


def wrong_groups(indices: Tensor, columns: int, pattern: NOfM) -> Tensor:
    """Which groups (out, groups) have no valid positions."""
    n, m = pattern.n, pattern.m
    if pattern == NOfM(2, 4):
        nibbles = torch.stack((indices & 15, indices >> 4), dim=-1).flatten(1)[:, : columns // 4]
        return (nibbles & 3) >= nibbles >> 2
    bits = (indices[..., None] >> torch.arange(8, dtype=torch.uint8, device=indices.device)) & 1
    return bits.flatten(1)[:, :columns].reshape(len(bits), columns // m, m).sum(-1) != n


# ---- torch's own compressed form ----


def _torch_order(meta: Tensor) -> Tensor:
    """Where torch's CUTLASS form keeps element (row, column) of the 16-bit metadata, as (rows, columns).

    Rows are dealt in 32s: eight apart become neighbours. Of each square of two by two, the corner above on
    the right and the one below on the left change places. Columns lie in memory two by two.
    """
    rows, columns = meta.shape
    row = torch.arange(rows, device=meta.device)[:, None]
    column = torch.arange(columns, device=meta.device)[None, :]
    row = row // 32 * 32 + row % 8 * 4 + row % 32 // 8
    row, column = row // 2 * 2 + column % 2, column // 2 * 2 + row % 2
    return column // 2 * (2 * rows) + row * 2 + column % 2


def _check_torch_shape(out: int, columns: int, dtype: torch.dtype) -> None:
    wanted = 8 if dtype == torch.float32 else 16
    if out % 32 or columns % wanted or dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(
            f"torch's semi-structured form wants float16, bfloat16 or float32, out a multiple of 32 and in "
            f"one of {wanted}, got {dtype}, ({out}, {columns})"
        )


def to_torch_semi_structured(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(packed, meta) of torch's SparseSemiStructuredTensorCUTLASS, of a 2:4 weight.

    float32 has 1:2 there: each half of a group keeps one element, or this raises ValueError.
    """
    check_compressed(values, indices, NOfM(2, 4))
    out, columns = values.shape[0], 2 * values.shape[1]
    _check_torch_shape(out, columns, values.dtype)
    if values.dtype == torch.float32:
        nibbles = torch.stack((indices & 15, indices >> 4), dim=-1).flatten(1)
        first, second = nibbles & 3, nibbles >> 2
        if bool(((first > 1) | (second < 2)).any()):
            raise ValueError("torch's float32 form is 1:2, and a pair of this 2:4 weight keeps both elements")
        halves = torch.stack((first, second - 2), dim=-1)  # which of its pair
        pairs = torch.where(halves == 0, 0b0100, 0b1110)
        indices = (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)
    words = indices.contiguous().view(torch.int16)
    meta = torch.empty_like(words).view(-1)
    meta[_torch_order(words).view(-1)] = words.view(-1)
    return values.detach().clone(), meta.view(words.shape)


def from_torch_semi_structured(packed: Tensor, meta: Tensor) -> Compressed:
    """The 2:4 form of torch's SparseSemiStructuredTensorCUTLASS, whose attributes these are.

    cuSPARSELt's form is known to it alone: make those tensors dense first.
    """
    check_tensor("packed", packed)
    if packed.dim() != 2:
        raise ValueError(f"packed must have shape (out, in / 2), got {tuple(packed.shape)}")
    out, columns = packed.shape[0], 2 * packed.shape[1]
    _check_torch_shape(out, columns, packed.dtype)
    check_tensor("meta", meta)
    check_dtype("meta", meta, (torch.int16,))
    share = 8 if packed.dtype == torch.float32 else 16
    check_shape("meta", meta, (out, columns // share), f"(out, in / {share})")
    words = meta.reshape(-1)[_torch_order(meta)]
    indices = words.contiguous().view(torch.uint8)
    if packed.dtype == torch.float32:
        first = torch.where(indices & 15 == 0b0100, 0, 1)
        second = torch.where(indices >> 4 == 0b0100, 2, 3)
        nibbles = first | second << 2
        indices = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).to(torch.uint8)
    found = Compressed(packed.detach().clone(), indices.contiguous())
    check_compressed(*found, NOfM(2, 4))
    return found
