"""Products by oneDNN: values and gradients of torch's own, and when they are left to torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tilewright as tw
from tilewright.nn.mamba import projected
from tilewright.scan import dense

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="this torch comes without oneDNN",
)


@pytest.fixture
def taken(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the inputs that oneDNN got, which gets all that it can take."""
    shapes: list[tuple[int, ...]] = []
    multiply = dense._multiply

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shapes.append(tuple(x.shape))
        return multiply(x, weight, bias)

    monkeypatch.setattr(dense, "_is_better", lambda: True)
    monkeypatch.setattr(dense, "_WORTH_IT", 1)
    monkeypatch.setattr(dense, "_multiply", watched)
    return shapes


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    lambda t: t,
    lambda t: t.mT.contiguous().mT,
    lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
]


@pytest.mark.parametrize("weight_layout", LAYOUTS)
@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 12), (2, 7, 12)])
def test_values_and_gradients_are_those_of_torch(taken, shape, x_layout, weight_layout) -> None:
    x, weight, bias = x_layout(normal(*shape)), weight_layout(normal(9, 12)), normal(9)
    grad = normal(*shape[:-1], 9)
    found = []
    for function in (dense.linear, F.linear):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        out = function(*leaves)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(taken) == 3
    torch.testing.assert_close(dense.product(x, weight), x @ weight.mT)


def test_only_the_gradients_that_are_wanted(taken) -> None:
    x, weight = normal(4, 12), normal(9, 12).requires_grad_()
    dense.linear(x, weight).sum().backward()
    assert taken == [(4, 12), (9, 4)]
    torch.testing.assert_close(weight.grad, x.sum(0).expand(9, 12))


def test_a_second_derivative_is_refused(taken) -> None:
    x = normal(4, 12).requires_grad_()
    (first,) = torch.autograd.grad(dense.linear(x, normal(9, 12)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_are_left_to_torch(taken, dtype) -> None:
    x, weight = normal(4, 12).to(dtype), normal(9, 12).to(dtype)
    assert torch.equal(dense.linear(x, weight), F.linear(x, weight))
    assert not taken


def test_autocast_and_compilation_are_left_to_torch(taken) -> None:
    x, weight = normal(4, 12), normal(9, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert dense.linear(x, weight).dtype == torch.bfloat16
    compiled = torch.compile(dense.linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, weight), F.linear(x, weight))
    assert not taken


def test_small_and_empty_products_are_left_to_torch(taken, monkeypatch) -> None:
    assert dense.linear(normal(0, 12), normal(9, 12)).shape == (0, 9)
    monkeypatch.setattr(dense, "_WORTH_IT", 4 * 12 * 9 + 1)
    dense.linear(normal(4, 12), normal(9, 12))
    assert not taken


def test_layers_that_do_more_than_multiply_are_called(taken) -> None:
    layer, x, seen = nn.Linear(12, 9), normal(4, 12), []
    projected(layer, x)
    assert len(taken) == 1
    layer.register_full_backward_hook(lambda *arguments: seen.append(True))
    projected(layer, x.requires_grad_()).sum().backward()
    assert seen
    assert len(taken) == 1


def test_layers_of_other_classes_are_called(taken) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer, x = Doubled(12, 9), normal(4, 12)
    torch.testing.assert_close(projected(layer, x), 2 * F.linear(x, layer.weight, layer.bias))
    assert not taken


@pytest.mark.parametrize("block", [tw.nn.Mamba, tw.nn.Mamba2])
def test_blocks_are_the_same_either_way(taken, monkeypatch, block: Any) -> None:
    torch.manual_seed(0)
    layer = block(32, d_state=8, **({"headdim": 16} if block is tw.nn.Mamba2 else {}))
    found = []
    for better in (True, False):
        monkeypatch.setattr(dense, "_is_better", lambda better=better: better)
        x = normal(2, 20, 32).requires_grad_()
        out = layer(x)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
    assert len(taken) > 5
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
