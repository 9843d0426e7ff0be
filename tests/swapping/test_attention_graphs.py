"""Models with swapped attention under torch.compile: what one graph holds, and what it does not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_attention import logits, padding, tiny, tokens
from torch import Tensor

import tilewright as tw
from tilewright.attention import BlockMask, BlockSparse, estimate, permuted_block_sparse_attention
from tilewright.attention.compose import from_elements
from tilewright.swapping import graph

pytest.importorskip("transformers", minversion="5.4")

WINDOW = functools.partial(BlockSparse, BlockMask.sliding_window, window=10, sink=3, block_size=16)
MEANS = functools.partial(BlockSparse, estimate.mean_pool_top_p, block_size=16, threshold=0.5)
GROUPS = functools.partial(BlockSparse, estimate.top_k, block_size=(16, 32), count=2)
PERMUTED = functools.partial(
    BlockSparse, permuted_block_sparse_attention, block_size=16, segment_size=32, threshold=0.3
)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """One thread, and no graphs of other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(before)


def padded(ids: Tensor) -> dict[str, Any]:
    return {"attention_mask": padding(ids, left=9, right=4)}


def packed(ids: Tensor) -> dict[str, Any]:
    positions = torch.cat([torch.arange(30), torch.arange(ids.shape[1] - 30)])
    return {"position_ids": positions.expand_as(ids), "use_cache": False}


def triangle(ids: Tensor) -> dict[str, Any]:
    return {"attention_mask": torch.ones(len(ids), 1, ids.shape[1], ids.shape[1]).tril().bool()}


def nothing(ids: Tensor) -> dict[str, Any]:
    return {}


