"""Checks of optimizer settings: one place for constructors, groups, overrides and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _backend
from .._checks import check_choice, check_count, check_flag, check_number, check_seed

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
        check_number("lr", lr, "[0, inf)")
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
    check_number(key, lr, "[0, inf)")


def _check_betas(key: str, betas: Any) -> None:
    for index, beta in enumerate(parse_betas(betas)):
        check_number(f"{key}[{index}]", beta, "[0, 1)")


def _check_momentum(key: str, value: Any) -> None:
    if value == 0 and not isinstance(value, bool):
        raise NotImplementedError(
            "momentum=0 keeps no state, so there is nothing to store in 8 bits: use torch.optim.SGD"
        )
    check_number(key, value, "(0, 1)")


def _check_seed(key: str, value: Any) -> None:
    if value is not None:
        check_seed(key, value)


def _check_bits(key: str, value: Any) -> None:
    if value not in (8, 32):
        raise ValueError(f"{key} must be 8 or 32, got {value!r}")


_CHECKS: dict[str, Callable[[str, Any], object]] = {
    "lr": _check_lr,
    "betas": _check_betas,
    "eps": partial(check_number, interval="[0, inf)"),
    "weight_decay": partial(check_number, interval="[0, inf)"),
    "momentum": _check_momentum,
    "dampening": partial(check_number, interval="[0, 1]"),
    "nesterov": check_flag,
    "maximize": check_flag,
    "param_precision": partial(check_choice, allowed=PARAM_PRECISIONS),
    "seed": _check_seed,
    "optim_bits": _check_bits,
    "min_8bit_size": partial(check_count, lowest=0),
}

# What an optimizer here may have as its own setting.
SETTINGS = frozenset(_CHECKS) - {"optim_bits", "min_8bit_size"}
