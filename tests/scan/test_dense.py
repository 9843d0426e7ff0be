"""Dense products: values and gradients of torch's own, and when they are left to torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import tilewright as tw
from dense_products import watched_products
from reference import matmul as reference
from tilewright import _C
from tilewright.nn.mamba import projected
from tilewright.scan import dense


@pytest.fixture
def taken(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the inputs that our product got, which gets all that it can take."""
    monkeypatch.setattr(dense, "_WORTH_IT", 1)
    return watched_products(monkeypatch)


@pytest.fixture(params=_C.cpu_levels())
def level(request) -> Iterator[str]:
    before = _C.cpu_level()
    _C.set_cpu_level(request.param)
    yield request.param
    _C.set_cpu_level(before)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def _strided(t: Tensor) -> Tensor:
    """The same values where no two lie side by side."""
    wide = t.new_full((t.shape[0] + 1, 2 * t.shape[1] + 3), float("nan"))
    wide[1:, 1 : 2 * t.shape[1] : 2] = t
    return wide[1:, 1 : 2 * t.shape[1] : 2]


MATRICES: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda t: t,
    "columns": lambda t: t.T.contiguous().T,
    "strided": _strided,
}
# Edges of tiles (8 or 4 rows, panels of 8 to 32 columns), of the depth of 512 and of blocks of 8 panels.
SIZES = [(1, 1, 1), (8, 32, 16), (7, 31, 513), (17, 65, 40), (70, 300, 1030), (5, 2100, 3), (300, 3, 600)]


@pytest.mark.parametrize("b_layout", MATRICES)
@pytest.mark.parametrize("a_layout", MATRICES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_product(level, size, a_layout, b_layout) -> None:
    m, n, k = size
    a, b, bias = MATRICES[a_layout](normal(m, k)), MATRICES[b_layout](normal(k, n)), normal(n)
    scale = a.double().abs() @ b.double().abs()
    for added in (None, bias):
        found = []
        for threads in (1, 2, 3, 8):
            wide = torch.full((m + 1, n + 2), 7.0)
            out = wide[:m, 1 : n + 1]
            _C.matmul(a, b, added, out, threads)
            assert (wide[m] == 7).all()
            assert (wide[:, 0] == 7).all()
            assert (wide[:, n + 1] == 7).all()
            found.append(out.clone())
        wanted = reference.matmul(a, b, added)
        # A rounding a step of the longest chain, of which an error of random signs is a small part.
        allowed = 2**-24 * (4 + k**0.5) * (scale + 1)
        assert ((found[0].double() - wanted).abs() <= allowed).all()
        for other in found[1:]:
            assert torch.equal(found[0], other), "the result depends on the number of threads"


def test_an_empty_sum_is_the_bias(level) -> None:
    for bias, wanted in ((None, torch.zeros(5, 3)), (normal(3), normal(3).expand(5, 3))):
        out = torch.full((5, 3), float("nan"))
        _C.matmul(torch.empty(5, 0), torch.empty(0, 3), bias, out, 2)
        assert torch.equal(out, wanted)
    _C.matmul(torch.empty(0, 4), torch.empty(4, 3), None, torch.empty(0, 3), 2)


def test_infinities_and_nans_stay_in_their_rows_and_columns(level) -> None:
    a, b = normal(20, 40), normal(40, 50)
    a[3, 5], b[7, 11] = float("inf"), float("nan")
    out = torch.empty(20, 50)
    _C.matmul(a, b, None, out, 2)
    wanted = a @ b
    assert torch.equal(out.isfinite(), wanted.isfinite())
    assert torch.equal(out.isnan(), wanted.isnan())


BAD = {
    "a must have two axes": lambda a, b, bias, out: (a[0], b, bias, out),
    "b must have 6 rows": lambda a, b, bias, out: (a, b[1:], bias, out),
    "out must have shape": lambda a, b, bias, out: (a, b, bias, out[:, 1:]),
    "columns side by side": lambda a, b, bias, out: (a, b, bias, out.new_empty(5, 4).T),
    "bias": lambda a, b, bias, out: (a, b, bias[1:], out),
    "b must have dtype float32": lambda a, b, bias, out: (a, b.double(), bias, out),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_matrices(message) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        _C.matmul(*BAD[message](normal(4, 6), normal(6, 5), normal(5), torch.empty(4, 5)), 2)


def test_the_op() -> None:
    for bias in (None, normal(5)):
        torch.library.opcheck(torch.ops.tilewright.matmul.default, (normal(4, 6), normal(5, 6).T, bias))


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


def test_a_second_derivative_is_that_of_torch(taken) -> None:
    found = []
    for function in (dense.linear, F.linear):
        leaves = [t.requires_grad_() for t in (normal(4, 12), normal(9, 12), normal(9))]
        firsts = torch.autograd.grad(function(*leaves).tanh().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(first.square().sum() for first in firsts), leaves))
    assert taken
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)  # of values up to 70


def test_transforms_are_left_to_torch(taken) -> None:
    x, weight = normal(4, 12), normal(9, 12)
    with forward_ad.dual_level():
        out = dense.linear(forward_ad.make_dual(x, torch.ones_like(x)), weight)
        tangent = forward_ad.unpack_dual(out).tangent
        assert tangent is not None
        torch.testing.assert_close(tangent, torch.ones_like(x) @ weight.T)
    torch.testing.assert_close(
        torch.vmap(dense.linear, (None, 0))(x, weight.expand(3, 9, 12)), (x @ weight.T).expand(3, 4, 9)
    )
    assert not taken


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


def test_flop_counters_see_torchs_product(taken) -> None:
    with FlopCounterMode(display=False) as counter:
        dense.linear(normal(4, 12), normal(9, 12))
    assert counter.get_total_flops() == 2 * 4 * 12 * 9
    assert not taken


def test_small_and_empty_products_are_left_to_torch(taken, monkeypatch) -> None:
    assert dense.linear(normal(0, 12), normal(9, 12)).shape == (0, 9)
    monkeypatch.setattr(dense, "_WORTH_IT", 4 * 12 * 9 + 1)
    dense.linear(normal(4, 12), normal(9, 12))
    monkeypatch.setattr(dense, "_WORTH_IT", 1)
    dense.linear(normal(3, 12), normal(12, 9).T)
    dense.linear(normal(12), normal(9, 12))
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
        monkeypatch.setattr(dense, "is_better", lambda better=better: better)
        x = normal(2, 20, 32).requires_grad_()
        out = layer(x)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
    assert len(taken) > 5
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gradients_whose_signs_are_still_to_be_changed(taken) -> None:
    """Autograd makes tensors whose memory holds the opposite, as of the imaginary part of a conjugate."""
    gradients = []
    for function in (dense.linear, F.linear):
        x, weight = normal(8, 12).requires_grad_(), normal(9, 12).requires_grad_()
        y = function(x, weight)
        z = torch.complex(torch.zeros_like(y), y).conj() * torch.ones((), dtype=torch.complex64)
        gradients.append(torch.autograd.grad(z.imag.sum(), (x, weight)))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
