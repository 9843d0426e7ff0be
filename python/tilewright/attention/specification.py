"""`BlockSparse`: which mask the attention layers of a model get, whatever lengths they meet."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .._checks import check_choice, nearest
from .compose import rows
from .mask import BlockMask, BlockSize
from .permuted import choose, permuted_block_sparse_attention

_KEPT = 16  # masks
_SPAN = 64  # queries whose rows are kept at a time while decoding
_TENSORS = (("q", "k"), ("query", "key"))
_numbers = itertools.count()
_by_number: WeakValueDictionary[int, BlockSparse] = WeakValueDictionary()


class BlockSparse:
    """What ``tilewright.swap(model, attention=...)`` takes: a way to make the mask for any lengths.

    A layer's queries then see what both the mask and the model let them see: a causal model stays causal, and
    padding and other documents stay hidden::

        BlockSparse(BlockMask.sliding_window, window=512, sink=64, block_size=64)
        BlockSparse(lambda q_len, kv_len: BlockMask.causal(q_len, kv_len) & ...)
        BlockSparse(mask)  # a BlockMask, where lengths never change
        BlockSparse.full()

    Args:
        mask: one of

            - a builder of `BlockMask`, or a function like one. If it has an argument ``kv_len`` or takes two
              numbers, it is called with the queries and the keys at hand, whose last ones are at the same
              position. If it takes one number, it is called with the keys, and the last rows are used.
            - an estimator: a function of ``(q, k)``, (batch, heads, q_len, head_dim) and (batch, kv_heads,
              kv_len, head_dim), that returns a `BlockMask`. Its first arguments are named so.
            - `permuted_block_sparse_attention`, which chooses and attends in one: for causal layers without
              sliding window and softcap. Its order of the keys is one for all queries, so that it serves
              prompts and training; decode steps see all that the model does. Of padded rows it gets what is
              no padding; padding between tokens is refused.
            - a `BlockMask`, for those lengths alone.
        takes: "lengths" or "tensors": what the function is called with, if its arguments' names do not tell.
        decode: of the up to 16 queries of a decode step with a cache: "sparse", they see what the mask shows
            them, or "dense", all that the model lets them see. Default "dense" for estimators, which need
            more queries than that to judge by, else "sparse". Permuted attention has "dense" alone.
        options: passed on to the builder or estimator.

    Masks of lengths are kept, the latest 16 of them, for all layers together.

    Raises:
        TypeError: an argument of a wrong type, or an option that the builder does not have.
        ValueError: `takes` or `decode` is another word, or an option of permuted attention out of range.
    """

    def __init__(
        self,
        mask: Callable[..., BlockMask] | BlockMask,
        *,
        takes: str | None = None,
        decode: str | None = None,
        **options: Any,
    ) -> None:
        if not (isinstance(mask, BlockMask) or callable(mask)):
            raise TypeError(
                "mask must be a builder such as BlockMask.sliding_window, a function of lengths or of q and "
                f"k, or a BlockMask; got {type(mask).__name__}"
            )
        check_choice("takes", takes, ("lengths", "tensors", None))
        check_choice("decode", decode, ("sparse", "dense", None))
        parameters = [] if isinstance(mask, BlockMask) else _parameters(mask)
        names = [parameter.name for parameter in parameters]
        if options and isinstance(mask, BlockMask):
            raise TypeError(f"a BlockMask takes no options, got {sorted(options)}")
        if parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            unknown = sorted(set(options) - set(names))
            if unknown:
                known = f"it has {', '.join(names)}{nearest(unknown[0], names)}"
                raise TypeError(f"{_name(mask)} has no argument {unknown[0]!r}; {known}")
        self.mask, self.options = mask, options
        if getattr(mask, "func", mask) is permuted_block_sparse_attention:
            takes, decode = self._check_permuted(takes, decode), "dense"
        self.takes = takes or ("tensors" if tuple(names[:2]) in _TENSORS else "lengths")
        self.decode = decode or ("dense" if self.takes == "tensors" else "sparse")
        self._names = names
        self._pairs = _takes_two(parameters, options)
        self._masks: OrderedDict[Any, Any] = OrderedDict()
        self._take_number()

    def _take_number(self) -> None:
        self.number = next(_numbers)  # compiled graphs know it by this
        _by_number[self.number] = self

    @classmethod
    def of_number(cls, number: int) -> BlockSparse:
        """The specification that has this number in this process."""
        return _by_number[number]

    @classmethod
    def full(cls, block_size: BlockSize = 128) -> BlockSparse:
        """All that the model itself lets a query see: the same attention, by these kernels."""
        return cls(full, block_size=block_size)

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"BlockSparse({_name(self.mask)}{options}, decode={self.decode!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_masks": OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._take_number()

    def _check_permuted(self, takes: str | None, decode: str | None) -> str:
        """The kind "attention"; refuses what permuted attention cannot be given."""
        for name, value in (("takes", takes), ("decode", decode if decode != "dense" else None)):
            if value is not None:
                raise ValueError(
                    f"{name} must be left out with permuted_block_sparse_attention, got {value!r}: it takes "
                    "q, k and v, and decode steps are dense, because its order is made for a whole prompt"
                )
        for name in ("causal", "scale", "return_lse"):
            if name in self.options:
                raise TypeError(f"{name} is the model's to say: leave it out of BlockSparse(...)")
        nothing = torch.zeros(1, 1, 1, 8, device="cpu")
        self.mask(nothing, nothing, nothing, **self.options)  # type: ignore[operator]
        return "attention"

    def kept(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What `make` returns, of the last time if the key is known."""
        if key not in self._masks:
            self._masks[key] = make()
            while len(self._masks) > _KEPT:
                self._masks.popitem(last=False)
        self._masks.move_to_end(key)
        return self._masks[key]

    def of_lengths(self, q_len: int, kv_len: int, device: torch.device) -> BlockMask:
        """The mask for the last q_len of kv_len positions and all kv_len keys, from a builder."""
        if isinstance(self.mask, BlockMask):
            if (self.mask.q_len, self.mask.kv_len) != (q_len, kv_len):
                raise ValueError(
                    f"attention is BlockSparse(a mask of {self.mask.q_len} queries and {self.mask.kv_len} "
                    f"keys), but the model came with {q_len} and {kv_len}: give a builder for any lengths"
                )
            return self.mask.to(device)
        options = dict(self.options)
        if "device" in self._names:
            options.setdefault("device", device)
        if "kv_len" in self._names:
            mask = self.mask(q_len, kv_len=kv_len, **options)
        elif self._pairs:
            mask = self.mask(q_len, kv_len, **options)
        elif q_len == kv_len:
            mask = self.mask(kv_len, **options)
        else:
            from .compose import from_elements

            whole = self._checked(self.mask(kv_len, **options), kv_len, kv_len)
            mask = from_elements(rows(whole, kv_len - q_len), whole.block_size)
        return self._checked(mask, q_len, kv_len).to(device)

    def rows_of_lengths(self, q_len: int, kv_len: int, device: torch.device) -> Tensor:
        """The same, bool (Bm, Hm, q_len, kv_len), for few queries."""
        first, last = kv_len - q_len, kv_len - 1
        if getattr(self.mask, "__func__", self.mask) not in _BY_POSITION or first // _SPAN != last // _SPAN:
            return rows(self.of_lengths(q_len, kv_len, device), 0)
        # What a position sees of those before it does not depend on the length: rows of steps to come, too.
        end = (last // _SPAN + 1) * _SPAN
        span: Tensor = self.kept(("rows", end, device), lambda: rows(self.of_lengths(_SPAN, end, device), 0))
        start = first - end + _SPAN
        return span[:, :, start : start + q_len, :kv_len]

    def of_tensors(self, q: Tensor, k: Tensor, causal: bool) -> BlockMask:
        """The mask for these queries and keys, from an estimator; no gradient flows through it."""
        options = dict(self.options)
        if "causal" in self._names:
            options.setdefault("causal", causal)
        with torch.no_grad():
            mask = self.mask(q.detach(), k.detach(), **options)  # type: ignore[operator]
        return self._checked(mask, q.shape[2], k.shape[2]).to(q.device)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Causal attention by keys in another order."""
        out: Tensor = self.mask(q, k, v, scale=scale, **self.options)  # type: ignore[operator, assignment]
        return out

    def permuted(self, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """What `attention` goes by: the order of the keys, these keys, and the pairs that are seen."""
        given = inspect.signature(self.mask).bind(q, k, k, **self.options)  # type: ignore[arg-type]
        given.apply_defaults()
        block, segment, threshold = (given.arguments[n] for n in ("block_size", "segment_size", "threshold"))
        order, keys, mask = choose(q, k, block, segment, threshold, True, scale)
        return order, keys, rows(mask, 0)

    def _checked(self, mask: Any, q_len: int, kv_len: int) -> BlockMask:
        if not isinstance(mask, BlockMask):
            raise TypeError(f"{_name(self.mask)} must return a BlockMask, got {type(mask).__name__}")
        if (mask.q_len, mask.kv_len) != (q_len, kv_len):
            raise ValueError(
                f"{_name(self.mask)} returned a mask for {mask.q_len} queries and {mask.kv_len} keys, "
                f"where {q_len} and {kv_len} are needed"
            )
        return mask


def full(
    q_len: int, kv_len: int, *, block_size: BlockSize = 128, device: torch.device | str | None = None
) -> BlockMask:
    """Every query sees every key."""
    sizes = (block_size, block_size) if isinstance(block_size, int) else block_size
    shape = [-(-length // size) for length, size in zip((q_len, kv_len), sizes, strict=True)]
    return BlockMask.from_dense(torch.ones(shape, dtype=torch.bool, device=device), sizes, q_len, kv_len)


_BY_POSITION = (full, BlockMask.causal, BlockMask.sliding_window, BlockMask.dilated, BlockMask.prefix_lm)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # of a builtin
        return []


def _takes_two(parameters: list[inspect.Parameter], options: dict[str, Any]) -> bool:
    """Whether the function needs two numbers besides the options."""
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return True
    needed = [
        p
        for p in parameters
        if p.default is p.empty
        and p.name not in options
        and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return len(needed) >= 2


def _name(mask: Any) -> str:
    if isinstance(mask, BlockMask):
        return f"a mask of {mask.q_len} queries and {mask.kv_len} keys"
    inner = mask.func if isinstance(mask, functools.partial) else mask
    return str(getattr(inner, "__qualname__", type(inner).__name__))
