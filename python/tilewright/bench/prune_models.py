"""A whole language model whose MLPs are pruned by blocks and compressed, beside the dense one."""

from __future__ import annotations

import torch
from torch import nn

from .case import OURS, Call, Case, Contender, Plan, of_tokens, peer

_ZEROS, _BLOCK = 0.9, 32
_LAYERS, _WIDTH = 4, 1024


def cases(plan: Plan) -> list[Case]:
    """A small Llama of transformers from its config, with random weights: time does not depend on them.

    None if quick, none of a published model: compressing measures for half a minute, far longer there.
    """
    return [] if plan.quick or plan.model else [_llama(plan.device, tokens) for tokens in (1, 128)]


def _llama(device: torch.device, tokens: int) -> Case:
    sizes = {
        "layers": _LAYERS, "hidden": _WIDTH, "mlp": 4 * _WIDTH, "tokens": tokens, "zeros of the MLPs": _ZEROS,
        "block": _BLOCK, "dtype": "float32",
    }  # fmt: skip

    def model() -> nn.Module:
        transformers = peer("transformers")
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=256, hidden_size=_WIDTH, intermediate_size=4 * _WIDTH, num_hidden_layers=_LAYERS,
            num_attention_heads=_WIDTH // 64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        made: nn.Module = transformers.LlamaForCausalLM(config).to(device).eval()
        return made

    def some_tokens() -> torch.Tensor:
        return torch.randint(3, 256, (1, tokens), generator=torch.Generator().manual_seed(1)).to(device)

    def run(made: nn.Module) -> Call:
        ids = some_tokens()

        def forward() -> object:
            with torch.no_grad():
                return made(ids, use_cache=False)

        return forward

    def ours() -> Call:
        from tilewright.prune import Block, compress, prune

        made = model()
        prune(made, Block(_BLOCK, _BLOCK), _ZEROS, include="*.mlp.*", progress=False)
        compress(made, {"input_ids": some_tokens(), "use_cache": False}, progress=False)
        return run(made)

    contenders = [Contender(OURS, ours), Contender("torch", lambda: run(model()))]
    title = f"Llama, MLPs pruned to {1 - _ZEROS:.0%} and compressed, {of_tokens(tokens)}"
    return Case(f"prune-llama-{tokens}", title, contenders, sizes=dict(sizes))
