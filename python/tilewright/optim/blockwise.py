"""Blockwise 8-bit quantization of tensors.

A tensor is cut, in row-major order, into blocks of `blocksize` elements. Each block stores its largest
magnitude `absmax` (float32) and per element the 8-bit code of the map value nearest to x / absmax.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_apart, check_device, check_tensor, check_type
from . import ops
from .maps import check_map, shared_map

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_BLOCKSIZES = (64, 128, 256, 512, 1024, 2048, 4096)

_quantize = torch.ops.tilewright.quantize_blockwise.default
_quantize_out = torch.ops.tilewright.quantize_blockwise_out.default
_dequantize = torch.ops.tilewright.dequantize_blockwise.default
_dequantize_out = torch.ops.tilewright.dequantize_blockwise_out.default


class QuantState:
    """What `dequantize_blockwise` needs besides the codes.

    Attributes:
        absmax: float32 ``(ceil(numel / blocksize),)``, the largest magnitude of each block.
        shape: shape of the quantized tensor.
        code: float32 ``(256,)``, the map; the built-in signed one if it was given as None.
        blocksize: elements in a block.
        dtype: dtype of the quantized tensor, and of what `dequantize_blockwise` returns.
    """

    def __init__(
        self,
        absmax: Tensor,
        shape: torch.Size | None = None,
        code: Tensor | None = None,
        blocksize: int = 256,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.absmax = absmax
        self.shape = shape
        self.blocksize = blocksize
        self.dtype = dtype
        self._code = code

    @property
    def code(self) -> Tensor:
        """The map, float32 ``(256,)``."""
        return shared_map(self.absmax.device, True) if self._code is None else self._code

    @code.setter
    def code(self, value: Tensor | None) -> None:
        self._code = value

    def to(self, device: torch.device | str) -> None:
        """Moves the state to `device`, in place."""
        self.absmax = self.absmax.to(device)
        if self._code is not None:
            self._code = self._code.to(device)

    def __repr__(self) -> str:
        return (
            f"QuantState(blocks={self.absmax.numel()}, blocksize={self.blocksize}, dtype={self.dtype}, "
            f"map={'built-in' if self._code is None else 'own'})"
        )


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 256,
) -> tuple[Tensor, QuantState]:
    """Quantizes `A` to 8-bit codes with one scale a block.

    Every element gets the nearest value of the map; one exactly between two gets the one nearer to zero.
    A block of zeros has absmax 0 and decodes to zeros. A block that holds a NaN has absmax NaN, one that
    holds an infinity has absmax inf, and either decodes to NaN throughout.

    Args:
        A: values, any shape and strides, float32, float16 or bfloat16, on a CPU or a CUDA device.
        code: the map, float32 ``(256,)``, ascending, on A's device. None: the built-in signed map.
        absmax: float32 ``(ceil(numel / blocksize),)`` to write the scales to. None: a new tensor.
        out: uint8 of A's shape to write the codes to. None: a new, contiguous tensor.
        blocksize: elements in a block: 64, 128, 256, 512, 1024, 2048 or 4096.

    Returns:
        The codes, uint8 of A's shape, and the state that `dequantize_blockwise` takes.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a dtype, shape, device or blocksize that is not one of the above, or an `out` or `absmax`
            that shares memory with an input.

    Not differentiable: gradients do not flow through it. vmap and torch.func.grad are not supported.

    Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861); arguments as
    bitsandbytes.functional.quantize_blockwise, save its `nested`, and with 256 as the default blocksize.
    """
    check_tensor("A", A)
    if A.dtype not in _FLOATS:
        raise ValueError(f"A must be float32, float16 or bfloat16, got {A.dtype}")
    _check_blocksize(blocksize)
    _check_code(code, A)
    A = _without_grad(A)
    if out is None and absmax is None:
        out, absmax = _quantize(A, code, True, blocksize)
    else:
        if out is None:
            out = torch.empty(A.shape, dtype=torch.uint8, device=A.device)
        if absmax is None:
            blocks = ops.block_count(A.numel(), blocksize)
            absmax = A.new_empty(blocks, dtype=torch.float32)
        _check_out("out", out, A, torch.uint8)
        _check_absmax(absmax, A, blocksize)
        _check_writable("absmax", absmax)
        check_apart("out", out, A=A, absmax=absmax, code=code)
        check_apart("absmax", absmax, A=A, code=code)
        _quantize_out(A, code, True, blocksize, out, absmax)
    return out, QuantState(absmax, A.shape, code, blocksize, A.dtype)


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 256,
) -> Tensor:
    """Decodes what `quantize_blockwise` made.

    Args:
        A: codes, uint8, any shape and strides.
        quant_state: as `quantize_blockwise` returned it; or else give `absmax`.
        absmax: float32 ``(ceil(numel / blocksize),)``, the scale of each block.
        code: the map, float32 ``(256,)``. None: the built-in signed map. Only together with `absmax`.
        out: float32, float16 or bfloat16 of A's shape to write to. None: a new tensor of the state's dtype
            (float32 without a state).
        blocksize: elements in a block. Only together with `absmax`; a state brings its own.

    Returns:
        `out` or a new, contiguous tensor of A's shape: map[code] * absmax, rounded once to its dtype.

    Raises:
        TypeError: an argument is not of its type.
        ValueError: a dtype, shape, device or blocksize that is not one of the above, both or neither of
            `quant_state` and `absmax`, or an `out` that shares memory with an input.

    Not differentiable: gradients do not flow through it. vmap and torch.func.grad are not supported.
    """
    check_tensor("A", A)
    if A.dtype != torch.uint8:
        raise ValueError(f"A must hold uint8 codes, got {A.dtype}")
    if quant_state is not None:
        check_type("quant_state", quant_state, QuantState, "QuantState")
        if absmax is not None or code is not None:
            raise ValueError("quant_state and absmax (or code) do not go together: give one of them")
        if blocksize not in (256, quant_state.blocksize):
            raise ValueError(f"blocksize is {blocksize}, but quant_state has {quant_state.blocksize}")
        absmax, code, blocksize = quant_state.absmax, quant_state._code, quant_state.blocksize
        dtype = quant_state.dtype
    elif absmax is None:
        raise ValueError("absmax or quant_state must be given, got neither")
    else:
        dtype = torch.float32
    _check_blocksize(blocksize)
    _check_code(code, A)
    _check_absmax(absmax, A, blocksize)
    absmax = _without_grad(absmax)
    if out is None:
        decoded: Tensor = _dequantize(A, absmax, code, True, blocksize, dtype)
        return decoded
    _check_out("out", out, A, *_FLOATS)
    check_apart("out", out, A=A, absmax=absmax, code=code)
    _dequantize_out(A, absmax, code, True, blocksize, out)
    return out


def _without_grad(t: Tensor) -> Tensor:
    return t.detach() if t.requires_grad else t


def _check_blocksize(blocksize: int) -> None:
    if not isinstance(blocksize, int) or blocksize not in _BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {', '.join(map(str, _BLOCKSIZES))}, got {blocksize!r}")


def _check_code(code: Tensor | None, like: Tensor) -> None:
    if code is None:
        return
    check_map(code)
    check_device("code", code, like.device, "A")


def _check_absmax(absmax: Tensor, like: Tensor, blocksize: int) -> None:
    check_tensor("absmax", absmax)
    blocks = ops.block_count(like.numel(), blocksize)
    if absmax.dtype != torch.float32 or absmax.shape != (blocks,):
        raise ValueError(
            f"absmax must be float32 of shape ({blocks},) for {like.numel()} elements "
            f"in blocks of {blocksize}, got {absmax.dtype} of shape {tuple(absmax.shape)}"
        )
    check_device("absmax", absmax, like.device, "A")


def _check_writable(name: str, value: Tensor) -> None:
    if not torch.compiler.is_compiling() and value.is_neg():
        raise ValueError(f"{name} is a negated view, which cannot be written to")


def _check_out(name: str, out: Tensor, like: Tensor, *dtypes: torch.dtype) -> None:
    check_tensor(name, out)
    if out.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, got {out.dtype}")
    if out.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(out.shape)}, A has {tuple(like.shape)}")
    check_device(name, out, like.device, "A")
    _check_writable(name, out)
