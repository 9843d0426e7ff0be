"""Heads and MLP widths leave models of transformers, and from_pretrained still loads them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from shrink_models import randomized
from torch import Tensor, nn

import tilewright as tw

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def llama(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomized(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **changes})))


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
    )
    return randomized(transformers.ViTModel(config))


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    return randomized(transformers.BertModel(config))


def decoder(name: str, **changes: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**{**LLAMA, **changes})
    return randomized(getattr(transformers, f"{name}ForCausalLM")(config))


def output(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(inputs)[0]


def zero_inputs(linear: nn.Module, units: list[int], size: int) -> None:
    """Zeros where the layer reads the units, each of `size` features."""
    with torch.no_grad():
        for unit in units:
            linear.weight[:, unit * size : (unit + 1) * size] = 0


def same_as_masked(
    model: nn.Module,
    inputs: Tensor,
    readers: Callable[[nn.Module, str], tuple[nn.Module, int]],
    **options: Any,
) -> tw.prune.ShrinkReport:
    """Shrinks the model by half, and compares it with a copy that reads zeros where units left."""
    masked = copy.deepcopy(model)
    report = tw.prune.shrink(model, inputs, 0.5, **options)
    assert report.shrunk
    assert report.verified
    for group in report.shrunk:
        reader, size = readers(masked, group.name)
        zero_inputs(reader, group.removed, size)
    expected = output(masked, inputs)
    assert not torch.allclose(expected, output(copy.deepcopy(masked).apply(_with_ones), inputs))
    torch.testing.assert_close(
        output(model, inputs), expected, rtol=0, atol=1e-12 * expected.abs().max().item()
    )
    return report


def _with_ones(module: nn.Module) -> None:
    """Another model, to know that the inputs reach the layers at all."""
    if isinstance(module, nn.Linear):
        with torch.no_grad():
            module.weight.fill_(1.0)


def llama_readers(share: int, size: int = 4) -> Callable[[nn.Module, str], tuple[nn.Module, int]]:
    def readers(model: nn.Module, name: str) -> tuple[nn.Module, int]:
        module = model.get_submodule(name)
        return (module.o_proj, share * size) if name.endswith("self_attn") else (module.down_proj, 1)

    return readers


def reloads(model: nn.Module, inputs: Tensor, folder: Path) -> None:
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder, dtype=torch.float64).eval()
    torch.testing.assert_close(output(again, inputs), output(model, inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("keys", "share"), [(4, 2), (8, 1), (2, 4)])
def test_llama_loses_key_heads_with_their_query_heads(keys: int, share: int, tmp_path: Path) -> None:
    model = llama(num_key_value_heads=keys, attention_bias=True, mlp_bias=True)
    report = same_as_masked(model, IDS, llama_readers(share))
    assert [(group.kind, group.kept, group.total) for group in report.shrunk] == 2 * [
        ("heads", keys // 2, keys),
        ("width", 22, 44),
    ]
    assert report.reload is None
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, keys // 2)
    assert (config.head_dim, config.intermediate_size, config.hidden_size) == (4, 22, 32)
    attention = model.model.layers[0].self_attn
    assert attention.num_key_value_groups == share
    assert (attention.q_proj.out_features, attention.k_proj.out_features) == (16, 2 * keys)
    reloads(model, IDS, tmp_path)
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 10)


def test_one_key_head_stays_and_query_heads_leave(tmp_path: Path) -> None:
    model = llama(num_key_value_heads=1)
    report = same_as_masked(model, IDS, llama_readers(1))
    assert report.shrunk[0].note == "query heads; the one key/value head they share stays (heads of 4)"
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (4, 1)
    assert model.model.layers[0].self_attn.num_key_value_groups == 4
    reloads(model, IDS, tmp_path)


def test_too_few_key_heads_say_so() -> None:
    report = tw.prune.shrink(llama(num_key_value_heads=2), IDS, 0.25)
    assert [group.kind for group in report.shrunk] == ["width", "width"]
    assert [skip.why for skip in report.skipped] == 2 * ["0.25 of its 2 key/value heads is less than one"]


@pytest.mark.parametrize(
    ("name", "changes", "share", "size"),
    [("Mistral", {}, 2, 4), ("Qwen2", {}, 2, 4), ("Qwen3", {"head_dim": 8}, 2, 8), ("Phi3", {}, 2, 4)],
)
def test_other_decoders(name: str, changes: dict[str, Any], share: int, size: int, tmp_path: Path) -> None:
    model = decoder(name, **changes)
    report = same_as_masked(model, IDS, llama_readers(share, size))
    assert [group.kind for group in report.shrunk] == ["heads", "width"] * 2
    assert report.reload is None
    reloads(model, IDS, tmp_path)


def test_vit(tmp_path: Path) -> None:
    def readers(model: nn.Module, name: str) -> tuple[nn.Module, int]:
        module = model.get_submodule(name)
        return (module.o_proj, 8) if name.endswith("attention") else (module.fc2, 1)

    model = vit()
    report = same_as_masked(model, PIXELS, readers)
    assert [(group.kept, group.total) for group in report.shrunk] == [(2, 4), (24, 48)] * 2
    reloads(model, PIXELS, tmp_path)


def bert_readers(model: nn.Module, name: str) -> tuple[nn.Module, int]:
    layer = model.get_submodule(".".join(name.split(".")[:3]))
    return (layer.attention.output.dense, 8) if name.endswith("self") else (layer.output.dense, 1)


def test_bert_is_loaded_by_its_state_dict() -> None:
    """Its config has no size of heads: what it says of the heads stays, and the report tells."""
    model = bert()
    report = same_as_masked(model, IDS, bert_readers)
    assert "query.weight would be (32, 32), and it is (16, 32) now" in report.reload
    assert "load_shrunk can" in str(report)
    assert (model.config.num_attention_heads, model.config.intermediate_size) == (4, 24)
    attention = model.encoder.layer[0].attention.self
    assert (attention.num_attention_heads, attention.all_head_size) == (2, 16)
    fresh = tw.prune.load_shrunk(bert(), model.state_dict())
    assert torch.equal(output(fresh, IDS), output(model, IDS))
    assert fresh.encoder.layer[0].attention.self.num_attention_heads == 2


def test_bert_without_its_heads_reloads(tmp_path: Path) -> None:
    model = bert()
    report = same_as_masked(model, IDS, bert_readers, heads=False)
    assert [group.kind for group in report.shrunk] == ["width", "width"]
    assert report.reload is None
    reloads(model, IDS, tmp_path)


def test_fused_projections_of_gpt2() -> None:
    def readers(model: nn.Module, name: str) -> tuple[nn.Module, int]:
        return Transposed(model.get_submodule(name).c_proj), 8 if name.endswith("attn") else 1

    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    model = randomized(transformers.GPT2LMHeadModel(config))
    report = same_as_masked(model, IDS, readers)
    assert [(group.kept, group.total) for group in report.shrunk] == [(2, 4), (64, 128)] * 2
    fresh = randomized(
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**config.to_dict(), "n_inner": None}))
    )
    assert torch.equal(output(tw.prune.load_shrunk(fresh, model.state_dict()), IDS), output(model, IDS))


class Transposed(nn.Module):
    def __init__(self, conv1d: nn.Module) -> None:
        super().__init__()
        self.weight = conv1d.weight.t()


def test_heads_that_cannot_leave_say_why() -> None:
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = randomized(transformers.T5ForConditionalGeneration(config))
    report = tw.prune.shrink(model, {"input_ids": IDS, "decoder_input_ids": IDS}, 0.5)
    assert [group.kind for group in report.shrunk] == ["width"] * 4
    assert report.reload is None  # of the encoder's config, the decoder's and the model's own
    whys = {skip.name: skip.why for skip in report.skipped}
    assert whys["encoder.block.0.layer.0.SelfAttention"] == "relative_attention_bias.weight spans its heads"
    assert "cannot run" in whys["encoder.block.1.layer.0.SelfAttention"]
    report = tw.prune.shrink(decoder("Olmo2"), IDS, 0.5)
    assert [group.kind for group in report.shrunk] == ["width"] * 2
    assert [skip.why for skip in report.skipped] == ["q_norm.weight spans its heads"] * 2


def test_models_that_are_not_known_say_so() -> None:
    falcon = transformers.FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    report = tw.prune.shrink(randomized(transformers.FalconForCausalLM(falcon)), IDS, 0.5)
    assert [skip.why for skip in report.skipped] == [
        "its projections are FalconLinear, not torch.nn.Linear",
        "one of its projections is FalconLinear, not torch.nn.Linear",
    ]
    config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2])
    model = randomized(transformers.ResNetModel(config))
    report = tw.prune.shrink(model, PIXELS, 0.5)
    assert {group.kind for group in report.shrunk} == {"channels"}
    assert "by its config embedder.embedder.convolution.weight would be" in report.reload


def test_heads_packed_one_after_the_other() -> None:
    def readers(model: nn.Module, name: str) -> tuple[nn.Module, int]:
        module = model.get_submodule(name)
        return (module.dense, 8) if name.endswith("attention") else (module.dense_4h_to_h, 1)

    config = transformers.GPTNeoXConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    same_as_masked(randomized(transformers.GPTNeoXForCausalLM(config)), IDS, readers)


def test_layers_of_different_sizes_keep_the_config(tmp_path: Path) -> None:
    model = llama()
    report = tw.prune.shrink(model, IDS, {"model.layers.0.*": 0.5, "*": 0.25})
    assert [group.kept for group in report.shrunk] == [2, 22, 3, 33]
    assert report.reload.startswith("its layers have different numbers of heads now")
    assert (model.config.num_attention_heads, model.config.intermediate_size) == (8, 44)
    fresh = tw.prune.load_shrunk(llama(), model.state_dict())
    assert torch.equal(output(fresh, IDS), output(model, IDS))


def test_undo_and_configs_of_others() -> None:
    model = llama()
    other = llama()
    before, config, out = copy.deepcopy(model.state_dict()), model.config.to_dict(), output(model, IDS)
    report = tw.prune.shrink(model, IDS, 0.5)
    assert other.config.num_attention_heads == 8
    report.undo()
    assert model.config.to_dict() == config
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(output(model, IDS), out)


def test_tied_embeddings_and_training(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True).float()
    tw.prune.shrink(model, IDS, 0.5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.train()
    model(IDS, labels=IDS).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.shape == (16, 32)


class Attention(nn.Module):
    """As people write it: one projection for q, k and v."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], 3, self.num_heads, self.head_dim)
        q, k, v = self.qkv(x).view(shape).permute(2, 0, 3, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), nn.Sequential()
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PlainViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.positions = nn.Parameter(torch.randn(1, 16, 16))
        self.blocks = nn.Sequential(Block(16, 4), Block(16, 4))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


