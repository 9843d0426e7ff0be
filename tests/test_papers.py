"""Published methods whose core is one of the ops here, each at a small size against its formula."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

import tilewright as tw
from backends import Backend
from reference import selective_scan as scan_reference
from tilewright.attention import BlockMask, block_sparse_attention
from tilewright.scan import causal_conv1d_update, selective_scan, selective_state_update, ssd_chunk_scan


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_a_state_space_without_decay_is_linear_attention() -> None:
    """Understanding the Differences in Foundation Models: with a = 1 the scan is linear attention."""
    batch, length, heads, width, states = 2, 150, 2, 5, 7
    v, k, q = normal(batch, length, heads, width), *(
        normal(batch, length, heads, states, seed=s) for s in (1, 2)
    )  # fmt: skip
    ones = torch.ones(batch, length, heads, dtype=torch.float64)
    y = ssd_chunk_scan(v, ones, torch.zeros(heads, dtype=torch.float64), k, q, chunk_size=64)
    scores = torch.einsum("bihn,bjhn->bhij", q, k).tril()
    torch.testing.assert_close(y, torch.einsum("bhij,bjhp->bihp", scores, v))


def test_a_selective_scan_is_a_masked_matrix() -> None:
    """The same paper: y = M u, where M[i, j] = C_i exp(A (dt_j+1 + ... + dt_i)) dt_j B_j for j <= i."""
    batch, dim, length, states = 2, 3, 40, 4
    u, dt = normal(batch, dim, length), normal(batch, dim, length, seed=1).sigmoid()
    A = -normal(dim, states, seed=2).exp()
    B, C = normal(batch, states, length, seed=3), normal(batch, states, length, seed=4)
    passed = dt.cumsum(-1)
    spans = (passed[..., :, None] - passed[..., None, :]).tril()
    decays = torch.exp(A[:, :, None, None] * spans[:, :, None])
    M = torch.einsum("bni,bdnij,bdj,bnj->bdij", C, decays, dt, B).tril()
    torch.testing.assert_close(selective_scan(u, dt, A, B, C), (M @ u[..., None])[..., 0])


def test_four_directions_of_two_branches() -> None:
    """Mamba-FSCIL: two 2-D selective scans over a tiny map, their class-sensitive losses on B, C and dt."""
    dim, states, side = 6, 256, 2
    length = side * side
    across = torch.arange(length).view(side, side)
    orders = torch.stack([order for o in (across, across.T) for order in (o.flatten(), o.flatten().flip(0))])
    x = normal(1, dim, length).expand(4, -1, -1)
    leaves = {}

    def branch(seed: int, of: str) -> list[Tensor]:
        dt, B, C = (
            normal(4, rows, length, seed=seed + i).requires_grad_()
            for i, rows in enumerate((dim, states, states))
        )
        A = -normal(dim, states, seed=seed + 3).exp()
        leaves[of] = [dt, B, C]
        return [dt.sigmoid(), A, B, C]

    base, new = branch(10, "base"), branch(20, "new")
    frozen = selective_scan(x, *(t.detach() for t in base), order=orders)
    out = frozen + selective_scan(x, *new, order=orders)
    expected = sum(scan_reference.selective_scan(x, *b, order=orders)[0] for b in (base, new))
    torch.testing.assert_close(out, expected)

    loss = out.square().mean() + sum(t.mean(-1).square().sum() for t in new[2:]) + new[0].mean()
    exact = expected.square().mean() + sum(t.mean(-1).square().sum() for t in new[2:]) + new[0].mean()
    for ours, theirs in zip(
        torch.autograd.grad(loss, leaves["new"], retain_graph=True),
        torch.autograd.grad(exact, leaves["new"]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(frozen, selective_scan(x, *(t.detach() for t in base), order=orders))


def test_rows_that_exit_early_leave_their_states(backend: Backend) -> None:
    """DYNAMAX: a batch in which rows exit at random steps; those that stay are bitwise as alone."""
    rows, heads, dim, states, width = 8, 2, 4, 16, 4
    f32, device = torch.float32, backend.device
    A = -normal(heads, 1, 1, dtype=f32).exp().expand(heads, dim, states).to(device)
    weight = normal(heads * dim, width, dtype=f32).to(device)
    exits = torch.tensor([0, 1, 1, 2, 3, 5, 5, 5])
    conv = torch.zeros(rows, heads * dim, width - 1, device=device)
    ssm = torch.zeros(rows, heads, dim, states, device=device)

    def step(t: int, conv: Tensor, ssm: Tensor, chosen: list[int], slots: Tensor | None) -> Tensor:
        x = normal(rows, heads * dim, seed=t, dtype=f32)[chosen].to(device)
        dt = normal(rows, heads, 1, seed=100 + t, dtype=f32).exp().expand(-1, -1, dim)[chosen].to(device)
        B, C = (normal(rows, states, seed=s + t, dtype=f32)[chosen].to(device) for s in (200, 300))
        x = causal_conv1d_update(x, conv, weight, activation="silu", conv_state_indices=slots)
        x = x.view(len(chosen), heads, dim)
        return selective_state_update(ssm, x, dt, A, B, C, state_batch_indices=slots)

    alone = [(conv[:1].clone(), ssm[:1].clone()) for _ in range(rows)]
    for t in range(5):
        stays = exits > t
        slots = torch.where(stays, torch.arange(rows), -1).to(device)
        out = step(t, conv, ssm, list(range(rows)), slots)
        for row in range(rows):
            if stays[row]:
                assert torch.equal(step(t, *alone[row], [row], None)[0], out[row])
            else:
                assert not out[row].any()
            assert torch.equal(conv[row], alone[row][0][0])
            assert torch.equal(ssm[row], alone[row][1][0])


def test_attention_inside_blocks_of_four(backend: Backend) -> None:
    """Block Transformer: causal segments in one tile are as many small attentions, gradients too."""
    q, k, v, grad = (
        normal(1, 2, 70, 16, seed=s, dtype=torch.float32).to(backend.device).requires_grad_()
        for s in range(4)
    )
    mask = BlockMask.block_diagonal(70, 4, causal=True, block_size=32, device=backend.device)
    out = block_sparse_attention(q, k, v, mask)
    pieces = [
        F.scaled_dot_product_attention(*(t[:, :, a : a + 4] for t in (q, k, v)), is_causal=True)
        for a in range(0, 70, 4)
    ]
    expected = torch.cat(pieces, 2)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_parts_of_any_number_and_size() -> None:
    """PartCrafter: attention inside 1, 3 and 8 ragged parts is that of each part."""
    q, k, v = (normal(1, 2, 90, 16, seed=s) for s in range(3))
    for ends in ([0, 90], [0, 20, 21, 90], [0, 5, 10, 30, 31, 33, 64, 80, 90]):
        out = block_sparse_attention(q, k, v, BlockMask.document(ends, block_size=32))
        parts = [
            F.scaled_dot_product_attention(*(t[:, :, a:b] for t in (q, k, v)))
            for a, b in itertools.pairwise(ends)
        ]
        torch.testing.assert_close(out, torch.cat(parts, 2))


def test_a_window_token_by_token() -> None:
    """Continual transformers: one query at a time over its last keys gives what one pass gives."""
    q, k, v = (normal(1, 2, 30, 16, seed=s) for s in range(3))
    whole = block_sparse_attention(q, k, v, BlockMask.sliding_window(30, 9, block_size=16))
    for t in range(30):
        mask = BlockMask.sliding_window(1, 9, kv_len=t + 1, block_size=16)
        one = block_sparse_attention(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], mask)
        torch.testing.assert_close(one[:, :, 0], whole[:, :, t])


def test_lion_moves_by_its_learning_rate(backend: Backend) -> None:
    """Lion: without decay each step is -lr, 0 or lr, by the sign of the interpolated momentum to one code."""
    lr, betas, numel = 2.0**-10, (0.9, 0.99), 5000
    p = torch.nn.Parameter(torch.zeros(numel, device=backend.device))
    optimizer = tw.optim.Lion8bit([p], lr=lr, betas=betas)
    exact = torch.zeros(numel, dtype=torch.float64)
    for t in range(4):
        p.grad = normal(numel, seed=t, dtype=torch.float32).to(backend.device)
        before, grad = p.detach().cpu().clone(), p.grad.cpu().double()
        interpolated = betas[0] * exact + (1 - betas[0]) * grad
        optimizer.step()
        moved = (p.detach().cpu() - before).double()
        assert set(moved.unique().tolist()) <= {-lr, 0.0, lr}
        state = optimizer.state[p]
        flat = tw.optim.dequantize_blockwise(state["state1"], absmax=state["absmax1"], code=state["qmap1"])
        exact, rounded = betas[1] * exact + (1 - betas[1]) * grad, flat.cpu().double()
        # 0.0141 is the widest gap between codes, a share of the block's largest.
        codes = 0.0141 * state["absmax1"].cpu().double().repeat_interleave(256)[:numel]
        assert bool(((rounded - exact).abs() <= codes).all())
        differs = moved != -lr * interpolated.sign()
        assert bool((interpolated.abs() <= codes)[differs].all())
        exact = rounded
    bytes_held = sum(v.numel() * v.element_size() for k, v in state.items() if k in ("state1", "absmax1"))
    assert bytes_held <= 1.02 * numel
