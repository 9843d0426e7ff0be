"""tw.nn.SemiStructuredLinear: from and to torch's layers, training, saving, loading, autocast, compile."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from semi_cases import pruned, random
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

import tilewright as tw
from tilewright.nn import SemiStructuredLinear
from tilewright.prune.semi_structured import (
    compress_weight,
    decompress_weight,
    from_torch_semi_structured,
    to_torch_semi_structured,
)


def linear(out: int, into: int, pattern: str = "2:4", dtype: torch.dtype = torch.float32, bias: bool = True):
    torch.manual_seed(0)
    layer = nn.Linear(into, out, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(pruned(out, into, pattern, dtype))
    return layer


@pytest.mark.parametrize("pattern", ["2:4", "1:8", "3:16", "2:5"])
@pytest.mark.parametrize("bias", [False, True])
def test_from_and_to_linear(pattern, bias):
    dense = linear(7, 80, pattern, bias=bias)
    layer = SemiStructuredLinear.from_linear(dense, pattern)
    x = random(2, 3, 80)
    torch.testing.assert_close(layer(x), dense(x))
    back = layer.to_linear()
    assert torch.equal(back.weight, dense.weight)
    assert bias is False or torch.equal(back.bias, dense.bias)
    assert layer.pattern == pattern
    assert f"pattern={pattern}, bias={bias}" in repr(layer)
    assert (back.weight.data_ptr() != layer.values.data_ptr() and layer.bias is not dense.bias) or not bias


def test_the_pattern_is_found():
    assert SemiStructuredLinear.from_linear(linear(4, 16)).pattern == "2:4"
    assert SemiStructuredLinear.from_linear(linear(4, 48, "5:16")).pattern == "5:16"
    with pytest.raises(
        ValueError, match=r"weight \(16, 32\) fits no n:m pattern: its fullest groups keep 4 of 4"
    ):
        SemiStructuredLinear.from_linear(nn.Linear(32, 16))
    with pytest.raises(ValueError, match=r"weight does not fit 2:4: row 0, group 0"):
        SemiStructuredLinear.from_linear(nn.Linear(32, 16), "2:4")
    with pytest.raises(TypeError, match=r"linear must be a torch.nn.Linear, got Conv1d"):
        SemiStructuredLinear.from_linear(nn.Conv1d(4, 4, 1))


def test_flags_are_kept():
    dense = linear(4, 16).eval()
    dense.weight.requires_grad_(False)
    layer = SemiStructuredLinear.from_linear(dense)
    assert not layer.training
    assert not layer.values.requires_grad
    assert layer.bias.requires_grad
    assert not layer.to_linear().training
    assert not layer.to_linear().weight.requires_grad


def test_the_layers_mask_is_used():
    dense = linear(4, 16)
    mask = tw.prune.mask(dense.weight, "2:4")
    with torch.no_grad():
        dense.weight.zero_()
    tw.prune.set_mask(dense, mask)
    layer = SemiStructuredLinear.from_linear(dense)
    ones = copy.deepcopy(layer)
    with torch.no_grad():
        ones.values.fill_(1)
    assert torch.equal(ones.to_linear().weight != 0, mask)
    torch_prune.custom_from_mask(other := nn.Linear(16, 4), "weight", mask)
    x = random(3, 16)
    torch.testing.assert_close(SemiStructuredLinear.from_linear(other)(x), other(x))


@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 3, 16), (0, 16), (2, 0, 16)])
def test_leading_dimensions(shape):
    dense = linear(4, 16)
    x = random(*shape)
    y = SemiStructuredLinear.from_linear(dense)(x)
    assert y.shape == (*shape[:-1], 4)
    torch.testing.assert_close(y, dense(x))


def optimizers() -> list:
    return [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
        lambda p: tw.optim.AdamW8bit(p, lr=0.01, min_8bit_size=1),
    ]


@pytest.mark.parametrize("make", optimizers(), ids=["SGD", "AdamW", "AdamW8bit"])
@pytest.mark.parametrize("full", [False, True])
def test_training_moves_the_weights_that_are_there(make, full):
    """A group that keeps fewer than two stores zeros, and training leaves them zero."""
    dense = linear(8, 32)
    if not full:
        with torch.no_grad():
            dense.weight[:, ::5] = 0
            dense.weight[3] = 0
    zero = dense.weight == 0
    layer = SemiStructuredLinear.from_linear(dense, "2:4")
    optimizer = make(layer.parameters())
    x, target = random(40, 32), random(40, 8, seed=1)
    before = copy.deepcopy(layer)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    weight = layer.to_linear().weight
    assert (weight[zero] == 0).all()
    assert (weight != before.to_linear().weight)[~zero].all()
    assert torch.equal(layer.indices, before.indices)


def test_saving_and_loading():
    layer = SemiStructuredLinear.from_linear(linear(6, 24))
    assert sorted(layer.state_dict()) == ["bias", "indices", "values"]
    others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    for state in (torch.load(buffer, weights_only=True), load(save(layer.state_dict()))):
        others.append(SemiStructuredLinear(24, 6))
        others[-1].load_state_dict(state)
    x = random(3, 24)
    for other in others:
        assert torch.equal(other(x), layer(x))
        assert other.indices is not layer.indices


def test_loading_refuses_what_does_not_fit():
    layer, fresh = SemiStructuredLinear.from_linear(linear(6, 24)), SemiStructuredLinear(24, 6)
    state = layer.state_dict()
    cases = {
        "size mismatch for values": {**state, "values": state["values"][:, 1:]},
        "size mismatch for indices": {**state, "indices": state["indices"][1:]},
        "indices must have dtype uint8, got torch.int64": {**state, "indices": state["indices"].long()},
        "indices are not those of a 2:4 layer": {**state, "indices": torch.zeros_like(state["indices"])},
        "Missing key": {"values": state["values"]},
    }
    for message, wrong in cases.items():
        with pytest.raises(RuntimeError, match=message):
            fresh.load_state_dict(wrong)
    with pytest.raises(RuntimeError, match=r"indices are not those of a 4:8 layer"):
        SemiStructuredLinear(24, 6, "4:8").load_state_dict(state)


def test_new_layers():
    layer = SemiStructuredLinear(24, 6, "3:8", bias=False, dtype=torch.bfloat16)
    kept = layer.to_linear().weight != 0
    assert kept.unflatten(1, (-1, 8))[..., :3].all()
    assert not kept.unflatten(1, (-1, 8))[..., 3:].any()
    assert layer(random(2, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.device("meta"):
        empty = SemiStructuredLinear(24, 6, "3:8")
    assert empty.indices.is_meta
    assert empty.indices.shape == (6, 3)
    with pytest.raises(ValueError, match=r"in_features must be a multiple of 4 for 2:4, got 30"):
        SemiStructuredLinear(30, 6)


def test_dtypes_move():
    layer = SemiStructuredLinear.from_linear(linear(6, 24))
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.indices.dtype == torch.uint8
    assert half.values.dtype == torch.bfloat16
    assert half(random(2, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16
    double = copy.deepcopy(layer).double()
    torch.testing.assert_close(double(random(2, 24, dtype=torch.float64)).float(), layer(random(2, 24)))


def test_autocast():
    dense = linear(6, 24)
    layer = SemiStructuredLinear.from_linear(dense)
    x = random(3, 24).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = layer(x), dense(x)
    assert y.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(y, plain)
    y.float().sum().backward()
    assert x.grad.dtype == layer.values.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert copy.deepcopy(layer).double()(x.double()).dtype == torch.float64


def test_compile():
    layer = SemiStructuredLinear.from_linear(linear(6, 24))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = random(2, 3, 24).requires_grad_()
    y = compiled(x)
    torch.testing.assert_close(y, layer(x))
    wanted = torch.autograd.grad(layer(x).square().sum(), (x, layer.values))
    found = torch.autograd.grad(y.square().sum(), (x, layer.values))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_bad_inputs():
    layer = SemiStructuredLinear.from_linear(linear(6, 24))
    with pytest.raises(ValueError, match=r"x must have shape \(..., 24\), got \(2, 23\)"):
        layer(random(2, 23))
    with pytest.raises(TypeError, match=r"x has dtype torch.bfloat16, but the layer's is torch.float32"):
        layer(random(2, 24, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"x must be a tensor, got list"):
        layer([1.0] * 24)
    with pytest.raises(ValueError, match=r"x must be on a CPU or CUDA device, got meta"):
        layer(torch.ones(2, 24, device="meta"))
    with torch.autocast("cpu"), pytest.raises(TypeError, match=r"x has dtype torch.int64"):
        layer(torch.ones(2, 24, dtype=torch.int64))


# ---- torch's own form ----


def two_of_four(out: int, into: int, dtype: torch.dtype) -> Tensor:
    """float32 is 1:2 in torch."""
    return pruned(out, into, "1:2" if dtype == torch.float32 else "2:4", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(32, 64), (64, 32), (96, 160)])
def test_torch_form(dtype, size):
    weight = two_of_four(*size, dtype)
    packed, meta = sparse_semi_structured_from_dense_cutlass(weight)
    values, indices = from_torch_semi_structured(packed, meta)
    assert torch.equal(decompress_weight(values, indices), weight)
    exported = to_torch_semi_structured(*compress_weight(weight))
    assert torch.equal(exported[0], packed)
    assert torch.equal(exported[1], meta)
    if dtype != torch.float32:  # which torch 2.13 itself does not read back
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(*exported), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torch_form_of_groups_that_are_not_full(dtype):
    weight = two_of_four(32, 64, dtype)
    weight[:, ::3] = 0
    packed, meta = sparse_semi_structured_from_dense_cutlass(weight)
    assert torch.equal(decompress_weight(*from_torch_semi_structured(packed, meta)), weight)
    assert torch.equal(
        sparse_semi_structured_to_dense_cutlass(*to_torch_semi_structured(*compress_weight(weight))), weight
    )


def test_torch_sparse_tensors_become_layers():
    dense = linear(32, 64, dtype=torch.bfloat16)
    packed, meta = sparse_semi_structured_from_dense_cutlass(dense.weight.detach())
    theirs = SparseSemiStructuredTensorCUTLASS(
        dense.weight.shape,
        packed=packed,
        meta=meta,
        packed_t=None,
        meta_t=None,
        compressed_swizzled_bitmask=None,
    )
    other = nn.Linear(64, 32, device="meta")
    other.weight, other.bias = nn.Parameter(theirs), dense.bias
    layer = SemiStructuredLinear.from_linear(other)
    x = random(3, 64, dtype=torch.bfloat16)
    torch.testing.assert_close(layer(x), dense(x))


def test_torch_form_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match=r"torch's semi-structured form wants .* out a multiple of 32"):
        to_torch_semi_structured(*compress_weight(pruned(31, 64, "2:4", torch.float16)))
    weight = torch.zeros(32, 64)
    weight[3, :2] = 1
    with pytest.raises(ValueError, match=r"float32 form is 1:2"):
        to_torch_semi_structured(*compress_weight(weight))
