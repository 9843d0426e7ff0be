"""Models with attention of several architectures, with few and random weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tiny_models import is_before
from torch import Tensor, nn

_SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
_TEXT = {**_SIZES, "vocab_size": 61, "max_position_embeddings": 256, "pad_token_id": 0}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
_DECODER = {**_TEXT, **_SPECIAL, "num_key_value_heads": 2}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _DECODER),
    "qwen2": ("Qwen2ForCausalLM", _DECODER),
    "qwen3": ("Qwen3ForCausalLM", {**_DECODER, "head_dim": 16}),
    "mistral": ("MistralForCausalLM", {**_DECODER, "sliding_window": 20}),
    "mistral_full": ("MistralForCausalLM", {**_DECODER, "sliding_window": None}),
    "gemma2": ("Gemma2ForCausalLM", {
        **_DECODER, "head_dim": 8, "sliding_window": 20, "attn_logit_softcapping": 2.0,
    }),
    "gpt2": ("GPT2LMHeadModel", {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 61, **_SPECIAL,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }),
}  # fmt: skip
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", {**_TEXT, **_NO_DROPOUT}),
    "modernbert": ("ModernBertModel", {
        **_TEXT, **_SPECIAL, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 16,
    }),
    "vit": ("ViTModel", {**_SIZES, **_NO_DROPOUT, "image_size": 32, "patch_size": 4}),
}  # fmt: skip


def tiny(family: str, **changes: Any) -> Any:
    """A model in evaluation mode; the same weights at every call."""
    import transformers

    name, settings = {**DECODERS, **ENCODERS}[family]
    cls = getattr(transformers, name)
    if family == "gemma2" and is_before("5.21"):
        changes = {"attn_implementation": "eager", **changes}  # SDPA leaves the soft cap out there
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**settings, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():  # so that attention is not all but uniform
            parameter.add_(0.3 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return model.eval()


def twins(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, Any, Any]:
    """The model in float64, the model in `dtype`, and that model again to be swapped."""
    stock = tiny(family, **changes).to(dtype)
    return copy.deepcopy(stock).double(), stock, copy.deepcopy(stock)


def tokens(batch: int = 2, length: int = 70, seed: int = 0) -> Tensor:
    """Token ids, none of them special."""
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(ids: Tensor, left: int = 0, right: int = 0, holes: int = 0) -> Tensor:
    """A mask that hides tokens of the first row at the start, of the last at the end, and every so many."""
    mask = torch.ones_like(ids)
    mask[0, :left] = 0
    mask[-1, ids.shape[1] - right :] = 0
    if holes:
        mask[:, holes::holes] = 0
    return mask


def inputs_of(family: str) -> dict[str, Tensor]:
    """What the model takes."""
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    return {"input_ids": tokens()}


def logits(model: nn.Module, *args: Any, **inputs: Any) -> Tensor:
    """The first of the model's outputs, without gradients."""
    with torch.no_grad():
        return model(*args, **inputs)[0]  # type: ignore[no-any-return]


def assert_rule(ours: Tensor, stock: Tensor, exact: Tensor, name: str = "") -> None:
    """No more than twice the stock model's error, and a few units of rounding."""
    error, allowed = (ours - exact).abs().max(), (stock - exact).abs().max()
    slack = 64 * torch.finfo(ours.dtype).eps * exact.abs().max()
    assert error <= 2 * allowed + slack, f"{name}: off by {error:.2e}, the stock model by {allowed:.2e}"
