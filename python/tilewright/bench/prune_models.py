"""A whole language model whose MLPs are pruned by blocks and compressed, beside the dense one."""

from __future__ import annotations

import torch
from torch import nn

from .case import OURS, Call, Case, Contender, Plan, of_tokens, peer
from .presets import Attention, Mlp, Model

_ZEROS, _BLOCK = 0.9, 32


_SMALL = Model("", 4, 1024, Attention(16, 16, 64, 2048), Mlp(4096))


def cases(plan: Plan) -> list[Case]:
    """A Llama of transformers from its config, with random weights: time does not depend on them.

    Four layers of a small one, or one of the plan's model. None if quick: compressing takes half a minute.
    """
    if plan.quick or (plan.model and plan.model.family != "llama"):
        return []
    model, layers = (plan.model, 1) if plan.model else (_SMALL, _SMALL.layers)
    return [_llama(plan.device, model, layers, tokens) for tokens in (1, 128)]


def _llama(device: torch.device, facts: Model, layers: int, tokens: int) -> Case:
    attention, mlp = facts.attention, facts.mlp
    sizes = {
        "layers": layers, "hidden": facts.hidden, "mlp": mlp and mlp.inner, "tokens": tokens,
        "zeros of the MLPs": _ZEROS, "block": _BLOCK, "dtype": "float32",
    }  # fmt: skip

    def model() -> nn.Module:
        transformers = peer("transformers")
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=256, hidden_size=facts.hidden, intermediate_size=mlp and mlp.inner,
            num_hidden_layers=layers, num_attention_heads=attention and attention.heads,
            num_key_value_heads=attention and attention.kv_heads, head_dim=attention and attention.head_dim,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
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
