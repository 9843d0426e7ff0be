"""tw.swap(attention=...): reports, selection, isolation, verification, and what it refuses."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_attention import inputs_of, logits, tiny, tokens
from tiny_models import is_before

import tilewright as tw
from tilewright import _C
from tilewright.attention import BlockMask, BlockSparse
from tilewright.swapping import attention as layers

transformers = pytest.importorskip("transformers", minversion="5.4")

FULL = BlockSparse.full(block_size=16)
WINDOW = functools.partial(BlockSparse, BlockMask.sliding_window, window=10, block_size=16)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other crawl where the tests share their cores with something else."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_report() -> None:
    model = tiny("llama")
    report = tw.swap(model, attention=WINDOW())
    entry = report.swapped[0]
    assert (entry.path, entry.layer, entry.op, entry.kernel) == (
        "model.layers.0.self_attn", "LlamaAttention", "block_sparse_attention", f"cpu-{_C.cpu_level()}",
    )  # fmt: skip
    assert str(report).startswith("2 layers swapped, 0 layers left as they were.")
    assert model.config._attn_implementation == "tilewright"
    again = tw.swap(model, attention=WINDOW())
    assert [entry.why for entry in again.skipped] == ["swapped already"] * 2
    assert not tw.swap(model).swapped
    assert tw.unswap(model) == 2
    assert model.config._attn_implementation == "sdpa"
    assert tw.unswap(model) == 0


def test_dry_run_changes_nothing() -> None:
    model = tiny("llama")
    config = model.config
    report = tw.swap(model, attention=WINDOW(), dry_run=True)
    assert len(report.swapped) == 2
    assert model.config is config
    assert config._attn_implementation == "sdpa"
    assert not any(layers.is_swapped(module) for module in model.modules())


def test_attention_and_scans_of_one_model() -> None:
    from tiny_models import tiny as tiny_mamba

    model = tiny_mamba("jamba")
    stock = copy.deepcopy(model)
    report = tw.swap(model, attention=FULL)
    assert [entry.op for entry in report.swapped] == ["selective_scan"] * 2 + ["block_sparse_attention"]
    ids = torch.arange(3, 30)[None]
    torch.testing.assert_close(logits(model, ids), logits(stock, ids), rtol=1e-4, atol=1e-4)
    assert tw.unswap(model) == 3


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_layers_that_were_left_alone_go_on_as_before(implementation: str) -> None:
    model = tiny("llama", attn_implementation=implementation)
    stock, whole = copy.deepcopy(model), copy.deepcopy(model)
    report = tw.swap(model, attention=FULL, include="*.1.self_attn")
    assert [entry.path for entry in report.swapped] == ["model.layers.1.self_attn"]
    assert [entry.why for entry in report.skipped] == ["not included"]
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    for given in (mask, torch.ones_like(ids)):
        found, expected = (logits(m, ids, attention_mask=given)[given.bool()] for m in (model, stock))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), stock.generate(ids, **options))

    tw.unswap(model)
    tw.swap(model, attention=WINDOW(), include="*.1.self_attn")
    tw.swap(whole, attention=WINDOW())
    one, both = logits(model, ids), logits(whole, ids)
    assert not torch.allclose(one, both, atol=1e-3)
    tw.swap(model, attention=WINDOW())
    torch.testing.assert_close(logits(model, ids), both)
    assert tw.unswap(model) == 2
    assert torch.equal(logits(model, ids), logits(stock, ids))
    assert model.config._attn_implementation == implementation


def test_other_models_are_untouched() -> None:
    """Another model of the class, one of the same config object, and one made from the swapped config."""
    config = tiny("llama").config
    cls = transformers.LlamaForCausalLM
    model, sibling = cls(config).eval(), cls(config).eval()
    ids = tokens()
    before = logits(sibling, ids)
    tw.swap(model, attention=WINDOW())
    assert config._attn_implementation == "sdpa"
    assert torch.equal(logits(sibling, ids), before)
    heir = cls(model.config).eval()
    heir.load_state_dict(sibling.state_dict())
    torch.testing.assert_close(logits(heir, ids), before, rtol=1e-4, atol=1e-4)
    sparse = logits(model, ids)
    assert len(tw.swap(heir, attention=FULL, include="*.0.self_attn").swapped) == 1
    torch.testing.assert_close(logits(heir, ids), before, rtol=1e-4, atol=1e-4)
    assert tw.unswap(heir) == 1
    assert heir.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model, ids), sparse)


def test_parameters_and_saved_models_are_the_same(tmp_path: Any) -> None:
    model = tiny("llama")
    names, parts = list(model.state_dict()), repr(model)
    ids = tokens()
    dense = logits(model, ids)
    tw.swap(model, attention=WINDOW())
    assert list(model.state_dict()) == names
    assert repr(model) == parts
    model.save_pretrained(tmp_path)
    assert "tilewright" not in (tmp_path / "config.json").read_text()
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, ids), dense)


def test_parts_of_a_composite_config_stay_shared() -> None:
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    text = {**vision, "vocab_size": 61, "max_position_embeddings": 64, "eos_token_id": 2, "bos_token_id": 1}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**vision, "image_size": 32, "patch_size": 8}, projection_dim=16
    )
    model = transformers.CLIPModel(config).eval()
    stock = copy.deepcopy(model)
    report = tw.swap(model, attention=FULL, include="text_model.*")
    assert [entry.path.split(".")[0] for entry in report.swapped] == ["text_model"]
    attention = model.get_submodule(report.swapped[0].path)
    assert attention.config is model.config.text_config
    assert model.config.vision_config._attn_implementation == "sdpa"
    inputs = {"input_ids": tokens(length=20), "pixel_values": inputs_of("vit")["pixel_values"]}
    with torch.no_grad():
        a, b = model(**inputs).logits_per_image, stock(**inputs).logits_per_image
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_layer_alone() -> None:
    """Masks then come from a model that knows nothing of it: SDPA's, of elements or none."""
    model, stock = tiny("llama"), tiny("llama")
    tw.swap(model.model.layers[1], attention=FULL)
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    for given in (None, mask):
        found, expected = (logits(m, ids, attention_mask=given) for m in (model, stock))
        kept = torch.ones_like(mask).bool() if given is None else mask.bool()
        torch.testing.assert_close(found[kept], expected[kept], rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), stock.generate(ids, **options))
    tw.swap(model, attention=WINDOW())
    whole = tiny("llama")
    tw.swap(whole, attention=FULL, include="*.1.self_attn")
    tw.swap(whole, attention=WINDOW())
    torch.testing.assert_close(logits(model, ids), logits(whole, ids))
    assert tw.unswap(model) == tw.unswap(whole) == 2
    assert torch.equal(logits(model, ids), logits(stock, ids))


