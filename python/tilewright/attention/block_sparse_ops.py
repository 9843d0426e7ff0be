"""Block-sparse attention as torch ops.

    tilewright::block_sparse_fwd  the result and the logarithm of each query's sum of exponentials
    tilewright::block_sparse_bwd  the gradients of q, k and v
    tilewright::key_ranges        the keys that each query of packed sequences may see

A mask comes as the tensors of a `BlockMask`. The logarithms are float32, or float64 where q is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _backend
from .._library import define

_MASK = (
    "Tensor q2k_counts, Tensor q2k_indices, Tensor? q2k_bits, Tensor k2q_counts, Tensor k2q_indices, "
    "Tensor? k2q_bits, Tensor? tables, Tensor? key_from, Tensor? key_to"
)
_OPTIONS = "int block_q, int block_kv, float scale, float softcap, bool causal"
_NAMES = (
    "q", "k", "v", "q2k_counts", "q2k_indices", "q2k_bits", "k2q_counts", "k2q_indices", "k2q_bits", "tables",
    "key_from", "key_to",
)  # fmt: skip
_INPUTS = len(_NAMES)


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """New memory (batch, heads, length, dim), heads inside of positions where those of `like` are."""
    if like.shape[1] > 1 and like.stride(1) < like.stride(2):
        batch, heads, length, dim = shape
        return like.new_empty((batch, length, heads, dim)).transpose(1, 2)
    return like.new_empty(shape)


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = _empty(q, (*q.shape[:3], v.shape[3]))
    return out, q.new_empty(q.shape[:3], dtype=wide)


def _gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q, tuple(q.shape)), _empty(k, tuple(k.shape)), _empty(v, tuple(v.shape))


def _workspace(
    tensors: dict[str, Tensor | None], q: Tensor, sizes: tuple[int, int], backward: bool
) -> Tensor:
    bytes_needed = _backend.C.block_sparse_workspace(tensors, *sizes, backward, _backend.num_threads())
    return q.new_empty(bytes_needed, dtype=torch.uint8)


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    masks, (block_q, block_kv, scale, softcap, causal) = rest[: _INPUTS - 3], rest[_INPUTS - 3 :]
    tensors: dict[str, Tensor | None] = dict(zip(_NAMES, (q, k, v, *masks), strict=True))
    out, lse = _outputs(q, v)
    tensors["out"], tensors["lse"] = out, lse
    tensors["workspace"] = _workspace(tensors, q, (block_q, block_kv), False)
    _backend.C.block_sparse_fwd(tensors, block_q, block_kv, scale, softcap, causal, _backend.num_threads())
    return out, lse


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _outputs(q, v)


def _backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    masks, (block_q, block_kv, scale, softcap, causal) = rest[: _INPUTS - 3], rest[_INPUTS - 3 :]
    tensors: dict[str, Tensor | None] = dict(zip(_NAMES, (q, k, v, *masks), strict=True))
    gradients = _gradients(q, k, v)
    tensors["out"], tensors["lse"], tensors["dout"], tensors["dlse"] = out, lse, dout, dlse
    tensors["dq"], tensors["dk"], tensors["dv"] = gradients
    tensors["workspace"] = _workspace(tensors, q, (block_q, block_kv), True)
    _backend.C.block_sparse_bwd(tensors, block_q, block_kv, scale, softcap, causal, _backend.num_threads())
    return gradients


def _fake_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(q, k, v)


define(
    f"block_sparse_fwd(Tensor q, Tensor k, Tensor v, {_MASK}, {_OPTIONS}) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
define(
    "block_sparse_bwd(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, "
    f"{_MASK}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _check_positions(name: str, positions: Tensor, length: int) -> None:
    """On a device the kernels take positions as they may be: looking at them would wait for the device."""
    if positions.is_cuda:
        return
    found = positions.tolist()
    if found[0] != 0 or found[-1] != length or sorted(found) != found:
        shown = found if len(found) <= 8 else [*found[:4], "...", *found[-4:]]
        raise ValueError(f"{name} must ascend from 0 to the length {length}, got {shown}")


def _key_ranges(cu_q: Tensor, cu_k: Tensor, q_len: int, kv_len: int, causal: bool) -> tuple[Tensor, Tensor]:
    _check_positions("cu_seqlens_q", cu_q, q_len)
    _check_positions("cu_seqlens_k", cu_k, kv_len)
    queries = torch.arange(q_len, device=cu_q.device)
    sequence = torch.searchsorted(cu_q[1:], queries, right=True).clamp(max=len(cu_q) - 2)
    key_from, key_to = cu_k[sequence], cu_k[sequence + 1]
    if causal:
        key_to = torch.minimum(key_to, (queries + 1 - cu_q[sequence + 1] + key_to).clamp(min=key_from))
    return key_from.int(), key_to.int()


def _fake_key_ranges(
    cu_q: Tensor, cu_k: Tensor, q_len: int, kv_len: int, causal: bool
) -> tuple[Tensor, Tensor]:
    return cu_q.new_empty(q_len, dtype=torch.int32), cu_q.new_empty(q_len, dtype=torch.int32)


define(
    "key_ranges(Tensor cu_q, Tensor cu_k, int q_len, int kv_len, bool causal) -> (Tensor, Tensor)",
    _key_ranges,
    _fake_key_ranges,
)

_fwd = torch.ops.tilewright.block_sparse_fwd.default
_bwd = torch.ops.tilewright.block_sparse_bwd.default


class BlockSparseAttention(torch.autograd.Function):
    """(out, lse) of the inputs in the order of the op's schema."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Runs the op and keeps its inputs and results."""
        out, lse = _fwd(*arguments)
        ctx.save_for_backward(*arguments[:_INPUTS], out, lse)
        ctx.options = arguments[_INPUTS:]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "block_sparse_attention has no second derivative: call backward without create_graph"
            )
        *inputs, out, lse = ctx.saved_tensors
        dout, dlse = grads
        if dout is None:
            dout = out.new_zeros(()).expand(out.shape)
        if dlse is not None:
            dlse = dlse.contiguous()
        found = _bwd(dout, dlse, out, lse, *inputs, *ctx.options)
        results = [found[i] if ctx.needs_input_grad[i] else None for i in range(3)]
        return (*results, *[None] * (_INPUTS - 3 + len(ctx.options)))
