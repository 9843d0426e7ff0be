"""StableEmbedding against its definition, and the defects of bitsandbytes' it must not have."""

import copy
import pickle

import pytest
import torch

import tilewright as tw
from tilewright.nn import StableEmbedding
from tilewright.optim import GlobalOptimManager


@pytest.fixture(autouse=True)
def _no_overrides():
    yield
    GlobalOptimManager.get_instance().initialize()


def test_it_looks_up_and_normalizes() -> None:
    embedding = StableEmbedding(50, 16)
    indices = torch.randint(0, 50, (3, 7))
    expected = torch.nn.functional.layer_norm(embedding.weight[indices], (16,))
    torch.testing.assert_close(embedding(indices), expected)


def test_weights_are_xavier_uniform() -> None:
    weight = StableEmbedding(2000, 400).weight.detach()
    limit = (6 / 2400) ** 0.5
    assert 0.95 * limit < float(weight.abs().max()) <= limit
    assert float(weight.std()) == pytest.approx(limit / 3**0.5, rel=0.02)


def test_padding_stays_zero() -> None:
    embedding = StableEmbedding(10, 4, padding_idx=3)
    assert bool((embedding.weight[3] == 0).all())
    embedding(torch.tensor([3, 4])).square().sum().backward()
    assert bool((embedding.weight.grad[3] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_tables_are_normalized_in_float32(dtype: torch.dtype) -> None:
    embedding = StableEmbedding(10, 64, dtype=dtype)
    assert embedding.norm.weight.dtype == torch.float32
    out = embedding(torch.arange(10))
    assert out.dtype == dtype
    expected = torch.nn.functional.layer_norm(embedding.weight.float(), (64,)).to(dtype)
    assert torch.equal(out, expected)


def test_a_module_cast_as_a_whole_still_runs() -> None:
    embedding = StableEmbedding(10, 64).half()
    assert embedding(torch.arange(10)).dtype == torch.float16


def test_device_and_dtype_reach_the_table() -> None:
    """bitsandbytes passes them by position, one off: a device freezes the weight and is not used."""
    embedding = StableEmbedding(10, 4, device="meta", dtype=torch.bfloat16)
    assert embedding.weight.device.type == "meta"
    assert embedding.weight.dtype == torch.bfloat16
    assert embedding.weight.requires_grad
    assert embedding.norm.weight.device.type == "meta"


def test_a_table_may_be_given() -> None:
    weight = torch.randn(10, 4)
    assert torch.equal(StableEmbedding(10, 4, _weight=weight).weight, weight)


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_its_optimizer_state_keeps_32_bits(copied) -> None:
    """In copies of the module too."""
    module = copied(torch.nn.ModuleList([StableEmbedding(300, 64), torch.nn.Embedding(300, 64)]))
    GlobalOptimManager.get_instance()
    optimizer = tw.optim.AdamW8bit(module.parameters())
    sum(layer(torch.arange(300)).square().sum() for layer in module).backward()
    optimizer.step()
    stable, plain = (optimizer.state[layer.weight] for layer in module)
    assert stable["state1"].dtype == torch.float32
    assert plain["state1"].dtype == torch.uint8
