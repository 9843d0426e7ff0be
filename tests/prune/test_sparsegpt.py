"""SparseGPT: against the optimal brain surgeon's formula in float64, exact counts, dead inputs, bad input."""

import pytest
import torch
from torch import Tensor

import tilewright as tw
from reference import prune_masks, prune_obs
from tilewright.prune import Block, mask, sparsegpt


def layer(
    rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """A weight, and the second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(4 * columns + 8, columns, generator=generator, dtype=torch.float64)
    x = x + 0.5 * x.roll(1, 1) + 0.3 * x[:, :1]
    return w.to(dtype), (x.T @ x / len(x)).to(dtype)


def output_error(w: Tensor, new: Tensor, hessian: Tensor) -> float:
    change = (w - new).double()
    return float(((change @ hessian.double()) * change).sum())


def expected(w: Tensor, h: Tensor, pattern: object, sparsity: float, width: int) -> tuple[Tensor, Tensor]:
    """With panels of `width` columns, which have to divide the weight's."""
    h = prune_obs.damped(h, 0.01)
    w = w.masked_fill(h.diagonal() == 0, 0)
    if isinstance(pattern, str) and ":" in pattern:
        n, m = map(int, pattern.split(":"))
        return prune_obs.remove(w, h, m, lambda part, root: prune_masks.n_of_m((part / root).abs(), n, m))
    rows, columns = (1, 1) if pattern == "element" else pattern.sizes(w.shape)

    def choose(part: Tensor, root: Tensor) -> Tensor:
        worth = prune_masks.unit_scores(part / root, rows, columns, "lp", p=2)
        kept = worth.numel() - round(sparsity * worth.numel())
        return prune_masks.expand(prune_masks.best(worth, kept), rows, columns, part.shape)

    return prune_obs.remove(w, h, width, choose)


@pytest.mark.parametrize(
    "pattern", ["2:4", "1:4", "3:8", "element", Block(4, 4), Block(None, 1), Block(3, 8)], ids=str
)
def test_against_the_formula(backend, pattern: str | Block) -> None:
    w, h = layer(9, 48)
    sparsity = None if isinstance(pattern, str) and ":" in pattern else 0.5
    want, kept = expected(w, h, pattern, 0.5, 16)
    if backend.is_cpu:
        new, found = sparsegpt(w, h, pattern, sparsity, block_size=16)
        assert torch.equal(found, kept)
        assert (new - want).abs().max() < 1e-12 * w.abs().max() * 48
    new, found = sparsegpt(
        w.float().to(backend.device), h.float().to(backend.device), pattern, sparsity, block_size=16
    )
    assert torch.equal(found.cpu(), kept)
    assert (new.cpu() - want).abs().max() < 1e-4
    assert not new[~found].any()


@pytest.mark.parametrize("block_size", [1, 7, 64, 65, 512])
def test_any_panel_and_size(backend, block_size: int) -> None:
    for rows, columns in ((1, 1), (5, 7), (17, 65), (33, 129) if backend.is_cpu else (3, 40)):
        w, h = (x.to(backend.device) for x in layer(rows, columns, dtype=torch.float32))
        new, kept = sparsegpt(w, h, "element", 0.6, block_size)
        assert kept.sum() == prune_masks.kept_units(w.numel(), 0.6)
        assert not new[~kept].any()
        assert new.shape == w.shape
        assert new.dtype == w.dtype
        again = sparsegpt(w, h, "element", 0.6, block_size)
        assert torch.equal(again[0], new)
        assert torch.equal(again[1], kept)


def test_removing_the_first_columns_is_least_squares() -> None:
    # Then the others, all to the right, can make up for them as well as at all possible.
    w, h = layer(6, 20)
    w[:, :5] *= 1e-9
    new, kept = sparsegpt(w, h, Block(None, 1), 0.25, block_size=20, damping=0)
    assert kept[0].tolist() == [False] * 5 + [True] * 15
    best = w[:, 5:] + torch.linalg.solve(h[5:, 5:], h[5:, :5] @ w[:, :5].T).T
    assert torch.allclose(new[:, 5:], best, rtol=1e-12, atol=1e-14)


def test_outputs_change_less_than_by_masks_alone() -> None:
    w, h = layer(32, 64)
    for pattern, sparsity in (("2:4", None), ("element", 0.5), (Block(4, 4), 0.5)):
        new, _ = sparsegpt(w, h, pattern, sparsity)
        by_size = w * mask(w, pattern, sparsity)
        by_wanda = w * mask(w, pattern, sparsity, "wanda", h.diagonal().sqrt())
        assert output_error(w, new, h) < 0.95 * output_error(w, by_wanda, h)
        assert output_error(w, new, h) < 0.95 * output_error(w, by_size, h)


def test_dead_inputs(backend) -> None:
    w, h = layer(8, 32, dtype=torch.float32)
    dead = [0, 3, 4, 5, 31]
    h[dead] = 0
    h[:, dead] = 0
    for pattern, sparsity in (("2:4", None), ("element", 0.5), (Block(2, 2), 0.5)):
        new, kept = sparsegpt(w.to(backend.device), h.to(backend.device), pattern, sparsity, 16)
        assert new.isfinite().all()
        assert not new[:, dead].any()
        assert not new[~kept].any()
        assert kept.sum() == 128
        want, _ = expected(w.double().index_fill(1, torch.tensor(dead), 0), h.double(), pattern, 0.5, 16)
        assert (new.cpu() - want).abs().max() < 1e-4
    new, kept = sparsegpt(w.to(backend.device), torch.zeros(32, 32, device=backend.device), "2:4")
    assert not new.any()
    assert kept.sum() == 128


def test_layouts_and_dtypes(backend) -> None:
    w, h = layer(24, 32, dtype=torch.float32)
    want, kept = sparsegpt(w.to(backend.device), h.to(backend.device), "2:4")
    for view in (w.T.contiguous().T, w.view(24, 2, 4, 4), torch.cat([w, w], 1)[:, :32]):
        before = view.clone()
        new, found = sparsegpt(view.to(backend.device), h.T.to(backend.device), "2:4")
        assert torch.equal(new.flatten(1), want)
        assert torch.equal(found.flatten(1), kept)
        assert new.shape == view.shape
        assert torch.equal(view, before)
    for dtype in (torch.bfloat16, torch.float16):
        new, found = sparsegpt(w.to(dtype).to(backend.device), h.to(backend.device), "2:4")
        wide, kept = sparsegpt(w.to(dtype).float().to(backend.device), h.to(backend.device), "2:4")
        assert new.dtype == dtype
        assert torch.equal(found, kept)
        assert torch.equal(new, wide.to(dtype))


def test_threads_and_seeds_change_nothing() -> None:
    w, h = layer(50, 64, dtype=torch.float32)
    threads = torch.get_num_threads()
    panels = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            panels.append(run_panel(w, h))
    finally:
        torch.set_num_threads(threads)
    for found in panels[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, panels[0], strict=True))
    emulated = []
    for seed in range(3):
        with tw.testing.emulated(seed=seed):
            emulated.append(run_panel(w[:6], h))
    for found in emulated[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, emulated[0], strict=True))


