"""Models of transformers with block-sparse attention beside SDPA with the same mask."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_attention import DECODERS, ENCODERS, assert_rule, inputs_of, logits, padding, tiny, tokens, twins
from torch import Tensor

import tilewright as tw
from tilewright.attention import BlockMask, BlockSparse, permuted_block_sparse_attention
from tilewright.attention.compose import from_elements

pytest.importorskip("transformers", minversion="5.4")

FULL = BlockSparse.full(block_size=16)
WINDOW = functools.partial(BlockSparse, BlockMask.sliding_window, window=10, sink=3, block_size=16)
FAMILIES = [*DECODERS, *ENCODERS]
CAUSAL = [family for family in DECODERS if family not in ("mistral", "gemma2")]
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other crawl where the tests share their cores with something else."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def window(q_len: int, kv_len: int) -> Tensor:
    """What WINDOW shows."""
    q, k = torch.arange(q_len)[:, None] + kv_len - q_len, torch.arange(kv_len)
    return (k <= q) & ((k > q - 10) | (k < 3))


def visible(mask: Tensor) -> Tensor:
    """Bool (batch, 1, length, length): WINDOW without padding; rows that see nothing see themselves."""
    seen = window(mask.shape[1], mask.shape[1]) & mask[:, None, None].bool()
    return seen | (~seen.any(-1, keepdim=True) & torch.eye(mask.shape[1], dtype=torch.bool))


@pytest.mark.parametrize("family", FAMILIES)
def test_full_mask_is_the_stock_model(family: str) -> None:
    exact, stock, ours = twins(family)
    report = tw.swap(ours, attention=FULL)
    assert len(report.swapped) == 2
    assert {entry.op for entry in report.swapped} == {"block_sparse_attention"}
    inputs = inputs_of(family)
    found = []
    for model in (ours, stock, exact):
        given = {k: v.double() if v.is_floating_point() and model is exact else v for k, v in inputs.items()}
        out = model.train()(**given)[0]
        out.square().sum().backward()
        found.append(out.detach())
    assert_rule(*found)
    for (name, a), b, c in zip(ours.named_parameters(), stock.parameters(), exact.parameters(), strict=True):
        if c.grad is None:
            assert a.grad is None, name
        else:
            assert_rule(a.grad, b.grad, c.grad, name)


@pytest.mark.parametrize("sides", [(9, 0, 0), (0, 11, 0), (9, 11, 0), (17, 0, 5)], ids=str)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "vit"])
def test_padding(family: str, sides: tuple[int, int, int]) -> None:
    exact, stock, ours = twins(family)
    tw.swap(ours, attention=FULL)
    ids = tokens()
    mask = padding(ids, *sides)
    found = [logits(model, ids, attention_mask=mask)[mask.bool()] for model in (ours, stock, exact)]
    if found[2].isfinite().all():
        assert_rule(*found)
    else:  # eager attention in float64 has NaN where a row is hidden
        assert family == "gemma2"
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", CAUSAL)
def test_window_is_sdpa_with_its_elements(family: str) -> None:
    exact, stock, ours = twins(family)
    tw.swap(ours, attention=WINDOW())
    ids = tokens(length=130)
    for mask in (torch.ones_like(ids), padding(ids, left=21), padding(ids, right=9)):
        found = [logits(ours, ids, attention_mask=mask)]
        found += [logits(model, ids, attention_mask=visible(mask)) for model in (stock, exact)]
        assert_rule(*(out[mask.bool()] for out in found))


def test_gradients_of_a_window() -> None:
    exact, stock, ours = twins("llama")
    tw.swap(ours, attention=WINDOW())
    ids = tokens(length=130)
    mask = padding(ids, left=21)
    for model, own_mask in ((ours, mask), (stock, visible(mask)), (exact, visible(mask))):
        model(ids, attention_mask=own_mask).logits[mask.bool()].square().sum().backward()
    for (name, a), b, c in zip(ours.named_parameters(), stock.parameters(), exact.parameters(), strict=True):
        assert_rule(a.grad, b.grad, c.grad, name)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(dtype: torch.dtype) -> None:
    exact, stock, ours = twins("llama", dtype)
    tw.swap(ours, attention=WINDOW())
    ids = tokens(length=130)
    mask = visible(torch.ones_like(ids))
    assert_rule(logits(ours, ids), *(logits(model, ids, attention_mask=mask) for model in (stock, exact)))


def test_autocast() -> None:
    exact, _, ours = twins("llama")
    tw.swap(ours, attention=FULL)
    ids = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(ids, labels=ids)
    out.loss.backward()
    truth = logits(exact, ids)
    assert (out.logits - truth).abs().max() < 0.1 * truth.abs().max()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


# ---- sequences in one row ----


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_packed_by_positions(family: str) -> None:
    exact, stock, ours = twins(family)
    tw.swap(ours, attention=FULL)
    rows = [(30, 1, 39), (16, 32, 22)]
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])
    # With a cache, transformers takes a row for one sequence.
    given = {"position_ids": positions, "use_cache": False}
    assert_rule(*(logits(model, tokens(), **given) for model in (ours, stock, exact)))


def test_packed_sequences_are_as_alone_under_a_window() -> None:
    model = tiny("llama")
    tw.swap(model, attention=BlockSparse(BlockMask.sliding_window, window=10, block_size=16))
    ids = tokens(batch=1)
    positions = torch.cat([torch.arange(30), torch.arange(40)])[None]
    apart = torch.cat([logits(model, part) for part in ids.split([30, 40], dim=1)], dim=1)
    torch.testing.assert_close(
        logits(model, ids, position_ids=positions, use_cache=False), apart, rtol=1e-4, atol=1e-4
    )


# ---- caches ----


def in_parts(
    model: Any, ids: Tensor, cuts: list[int], cache: Any = None, mask: Tensor | None = None
) -> Tensor:
    found, done = [], 0
    with torch.no_grad():
        for part in ids.split(cuts, dim=1):
            done += part.shape[1]
            known = {} if mask is None else {"attention_mask": mask[:, :done]}
            out = model(part, past_key_values=cache, use_cache=True, **known)
            cache = out.past_key_values
            found.append(out.logits)
    return torch.cat(found, dim=1)


CUTS = [[69, 1], [40, 1, 4, 25]]


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("family", DECODERS)
def test_full_mask_in_parts(family: str, cuts: list[int]) -> None:
    exact, stock, ours = twins(family)
    tw.swap(ours, attention=FULL)
    ids = tokens()
    assert_rule(*(in_parts(model, ids, cuts) for model in (ours, stock, exact)))


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_window_in_parts_is_the_window_in_one(cuts: list[int], padded: bool) -> None:
    exact, stock, ours = twins("llama")
    tw.swap(ours, attention=WINDOW())
    ids = tokens()
    mask = padding(ids, left=21 if padded else 0)
    whole = [logits(model, ids, attention_mask=visible(mask)) for model in (stock, exact)]
    parts = in_parts(ours, ids, cuts, mask=mask if padded else None)
    assert_rule(*(out[mask.bool()] for out in (parts, *whole)))


@pytest.mark.parametrize("builder", ["lambda", "square", "model's own window"])
def test_other_builders_in_parts(builder: str) -> None:
    """A function of both lengths, one of one length, and a window of the model's whose cache drops keys."""
    family = "mistral" if builder == "model's own window" else "llama"
    exact, stock, ours = twins(family)
    specs = {
        "lambda": BlockSparse(
            lambda q_len, kv_len: BlockMask.sliding_window(q_len, 10, sink=3, kv_len=kv_len, block_size=16)
        ),
        "square": BlockSparse(lambda n: BlockMask.sliding_window(n, 10, sink=3, block_size=16)),
        "model's own window": WINDOW(),
    }
    tw.swap(ours, attention=specs[builder])
    ids = tokens()
    seen = window(70, 70)
    if family == "mistral":  # the sink leaves the model's window
        seen &= torch.arange(70) > torch.arange(70)[:, None] - 20
    whole = [logits(model, ids, attention_mask=seen.expand(2, 1, -1, -1)) for model in (stock, exact)]
    for cuts in CUTS:
        assert_rule(in_parts(ours, ids, cuts), *whole)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(family: str, cache: str) -> None:
    _, stock, ours = twins(family)
    tw.swap(ours, attention=FULL)
    ids = tokens()
    options = {"attention_mask": padding(ids, left=9), "max_new_tokens": 8, "do_sample": False}
    expected = stock.generate(ids, **options)
    assert torch.equal(ours.generate(ids, cache_implementation=cache, **options), expected)


