"""Settings of single parameters that override what their optimizer says, as in bitsandbytes."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .._checks import nearest
from .options import check_options, parse_betas

OVERRIDABLE = ("optim_bits", "lr", "betas", "eps", "weight_decay", "min_8bit_size")


class GlobalOptimManager:
    """Overrides of optimizer settings for single parameters, for all optimizers of this process.

        manager = tw.optim.GlobalOptimManager.get_instance()
        manager.override_config(model.embed.weight, "optim_bits", 32)

    Names and arguments are those of bitsandbytes. Parameters are known by identity and held weakly: an
    override lives as long as its parameter, and never falls on another one that gets the same id().
    The order of override_config, register_parameters and making an optimizer does not matter; a change
    counts from the next step on.
    """

    _instance: GlobalOptimManager | None = None

    def __init__(self) -> None:
        raise RuntimeError("use GlobalOptimManager.get_instance()")

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        """The one manager of the process."""
        if cls._instance is None:
            manager = cls.__new__(cls)
            manager.initialize()
            cls._instance = manager
        return cls._instance

    def initialize(self) -> None:
        """Forgets every override."""
        self._of_tensor: Any = WeakTensorKeyDictionary()
        self._of_module: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, dict[str, Any]]]
        self._of_module = weakref.WeakKeyDictionary()
        self.version = getattr(self, "version", 0) + 1

    def register_parameters(self, params: Iterable[Any]) -> None:
        """Accepted so that code for bitsandbytes runs: overrides here need no registration.

        Raises:
            TypeError: `params` holds something else than tensors or parameter groups.
        """
        for entry in params:
            for p in entry["params"] if isinstance(entry, Mapping) else (entry,):
                _check_parameter(p)

    def override_config(
        self,
        parameters: Tensor | Iterable[Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Overrides settings of `parameters`; what was overridden before stays unless named again.

        Args:
            parameters: a tensor or several.
            key: one of optim_bits, lr, betas, eps, weight_decay, min_8bit_size.
            value: the value of `key`.
            key_value_dict: several keys with their values, instead of `key` and `value`.

        Raises:
            ValueError: a key that no optimizer would honour, or no key at all.
        """
        if key_value_dict is None:
            if key is None or value is None:
                raise ValueError("override_config needs key and value, or key_value_dict")
            key_value_dict = {key: value}
        elif key is not None or value is not None:
            raise ValueError("override_config takes key and value, or key_value_dict, not both")
        config = _checked(key_value_dict)
        targets = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        for p in targets:
            _check_parameter(p)
        for p in targets:
            self._of_tensor[p] = {**self._of_tensor.get(p, {}), **config}
        self.version += 1

    def register_module_override(
        self, module: torch.nn.Module, param_name: str, config: Mapping[str, Any]
    ) -> None:
        """Overrides settings of whatever parameter `module` holds under `param_name` when a step needs it.

        Raises:
            AttributeError: the module has no such parameter.
            ValueError: a key that no optimizer would honour.
        """
        _check_parameter(getattr(module, param_name))
        configs = self._of_module.setdefault(module, {})
        configs[param_name] = {**configs.get(param_name, {}), **_checked(config)}
        self.version += 1

    def overrides(self) -> dict[int, dict[str, Any]]:
        """Every override in force, by id() of the parameter: valid only while the caller holds these."""
        found = {}
        for module, configs in list(self._of_module.items()):
            for name, config in configs.items():
                p = getattr(module, name, None)
                if isinstance(p, Tensor):
                    found[id(p)] = dict(config)
        for p, config in list(self._of_tensor.items()):
            found[id(p)] = {**found.get(id(p), {}), **config}
        return found


def _check_parameter(p: object) -> None:
    if not isinstance(p, Tensor):
        raise TypeError(f"expected a parameter, got {type(p).__name__}")


def _checked(config: Mapping[str, Any]) -> dict[str, Any]:
    unknown = [key for key in config if key not in OVERRIDABLE]
    if unknown:
        raise ValueError(
            f"cannot override {', '.join(map(repr, unknown))}: it would have no effect; "
            f"the keys are {', '.join(OVERRIDABLE)}{nearest(unknown[0], OVERRIDABLE)}"
        )
    check_options(config)
    return {key: parse_betas(value) if key == "betas" else value for key, value in config.items()}
