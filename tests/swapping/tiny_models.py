"""Models of every architecture that can be swapped, with few and random weights."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from packaging import version
from torch import Tensor

VOCABULARY = 31
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24}
_MAMBA1 = {"mamba_d_state": 5, "mamba_dt_rank": 3, "use_mamba_kernels": False}
_MAMBA2 = {"mamba_d_state": 6, "mamba_chunk_size": 4}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", {"state_size": 5, "time_step_rank": 3, "num_hidden_layers": 2}),
    "falcon_mamba": ("FalconMamba", {"state_size": 5, "time_step_rank": 3, "num_hidden_layers": 2}),
    "mamba2": ("Mamba2", {
        "state_size": 6, "num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 4,
        "num_hidden_layers": 2,
    }),
    "jamba": ("Jamba", {
        **_ATTENTION, **_MAMBA1, "num_hidden_layers": 3, "num_experts": 2, "attn_layer_period": 3,
        "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "experts_implementation": "eager",
    }),
    "zamba": ("Zamba", {
        **_ATTENTION, **_MAMBA1, "num_hidden_layers": 5, "n_mamba_heads": 2, "attn_layer_period": 2,
        "attn_layer_offset": 1, "attention_head_dim": 16, "attention_hidden_size": 32,
    }),
    "bamba": ("Bamba", {
        **_ATTENTION, **_MAMBA2, "num_hidden_layers": 2, "mamba_n_heads": 4, "mamba_d_head": 8,
        "mamba_n_groups": 2, "attn_layer_indices": [1],
    }),
    "zamba2": ("Zamba2", {
        **_ATTENTION, "mamba_d_state": 6, "chunk_size": 4, "num_hidden_layers": 3, "n_mamba_heads": 4,
        "mamba_headdim": 8, "mamba_ngroups": 2, "num_mem_blocks": 1, "hybrid_layer_ids": [1],
        "layers_block_type": ["mamba", "hybrid", "mamba"], "attention_head_dim": 16,
        "attention_hidden_size": 32, "adapter_rank": 4, "use_mem_rope": True,
    }),
    "falcon_h1": ("FalconH1", {
        **_ATTENTION, **_MAMBA2, "num_hidden_layers": 2, "mamba_n_heads": 4, "mamba_d_head": 8,
        "mamba_d_ssm": 32, "mamba_n_groups": 2, "mamba_rms_norm": False,
    }),
    "falcon_h1_norm": ("FalconH1", {
        **_ATTENTION, **_MAMBA2, "num_hidden_layers": 2, "mamba_n_heads": 4, "mamba_d_head": 8,
        "mamba_d_ssm": 32, "mamba_n_groups": 2, "mamba_rms_norm": True,
    }),
    "granitemoehybrid": ("GraniteMoeHybrid", {
        **_ATTENTION, **_MAMBA2, "num_hidden_layers": 2, "mamba_n_heads": 4, "mamba_d_head": 8,
        "mamba_n_groups": 2, "layer_types": ["mamba", "attention"], "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 24, "experts_implementation": "eager",
    }),
    "nemotron_h": ("NemotronH", {
        **_ATTENTION, "ssm_state_size": 6, "chunk_size": 4, "mamba_num_heads": 4, "mamba_head_dim": 8,
        "n_groups": 2, "layers_block_type": ["mamba", "attention"], "head_dim": 8,
    }),
}  # fmt: skip
MAMBA1 = ("mamba", "falcon_mamba", "jamba", "zamba")


def is_before(release: str) -> bool:
    """Whether the transformers here is older."""
    import transformers

    return version.parse(transformers.__version__) < version.parse(release)


def tiny(family: str, **changes: Any) -> torch.nn.Module:
    """A causal language model in evaluation mode; the same weights at every call."""
    import transformers

    name, settings = CONFIGS[family]
    if family in ("zamba2", "nemotron_h") and is_before("5.15"):
        changes = {"chunk_size": 64, **changes}  # the stock layers are wrong from the second chunk on
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    if family.startswith("falcon_h1") and not is_before("5.4") and is_before("5.5"):
        pytest.skip("FalconH1's config takes no value for use_cache")
    config = getattr(transformers, f"{name}Config")(**_COMMON, **{**settings, **changes})
    torch.manual_seed(0)
    model: torch.nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():  # so that no gradient is tiny, and no bias or norm is trivial
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def twins(
    family: str, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
    """The model in float64, the model in `dtype`, and that model again to be swapped; the same weights."""
    stock = tiny(family, **changes).to(dtype)
    return copy.deepcopy(stock).double(), stock, copy.deepcopy(stock)


def run_on(model: torch.nn.Module, ids: Tensor, done: int, before: Any = None, **inputs: Any) -> Any:
    """The output for the tokens from the `done`-th on, with the cache of the output for those before them."""
    places = torch.arange(done, done + ids.shape[1])
    accepted = inspect.signature(model.forward).parameters
    if "position_ids" in accepted:
        inputs["position_ids"] = places.expand(ids.shape)
    if before is not None:
        inputs |= {key: before[key] for key in ("cache_params", "past_key_values") if key in before}
    if before is not None and "cache_position" in accepted:  # transformers before 5.4
        inputs["cache_position"] = places
    if before is None and "past_key_values" in accepted and is_before("5.5"):
        prepared = model.prepare_inputs_for_generation(ids, cache_position=places, use_cache=True)
        inputs["past_key_values"] = prepared.get("past_key_values")
    return model(ids, use_cache=True, **inputs)


def tokens(batch: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    """Token ids, none of them special."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
