"""tw.nn.BlockSparseLinear: conversion, checkpoints, training, compile, autocast, what it refuses."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import tilewright as tw
from backends import Backend
from tilewright.nn import BlockSparseLinear
from tilewright.prune import set_mask


def blocky(out: int = 64, into: int = 96, block: int = 16, *, seed: int = 0, bias: bool = True) -> nn.Linear:
    """A dense layer with blocks of zeros."""
    torch.manual_seed(seed)
    linear = nn.Linear(into, out, bias)
    keep = torch.rand(-(-out // block), -(-into // block)) < 0.4
    keep[0, 0] = True
    full = keep.repeat_interleave(block, 0).repeat_interleave(block, 1)[:out, :into]
    with torch.no_grad():
        linear.weight.mul_(full)
    return linear


@pytest.mark.parametrize("shape", [(64, 96), (50, 70), (1, 200)])
def test_there_and_back(shape: tuple[int, int]) -> None:
    """to_linear() gives every bit back, whatever the block."""
    linear = blocky(*shape)
    for block in (None, 8, 16, (32, 8), 128):
        layer = BlockSparseLinear.from_linear(linear, block)
        back = layer.to_linear()
        assert torch.equal(back.weight, linear.weight)
        assert torch.equal(back.bias, linear.bias)
        x = torch.randn(3, 5, shape[1])
        torch.testing.assert_close(layer(x), linear(x))
        assert layer(x[:0]).shape == (0, 5, shape[0])


def test_the_largest_block_is_found() -> None:
    """The size that stores the fewest elements, of several the largest block."""
    for block in (8, 16, 32, 64):
        linear = blocky(512, 512, block)
        layer = BlockSparseLinear.from_linear(linear)
        assert min(layer.block) >= block
        assert layer.values.numel() == int((linear.weight != 0).sum())
    wide = nn.Linear(256, 64)
    with torch.no_grad():
        wide.weight[:, 128:] = 0
    assert BlockSparseLinear.from_linear(wide).block == (64, 128)
    wide.weight.data[0, 0] = 0  # a weight that happens to be zero changes nothing
    assert BlockSparseLinear.from_linear(wide).block == (64, 128)


def test_a_mask_decides_where_there_is_one() -> None:
    """Kept blocks of zeros are there, and train."""
    linear = nn.Linear(32, 32)
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[:16] = True
    set_mask(linear, mask)
    with torch.no_grad():
        linear.weight[:8] = 0
    layer = BlockSparseLinear.from_linear(linear, 8)
    assert torch.equal(layer.block_mask[:, 0], torch.tensor([True, True, False, False]))


def test_checkpoints(tmp_path: Path) -> None:
    """state_dict, safetensors, pickle and deepcopy; a module takes over the blocks of what it loads."""
    layer = BlockSparseLinear.from_linear(blocky())
    assert set(layer.state_dict()) == {"values", "crow_indices", "col_indices", "bias"}
    x = torch.randn(20, 96)
    other = BlockSparseLinear.from_linear(blocky(seed=1), layer.block)
    assert len(other.values) != len(layer.values)
    safetensors.torch.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "layer.safetensors"))
    for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(same(x), layer(x))
        assert torch.equal(same.block_mask, layer.block_mask)


def test_damaged_checkpoints_are_refused() -> None:
    """Before anything is written."""
    layer = BlockSparseLinear.from_linear(blocky())
    before = copy.deepcopy(layer.state_dict())
    for change, message in (
        ({"col_indices": before["col_indices"] + 99}, "col_indices must lie in"),
        ({"col_indices": before["col_indices"].flip(0)}, "col_indices must ascend"),
        ({"crow_indices": before["crow_indices"][:-1]}, "crow_indices must have"),
        ({"crow_indices": before["crow_indices"] + 1}, "crow_indices must ascend from 0"),
        ({"values": before["values"][1:]}, "values must have shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(before | change)
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    del before["crow_indices"]
    with pytest.raises(RuntimeError, match=r"Missing key.*crow_indices"):
        layer.load_state_dict(before)


def test_gradients(backend: Backend) -> None:
    """As those of the dense layer at the blocks that are there; z is kept for the activation."""
    for activation, function in (("none", lambda z: z), ("gelu", nn.functional.gelu), ("relu", torch.relu)):
        linear = blocky(40, 56, 8).to(backend.device)
        layer = BlockSparseLinear.from_linear(linear, 8, activation)
        for tokens in (3, 20):
            x = torch.randn(tokens, 56, device=backend.device, requires_grad=True)
            same = x.detach().clone().requires_grad_()
            g = torch.randn(tokens, 40, device=backend.device)
            layer.zero_grad()
            linear.zero_grad()
            layer(x).backward(g)
            function(linear(same)).backward(g)
            torch.testing.assert_close(x.grad, same.grad)
            torch.testing.assert_close(layer.bias.grad, linear.bias.grad)
            dense = BlockSparseLinear.from_linear(linear, 8)
            dense.values.data.copy_(layer.values.grad)
            mask = layer.to_dense() != 0 if activation == "none" else dense.to_dense() != 0
            torch.testing.assert_close(dense.to_dense()[mask], linear.weight.grad[mask])


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "silu"])
def test_gradcheck(activation: str) -> None:
    """Numerically, in float64."""
    layer = BlockSparseLinear.from_linear(blocky(20, 27, 8).double(), 8, activation)
    values, bias = layer.values.detach().clone(), layer.bias.detach().clone()
    inside = layer._inside()

    def call(x: torch.Tensor, v: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"values": v * inside, "bias": b}, (x,))

    x = torch.randn(5, 27, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, values, bias)]
    assert torch.autograd.gradcheck(call, inputs)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(call(*inputs).sum(), inputs, create_graph=True)


@pytest.mark.parametrize("make", [torch.optim.AdamW, tw.optim.AdamW8bit])
def test_training(make: type[torch.optim.Optimizer]) -> None:
    """The loss falls, absent blocks stay absent, and what sticks out stays zero."""
    torch.manual_seed(0)
    layer = BlockSparseLinear.from_linear(blocky(60, 90, 16))
    outside = layer._inside() == 0
    x, target = torch.randn(64, 90), torch.randn(64, 60)
    optimizer = make(layer.parameters(), lr=3e-3, weight_decay=0.1)
    losses = []
    for _ in range(60):
        loss = nn.functional.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert bool(outside.any())
    assert bool((layer.values[outside] == 0).all())


def test_compile_and_checkpointing() -> None:
    """In one graph, with gradients; and recomputed in backward."""
    layer = BlockSparseLinear.from_linear(blocky(), activation="gelu")
    x = torch.randn(9, 96, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    first, x.grad = x.grad, None
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    second, x.grad = x.grad, None
    layer(x).sum().backward()
    assert torch.equal(first, x.grad)
    assert torch.equal(second, x.grad)


def test_autocast(backend: Backend) -> None:
    """As a dense layer: the product in bfloat16, gradients in the parameters' dtype."""
    layer = BlockSparseLinear.from_linear(blocky()).to(backend.device)
    x = torch.randn(10, 96, device=backend.device)
    with torch.autocast(backend.device.type, torch.bfloat16):
        y = layer(x)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.values.grad.dtype == torch.float32


