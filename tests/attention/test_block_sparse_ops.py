"""Block-sparse attention inside torch: registered ops, compile, autocast, checkpoints, wrong arguments."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_cases import lists_of, make, random_mask
from torch import Tensor

from tilewright.attention import BlockMask, block_sparse_attention

ops = torch.ops.tilewright


def tensors_of(mask: BlockMask) -> list[Tensor | None]:
    return [
        mask.q2k_counts, mask.q2k_indices, mask.q2k_bits, mask.k2q_counts, mask.k2q_indices, mask.k2q_bits,
        mask.tables,
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(full: bool, dtype: torch.dtype) -> None:
    q, k, v = (t.to(dtype) for t in make(2, 4, 2, 40, 50, 16, 8))
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    visible = torch.ones(1, 1, 40, 50).bool() if full else random_mask(2, 4, 40, 50, 16, 32)
    inputs = (q, k, v, *tensors_of(lists_of(visible, 16, 32)), None, None, 16, 32, 0.3, 0.0, not full)
    torch.library.opcheck(ops.block_sparse_fwd.default, inputs)
    out, lse = ops.block_sparse_fwd(*inputs)
    for dlse in (None, torch.ones_like(lse)):
        torch.library.opcheck(ops.block_sparse_bwd.default, (torch.ones_like(out), dlse, out, lse, *inputs))


def test_opcheck_key_ranges() -> None:
    positions = torch.tensor([0, 3, 9])
    torch.library.opcheck(ops.key_ranges.default, (positions, positions, 9, 9, True))
    key_from, key_to = ops.key_ranges(positions, torch.tensor([0, 4, 5]), 9, 5, True)
    assert key_from.tolist() == [0, 0, 0, 4, 4, 4, 4, 4, 4]
    assert key_to.tolist() == [2, 3, 4, 4, 4, 4, 4, 4, 5]


def test_compiled() -> None:
    mask = lists_of(random_mask(1, 1, 40, 50, 16, 16), 16, 16)
    positions = torch.tensor([0, 10, 40]), torch.tensor([0, 30, 50])

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = block_sparse_attention(q, k, v, mask, causal=True, return_lse=True)
        packed = block_sparse_attention(q, k, v, mask, cu_seqlens_q=positions[0], cu_seqlens_k=positions[1])
        return (out * 2 + packed).sum() + lse.exp().sum()

    inputs = [t.float().requires_grad_() for t in make(1, 2, 1, 40, 50, 16, 16)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(loss(*inputs), inputs),
        torch.autograd.grad(compiled(*inputs), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_compiled_with_masks_as_arguments() -> None:
    """One compiled function for any mask: lists and tables are inputs of the graph."""
    compiled = torch.compile(block_sparse_attention, fullgraph=True, backend="aot_eager")
    q, k, v = (t.float() for t in make(1, 2, 1, 40, 50, 16, 16))
    for seed in (0, 1):
        mask = lists_of(random_mask(1, 2, 40, 50, 16, 16, seed=seed), 16, 16)
        assert torch.equal(compiled(q, k, v, mask), block_sparse_attention(q, k, v, mask))


def test_autocast() -> None:
    """As scaled_dot_product_attention: its dtype, whatever comes; float64 stays."""
    q, k, v = (t.float() for t in make(1, 2, 1, 20, 20, 16, 16))
    mask = lists_of(torch.ones(1, 1, 20, 20, dtype=torch.bool), 16, 16)
    expected = block_sparse_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(block_sparse_attention(q, k.bfloat16(), v, mask), expected)
        assert block_sparse_attention(q.double(), k.double(), v.double(), mask).dtype == torch.float64
    leaf = q.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block_sparse_attention(leaf, k, v, mask)
    assert torch.autograd.grad(out.float().sum(), leaf)[0].dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed(use_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    inputs = [t.float().requires_grad_() for t in make(1, 2, 1, 40, 50, 16, 16)]
    mask = lists_of(random_mask(1, 1, 40, 50, 16, 16), 16, 16)
    block_sparse_attention(*inputs, mask).sum().backward()
    plain = [t.grad.clone() for t in inputs]
    for t in inputs:
        t.grad = None
    out = checkpoint(lambda *t: block_sparse_attention(*t, mask), *inputs, use_reentrant=use_reentrant)
    out.sum().backward()
    for t, expected in zip(inputs, plain, strict=True):
        assert torch.equal(t.grad, expected)


def test_gradients_are_made_where_asked_for() -> None:
    q, k, v = (t.float() for t in make(1, 1, 1, 20, 20, 8, 8))
    mask = lists_of(torch.ones(1, 1, 20, 20, dtype=torch.bool), 16, 16)
    q.requires_grad_()
    _, lse = block_sparse_attention(q, k, v, mask, return_lse=True)
    assert lse.requires_grad
    (only_lse,) = torch.autograd.grad(lse.sum(), q)
    expected = torch.logsumexp(q @ k.mT / 8**0.5, -1)
    torch.testing.assert_close(only_lse, torch.autograd.grad(expected.sum(), q)[0])


def test_no_second_derivative() -> None:
    q, k, v = (t.requires_grad_() for t in make(1, 1, 1, 20, 20, 8, 8))
    out = block_sparse_attention(q, k, v, lists_of(torch.ones(1, 1, 20, 20, dtype=torch.bool), 16, 16))
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def wrong(**changes: Any) -> dict[str, Any]:
    mask = lists_of(random_mask(1, 2, 40, 50, 16, 16), 16, 16)
    inputs: dict[str, Any] = dict(zip("qkv", (t.float() for t in make(1, 4, 2, 40, 50, 16, 8)), strict=True))
    return inputs | {"block_mask": mask} | changes


FULL = lists_of(torch.ones(1, 2, 40, 50, dtype=torch.bool), 16, 16)
PARTIAL = lists_of(random_mask(1, 2, 40, 50, 16, 16), 16, 16)


def changed(name: str, place: tuple[int, ...], value: int, mask: BlockMask = FULL) -> BlockMask:
    tensor = getattr(mask, name).clone()
    tensor[place] = value
    return replace(mask, **{name: tensor})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
        ({"q": torch.zeros(4, 40, 16)}, ValueError, r"q must have shape \(batch, heads, q_len, head_dim\)"),
        ({"q": torch.zeros(1, 4, 40, 16).int()}, TypeError, "q must have dtype .*got int32"),
        ({"q": torch.zeros(1, 4, 40, 12)}, ValueError, "q must have a head dim that is a .* got 12"),
        ({"q": torch.zeros(1, 4, 40, 264)}, ValueError, "q must have a head dim .* up to 256, got 264"),
        ({"q": torch.zeros(1, 3, 40, 16)}, ValueError, "k has 2 heads, which do not divide the 3 heads of q"),
        ({"k": torch.zeros(1, 2, 50, 16).half()}, TypeError, "k must have the dtype of q, torch.float32"),
        ({"k": torch.zeros(2, 2, 50, 16)}, ValueError, r"k must have shape .*got \(2, 2, 50, 16\)"),
        ({"k": torch.zeros(1, 2, 50, 8)}, ValueError, r"k must have shape .* = \(1, 2, 50, 16\), got"),
        ({"v": torch.zeros(1, 2, 49, 8)}, ValueError, r"v must have shape .* = \(1, 2, 50, 8\), got"),
        ({"v": torch.zeros(1, 2, 50, 8, device="meta")}, ValueError, "v must be on a CPU or CUDA device"),
        ({"block_mask": None}, TypeError, "must be a tilewright.attention.BlockMask, got N"),
        (
            {"block_mask": SimpleNamespace(**vars(FULL))},
            TypeError, "must be a tilewright.attention.BlockMask, got SimpleNamespace",
        ),
        ({"block_mask": replace(FULL, q_len=41)}, ValueError, "block_mask is for 41 queries and 50 keys"),
        (
            {"block_mask": lists_of(torch.ones(1, 3, 40, 50).bool(), 16, 16)},
            ValueError, r"block_mask must have 1 head, or as many as k \(2\) or q \(4\), got 3",
        ),
        (
            {"block_mask": lists_of(torch.ones(2, 1, 40, 50).bool(), 16, 16)},
            ValueError, "block_mask must have batch 1 or that of q, 1, got 2",
        ),
        (
            {"block_mask": changed("q2k_indices", (0, 0, 1, 3), 4)},
            ValueError, "q2k_indices: row 1 names block 4, but there are 4",
        ),
        (
            {"block_mask": changed("k2q_indices", (0, 1, 3, 0), -1)},
            ValueError, "k2q_indices: row 7 names block -1, but there are 3",
        ),
        (
            {"block_mask": changed("q2k_indices", (0, 0, 0, 2), 1)},
            ValueError, "q2k_indices: row 0 must ascend without repeats, got 1 before 1",
        ),
        (
            {"block_mask": changed("q2k_counts", (0, 0, 0), 5)},
            ValueError, "q2k_counts: row 0 has 5 entries, allowed: 0 to 4",
        ),
        (
            {"block_mask": replace(PARTIAL, q2k_bits=PARTIAL.q2k_bits + 99)},
            ValueError, "q2k_bits: row . names table .*but there are",
        ),
        ({"block_mask": replace(FULL, block_size=(32, 16))}, ValueError, r"tables: got shape .0, 16, 1"),
        ({"scale": "1"}, TypeError, "scale must be a number, got str"),
        ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
        ({"softcap": -1.0}, ValueError, "softcap must be 0 .none. or a positive number, got -1.0"),
        ({"softcap": None}, TypeError, "softcap must be a number, got NoneType"),
        ({"cu_seqlens_q": torch.tensor([0, 40])}, ValueError, "go together"),
        (
            {"cu_seqlens_q": torch.tensor([0, 40]), "cu_seqlens_k": torch.tensor([0, 40])},
            ValueError, r"cu_seqlens_k must ascend from 0 to the length 50, got \[0, 40\]",
        ),
        (
            {"cu_seqlens_q": torch.tensor([0, 20, 40]), "cu_seqlens_k": torch.tensor([0, 50])},
            ValueError, "must be of the same length, got 3 and 2",
        ),
        (
            {"cu_seqlens_q": torch.tensor([0.0, 40.0]), "cu_seqlens_k": torch.tensor([0, 50])},
            TypeError, "cu_seqlens_q must have dtype int32, int64, got float32",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        block_sparse_attention(**wrong(**changes))


def test_packing_needs_batch_1() -> None:
    q, k, v = (t.float() for t in make(2, 1, 1, 20, 20, 8, 8))
    positions = torch.tensor([0, 20])
    with pytest.raises(ValueError, match="cu_seqlens_q needs batch 1, got q with batch 2"):
        block_sparse_attention(
            q, k, v, lists_of(torch.ones(1, 1, 20, 20, dtype=torch.bool), 16, 16),
            cu_seqlens_q=positions, cu_seqlens_k=positions,
        )  # fmt: skip