def test_generate_with_a_window_and_beams() -> None:
    """Every step as a forward pass over all of it."""
    model = tiny("llama")
    tw.swap(model, attention=WINDOW())
    ids = tokens()
    for cache in ("dynamic", "static"):
        found = model.generate(
            ids, max_new_tokens=8, do_sample=False, cache_implementation=cache, min_length=78
        )
        likeliest = logits(model, found[:, :-1])[:, 69:].argmax(-1)
        assert torch.equal(found[:, 70:], likeliest)
    assert model.generate(ids, max_new_tokens=4, num_beams=2, do_sample=False).shape[0] == 2


def test_static_cache_in_parts() -> None:
    from transformers import StaticCache

    exact, stock, ours = twins("llama")
    tw.swap(ours, attention=WINDOW())
    ids = tokens()
    mask = visible(torch.ones_like(ids))
    whole = [logits(model, ids, attention_mask=mask) for model in (stock, exact)]
    cache = StaticCache(config=ours.config, max_cache_len=100)
    assert_rule(in_parts(ours, ids, [40, 1, 1, 28], cache), *whole)


def test_dense_decode() -> None:
    """Sparse prefill, then queries that see everything."""
    model = tiny("llama")
    tw.swap(model, attention=BlockSparse(BlockMask.sliding_window, window=10, block_size=16, decode="dense"))
    ids = tokens()
    q, k = torch.arange(70)[:, None], torch.arange(70)
    seen = (k <= q) & ((k > q - 10) | (q >= 60))
    parts = in_parts(model, ids, [60, 1, 9])
    tw.unswap(model)
    expected = logits(model, ids, attention_mask=seen.expand(2, 1, -1, -1))
    torch.testing.assert_close(parts, expected, rtol=1e-4, atol=1e-4)


