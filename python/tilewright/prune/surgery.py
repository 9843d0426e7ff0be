"""Taking slices out of the layers of a model, all of them or none, and putting them back.

A *unit* is what leaves as a whole: a channel, a neuron, the heads around one key/value head. A *group* knows
which slices of which layers make up its units. A *journal* records every change, so that it can be undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from .._models import original_class
from .masked import drop_mask, mask_of, set_mask

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass(frozen=True)
class Slots:
    """One side of a layer: its tensors with the dimension they lose, and the sizes that shrink."""

    tensors: tuple[tuple[str, int], ...]
    sizes: tuple[str, ...]


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, a linear layer whose weight is (inputs, outputs)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def is_linear(module: nn.Module | None) -> bool:
    """A plain linear layer, whose weight may be cut; classes derived from it may do anything with theirs."""
    return module is not None and (original_class(module) is nn.Linear or is_conv1d(module))


def slots(module: nn.Module, side: str) -> Slots | None:
    """What a layer loses on its "in" or "out" side; None for kinds that are not known."""
    if original_class(module) is nn.Linear:
        if side == "in":
            return Slots((("weight", 1),), ("in_features",))
        return Slots((("weight", 0), ("bias", 0)), ("out_features",))
    if is_conv1d(module):
        if side == "in":
            return Slots((("weight", 0),), ("nx",))
        return Slots((("weight", 1), ("bias", 0)), ("nf",))
    if isinstance(module, _CONVOLUTIONS) and is_depthwise(module):
        return Slots((("weight", 0), ("bias", 0)), ("in_channels", "out_channels", "groups"))
    if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)) and module.groups == 1:
        inputs = 0 if isinstance(module, _TRANSPOSED) else 1
        if side == "in":
            return Slots((("weight", inputs),), ("in_channels",))
        return Slots((("weight", 1 - inputs), ("bias", 0)), ("out_channels",))
    if isinstance(module, _BATCH_NORMS):
        names = ("weight", "bias", "running_mean", "running_var")
        return Slots(tuple((name, 0) for name in names), ("num_features",))
    if type(module) is nn.GroupNorm:
        return Slots((("weight", 0), ("bias", 0)), ("num_channels",))
    if type(module) is nn.PReLU and module.num_parameters > 1:
        return Slots((("weight", 0),), ("num_parameters",))
    if type(module) is nn.Embedding and side == "out":
        return Slots((("weight", 1),), ("embedding_dim",))
    return None


def is_depthwise(module: nn.Module) -> bool:
    """A convolution in which every channel meets its own kernel alone."""
    return (
        isinstance(module, _CONVOLUTIONS) and module.groups == module.in_channels == module.out_channels > 1
    )


@dataclass(frozen=True, eq=False)
class Cut:
    """What one side of one layer loses with each unit: `position[i]` along it belongs to unit `unit[i]`.

    With `parameter`, the slices are those of that parameter of the module along `dim`, and `side` is "own".
    """

    path: str
    module: nn.Module
    side: str
    position: Tensor
    unit: Tensor
    parameter: str | None = None
    dim: int = 0

    @cached_property
    def slots(self) -> Slots:
        """The tensors and sizes concerned, as found: a layer of one channel may count as another kind."""
        if self.parameter is not None:
            return Slots(((self.parameter, self.dim),), ())
        found = slots(self.module, self.side)
        assert found is not None, self.path
        return found

    def tensors(self) -> Iterator[tuple[str, int, Tensor]]:
        """Name, dimension and value of each tensor that is there."""
        for name, dim in self.slots.tensors:
            value = getattr(self.module, name, None)
            if isinstance(value, Tensor):
                yield name, dim, value

    def positions(self, units: Tensor) -> Tensor:
        """The positions that leave with these units, ascending."""
        return self.position[torch.isin(self.unit, units)].sort().values


@dataclass(eq=False)
class Group:
    """Units that can leave, and all that goes with them.

    Attributes:
        name: the module they belong to, by its path in the model.
        kind: "heads", "width" or "channels".
        units: how many there are.
        cuts: what the layers lose.
        width: channels of a unit, in the layer that makes them.
        counts: counters outside of the layers: object, attribute, and how much it falls with each unit.
        details: what the rewriting of configs needs to know.
    """

    name: str
    kind: str
    units: int
    cuts: list[Cut]
    width: int = 1
    counts: list[tuple[Any, str, int]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def layers(self) -> list[str]:
        """The paths of its layers, each once."""
        return list(dict.fromkeys(cut.path for cut in self.cuts))


Removal = Mapping[Group, Tensor]


class Journal:
    """Changes to objects, in order, and the way back."""

    def __init__(self) -> None:
        self._entries: list[Callable[[], Any]] = []

    def attribute(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute."""
        missing = object()
        old = getattr(owner, name, missing)
        self._entries.append(
            (lambda: delattr(owner, name)) if old is missing else (lambda: setattr(owner, name, old))
        )
        setattr(owner, name, value)

    def tensor(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Exchanges a parameter or buffer of a module; parameters stay parameters."""
        store: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
        old = store[name]
        assert old is not None
        self._entries.append(lambda: store.__setitem__(name, old))
        if isinstance(old, nn.Parameter):
            store[name] = nn.Parameter(value, requires_grad=old.requires_grad)
        else:
            store[name] = value

    def entry(self, key: Any, owner: dict[Any, Any], value: Any) -> None:
        """Sets an entry of a dict."""
        old = owner[key]
        self._entries.append(lambda: owner.__setitem__(key, old))
        owner[key] = value

    def call(self, undo: Callable[[], Any]) -> None:
        """Notes how to take back something done elsewhere."""
        self._entries.append(undo)

    def undo(self) -> None:
        """Takes all changes back, the latest first."""
        while self._entries:
            self._entries.pop()()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to take back."""
        return not self._entries


def apply(removal: Removal, journal: Journal) -> None:
    """Takes the units out of their layers."""
    losses, sizes = _losses(removal)
    with torch.no_grad():
        for (module, name), along in losses.items():
            kept = _kept(getattr(module, name), along)
            mask = mask_of(module, name)
            if mask is not None:  # its zeros stay zero in what is left, and in what comes back
                journal.call(partial(set_mask, module, mask, name))
                drop_mask(module, name)
            journal.tensor(module, name, kept.detach().contiguous())
            if mask is not None:
                set_mask(module, _kept(mask, along), name)
                journal.call(partial(drop_mask, module, name))
    for (module, size), count in sizes.items():
        old = getattr(module, size)
        if isinstance(module, nn.GroupNorm):
            channels = old // module.num_groups
            journal.attribute(module, "num_groups", (old - count) // channels)
        journal.attribute(module, size, old - count)
    for group, units in removal.items():
        for owner, name, amount in group.counts:
            journal.attribute(owner, name, getattr(owner, name) - amount * len(units))


def _kept(value: Tensor, along: Mapping[int, Tensor]) -> Tensor:
    for dim, gone in along.items():
        keep = torch.ones(value.shape[dim], dtype=torch.bool)
        keep[gone] = False
        value = value.index_select(dim, keep.nonzero().flatten().to(value.device))
    return value


@contextmanager
def masked(removal: Removal) -> Iterator[None]:
    """For the time being, zeros where units would leave: in weights, biases and the scales of norms."""
    journal = Journal()
    try:
        with torch.no_grad():
            for (module, name), along in _losses(removal)[0].items():
                value = getattr(module, name).detach().clone()
                for dim, gone in along.items():
                    value.index_fill_(dim, gone.to(value.device), 0)
                journal.tensor(module, name, value)
        yield
    finally:
        journal.undo()


def _losses(
    removal: Removal,
) -> tuple[dict[tuple[nn.Module, str], dict[int, Tensor]], dict[tuple[nn.Module, str], int]]:
    """For each tensor what it loses along which dimension, and for each size how much it falls.

    Groups may meet in one tensor: the inputs and outputs of a layer, or parts of a concatenation.
    """
    sides: dict[tuple[nn.Module, str, str | None, int], tuple[Cut, set[int]]] = {}
    for group, units in removal.items():
        for cut in group.cuts:
            side = "out" if is_depthwise(cut.module) else cut.side
            key = (cut.module, side, cut.parameter, cut.dim)
            sides.setdefault(key, (cut, set()))[1].update(cut.positions(units).tolist())
    losses: dict[tuple[nn.Module, str], dict[int, Tensor]] = {}
    sizes: dict[tuple[nn.Module, str], int] = {}
    for cut, gone in sides.values():
        if not gone:
            continue
        for name, dim, _ in cut.tensors():
            losses.setdefault((cut.module, name), {})[dim] = torch.tensor(sorted(gone))
        for size in cut.slots.sizes:
            sizes[cut.module, size] = len(gone)
    return losses, sizes


def not_plain(path: str) -> str:
    """Why a layer is not cut whose weight is computed from others."""
    return (
        f"the weight of {path} is no plain parameter: make it one by import_torch_masks or by removing its "
        "parametrization"
    )


def tied_with(model: nn.Module, groups: Iterable[Group]) -> dict[Group, str]:
    """Groups that would cut a tensor that another layer holds too, with that layer's name."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for value in module._parameters.values():
            if value is not None:
                owners.setdefault(id(value), []).append((module, path))
    found = {}
    for group in groups:
        for cut in group.cuts:
            for _, _, value in cut.tensors():
                others = [path for module, path in owners.get(id(value), []) if module is not cut.module]
                if others:
                    found[group] = f"the weight of {cut.path} is also that of {others[0]}"
    return found
