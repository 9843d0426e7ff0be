"""Which weights are kept: `mask` of one, `global_masks` of many at once, and the `scores` they go by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .._checks import (
    FLOATS,
    check_choice,
    check_device,
    check_dtype,
    check_number,
    check_seed,
    check_shape,
    check_tensor,
    suggests_keywords,
)  # fmt: skip
from .mask_ops import prune_best, prune_n_of_m, prune_scores
from .patterns import Block, NOfM, Pattern, matrix_shape, parse_pattern

CRITERIA = ("magnitude", "lp", "wanda", "taylor", "random")
_ELEMENT = Block(1, 1)


@suggests_keywords
def mask(
    weight: Tensor,
    pattern: str | Pattern,
    sparsity: float | None = None,
    criterion: str = "magnitude",
    activation_norm: Tensor | None = None,
    *,
    gradient: Tensor | None = None,
    scope: Literal["layer", "row"] | None = None,
    seed: int | None = None,
    p: float = 2,
    name: str = "weight",
) -> Tensor:
    """Which parts of a weight are kept: a bool tensor of its shape, True where kept.

    Args:
        weight: (out, in, ...), float32, float16, bfloat16, or float64 on a CPU; any strides. Axes after the
            first count as one, the inputs.
        pattern: "n:m" keeps n of every m neighbours in a row, 1 <= n < m <= 32; "row", "column", "element"
            and `Block(rows, columns)` keep or remove such units as a whole.
        sparsity: The share of the units that is removed, 0 <= sparsity < 1. With "n:m" it may be left out.
            Of u units round(sparsity * u) go, as in torch.nn.utils.prune, but never all of them.
        criterion: What a unit is worth, see `scores`.
        activation_norm: (in,), for "wanda": the L2 norm of each input over the calibration data.
        gradient: As weight, for "taylor".
        scope: Units are compared within the "layer", or within each "row" of units. None: within the layer,
            but single elements by "wanda" within the row, as that method does. Not for "n:m".
        seed: For "random": the same seed gives the same mask on every device. None draws one from torch's
            generator.
        p: For "lp": the norm's exponent, above 0, or math.inf.
        name: What messages call the weight.

    Among equals the first is kept, in the order of rows, then columns. No gradient flows. NaN and infinity
    raise ValueError, and so does a pattern that does not fit the shape; a GPU is waited for to know.

    Wanda: Sun et al., "A simple and effective pruning approach for large language models", 2023.
    """
    chosen = _criterion(criterion, p, seed, activation_norm is not None, gradient is not None)
    how = parse_pattern(pattern)
    how.check(_checked(weight, name).shape, name)
    item = _prepare(weight, activation_norm, gradient, name)
    if isinstance(how, NOfM):
        how.check_sparsity(sparsity)
        if scope is not None:
            raise ValueError(
                f"scope: pattern '{how}' compares within its groups, got {scope!r}: leave it out"
            )
        kept: Tensor = prune_n_of_m(
            item.matrix, item.gradient, item.factors, chosen.elementwise, how.n, how.m, chosen.seed, name
        )
        return kept.view(weight.shape)
    down, across = how.units(weight.shape)
    by_row = _by_row(how, scope, criterion, across, name)
    count = _kept(across if by_row else down * across, check_sparsity(sparsity, how))
    return _best([item], how, chosen, count, by_row)[0].view(weight.shape)


@overload
def global_masks(
    weights: Mapping[str, Tensor], pattern: str | Pattern, sparsity: float, criterion: str = ...,
    activation_norms: Mapping[str, Tensor] | None = ..., *,
    gradients: Mapping[str, Tensor] | None = ..., seed: int | None = ..., p: float = ...,
) -> dict[str, Tensor]: ...  # fmt: skip
@overload
def global_masks(
    weights: Sequence[Tensor], pattern: str | Pattern, sparsity: float, criterion: str = ...,
    activation_norms: Sequence[Tensor] | None = ..., *,
    gradients: Sequence[Tensor] | None = ..., seed: int | None = ..., p: float = ...,
) -> list[Tensor]: ...  # fmt: skip
@suggests_keywords
def global_masks(
    weights: Mapping[str, Tensor] | Sequence[Tensor],
    pattern: str | Pattern,
    sparsity: float,
    criterion: str = "magnitude",
    activation_norms: Mapping[str, Tensor] | Sequence[Tensor] | None = None,
    *,
    gradients: Mapping[str, Tensor] | Sequence[Tensor] | None = None,
    seed: int | None = None,
    p: float = 2,
) -> dict[str, Tensor] | list[Tensor]:
    """The masks of many weights whose units compete with each other; arguments as of `mask`.

    Of all units together round(sparsity * units) are removed, but never all; a single weight may lose all of
    its units. Scores are compared as they are: larger blocks, and layers of larger weights, win. Among equals
    the first is kept, in the order of the weights.

    Args:
        weights: Tensors, or a dictionary of them by name; the result is alike. All on one device, and all
            float64 or none.
        activation_norms: For "wanda": as many tensors, or a dictionary with the same names.
        gradients: For "taylor": as many tensors, or a dictionary with the same names.
    """
    by_name = isinstance(weights, Mapping)
    names: list[str] = list(weights) if by_name else _numbered(weights)  # type: ignore[arg-type]
    tensors = _in_order("weights", weights, weights, names)
    norms = _in_order("activation_norms", activation_norms, weights, names)
    slopes = _in_order("gradients", gradients, weights, names)
    chosen = _criterion(criterion, p, seed, activation_norms is not None, gradients is not None)
    how = parse_pattern(pattern)
    if isinstance(how, NOfM):
        raise ValueError(
            f"pattern: '{how}' keeps as many in every group, there is nothing to compare: use mask()"
        )
    share = check_sparsity(sparsity, how)
    items = []
    for name, weight, norm, slope in zip(names, tensors, norms, slopes, strict=True):
        how.check(_checked(weight, name).shape, name)
        check_device(name, weight, tensors[0].device, names[0])
        if (weight.dtype == torch.float64) != (tensors[0].dtype == torch.float64):
            raise TypeError(
                f"{name} has dtype {weight.dtype}, {names[0]} {tensors[0].dtype}: convert one of them"
            )
        items.append(_prepare(weight, norm, slope, name))
    units = sum(math.prod(how.units(weight.shape)) for weight in tensors)
    found = _best(items, how, chosen, _kept(units, share), False) if items else []
    masks = [kept.view(weight.shape) for kept, weight in zip(found, tensors, strict=True)]
    return dict(zip(names, masks, strict=True)) if by_name else masks


@suggests_keywords
def scores(
    weight: Tensor,
    criterion: str = "magnitude",
    activation_norm: Tensor | None = None,
    gradient: Tensor | None = None,
    p: float = 2,
    *,
    pattern: str | Block = "element",
    seed: int | None = None,
    name: str = "weight",
) -> Tensor:
    """What the units of a weight are worth: (units down, units across), float32, or float64 for float64.

    - "magnitude": |w| of an element, the sum of them of a unit of several.
    - "lp": |w|, and (sum of |w|^p)^(1/p).
    - "wanda": |w| times the activation_norm of its input, and the sum of them.
    - "taylor": |w g|, and |sum of w g|: by how much the loss changes, to first order, without the unit.
    - "random": a number from [0, 1), by seed and position of the unit.

    Arguments are those of `mask`; pattern says what a unit is. Values that are not finite stay so.
    """
    chosen = _criterion(criterion, p, seed, activation_norm is not None, gradient is not None)
    how = parse_pattern(pattern)
    if isinstance(how, NOfM):
        raise ValueError(
            f"pattern: '{how}' has no units of its own: its elements are compared, use 'element'"
        )
    how.check(_checked(weight, name).shape, name)
    item = _prepare(weight, activation_norm, gradient, name)
    score = chosen.elementwise if how == _ELEMENT else chosen.score
    sizes = (-1 if size is None else size for size in (how.rows, how.columns))
    worth: Tensor = prune_scores(
        item.matrix, item.gradient, item.factors, score, chosen.power, *sizes, chosen.seed, 0
    )
    return worth


@dataclass(frozen=True)
class _Criterion:
    score: str  # of a unit
    elementwise: str  # of a single element: without a root to take
    power: float
    seed: int


@dataclass(frozen=True)
class _Item:
    """A weight as a matrix, and what its criterion needs."""

    matrix: Tensor
    gradient: Tensor | None
    factors: Tensor | None
    name: str


def _criterion(criterion: str, p: float, seed: int | None, has_norm: bool, has_gradient: bool) -> _Criterion:
    if criterion == "sparsegpt":
        raise ValueError("criterion: 'sparsegpt' changes the weight too: call tilewright.prune.sparsegpt")
    check_choice("criterion", criterion, CRITERIA)
    for argument, given, owner in (
        ("activation_norm", has_norm, "wanda"),
        ("gradient", has_gradient, "taylor"),
    ):
        if given != (criterion == owner):
            problem = "is needed by" if criterion == owner else f"is for criterion '{owner}', not for"
            raise ValueError(f"{argument} {problem} criterion '{criterion}'")
    if seed is not None and criterion != "random":
        raise ValueError(f"seed is for criterion 'random', not for '{criterion}'")
    if criterion == "taylor":
        return _Criterion("products", "products", 1.0, 0)
    if criterion == "random":
        return _Criterion("random", "random", 1.0, _seed(seed))
    if criterion != "lp":
        return _Criterion("sum", "sum", 1.0, 0)
    check_number("p", p, "(0, inf]")
    score = {1: "sum", 2: "squares", math.inf: "largest"}.get(float(p), "powers")
    return _Criterion(score, "sum", float(p), 0)


def _seed(seed: int | None) -> int:
    if seed is None:
        return int(torch.randint(1 << 62, ()).item())
    check_seed("seed", seed)
    return seed


def _checked(weight: Any, name: str) -> Tensor:
    check_tensor(name, weight)
    check_dtype(name, weight, FLOATS)
    matrix_shape(weight.shape, name)
    tensor: Tensor = weight
    return tensor


def _prepare(weight: Tensor, norm: Tensor | None, gradient: Tensor | None, name: str) -> _Item:
    of = "" if name == "weight" else f" of {name}"
    matrix = weight.detach().flatten(1)
    factors = slopes = None
    if norm is not None:
        label = f"activation_norm{of}"
        check_tensor(label, norm)
        check_dtype(label, norm, FLOATS)
        check_device(label, norm, weight.device, name)
        check_shape(label, norm, (matrix.shape[1],), "(in,)")
        real = torch.float64 if weight.dtype == torch.float64 else torch.float32
        factors = norm.detach().to(real).contiguous()
    if gradient is not None:
        label = f"gradient{of}"
        check_tensor(label, gradient)
        check_dtype(label, gradient, FLOATS)
        check_device(label, gradient, weight.device, name)
        check_shape(label, gradient, weight.shape, "of the weight")
        common = torch.promote_types(weight.dtype, gradient.dtype)
        matrix, slopes = matrix.to(common), gradient.detach().flatten(1).to(common)
    return _Item(matrix, slopes, factors, name)


def check_sparsity(sparsity: float | None, pattern: Pattern) -> float:
    """The sparsity as a float; refuses what is no number from [0, 1)."""
    if sparsity is None:
        raise ValueError(
            f"sparsity is needed for pattern '{pattern}': the share to remove, 0 <= sparsity < 1"
        )
    return check_number("sparsity", sparsity, "[0, 1)")


def _by_row(pattern: Block, scope: str | None, criterion: str, across: int, name: str) -> bool:
    check_choice("scope", scope, ("layer", "row", None))
    if scope == "row" and across == 1:
        raise ValueError(
            f"scope: with pattern '{pattern}' each row of {name} is one unit: nothing to compare in it"
        )
    if scope is None:
        return criterion == "wanda" and pattern == _ELEMENT
    return scope == "row"


def _kept(units: int, sparsity: float) -> int:
    return max(units - round(sparsity * units), min(units, 1))


def _best(
    items: Sequence[_Item], pattern: Block, chosen: _Criterion, kept: int, by_row: bool
) -> list[Tensor]:
    score = chosen.elementwise if pattern == _ELEMENT else chosen.score
    rows, columns = (-1 if size is None else size for size in (pattern.rows, pattern.columns))
    masks: list[Tensor] = prune_best(
        [item.matrix for item in items],
        [item.gradient for item in items if item.gradient is not None],
        [item.factors for item in items if item.factors is not None],
        score,
        chosen.power,
        rows,
        columns,
        kept,
        by_row,
        chosen.seed,
        [item.name for item in items],
    )
    return masks


def _numbered(weights: Sequence[Tensor]) -> list[str]:
    if isinstance(weights, Tensor) or not isinstance(weights, Sequence):
        raise TypeError(f"weights must be a list of tensors or a dictionary, got {type(weights).__name__}")
    return [f"weights[{i}]" for i in range(len(weights))]


def _in_order(
    label: str,
    given: Mapping[str, Tensor] | Sequence[Tensor] | None,
    weights: Mapping[str, Tensor] | Sequence[Tensor],
    names: Sequence[str],
) -> Sequence[Any]:
    if given is None:
        return [None] * len(names)
    if isinstance(weights, Mapping):
        if not isinstance(given, Mapping):
            raise TypeError(f"{label} must be a dictionary, as weights is, got {type(given).__name__}")
        _check_names(label, given, names)
        return [given[name] for name in names]
    if isinstance(given, (Mapping, Tensor)) or not isinstance(given, Iterable):
        raise TypeError(f"{label} must be a sequence of tensors, as weights is, got {type(given).__name__}")
    if len(given) != len(names):
        raise ValueError(f"{label}: got {len(given)} tensors for {len(names)} weights")
    return given


def _check_names(label: str, given: Mapping[str, Tensor], names: Sequence[str]) -> None:
    lacking = [name for name in names if name not in given]
    if lacking:
        raise ValueError(f"{label}: nothing for {', '.join(lacking[:3])}")