def run_panel(w: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    factor = torch.linalg.cholesky(torch.linalg.inv(h), upper=True).contiguous()
    panel, kept, errors = w.clone(), torch.zeros(w.shape, dtype=torch.bool), torch.empty_like(w)
    torch.ops.tilewright.prune_obs_panel(panel, factor, kept, errors, 2, 4)
    return panel, kept, errors


def test_the_panel_is_an_op(backend) -> None:
    w, h = (x.to(backend.device) for x in layer(5, 16, dtype=torch.float32))
    factor = torch.linalg.cholesky(torch.linalg.inv(h), upper=True).contiguous()
    for n, m in ((0, 0), (2, 4)):
        arguments = w.clone(), factor, torch.ones_like(w, dtype=torch.bool), torch.empty_like(w), n, m
        torch.library.opcheck(torch.ops.tilewright.prune_obs_panel.default, arguments)


def test_a_stale_saved_tensor_is_noticed() -> None:
    w, h = layer(5, 16, dtype=torch.float32)
    factor = torch.linalg.cholesky(torch.linalg.inv(h), upper=True).contiguous()
    panel = w.clone()
    out = (panel * torch.ones_like(panel, requires_grad=True)).sum()
    torch.ops.tilewright.prune_obs_panel(
        panel, factor, torch.ones(w.shape, dtype=torch.bool), w.clone(), 2, 4
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_bad_input() -> None:
    w, h = layer(8, 32, dtype=torch.float32)
    broken = w.clone()
    broken[2, 5] = float("inf")
    cases = [
        (
            (broken, h, "2:4"),
            {"name": "fc1.weight"},
            ValueError,
            r"fc1.weight: holds 1 non-finite values, first at \(2, 5\)",
        ),
        (
            (w, h[:4, :4], "2:4"),
            {},
            ValueError,
            r"hessian must have shape \(in, in\) = \(32, 32\), got \(4, 4\)",
        ),
        ((w, h * float("nan"), "2:4"), {}, ValueError, "hessian: holds 1024 non-finite"),
        ((w, -h, "2:4"), {}, ValueError, "hessian: has negative numbers on its diagonal"),
        ((w, torch.ones(32, 32), "2:4"), {"damping": 0}, ValueError, "hessian: is not positive definite"),
        ((w, h, "row", 0.5), {}, ValueError, "at most 512 columns"),
        ((w, h, "3:7"), {}, ValueError, "multiple of 7, got 32 columns"),
        ((w, h, "2:4", 0.7), {}, ValueError, "sparsity: pattern '2:4' removes 0.5, got 0.7"),
        ((w, h, "element"), {}, ValueError, "sparsity is needed"),
        ((w, h, "element", 1.0), {}, ValueError, r"in \[0, 1\), got 1.0"),
        ((w, h, "element", 0.5, 0), {}, ValueError, "block_size must be an int from 1 to 512, got 0"),
        (
            (w, h, "element", 0.5),
            {"damping": -1},
            ValueError,
            r"damping must be a number in \[0, inf\), got -1",
        ),
        ((w.int(), h, "2:4"), {}, TypeError, "weight must have dtype"),
        ((w, "h", "2:4"), {}, TypeError, "hessian must be a tensor, got str"),
    ]
    for arguments, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            sparsegpt(*arguments, **options)


def test_empty() -> None:
    for shape in ((0, 8), (8, 0)):
        new, kept = sparsegpt(torch.empty(shape), torch.eye(shape[1]), "element", 0.5)
        assert new.shape == kept.shape == shape
