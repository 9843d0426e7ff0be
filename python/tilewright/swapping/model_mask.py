"""What a model of transformers lets its attention see, before it becomes a mask of blocks or of elements.

transformers asks the mask function of the implementation that the config names for a mask, once a forward
pass, and hands what it gets to every layer. That is a `ModelMask` here: lengths, offsets and mask function as
they came. A layer turns it into what its kernel reads; layers that see the same share the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask
from transformers import masking_utils

from ..attention import BlockMask, BlockSparse
from ..attention.compose import from_elements, hide_keys, restrict, same_documents


class ModelMask(FlexBlockMask):
    """Lengths, offsets and visibility of one forward pass.

    Derived from FlexAttention's BlockMask, because models hand on untouched what is one, or a tensor.

    A compiled graph may make one and hand it on. It then asks for nothing that takes the mask function apart.

    Attributes:
        q_len: queries.
        kv_length: keys, with the room at the end of a static cache.
        q_offset: position of the first query.
        kv_offset: position of the first key, if a cache has dropped those before it.
        padding: bool (batch, kv_offset + kv_length or more), False for keys that nobody sees; None: all are.
    """

    def __init__(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int | Tensor = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
        attention_mask: Tensor | None = None,
        use_vmap: bool = False,
        device: torch.device | str = "cpu",
        **kwargs: Any,
    ) -> None:
        # Not super's, which wants lists. A static cache's offset is a tensor that changes later in the pass.
        self.batch, self.q_len, self.kv_length = batch_size, int(q_length), int(kv_length)
        self.q_offset, self.kv_offset = int(q_offset), int(kv_offset)
        self.mask_function, self.use_vmap, self.where = mask_function, use_vmap, torch.device(device)
        self.padding = masking_utils.prepare_padding_mask(attention_mask, self.kv_length, self.kv_offset)
        self._made: dict[Any, Any] = {}

    @property
    def plain(self) -> bool | None:
        """Whether keys after a query are hidden, if nothing else but padding is; else None."""
        if self.mask_function is masking_utils.causal_mask_function:
            return True
        return False if self.mask_function is masking_utils.bidirectional_mask_function else None

    @property
    def causal(self) -> bool:
        """Whether keys after a query are hidden."""
        return self._parts()[0]

    @property
    def window(self) -> int | None:
        """How many keys up to its own a query sees, by the model's config; None: all."""
        return self._parts()[1]

    @property
    def documents(self) -> Tensor | None:
        """Which document each token is of, int64 (batch, length), never falling; None: all of one."""
        return self._parts()[2]

    @property
    def others(self) -> list[Any]:
        """Functions by which the model hides something, and that are none of the known ones."""
        return self._parts()[3]

    def _parts(self) -> tuple[bool, int | None, Tensor | None, list[Any]]:
        return self.made("parts", lambda: _taken_apart(self.mask_function))  # type: ignore[no-any-return]

    @property
    def kv_len(self) -> int:
        """Keys that can be seen: in a static cache, those that are filled."""
        if not self.causal:
            return self.kv_length
        return min(self.kv_length, self.q_offset + self.q_len - self.kv_offset)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, 1, queries, keys), as of a mask of elements."""
        return self.batch, 1, self.q_len, self.kv_length

    @property
    def ndim(self) -> int:
        """As of a mask of elements."""
        return 4

    def __repr__(self) -> str:
        return f"ModelMask(shape={self.shape}, q_offset={self.q_offset}, kv_offset={self.kv_offset})"

    def __getitem__(self, index: Any) -> Any:
        raise NotImplementedError(
            "the model takes a part of its attention mask, which tilewright's attention cannot follow: "
            "call tilewright.unswap(model)"
        )

    def to(self, *args: Any, **kwargs: Any) -> ModelMask:
        """Itself: it is made where the layers are."""
        return self

    def contiguous(self) -> ModelMask:
        """Itself, for `generate`."""
        return self

    def made(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns; made once in this pass for each key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def for_implementation(self, name: str, dtype: torch.dtype) -> Any:
        """The mask that this implementation of transformers' takes."""
        make = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[name]
        return self.made(name, lambda: make(
            batch_size=self.batch, q_length=self.q_len, kv_length=self.kv_length, q_offset=self.q_offset,
            kv_offset=self.kv_offset, mask_function=self.mask_function, attention_mask=self.padding,
            allow_is_causal_skip=False, use_vmap=self.use_vmap, device=self.where, dtype=dtype,
        ))  # fmt: skip

    def elements(self) -> Tensor:
        """Bool (batch, 1, q_len, kv_len): what the model lets each query see."""
        return self.for_implementation("sdpa", torch.float32)[..., : self.kv_len]  # type: ignore[no-any-return]

    def total(self) -> int:
        """The length of which q_len queries and the keys are the last."""
        total = self.q_offset + self.q_len if self.causal else self.kv_offset + self.kv_len
        if total != self.kv_offset + self.kv_len:
            raise NotImplementedError(
                f"block-sparse attention needs the last query at the last key; the queries end at position "
                f"{total} and the keys at {self.kv_offset + self.kv_len}: is this cache of a kind of its own?"
            )
        return total

    def rows(self, spec: BlockSparse) -> Tensor:
        """Bool (batch or 1, heads, q_len, kv_len): what builder and model let the queries see."""

        def make() -> Tensor:
            seen = spec.rows_of_lengths(self.q_len, self.total(), self.where)[..., self.kv_offset :]
            return seen & self.elements()

        return self.made(("rows", id(spec)), make)  # type: ignore[no-any-return]

    def blocks(self, spec: BlockSparse) -> BlockMask:
        """The mask of blocks of a specification by lengths: what it and the model let the queries see."""

        def base() -> BlockMask:
            mask = spec.of_lengths(self.q_len, self.total(), self.where)
            if self.kv_offset:
                seen = spec.rows_of_lengths(self.q_len, self.total(), self.where)
                mask = from_elements(seen[..., self.kv_offset :], mask.block_size)
            return self._windowed(mask, self.causal)

        def make() -> BlockMask:
            key = (self.q_len, self.kv_len, self.kv_offset, self.causal, self.window, self.where)
            return self.restricted(spec.kept(key, base))

        return self.made(("blocks", id(spec)), make)  # type: ignore[no-any-return]

    def estimated(self, mask: BlockMask) -> BlockMask:
        """An estimated mask, without what the model hides; `causal` is left to the kernel."""
        return self.restricted(self._windowed(mask, False))

    def restricted(self, mask: BlockMask) -> BlockMask:
        """The mask without padding, other documents, and whatever else the model's mask function hides."""
        if self.documents is not None:
            mask = same_documents(mask, self.documents)
        if self.others:
            others, q_offset, kv_offset = self.others, self.q_offset, self.kv_offset

            def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
                return masking_utils.and_masks(*others)(batch, head, q + q_offset, k + kv_offset)  # type: ignore[no-any-return]

            mask = restrict(mask, sees, self.batch)
        if self.padding is not None:
            visible = self.padding[:, self.kv_offset : self.kv_offset + self.kv_len].bool()
            if not bool(visible.all()):
                mask = hide_keys(mask, visible)
        return mask

    def token_ranges(self) -> list[tuple[int, int]] | None:
        """For each row the keys from its first token to its last; None if there is no padding."""
        if self.padding is None:
            return None

        def make() -> list[tuple[int, int]] | None:
            assert self.padding is not None
            visible = self.padding[:, self.kv_offset : self.kv_offset + self.kv_len].bool()
            counts, starts = visible.sum(1).tolist(), visible.int().argmax(1).tolist()
            ends = [start + count for start, count in zip(starts, counts, strict=True)]
            for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
                if not bool(visible[row, start:end].all()):
                    raise NotImplementedError(
                        f"attention_mask hides tokens between others in row {row}, which is not supported "
                        "with permuted_block_sparse_attention: pad at the ends"
                    )
            full = all(count == self.kv_len for count in counts)
            return None if full else list(zip(starts, ends, strict=True))

        return self.made("token ranges", make)  # type: ignore[no-any-return]

    def _windowed(self, mask: BlockMask, causal: bool) -> BlockMask:
        q_len, kv_len, size, device = self.q_len, self.kv_len, mask.block_size, mask.device
        if self.window is not None and self.window < kv_len:
            return mask & BlockMask.sliding_window(
                q_len, self.window, kv_len=kv_len, block_size=size, device=device
            )
        return mask & BlockMask.causal(q_len, kv_len, block_size=size, device=device) if causal else mask


