"""Activation-sparse linear layers: one token and a few, beside the dense layer and masked inputs.

Bytes of a call, each once: the weights of the inputs that are kept, density * in * out elements (all of them
for a dense layer); x, y and bias are small beside them. FLOPs: 2 a weight that is read and token.
As in a model that decodes, a call is one of several layers that take turns, with weights that together are
larger than any cache, and gets other tokens than the last one.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import OURS, Call, Case, Contender, Plan, of_tokens, short
from .prune_layers import sizes

_VARIETY = 16  # different tokens that take turns
_WEIGHTS = 2**28  # bytes of the layers that take turns


def cases(plan: Plan) -> list[Case]:
    """One token at half and three quarters left out; a few tokens."""
    device, dtypes, left_out = plan.device, plan.dtypes, [0.5, 0.75]
    if plan.quick or plan.model:
        dtypes, left_out = dtypes[: 1 if plan.quick else 2], [0.5]
    usual = [(4096, 4096)] if plan.quick else [(4096, 4096), (11008, 4096)]
    shapes = [(size.into, size.out) for size in sizes(plan, *usual)]
    found = [
        _case(device, dtype, shape, sparsity, 1)
        for dtype in dtypes
        for shape in shapes
        for sparsity in left_out
    ]
    few = [] if plan.quick or plan.model else [_case(device, dtypes[0], shapes[0], 0.75, 4)]
    return [*found, *few]


class _Problem:
    """The layers and their inputs, made when a contender first asks for them."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, shape: tuple[int, int], sparsity: float, tokens: int
    ) -> None:
        self.device, self.dtype, self.shape, self.sparsity = device, dtype, shape, sparsity
        self.tokens = tokens
        self.layers = max(2, _WEIGHTS // (shape[0] * shape[1] * dtype.itemsize))
        self._made: tuple[list[Any], list[Tensor]] | None = None

    def layers_and_inputs(self) -> tuple[list[Any], list[Tensor]]:
        if self._made is None:
            from tilewright.nn import ActivationSparseLinear

            generator = torch.Generator(self.device).manual_seed(0)
            inputs, outputs = self.shape
            layers = [
                ActivationSparseLinear(
                    inputs, outputs, sparsity=self.sparsity, device=self.device, dtype=self.dtype
                )
                .eval()
                .requires_grad_(False)
                for _ in range(self.layers)
            ]
            size = (_VARIETY, self.tokens, inputs)
            x = torch.randn(size, generator=generator, device=self.device).to(self.dtype)
            self._made = layers, list(x)
        return self._made

    def weights_read(self) -> float:
        """The share that the tokens keep between them."""
        return 1 - self.sparsity**self.tokens


def _case(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int], sparsity: float, tokens: int
) -> Case:
    problem = _Problem(device, dtype, shape, sparsity, tokens)
    weights = shape[0] * shape[1]
    dense = float(weights * dtype.itemsize)
    contenders = [
        Contender(OURS, lambda: _ours(problem), dense * problem.weights_read()),
        Contender("torch, dense", lambda: _dense(problem), dense),
        Contender("torch, masked inputs", lambda: _masked(problem), dense),
    ]
    kind = short(dtype)
    size, zeros = f"{shape[0]}x{shape[1]}", f"{sparsity:.0%}"
    return Case(
        f"activation-sparse-{size}-{round(100 * sparsity)}-{tokens}-{kind}",
        f"ActivationSparseLinear, {size}, {zeros} left out, {of_tokens(tokens)}, {kind}",
        contenders,
        2 * weights * problem.weights_read() * tokens,
        calls=problem.layers,
        sizes={"in x out": size, "sparsity": sparsity, "tokens": tokens, "dtype": kind},
    )


def _taking_turns(layers: list[Callable[[Tensor], object]], inputs: list[Tensor]) -> Call:
    numbers = count()

    def call() -> object:
        number = next(numbers)
        return layers[number % len(layers)](inputs[number % len(inputs)])

    return call


def _ours(problem: _Problem) -> Call:
    return _taking_turns(*problem.layers_and_inputs())


def _dense(problem: _Problem) -> Call:
    layers, inputs = problem.layers_and_inputs()
    return _taking_turns([layer.to_linear().requires_grad_(False) for layer in layers], inputs)


def _masked(problem: _Problem) -> Call:
    """What one writes without a kernel: the mask of the largest scores, then the dense layer."""
    layers, inputs = problem.layers_and_inputs()
    kept = problem.shape[0] - round(problem.sparsity * problem.shape[0])

    def masked(dense: Any, norms: Tensor) -> Callable[[Tensor], object]:
        def call(x: Tensor) -> Tensor:
            best = (x.abs() * norms).topk(kept, dim=-1).indices
            return F.linear(x * torch.zeros_like(x).scatter_(-1, best, 1.0), dense.weight, dense.bias)

        return call

    found = [masked(layer.to_linear().requires_grad_(False), layer.column_norm) for layer in layers]
    return _taking_turns(found, inputs)
