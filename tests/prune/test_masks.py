"""Masks and scores: against the definitions, at odd sizes, with ties, in any layout, whatever the threads."""

import math
from functools import lru_cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import tilewright as tw
from reference import prune_masks as reference
from tilewright import _C
from tilewright.prune import Block, global_masks, mask, scores

HALVES = [torch.float16, torch.bfloat16]
SIZES = [1, 7, 63, 65, 127, 129]


def dtypes_of(backend) -> list[torch.dtype]:
    return [torch.float32, *HALVES, *([torch.float64] if backend.is_cpu else [])]


def weights(
    rows: int, columns: int, dtype: torch.dtype = torch.float32, ties: bool = False, seed: int = 0
) -> Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((2 * x).round() / 2 if ties else x).to(dtype)


def positive(count: int, seed: int = 1) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) + 0.1


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("n", "m"), [(2, 4), (1, 2), (1, 4), (3, 4), (4, 8), (1, 3), (5, 16), (7, 31), (16, 32)]
)
def test_n_of_m(backend, n: int, m: int, ties: bool) -> None:
    for dtype in dtypes_of(backend):
        for rows, groups in ((1, 1), (3, 5), (7, 33 if backend.is_cpu else 3)):
            w = weights(rows, groups * m, dtype, ties).to(backend.device)
            kept = mask(w, f"{n}:{m}")
            assert kept.dtype == torch.bool
            assert kept.is_contiguous()
            assert torch.equal(kept.cpu(), reference.n_of_m(w.cpu().abs(), n, m))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("scope", ["layer", "row"])
def test_elements(backend, scope: str, ties: bool) -> None:
    sizes = SIZES if backend.is_cpu else [7, 129]
    for dtype in dtypes_of(backend):
        for columns in sizes:
            for sparsity in (0.0, 0.5, 0.83):
                w = weights(5, columns, dtype, ties)
                if scope == "row" and columns == 1:
                    continue
                kept = mask(w.to(backend.device), "element", sparsity, scope=scope).cpu()
                if scope == "row":
                    expected = reference.best_of_rows(w.abs(), reference.kept_units(columns, sparsity))
                else:
                    expected = reference.best(w.abs(), reference.kept_units(w.numel(), sparsity))
                assert torch.equal(kept, expected)


UNITS = [Block(16, 16), Block(8, 32), Block(3, 5), Block(1, 4), Block(40, 1), Block(1, None), Block(None, 1)]
UNITS += [Block(2, None), Block(None, 7), Block(1, 1), Block(None, None), Block(1000, 1000)]


@pytest.mark.parametrize("criterion", ["magnitude", "lp1", "lp2", "lp3", "lpinf", "wanda", "taylor"])
@pytest.mark.parametrize("block", UNITS, ids=str)
def test_unit_scores(backend, block: Block, criterion: str) -> None:
    for dtype in dtypes_of(backend):
        for rows, columns in ((1, 1), (33, 50), (300, 140)) if backend.is_cpu else ((33, 140), (130, 20)):
            if math.prod(block.units((rows, columns))) > 2000:
                continue
            w = weights(rows, columns, dtype)
            name, p = ("lp", float(criterion[2:])) if criterion.startswith("lp") else (criterion, 2)
            g = weights(rows, columns, dtype, seed=2) if name == "taylor" else None
            norm = positive(columns) if name == "wanda" else None
            on = [None if x is None else x.to(backend.device) for x in (w, norm, g)]
            found = scores(on[0], name, on[1], on[2], p, pattern=block).cpu()
            real = torch.float64 if dtype == torch.float64 else torch.float32
            assert found.dtype == real
            if g is not None and block == Block(1, 1):
                assert torch.equal(found, (w.to(real) * g.to(real)).abs())
            sizes = block.sizes(w.shape)
            exact, plain = (
                reference.unit_scores(
                    w.to(t),
                    *sizes,
                    name,
                    None if norm is None else norm.to(t),
                    None if g is None else g.to(t),
                    p,
                )
                for t in (torch.float64, real)
            )
            size = (
                exact
                if g is None
                else reference.unit_scores(w.double().abs(), *sizes, name, None, g.double().abs())
            )
            bound = 2 * (plain - exact).abs().max() + 1e-6 * size.max()
            assert (found - exact).abs().max() <= bound


SCOPES = [(block, "layer") for block in UNITS]
SCOPES += [(block, "row") for block in UNITS if block.units((33, 50))[1] > 1]


