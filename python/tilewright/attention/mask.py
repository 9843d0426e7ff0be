"""`BlockMask`: which blocks of keys each block of queries sees, and which elements of those seen in part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .. import _backend
from .._checks import check_count, check_device, check_tensor
from . import builders
from .codes import ABSENT, FULL, PARTIAL, Draft, Geometry, combine, evaluate, pack, unpack

BlockSize = int | tuple[int, int]
_FAULTS = {
    1: "its count is negative or exceeds the capacity",
    2: "it names a block that does not exist",
    4: "it names a block more than once",
    8: "it names a bit table that does not exist",
}


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask:
    """A mask of attention in blocks. Make one by `from_dense`, `from_lists`, `from_torch`, or by a builder.

    A block of queries sees a block of keys not at all, in full, or in part; a partial block names a bit
    table. Where a length is no multiple of its block size the last block is shorter, and full as far as it
    goes.
    Masks combine by ``&``, ``|`` and ``~`` and compare by ``==``, element for element.

    Attributes:
        q2k_counts: int32 (Bm, Hm, nq), how many blocks of keys each block of queries sees. Bm is 1 or the
            batch size, Hm is 1, the number of key heads or that of query heads.
        q2k_indices: int32 (Bm, Hm, nq, capacity), which they are, ascending; undefined beyond the count.
        q2k_bits: like q2k_indices, -1 for a full block, else the number of its table. None if all are full.
        k2q_counts: the same for each block of keys, int32 (Bm, Hm, nk).
        k2q_indices: int32 (Bm, Hm, nk, capacity).
        k2q_bits: like k2q_indices.
        tables: int32 (T, block_q, ceil(block_kv / 32)), bit j of word w of row i: query i sees key 32 w + j.
        block_size: elements of a block of queries and of a block of keys.
        q_len: queries.
        kv_len: keys.
    """

    q2k_counts: Tensor
    q2k_indices: Tensor
    q2k_bits: Tensor | None
    k2q_counts: Tensor
    k2q_indices: Tensor
    k2q_bits: Tensor | None
    tables: Tensor
    block_size: tuple[int, int]
    q_len: int
    kv_len: int
    _flags: Tensor | None = None  # (Bm, Hm, nq), what the CUDA kernel found wrong with the caller's lists

    # ---- from what there is ----

    @staticmethod
    def from_dense(
        blocks: Tensor, block_size: BlockSize, q_len: int | None = None, kv_len: int | None = None
    ) -> BlockMask:
        """A mask of full blocks. On CUDA tensors nothing waits for the device.

        Args:
            blocks: bool (nq, nk), (Hm, nq, nk) or (Bm, Hm, nq, nk), any strides. True: the block is seen.
            block_size: 16 to 256, a multiple of 16, or a pair of such numbers for queries and keys.
            q_len: queries; by default all blocks are whole.
            kv_len: keys; by default all blocks are whole.
        """
        check_tensor("blocks", blocks)
        if blocks.dtype is not torch.bool:
            raise TypeError(f"blocks must have dtype bool, got {_dtype_name(blocks)}")
        blocks = _four_axes("blocks", blocks, 4, "(nq, nk), (heads, nq, nk) or (batch, heads, nq, nk)")
        block_q, block_kv = check_block_size(block_size)
        rows, columns = blocks.shape[2:]
        q_len = _check_length("q_len", q_len, rows, block_q)
        kv_len = _check_length("kv_len", kv_len, columns, block_kv)
        geometry = Geometry(block_q, block_kv, q_len, kv_len)
        return mask_of(Draft(blocks.view(torch.uint8), geometry.no_tables(blocks.device)), geometry)

    @staticmethod
    def from_lists(
        counts: Tensor,
        indices: Tensor,
        block_size: BlockSize,
        *,
        kv_len: int,
        q_len: int | None = None,
        bits: Tensor | None = None,
        tables: Tensor | None = None,
    ) -> BlockMask:
        """A mask whose blocks are listed for each block of queries, in any order.

        Args:
            counts: int32 or int64 (nq,), (Hm, nq) or (Bm, Hm, nq), how many blocks of keys are seen.
            indices: the same dtypes (..., nq, capacity), which they are; the rest does not matter.
            block_size: as for `from_dense`.
            kv_len: keys.
            q_len: queries; by default all blocks of queries are whole.
            bits: like indices, -1 for a full block, else the number of its table; None: all blocks are full.
            tables: bool (T, block_q, block_kv), True where the query sees the key, or packed as in `tables`.

        Raises:
            ValueError: on a CPU, if an index is out of range or repeated. On CUDA such entries are left out,
                and `validate` raises.
        """
        block_q, block_kv = check_block_size(block_size)
        counts = _check_list("counts", counts)
        counts = _four_axes("counts", counts, 3, "(nq,), (heads, nq) or (batch, heads, nq)")
        q_len = _check_length("q_len", q_len, counts.shape[2], block_q)
        geometry = Geometry(block_q, block_kv, q_len, _check_size("kv_len", kv_len, 0))
        indices = _check_entries("indices", indices, counts, geometry.kv_blocks)
        if (bits is None) != (tables is None):
            raise ValueError("bits and tables go together: give both, or neither if all blocks are full")
        packed = geometry.no_tables(counts.device)
        if bits is not None and tables is not None:
            packed = _check_tables(tables, geometry, counts.device)
            bits = _check_entries("bits", bits, counts, len(packed))
            if bits.shape != indices.shape:
                raise ValueError(
                    f"bits must have the shape of indices, got {_sizes(bits)} and {_sizes(indices)}"
                )
        counts = counts.clamp(-1, indices.shape[3] + 1).int()
        codes, flags = torch.ops.tilewright.block_codes(
            counts, indices, bits, geometry.kv_blocks, len(packed)
        )
        if _on_gpu(counts):
            return mask_of(Draft(codes, packed), geometry, flags)
        _raise_for(flags, "counts, indices and bits: ")
        return mask_of(Draft(codes, packed), geometry)

    @staticmethod
    def from_torch(block_mask: Any) -> BlockMask:
        """A mask from FlexAttention's BlockMask. Its mask_mod is evaluated on partial blocks alone.

        Args:
            block_mask: a torch.nn.attention.flex_attention.BlockMask with block sizes of 16 to 256.
        """
        from torch.nn.attention import flex_attention

        if not isinstance(block_mask, flex_attention.BlockMask):
            raise TypeError(
                "block_mask must be a torch.nn.attention.flex_attention.BlockMask, "
                f"got {type(block_mask).__name__}"
            )
        block_q, block_kv = check_block_size(tuple(block_mask.BLOCK_SIZE), "block_mask.BLOCK_SIZE")
        geometry = Geometry(block_q, block_kv, *block_mask.seq_lengths)
        if block_mask.kv_num_blocks.shape[2] != geometry.q_blocks:
            raise ValueError(
                f"block_mask has {block_mask.kv_num_blocks.shape[2]} blocks of queries, which does not fit "
                f"its seq_lengths {block_mask.seq_lengths} and BLOCK_SIZE {block_mask.BLOCK_SIZE}"
            )
        kinds = PARTIAL * _listed(block_mask.kv_num_blocks, block_mask.kv_indices, geometry)
        if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
            full = _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, geometry)
            kinds = torch.where(full == 1, FULL, kinds)
        return mask_of(evaluate(kinds, _elements_of(block_mask.mask_mod, geometry), geometry), geometry)

    # ---- builders ----

    @staticmethod
    def causal(
        q_len: int,
        kv_len: int | None = None,
        *,
        block_size: BlockSize = 128,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """Each query sees the keys up to its own; the last of both are at the same position."""
        geometry = _geometry(q_len, kv_len, block_size)
        return _build(geometry, device, lambda: builders.causal(geometry))

    @staticmethod
    def sliding_window(
        seq_len: int,
        window: int,
        *,
        sink: int = 0,
        causal: bool = True,
        kv_len: int | None = None,
        block_size: BlockSize = 128,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """Each query sees the last `window` keys, its own among them, and the first `sink` keys.

        Args:
            seq_len: queries, and keys unless kv_len says otherwise.
            window: keys, 1 or more: query i sees keys i - window + 1 to i.
            sink: keys at the start that all later queries see (attention sinks).
            causal: False: i - window + 1 to i + window - 1, and the sink for all.
            kv_len: keys; the last query and the last key are at the same position.
            block_size: as for `from_dense`.
            device: of the lists.
        """
        geometry = _geometry(seq_len, kv_len, block_size)
        window, sink = _check_size("window", window, 1), _check_size("sink", sink, 0)
        return _build(geometry, device, lambda: builders.sliding_window(geometry, window, sink, causal))

    @staticmethod
    def dilated(
        seq_len: int,
        window: int,
        dilation: int,
        *,
        causal: bool = True,
        block_size: BlockSize = 128,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """Query i sees `window` keys: i, i - dilation, i - 2 dilation, ...; unless causal later ones too."""
        geometry = _geometry(seq_len, None, block_size)
        window, dilation = _check_size("window", window, 1), _check_size("dilation", dilation, 1)
        return _build(geometry, device, lambda: builders.dilated(geometry, window, dilation, causal))

    @staticmethod
    def prefix_lm(
        seq_len: int,
        prefix: int | Tensor | Sequence[int],
        *,
        block_size: BlockSize = 128,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """Causal, but all queries see the first `prefix` keys: one number, or one for each of the batch."""
        geometry = _geometry(seq_len, None, block_size)
        firsts = _integers("prefix", prefix).reshape(-1)
        if bool((firsts < 0).any()) or bool((firsts > seq_len).any()):
            raise ValueError(f"prefix must be between 0 and seq_len = {seq_len}, got {firsts.tolist()}")
        return _build(geometry, device, lambda: builders.prefix_lm(geometry, firsts))

    @staticmethod
    def document(
        cu_seqlens: Tensor | Sequence[int],
        *,
        causal: bool = False,
        block_size: BlockSize = 128,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """Packed sequences: each query sees the keys of its own document.

        Args:
            cu_seqlens: where documents start and end: integers (documents + 1,) that rise from 0.
            causal: keys up to the query's own alone.
            block_size: as for `from_dense`.
            device: of the lists; by default that of cu_seqlens, if it is a tensor.
        """
        starts = _integers("cu_seqlens", cu_seqlens)
        if starts.ndim != 1 or not len(starts) or int(starts[0]) != 0 or bool((starts.diff() < 0).any()):
            raise ValueError(
                "cu_seqlens must be (documents + 1,) numbers that start at 0 and never fall, "
                f"got {starts.tolist()}"
            )
        geometry = _geometry(int(starts[-1]), None, block_size)
        if device is None and isinstance(cu_seqlens, Tensor):
            device = cu_seqlens.device
        return _build(geometry, device, lambda: builders.document(geometry, starts, causal))

    @staticmethod
    def block_diagonal(
        seq_len: int,
        chunk: int,
        *,
        causal: bool = False,
        block_size: BlockSize = 128,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """Chunks of `chunk` elements that do not see each other; the last one may be shorter."""
        geometry = _geometry(seq_len, None, block_size)
        step = _check_size("chunk", chunk, 1)
        starts = torch.arange(0, seq_len + step, step, device="cpu").clamp(max=seq_len)
        return _build(geometry, device, lambda: builders.document(geometry, starts, causal))

    @staticmethod
    def bigbird(
        seq_len: int,
        *,
        window: int = 3,
        global_blocks: int = 1,
        random_blocks: int = 3,
        heads: int = 1,
        seed: int = 0,
        block_size: int = 128,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """BigBird (Zaheer et al., 2020), in whole blocks: near, global and random ones.

        Args:
            seq_len: queries and keys.
            window: blocks around a query's own, an odd number.
            global_blocks: blocks at the start that see all and are seen by all.
            random_blocks: further blocks of each block of queries, other ones for each head.
            heads: of the mask.
            seed: of the random blocks.
            block_size: 16 to 256, a multiple of 16.
            device: of the lists.
        """
        if not isinstance(block_size, int):
            raise TypeError(f"block_size must be one number here, got {block_size!r}")
        geometry = _geometry(seq_len, None, block_size)
        window = _check_size("window", window, 1)
        if window % 2 == 0:
            raise ValueError(f"window must be odd, got {window}: the same number of blocks on either side")
        first, others = (
            _check_size("global_blocks", global_blocks, 0),
            _check_size("random_blocks", random_blocks, 0),
        )
        heads = _check_size("heads", heads, 1)
        return _build(
            geometry, device, lambda: builders.bigbird(geometry, window, first, others, heads, seed)
        )

    # ---- algebra ----

    def __and__(self, other: BlockMask) -> BlockMask:
        """What both see. Needs equal block sizes and lengths; waits for a CUDA device, as `|` and `~` do."""
        return self._with(other, torch.bitwise_and, "&")

    def __or__(self, other: BlockMask) -> BlockMask:
        """What either sees."""
        return self._with(other, torch.bitwise_or, "|")

    def __invert__(self) -> BlockMask:
        """What this one does not see."""
        return mask_of(combine(torch.bitwise_not, [self._draft()], self._geometry), self._geometry)

    def __eq__(self, other: object) -> bool:
        """Whether both have the same shape and block size, and see the same elements."""
        if not isinstance(other, BlockMask):
            return NotImplemented
        if self._geometry != other._geometry or self.shape[:2] != other.shape[:2]:
            return False
        drafts = [self._draft(), other.to(self.device)._draft()]
        return not bool(combine(torch.bitwise_xor, drafts, self._geometry).codes.any())

    __hash__ = None  # type: ignore[assignment]

    def _with(self, other: BlockMask, op: Callable[..., Tensor], sign: str) -> BlockMask:
        if not isinstance(other, BlockMask):
            return NotImplemented
        for name in ("block_size", "q_len", "kv_len"):
            mine, its = getattr(self, name), getattr(other, name)
            if mine != its:
                raise ValueError(f"masks combined by {sign} must have the same {name}, got {mine} and {its}")
        for axis, name in enumerate(("batch size", "number of heads")):
            sizes = {self.shape[axis], other.shape[axis]} - {1}
            if len(sizes) > 1:
                raise ValueError(
                    f"masks combined by {sign} must have the same {name} or 1, "
                    f"got {self.shape[axis]} and {other.shape[axis]}"
                )
        if self.device != other.device:
            raise ValueError(
                f"masks combined by {sign} must be on one device, got {self.device} and {other.device}"
            )
        drafts = [self._draft(), other._draft()]
        return mask_of(combine(op, drafts, self._geometry), self._geometry)

    # ---- what it is ----

    @property
    def _geometry(self) -> Geometry:
        return Geometry(*self.block_size, self.q_len, self.kv_len)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(Bm, Hm, nq, nk): batches and heads of the mask, blocks of queries, blocks of keys."""
        batch, heads, rows = self.q2k_counts.shape
        return batch, heads, rows, self.k2q_counts.shape[2]

    @property
    def device(self) -> torch.device:
        """Where the lists are."""
        return self.q2k_counts.device

    @property
    def nbytes(self) -> int:
        """Bytes of lists and tables."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    @property
    def density(self) -> float:
        """The share of blocks that are seen, in full or in part: what kernels work on, 0 to 1."""
        batch, heads, rows, columns = self.shape
        return float(self.q2k_counts.sum()) / max(1, batch * heads * rows * columns)

    def to_dense(self) -> Tensor:
        """Bool (Bm, Hm, nq, nk): the blocks that are seen, in full or in part."""
        return self._draft().codes != ABSENT

    def to_mask(self) -> Tensor:
        """Bool (Bm, Hm, q_len, kv_len): which query sees which key. A byte a pair: for small masks."""
        draft, geometry = self._draft(), self._geometry
        full = unpack(geometry.existing(self.device)[:1], geometry.block_kv)
        kinds = torch.cat([torch.zeros_like(full), full, unpack(draft.tables, geometry.block_kv)])
        elements = kinds[draft.codes.long()].transpose(3, 4).flatten(4, 5).flatten(2, 3)
        return elements[:, :, : self.q_len, : self.kv_len].contiguous()

    def _draft(self) -> Draft:
        lists = (self.q2k_counts, self.q2k_indices, self.q2k_bits)
        codes, _ = torch.ops.tilewright.block_codes(*lists, self.shape[3], len(self.tables))
        return Draft(codes, self.tables)

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> BlockMask:
        """The mask on another device, or this one if it is there already."""
        tensors = self._tensors()
        moved: dict[str, Any] = {name: t.to(device, non_blocking=non_blocking) for name, t in tensors.items()}
        return self if all(moved[name] is t for name, t in tensors.items()) else replace(self, **moved)

    def validate(self) -> BlockMask:
        """Checks all lists and returns the mask; waits for the device.

        Raises:
            ValueError: lists given to `from_lists` were wrong, or the tensors are no mask (for those who fill
                them themselves): out of range, not ascending, k2q not the transpose of q2k.
        """
        if self._flags is not None:
            _raise_for(self._flags, "counts, indices and bits given to from_lists: ")
        geometry = self._geometry
        check_block_size(self.block_size)
        shape = (geometry.q_blocks, geometry.kv_blocks)
        if self.shape[2:] != shape:
            raise ValueError(
                f"q2k_counts and k2q_counts must have {shape} rows to fit the lengths, got {self.shape[2:]}"
            )
        _check_tables(self.tables, geometry, self.device)
        codes = []
        for name, blocks in (("q2k", shape[1]), ("k2q", shape[0])):
            lists = [getattr(self, f"{name}_{part}") for part in ("counts", "indices", "bits")]
            codes.append(_check_mask_lists(name, lists, blocks, len(self.tables)))
        if not torch.equal(codes[0], codes[1].transpose(2, 3)):
            raise ValueError("k2q must hold the same blocks as q2k, seen from the keys; it does not")
        return self

    def __repr__(self) -> str:
        batch, heads, _, _ = self.shape
        partial = int((self._draft().codes >= PARTIAL).sum())
        total = int(self.q2k_counts.sum())
        return (
            f"BlockMask(batch={batch}, heads={heads}, q_len={self.q_len}, kv_len={self.kv_len}, "
            f"block_size={self.block_size}, density={self.density:.4f}, "
            f"blocks={total - partial} full + {partial} partial, tables={len(self.tables)}, "
            f"{self.nbytes / 1024:.1f} KiB, device={self.device})"
        )

    def plot(self, batch: int = 0, head: int = 0, ax: Any = None) -> Any:
        """Draws the blocks of one head with matplotlib (the extra `plot`) and returns the axes."""
        try:
            import matplotlib.pyplot as plt
            from matplotlib.colors import ListedColormap
            from matplotlib.patches import Patch
        except ImportError as error:
            raise ImportError("BlockMask.plot needs matplotlib: pip install 'tilewright[plot]'") from error
        if not (0 <= batch < self.shape[0] and 0 <= head < self.shape[1]):
            raise IndexError(
                f"the mask has {self.shape[0]} batches and {self.shape[1]} heads, got {batch}, {head}"
            )
        axes = plt.subplots()[1] if ax is None else ax
        kinds = self._draft().codes[batch, head].clamp(max=PARTIAL).cpu().numpy()
        names, colours = ("absent", "full", "partial"), ("#f2f2f2", "#1f4e79", "#8fb8de")
        block_q, block_kv = self.block_size
        extent = (0, kinds.shape[1] * block_kv, kinds.shape[0] * block_q, 0)
        axes.imshow(
            kinds,
            cmap=ListedColormap(colours),
            vmin=0,
            vmax=2,
            extent=extent,
            interpolation="nearest",
            aspect="auto",
        )
        axes.set(xlim=(0, max(1, self.kv_len)), ylim=(max(1, self.q_len), 0), xlabel="key", ylabel="query")
        axes.set_title(f"density {self.density:.3f}, blocks {block_q} x {block_kv}")
        handles = [Patch(color=colour, label=name) for name, colour in zip(names, colours, strict=True)]
        axes.legend(handles=handles, loc="upper right", fontsize="small")
        return axes


# ---- from drafts to lists ----


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda or _backend.is_emulated()


def mask_of(draft: Draft, geometry: Geometry, flags: Tensor | None = None) -> BlockMask:
    """The lists of a map of codes: as long as needed on a CPU; on a GPU nobody waits to see how long."""
    codes, with_bits = draft.codes, len(draft.tables) > 0
    if _on_gpu(codes) or torch.compiler.is_compiling():
        capacities = [codes.shape[3], codes.shape[2]]
    else:
        counts = torch.ops.tilewright.block_counts(codes)
        capacities = [int(count.max()) if count.numel() else 0 for count in counts]
    q_capacity, kv_capacity = (max(1, capacity) for capacity in capacities)
    lists = torch.ops.tilewright.block_lists(codes, q_capacity, kv_capacity, with_bits)
    q2k = (lists[0], lists[1], lists[2] if with_bits else None)
    k2q = (lists[3], lists[4], lists[5] if with_bits else None)
    size = (geometry.block_q, geometry.block_kv)
    return BlockMask(*q2k, *k2q, draft.tables, size, geometry.q_len, geometry.kv_len, flags)


def _build(geometry: Geometry, device: torch.device | str | None, draft: Callable[[], Draft]) -> BlockMask:
    """The mask of a builder's map, which is made on the CPU, whatever the default device is."""
    target = torch.get_default_device() if device is None else torch.device(device)
    with torch.device("cpu"):
        return mask_of(draft(), geometry).to(target)


