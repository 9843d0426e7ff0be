"""A whole language model whose MLPs are pruned by blocks and compressed, beside the dense one."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import nn

from .case import OURS, Case, Contender, Unavailable

_ZEROS, _BLOCK = 0.9, 32


def cases(device: torch.device, quick: bool) -> list[Case]:
    """A Llama of transformers from its config, with random weights: time does not depend on them."""
    return [_llama(device, quick, tokens) for tokens in ((128,) if quick else (1, 128))]


def _llama(device: torch.device, quick: bool, tokens: int) -> Case:
    width, layers = (256, 2) if quick else (1024, 4)
    sizes = {
        "layers": layers, "hidden": width, "mlp": 4 * width, "tokens": tokens, "zeros of the MLPs": _ZEROS,
        "block": _BLOCK, "dtype": "float32",
    }  # fmt: skip

    def model() -> nn.Module:
        try:
            transformers = importlib.import_module("transformers")
        except ImportError as error:
            raise Unavailable("transformers is not installed") from error
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=256, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=width // 64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        made: nn.Module = transformers.LlamaForCausalLM(config).to(device).eval()
        return made

    def some_tokens() -> torch.Tensor:
        return torch.randint(3, 256, (1, tokens), generator=torch.Generator().manual_seed(1)).to(device)

    def run(made: nn.Module) -> Callable[[], object]:
        ids = some_tokens()

        def forward() -> object:
            with torch.no_grad():
                return made(ids, use_cache=False)

        return forward

    def ours() -> Callable[[], object]:
        from tilewright.prune import Block, compress, prune

        made = model()
        prune(made, Block(_BLOCK, _BLOCK), _ZEROS, include="*.mlp.*", progress=False)
        compress(made, {"input_ids": some_tokens(), "use_cache": False}, progress=False)
        return run(made)

    contenders = [Contender(OURS, ours), Contender("torch", lambda: run(model()))]
    title = (
        f"Llama, MLPs pruned to {1 - _ZEROS:.0%} and compressed, {tokens} token{'s' if tokens > 1 else ''}"
    )
    return Case(f"prune-llama-{tokens}", title, contenders, sizes=dict(sizes))
