"""The channels of any network that can leave, by the dependency graph of torch-pruning.

torch-pruning traces which channels of which layers are the same, through additions, concatenations and
flattening. Only its graph is used: what leaves, and how, is decided and done here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._models import call, evaluation, floats_of, original_class
from ..scan.dense import by_torch
from .structure import Side
from .surgery import Cut, Group, is_depthwise, not_plain, slots

_ROOTS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
# Norms whose statistics run over channels: without some of them, those of the others change.
_ACROSS_CHANNELS = ("LayerNorm", "RMSNorm", "LocalResponseNorm")
_DIVIDING = ("SPLIT", "UNBIND", "SLICE")


def find_channels(
    model: nn.Module, example_inputs: Any, taken: set[Side]
) -> tuple[list[Group], dict[str, str]]:
    """Groups of channels outside of what is `taken`, and those that cannot shrink, with the reason."""
    roots = [m for m in model.modules() if original_class(m) in _ROOTS and (m, "out") not in taken]
    if not roots:
        return [], {}
    graph = _graph(model, example_inputs)
    paths = {module: path for path, module in model.named_modules()}
    owners = {
        id(parameter): (module, paths[module], name)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    groups: list[Group] = []
    refused: dict[str, str] = {}
    for traced in _all_groups(graph):
        root = traced[0].dep.target.module
        if (root, "out") in taken or root not in paths:
            continue
        found = _group(graph, traced, root, paths, owners, taken)
        if isinstance(found, str):
            refused[paths[root]] = found
        else:
            groups += found
    order = {path: index for index, path in enumerate(paths.values())}
    groups.sort(key=lambda group: order[group.name.partition(" ")[0]])
    return groups, dict(sorted(refused.items(), key=lambda entry: order[entry[0]]))


def _all_groups(graph: Any) -> Iterator[Any]:
    """The graph's groups; an error instead of the endless search that some reshapes send torch-pruning on."""
    kind = _import().dependency.Group
    original, most = kind.add_dep, 20 * len(graph.module2node) + 1000

    def add_dep(self: Any, dep: Any, idxs: Any) -> None:
        if len(self.items) > most:
            raise RuntimeError("torch-pruning does not come to an end with the reshapes of this model")
        original(self, dep, idxs)

    kind.add_dep = add_dep
    try:
        yield from graph.get_all_groups(ignored_layers=[], root_module_types=list(_ROOTS))
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise RuntimeError(
            f"torch-pruning could not follow the channels of this model ({type(error).__name__}: {error})"
        ) from error
    finally:
        kind.add_dep = original


def _import() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch_pruning
    except ImportError as error:
        raise ImportError(
            "tilewright.prune.shrink needs torch-pruning for the channels of this model: "
            "pip install tilewright[prune]"
        ) from error
    return torch_pruning


