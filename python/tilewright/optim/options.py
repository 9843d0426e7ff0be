"""Checks of optimizer settings: one place for constructors, groups, overrides and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .. import _backend

PARAM_PRECISIONS = ("nearest", "stochastic")

# Settings of torch.optim and bitsandbytes that mean nothing here unless they are off.
_WITHOUT_EFFECT = (
    "amsgrad",
    "args",
    "capturable",
    "differentiable",
    "is_paged",
    "max_grad_norm",
    "max_unorm",
    "skip_zeros",
)


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError or TypeError for the first setting whose value is out of its range.

    Settings it does not know belong to the user and pass, but for those that torch.optim or bitsandbytes
    would honour and these optimizers would not.
    """
    for key in _WITHOUT_EFFECT:
        if options.get(key):
            raise ValueError(f"{key}={options[key]!r} is not supported: it would have no effect")
    for key, check in _CHECKS.items():
        if key in options:
            check(key, options[key])
    if options.get("nesterov") and options.get("dampening"):
        raise ValueError(f"nesterov needs dampening=0, got {options['dampening']}")


def parse_betas(betas: Any) -> tuple[float, float]:
    """A pair of floats from a pair or, as bitsandbytes takes it, from a string such as "(0.9, 0.95)"."""
    if isinstance(betas, str):
        betas = betas.strip().strip("()").split(",")
    try:
        first, second = (float(beta) for beta in betas)
    except (TypeError, ValueError):
        raise ValueError(f"betas must be two numbers, got {betas!r}") from None
    return first, second


def read_lr(lr: float | Tensor, device: torch.device) -> float | Tensor:
    """What a kernel on `device` takes as a learning rate: a float, or a float32 scalar in device memory.

    Raises:
        ValueError: a learning rate that is negative or not finite. (One on a GPU is not looked at.)
    """
    if isinstance(lr, Tensor):
        if (device.type == "cuda" and lr.is_cuda) or _backend.is_emulated():
            return lr.detach().to(device, torch.float32).reshape(())
        lr = lr.item()
    if not 0.0 <= lr < math.inf:
        raise ValueError(f"lr must be finite and not negative, got {lr}")
    return float(lr)


def _check_lr(key: str, lr: Any) -> None:
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or not lr.is_floating_point():
            raise ValueError(
                f"a tensor {key} must hold one real number, got {lr.dtype} of shape {tuple(lr.shape)}"
            )
        if lr.device.type != "cpu":
            return
        lr = float(lr)
    _check_not_negative(key, lr)


def _check_number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{key} must be a number, got {value!r}")
    return float(value)


def _check_not_negative(key: str, value: Any) -> None:
    if not 0.0 <= _check_number(key, value) < math.inf:
        raise ValueError(f"{key} must be finite and not negative, got {value}")


def _check_betas(key: str, betas: Any) -> None:
    for index, beta in enumerate(parse_betas(betas)):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{key}[{index}] must be in [0, 1), got {beta}")


def _check_momentum(key: str, value: Any) -> None:
    if _check_number(key, value) == 0.0:
        raise NotImplementedError(
            "momentum=0 keeps no state, so there is nothing to store in 8 bits: use torch.optim.SGD"
        )
    if not 0.0 < value < 1.0:
        raise ValueError(f"{key} must be in (0, 1), got {value}")


def _check_dampening(key: str, value: Any) -> None:
    if not 0.0 <= _check_number(key, value) <= 1.0:
        raise ValueError(f"{key} must be in [0, 1], got {value}")


def _check_flag(key: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{key} must be True or False, got {value!r}")


def _check_precision(key: str, value: Any) -> None:
    if value not in PARAM_PRECISIONS:
        raise ValueError(f"{key} must be one of {', '.join(map(repr, PARAM_PRECISIONS))}, got {value!r}")


def _check_seed(key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{key} must be an integer or None, got {value!r}")
    if not 0 <= value < 2**63:
        raise ValueError(f"{key} must be in [0, 2**63), got {value}")


def _check_bits(key: str, value: Any) -> None:
    if value not in (8, 32):
        raise ValueError(f"{key} must be 8 or 32, got {value!r}")


def _check_size(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{key} must be an integer of at least 0, got {value!r}")


_CHECKS = {
    "lr": _check_lr,
    "betas": _check_betas,
    "eps": _check_not_negative,
    "weight_decay": _check_not_negative,
    "momentum": _check_momentum,
    "dampening": _check_dampening,
    "nesterov": _check_flag,
    "maximize": _check_flag,
    "param_precision": _check_precision,
    "seed": _check_seed,
    "optim_bits": _check_bits,
    "min_8bit_size": _check_size,
}

# What an optimizer here may have as its own setting.
SETTINGS = frozenset(_CHECKS) - {"optim_bits", "min_8bit_size"}
