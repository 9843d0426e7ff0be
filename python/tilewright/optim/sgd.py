"""SGD with momentum.

    g = grad + weight_decay * p
    m = g in the first step, then momentum * m + (1 - dampening) * g
    p = p - lr * (g + momentum * m if nesterov else m)

As torch.optim.SGD.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .._checks import suggests_keywords
from .optimizer import BlockwiseOptimizer
from .options import check_options, parse_betas
from .state_io import Moment


@suggests_keywords
class SGD8bit(BlockwiseOptimizer):
    """SGD with its momentum in 8 bits: 1 byte of state a parameter.

    Args:
        params: parameters, parameter groups or named parameters, as AdamW8bit takes them.
        lr: learning rate, a float or a tensor of one element.
        momentum: in (0, 1).
        dampening: in [0, 1].
        weight_decay: added to the gradient as an L2 term.
        nesterov: Nesterov momentum; needs dampening=0.
        args: must be None.
        min_8bit_size: smaller parameters keep a float32 state.
        maximize, param_precision, max_grad_norm, seed: as in AdamW8bit.

    Raises:
        NotImplementedError: momentum=0, which has no state.
        ValueError, TypeError: an argument out of its range, or one without an effect.
    """

    _kind = "sgd"
    _moments = (Moment("1", True, "momentum_buffer"),)
    _overridable = ("optim_bits", "lr", "betas", "weight_decay", "min_8bit_size")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        args: None = None,
        min_8bit_size: int = 4096,
        *,
        maximize: bool = False,
        param_precision: str = "nearest",
        max_grad_norm: float | None = None,
        seed: int | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "param_precision": param_precision,
            "seed": seed,
        }
        super().__init__(
            params,
            defaults,
            optim_bits=8,
            min_8bit_size=min_8bit_size,
            max_grad_norm=max_grad_norm,
            args=args,
        )

    def _kernel_options(self, group: Mapping[str, Any], lr: float | Tensor) -> dict[str, Any]:
        momentum, dampening, weight_decay = group["momentum"], group["dampening"], group["weight_decay"]
        if not (0.0 < momentum < 1.0 and 0.0 <= dampening <= 1.0 and 0.0 <= weight_decay < math.inf):
            check_options(group)
        return {
            "lr": lr,
            "beta1": momentum,
            "beta2": 0.0,
            "eps": 0.0,
            "weight_decay": weight_decay,
            "decoupled": False,
            "nesterov": group["nesterov"],
            "dampening": dampening,
            "maximize": group["maximize"],
            "stochastic": group["param_precision"] == "stochastic",
        }

    def _translate_override(self, override: Mapping[str, Any]) -> dict[str, Any]:
        return _momentum_from_betas(override)

    def _own_options(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        return super()._own_options(saved if "momentum" in saved else _momentum_from_betas(saved))

    def _foreign_options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        betas = (group["momentum"], group["dampening"])
        return {"betas": betas, "eps": 0.0, "alpha": 0.0, "t_alpha": None, "t_beta3": None}


def _momentum_from_betas(options: Mapping[str, Any]) -> dict[str, Any]:
    """bitsandbytes keeps (momentum, dampening) under the name of betas."""
    translated = dict(options)
    if "betas" in translated:
        translated["momentum"], translated["dampening"] = parse_betas(translated.pop("betas"))
    return translated