@pytest.mark.parametrize(("block", "scope"), SCOPES, ids=str)
def test_units_go_as_a_whole(backend, block: Block, scope: str) -> None:
    w = weights(33, 50).to(backend.device)
    down, across = block.units(w.shape)
    kept = mask(w, block, 0.6, "lp", scope=scope)
    worth = scores(w, "lp", pattern=block).cpu()
    if scope == "row":
        units = reference.best_of_rows(worth, reference.kept_units(across, 0.6))
    else:
        units = reference.best(worth, reference.kept_units(down * across, 0.6))
    assert torch.equal(kept.cpu(), reference.expand(units, *block.sizes(w.shape), w.shape))
    block.check_mask(kept)


def test_named_patterns_are_blocks(backend) -> None:
    w = weights(20, 30).to(backend.device)
    for name, block in (("row", Block(1, None)), ("column", Block(None, 1)), ("element", Block(1, 1))):
        assert torch.equal(mask(w, name, 0.4), mask(w, block, 0.4))
    assert mask(w, "row", 0.4)[:, 0].sum() == 12
    assert mask(w, Block(5, None), 0.5)[:, 0].tolist().count(True) == 10  # two of four heads of five rows


@pytest.mark.parametrize("pattern", ["2:4", "element", "row", Block(4, 4)], ids=str)
def test_layouts(backend, pattern: str | Block) -> None:
    base = weights(48, 96)
    layouts = [base.t(), base[::2, ::3], base[:, :40], base[3:4].expand(20, 96), base[:, :1].expand(48, 24)]
    layouts += [base.view(12, 4, 4, 24), base.view(12, 16, 24).transpose(1, 2)]
    for w in layouts:
        if pattern == "2:4" and math.prod(w.shape[1:]) % 4:
            continue
        sparsity = None if pattern == "2:4" else 0.7
        kept = mask(w.to(backend.device), pattern, sparsity)
        assert kept.shape == w.shape
        assert torch.equal(kept, mask(w.contiguous().to(backend.device), pattern, sparsity))


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
def test_empty(backend, shape: tuple[int, int]) -> None:
    w = torch.empty(shape, device=backend.device)
    for pattern in ("2:4", "element", "row", "column", Block(4, 4)):
        assert mask(w, pattern, None if pattern == "2:4" else 0.5).shape == shape
    assert [m.shape for m in global_masks([w, torch.ones(2, 2, device=backend.device)], "element", 0.5)] == [
        shape,
        (2, 2),
    ]
    assert global_masks([], "element", 0.5) == []


def test_nothing_is_sorted_by_sign(backend) -> None:
    # torch's runtime 2:4 keeps the largest signed values; a large negative weight is worth as much.
    w = torch.tensor([[-5.0, 1.0, 2.0, 3.0], [-4.0, -3.0, -2.0, 1.0]], device=backend.device)
    assert mask(w, "2:4").tolist() == [[True, False, False, True], [True, True, False, False]]
    assert mask(w, "element", 0.5).tolist() == [[True, False, False, True], [True, True, False, False]]


def test_wanda_compares_within_a_row(backend) -> None:
    # Over the whole layer the first row, ten times as large, would keep everything.
    w, norm = weights(8, 64), positive(64)
    w[0] *= 10
    kept = mask(w.to(backend.device), "element", 0.5, "wanda", norm.to(backend.device)).cpu()
    assert kept.sum(1).tolist() == [32] * 8
    assert torch.equal(kept, reference.best_of_rows(w.abs() * norm, 32))
    layer = mask(w.to(backend.device), "element", 0.5, "wanda", norm.to(backend.device), scope="layer").cpu()
    assert torch.equal(layer, reference.best(w.abs() * norm, 256))
    groups = mask(w.to(backend.device), "1:4", None, "wanda", norm.to(backend.device)).cpu()
    assert torch.equal(groups, reference.n_of_m(w.abs() * norm, 1, 4))


def test_taylor(backend) -> None:
    w, g = weights(12, 32), weights(12, 32, seed=3)
    worth = (w * g).abs()
    given = {"criterion": "taylor", "gradient": g.to(backend.device)}
    assert torch.equal(mask(w.to(backend.device), "element", 0.5, **given).cpu(), reference.best(worth, 192))
    assert torch.equal(mask(w.to(backend.device), "3:8", **given).cpu(), reference.n_of_m(worth, 3, 8))
    mixed = mask(w.bfloat16().to(backend.device), "element", 0.5, **given).cpu()
    assert torch.equal(mixed, reference.best((w.bfloat16().float() * g).abs(), 192))


