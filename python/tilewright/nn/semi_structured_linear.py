"""SemiStructuredLinear: a linear layer that stores and multiplies n of every m weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_count, check_device, check_tensor, check_type, suggests_keywords
from .._library import autocast
from ..prune.masked import mask_of, set_mask
from ..prune.ops.semi_structured import linear
from ..prune.patterns import NOfM
from ..prune.semi_structured import (
    Compressed,
    compress_weight,
    decompress_weight,
    fitting_pattern,
    from_torch_semi_structured,
    n_of_m,
    wrong_groups,
)
from .dense_state import read_dense


@suggests_keywords
class SemiStructuredLinear(nn.Module):
    """``y = x W^T + bias`` with a weight of which n of every m neighbours along a row are kept.

    Args:
        in_features: a multiple of m.
        out_features: size of the output.
        pattern: "2:4", or another "n:m" with 1 <= n < m <= 32.
        bias: whether there is one.
        device, dtype: of the parameters; float32, float16, bfloat16, and float64 on the CPU.

    A new layer keeps the first n of each group, with random values; `from_linear` takes a pruned layer's.

    Attributes:
        values: parameter ``(out_features, in_features / m * n)``, the kept weights.
        indices: buffer of uint8 ``(out_features, ceil(in_features / 8))``, where they are.
        bias: parameter ``(out_features,)`` or None.

    Where the weights are never changes, and what is not stored stays zero. Under autocast the layer computes
    in autocast's dtype, as torch.nn.Linear.
    """

    values: nn.Parameter
    indices: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pattern: str = "2:4",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("in_features", in_features)
        check_count("out_features", out_features)
        self.in_features, self.out_features = in_features, out_features
        self._pattern = n_of_m(pattern)
        n, m = self._pattern.n, self._pattern.m
        if in_features % m:
            raise ValueError(f"in_features must be a multiple of {m} for {pattern}, got {in_features}")
        kept = in_features // m * n
        self.values = nn.Parameter(torch.empty(out_features, kept, device=device, dtype=dtype))
        first = torch.zeros(1, in_features, device=device)
        first.view(1, in_features // m, m)[..., :n] = 1
        indices = first.new_zeros((1, -(-in_features // 8)), dtype=torch.uint8)
        if not first.is_meta:
            indices = compress_weight(first, self._pattern).indices
        self.register_buffer("indices", indices.repeat(out_features, 1))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws values and bias anew, as torch.nn.Linear would for a row of as many weights."""
        bound = 1 / math.sqrt(self.values.shape[1])
        nn.init.uniform_(self.values, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def pattern(self) -> str:
        """Such as "2:4"."""
        return str(self._pattern)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, pattern: str | None = None, mask: Tensor | None = None
    ) -> SemiStructuredLinear:
        """The same layer without the zeros of its weight.

        Args:
            linear: a torch.nn.Linear. Its weight may be torch's SparseSemiStructuredTensorCUTLASS.
            pattern: "n:m". None: "2:4" if the zeros allow it, else the n:m with m of 4, 8 or 16 that keeps
                the smallest share.
            mask: bool, of the weight's shape, True where it is kept; zero elsewhere. None: the layer's mask
                (`tilewright.prune.mask_of`), or, if it has none, where the weight is not zero.

        A group that keeps fewer than n stores zeros beside them. A mask on `values` (`set_mask`) keeps these
        zero in training; like all such masks it is in no state_dict.

        Raises:
            TypeError: it is no torch.nn.Linear.
            ValueError: its weight does not fit the pattern, or any pattern; says where and by how much.
        """
        check_type("linear", linear, nn.Linear, "torch.nn.Linear")
        weight = linear.weight
        packed, meta = getattr(weight, "packed", None), getattr(weight, "meta", None)
        if packed is not None:
            if pattern not in (None, "2:4") or mask is not None:
                raise ValueError("a weight in torch's semi-structured form is 2:4, and has no other mask")
            if meta is None:
                raise ValueError(
                    "weight is in cuSPARSELt's form, which only it can read: call to_dense() first"
                )
            found = from_torch_semi_structured(packed, meta)
            return cls._of(found, NOfM(2, 4), linear)
        mask = mask_of(linear) if mask is None else mask
        chosen = fitting_pattern(weight, mask) if pattern is None else n_of_m(pattern)
        layer = cls._of(compress_weight(weight, chosen, mask), chosen, linear)
        kept = weight.detach() != 0 if mask is None else mask
        inside = compress_weight(kept.to(torch.float32), chosen, kept).values != 0
        if not bool(inside.all()):
            set_mask(layer, inside, "values")
        return layer

    @classmethod
    def _of(cls, found: Compressed, pattern: NOfM, like: nn.Linear) -> SemiStructuredLinear:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = like.in_features, like.out_features
        layer._pattern = pattern
        layer.values = nn.Parameter(found.values, requires_grad=like.weight.requires_grad)
        layer.register_buffer("indices", found.indices)
        bias = None
        if like.bias is not None:
            bias = nn.Parameter(like.bias.detach().clone(), requires_grad=like.bias.requires_grad)
        layer.register_parameter("bias", bias)
        return layer.train(like.training)

    def to_linear(self) -> nn.Linear:
        """The dense layer, its zeros in place; it shares no memory with this one."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight = decompress_weight(self.values, self.indices, self._pattern)
        dense.weight = nn.Parameter(weight, requires_grad=self.values.requires_grad)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return dense.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``; x has any strides and the layer's dtype."""
        check_tensor("x", x)
        x, values, bias = autocast(x, self.values, self.bias)
        self._check(x, values)
        y = linear(
            x.reshape(-1, self.in_features),
            values,
            self.indices,
            bias,
            self._pattern.n,
            self._pattern.m,
            "none",
        )
        return y.view(*x.shape[:-1], self.out_features)

    def _check(self, x: Tensor, values: Tensor) -> None:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must have shape (..., {self.in_features}), got {tuple(x.shape)}")
        if x.dtype != values.dtype:
            raise TypeError(f"x has dtype {x.dtype}, but the layer's is {values.dtype}: cast one of them")
        check_device("x", x, values.device, "the layer")

    def extra_repr(self) -> str:
        """Sizes and pattern."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, pattern={self.pattern}, bias={self.bias is not None}"

    def _of_dense(self, weight: Tensor) -> dict[str, Tensor]:
        found = compress_weight(weight, self._pattern, None)
        return {"values": found.values, "indices": found.indices}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any, **keywords: Any
    ) -> None:
        read_dense(self, state_dict, prefix, arguments[4], self._of_dense)
        indices, errors = state_dict.get(prefix + "indices"), arguments[4]
        if isinstance(indices, Tensor) and indices.shape == self.indices.shape and not indices.is_meta:
            if indices.dtype != torch.uint8:
                errors.append(f"{prefix}indices must have dtype uint8, got {indices.dtype}")
            elif bool(wrong_groups(indices, self.in_features, self._pattern).any()):
                errors.append(f"{prefix}indices are not those of a {self.pattern} layer")
        super()._load_from_state_dict(state_dict, prefix, *arguments, **keywords)