# ---- masks from elsewhere ----


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_elements(kind: str) -> None:
    exact, stock, ours = twins("llama")
    tw.swap(ours, attention=FULL)
    ids = tokens()
    seen = (torch.rand(2, 1, 70, 70, generator=torch.Generator().manual_seed(0)) < 0.3).tril()
    seen |= torch.eye(70, dtype=torch.bool)
    lowest = torch.finfo(torch.float32).min
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, lowest)
    found = [logits(model, ids, attention_mask=mask) for model in (ours, stock)]
    assert_rule(*found, logits(exact, ids, attention_mask=seen))


def packed_causal(q_len: int, documents: Tensor) -> Any:
    """The mask function of packed sequences, as this transformers makes it."""
    from transformers import masking_utils as utils

    if not hasattr(utils, "packed_sequence_compatibility_function"):
        return utils.and_masks(utils.causal_mask_function, utils.packed_sequence_mask_function(documents))
    positions = torch.arange(q_len).expand(2, -1)
    return utils.packed_sequence_compatibility_function(utils.causal_mask_function, positions, documents)


def mask_functions() -> dict[str, tuple[Any, bool]]:
    """Functions of transformers' kind that are no plain pattern, and whether they need vmap."""
    from transformers import masking_utils as utils

    images = torch.full((2, 70), -1)
    images[0, 10:20], images[1, 40:55] = 0, 3
    chunked = utils.chunked_causal_mask_function(24, torch.tensor([0, 5]))
    prefix = utils.or_masks(utils.causal_mask_function, lambda b, h, q, k: (q < 20) & (k < 20))
    if hasattr(utils, "blockwise_overlay"):
        seen_whole = utils.blockwise_overlay(images)
    else:  # transformers before 5.5
        seen_whole = lambda b, h, q, k: (images[b, q] >= 0) & (images[b, q] == images[b, k])  # noqa: E731
    return {
        "prefix": (prefix, True),
        "chunks": (chunked, False),
        "images": (utils.or_masks(utils.causal_mask_function, seen_whole), False),
        "near, both ways": (utils.sliding_window_bidirectional_mask_function(9), False),
        "window and chunks": (utils.and_masks(utils.sliding_window_causal_mask_function(30), chunked), False),
    }


