"""Masks that live beside the weights of a plain model, and keep their zeros through training.

The zeros are in the weight itself: whoever saves, loads, exports or runs the model needs to know nothing of
them. The mask is an attribute of the layer that is in no `state_dict`, follows `copy.deepcopy`, `pickle` and
`model.to`, and does two things: it takes the gradient of pruned weights away as soon as it has been
accumulated, and after the first step of an optimizer it clears what the optimizer remembers of them. From
then on an elementwise optimizer computes an update of exactly zero; any other is corrected after each step.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.utils import prune as torch_prune
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from .._checks import check_type
from ..optim.optimizer import BlockwiseOptimizer
from .patterns import Pattern, parse_pattern

_MASKS = "_tilewright_masks"  # in vars(module): the keepers, by the parameter's name

# Under these a weight without gradient and history does not move. Others are corrected after every step.
_ELEMENTWISE = {
    getattr(torch.optim, name)
    for name in (
        "SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Rprop", "Adagrad", "Adadelta",
    )
}  # fmt: skip


def set_mask(
    module: nn.Module, mask: Tensor, name: str = "weight", *, pattern: str | Pattern | None = None
) -> None:
    """Prunes single weights of one layer for good: writes the zeros, and keeps them zero from now on.

    Whatever trains the layer afterwards, its pruned weights stay exactly zero: under torch's optimizers and
    ours, with weight decay, and with momentum from before. So they do when a `state_dict` is loaded. A mask
    set earlier is replaced; weights that it had pruned and this one keeps are zero, and free to grow.

    Gradients that do not end in ``.grad`` are not masked: those of ``torch.autograd.grad`` and `torch.func`.

    Args:
        module: the layer, such as a `torch.nn.Linear`.
        mask: bool, of the weight's shape; True = kept.
        name: which of its parameters.
        pattern: refuse a mask that has not this pattern, such as "2:4" or ``Block(16, 16)``.

    Raises:
        TypeError: `module` is no module, or `mask` no bool tensor.
        ValueError: the module has no such parameter, the shapes differ, or the mask violates the pattern: by
            how many groups. Nothing has changed.
    """
    check_type("module", module, nn.Module, "torch.nn.Module")
    parameter = module._parameters.get(name)
    if parameter is None:
        raise ValueError(f"{_label(module)} has no parameter {name!r}{_reason(module, name)}")
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor, True = kept, got {came}")
    if mask.shape != parameter.shape:
        raise ValueError(
            f"mask must have the shape of {name}, {tuple(parameter.shape)}, got {tuple(mask.shape)}"
        )
    if pattern is not None:
        parse_pattern(pattern).check_mask(mask)
    mask = mask.detach().to(parameter.device, copy=True)
    drop_mask(module, name)
    keepers = vars(module).setdefault(_MASKS, {})
    if not keepers:
        module.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]
    keepers[name] = keeper = _Keeper(module, name, parameter, mask)
    keeper.enforce()
    keeper.mask_gradient(parameter)


def mask_of(module: nn.Module, name: str = "weight") -> Tensor | None:
    """The mask of a layer, True = kept; None if it has none.

    A layer pruned by `torch.nn.utils.prune` has that mask. The tensor is the layer's own: do not write to it.
    """
    keeper = vars(module).get(_MASKS, {}).get(name)
    if keeper is not None:
        parameter = module._parameters.get(name)
        mask: Tensor = keeper.mask if parameter is None else keeper.mask_on(parameter.device)
        return mask
    theirs = module._buffers.get(f"{name}_mask")
    return None if theirs is None or f"{name}_orig" not in module._parameters else theirs != 0


def drop_mask(module: nn.Module, name: str = "weight") -> bool:
    """Forgets a layer's mask, so that all of its weights train again; returns whether there was one.

    The weights stay as they are. Masks of `torch.nn.utils.prune` are theirs to remove.
    """
    keepers = vars(module).get(_MASKS, {})
    keeper = keepers.pop(name, None)
    if keeper is None:
        return False
    keeper.detach()
    if not keepers:
        del vars(module)[_MASKS]
        hooks = module._load_state_dict_post_hooks
        for key in [key for key, hook in hooks.items() if hook is _after_load]:
            del hooks[key]
    return True


def import_torch_masks(model: nn.Module) -> list[str]:
    """Turns what `torch.nn.utils.prune` pruned into plain weights with masks; returns their names.

    `weight_orig` becomes `weight` again, the same parameter with its zeros baked in, so that optimizers go
    on with it; the buffer `weight_mask` and the hook that multiplied them in every forward leave, and
    `copy.deepcopy` works, which fails on a layer after its first forward with that hook.
    """
    return [path for path, _ in bake_torch_masks(model)]


def bake_torch_masks(model: nn.Module) -> list[tuple[str, Callable[[], None]]]:
    """`import_torch_masks`, with a function for each weight that takes the change back."""
    return [
        (f"{path}.{hook._tensor_name}" if path else hook._tensor_name, _bake(module, hook._tensor_name))
        for path, module in model.named_modules()
        for hook in list(module._forward_pre_hooks.values())
        if isinstance(hook, torch_prune.BasePruningMethod)
    ]


def clear_optimizer(optimizer: Optimizer, modules: list[nn.Module]) -> None:
    """Takes the pruned weights of these layers out of the optimizer's memory now, not after its next step."""
    for module in modules:
        for keeper in vars(module).get(_MASKS, {}).values():
            keeper.clear(optimizer)


