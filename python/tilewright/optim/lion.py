"""Lion.

    p = p * (1 - lr * weight_decay)
    p = p - lr * sign(beta1 * m + (1 - beta1) * grad)
    m = beta2 * m + (1 - beta2) * grad

Chen et al., "Symbolic Discovery of Optimization Algorithms" (arXiv 2302.06675).
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


class _LionBase(BlockwiseOptimizer):
    _kind = "lion"
    _moments = (Moment("1", True, "exp_avg"),)
    _overridable = ("optim_bits", "lr", "betas", "weight_decay", "min_8bit_size")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        betas: tuple[float, float],
        weight_decay: float,
        maximize: bool,
        param_precision: str,
        seed: int | None,
        **own: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": parse_betas(betas),
            "weight_decay": weight_decay,
            "maximize": maximize,
            "param_precision": param_precision,
            "seed": seed,
        }
        super().__init__(params, defaults, **own)

    def _kernel_options(self, group: Mapping[str, Any], lr: float | Tensor) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        weight_decay = group["weight_decay"]
        if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0 and 0.0 <= weight_decay < math.inf):
            check_options(group)
        return {
            "lr": lr,
            "beta1": beta1,
            "beta2": beta2,
            "eps": 0.0,
            "weight_decay": weight_decay,
            "decoupled": True,
            "nesterov": False,
            "dampening": 0.0,
            "maximize": group["maximize"],
            "stochastic": group["param_precision"] == "stochastic",
        }

    def _own_options(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        options = super()._own_options(saved)
        options.pop("decoupled_weight_decay", None)
        if "betas" in options:
            options["betas"] = parse_betas(options["betas"])
        return options

    def _foreign_options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return {"eps": 0.0, "alpha": 0.0, "t_alpha": None, "t_beta3": None}


@suggests_keywords
class Lion(_LionBase):
    """Lion with its state in 32 or 8 bits, for code that chooses by `optim_bits`.

    Args:
        optim_bits: 32 or 8. With 32, `min_8bit_size` matters only to parameters or groups set to 8.

    All other arguments are those of Lion8bit.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: None = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        maximize: bool = False,
        param_precision: str = "nearest",
        max_grad_norm: float | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            weight_decay,
            maximize,
            param_precision,
            seed,
            optim_bits=optim_bits,
            args=args,
            min_8bit_size=min_8bit_size,
            is_paged=is_paged,
            max_grad_norm=max_grad_norm,
        )


@suggests_keywords
class Lion8bit(_LionBase):
    """Lion with its one state in 8 bits: 1 byte of state a parameter.

    Args:
        params: parameters, parameter groups or named parameters, as AdamW8bit takes them.
        lr: learning rate, a float or a tensor of one element.
        betas: (of the update, of the state), each in [0, 1).
        weight_decay: decoupled weight decay, applied first.
        args: must be None.
        min_8bit_size: smaller parameters keep a float32 state.
        is_paged: must be False.
        maximize, param_precision, max_grad_norm, seed: as in AdamW8bit.

    Raises:
        ValueError, TypeError, NotImplementedError: an argument out of its range, or one without an effect.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        args: None = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        maximize: bool = False,
        param_precision: str = "nearest",
        max_grad_norm: float | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            weight_decay,
            maximize,
            param_precision,
            seed,
            optim_bits=8,
            args=args,
            min_8bit_size=min_8bit_size,
            is_paged=is_paged,
            max_grad_norm=max_grad_norm,
        )