def _listed(counts: Tensor, indices: Tensor, geometry: Geometry) -> Tensor:
    """1 for each block in FlexAttention's lists, int32 (batch, heads, nq, nk)."""
    codes: Tensor
    codes, flags = torch.ops.tilewright.block_codes(counts.int(), indices.int(), None, geometry.kv_blocks, 0)
    _raise_for(flags, "block_mask: ")
    return codes.int()


def _elements_of(mask_mod: Callable[..., Tensor], geometry: Geometry) -> Callable[[Tensor], Tensor]:
    """What a mask_mod says of blocks, given as rows of (batch, head, block of queries, block of keys)."""
    from torch.nn.attention.flex_attention import create_mask

    def sees(blocks: Tensor) -> Tensor:
        batch, head, q0, k0 = blocks.int().unbind(1)
        q0, k0 = q0 * geometry.block_q, k0 * geometry.block_kv

        def mod(block: Tensor, _: Tensor, i: Tensor, j: Tensor) -> Tensor:
            # A mask_mod may index tensors of the mask's lengths: elements that do not exist stay within them.
            q = (q0[block] + i).clamp(max=geometry.q_len - 1)
            k = (k0[block] + j).clamp(max=geometry.kv_len - 1)
            return mask_mod(batch[block], head[block], q, k)

        sizes = (len(blocks), 1, geometry.block_q, geometry.block_kv)
        seen: Tensor = create_mask(mod, *sizes, device=str(blocks.device))
        return seen.squeeze(1)

    return sees


