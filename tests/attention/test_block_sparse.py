"""Block-sparse attention against its formula in float64, on every backend."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_cases import lists_of, make, random_mask, window
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tilewright.testing
from backends import Backend
from reference.attention import attention, bottom_right
from tilewright import _C
from tilewright.attention import BlockMask, block_sparse_attention

NAMES = ("out", "lse", "dq", "dk", "dv")
LOW = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def results(function: Any, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Outputs, and the gradients of a sum that weighs both (finite logarithms alone)."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out, lse = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=generator).bfloat16().to(out)
    log_weights = torch.randn(lse.shape, generator=generator).to(lse)
    loss = (out * weights).sum() + (torch.where(lse == -math.inf, 0, lse) * log_weights).sum()
    return dict(zip(NAMES, (out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)), strict=True))


def with_stored_output(function: Any, dtype: torch.dtype) -> Any:
    """The same, but its gradients sum dO * O over O as it was stored: what every fused backward does."""

    def through(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = function(*leaves)
        rounding = (out.to(dtype) - out).detach()
        zero = torch.where(lse.isfinite(), lse - lse.detach(), 0)
        return out - zero[..., None] * rounding, lse

    return through


def assert_close(found: dict[str, Tensor], exact: dict[str, Tensor], *rounded: dict[str, Tensor]) -> None:
    """The rule of error; few elements, where luck decides, may be off by a rounding of the largest more."""
    for name, value in found.items():
        finite = exact[name].isfinite()
        assert torch.equal(value[~finite].double(), exact[name][~finite]), name
        if not finite.any():
            continue
        error = (value.double() - exact[name])[finite].abs().max().item()
        allowed = sum((plain[name].double() - exact[name])[finite].abs().max().item() for plain in rounded)
        size = exact[name][finite].abs().max().item()
        luck = max(2e-6, torch.finfo(value.dtype).eps / 2) * size + 1e-6
        assert error <= 2 * allowed + luck, f"{name}: {error} > 2 * {allowed}"


def run(backend: Backend, inputs: tuple[Tensor, ...], mask: BlockMask, **options: Any) -> dict[str, Tensor]:
    """Results on the backend's device, brought to the CPU."""
    there = tuple(t if t.device == backend.device else t.to(backend.device) for t in inputs)
    mask = mask.to(backend.device)
    found = results(lambda *t: block_sparse_attention(*t, mask, return_lse=True, **options), there)
    return {name: t.cpu() for name, t in found.items()}