def _graph(model: nn.Module, example_inputs: Any) -> Any:
    """Traces the model; its mode and what needs gradients are put back afterwards."""
    library = _import()

    def output(value: Any) -> list[Tensor]:
        return [tensor for _, tensor in floats_of(value) if tensor.grad_fn is not None]

    def forward(traced: nn.Module, inputs: Any) -> Any:
        return call(traced, inputs)

    with evaluation(model), _differentiable(model), _own_hooks(model), by_torch(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return library.DependencyGraph().build_dependency(
                model,
                example_inputs,
                forward_fn=forward,
                output_transform=output,
                unwrapped_parameters=None,
                verbose=False,
            )
        except Exception as error:
            raise RuntimeError(
                f"torch-pruning could not trace this model ({type(error).__name__}: {error}): "
                "it needs a forward pass that autograd records, on example_inputs as they are"
            ) from error


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Gradients for all parameters for the time being: the graph is read off autograd's."""
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def _own_hooks(model: nn.Module) -> Iterator[None]:
    """Takes hooks away that a failed trace leaves behind."""
    before = {module: set(module._forward_hooks) for module in model.modules()}
    try:
        yield
    finally:
        for module, known in before.items():
            for key in set(module._forward_hooks) - known:
                del module._forward_hooks[key]


def _group(
    graph: Any,
    traced: Any,
    root: nn.Module,
    paths: dict[nn.Module, str],
    owners: dict[int, tuple[nn.Module, str, str]],
    taken: set[Side],
) -> list[Group] | str:
    """The groups of a root layer's output channels and those that meet them, or why they have to stay."""
    channels = graph.get_out_channels(root)
    items = list(traced)
    if any(item.dep.target.type.name in _DIVIDING for item in items):
        try:
            items, unit_of = _closed_units(graph, items, root, channels)
        except (AssertionError, LookupError, TypeError, ValueError):
            return "torch-pruning lost track of its channels where they are divided"
    else:
        unit_of = {channel: channel for channel in range(channels)}
    cuts: list[Cut] = []
    merged: dict[int, int] = {}
    for item in items:
        target, positions = item.dep.target, list(item.idxs)
        kind = type(target.module).__name__
        if _ends(graph, item.dep):
            return "its channels are those of the model's output"
        if any(name in kind for name in _ACROSS_CHANNELS):
            return f"{_name(target, paths)} takes its statistics over the channels"
        found = _cut(graph, item, paths, owners, unit_of)
        if isinstance(found, str):
            return found
        if found is None:
            continue
        if (found.module, found.side) in taken:
            return f"{found.path} is part of an attention layer or MLP"
        if isinstance(found.module, nn.GroupNorm):
            if len(positions) != found.module.num_channels:
                return f"{found.path} takes its statistics over channels of other layers as well"
            size = found.module.num_channels // found.module.num_groups
            if merged or len(set(found.unit.tolist())) != len(positions):
                return f"{found.path} meets a second norm over groups of channels"
            merged = {
                unit: position // size for position, unit in zip(positions, found.unit.tolist(), strict=True)
            }
        cuts.append(found)
    if merged:
        alone = 1 + max(merged.values())
        numbers = {unit: merged.get(unit, alone + unit) for cut in cuts for unit in cut.unit.tolist()}
        cuts = [_part(cut, numbers) for cut in cuts]
    return _separate(cuts, paths)


def _separate(cuts: list[Cut], paths: dict[nn.Module, str]) -> list[Group]:
    """A group for the units of each producer: what is concatenated loses the same share of every part."""
    met: dict[int, list[int]] = {}
    for index, cut in enumerate(cuts):
        for unit in sorted(set(cut.unit.tolist())):
            met.setdefault(unit, []).append(index)
    classes: dict[tuple[int, ...], list[int]] = {}
    for unit in sorted(met):
        classes.setdefault(tuple(met[unit]), []).append(unit)
    groups: list[Group] = []
    for indices, units in classes.items():
        numbers = {unit: number for number, unit in enumerate(units)}
        own = [_part(cuts[index], numbers) for index in indices]
        made = next(
            (c for c in own if c.side == "out" and type(c.module) in _ROOTS and not is_depthwise(c.module)),
            own[0],
        )
        same = sum(group.name.partition(" ")[0] == made.path for group in groups)
        name = f"{made.path} ({same + 1})" if same else made.path
        groups.append(Group(name, "channels", len(units), own, int((made.unit == 0).sum())))
    return groups


def _part(cut: Cut, numbers: dict[int, int]) -> Cut:
    """A cut without the units that are not listed, the others renumbered."""
    listed = torch.tensor([unit in numbers for unit in cut.unit.tolist()])
    unit = torch.tensor([numbers[unit] for unit in cut.unit[listed].tolist()], dtype=torch.long)
    return Cut(cut.path, cut.module, cut.side, cut.position[listed], unit, cut.parameter, cut.dim)


def _name(target: Any, paths: dict[nn.Module, str]) -> str:
    return paths.get(target.module, type(target.module).__name__)


def _ends(graph: Any, dep: Any) -> bool:
    """Whether this takes channels from what the model returns."""
    if dep.target.type.name == "OUTPUT":
        return True
    return not dep.target.outputs and graph.is_out_channel_pruning_fn(dep.handler)


def _cut(
    graph: Any,
    item: Any,
    paths: dict[nn.Module, str],
    owners: dict[int, tuple[nn.Module, str, str]],
    unit_of: dict[int, int],
) -> Cut | str | None:
    target = item.dep.target
    position = torch.tensor(list(item.idxs), dtype=torch.long)
    if not all(channel in unit_of for channel in item.root_idxs) or bool((position < 0).any()):
        return "torch-pruning lost track of its channels"
    unit = torch.tensor([unit_of[channel] for channel in item.root_idxs], dtype=torch.long)
    if isinstance(target.module, nn.Parameter):
        if id(target.module) not in owners:
            return "a parameter of it has no name in the model"
        module, path, name = owners[id(target.module)]
        dim = target.pruning_dim % target.module.dim()
        return Cut(path, module, "own", position, unit, name, dim)
    if target.module not in paths:
        return None  # an operation, which holds nothing
    path = paths[target.module]
    empty = next(target.module.parameters(), None) is None
    if not path or (empty and slots(target.module, "out") is None):
        return None
    side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
    if slots(target.module, side) is None:
        return f"it runs into {path}, a {_described(target.module)}, which is not cut"
    if "weight" not in target.module._parameters:
        return not_plain(path)
    return Cut(path, target.module, side, position, unit)


def _described(module: nn.Module) -> str:
    groups = getattr(module, "groups", 1)
    return f"{type(module).__name__} of {groups} groups" if groups != 1 else type(module).__name__


def _closed_units(
    graph: Any, items: list[Any], root: nn.Module, channels: int
) -> tuple[list[Any], dict[int, int]]:
    """Channels that can only leave together, where a tensor is divided: found one channel at a time."""
    unit_of = {channel: channel for channel in range(channels)}

    def find(channel: int) -> int:
        while unit_of[channel] != channel:
            channel = unit_of[channel]
        return channel

    handler: Callable[..., Any] = items[0].dep.handler
    for channel in range(channels):
        for item in graph.get_pruning_group(root, handler, [channel]):
            if item.dep.target.module is root and graph.is_out_channel_pruning_fn(item.dep.handler):
                for other in item.idxs:
                    low, high = sorted((find(channel), find(other)))
                    unit_of[high] = low
    return items, {channel: find(channel) for channel in range(channels)}