# ---- checks ----


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _sizes(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def check_block_size(block_size: Any, name: str = "block_size") -> tuple[int, int]:
    """The sizes of blocks of queries and of keys."""
    pair = (block_size, block_size) if isinstance(block_size, int) else block_size
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(type(size) is int for size in pair)):
        raise TypeError(f"{name} must be an int or a pair of them (queries, keys), got {block_size!r}")
    if any(size % 16 or not 16 <= size <= 256 for size in pair):
        raise ValueError(f"{name} must be a multiple of 16 from 16 to 256, got {block_size!r}")
    return pair[0], pair[1]


def _check_size(name: str, value: Any, least: int) -> int:
    check_count(name, value, lowest=least)
    return int(value)


def _check_length(name: str, length: int | None, blocks: int, block: int) -> int:
    if length is None:
        return blocks * block
    if -(-_check_size(name, length, 0) // block) != blocks:
        low, high = max(0, (blocks - 1) * block + 1), blocks * block
        raise ValueError(f"{name} must be {low} to {high} for {blocks} blocks of {block}, got {length}")
    return length


def _geometry(q_len: int, kv_len: int | None, block_size: BlockSize) -> Geometry:
    size = check_block_size(block_size)
    q_len = _check_size("seq_len" if kv_len is None else "q_len", q_len, 0)
    return Geometry(*size, q_len, q_len if kv_len is None else _check_size("kv_len", kv_len, 0))


def _integers(name: str, values: Any) -> Tensor:
    """Integers of the caller's as int64 on the CPU."""
    try:
        tensor = torch.as_tensor(values)
    except (RuntimeError, TypeError, ValueError):
        raise TypeError(f"{name} must be integers, got {type(values).__name__}") from None
    check_tensor(name, tensor)
    if tensor.dtype not in (torch.int32, torch.int64) and tensor.numel():
        raise TypeError(f"{name} must be integers, got dtype {_dtype_name(tensor)}")
    return tensor.to("cpu", torch.int64)


def _four_axes(name: str, tensor: Tensor, axes: int, shapes: str) -> Tensor:
    if not axes - 2 <= tensor.ndim <= axes:
        raise ValueError(f"{name} must have shape {shapes}, got {_sizes(tensor)}")
    return tensor[(None,) * (axes - tensor.ndim)]


def _check_list(name: str, tensor: Tensor) -> Tensor:
    check_tensor(name, tensor)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must have dtype int32 or int64, got {_dtype_name(tensor)}")
    return tensor


def _check_entries(name: str, entries: Tensor, counts: Tensor, limit: int) -> Tensor:
    """Entries (..., capacity) that belong to these counts, as int32; what is out of range stays so."""
    entries = _four_axes(
        name, _check_list(name, entries), 4, "(nq, capacity), with heads and batch before as counts"
    )
    check_device(name, entries, counts.device, "counts")
    if entries.shape[:3] != counts.shape:
        raise ValueError(
            f"{name} must have shape counts' {_sizes(counts)} + (capacity,), got {_sizes(entries)}"
        )
    return entries.clamp(-2, limit).int()


def _check_tables(tables: Tensor, geometry: Geometry, device: torch.device) -> Tensor:
    check_tensor("tables", tables)
    check_device("tables", tables, device, "counts")
    elements = (geometry.block_q, geometry.block_kv)
    words = (geometry.block_q, -(-geometry.block_kv // 32))
    if tables.dtype is torch.bool and _sizes(tables)[1:] == elements:
        return pack(tables)
    if tables.dtype is torch.int32 and _sizes(tables)[1:] == words:
        return tables.contiguous()
    raise ValueError(
        f"tables must be bool (T, {elements[0]}, {elements[1]}) or int32 (T, {words[0]}, {words[1]}), "
        f"got {_dtype_name(tables)} {_sizes(tables)}"
    )


def _raise_for(flags: Tensor, what: str) -> None:
    """Raises if the kernel found a list wrong: says which, and how."""
    wrong = flags.nonzero()
    if not len(wrong):
        return
    batch, head, row = wrong[0].tolist()
    value = int(flags[batch, head, row])
    faults = ", ".join(text for bit, text in _FAULTS.items() if value & bit)
    raise ValueError(
        f"{what}list {row} of batch {batch}, head {head} is wrong ({faults}); {len(wrong)} lists are"
    )


def _check_mask_lists(name: str, lists: list[Any], blocks: int, tables: int) -> Tensor:
    """The codes of a mask's own lists."""
    counts, indices, bits = lists
    for part, tensor in zip(("counts", "indices", "bits"), lists, strict=True):
        if tensor is not None and (tensor.dtype is not torch.int32 or not tensor.is_contiguous()):
            raise ValueError(f"{name}_{part} must be contiguous int32")
    if (bits is None) != (tables == 0):
        raise ValueError(
            f"{name}_bits must be a tensor exactly if there are tables, of which there are {tables}"
        )
    codes: Tensor
    codes, flags = torch.ops.tilewright.block_codes(counts, indices, bits, blocks, tables)
    _raise_for(flags, f"{name}: ")
    listed = torch.arange(1, indices.shape[3], device=indices.device) < counts[..., None]
    if bool((listed & (indices.diff(dim=3) <= 0)).any()):
        raise ValueError(f"{name}_indices must be ascending")
    return codes