def step(model: Any, ids: Tensor, inputs: dict[str, Any], parameters: dict[str, Tensor]) -> list[Tensor]:
    """The output and all gradients."""
    out = model(ids, **inputs)[0]
    found = torch.autograd.grad(out.square().mean(), list(parameters.values()), allow_unused=True)
    return [out.detach(), *(torch.zeros(()) if g is None else g for g in found)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "spec", "given"),
    [
        ("gpt2", WINDOW, nothing),
        ("llama", WINDOW, padded),
        ("mistral", WINDOW, nothing),
        ("bert", WINDOW, padded),
        ("llama", MEANS, packed),
        pytest.param("llama", WINDOW, packed, marks=pytest.mark.nightly),
        pytest.param("llama", WINDOW, triangle, marks=pytest.mark.nightly),
        pytest.param("llama", MEANS, nothing, marks=pytest.mark.nightly),
        pytest.param("gemma2", GROUPS, padded, marks=pytest.mark.nightly),
        ("llama", PERMUTED, nothing),
    ],
    ids=lambda value: getattr(getattr(value, "args", [value])[0], "__name__", str(value)),
)
def test_one_graph(family: str, spec: Callable[..., BlockSparse], given: Callable[..., Any]) -> None:
    """What the model computes without it, bit by bit."""
    model, ids = tiny(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 1}), tokens()
    dense = logits(model, ids, **given(ids))
    tw.swap(model, attention=spec())
    parameters = {name: p for name, p in model.named_parameters() if "pooler" not in name}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = step(model, ids, given(ids), parameters)
    assert not torch.allclose(expected[0], dense, atol=1e-3)
    for a, b in zip(step(compiled, ids, given(ids), parameters), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_graphs_of_other_sizes_and_after_unswap() -> None:
    """Another length or batch size gets another graph, and a model that is as before one without kernels."""
    model = tiny("llama", num_hidden_layers=1)
    tw.swap(model, attention=MEANS())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for ids in (tokens(), tokens(3, 41)):
        given = padded(ids)
        torch.testing.assert_close(logits(compiled, ids, **given), logits(model, ids, **given))
    tw.unswap(model)
    dense = logits(model, tokens())
    torch.testing.assert_close(logits(compiled, tokens()), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.nightly
def test_checkpointed_layers_in_one_graph() -> None:
    """Nothing that a layer makes is kept outside of it."""
    model, ids = tiny("llama", num_hidden_layers=2).train(), tokens()
    tw.swap(model, attention=WINDOW())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    given, parameters = {**padded(ids), "use_cache": False}, dict(model.named_parameters())
    expected = step(model, ids, given, parameters)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for a, b in zip(step(compiled, ids, given, parameters), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_what_a_graph_does_not_hold() -> None:
    """Permuted attention of padded rows: whole graphs say so, others go round it."""
    model, ids = tiny("llama", num_hidden_layers=1), tokens()
    tw.swap(model, attention=PERMUTED())
    given = {"attention_mask": padding(ids, left=9)}
    expected = logits(model, ids, **given)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="no padding or window of the model"):
        logits(torch.compile(model, backend="aot_eager", fullgraph=True), ids, **given)
    torch._dynamo.reset()
    torch.testing.assert_close(logits(torch.compile(model, backend="aot_eager"), ids, **given), expected)


@pytest.mark.nightly
def test_layers_that_were_left_alone_take_the_masks_of_a_graph() -> None:
    model, ids = tiny("mistral"), tokens()
    tw.swap(model, attention=WINDOW(), include="*.1.self_attn")
    expected = logits(model, ids, **padded(ids))
    found = logits(torch.compile(model, backend="aot_eager"), ids, **padded(ids))
    torch.testing.assert_close(found, expected)


# ---- the op ----


def call(spec: BlockSparse, elements: Tensor | None = None, heads: int = 1, **options: Any) -> BlockMask:
    """The mask of the op for 70 tokens in 2 rows, the first padded by 9."""
    q = torch.randn(2, 4, 70, 8, generator=torch.Generator().manual_seed(0))
    visible = padding(tokens(), left=9).bool() if elements is None else None
    lists = torch.ops.tilewright.model_blocks(
        q, q[:, ::2], visible, elements, spec.number, options.get("causal", True), heads, 16, 16
    )
    return BlockMask(*lists, (16, 16), 70, 70)


@pytest.mark.parametrize("causal", [False, True])
def test_the_op_hides_padding(causal: bool) -> None:
    spec = BlockSparse(BlockMask.sliding_window, window=10, causal=False, block_size=16)
    mask = call(spec, causal=causal).validate()
    seen = BlockMask.sliding_window(70, 10, causal=causal, block_size=16).to_mask()
    assert torch.equal(mask.to_mask(), seen & padding(tokens(), left=9).bool()[:, None, None])


def test_the_op_takes_masks_of_elements() -> None:
    elements = torch.rand(2, 1, 70, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    spec = WINDOW()
    expected = BlockMask.sliding_window(70, 10, sink=3, block_size=16) & from_elements(elements, 16)
    assert call(spec, elements).validate() == expected
    assert call(spec, torch.zeros(2, 1, 70, 70, dtype=torch.bool)).validate().density == 0


def test_a_specification_that_changes_its_mind() -> None:
    heads = iter([1, 2])

    def fickle(q: Tensor, k: Tensor) -> BlockMask:
        return BlockMask.from_dense(torch.ones(1, next(heads), 5, 5, dtype=torch.bool), 16, 70, 70)

    spec = BlockSparse(fickle)
    call(spec)
    with pytest.raises(ValueError, match=r"returned a mask of 2 heads and blocks of .16, 16."):
        call(spec)


def test_opcheck() -> None:
    """Of a mask whose lists are full: what is beyond their counts may be anything."""
    q = torch.randn(2, 4, 70, 8)
    spec = BlockSparse.full(16)
    arguments = (q, q[:, ::2], None, None, spec.number, False, 1, 16, 16)
    torch.library.opcheck(torch.ops.tilewright.model_blocks.default, arguments)


def test_sizes_that_a_graph_is_made_for() -> None:
    for spec, expected in ((MEANS(), (4, 16, 16)), (GROUPS(), (2, 16, 32)), (WINDOW(), (1, 16, 16))):
        assert graph._sizes(spec.number, 4, 2, 70, 8, torch.float32, torch.device("cpu")) == expected