def plain_mask(q: Tensor, k: Tensor, causal: bool, padding: Tensor | None = None) -> ModelMask:
    """What queries see of keys, (batch, heads, length, dim), whose first ones are at the same position."""
    function = masking_utils.causal_mask_function if causal else masking_utils.bidirectional_mask_function
    sizes = (q.shape[0], q.shape[2], k.shape[2])
    return ModelMask(*sizes, mask_function=function, attention_mask=padding, device=q.device)


def _taken_apart(function: Any) -> tuple[bool, int | None, Tensor | None, list[Any]]:
    """A mask function taken apart: causal, window, documents, and functions that are none of these."""
    causal, window, documents, others = False, None, None, []
    pending = [function]
    while pending:
        part = pending.pop()
        name, inner = getattr(part, "__qualname__", ""), _closure(part)
        if part is masking_utils.causal_mask_function:
            causal = True
        elif part is masking_utils.bidirectional_mask_function:
            pass
        elif name == "and_masks.<locals>.and_mask" and "mask_functions" in inner:
            pending += inner["mask_functions"]
        elif name == "sliding_window_overlay.<locals>.inner_mask" and "sliding_window" in inner:
            window = min(inner["sliding_window"], window or inner["sliding_window"])
        elif name == "packed_sequence_mask_function.<locals>.inner_mask" and "packed_sequence_mask" in inner:
            documents = inner["packed_sequence_mask"]
        elif (
            name == "remap_positions_for_packed_sequence.<locals>.inner_mask"
            and "mask_function" in inner
            and _by_distance(inner["mask_function"])
        ):
            pending.append(inner["mask_function"])  # distances within a document are those in the row
        else:
            others.append(part)
    if window is not None and not causal:  # then it is not one of `sliding_window`'s
        return False, None, documents, [*others, function] if documents is not None else [function]
    return causal, window, documents, others


