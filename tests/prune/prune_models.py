"""Small models to prune, and what the tests of pruning ask of them."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.prune import mask_of


def mlp(sizes: tuple[int, ...] = (32, 48, 40, 8), dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Linear layers "0", "2", ... with Tanh between; the same weights at every call."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def batches(features: int = 32, count: int = 3, rows: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    scale = torch.linspace(0.1, 3.0, features)
    return [torch.randn(rows, features, generator=generator) * scale for _ in range(count)]


def tiny_llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, **changes,
    }  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def token_batches(count: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    found = [torch.randint(3, 64, (2, 12), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in found]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a failed call has to leave as it was."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "masks": [copy.copy(mask_of(module)) for module in model.modules()],
        "asked": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [copy.copy(parameter.grad) for parameter in model.parameters()],
        "hooks": [_hooks(module) for module in model.modules()],
        "random": torch.get_rng_state(),
    }


def _hooks(module: nn.Module) -> tuple[int, int, int, bool]:
    before, after = len(module._forward_pre_hooks), len(module._forward_hooks)
    return before, after, len(module._load_state_dict_post_hooks), "forward" in vars(module)


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert list(before["state"]) == list(after["state"])
    for name, tensor in before["state"].items():
        assert bits(tensor) == bits(after["state"][name]), name
    for what in ("modes", "asked", "hooks"):
        assert before[what] == after[what], what
    for what in ("masks", "grads"):
        for old, new in zip(before[what], after[what], strict=True):
            assert (old is None) == (new is None), what
            assert old is None or torch.equal(old, new), what
    assert torch.equal(before["random"], after["random"])


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