@pytest.mark.parametrize("spec", [FULL, WINDOW()], ids=["full", "window"])
def test_verify(spec: BlockSparse) -> None:
    ids = tokens()
    assert len(tw.swap(tiny("llama"), attention=spec, verify=ids).swapped) == 2


def test_verify_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    config = model.config
    right = layers.block_sparse_attention
    monkeypatch.setattr(layers, "block_sparse_attention", lambda *a, **k: right(*a, **k) * 1.5)
    with pytest.raises(RuntimeError, match=r"verify: output.* differs by"):
        tw.swap(model, attention=WINDOW(), verify=tokens())
    assert model.config is config
    assert config._attn_implementation == "sdpa"
    assert not any(layers.is_swapped(module) for module in model.modules())


def test_an_error_while_verifying_undoes_the_swap() -> None:
    model = tiny("llama")
    spec = BlockSparse(lambda q_len, kv_len: "no mask")
    with pytest.raises(TypeError, match=r"<lambda> must return a BlockMask, got str"):
        tw.swap(model, attention=spec, verify=tokens())
    assert model.config._attn_implementation == "sdpa"
    assert logits(model, tokens()).isfinite().all()


# ---- layers that are left alone ----


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: transformers.T5EncoderModel(transformers.T5Config(
            vocab_size=31, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
        )), "it may attend to another sequence than its own"),
        (lambda: transformers.GptOssForCausalLM(transformers.GptOssConfig(
            vocab_size=31, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, head_dim=8, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
        )), "it has learned sinks"),
        (lambda: tiny("llama", head_dim=12), "its head dim is 12; the kernels have multiples of 8 up to 256"),
    ],
    ids=["t5", "gpt-oss", "head dim"],
)  # fmt: skip
def test_left_alone(model: Any, why: str) -> None:
    if "another sequence" in why and is_before("5.20"):
        pytest.skip("T5's layers do not call attention by a name")
    report = tw.swap(model(), attention=FULL)
    assert not report.swapped
    assert {entry.why for entry in report.skipped} == {why}