def _by_distance(function: Any) -> bool:
    _, _, documents, others = _taken_apart(function)
    return documents is None and not others


def _closure(function: Any) -> dict[str, Any]:
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or not cells:
        return {}
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}


def of_elements(mask: Tensor, spec: BlockSparse, q: Tensor, k: Tensor, causal: bool = False) -> BlockMask:
    """The mask of blocks of what a specification and a mask of elements, a tensor, let queries see.

    The last query and the last key are at the same position. An estimator is told that the layer is `causal`.
    """
    if mask.dim() != 4 or mask.shape[3] < k.shape[2]:
        raise ValueError(
            f"attention_mask must be (batch, heads, {q.shape[2]}, {k.shape[2]}), got {tuple(mask.shape)}"
        )
    seen = mask[..., : k.shape[2]]
    if seen.dtype != torch.bool:
        least = torch.finfo(seen.dtype).min / 2 if seen.is_floating_point() else None
        if least is None or bool(((seen != 0) & (seen > least)).any()):
            raise NotImplementedError(
                "attention_mask must be bool, or 0 where a key is seen and -inf where it is not; "
                f"got {seen.dtype} with other values, and scores take no bias"
            )
        seen = seen == 0
    seen = seen.expand(-1, -1, q.shape[2], -1)
    sizes = (q.shape[2], k.shape[2])
    mine = spec.of_tensors(q, k, causal) if spec.takes == "tensors" else spec.of_lengths(*sizes, q.device)
    return mine & from_elements(seen, mine.block_size)