def assert_same(backend: Backend, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit by bit; but on a GPU another layout in memory may choose another kernel."""
    for name, value in found.items():
        if backend.name == "cuda":
            torch.testing.assert_close(value, expected[name], rtol=2e-2, atol=2e-2)
        else:
            assert torch.equal(value, expected[name]), name


def check(
    backend: Backend,
    inputs: tuple[Tensor, ...],
    visible: Tensor,
    block: tuple[int, int],
    dtype: torch.dtype,
    **options: Any,
) -> None:
    mask = lists_of(visible, *block)
    if options.get("causal"):
        visible = visible & bottom_right(*visible.shape[2:])
    formula = {name: value for name, value in options.items() if name in ("scale", "softcap")}

    def function(*t: Tensor) -> tuple[Tensor, Tensor]:
        return attention(*t, visible, **formula)

    exact, stored = results(function, inputs), results(with_stored_output(function, dtype), inputs)
    low = tuple(t.to(dtype) for t in inputs)
    found = run(backend, low, mask, **options)
    assert found["out"].dtype == dtype
    assert found["lse"].dtype == torch.float32
    assert_close(found, exact, results(function, low), stored)


# batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim, block
SHAPES = [
    (1, 1, 1, 1, 1, 8, 8, (16, 16)),
    (2, 4, 2, 7, 65, 64, 64, (16, 32)),
    (1, 2, 1, 65, 127, 40, 96, (64, 64)),
    (1, 3, 3, 129, 63, 24, 256, (128, 48)),
    (2, 2, 2, 130, 300, 128, 64, (32, 128)),
    (1, 6, 2, 257, 129, 80, 16, (256, 256)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(backend: Backend, shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    *sizes, block = shape
    batch, heads, _, q_len, kv_len = sizes[:5]
    check(backend, make(*sizes), random_mask(batch, heads, q_len, kv_len, *block), block, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask_heads", [1, 2, 6])
@pytest.mark.parametrize("mask_batch", [1, 2])
def test_shared_masks(backend: Backend, mask_batch: int, mask_heads: int, dtype: torch.dtype) -> None:
    """A mask of all batch rows or heads, of key heads, of query heads."""
    visible = random_mask(mask_batch, mask_heads, 70, 90, 16, 16)
    mask = lists_of(visible, 16, 16)
    whole = visible.repeat_interleave(6 // mask_heads, 1).expand(2, 6, 70, 90)
    inputs = make(2, 6, 2, 70, 90, 16, 16)
    low = tuple(t.to(dtype) for t in inputs)
    assert_close(
        run(backend, low, mask),
        results(lambda *t: attention(*t, whole), inputs),
        results(lambda *t: attention(*t, whole), low),
    )


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"scale": -0.7}, {"scale": 0.0}, {"softcap": 3.0}, {"softcap": 15.0, "scale": -1.0}],
    ids=str,
)
@pytest.mark.parametrize(("q_len", "kv_len"), [(100, 140), (140, 100)])
def test_options(
    backend: Backend, q_len: int, kv_len: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    visible = random_mask(1, 2, q_len, kv_len, 32, 32, seed=3)
    check(backend, make(1, 2, 1, q_len, kv_len, 32, 48), visible, (32, 32), dtype, **options)


@pytest.mark.slow
@pytest.mark.parametrize("length", [2047, 2049])
def test_long_windows(length: int) -> None:
    visible = window(length, length, 300)[None, None]
    backend = Backend("cpu")
    check(backend, make(1, 1, 1, length, length, 64, 64), visible, (128, 128), torch.float32)
    check(backend, make(1, 1, 1, length, length, 64, 64), visible, (64, 128), torch.bfloat16)


# Of FlashAttention's tests: q_len, kv_len.
FLASH = [
    (64, 128), (128, 192), (256, 256), (239, 1), (799, 3), (113, 203), (113, 128), (128, 217), (113, 211),
    (108, 256), (256, 512), (384, 256), (640, 128), (512, 256), (1024, 1024), (1023, 1024), (1024, 1023),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_full_masks_are_dense_attention(causal: bool) -> None:
    for q_len, kv_len in FLASH:
        visible = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool)
        inputs = make(1, 2, 1, q_len, kv_len, 64, 64)
        for block, dtype in (((128, 128), torch.float32), ((64, 32), torch.bfloat16)):
            check(Backend("cpu"), inputs, visible, block, dtype, causal=causal)


def check_nothing_visible(backend: Backend, dtype: torch.dtype) -> None:
    inputs = tuple(t.to(dtype) for t in make(1, 2, 2, 33, 40, 16, 16))
    found = run(backend, inputs, lists_of(torch.zeros(1, 1, 33, 40).bool(), 16, 16))
    assert (found.pop("lse") == -math.inf).all()
    assert all((t == 0).all() for t in found.values())


@pytest.mark.parametrize("dtype", LOW)
def test_nothing_visible(backend: Backend, dtype: torch.dtype) -> None:
    check_nothing_visible(backend, dtype)


def check_empty_tensors(backend: Backend, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    batch, q_len, kv_len = sizes
    inputs = tuple(t.to(dtype) for t in make(batch, 2, 1, q_len, kv_len, 16, 8))
    found = run(backend, inputs, lists_of(torch.ones(1, 1, q_len, kv_len, dtype=torch.bool), 16, 16))
    assert found["out"].shape == (batch, 2, q_len, 8)
    assert (found.pop("lse") == -math.inf).all()
    assert all((t == 0).all() for t in found.values())


EMPTY = [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("sizes", EMPTY)
def test_empty_tensors(backend: Backend, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_empty_tensors(backend, sizes, dtype)


def test_float64_of_nothing() -> None:
    check_nothing_visible(Backend("cpu"), torch.float64)
    for sizes in EMPTY:
        check_empty_tensors(Backend("cpu"), sizes, torch.float64)


@pytest.mark.parametrize("dtype", LOW)
def test_rising_scores(backend: Backend, dtype: torch.dtype) -> None:
    """Maxima that grow from tile to tile, by little and by much, and rows of large scores."""
    q, k, v = make(1, 1, 1, 70, 400, 16, 16)
    q = q.abs()
    k = (k.abs() * torch.linspace(0, 6, 400)[:, None]).bfloat16().double()
    visible = random_mask(1, 1, 70, 400, 16, 16, seed=5)
    check(backend, (q, k, v), visible, (16, 16), dtype)
    check(backend, (-q, k, v), visible, (16, 16), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(backend: Backend, dtype: torch.dtype) -> None:
    """Heads inside of positions, dims not innermost, elements apart; k and v expanded."""
    q, k, v = (t.to(dtype).to(backend.device) for t in make(2, 4, 4, 50, 70, 16, 24))
    mask = lists_of(random_mask(1, 1, 50, 70, 16, 16), 16, 16).to(backend.device)
    k, v = k[:, :1].expand_as(k), v[:1].expand_as(v)
    expected = run(backend, (q.contiguous(), k, v), mask)
    layouts = (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.stack([t, t], -1)[..., 0],
    )
    for layout in layouts:
        found = run(backend, tuple(layout(t) for t in (q, k, v)), mask)
        assert_same(backend, found, expected)
    inside = layouts[0](q)
    assert block_sparse_attention(inside, k, v, mask).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences(backend: Backend, causal: bool, dtype: torch.dtype) -> None:
    """As each sequence by itself; some have no queries, no keys, or more queries than keys."""
    bounds_q, bounds_k = [0, 20, 20, 61, 80, 97], [0, 35, 40, 40, 52, 120]
    visible = random_mask(1, 2, 97, 120, 32, 16)
    same = torch.zeros(97, 120, dtype=torch.bool)
    for a, b, c, d in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
        same[a:b, c:d] = bottom_right(b - a, d - c) if causal else True
    positions = {
        "cu_seqlens_q": torch.tensor(bounds_q, device=backend.device),
        "cu_seqlens_k": torch.tensor(bounds_k, device=backend.device).int(),
    }
    inputs = make(1, 2, 1, 97, 120, 16, 16)
    low = tuple(t.to(dtype) for t in inputs)
    mask = lists_of(visible, 32, 16)
    assert_close(
        run(backend, low, mask, causal=causal, **positions),
        results(lambda *t: attention(*t, visible & same), inputs),
        results(lambda *t: attention(*t, visible & same), low),
    )


@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 2.0, "scale": 0.4}], ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_gradcheck(heads: tuple[int, int], options: dict[str, Any]) -> None:
    inputs = tuple(t.requires_grad_() for t in make(1, *heads, 19, 23, 8, 8))
    visible = random_mask(1, heads[0], 19, 23, 16, 16)
    visible[:, :, 4:, :2] = True  # lse of an empty row is -inf, which no difference quotient survives
    mask = lists_of(visible, 16, 16)
    seen = visible & bottom_right(19, 23) if options else visible
    rows = seen.any(-1).expand(1, heads[0], 19)

    def function(*t: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = block_sparse_attention(*t, mask, return_lse=True, **options)
        return out, lse[rows]

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_float64_is_the_formula() -> None:
    inputs = make(2, 4, 2, 45, 70, 24, 16)
    visible = random_mask(2, 4, 45, 70, 16, 32)
    mask = lists_of(visible, 16, 32)
    exact = results(lambda *t: attention(*t, visible, softcap=4.0), inputs)
    found = results(lambda *t: block_sparse_attention(*t, mask, softcap=4.0, return_lse=True), inputs)
    for name, value in found.items():
        torch.testing.assert_close(value, exact[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(1, 4, 2), (2, 6, 3)])
@pytest.mark.parametrize("dtype", LOW)
def test_same_bits(
    backend: Backend, dtype: torch.dtype, batch: int, heads: int, kv_heads: int, threads: None
) -> None:
    """Repeated, and with any number of threads, fewer or more than heads of k; ragged lists."""
    if batch > 1 and backend.name == "emulated":
        pytest.skip("threads are no matter of the kernels for GPUs")
    inputs = tuple(t.to(dtype) for t in make(batch, heads, kv_heads, 300, 280, 32, 40))
    mask = lists_of(random_mask(batch, heads, 300, 280, 64, 32), 64, 32)
    first: dict[str, Tensor] = {}
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        found = run(backend, inputs, mask, causal=True)
        first = first or found
        assert all(torch.equal(found[name], first[name]) for name in NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_a_number_stays_in_its_row(backend: Backend, dtype: torch.dtype) -> None:
    q, k, v = (t.to(dtype).to(backend.device) for t in make(1, 1, 1, 40, 40, 16, 16))
    q[0, 0, 5, 3] = math.nan
    mask = lists_of(window(40, 40, 9)[None, None], 16, 16).to(backend.device)
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True)
    assert out[0, 0, 5].isnan().all()
    assert lse[0, 0, 5].isnan()
    others = torch.arange(40) != 5
    assert out[0, 0, others].isfinite().all()
    assert lse[0, 0, others].isfinite().all()


def test_flex_attention() -> None:
    """FlexAttention's eager result under the same mask_mod."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention")

    def sees(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (i >= j) & ((i - j < 50) | (j < 4))

    q, k, v = make(1, 2, 2, 150, 150, 16, 16)
    expected = flex.flex_attention(
        q, k, v, block_mask=flex.create_block_mask(sees, 1, 1, 150, 150, device="cpu")
    )
    i, j = torch.arange(150)[:, None], torch.arange(150)
    out = block_sparse_attention(q, k, v, lists_of(sees(0, 0, i, j)[None, None], 64, 32))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 100), st.integers(1, 130)),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    dims=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    block=st.tuples(st.sampled_from([16, 32, 48, 64, 128]), st.sampled_from([16, 48, 64, 80, 256])),
    dtype=st.sampled_from(LOW),
    level=st.sampled_from([*_C.cpu_levels(), "emulated"]),
    causal=st.booleans(),
    softcap=st.sampled_from([0.0, 2.5]),
    seed=st.integers(0, 99),
)
def test_property(
    sizes: tuple[int, int, int],
    kv_heads: int,
    group: int,
    dims: tuple[int, int],
    block: tuple[int, int],
    dtype: torch.dtype,
    level: str,
    causal: bool,
    softcap: float,
    seed: int,
) -> None:
    batch, q_len, kv_len = sizes
    heads = kv_heads * group
    visible = random_mask(batch, heads, q_len, kv_len, *block, seed=seed)
    inputs = make(batch, heads, kv_heads, q_len, kv_len, 8 * dims[0], 8 * dims[1], seed=seed)
    if level == "emulated":
        with tilewright.testing.emulated(seed=seed):
            check(Backend(level), inputs, visible, block, dtype, causal=causal, softcap=softcap)
        return
    before = _C.cpu_level()
    _C.set_cpu_level(level)
    try:
        check(Backend(level), inputs, visible, block, dtype, causal=causal, softcap=softcap)
    finally:
        _C.set_cpu_level(before)
