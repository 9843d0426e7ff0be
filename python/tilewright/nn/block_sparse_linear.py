"""BlockSparseLinear: a linear layer that stores and multiplies the blocks of its weight that are not zero."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from .._checks import check_choice, check_tensor, check_type, suggests_keywords
from .._library import autocast
from ..prune import block_pattern
from ..prune.block_pattern import BLOCK_SIZES
from ..prune.masked import mask_of
from ..prune.ops.block_sparse import ACTIVATIONS, block_sparse_linear, call_directly
from .dense_state import read_dense


@suggests_keywords
class BlockSparseLinear(nn.Module):
    """y = activation(x W^T + bias), where W consists of blocks, most of them absent (BSR).

    Absent blocks take no memory and no time, forward and backward; the blocks that are there train, the
    others stay absent. Their values and places are plain tensors of the `state_dict`: `values` (blocks, block
    rows, block columns), the parameter; `crow_indices` (block rows + 1) and `col_indices` (blocks), int32, as
    in torch's BSR layout; `bias`. A checkpoint with other blocks than the module's can be loaded: the module
    takes them over.

    Args:
        in_features, out_features: as in torch.nn.Linear. They need not be multiples of the block.
        block_mask: bool, (ceil(out_features / rows), ceil(in_features / columns)), True = the block is there.
        block: rows and columns of a block, or one number for both; each 8, 16, 32, 64 or 128.
        bias: whether to add one.
        activation: "none", "relu", "gelu", "gelu_tanh" or "silu", applied where results are written.
        device, dtype: of values and bias: float32, float16, bfloat16; float64 on a CPU.

    Input: ``(*, in_features)`` of the values' dtype, any strides. Output: ``(*, out_features)``. Under
    autocast both are cast as torch.nn.functional.linear casts them; sums are float32 in any case.

    Raises:
        ValueError: sizes, block or mask that do not fit each other; a dtype or shape of the input.
        NotImplementedError: a second derivative.
    """

    crow_indices: Tensor
    col_indices: Tensor
    _pattern: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block_mask: Tensor,
        block: int | tuple[int, int] = 32,
        bias: bool = True,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.block = _check_block(block)
        check_choice("activation", activation, ACTIVATIONS)
        self.activation = activation
        if not isinstance(block_mask, Tensor) or block_mask.dtype != torch.bool:
            raise TypeError("block_mask must be a bool tensor, True = the block is there")
        if tuple(block_mask.shape) != self._grid:
            raise ValueError(
                f"block_mask must have shape {self._grid} for {out_features} x {in_features} in blocks of "
                f"{self.block[0]} x {self.block[1]}, got {tuple(block_mask.shape)}"
            )
        crow_indices, col_indices = block_pattern.lists_of(block_mask.to(device))
        self.values = nn.Parameter(torch.empty(len(col_indices), *self.block, device=device, dtype=dtype))
        self.register_buffer("crow_indices", crow_indices)
        self.register_buffer("col_indices", col_indices)
        self.register_buffer("_pattern", None, persistent=False)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self._follow_lists()
        self.reset_parameters()

    @property
    def _grid(self) -> tuple[int, int]:
        return -(-self.out_features // self.block[0]), -(-self.in_features // self.block[1])

    def _follow_lists(self) -> None:
        if self.crow_indices.is_meta:
            return
        self._pattern = block_pattern.kernel_pattern(self.crow_indices, self.col_indices, self._grid[1])

    def reset_parameters(self) -> None:
        """Draws values and bias as torch.nn.Linear does for the inputs left to an output on average."""
        if self.values.is_meta:
            return
        left = max(self.density * self.in_features, 1.0)
        bound = 1 / math.sqrt(left)
        with torch.no_grad():
            self.values.uniform_(-bound, bound)
            self.values.mul_(self._inside())
            if self.bias is not None:
                self.bias.uniform_(-bound, bound)

    def _inside(self) -> Tensor:
        """1 where an element of `values` lies in the weight, 0 where its block sticks out."""
        ones = torch.ones(1, 1, device=self.values.device, dtype=self.values.dtype)
        whole = ones.expand(self.out_features, self.in_features)
        return block_pattern.gather_blocks(whole, self.block_mask, self.block)

    @property
    def block_mask(self) -> Tensor:
        """Which blocks are there, bool (block rows, block columns)."""
        counts = self.crow_indices.diff()
        present = torch.zeros(self._grid, dtype=torch.bool, device=counts.device)
        rows = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        present[rows, self.col_indices.long()] = True
        return present

    @property
    def density(self) -> float:
        """The share of blocks that are there, 0..1."""
        rows, columns = self._grid
        return len(self.col_indices) / max(rows * columns, 1)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, block: int | tuple[int, int] | None = None, activation: str = "none"
    ) -> BlockSparseLinear:
        """The same function as a `torch.nn.Linear` whose weight has blocks of zeros.

        What is absent is what the layer's mask prunes, or, without a mask, blocks of exact zeros.

        Args:
            linear: the layer, left as it is. Device, dtype, training flag and ``requires_grad`` are kept.
            block: rows and columns of a block, or one number for both. None takes the size that stores the
                fewest elements, of several the largest block.
            activation: applied to the result, see the class.

        Raises:
            TypeError: `linear` is no torch.nn.Linear.
            ValueError: no block of 8 x 8 or more is absent, so that there is nothing to gain.
        """
        check_type("linear", linear, nn.Linear, "torch.nn.Linear")
        mask = mask_of(linear)
        weight = linear.weight.detach()
        kept = weight != 0 if mask is None else mask
        present = _base_blocks(kept)
        if block is None:
            if bool(present.all()):
                raise ValueError(
                    f"linear: none of the {present.numel()} blocks of 8 x 8 of its weight "
                    f"({linear.out_features} x {linear.in_features}) is zero"
                )
            chosen = _best_block(present)
        else:
            chosen = _check_block(block)
        made = cls(
            linear.in_features,
            linear.out_features,
            _pool(present, chosen),
            chosen,
            linear.bias is not None,
            activation,
            weight.device,
            weight.dtype,
        )
        with torch.no_grad():
            made.values.copy_(block_pattern.gather_blocks(weight * kept, made.block_mask, chosen))
            if made.bias is not None:
                made.bias.copy_(linear.bias)
                made.bias.requires_grad_(linear.bias.requires_grad)
        made.values.requires_grad_(linear.weight.requires_grad)
        return made.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The dense `torch.nn.Linear` with this weight.

        Raises:
            ValueError: the layer has an activation, which a torch.nn.Linear has not.
        """
        if self.activation != "none":
            raise ValueError(f"a torch.nn.Linear cannot hold the activation {self.activation!r}")
        made = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.values.device,
            dtype=self.values.dtype,
        )
        with torch.no_grad():
            made.weight.copy_(self.to_dense())
            if self.bias is not None:
                made.bias.copy_(self.bias)
                made.bias.requires_grad_(self.bias.requires_grad)
        made.weight.requires_grad_(self.values.requires_grad)
        return made.train(self.training)

    def to_dense(self) -> Tensor:
        """The weight (out_features, in_features), zeros where blocks are absent."""
        shape = (self.out_features, self.in_features)
        return block_pattern.scatter_blocks(self.values.detach(), self.block_mask, shape)

    def forward(self, x: Tensor) -> Tensor:
        """y of x ``(*, in_features)``."""
        parameters = self._parameters  # what is an attribute is sought in many places first
        bias = parameters.get("bias")
        found = call_directly(
            x, parameters.get("values"), self._buffers.get("_pattern"),
            self.bias if bias is None else bias,  # which may be a parametrization's
            self.out_features, self.in_features, self.activation,
        )  # fmt: skip
        return self._checked(x) if found is None else found

    def _checked(self, x: Tensor) -> Tensor:
        check_tensor("x", x)
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must have shape (*, {self.in_features}), got {tuple(x.shape)}")
        x, values, bias = autocast(x, self.values, self.bias)
        if x.dtype != values.dtype:
            raise ValueError(f"x must have the dtype of the layer's values, {values.dtype}, got {x.dtype}")
        flat = x.dim() == 2
        rows = x if flat else x.reshape(-1, self.in_features)
        y = block_sparse_linear(rows, values, self._pattern, bias, self.out_features, self.activation)
        return y if flat else y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes, block, how much is there."""
        shown = (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, block={self.block[0]}x{self.block[1]}, density={self.density:.3f}"
        )
        return shown if self.activation == "none" else f"{shown}, activation={self.activation}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        read_dense(self, state_dict, prefix, error_msgs, self._of_dense)
        names = ("values", "crow_indices", "col_indices")
        found = [state_dict[prefix + name] for name in names if prefix + name in state_dict]
        if len(found) == len(names):
            try:
                self._take_places(*found)
            except ValueError as error:
                error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
                return
        elif found:
            missing_keys.extend(prefix + name for name in names if prefix + name not in state_dict)
            return  # values at the places of other values would be a different weight
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._follow_lists()

    def _of_dense(self, weight: Tensor) -> dict[str, Tensor]:
        """The blocks of a weight: those that are here now, and others that are not zero there."""
        present = block_pattern.present_blocks(weight, self.block) | self.block_mask.to(weight.device)
        crow_indices, col_indices = block_pattern.lists_of(present)
        values = block_pattern.gather_blocks(weight, present, self.block)
        return {"values": values, "crow_indices": crow_indices, "col_indices": col_indices}

    def _take_places(self, values: Tensor, crow_indices: Tensor, col_indices: Tensor) -> None:
        """Makes room for blocks at these places."""
        block_pattern.check_lists(crow_indices, col_indices, *self._grid)
        expected = (len(col_indices), *self.block)
        if tuple(values.shape) != expected:
            raise ValueError(f"values must have shape {expected}, got {tuple(values.shape)}")
        if len(col_indices) == len(self.col_indices):
            return
        old = self.values
        self.values = nn.Parameter(old.new_empty(expected), requires_grad=old.requires_grad)
        self.col_indices = self.col_indices.new_empty(len(col_indices))


def _check_block(block: int | tuple[int, int]) -> tuple[int, int]:
    pair = (block, block) if isinstance(block, int) else block
    if len(pair) != 2 or any(size not in BLOCK_SIZES for size in pair):
        allowed = ", ".join(map(str, BLOCK_SIZES))
        raise ValueError(f"block must be one or two of {allowed}, got {block!r}")
    return pair[0], pair[1]


def _base_blocks(kept: Tensor) -> Tensor:
    """Which blocks of 8 x 8 hold something that is kept."""
    return block_pattern.present_blocks(kept, (BLOCK_SIZES[0], BLOCK_SIZES[0]))


def _pool(base: Tensor, block: tuple[int, int]) -> Tensor:
    """Which larger blocks hold one of the base blocks that are present."""
    steps = (block[0] // BLOCK_SIZES[0], block[1] // BLOCK_SIZES[0])
    pooled = max_pool2d(base[None, None].float(), steps, ceil_mode=True)
    return pooled[0, 0] > 0


def _best_block(base: Tensor) -> tuple[int, int]:
    """The block that stores the fewest elements; of several the largest, the squarest."""

    def cost(block: tuple[int, int]) -> tuple[int, int, int]:
        height, width = block
        return int(_pool(base, block).sum()) * height * width, -height * width, abs(height - width)

    return min(((r, c) for r in BLOCK_SIZES for c in BLOCK_SIZES), key=cost)
