"""Maps of codes: what masks are built from and combined as, before they become lists.

A code says what a block of queries sees of a block of keys: 0 nothing, 1 everything, 2 + t what bit table t
says. A table is int32 (block_q, ceil(block_kv / 32)): bit j of word w of row i is set where query i sees key
32 w + j.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from .ops import code_dtype

Function = TypeVar("Function", bound=Callable[..., Any])
ABSENT, FULL, PARTIAL = 0, 1, 2
_CHUNK_ELEMENTS = 1 << 23  # that are evaluated at a time
_FEW_COMBINATIONS = 1 << 16


def once(function: Function) -> Function:
    """Keeps what a function of lengths and options made last; a compiled graph holds it as a constant."""
    kept = functools.lru_cache(maxsize=64)(function)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        return kept(*arguments)

    return cast("Function", torch.compiler.assume_constant_result(call))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Geometry:
    """Lengths and block sizes of a mask."""

    block_q: int
    block_kv: int
    q_len: int
    kv_len: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The arguments it is made of, as numbers, also where a compiled graph has symbols for lengths."""
        return self.block_q, self.block_kv, len(range(self.q_len)), len(range(self.kv_len))

    @property
    def q_blocks(self) -> int:
        """Blocks of queries."""
        return -(-self.q_len // self.block_q)

    @property
    def kv_blocks(self) -> int:
        """Blocks of keys."""
        return -(-self.kv_len // self.block_kv)

    @property
    def is_ragged(self) -> bool:
        """Whether a last block is shorter than the others."""
        return self.q_len % self.block_q != 0 or self.kv_len % self.block_kv != 0

    def edges(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(nq, 1), 2 for a shorter last block of queries, and (1, nk), 1 for one of keys; they are added."""
        rows = torch.zeros(self.q_blocks, 1, dtype=torch.int64, device=device)
        columns = torch.zeros(1, self.kv_blocks, dtype=torch.int64, device=device)
        if self.q_len % self.block_q:
            rows[-1] = 2
        if self.kv_len % self.block_kv:
            columns[:, -1] = 1
        return rows, columns

    def existing(self, device: torch.device) -> Tensor:
        """Tables of what exists of a block, for each of the four sums of `edges`."""
        rows = torch.arange(self.block_q, device=device)[:, None]
        columns = torch.arange(self.block_kv, device=device)
        last_row = self.q_len % self.block_q or self.block_q
        last_column = self.kv_len % self.block_kv or self.block_kv
        limits = [(r, c) for r in (self.block_q, last_row) for c in (self.block_kv, last_column)]
        return pack(torch.stack([(rows < r) & (columns < c) for r, c in limits]))

    def no_tables(self, device: torch.device) -> Tensor:
        """An empty stack of tables."""
        return torch.empty(0, self.block_q, -(-self.block_kv // 32), dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Draft:
    """A map of codes (batch, heads, query blocks, key blocks), or a part of one, and its tables."""

    codes: Tensor
    tables: Tensor


def pack(seen: Tensor) -> Tensor:
    """Bit tables (n, block_q, words) of bool (n, block_q, block_kv)."""
    keys = seen.shape[-1]
    if not len(seen):  # whose strides permit no view
        return seen.new_empty((0, seen.shape[1], -(-keys // 32)), dtype=torch.int32)
    padded = torch.nn.functional.pad(seen, (0, -keys % 32)).contiguous().view(torch.uint8)
    shifts = torch.arange(8, dtype=torch.uint8, device=seen.device)
    octets = padded.view(*padded.shape[:-1], padded.shape[-1] // 8, 8) << shifts
    words: Tensor = octets.sum(-1, dtype=torch.uint8).view(torch.int32)
    return words


def unpack(tables: Tensor, block_kv: int) -> Tensor:
    """Bool (n, block_q, block_kv) of bit tables (n, block_q, words)."""
    if not len(tables):  # whose strides permit no view
        return tables.new_empty((0, tables.shape[1], block_kv), dtype=torch.bool)
    shifts = torch.arange(8, dtype=torch.uint8, device=tables.device)
    bits = tables.contiguous().view(torch.uint8)[..., None] >> shifts & 1
    return bits.flatten(-2)[..., :block_kv].bool()


def distinct(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The different ones of integer or bool rows (n, ...), and the number of its row among them for each."""
    flat = rows.flatten(1).long()
    factors = torch.arange(1, flat.shape[1] + 1, device=rows.device) * 0x2545F4914F6CDD1D
    keys = ((flat + 1) * (factors ^ (factors >> 29))).sum(1)  # wraps: a hash
    hashes, which = torch.unique(keys, return_inverse=True)
    first = _first_of(which, len(hashes))
    if bool((flat[first][which] == flat).all()):
        return rows[first], which
    unique, which = torch.unique(rows, dim=0, return_inverse=True)
    return unique, which


def _first_of(which: Tensor, count: int) -> Tensor:
    """Where each of the numbers below `count` comes first."""
    places = torch.arange(len(which), device=which.device)
    first = torch.full((count,), len(which), dtype=torch.int64, device=which.device)
    return first.scatter_reduce(0, which, places, "amin")


def classify(tables: Tensor, geometry: Geometry, edges: Tensor) -> tuple[Tensor, Tensor]:
    """Codes for tables (n, block_q, words) of blocks on these edges (n), and the tables left, each once."""
    exists = geometry.existing(tables.device)[edges]
    seen = tables & exists
    codes = (seen == exists).flatten(1).all(1).long()  # FULL, or ABSENT for now
    partial = (codes != FULL) & (seen != 0).flatten(1).any(1)
    kept, which = distinct(tables[partial])
    codes[partial] = which + PARTIAL
    return codes, kept


def combine(
    op: Callable[..., Tensor], operands: Sequence[Draft], geometry: Geometry, edges: Tensor | None = None
) -> Draft:
    """What `op`, a bitwise function of tables, makes of maps that broadcast against each other.

    Each combination of codes that meets somewhere is worked out once. Maps that are a part of the whole come
    with the kinds of their `edges`, int64 0 to 3, which broadcast against them.
    """
    device = operands[0].codes.device
    sizes = [len(operand.tables) + PARTIAL for operand in operands]
    met = operands[0].codes.long()
    for operand, size in zip(operands[1:], sizes[1:], strict=True):
        met = met * size + operand.codes
    if edges is None and geometry.is_ragged:
        edges = torch.add(*geometry.edges(device))
    if edges is not None:
        met = met * 4 + edges
    combinations, which = _number(met, math.prod(sizes) * (1 if edges is None else 4))
    rest, edge = combinations, torch.zeros_like(combinations)
    if edges is not None:
        rest, edge = combinations // 4, combinations % 4
    full = geometry.existing(device)[:1]
    tables = []
    for operand, size in zip(reversed(operands), reversed(sizes), strict=True):
        tables.append(torch.cat([torch.zeros_like(full), full, operand.tables])[rest % size])
        rest = rest // size
    codes, kept = classify(op(*reversed(tables)) & full, geometry, edge)
    return Draft(codes.to(code_dtype(len(kept)))[which], kept)


def replace(draft: Draft, rows: slice, columns: slice, part: Draft) -> Draft:
    """The draft with another part of its map, and the tables of both."""
    tables = torch.cat([draft.tables, part.tables])
    codes = draft.codes.to(code_dtype(len(tables)), copy=True)
    new = part.codes.to(codes.dtype)
    codes[:, :, rows, columns] = new + (new >= PARTIAL).to(codes.dtype) * len(draft.tables)
    return Draft(codes, tables)


def _number(values: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """The different values, ascending, and for each element which of them it is; all are below `limit`."""
    if limit > max(values.numel(), _FEW_COMBINATIONS):
        different, which = torch.unique(values, return_inverse=True)
        return different, which
    seen = torch.zeros(limit, dtype=torch.bool, device=values.device)
    seen[values.flatten()] = True
    present = seen.nonzero().squeeze(1)
    places = torch.zeros(limit, dtype=torch.int64, device=values.device)
    places[present] = torch.arange(len(present), device=values.device)
    return present, places[values]


def settle(draft: Draft, geometry: Geometry) -> Draft:
    """The same mask without tables that nobody names or that are there twice.

    Tables are to be neither empty nor full, but on a ragged edge they may be: those are looked at here.
    """
    whole, last = slice(None), slice(-1, None)
    rows, columns = geometry.edges(draft.codes.device)
    parts = [(last, whole)] if geometry.q_len % geometry.block_q else []
    parts += [(whole, last)] if geometry.kv_len % geometry.block_kv else []
    for i, j in parts:
        part = Draft(draft.codes[:, :, i, j], draft.tables)
        edges = rows[i] + columns[:, j]
        draft = replace(draft, i, j, combine(lambda table: table, [part], geometry, edges))
    size = len(draft.tables) + PARTIAL
    used = torch.bincount(draft.codes.flatten(), minlength=size)[PARTIAL:] > 0
    kept, which = distinct(draft.tables[used])
    if len(kept) == len(draft.tables):
        return draft
    renamed = torch.arange(size, device=used.device)
    renamed[PARTIAL:][used] = which + PARTIAL
    return Draft(renamed.to(code_dtype(len(kept)))[draft.codes.long()], kept)


def evaluate(
    kinds: Tensor, sees: Callable[[Tensor], Tensor], geometry: Geometry, keys: Tensor | None = None
) -> Draft:
    """The map for `kinds` (batch, heads, query blocks, key blocks), whose partial blocks are looked into.

    Args:
        kinds: ABSENT, FULL or PARTIAL for each block.
        sees: takes int64 (n, 4): batch, head, block of queries and block of keys of n partial blocks. Gives
            bool (n, block_q, block_kv); what it says of elements that do not exist does not matter.
        geometry: of the mask.
        keys: like kinds; partial blocks of the same key have the same elements, so one of them is enough.
    """
    partial = kinds == PARTIAL
    where = partial.nonzero()
    which = torch.arange(len(where), device=kinds.device)
    if keys is not None:
        different, which = torch.unique(keys[partial], return_inverse=True)
        where = where[_first_of(which, len(different))]
    tables, numbers, known = [geometry.no_tables(kinds.device)], [which.new_empty(0)], 0
    for part in torch.split(where, max(1, _CHUNK_ELEMENTS // (geometry.block_q * geometry.block_kv))):
        if not len(part):
            continue
        kept, number = distinct(pack(sees(part)))
        tables.append(kept)
        numbers.append(number + known)
        known += len(kept)
    codes = kinds.to(torch.int32, copy=True)
    codes[partial] = (torch.cat(numbers)[which] + PARTIAL).int()
    return combine(lambda table: table, [Draft(codes, torch.cat(tables))], geometry)
