"""CrossoverLinear: the number of tokens decides which form runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tilewright as tw


class Marked(nn.Linear):
    """Adds a number that tells who ran."""

    def __init__(self, mark: float) -> None:
        super().__init__(4, 3)
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, mark)


def made() -> tw.nn.CrossoverLinear:
    return tw.nn.CrossoverLinear([Marked(0.0), Marked(1.0)], [(2, 1), (8, 0)], 1)


@pytest.mark.parametrize(
    ("shape", "mark"), [((4,), 1), ((2, 4), 1), ((3, 4), 0), ((2, 4, 4), 0), ((3, 3, 4), 1), ((0, 4), 1)]
)
def test_the_form_follows_the_tokens(shape: tuple[int, ...], mark: int) -> None:
    y = made()(torch.randn(shape))
    assert y.shape == (*shape[:-1], 3)
    assert (y == mark).all()


def test_it_compiles_whole() -> None:
    layer = made()
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend="eager")
    for tokens in (1, 2, 5, 8, 9):
        x = torch.randn(tokens, 4)
        assert torch.equal(compiled(x), layer(x))


def test_it_is_frozen_and_lets_gradients_through() -> None:
    layer, x = made(), torch.randn(5, 4, requires_grad=True)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    layer(x).sum().backward()
    assert x.grad is not None
    layer.requires_grad_(True)
    with pytest.raises(RuntimeError, match="freeze it with requires_grad_"):
        layer(x)
    with torch.no_grad():
        layer(x)


def test_to_linear_is_dense_and_trains() -> None:
    layer = tw.nn.CrossoverLinear([nn.Linear(4, 3)], [], 0)
    linear = layer.to_linear()
    assert torch.equal(linear(torch.eye(4)), layer(torch.eye(4)))
    assert all(parameter.requires_grad for parameter in linear.parameters())
    assert linear.weight.data_ptr() != layer.forms[0].weight.data_ptr()
    assert isinstance(layer.bias, Tensor)


def test_bad_arguments() -> None:
    one, two = nn.Linear(4, 3), nn.Linear(4, 3)
    for arguments, message in (
        (([], [], 0), "forms must have at least one module"),
        (([one, nn.Linear(3, 3)], [], 0), r"forms\[1\] must have 4 inputs and 3 outputs"),
        (([one, two], [(4, 0), (2, 1)], 0), r"steps must ascend in tokens, got \[4, 2\]"),
        (([one, two], [(4, 2)], 0), "steps and beyond must be indices of 2 forms, got 2"),
        (([one, two], [(0, 1)], 0), "steps: tokens must be a positive int, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            tw.nn.CrossoverLinear(*arguments)