# ---- what is refused ----


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"output_attentions": True}, "output_attentions is not supported .*never formed"),
        ({"cu_seq_lens_q": torch.tensor([0, 70])}, "cu_seq_lens_q is not supported .*give position_ids"),
        ({"s_aux": torch.zeros(4)}, "s_aux is not supported .*learned sinks"),
        ({"head_mask": torch.ones(2, 4)}, "head_mask is not supported .*heads cannot be scaled"),
        ({"position_bias": torch.ones(1)}, "position_bias is not supported .*no bias"),
        ({"something_new": 3}, "something_new is not supported .*does not know what it means"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_unsupported_arguments(extra: dict[str, Any], message: str) -> None:
    model = tiny("llama")
    tw.swap(model, attention=FULL)
    with pytest.raises(NotImplementedError, match=message):
        model(tokens(), **extra)


def test_output_attentions_where_the_model_keeps_it_to_itself() -> None:
    model = tiny("gpt2")
    tw.swap(model, attention=FULL)
    with pytest.raises(NotImplementedError, match="output_attentions is not supported"):
        model(tokens(), output_attentions=True)


def test_dropout() -> None:
    model = tiny("llama", attention_dropout=0.1)
    tw.swap(model, attention=FULL)
    logits(model, tokens())
    with pytest.raises(NotImplementedError, match=r"dropout must be 0 .*LlamaAttention has 0.1"):
        model.train()(tokens())


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.rand(2, 1, 70, 70), NotImplementedError, "0 where a key is seen and -inf .*take no bias"),
        (torch.ones(2, 1, 70, 70).int(), NotImplementedError, "attention_mask must be bool"),
        (
            torch.ones(2, 1, 70, 60).bool(),
            ValueError,
            r"attention_mask must be \(batch, heads, 70, 70\), got",
        ),
    ],
)
def test_masks_of_elements_that_are_none(mask: torch.Tensor, error: type[Exception], message: str) -> None:
    model = tiny("llama")
    tw.swap(model, attention=FULL)
    with pytest.raises(error, match=message):
        model(tokens(), attention_mask=mask)


def test_a_window_without_a_mask_that_says_so() -> None:
    model = tiny("mistral")
    q = torch.zeros(1, 4, 30, 8)
    tw.swap(model, attention=FULL)
    layer = model.model.layers[0].self_attn
    with pytest.raises(NotImplementedError, match="sliding_window=20 came without a mask"):
        layers.attend(layer, q, q, q, None, sliding_window=20)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BlockSparse("causal"), TypeError, "mask must be a builder .*got str"),
        (lambda: BlockSparse(BlockMask.sliding_window, windw=3), TypeError, "has no argument 'windw'; "),
        (lambda: BlockSparse(BlockMask.causal(64), window=3), TypeError, "takes no options, got .'window"),
        (lambda: BlockSparse(BlockMask.causal, takes="q"), ValueError, "takes must be 'lengths', .*got 'q'"),
        (lambda: BlockSparse(BlockMask.causal, decode=1), ValueError, "decode must be 'sparse', .*got 1"),
        (
            lambda: tw.swap(tiny("llama"), attention=BlockMask.causal(64)),
            TypeError, "attention must be a tilewright.attention.BlockSparse, such as .*got BlockMask",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (lambda q_len, kv_len: BlockMask.causal(16), "returned a mask for 16 queries and 16 keys, where 70"),
        (lambda length: BlockMask.causal(16), "returned a mask for 16 queries and 16 keys, where 70 and 70"),
    ],
)
def test_builders_of_other_lengths(mask: Any, message: str) -> None:
    model = tiny("llama")
    tw.swap(model, attention=BlockSparse(mask))
    with pytest.raises(ValueError, match=message):
        logits(model, tokens())


def test_what_it_is() -> None:
    assert (
        repr(WINDOW()) == "BlockSparse(BlockMask.sliding_window, window=10, block_size=16, decode='sparse')"
    )
    assert BlockSparse(lambda q, k: None).decode == "dense"
    assert BlockSparse(lambda a, b: None, takes="tensors").takes == "tensors"
    assert repr(BlockSparse(BlockMask.causal(64))).startswith("BlockSparse(a mask of 64 queries and 64 keys")
