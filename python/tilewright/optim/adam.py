"""Adam and AdamW.

    g = grad (+ weight_decay * p for Adam)          p = p * (1 - lr * weight_decay) for AdamW
    m = beta1 * m + (1 - beta1) * g                 v = beta2 * v + (1 - beta2) * g^2
    p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Kingma and Ba (arXiv 1412.6980); decoupled decay: Loshchilov and Hutter (arXiv 1711.05101); states in 8 bits:
Dettmers et al. (arXiv 2110.02861). All arithmetic is float32; p is updated from the states before these are
quantized again.
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


class _AdamBase(BlockwiseOptimizer):
    _kind = "adam"
    _moments = (Moment("1", True, "exp_avg"), Moment("2", False, "exp_avg_sq"))
    _decoupled: bool
    _always_8bit = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        maximize: bool,
        param_precision: str,
        seed: int | None,
        optim_bits: int,
        **own: Any,
    ) -> None:
        if self._always_8bit:
            _check_always_8bit(self, optim_bits)
            optim_bits = 8
        defaults = {
            "lr": lr,
            "betas": parse_betas(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "param_precision": param_precision,
            "seed": seed,
        }
        super().__init__(params, defaults, optim_bits=optim_bits, **own)

    def _kernel_options(self, group: Mapping[str, Any], lr: float | Tensor) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        eps, weight_decay = group["eps"], group["weight_decay"]
        if not (
            0.0 <= beta1 < 1.0
            and 0.0 <= beta2 < 1.0
            and 0.0 <= eps < math.inf
            and 0.0 <= weight_decay < math.inf
        ):
            check_options(group)
        return {
            "lr": lr,
            "beta1": beta1,
            "beta2": beta2,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled": self._decoupled,
            "nesterov": False,
            "dampening": 0.0,
            "maximize": group["maximize"],
            "stochastic": group["param_precision"] == "stochastic",
        }

    def _own_options(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        options = super()._own_options(saved)
        decoupled = options.pop("decoupled_weight_decay", None)
        if decoupled is not None and bool(decoupled) != self._decoupled and saved.get("weight_decay"):
            raise ValueError(
                f"the checkpoint was written with decoupled_weight_decay={decoupled}: "
                f"load it into {'AdamW' if decoupled else 'Adam'}, or set its weight_decay to 0"
            )
        if "betas" in options:
            options["betas"] = parse_betas(options["betas"])
        return options

    def _foreign_options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return {"alpha": 0.0, "t_alpha": None, "t_beta3": None}


@suggests_keywords
class AdamW(_AdamBase):
    """AdamW with states in 32 or 8 bits, for code that chooses by `optim_bits`.

    Args:
        optim_bits: 32 or 8. With 32, `min_8bit_size` matters only to parameters or groups set to 8.

    All other arguments are those of AdamW8bit.
    """

    _decoupled = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
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
            eps,
            weight_decay,
            maximize,
            param_precision,
            seed,
            amsgrad=amsgrad,
            optim_bits=optim_bits,
            args=args,
            min_8bit_size=min_8bit_size,
            is_paged=is_paged,
            max_grad_norm=max_grad_norm,
        )


@suggests_keywords
class Adam(_AdamBase):
    """Adam (weight decay as an L2 term of the gradient) with states in 32 or 8 bits, by `optim_bits`.

    Args:
        optim_bits: 32 or 8. With 32, `min_8bit_size` matters only to parameters or groups set to 8.

    All other arguments are those of AdamW8bit.
    """

    _decoupled = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
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
            eps,
            weight_decay,
            maximize,
            param_precision,
            seed,
            amsgrad=amsgrad,
            optim_bits=optim_bits,
            args=args,
            min_8bit_size=min_8bit_size,
            is_paged=is_paged,
            max_grad_norm=max_grad_norm,
        )


class AdamW8bit(AdamW):
    """AdamW with both moments in 8 bits: 2 bytes of state a parameter instead of 8.

    Semantics are those of torch.optim.AdamW (decay first, bias correction in float32). An element whose
    gradient is not finite becomes non-finite, as in torch, and leaves the rest of its block alone.

    Args:
        params: parameters, parameter groups or named parameters. float32, float16 or bfloat16, on CPUs or
            CUDA devices, dense in memory in any layout; gradients of the same dtype.
        lr: learning rate; a tensor of one element may live on the GPU (a captured CUDA graph follows it).
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        amsgrad: must be False.
        optim_bits: must be 32, as in bitsandbytes, where it is there for the signature only.
        args: must be None.
        min_8bit_size: smaller parameters keep float32 states.
        is_paged: must be False.
        maximize: ascend instead.
        param_precision: how float16 and bfloat16 parameters are rounded: "nearest", or "stochastic", which
            keeps updates below half a unit in the last place from being lost. Stochastic rounding depends on
            (seed, step, parameter, element) only.
        max_grad_norm: clip the norm of all gradients together, as torch.nn.utils.clip_grad_norm_ does, but
            without a host synchronization and without writing the gradients.
        seed: of stochastic rounding; None draws one from torch's generator. It is part of the state_dict.

    Groups may set lr, betas, eps, weight_decay, maximize, param_precision, optim_bits and min_8bit_size.

    Raises:
        ValueError, TypeError, NotImplementedError: an argument out of its range, or one without an effect.
    """

    _always_8bit = True


class Adam8bit(Adam):
    """Adam with both moments in 8 bits; weight decay is an L2 term of the gradient, as in torch.optim.Adam.

    (In bitsandbytes, Adam8bit with weight_decay is AdamW.) The arguments are those of AdamW8bit.
    """

    _always_8bit = True


def _check_always_8bit(optimizer: BlockwiseOptimizer, optim_bits: int) -> None:
    if optim_bits != 32:
        name = type(optimizer).__name__
        raise ValueError(
            f"{name} is always 8-bit and takes optim_bits only for bitsandbytes' signature (32), "
            f"got {optim_bits}; {name.removesuffix('8bit')} takes optim_bits=8"
        )