def test_autocast_leaves_double_and_integers_alone() -> None:
    """As torch.nn.functional.linear: the one is not cast, the other is refused."""
    layer = BlockSparseLinear.from_linear(blocky())
    x = torch.ones(10, 96)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match=r"must have the dtype of the layer's values, .*got torch.int32"):
            layer(x.int())
        assert layer.double()(x.double()).dtype == torch.float64


def test_moves() -> None:
    """dtype moves take the parameters and leave the places."""
    layer = BlockSparseLinear.from_linear(blocky()).bfloat16()
    assert layer.crow_indices.dtype == torch.int32
    assert layer(torch.randn(2, 96).bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"x must have the dtype of the layer's values, torch.bfloat16"):
        layer(torch.randn(2, 96))
    assert "block=16x16" in repr(layer)


def test_wrong_arguments() -> None:
    """Each with what is allowed."""
    full = torch.ones(4, 6, dtype=torch.bool)
    layer = BlockSparseLinear(96, 64, full, 16)
    for x, error, message in (
        (None, TypeError, "x must be a tensor, got NoneType"),
        (torch.tensor(1.0), ValueError, r"x must have shape \(\*, 96\), got \(\)"),
        (torch.ones(2, 96).to_sparse(), ValueError, "x must be a dense tensor"),
        (torch.ones(2, 96, device="meta"), ValueError, "x must be on a CPU or CUDA device, got meta"),
    ):
        with pytest.raises(error, match=message):
            layer(x)
    with pytest.raises(ValueError, match=r"block_mask must have shape \(4, 6\) for 64 x 96"):
        BlockSparseLinear(96, 64, full.T, 16)
    with pytest.raises(ValueError, match="block must be one or two of 8, 16, 32, 64, 128, got 12"):
        BlockSparseLinear(96, 64, full, 12)
    with pytest.raises(ValueError, match="activation must be 'none', 'relu'"):
        BlockSparseLinear(96, 64, full, 16, activation="tanh")
    with pytest.raises(TypeError, match="block_mask must be a bool tensor"):
        BlockSparseLinear(96, 64, full.float(), 16)
    with pytest.raises(TypeError, match=r"linear must be a torch\.nn.Linear, got Conv2d"):
        BlockSparseLinear.from_linear(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="none of the 24 blocks of 8 x 8 of its weight"):
        BlockSparseLinear.from_linear(nn.Linear(32, 48))
    layer = BlockSparseLinear(96, 64, full, 16, activation="relu")
    with pytest.raises(ValueError, match=r"x must have shape \(\*, 96\), got \(2, 95\)"):
        layer(torch.zeros(2, 95))
    with pytest.raises(ValueError, match="cannot hold the activation 'relu'"):
        layer.to_linear()
