"""ActivationSparseLinear: a linear layer that reads the weights of the inputs that matter to a token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..prune.activation_ops import activation_sparse_linear, keep_inputs

if TYPE_CHECKING:
    from typing_extensions import Self

_METHODS = ("wina", "teal")


@_checks.suggests_keywords
class ActivationSparseLinear(nn.Module):
    """``y = (x * keep(x)) W^T + bias``, where each token keeps the inputs that matter to it most.

    For decoding: at one token a linear layer takes as long as its weights take to read, and here the weights
    of inputs that no token of the batch keeps (up to 8 tokens) are not read. With more tokens the result is
    the same and the product a dense one.

    Args:
        in_features, out_features, bias: as in torch.nn.Linear.
        sparsity: the share of inputs left out, in [0, 1).
        method: ``"wina"`` keeps, of each token, the ``in_features - round(sparsity * in_features)`` inputs
            with the largest ``|x_i| * ||W[:, i]||_2``, exactly so many, the first ones among equals;
            ``"teal"`` keeps those with ``|x_i| > threshold``, so many as there are. NaN is always kept by
            the latter and ranks above all numbers for the former.
        device, dtype: of the weights; float32, float16, bfloat16, on a CPU also float64.

    ``weight_t`` holds the weight transposed, ``(in_features, out_features)``, for an input that is left out
    to skip memory that lies side by side; ``weight`` is a view of it as torch.nn.Linear has it. A state dict
    holds ``weight_t``, ``bias`` and, for ``"teal"``, the 0-d ``threshold``: plain contiguous tensors. A state
    dict of a torch.nn.Linear, with ``weight``, can be loaded too.

    A ``"teal"`` layer that has not been calibrated has the threshold NaN and keeps everything.

    Gradients take each token's choice for given: they reach x, and leave the weights, through the inputs that
    are kept. Norms follow weights that change; a compiled model in eval mode needs ``refresh()`` after its
    weights were changed by hand.

    Under autocast weights stay as they are, x is cast to their dtype and the result to autocast's.

    Sources: WINA (arXiv 2505.19427), TEAL (arXiv 2408.14690).
    """

    weight_t: nn.Parameter
    bias: nn.Parameter | None
    column_norm: Tensor | None
    threshold: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        sparsity: float = 0.5,
        method: str = "wina",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.check_choice("method", method, _METHODS)
        _checks.check_count("in_features", in_features)
        _checks.check_count("out_features", out_features)
        self.in_features, self.out_features, self.method = in_features, out_features, method
        self.sparsity = sparsity
        weight_t = torch.empty((in_features, out_features), device=device, dtype=dtype)
        _checks.check_dtype("dtype", weight_t, _checks.FLOATS)
        self.weight_t = nn.Parameter(weight_t)
        self.register_parameter("bias", nn.Parameter(weight_t.new_empty(out_features)) if bias else None)
        state = weight_t.new_full((), math.nan, dtype=self._wide)
        self.register_buffer("threshold", state if method == "teal" else None)
        norms = weight_t.new_empty(in_features, dtype=self._wide) if method == "wina" else None
        self.register_buffer("column_norm", norms, persistent=False)
        self._norms_of: tuple[int, int] | None = None
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        sparsity: float,
        method: str = "wina",
        calibration: Tensor | None = None,
    ) -> Self:
        """A layer with a copy of the weights of `linear`.

        `calibration`, ``(..., in_features)``: inputs as the layer gets them, which ``"teal"`` takes its
        threshold from; ``"wina"`` needs none.
        """
        _checks.check_type("linear", linear, nn.Linear, "torch.nn.Linear")
        if method == "teal" and calibration is None:
            raise ValueError(
                "method 'teal' takes its threshold from calibration, inputs of the layer; got None"
            )
        if method == "wina" and calibration is not None:
            raise ValueError("calibration is for method 'teal': 'wina' needs none")
        weight, bias = linear.weight, linear.bias
        new = cls(
            linear.in_features, linear.out_features, bias is not None, sparsity, method,
            device=torch.device("meta"), dtype=weight.dtype,
        )  # fmt: skip
        new.weight_t = nn.Parameter(_transposed(weight.detach()), weight.requires_grad)
        if bias is not None:
            new.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
        if new.threshold is not None:
            new.threshold = torch.full_like(new.threshold, math.nan, device=weight.device)
        new.train(linear.training)
        new.refresh()
        if calibration is not None:
            new.calibrate(calibration)
        return new

    def to_linear(self) -> nn.Linear:
        """A torch.nn.Linear with a copy of the weights, which reads all of them."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None,
            device=torch.device("meta"), dtype=self.weight_t.dtype,
        )  # fmt: skip
        linear.weight = nn.Parameter(_transposed(self.weight_t.detach()), self.weight_t.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return linear.train(self.training)

    @property
    def weight(self) -> Tensor:
        """``weight_t`` as torch.nn.Linear has it, ``(out_features, in_features)``: a view."""
        return self.weight_t.t()

    @property
    def sparsity(self) -> float:
        """The share of inputs left out. A ``"teal"`` layer has to be calibrated anew when it is changed."""
        return self._sparsity

    @sparsity.setter
    def sparsity(self, value: float) -> None:
        self._sparsity = _checks.check_number("sparsity", value, "[0, 1)")
        self._count = self.in_features - round(self._sparsity * self.in_features)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Sets the threshold of a ``"teal"`` layer to the quantile `sparsity` of ``|x|``.

        x: inputs as the layer gets them, ``(..., in_features)``, finite; of all their elements together
        ``round(sparsity * numel)`` lie at or below the threshold, more if several equal it.
        """
        if self.threshold is None:
            raise ValueError("calibrate is for method 'teal': 'wina' needs no calibration")
        self._check(x)
        magnitudes = x.detach().abs().flatten().to(self._wide)
        if magnitudes.numel() == 0:
            raise ValueError(f"x holds no activations to calibrate with: its shape is {tuple(x.shape)}")
        if not bool(magnitudes.isfinite().all()):
            wrong = int((~magnitudes.isfinite()).sum())
            raise ValueError(f"x must be finite to calibrate with, got {wrong} values that are not")
        left_out = round(self.sparsity * magnitudes.numel())
        lowest = magnitudes.kthvalue(left_out).values if left_out > 0 else magnitudes.new_tensor(-1.0)
        self.threshold.copy_(lowest)

    def kept_inputs(self, x: Tensor) -> Tensor:
        """Which inputs each token keeps: bool, of the shape of x."""
        self._check(x)
        self._prepare()
        rows = x.detach().reshape(-1, self.in_features).to(self.weight_t.dtype)
        keep: Tensor = keep_inputs(rows, self.column_norm, self.threshold, self._count)
        return keep.view(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        """x ``(..., in_features)`` of the weights' dtype to ``(..., out_features)``."""
        self._check(x)
        weight, cast = self.weight_t, None
        dtype = weight.dtype
        if dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
            cast, x = torch.get_autocast_dtype(x.device.type), x.to(dtype)
        if x.dtype != dtype:
            raise TypeError(f"x must have the dtype of the weights, {_name(dtype)}, got {_name(x.dtype)}")
        self._prepare()
        rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)  # at one token every op counts
        y = activation_sparse_linear(rows, self.column_norm, self.threshold, self._count, weight, self.bias)
        if rows is not x:
            y = y.view(*x.shape[:-1], self.out_features)
        return y if cast is None else y.to(cast)

    def refresh(self) -> None:
        """Computes the norms of the inputs' weights anew; runs by itself where weights are seen to change."""
        if self.column_norm is None:
            return
        with torch.no_grad():
            norms = torch.linalg.vector_norm(self.weight_t, dim=1, dtype=self._wide)
            if torch.compiler.is_compiling():
                self.column_norm.copy_(norms)
                return
            if _can_take(self.column_norm, norms):  # a captured graph reads this memory
                self.column_norm.copy_(norms)
            else:
                self.column_norm = norms
        self._norms_of = self._weights_now()

    def reset_parameters(self) -> None:
        """Draws weights and bias as torch.nn.Linear does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)
        self.refresh()

    def train(self, mode: bool = True) -> Self:
        """As torch.nn.Module.train; the norms are those of the weights as they are now."""
        if self.training != mode and not torch.compiler.is_compiling():
            self._follow_weights()
        return super().train(mode)

    def extra_repr(self) -> str:
        """What print(module) shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, sparsity={self.sparsity}, method={self.method!r}"
        )

    @property
    def _wide(self) -> torch.dtype:
        """Of scores, norms and thresholds."""
        return torch.float64 if self.weight_t.dtype == torch.float64 else torch.float32

    def _check(self, x: Any) -> None:
        _checks.check_tensor("x", x)
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must have shape (..., {self.in_features}), got {tuple(x.shape)}")
        _checks.check_dtype("x", x, _checks.FLOATS)
        _checks.check_device("x", x, self.weight_t.device, "the layer")

    def _prepare(self) -> None:
        """Sees to it that the norms are those of the weights."""
        if not torch.compiler.is_compiling():
            self._follow_weights()
        elif self.training and torch.is_grad_enabled() and self.weight_t.requires_grad:
            self.refresh()

    def _weights_now(self) -> tuple[int, int]:
        weight = self.weight_t
        return weight.data_ptr(), -1 if weight.is_inference() else weight._version

    def _follow_weights(self) -> None:
        """The norms are computed anew if the weights are not those they were computed of."""
        if self.column_norm is not None and self._norms_of != self._weights_now():
            self.refresh()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Casts of the module leave norms and threshold in float32."""
        threshold = self.threshold
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if threshold is not None and self.threshold is not None and not threshold.is_meta:
            self.threshold = threshold.to(self.threshold.device, self._wide)
        self.refresh()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        dense = state_dict.get(prefix + "weight")
        if isinstance(dense, Tensor) and prefix + "weight_t" not in state_dict:
            del state_dict[prefix + "weight"]
            state_dict[prefix + "weight_t"] = dense.t() if dense.dim() != 2 else _transposed(dense)
            if self.threshold is not None:  # a dense layer has none
                state_dict.setdefault(prefix + "threshold", self.threshold)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        self.refresh()


def _transposed(weight: Tensor) -> Tensor:
    """A copy that is contiguous."""
    return weight.t().clone(memory_format=torch.contiguous_format)


def _can_take(old: Tensor, new: Tensor) -> bool:
    """Whether the one's memory can hold the other as it is."""
    return (old.device, old.dtype) == (new.device, new.dtype) and not old.is_inference()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