def test_random_is_the_same_everywhere(backend) -> None:
    w = torch.empty(50, 64, device=backend.device)
    found = scores(w, "random", seed=5 << 32 | 7).cpu().flatten()
    for i in (0, 1, 2, 3, 4, 1234, 3199):
        word = reference.philox([i // 4, 0, 0, 0], [7, 5])[i % 4]
        assert found[i].item() == (word >> 8) / 2**24
    assert 0.45 < found.mean() < 0.55
    for pattern in ("element", Block(8, 8), "row"):
        kept = mask(w, pattern, 0.5, "random", seed=3).cpu()
        units = scores(w, "random", seed=3, pattern=pattern).cpu()
        block = Block(1, 1) if pattern == "element" else Block(1, None) if pattern == "row" else pattern
        chosen = reference.best(units, reference.kept_units(units.numel(), 0.5))
        assert torch.equal(kept, reference.expand(chosen, *block.sizes(w.shape), w.shape))
    assert torch.equal(
        mask(w, "2:4", criterion="random", seed=5).cpu(),
        reference.n_of_m(scores(w, "random", seed=5).cpu(), 2, 4),
    )
    torch.manual_seed(0)
    first = mask(w, "element", 0.5, "random")
    assert not torch.equal(first, mask(w, "element", 0.5, "random"))
    torch.manual_seed(0)
    assert torch.equal(first, mask(w, "element", 0.5, "random"))


@pytest.mark.parametrize("ties", [False, True])
def test_global(backend, ties: bool) -> None:
    shapes = [(7, 9), (0, 3), (130, 31), (1, 65)]
    dtypes = [torch.float32, torch.float32, torch.bfloat16, torch.float16]
    ws = [
        weights(*shape, dtype, ties, seed)
        for seed, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    ws[2] = ws[2].t()
    everything = torch.cat([w.abs().flatten().double() for w in ws])
    for sparsity in (0.0, 0.3, 0.9):
        kept = global_masks([w.to(backend.device) for w in ws], "element", sparsity)
        expected = reference.best(everything, reference.kept_units(len(everything), sparsity))
        assert torch.equal(torch.cat([m.flatten() for m in kept]).cpu(), expected)
        assert [m.shape for m in kept] == [w.shape for w in ws]
    named = global_masks({str(i): w.to(backend.device) for i, w in enumerate(ws)}, "element", 0.9)
    assert list(named) == ["0", "1", "2", "3"]
    assert all(torch.equal(a, b) for a, b in zip(named.values(), kept, strict=True))


def test_global_units(backend) -> None:
    ws = [weights(20, 24).to(backend.device), 2 * weights(33, 16, seed=1).to(backend.device)]
    block = Block(8, 8)
    kept = global_masks(ws, block, 0.5, "lp", p=1)
    worth = [scores(w, "lp", p=1, pattern=block).cpu() for w in ws]
    chosen = reference.best(torch.cat([x.flatten() for x in worth]), 9 + 10 - round(9.5)).split([9, 10])
    for m, units, x, w in zip(kept, chosen, worth, ws, strict=True):
        assert torch.equal(m.cpu(), reference.expand(units.view(x.shape), 8, 8, w.shape))
    norms = [positive(24).to(backend.device), positive(16).to(backend.device)]
    by_norm = global_masks(ws, "element", 0.5, "wanda", norms)
    worth = torch.cat([(w.abs() * norm).flatten() for w, norm in zip(ws, norms, strict=True)])
    assert torch.equal(torch.cat([m.flatten() for m in by_norm]).cpu(), reference.best(worth, 504))
    random = global_masks([torch.ones(8, 8, device=backend.device)] * 2, "element", 0.5, "random", seed=1)
    assert not torch.equal(*random)  # each weight has numbers of its own


@pytest.mark.parametrize(
    ("units", "sparsity", "kept"), [(10, 0.25, 8), (10, 0.35, 6), (3, 0.9, 1), (1, 0.99, 1)]
)
def test_how_many_are_kept(units: int, sparsity: float, kept: int) -> None:
    # Halves are rounded to even: 2.5 to 2, 3.5 to 4. One stays.
    assert mask(weights(1, units), "element", sparsity).sum() == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_many_chunks(dtype: torch.dtype) -> None:
    # Equals in several units of work: the first of them all are kept, for any number of threads.
    w = weights(300, 700, dtype, ties=True)
    w[:40] = 0
    threads = torch.get_num_threads()
    try:
        for sparsity in (0.1, 0.33, 0.71, 0.999):
            expected = reference.best(w.abs(), reference.kept_units(w.numel(), sparsity))
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert torch.equal(mask(w, "element", sparsity), expected)
                assert torch.equal(
                    mask(w[:, ::2], "element", sparsity), mask(w[:, ::2].clone(), "element", sparsity)
                )
    finally:
        torch.set_num_threads(threads)


LARGE = ["normal", "ties", "sorted", "zeros", "bf16"]


@lru_cache(maxsize=1)
def large(kind: str) -> tuple[Tensor, Tensor]:
    """More elements than are looked at one by one, and their numbers, best first."""
    x = weights(1030, 1027)
    if kind == "ties":
        x = (8 * x).round()
    if kind == "sorted":  # what the sample brackets lies in one place
        x = x.flatten().sort().values.view_as(x)
    if kind == "zeros":
        x = x.masked_fill(x < 0.7, 0)
    if kind == "bf16":
        x = x.bfloat16().t()
    return x, x.float().abs().flatten().sort(descending=True, stable=True).indices


@pytest.mark.parametrize("level", _C.cpu_levels())
@pytest.mark.parametrize("kind", LARGE)
def test_large_weights(kind: str, level: str) -> None:
    w, order = large(kind)
    before, threads = _C.cpu_level(), torch.get_num_threads()
    try:
        _C.set_cpu_level(level)
        for sparsity in (0.0, 1e-5, 0.5, 0.9, 0.99999):
            torch.set_num_threads(1 if sparsity == 0.5 else 3)
            kept = order[: reference.kept_units(w.numel(), sparsity)]
            expected = torch.zeros(w.numel(), dtype=torch.bool).index_fill(0, kept, True)
            assert torch.equal(mask(w, "element", sparsity).flatten(), expected)
        broken = w.clone()
        broken[700, 3] = float("nan")
        with pytest.raises(ValueError, match="weight: holds 1 non-finite"):
            mask(broken, "element", 0.5)
    finally:
        _C.set_cpu_level(before)
        torch.set_num_threads(threads)


def test_two_large_weights() -> None:
    w, _ = large("normal")
    expected = reference.best(torch.stack([w.abs(), w.abs() / 2]), w.numel())
    assert torch.equal(torch.stack(global_masks([w, w / 2], "element", 0.5)), expected)


def test_threads_change_nothing() -> None:
    w, norm = weights(257, 520), positive(520)
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            units = [scores(w, "wanda", norm, pattern=b) for b in UNITS]
            masks = [mask(w, "2:4"), mask(w, "element", 0.5, scope="row"), mask(w, Block(3, 7), 0.5)]
            found.append([*units, *masks, mask(w, "element", 0.5, "random", seed=1)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_emulator_seeds_change_nothing() -> None:
    w = weights(33, 200, ties=True)
    found = []
    for seed in range(3):
        with tw.testing.emulated(seed=seed):
            found.append([mask(w, "2:4"), mask(w, "element", 0.4), mask(w, "element", 0.4, scope="row")])
            found[-1] += [scores(w, "lp", pattern=b) for b in (Block(16, 16), Block(1, None), Block(None, 1))]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_torch_prune_keeps_the_same() -> None:
    from torch.nn.utils import prune

    layer = torch.nn.Linear(40, 30)
    w = layer.weight.detach().clone()
    prune.l1_unstructured(layer, "weight", 0.37)
    assert torch.equal(layer.weight_mask.bool(), mask(w, "element", 0.37))
    for axis, pattern in ((0, "row"), (1, "column")):
        layer = torch.nn.Linear(40, 30)
        w = layer.weight.detach().clone()
        prune.ln_structured(layer, "weight", 0.4, 2, axis)
        assert torch.equal(layer.weight_mask.bool(), mask(w, pattern, 0.4, "lp"))
    layers = [torch.nn.Linear(20, 30), torch.nn.Linear(30, 10)]
    ws = [layer.weight.detach().clone() for layer in layers]
    prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=0.6)
    for layer, kept in zip(layers, global_masks(ws, "element", 0.6), strict=True):
        assert torch.equal(layer.weight_mask.bool(), kept)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_input(backend, data: st.DataObject) -> None:
    small = 200 if backend.is_cpu else 40
    rows, columns = data.draw(st.integers(1, small)), data.draw(st.integers(1, small))
    dtype = data.draw(st.sampled_from(dtypes_of(backend)))
    w = weights(rows, columns * 2, dtype, data.draw(st.booleans()), data.draw(st.integers(0, 5)))
    w = data.draw(st.sampled_from([w[:, ::2], w[:, :columns], w[:, :columns].t().contiguous().t()]))
    sparsity = data.draw(st.floats(0, 1, exclude_max=True))
    sizes = st.one_of(st.none(), st.integers(1, 40))
    block = Block(data.draw(sizes), data.draw(sizes))
    on = w.to(backend.device)
    worth = scores(on, "lp", pattern=block, p=1).cpu()
    units = reference.best(worth, reference.kept_units(worth.numel(), sparsity))
    expected = reference.expand(units, *block.sizes(w.shape), w.shape)
    assert torch.equal(mask(on, block, sparsity, "lp", p=1).cpu(), expected)
    kept = mask(on, "element", sparsity).cpu()
    assert torch.equal(kept, reference.best(w.abs(), reference.kept_units(w.numel(), sparsity)))
