"""Giving one module other methods, and taking them away again.

The module's class is exchanged for a subclass that differs in those methods alone, has the same name, and
exists once for every original. So other models of the class do not change, `isinstance` and `state_dict` see
no difference, copies stay swapped, and a pickle names the original and rebuilds the subclass on loading.

Others exchange classes too: torch's parametrizations and FSDP put one of theirs on top of a layer's, and look
for that right below theirs. So ours goes below what torch put on top, and out from below whatever came on top
later: the classes above are made anew, on another base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from .._models import NOTE, ORIGINAL

Methods = Mapping[str, Callable[..., Any]]


@dataclass(frozen=True)
class Layer:
    """A kind of layer: the op that runs it, the methods it gets, and why a certain one cannot have them."""

    op: str
    methods: Methods
    obstacle: Callable[[nn.Module], str | None]


_subclasses: dict[type[nn.Module], type[nn.Module]] = {}
_rebased: WeakKeyDictionary[type[nn.Module], type[nn.Module]] = WeakKeyDictionary()


def is_swapped(module: nn.Module) -> bool:
    """Whether the module has methods of ours."""
    return hasattr(type(module), ORIGINAL)


def exchange(module: nn.Module, methods: Methods, note: object = None) -> None:
    """Gives this module the methods, and a note; raises TypeError where Python cannot exchange its class."""
    cls = type(module)
    bases = cls.__mro__[: cls.__mro__.index(nn.Module)]
    own = next((base for base in bases if base.__module__.partition(".")[0] != "torch"), cls)
    _set_class(module, _on_another_base(cls, own, _subclass(own, methods)))
    if note is not None:
        vars(module)[NOTE] = note


def restore(modules: Iterable[nn.Module]) -> None:
    """Gives the modules their own methods back: all of them or, after an error, none."""
    for module, cls in [(module, _without_ours(type(module))) for module in modules]:
        _set_class(module, cls)
        vars(module).pop(NOTE, None)


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


def _without_ours(cls: type[nn.Module]) -> type[nn.Module]:
    ours = next(base for base in cls.__mro__ if ORIGINAL in vars(base))
    return _on_another_base(cls, ours, vars(ours)[ORIGINAL])


def _on_another_base(cls: type[nn.Module], old: type[nn.Module], new: type[nn.Module]) -> type[nn.Module]:
    """The class with `new` in the place of `old` among those it is made from."""
    if cls is old:
        return new
    if any(isinstance(f, FunctionType) and "__class__" in f.__code__.co_freevars for f in vars(cls).values()):
        raise TypeError(
            f"{cls.__qualname__} was derived from the class of a swapped layer and calls super(), "
            "which ties it to that class: give the layer its former class back first"
        )
    bases = tuple(
        _on_another_base(base, old, new) if issubclass(base, old) else base for base in cls.__bases__
    )
    made = _rebased.get(cls)
    # One for all modules of the class, unless it has changed since, as those of parametrizations do.
    if made is None or made.__bases__ != bases or _members(made) != _members(cls):
        made = _rebased[cls] = type(cls.__name__, bases, _members(cls))
    return made


def _members(cls: type) -> dict[str, Any]:
    return {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}


def _subclass(original: type[nn.Module], methods: Methods) -> type[nn.Module]:
    if original not in _subclasses:
        namespace = {
            **methods,
            ORIGINAL: original,
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "__reduce_ex__": _reduce,
        }
        _subclasses[original] = type(original.__name__, (original,), namespace)
    return _subclasses[original]


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    original = vars(type(self)).get(ORIGINAL)
    if original is None:  # a class above ours, which is not ours to rebuild
        return object.__reduce_ex__(self, protocol)  # type: ignore[return-value]
    state_of = getattr(self, "__getstate__", None)
    return _rebuild, (original,), vars(self) if state_of is None else state_of()


def _rebuild(original: type[nn.Module]) -> nn.Module:
    from . import methods_for

    cls = _subclass(original, methods_for(original))
    return cls.__new__(cls)
