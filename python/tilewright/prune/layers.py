"""Which layers of a model are pruned, and their weights as (outputs, inputs) matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_matches

Names = str | Sequence[str] | Callable[[str, nn.Module], bool] | None

# The last part of the name of a layer that says what a model's output means.
OUTPUT_NAMES = ("classifier", "embed_out", "head", "lm_head", "output_projection", "qa_outputs", "score")
# And of those that make a state space's step sizes and maps of a token: few weights that decide about all.
STATE_SPACE_NAMES = ("dt_proj", "x_proj")
_THIN = (
    16  # a weight whose one side is longer than so many times the other: a router, a bottleneck, a last layer
)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(eq=False)
class Target:
    """A weight to prune, and the layers that share it: nearly always one.

    Attributes:
        name: the first layer's name in the model.
        modules: the layers.
        transposed: the weight is stored (inputs, outputs), as `Conv1D` of transformers does.
    """

    name: str
    modules: list[nn.Module]
    transposed: bool = False

    @property
    def weight(self) -> nn.Parameter:
        """The parameter."""
        parameter = self.modules[0].weight
        assert isinstance(parameter, nn.Parameter)
        return parameter

    def as_matrix(self, tensor: Tensor) -> Tensor:
        """The weight, or what has its shape, as (outputs, inputs); and a matrix like that as the weight."""
        return tensor.t() if self.transposed else tensor

    @property
    def matrix(self) -> Tensor:
        """The weight as (outputs, inputs), without gradient."""
        return self.as_matrix(self.weight.detach())


@dataclass(frozen=True)
class Skipped:
    """A linear layer that was left dense.

    Attributes:
        name: the layer's name in the model.
        why: what excluded it.
    """

    name: str
    why: str


def is_prunable(module: nn.Module) -> bool:
    """Whether it is a linear layer: `torch.nn.Linear` or `Conv1D` of transformers."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def find_targets(model: nn.Module, include: Names, exclude: Names) -> tuple[list[Target], list[Skipped]]:
    """The weights to prune, and the linear layers that are not.

    Raises:
        TypeError: `include` or `exclude` of another type.
        ValueError: no layer is left, or a pattern matches none.
    """
    for argument, names in (("include", include), ("exclude", exclude)):
        _check_names(model, argument, names)
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    targets: dict[int, Target] = {}
    skipped = []
    for name, module in model.named_modules(remove_duplicate=True):
        if not is_prunable(module):
            continue
        why = _obstacle(name, module, include, exclude, embedded, outputs)
        weight = module._parameters.get("weight")
        if why is not None or weight is None:
            skipped.append(Skipped(name, why or "its weight is not a plain parameter"))
        elif id(weight) in targets:
            targets[id(weight)].modules.append(module)
        else:
            targets[id(weight)] = Target(name, [module], _is_conv1d(module))
    thin = [] if include is not None else [key for key, target in targets.items() if _is_thin(target)]
    if len(thin) < len(targets):  # a model of nothing else is pruned as it is
        for target in (targets.pop(key) for key in thin):
            rows, columns = target.matrix.shape
            skipped.append(Skipped(target.name, f"it is thin, {rows} x {columns}: name it in include"))
    if not targets:
        listed = "".join(f"\n  {entry.name}: {entry.why}" for entry in skipped) or " it has none"
        raise ValueError(f"no linear layer of the model is to be pruned:{listed}")
    return list(targets.values()), skipped


def _obstacle(
    name: str, module: nn.Module, include: Names, exclude: Names, embedded: set[int], outputs: Any
) -> str | None:
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is not a plain parameter"
    if weight.dtype not in _DTYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    if exclude is not None and _matches(name, module, exclude):
        return "excluded"
    if include is not None:
        return None if _matches(name, module, include) else "not included"
    if id(weight) in embedded:
        return "its weight is an embedding's, too"
    last = name.rpartition(".")[2]
    if module is outputs or last in OUTPUT_NAMES:
        return "it is the model's output layer"
    if last in STATE_SPACE_NAMES:
        return "it makes a state space's step sizes and maps: name it in include"
    return None


def _is_thin(target: Target) -> bool:
    rows, columns = target.matrix.shape
    return max(rows, columns) > _THIN * min(rows, columns)


def _check_names(model: nn.Module, argument: str, names: Names) -> None:
    if names is None or callable(names):
        return
    patterns = [names] if isinstance(names, str) else names
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{argument} must be a pattern, patterns or a function (name, module), got {names!r}")
    known = [name for name, module in model.named_modules() if is_prunable(module)]
    check_matches(argument, patterns, known, "linear layer")


def _matches(name: str, module: nn.Module, names: Names) -> bool:
    if callable(names):
        return bool(names(name, module))
    patterns = [names] if isinstance(names, str) else names or ()
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_conv1d(module: nn.Module) -> bool:
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__.partition(".")[0] == "transformers"
