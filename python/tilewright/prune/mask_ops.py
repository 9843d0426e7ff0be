"""Scores and masks as torch ops: schema, implementation, fake kernels.

    tilewright::prune_scores  what the units of a weight are worth
    tilewright::prune_n_of_m  the mask that keeps n of m neighbours
    tilewright::prune_best    the masks that keep the best units of all weights, or of each row of units

A criterion is (score, power, seed): score "sum", "squares", "largest", "powers" (of |w| f, with f the factors
of the columns), "products" (of w and the gradient) or "random". Weights are matrices. A unit of -1 rows or
columns goes as far as the weight. Values that are not finite raise ValueError, which waits for a GPU, except
while a graph is captured. None of the ops is differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _backend
from .._library import define

_SCORES = {"sum": 0, "squares": 1, "largest": 2, "powers": 3, "products": 4}


def _real(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _unit(weight: Tensor, rows: int, columns: int) -> tuple[int, int]:
    sizes = (
        max(have, 1) if size < 0 else size for size, have in zip((rows, columns), weight.shape, strict=True)
    )
    return next(sizes), next(sizes)


def _fake_scores(
    weight: Tensor,
    gradient: Tensor | None,
    factors: Tensor | None,
    score: str,
    power: float,
    rows: int,
    columns: int,
    seed: int,
    stream: int,
) -> Tensor:
    rows, columns = _unit(weight, rows, columns)
    shape = (-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    return weight.new_empty(shape, dtype=torch.float32 if score == "random" else _real(weight))


def _scores(
    weight: Tensor,
    gradient: Tensor | None,
    factors: Tensor | None,
    score: str,
    power: float,
    rows: int,
    columns: int,
    seed: int,
    stream: int,
) -> Tensor:
    scores = _fake_scores(weight, gradient, factors, score, power, rows, columns, seed, stream)
    if score == "random":
        _backend.C.prune_random_scores(scores, seed, stream, _backend.num_threads())
        return scores
    rows, columns = _unit(weight, rows, columns)
    size = _backend.C.prune_group_scores_workspace(weight, rows, columns)
    workspace = weight.new_empty(size, dtype=torch.uint8)
    _backend.C.prune_group_scores(
        weight,
        gradient,
        factors,
        scores,
        workspace,
        rows,
        columns,
        _SCORES[score],
        power,
        _backend.num_threads(),
    )
    return scores


def _fake_n_of_m(
    weight: Tensor,
    gradient: Tensor | None,
    factors: Tensor | None,
    score: str,
    n: int,
    m: int,
    seed: int,
    name: str,
) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.bool)


def _n_of_m(
    weight: Tensor,
    gradient: Tensor | None,
    factors: Tensor | None,
    score: str,
    n: int,
    m: int,
    seed: int,
    name: str,
) -> Tensor:
    _check_factors([factors], [name])
    source, by = weight, factors
    if score in ("products", "random"):
        source, by = _scores(weight, gradient, None, score, 1.0, 1, 1, seed, 0), None
    mask = _fake_n_of_m(weight, gradient, factors, score, n, m, seed, name)
    invalid = weight.new_zeros(1, dtype=torch.int32)
    _backend.C.prune_select_groups(source, by, mask, invalid, n, m, _backend.num_threads())
    _check_finite(invalid, [weight], [gradient], [factors], [name])
    return mask


def _fake_best(
    weights: list[Tensor],
    gradients: list[Tensor],
    factors: list[Tensor],
    score: str,
    power: float,
    rows: int,
    columns: int,
    kept: int,
    by_row: bool,
    seed: int,
    names: list[str],
) -> list[Tensor]:
    return [weight.new_empty(weight.shape, dtype=torch.bool) for weight in weights]


def _best(
    weights: list[Tensor],
    gradients: list[Tensor],
    factors: list[Tensor],
    score: str,
    power: float,
    rows: int,
    columns: int,
    kept: int,
    by_row: bool,
    seed: int,
    names: list[str],
) -> list[Tensor]:
    every: list[Tensor | None] = [None] * len(weights)
    gradients_of: Sequence[Tensor | None] = gradients or every
    factors_of: Sequence[Tensor | None] = factors or every
    _check_factors(factors_of, names)
    single = rows == columns == 1
    by_factors: Sequence[Tensor | None] = every
    if single and score == "sum" and (by_row or not factors):
        scores, by_factors = weights, factors_of
    else:
        scores = [
            _scores(weight, gradient, by, score, power, rows, columns, seed, stream)
            for stream, (weight, gradient, by) in enumerate(
                zip(weights, gradients_of, factors_of, strict=True)
            )
        ]
    invalid = weights[0].new_zeros(1, dtype=torch.int32)
    chosen = [x.new_empty(x.shape, dtype=torch.bool) for x in scores]
    threads = max(_backend.num_threads(), 1)
    if by_row:
        for x, by, mask in zip(scores, by_factors, chosen, strict=True):
            size = 0 if x.is_cuda else 8 * x.shape[1] * threads
            workspace = x.new_empty(size, dtype=torch.uint8)
            _backend.C.prune_select_rows(x, by, mask, invalid, workspace, kept, threads)
    else:
        size = _backend.C.prune_select_workspace(scores, threads)
        workspace = invalid.new_empty(size, dtype=torch.uint8)
        _backend.C.prune_select(scores, chosen, invalid, workspace, kept, threads)
    _check_finite(invalid, weights, gradients_of, factors_of, names)
    return chosen if single else [_expand(*pair, rows, columns) for pair in zip(chosen, weights, strict=True)]


def _expand(units: Tensor, weight: Tensor, rows: int, columns: int) -> Tensor:
    mask = weight.new_empty(weight.shape, dtype=torch.bool)
    _backend.C.prune_expand(units, mask, *_unit(weight, rows, columns), _backend.num_threads())
    return mask


def _check_factors(factors: Sequence[Tensor | None], names: Sequence[str]) -> None:
    """Refuses negative factors: what they would mean is not defined. Waits for a GPU."""
    for by, name in zip(factors, names, strict=True):
        if by is None or (by.is_cuda and torch.cuda.is_current_stream_capturing()):
            continue
        bad = (by < 0).nonzero()
        if len(bad):
            of = "" if name == "weight" else f" of {name}"
            raise ValueError(
                f"activation_norm{of}: holds {len(bad)} negative values, first at ({int(bad[0])})"
            )


def _check_finite(
    invalid: Tensor,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    factors: Sequence[Tensor | None],
    names: Sequence[str],
) -> None:
    if invalid.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if not invalid.item():
        return
    for weight, gradient, by, name in zip(weights, gradients, factors, names, strict=True):
        of = "" if name == "weight" else f" of {name}"
        for label, tensor in ((name, weight), (f"gradient{of}", gradient), (f"activation_norm{of}", by)):
            if tensor is None:
                continue
            bad = (~tensor.isfinite()).nonzero()
            if len(bad):
                place = ", ".join(map(str, bad[0].tolist()))
                raise ValueError(f"{label}: holds {len(bad)} non-finite values, first at ({place})")
    raise ValueError(
        f"{', '.join(names)}: the scores overflow {str(_real(weights[0])).removeprefix('torch.')}"
    )


define(
    "prune_scores(Tensor weight, Tensor? gradient, Tensor? factors, str score, float power, SymInt rows,"
    " SymInt columns, int seed, int stream) -> Tensor",
    _scores,
    _fake_scores,
)
define(
    "prune_n_of_m(Tensor weight, Tensor? gradient, Tensor? factors, str score, int n, int m, int seed,"
    " str name) -> Tensor",
    _n_of_m,
    _fake_n_of_m,
)
define(
    "prune_best(Tensor[] weights, Tensor[] gradients, Tensor[] factors, str score, float power, SymInt rows,"
    " SymInt columns, SymInt kept, bool by_row, int seed, str[] names) -> Tensor[]",
    _best,
    _fake_best,
)

prune_scores = torch.ops.tilewright.prune_scores.default
prune_n_of_m = torch.ops.tilewright.prune_n_of_m.default
prune_best = torch.ops.tilewright.prune_best.default
