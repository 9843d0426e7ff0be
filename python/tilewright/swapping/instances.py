"""Giving one module other methods, and taking them away again.

The module's class is exchanged for a subclass that differs in those methods alone, has the same name, and
exists once for every original. So other models of the class do not change, `isinstance` and `state_dict` see
no difference, copies stay swapped, and a pickle names the original and rebuilds the subclass on loading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

Methods = Mapping[str, Callable[..., Any]]


@dataclass(frozen=True)
class Layer:
    """A kind of layer: the op that runs it, the methods it gets, and why a certain one cannot have them."""

    op: str
    methods: Methods
    obstacle: Callable[[nn.Module], str | None]


_ORIGINAL = "_tilewright_original"
_subclasses: dict[type[nn.Module], type[nn.Module]] = {}


def is_swapped(module: nn.Module) -> bool:
    """Whether the module has methods of ours."""
    return hasattr(type(module), _ORIGINAL)


def exchange(module: nn.Module, methods: Methods) -> None:
    """Gives this module the methods; raises TypeError where Python cannot exchange its class."""
    _set_class(module, _subclass(type(module), methods))


def restore(module: nn.Module) -> None:
    """Gives the module its own methods back."""
    _set_class(module, getattr(type(module), _ORIGINAL))


def replaced_forward(module: nn.Module) -> str | None:
    """Why the module does not run its class's forward, if so; accelerate's hooks are seen through."""
    own = vars(module)
    if "forward" not in own:
        return None
    inner = own.get("_old_forward")
    if getattr(inner, "__func__", None) is getattr(type(module), "forward", None):
        return None
    return "its forward was replaced on the instance"


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    own = vars(module)
    found = getattr(own.get("_old_forward"), "__func__", None)
    hooked = found is getattr(type(module), "forward", None)
    module.__class__ = cls
    if "_old_forward" in own and hooked:  # accelerate keeps the bound method it found
        own["_old_forward"] = MethodType(cls.forward, module)


def _subclass(original: type[nn.Module], methods: Methods) -> type[nn.Module]:
    if original not in _subclasses:
        namespace = {
            **methods,
            _ORIGINAL: original,
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "__reduce_ex__": _reduce,
        }
        _subclasses[original] = type(original.__name__, (original,), namespace)
    return _subclasses[original]


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    original = getattr(type(self), _ORIGINAL)
    state_of = getattr(self, "__getstate__", None)
    return _rebuild, (original,), vars(self) if state_of is None else state_of()


def _rebuild(original: type[nn.Module]) -> nn.Module:
    from . import methods_for

    cls = _subclass(original, methods_for(original))
    return cls.__new__(cls)
