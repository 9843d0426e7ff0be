"""flex_attention's names beside torch's own, eager: results, gradients, masks, what is refused."""

from __future__ import annotations

import gc
import inspect
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

import tilewright as tw
from reference import attention as reference
from tilewright.compat.flex_attention import create_block_mask, create_mask, flex_attention

pytestmark = pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile:UserWarning")
HALF = [torch.bfloat16, torch.float16]


def inputs(
    q_len: int = 150, kv_len: int = 150, heads: int = 4, kv_heads: int = 4, dtype: Any = torch.float32,
    batch: int = 2,
) -> list[Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, q_len, 16), (batch, kv_heads, kv_len, 16), (batch, kv_heads, kv_len, 8)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) & (q - k < 40)


def per_head(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q - k) % (h + 2) == b


def some_rows_empty(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) & (q > 20)


def exact(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """torch's own, eager, in float64."""
    out, aux = flex.flex_attention(
        *(t.detach().double() for t in (q, k, v)), return_aux=flex.AuxRequest(lse=True), **options
    )
    return out, aux.lse


def test_signature_is_torchs() -> None:
    theirs, ours = (inspect.signature(f).parameters for f in (flex.flex_attention, flex_attention))
    assert [(p.name, p.kind, p.default) for p in theirs.values()] == [
        (p.name, p.kind, p.default) for p in ours.values()
    ]


@pytest.mark.parametrize("mod", [None, causal, window, per_head, some_rows_empty])
@pytest.mark.parametrize("block_size", [128, (32, 64)], ids=str)
def test_results_and_gradients(mod: Any, block_size: Any) -> None:
    q, k, v = inputs()
    mask = (
        None if mod is None else create_block_mask(mod, 2, 4, 150, 150, device="cpu", BLOCK_SIZE=block_size)
    )
    out, aux = flex_attention(q, k, v, block_mask=mask, return_aux=flex.AuxRequest(lse=True))
    expected, lse = exact(q, k, v, block_mask=mask)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(aux.lse.double(), lse, rtol=1e-5, atol=1e-5)
    assert aux.max_scores is None
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(out, (q, k, v), dout)
    # torch has no backward on a CPU, so its elements, and the formula's gradients.
    seen = create_mask(causal if mod is None else mod, 2, 4, 150, 150, device="cpu") | (mod is None)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    truth = torch.autograd.grad(reference.attention(*wide, seen)[0], wide, dout.double())
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(dtype: torch.dtype) -> None:
    q, k, v = inputs(dtype=dtype)
    mask = create_block_mask(window, None, None, 150, 150, device="cpu")
    truth = exact(q, k, v, block_mask=mask)[0]
    theirs = flex.flex_attention(q.detach(), k.detach(), v.detach(), block_mask=mask)
    out = flex_attention(q, k, v, block_mask=mask)
    assert out.dtype == dtype
    allowed = 2 * (theirs - truth).abs().max() + torch.finfo(dtype).eps
    assert (out - truth).abs().max() <= allowed


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_queries(kv_heads: int) -> None:
    q, k, v = inputs(kv_heads=kv_heads)
    mask = create_block_mask(per_head, 2, 4, 150, 150, device="cpu")
    found = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    torch.testing.assert_close(
        found.double(), exact(q, k, v, block_mask=mask, enable_gqa=True)[0], rtol=1e-5, atol=1e-5
    )


def test_other_lengths_scale_and_a_shared_batch_of_keys() -> None:
    q, k, v = inputs(q_len=70, kv_len=190)
    k, v = k[:1], v[:1]
    mask = create_block_mask(lambda b, h, q, k: q + 120 >= k, 2, None, 70, 190, device="cpu")
    found = flex_attention(q, k, v, block_mask=mask, scale=0.3)
    expected = exact(q, k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1), block_mask=mask, scale=0.3)[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_our_masks_and_the_old_way_to_lse() -> None:
    q, k, v = inputs()
    mask = tw.attention.BlockMask.causal(150)
    theirs = create_block_mask(causal, None, None, 150, 150, device="cpu")
    out, lse = flex_attention(q, k, v, block_mask=mask, return_lse=True)
    again = flex_attention(q, k, v, None, theirs, None, False, False, {"BLOCK_M": 64})
    assert torch.equal(out, again)
    torch.testing.assert_close(lse.double(), exact(q, k, v, block_mask=theirs)[1], rtol=1e-5, atol=1e-5)


def test_masks_are_converted_once_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    module = tw.compat.flex_attention
    calls = []
    convert = tw.attention.BlockMask.from_torch
    monkeypatch.setattr(
        tw.attention.BlockMask, "from_torch", staticmethod(lambda mask: calls.append(1) or convert(mask))
    )
    q, k, v = inputs()
    mask = create_block_mask(causal, None, None, 150, 150, device="cpu")
    for _ in range(3):
        flex_attention(q, k, v, block_mask=mask)
    assert len(calls) == 1
    kept = weakref.ref(module._converted[mask].q2k_counts)
    del mask
    gc.collect()
    assert kept() is None


def test_compiled() -> None:
    q, k, v = inputs(q_len=40, kv_len=40)
    expected = flex_attention(q, k, v, block_mask=tw.attention.BlockMask.causal(40))
    whole = torch.compile(flex_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(q, k, v, block_mask=tw.attention.BlockMask.causal(40)), expected)
    torch.testing.assert_close(whole(q, k, v), flex_attention(q, k, v))
    parts = torch.compile(flex_attention, backend="aot_eager")
    mask = create_block_mask(causal, None, None, 40, 40, device="cpu")
    torch.testing.assert_close(parts(q, k, v, block_mask=mask), expected)
    torch._dynamo.reset()


def test_all_of_torchs_names() -> None:
    from tilewright.compat.flex_attention import AuxRequest, noop_mask

    assert AuxRequest is flex.AuxRequest
    assert noop_mask is flex.noop_mask
    assert all(hasattr(tw.compat.flex_attention, name) for name in flex.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        tw.compat.flex_attention.no_such_name  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'no_such_package'"):
        tw.compat.no_such_package  # noqa: B018


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"score_mod": lambda s, b, h, q, k: s}, NotImplementedError, "score_mod must be None.*softcap="),
        ({"key": torch.zeros(2, 2, 150, 16)}, ValueError, "query has 4 heads and key has 2: with enable_gqa"),
        ({"query": torch.zeros(4, 150, 16)}, ValueError, r"query must have shape .*got \(4, 150, 16\)"),
        ({"value": None}, TypeError, "value must be a tensor, got NoneType"),
        ({"block_mask": torch.ones(150, 150)}, TypeError, "block_mask must be None, torch's .*got Tensor"),
        (
            {"block_mask": create_block_mask(causal, None, None, 128, 128, device="cpu")},
            ValueError, "block_mask is for 128 queries and 128 keys, but q has 150",
        ),
        (
            {"block_mask": create_block_mask(causal, None, None, 150, 150, device="cpu", BLOCK_SIZE=512)},
            ValueError, "block_mask.BLOCK_SIZE must be a multiple of 16 from 16 to 256",
        ),
        ({"return_lse": True, "return_aux": flex.AuxRequest(lse=True)}, ValueError, "do not go together"),
        ({"return_aux": flex.AuxRequest(max_scores=True)}, NotImplementedError, "not ask for max_scores"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = dict(zip(("query", "key", "value"), inputs(), strict=True)) | changes
    with pytest.raises(error, match=message):
        flex_attention(**arguments)
