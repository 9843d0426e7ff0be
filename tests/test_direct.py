"""Calls past torch's dispatcher: the same bits as by the op, and only where nobody takes part or looks on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tilewright import _library
from tilewright._library import is_direct, new_on_cpu
from tilewright.nn import BlockSparseLinear


class Subclass(Tensor):
    """A tensor that torch asks what an op does to it."""


class Names(TorchDispatchMode):
    """Keeps the names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def layers(dtype: torch.dtype = torch.float32) -> list[nn.Module]:
    """One of each kind, 48 inputs and 40 outputs."""
    torch.manual_seed(0)
    mask = torch.rand(5, 3) < 0.6
    return [BlockSparseLinear(48, 40, mask, (8, 16), activation="gelu", dtype=dtype)]


def by_the_op(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer gives with a mode on, which keeps calls on the way of ops."""
    with Names() as names:
        y: Tensor = layer(x)
    assert any(name.startswith("tilewright::") for name in names.seen)
    return y


@contextmanager
def without_ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails where a layer's call is not direct."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("went by the op")

    with monkeypatch.context() as patch:
        for module in ("block_sparse",):
            patch.setattr(f"tilewright.prune.ops.{module}._fwd", refuse)
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any shape and strides that are read in place, with any number of threads."""
    threads = torch.get_num_threads()
    x = torch.randn(6, 5, 48).to(dtype)
    inputs = [x[0, :1], x[0], x, x[:1, :1], x[0, 0], x[:0], x[:, :1], x[:, 0], x.mT.contiguous().mT[2]]
    for layer in layers(dtype):
        for given in inputs:
            expected = by_the_op(layer, given)
            assert expected.shape == (*given.shape[:-1], 40)
            if given.dim() > 1:
                with torch.no_grad(), without_ops(monkeypatch):
                    found = layer(given)
                assert found.is_contiguous()
                assert torch.equal(found, expected)
            with torch.inference_mode():
                assert torch.equal(layer(given), expected)
        uneven = x.transpose(0, 1)  # tokens at uneven distances
        try:
            torch.set_num_threads(1)
            with torch.no_grad():
                assert torch.equal(layer(uneven), by_the_op(layer, uneven))
        finally:
            torch.set_num_threads(threads)


def test_layers_that_do_not_train_need_no_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing requires a gradient, calls are direct with gradients enabled."""
    for layer in layers():
        layer.requires_grad_(False)
        with without_ops(monkeypatch):
            assert not layer(torch.randn(1, 48)).requires_grad
            with pytest.raises(AssertionError, match="went by the op"):
                layer(torch.randn(1, 48, requires_grad=True))
            layer.requires_grad_(True)
            with pytest.raises(AssertionError, match="went by the op"):
                layer(torch.randn(1, 48))


@pytest.mark.parametrize(
    "context",
    [
        Names,
        TorchFunctionMode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.profiler.profile,
        torch.autograd.profiler.profile,
        forward_ad.dual_level,
    ],
    ids=["dispatch mode", "function mode", "autocast", "profiler", "autograd profiler", "forward mode"],
)
def test_who_takes_part_or_looks_on(context: Callable[[], AbstractContextManager[object]]) -> None:
    """Is served by the op."""
    x = torch.randn(2, 48)
    with torch.no_grad():
        assert is_direct(x, None, nn.Parameter(x))
        with context():
            assert not is_direct(x)
        assert is_direct(x)


def test_tensors_that_are_not_plain() -> None:
    """Subclasses, negated views, other devices; parameters that train, while gradients are enabled."""
    x = torch.randn(2, 48)
    negated = torch.randn(2, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    for odd in (x.as_subclass(Subclass), negated, x.to("meta"), nn.Parameter(x), "x"):
        assert not is_direct(x, odd)


def test_transforms_and_tracers() -> None:
    """torch.func, torch.jit.trace and torch.compile see an op."""
    x = torch.randn(2, 48)
    seen = []

    def asked(x: Tensor) -> Tensor:
        seen.append(is_direct(x))
        return x * 2

    with torch.no_grad():
        torch.func.vmap(asked)(x)
        torch.func.functionalize(asked)(x)
        torch.jit.trace(asked, x, check_trace=False)
        for layer in layers():
            assert torch.equal(torch.jit.trace(layer, x, check_trace=False)(x[:1]), layer(x[:1]))
            compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(x), layer(x))
            exported = torch.export.export(layer, (x,))
            assert any("tilewright" in str(node.target) for node in exported.graph.nodes)
    torch.func.grad(lambda x: asked(x).sum())(x)
    assert seen
    assert not any(seen)


def test_hooks_copies_and_replaced_parameters() -> None:
    """What modules offer works as ever."""
    x = torch.randn(3, 48)
    for layer in layers():
        handle = layer.register_forward_hook(lambda module, args, y: y + 1)
        with torch.no_grad():
            hooked = layer(x)
            handle.remove()
            y = layer(x)
            assert torch.equal(hooked, y + 1)
            assert torch.equal(copy.deepcopy(layer)(x), y)
            zeros = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
            assert bool((torch.func.functional_call(layer, zeros, (x,)) == 0).all())
            nn.utils.parametrize.register_parametrization(layer, "bias", nn.Identity())
            assert torch.equal(layer(x), y)
            layer.parametrizations.bias.original.zero_()
            assert not torch.equal(layer(x), y)


def test_an_older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its questions no call is direct; without its allocator there is torch.empty's."""
    x = torch.randn(2, 48)
    monkeypatch.setattr(_library, "_asked", None)
    assert not is_direct(x.detach())
    for make in (_library._new, _library._new_strided):
        monkeypatch.setattr(_library, "_new", make)
        for shape in ((3, 4), (2, 0, 5), (7,), (0, 3, 1)):
            made = new_on_cpu(shape, torch.float16)
            assert made.shape == shape
            assert made.dtype == torch.float16
            assert made.stride() == torch.empty(shape).stride()
