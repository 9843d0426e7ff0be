"""Blockwise quantization as torch ops: schema, implementation, fake kernels.

    tilewright::quantize_blockwise        allocates codes and absmax
    tilewright::quantize_blockwise_out    writes into tensors of the caller
    tilewright::dequantize_blockwise      allocates the values
    tilewright::dequantize_blockwise_out  writes into a tensor of the caller

A `code` of None is the built-in map, `signed` says which of the two. None of them is differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import _backend
from .._library import define, nothing


def block_count(numel: int, blocksize: int) -> int:
    """Blocks of `blocksize` that `numel` elements fill, the last one perhaps in part."""
    return (numel + blocksize - 1) // blocksize


def _quantize(A: Tensor, code: Tensor | None, signed: bool, blocksize: int) -> tuple[Tensor, Tensor]:
    A = A.contiguous()
    codes = torch.empty_like(A, dtype=torch.uint8)
    absmax = A.new_empty(block_count(A.numel(), blocksize), dtype=torch.float32)
    _backend.C.quantize_blockwise(A, code, signed, codes, absmax, blocksize, _backend.num_threads())
    return codes, absmax


def _quantize_out(
    A: Tensor, code: Tensor | None, signed: bool, blocksize: int, codes: Tensor, absmax: Tensor
) -> None:
    A, threads = A.contiguous(), _backend.num_threads()
    dense_codes, dense_absmax = codes.contiguous(), absmax.contiguous()
    _backend.C.quantize_blockwise(A, code, signed, dense_codes, dense_absmax, blocksize, threads)
    _give_back(dense_codes, codes)
    _give_back(dense_absmax, absmax)


def _dequantize(
    codes: Tensor, absmax: Tensor, code: Tensor | None, signed: bool, blocksize: int, dtype: torch.dtype
) -> Tensor:
    codes, absmax, threads = codes.contiguous(), absmax.contiguous(), _backend.num_threads()
    out = torch.empty_like(codes, dtype=dtype)
    _backend.C.dequantize_blockwise(codes, absmax, code, signed, out, blocksize, threads)
    return out


def _dequantize_out(
    codes: Tensor, absmax: Tensor, code: Tensor | None, signed: bool, blocksize: int, out: Tensor
) -> None:
    codes, absmax, threads = codes.contiguous(), absmax.contiguous(), _backend.num_threads()
    dense = out.contiguous()
    _backend.C.dequantize_blockwise(codes, absmax, code, signed, dense, blocksize, threads)
    _give_back(dense, out)


def _give_back(dense: Tensor, target: Tensor) -> None:
    """Copies a contiguous stand-in back; the target itself was written behind autograd's back, so say so."""
    if dense is target:
        increment_version(target)
    else:
        target.copy_(dense)


def _fake_quantize(A: Tensor, code: Tensor | None, signed: bool, blocksize: int) -> tuple[Tensor, Tensor]:
    absmax = A.new_empty((block_count(A.numel(), blocksize),), dtype=torch.float32)
    return A.new_empty(A.shape, dtype=torch.uint8), absmax


def _fake_dequantize(
    codes: Tensor, absmax: Tensor, code: Tensor | None, signed: bool, blocksize: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


define(
    "quantize_blockwise(Tensor A, Tensor? code, bool signed, int blocksize) -> (Tensor, Tensor)",
    _quantize,
    _fake_quantize,
)
define(
    "quantize_blockwise_out(Tensor A, Tensor? code, bool signed, int blocksize, "
    "Tensor(a!) codes, Tensor(b!) absmax) -> ()",
    _quantize_out,
    nothing,
)
define(
    "dequantize_blockwise(Tensor codes, Tensor absmax, Tensor? code, bool signed, int blocksize, "
    "ScalarType dtype) -> Tensor",
    _dequantize,
    _fake_dequantize,
)
define(
    "dequantize_blockwise_out(Tensor codes, Tensor absmax, Tensor? code, bool signed, int blocksize, "
    "Tensor(a!) out) -> ()",
    _dequantize_out,
    nothing,
)