def test_a_vit_in_plain_torch() -> None:
    model = randomized(PlainViT())
    masked = copy.deepcopy(model)
    report = tw.prune.shrink(model, PIXELS, 0.5)
    groups = {group.name: group for group in report.shrunk}
    for index, block in enumerate(masked.blocks):
        zero_inputs(block.attn.proj, groups[f"blocks.{index}.attn"].removed, 4)
        zero_inputs(block.mlp[2], groups[f"blocks.{index}.mlp.0"].removed, 1)
    torch.testing.assert_close(model(PIXELS), masked(PIXELS), rtol=0, atol=1e-12)
    assert model.blocks[0].attn.num_heads == 2
    assert model.blocks[0].mlp[0].out_features == 32
    assert model.norm.normalized_shape == (16,)  # the residual stream is as wide as before
    fresh = tw.prune.load_shrunk(randomized(PlainViT()), model.state_dict())
    assert torch.equal(fresh(PIXELS), model(PIXELS))


def test_torchs_own_transformer_loses_widths() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = randomized(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    report = tw.prune.shrink(model, torch.randn(2, 5, 16, dtype=torch.float64), 0.5)
    assert [(group.kind, group.kept) for group in report.shrunk] == [("width", 16)] * 2
    assert any("MultiheadAttention takes the size of a head" in skip.why for skip in report.skipped)