@pytest.mark.parametrize("name", ["prefix", "chunks", "images", "near, both ways", "window and chunks"])
@pytest.mark.parametrize("offset", [0, 30])
def test_other_mask_functions(name: str, offset: int) -> None:
    """What is no plain pattern is evaluated on the blocks that the specification keeps."""
    from tilewright.swapping.model_mask import ModelMask

    function, use_vmap = mask_functions()[name]
    whole = ModelMask(2, 70, 70, mask_function=function, use_vmap=use_vmap)
    mask = ModelMask(2, 70 - offset, 70, offset, 0, function, None, use_vmap)
    seen = mask.elements().expand(2, -1, -1, -1)
    assert torch.equal(seen, whole.elements()[:, :, offset:])
    assert torch.equal(mask.blocks(FULL).to_mask().expand_as(seen), seen)
    assert torch.equal(mask.blocks(WINDOW()).to_mask().expand_as(seen), seen & window(70 - offset, 70))


@given(
    q_len=st.integers(1, 90),
    past=st.sampled_from([0, 0, 1, 16, 37, 64]),
    room=st.sampled_from([0, 0, 25]),
    dropped=st.sampled_from([0, 0, 10]),
    pattern=st.sampled_from(["causal", "window", "packed", "bidirectional"]),
    padding=st.sampled_from(["none", "left", "right", "holes"]),
    builder=st.sampled_from(["full", "window", "square", "heads"]),
    blocks=st.sampled_from([16, 32, (16, 48)]),
    seed=st.integers(0, 9),
)
def test_blocks_and_rows_are_the_elements(
    q_len: int, past: int, room: int, dropped: int, pattern: str, padding: str, builder: str, blocks: Any,
    seed: int,
) -> None:  # fmt: skip
    """Any pattern, cache, padding and builder: the mask of blocks shows what the elements of all show."""
    from transformers import masking_utils as utils

    from tilewright.swapping.model_mask import ModelMask

    generator = torch.Generator().manual_seed(seed)
    if pattern in ("packed", "bidirectional"):
        past = room = dropped = 0
    dropped = min(dropped, past)
    length = past + q_len
    starts = (torch.rand(2, q_len, generator=generator) < 0.1).cumsum(1)
    function = {
        "causal": utils.causal_mask_function,
        "window": utils.sliding_window_causal_mask_function(30),
        "packed": packed_causal(q_len, starts),
        "bidirectional": utils.bidirectional_mask_function,
    }[pattern]
    given = {
        "none": None,
        "left": torch.arange(length).expand(2, -1) >= torch.tensor([[length // 3], [0]]),
        "right": torch.arange(length).expand(2, -1) < torch.tensor([[length - length // 4], [length]]),
        "holes": torch.rand(2, length, generator=generator) < 0.7,
    }[padding]
    mask = ModelMask(2, q_len, length - dropped + room, past, dropped, function, given)

    def two_heads(q_len: int, kv_len: int) -> BlockMask:
        windows = [window(q_len, kv_len), window(q_len, kv_len) & (torch.arange(kv_len) % 3 != 0)]
        return from_elements(torch.stack(windows)[None], blocks)

    spec, shown = {
        "full": (BlockSparse.full(blocks), torch.ones(q_len, length).bool()),
        "window": (WINDOW(block_size=blocks), window(q_len, length)),
        "square": (
            BlockSparse(lambda n: BlockMask.sliding_window(n, 10, sink=3, block_size=blocks)),
            window(q_len, length),
        ),
        "heads": (
            BlockSparse(two_heads),
            torch.stack([window(q_len, length), window(q_len, length) & (torch.arange(length) % 3 != 0)]),
        ),
    }[builder]
    expected = (shown[..., dropped:] & mask.elements()).expand(2, 2, -1, -1)
    assert mask.kv_len == length - dropped
    found = mask.blocks(spec)
    assert torch.equal(found.to_mask().expand_as(expected), expected)
    assert torch.equal(mask.rows(spec).expand_as(expected), expected)
    found.validate()


def first_half(q: Tensor, k: Tensor, *, block_size: int = 16, causal: bool = True) -> BlockMask:
    """An estimator: the blocks of keys that are closest to the first query, and the query's own."""
    groups = q.shape[1] // k.shape[1]
    scores = q[:, ::groups, :1] @ k.mT
    blocks = -(-k.shape[2] // block_size)
    padded = torch.nn.functional.pad(scores, (0, blocks * block_size - k.shape[2]), value=-1e9)
    best = padded.unflatten(-1, (blocks, block_size)).amax(-1)
    kept = (best >= best.median(-1, keepdim=True).values).expand(-1, -1, blocks, -1)
    kept = kept | torch.eye(blocks, dtype=torch.bool)
    return BlockMask.from_dense(kept.contiguous(), block_size, q.shape[2], k.shape[2])


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_estimators(family: str) -> None:
    model = tiny(family)
    report = tw.swap(model, attention=BlockSparse(first_half), verify=tokens())
    assert report.swapped
    ids = tokens()
    mask = padding(ids, left=9 if family == "llama" else 0, right=9)
    sparse = logits(model, ids, attention_mask=mask)
    assert sparse.isfinite().all()
    stock = copy.deepcopy(model)
    tw.unswap(stock)
    assert not torch.allclose(logits(stock, ids, attention_mask=mask), sparse, atol=1e-3), "it was used"
    model(ids)[0].sum().backward()
    if family == "llama":  # its decode steps see everything
        tw.unswap(model)
        tw.swap(model, attention=BlockSparse(first_half, block_size=128))
        parts = in_parts(model, ids, [60, 1, 9])
        torch.testing.assert_close(parts, in_parts(stock, ids, [60, 1, 9]), rtol=1e-4, atol=1e-4)


PERMUTED = functools.partial(BlockSparse, permuted_block_sparse_attention, block_size=16, segment_size=32)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_permuted_attention_with_all_blocks_is_the_stock_model(family: str) -> None:
    model = tiny(family)
    stock, ids = copy.deepcopy(model), tokens(3)
    tw.swap(model, attention=PERMUTED(threshold=1.0), verify=ids)
    for mask in (torch.ones_like(ids), padding(ids, left=9), padding(ids, left=20, right=25)):
        shown = mask.bool()
        found, expected = (logits(m, ids, attention_mask=mask)[shown] for m in (model, stock))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(in_parts(model, ids, [50, 1, 18, 1]), logits(stock, ids), rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": padding(ids, left=9)}
    assert torch.equal(model.generate(ids, **options), stock.generate(ids, **options))
    for net in (model, stock):
        net(ids, labels=ids, attention_mask=padding(ids, left=9)).loss.backward()
    for (name, a), b in zip(model.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_permuted_attention_leaves_blocks_out() -> None:
    """A row's padding does not change what its tokens get; decode steps see everything."""
    model, ids = tiny("llama"), tokens(2, 200)
    stock = copy.deepcopy(model)
    tw.swap(model, attention=PERMUTED(threshold=0.2), verify=ids)
    sparse = logits(model, ids)
    assert not torch.allclose(sparse, logits(stock, ids), atol=1e-3)
    padded = torch.nn.functional.pad(ids, (7, 5), value=3)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (7, 5))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = logits(model, padded, attention_mask=mask, position_ids=positions)[:, 7:-5]
    torch.testing.assert_close(found, sparse, rtol=1e-4, atol=1e-4)
    tw.unswap(model)
    tw.swap(model, attention=BlockSparse(permuted_block_sparse_attention, block_size=128))
    torch.testing.assert_close(
        in_parts(model, ids[:, :70], [60, 1, 9]), logits(stock, ids[:, :70]), rtol=1e-4, atol=1e-4
    )


def test_what_permuted_attention_is_not_for() -> None:
    ids = tokens()
    for family, message in (("mistral", "a sliding window"), ("gemma2", "softcap")):
        model = tiny(family)
        tw.swap(model, attention=PERMUTED())
        with pytest.raises(NotImplementedError, match=f"{message} is not supported with permuted_block"):
            model(ids)
    model = tiny("llama")
    tw.swap(model, attention=PERMUTED())
    with pytest.raises(NotImplementedError, match=r"hides tokens between others in row 0.*pad at the ends"):
        model(ids, attention_mask=padding(ids, holes=9))
    with pytest.raises(NotImplementedError, match="a mask of elements is not supported with permuted"):
        model(ids, attention_mask=torch.ones(1, 1, 70, 70, dtype=torch.bool))
    packed = torch.cat([torch.arange(30), torch.arange(40)])[None].expand(2, -1)
    with pytest.raises(NotImplementedError, match="packed sequences is not supported"):
        model(ids, position_ids=packed, use_cache=False)
    report = tw.swap(tiny("bert"), attention=PERMUTED())
    assert {entry.why for entry in report.skipped} == {
        "it is not causal, and permuted_block_sparse_attention is for causal layers"
    }


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"decode": "sparse"}, ValueError, "decode must be left out"),
        ({"takes": "tensors"}, ValueError, "takes must be left out"),
        ({"causal": False}, TypeError, "causal is the model's to say"),
        ({"threshold": 2.0}, ValueError, "threshold"),
        ({"segment_size": 100}, ValueError, "segment_size must be a multiple of block_size = 16, got 100"),
        ({"treshold": 0.5}, TypeError, "has no argument 'treshold'"),
    ],
)
def test_bad_options_of_permuted_attention(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PERMUTED(**options)


def test_a_mask_of_one_length() -> None:
    model = tiny("vit")
    stock = copy.deepcopy(model)
    whole = BlockMask.from_dense(torch.ones(5, 5, dtype=torch.bool), 16, 65, 65)
    tw.swap(model, attention=BlockSparse(whole))
    pixels = inputs_of("vit")["pixel_values"]
    torch.testing.assert_close(logits(model, pixels), logits(stock, pixels), rtol=1e-4, atol=1e-4)
    other = BlockSparse(BlockMask.causal(64, block_size=16))
    tw.unswap(model)
    tw.swap(model, attention=other)
    with pytest.raises(ValueError, match=r"a mask of 64 queries and 64 keys.*came with 65 and 65"):
        logits(model, pixels)


# ---- ways to run it ----


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    plain, checkpointed = tiny("llama"), tiny("llama")
    ids = tokens()
    for model in (plain, checkpointed):
        tw.swap(model, attention=WINDOW())
        model.train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for model in (plain, checkpointed):
        model(ids, labels=ids, attention_mask=padding(ids, left=5), use_cache=False).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_copies_and_pickles_stay_swapped() -> None:
    model = tiny("llama")
    ids = tokens()
    dense = logits(model, ids)
    tw.swap(model, attention=WINDOW())
    sparse = logits(model, ids)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(logits(twin, ids), sparse)
        assert tw.unswap(twin) == 2
        assert torch.equal(logits(twin, ids), dense)
    assert torch.equal(logits(model, ids), sparse)


def test_compiled_around_the_kernels() -> None:
    model = tiny("llama")
    tw.swap(model, attention=WINDOW())
    ids = tokens()
    mask = padding(ids, left=9)
    expected = logits(model, ids, attention_mask=mask)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, ids, attention_mask=mask), expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