class _Keeper:
    """One parameter's mask. The layer holds it, and it holds the parameter; nothing holds it in return."""

    def __init__(self, module: nn.Module, name: str, parameter: nn.Parameter, mask: Tensor) -> None:
        self.module, self.name = weakref.ref(module), name
        self.parameter, self.mask = parameter, mask
        self._attach()

    def _attach(self) -> None:
        self.cleared: WeakSet[Optimizer] = WeakSet()
        self.handle: RemovableHandle | None = None
        if self.parameter.is_floating_point():
            hook = partial(_on_gradient, weakref.ref(self))
            asked = self.parameter.requires_grad
            self.parameter.requires_grad_(
                True
            )  # torch takes hooks for such tensors only, and then keeps them
            self.handle = self.parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            self.parameter.requires_grad_(asked)
        _keepers.add(self)

    def detach(self) -> None:
        """Ends it: the parameter trains as any other."""
        if self.handle is not None:
            self.handle.remove()
        _keepers.discard(self)

    def follow(self) -> bool:
        """Watches the parameter that has taken this one's place in the layer, if one has."""
        module = self.module()
        present = None if module is None else module._parameters.get(self.name)
        if present is self.parameter or type(present) is not nn.Parameter:
            return False
        if present.shape != self.mask.shape:
            return False
        self.detach()
        self.parameter = present
        self._attach()
        return True

    def mask_on(self, device: torch.device) -> Tensor:
        """The mask, which follows its parameter when it is first asked for there."""
        if self.mask.device != device:
            self.mask = self.mask.to(device)
        return self.mask

    def mask_gradient(self, parameter: Tensor) -> None:
        """Takes the gradient of pruned weights away."""
        grad = parameter.grad
        if grad is None or grad.layout is not torch.strided:
            return
        pruned = ~self.mask_on(grad.device)
        if grad.requires_grad:  # create_graph=True
            parameter.grad = grad.masked_fill(pruned, 0.0)
        else:
            grad.masked_fill_(pruned, 0.0)

    @torch.no_grad()
    def enforce(self) -> None:
        """Writes the zeros."""
        self.parameter.masked_fill_(~self.mask_on(self.parameter.device), 0.0)

    @torch.no_grad()
    def clear(self, optimizer: Optimizer) -> None:
        """Zeroes the optimizer's state at the pruned weights: 8-bit averages too, and precise copies."""
        if optimizer not in self.cleared:
            _watch(optimizer)
            self.cleared.add(optimizer)
        state = optimizer.state.get(self.parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == self.mask.shape and value.dim() > 0:
                pruned = ~self.mask_on(value.device)
                if value.is_floating_point():
                    value.masked_fill_(pruned, 0.0)
                elif value.dtype == torch.uint8 and isinstance(state.get(f"qmap{key[-1:]}"), Tensor):
                    levels = state[f"qmap{key[-1:]}"].abs()
                    value.masked_fill_(pruned, int(levels.argmin()))
                    if levels.min() != 0:  # a map of somebody's own, in which nothing is forgotten
                        self.cleared.discard(optimizer)

    def after_step(self, optimizer: Optimizer, elementwise: bool) -> None:
        """Makes up for what the optimizer still knew of pruned weights, or for its not being elementwise."""
        followed = self.follow()
        if elementwise:
            if optimizer in self.cleared or not (followed or self.parameter in optimizer.state):
                return
            self.clear(optimizer)
        elif not any(self.parameter is p for group in optimizer.param_groups for p in group["params"]):
            return
        self.enforce()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Keeper:
        module = copy.deepcopy(self.module(), memo)  # which is being copied, and known to the memo
        parameter = copy.deepcopy(self.parameter, memo)
        assert module is not None
        made = memo[id(self)] = _Keeper(module, self.name, parameter, self.mask.clone())
        return made

    def __getstate__(self) -> tuple[Any, ...]:
        return self.module(), self.name, self.parameter, self.mask

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        module, self.name, self.parameter, self.mask = state
        self.module = weakref.ref(module)
        self._attach()


_keepers: WeakSet[_Keeper] = WeakSet()
_watched: WeakSet[Optimizer] = WeakSet()


def _on_gradient(keeper: weakref.ref[_Keeper], parameter: Tensor) -> None:
    found = keeper()
    if found is not None:
        found.mask_gradient(parameter)


def _after_load(module: nn.Module, incompatible_keys: Any) -> None:
    """Loaded weights are pruned as those before them."""
    for keeper in vars(module)[_MASKS].values():
        keeper.follow()
        keeper.enforce()


@_disable_dynamo
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _keepers:
        return
    elementwise = type(optimizer) in _ELEMENTWISE or isinstance(optimizer, BlockwiseOptimizer)
    for keeper in list(_keepers):
        keeper.after_step(optimizer, elementwise)


def _watch(optimizer: Optimizer) -> None:
    """A loaded state may remember pruned weights again."""
    if optimizer not in _watched:
        _watched.add(optimizer)
        optimizer.register_load_state_dict_post_hook(_after_optimizer_load)


def _after_optimizer_load(optimizer: Optimizer) -> None:
    for keeper in list(_keepers):
        keeper.cleared.discard(optimizer)


register_optimizer_step_post_hook(_after_step)


def _bake(module: nn.Module, name: str) -> Callable[[], None]:
    """Makes one weight plain; returns what makes it torch's pruned weight again."""
    original = module._parameters[f"{name}_orig"]
    assert original is not None
    values = original.detach().clone()
    parameters, buffers, hooks = (
        dict(module._parameters), dict(module._buffers), dict(module._forward_pre_hooks),
    )  # fmt: skip
    product = vars(module).get(name)
    mask = mask_of(module, name)
    assert mask is not None

    torch_prune.remove(module, name)  # type: ignore[no-untyped-call]
    rest = {key: value for key, value in module._parameters.items() if key != name}
    _replace(module._parameters, {name: original, **rest})  # torch puts it last
    set_mask(module, mask, name)

    def back() -> None:
        drop_mask(module, name)
        original.data.copy_(values)
        _replace(module._parameters, parameters)
        _replace(module._buffers, buffers)
        _replace(module._forward_pre_hooks, hooks)
        vars(module)[name] = product

    return back


def _replace(entries: dict[Any, Any], others: dict[Any, Any]) -> None:
    entries.clear()
    entries.update(others)


def _label(module: nn.Module) -> str:
    return f"the {type(module).__name__}"


def _reason(module: nn.Module, name: str) -> str:
    if f"{name}_orig" in module._parameters:
        return ": torch.nn.utils.prune holds it; tilewright.prune.import_torch_masks(model) makes it plain"
    if torch.nn.utils.parametrize.is_parametrized(module, name):
        return ": it is parametrized; torch.nn.utils.parametrize.remove_parametrizations makes it plain"
    return ""
