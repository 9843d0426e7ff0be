"""The Hopper kernel of block-sparse attention, on the emulator (and on a Hopper GPU, if there is one)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from attention_cases import lists_of, make, random_mask, window
from torch import Tensor

import tilewright.testing
from reference.attention import attention, bottom_right
from tilewright import _C
from tilewright.attention import BlockMask, block_sparse_attention

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def emulator() -> Iterator[Any]:
    """The emulated module, which a build for a GPU lacks; its options are put back."""
    from tilewright import _C_emulated

    yield _C_emulated
    _C_emulated.emulator_set_seed(0)
    _C_emulated.emulator_set_threads(0)
    _C_emulated.emulator_set_multiprocessors(2)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.cuda)])
def target(request: pytest.FixtureRequest) -> tuple[Any, str]:
    """The module to call and the device of its tensors."""
    if request.param == "emulated":
        return request.getfixturevalue("emulator"), "cpu"
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the GPU is not Hopper")
    return _C, "cuda"


def run(
    target: tuple[Any, str], inputs: Sequence[Tensor], mask: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    module, device = target
    q, k, v = (t if t.device.type == device else t.to(device) for t in inputs)
    out = torch.full((*q.shape[:3], v.shape[3]), math.nan, dtype=q.dtype, device=device)
    lse = torch.full(q.shape[:3], math.nan, dtype=torch.float32, device=device)
    names = [f"{way}_{part}" for way in ("q2k", "k2q") for part in ("counts", "indices", "bits")]
    tensors = {name: getattr(mask, name) for name in [*names, "tables"]}
    tensors |= {"key_from": options.pop("key_from", None), "key_to": options.pop("key_to", None)}
    tensors = {name: t if t is None else t.to(device) for name, t in tensors.items()}
    workspace = options.pop("workspace", torch.empty(1 << 16, dtype=torch.uint8, device=device))
    tensors |= {"q": q, "k": k, "v": v, "out": out, "lse": lse, "workspace": workspace}
    scale = options.get("scale", 1 / math.sqrt(q.shape[3]))
    softcap, causal = options.get("softcap", 0.0), options.get("causal", False)
    module.block_sparse_fwd_sm90(tensors, *mask.block_size, scale, softcap, causal)
    return out.cpu(), lse.cpu()


def check(
    target: tuple[Any, str],
    inputs: tuple[Tensor, ...],
    visible: Tensor,
    block: tuple[int, int],
    dtype: torch.dtype,
    seen: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The rule of error against the formula; `seen` is what positions leave of what the mask shows."""
    mask = lists_of(visible, *block)
    if options.get("causal"):
        visible = visible & bottom_right(*visible.shape[2:])
    if seen is not None:
        visible = visible & seen
    group = inputs[0].shape[1] // visible.shape[1]
    visible = visible.repeat_interleave(group, 1)
    formula = {name: value for name, value in options.items() if name in ("scale", "softcap")}
    exact = attention(*inputs, visible, **formula)
    low = tuple(t.to(dtype) for t in inputs)
    plain = attention(*low, visible, **formula)
    found = run(target, low, mask, **options)
    for value, true, rough in zip(found, exact, plain, strict=True):
        finite = true.isfinite()
        assert torch.equal(value[~finite].double(), true[~finite])
        if finite.any():
            error = (value.double() - true)[finite].abs().max().item()
            allowed = (rough.double() - true)[finite].abs().max().item()
            assert error <= 2 * allowed + 2e-6 * true[finite].abs().max().item() + 1e-6
    return found


# batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim, block
SHAPES = [
    (1, 1, 1, 1, 1, 8, 8, (64, 16)),
    (1, 1, 1, 128, 128, 64, 64, (128, 128)),
    (2, 4, 2, 7, 65, 64, 64, (64, 32)),
    (1, 2, 1, 65, 127, 40, 64, (64, 64)),
    (1, 1, 1, 129, 63, 24, 16, (128, 48)),
    (1, 2, 2, 200, 300, 128, 64, (64, 128)),
    (1, 2, 1, 257, 129, 80, 128, (256, 256)),
    (1, 2, 1, 190, 260, 64, 64, (192, 96)),
    (1, 1, 1, 130, 400, 64, 32, (64, 64)),
    (1, 1, 1, 130, 400, 64, 64, (128, 16)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(target: tuple[Any, str], shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    *sizes, block = shape
    batch, heads, _, q_len, kv_len = sizes[:5]
    check(target, make(*sizes), random_mask(batch, heads, q_len, kv_len, *block), block, dtype)


def test_axes_of_one_have_any_stride(target: tuple[Any, str]) -> None:
    """torch before 2.10 exports 1, of which 16 bytes are no divisor."""
    sizes, block = (1, 1, 1, 130, 70, 64, 64), (64, 32)
    mask = lists_of(random_mask(1, 1, 130, 70, *block), *block)
    inputs = [t.to(torch.float16) for t in make(*sizes)]
    odd = [t.as_strided(t.shape, (1, 1, *t.stride()[2:])) for t in inputs]
    for found, expected in zip(run(target, odd, mask), run(target, inputs, mask), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("mask_heads", [1, 2, 4])
@pytest.mark.parametrize("mask_batch", [1, 2])
def test_shared_masks(target: tuple[Any, str], mask_batch: int, mask_heads: int) -> None:
    visible = random_mask(mask_batch, mask_heads, 70, 90, 64, 32)
    inputs = make(2, 4, 2, 70, 90, 16, 16)
    check(target, inputs, visible.expand(-1, -1, 70, 90), (64, 32), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"scale": -0.7}, {"scale": 0.0}, {"softcap": 3.0}, {"softcap": 15.0, "scale": -1.0}],
    ids=str,
)
@pytest.mark.parametrize(("q_len", "kv_len"), [(100, 140), (140, 100)])
def test_options(
    target: tuple[Any, str], q_len: int, kv_len: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    visible = random_mask(1, 2, q_len, kv_len, 64, 32, seed=3)
    check(target, make(1, 2, 1, q_len, kv_len, 32, 48), visible, (64, 32), dtype, **options)


@pytest.mark.parametrize("block", [(64, 64), (128, 32), (128, 128)])
def test_windows(target: tuple[Any, str], block: tuple[int, int]) -> None:
    """Neighbouring rows with lists that overlap; most tiles are full, their ends are not."""
    visible = window(300, 300, 150)[None, None]
    check(target, make(1, 2, 1, 300, 300, 64, 64), visible, block, torch.bfloat16)


def test_full_and_causal(target: tuple[Any, str]) -> None:
    everything = torch.ones(1, 1, 270, 333, dtype=torch.bool)
    for block in ((64, 128), (128, 64)):
        found = check(target, make(1, 1, 1, 270, 333, 64, 64), everything, block, torch.float16, causal=True)
        mask = lists_of(everything & bottom_right(270, 333), *block)
        inputs = tuple(t.half() for t in make(1, 1, 1, 270, 333, 64, 64))
        assert torch.equal(run(target, inputs, mask)[0], found[0])


def test_long_lists(target: tuple[Any, str]) -> None:
    """Each slot has many turns."""
    visible = torch.ones(1, 1, 128, 1100, dtype=torch.bool)
    visible[..., 30:60, 400:500] = visible[..., 64:, 700:800] = False
    for block in ((128, 128), (64, 64)):
        check(target, make(1, 1, 1, 128, 1100, 64, 64), visible, block, torch.bfloat16)


def test_rows_that_share_no_block(target: tuple[Any, str]) -> None:
    """Of a tile's two block rows one or the other has its turn, several times in a row."""
    blocks = torch.zeros(4, 10, dtype=torch.bool)
    blocks[0, [0, 1, 5, 6]] = blocks[1, [2, 3, 4, 9]] = True
    blocks[2, 5:] = True
    blocks[3, 6:8] = True
    visible = blocks.repeat_interleave(64, 0).repeat_interleave(128, 1)[None, None]
    check(target, make(1, 1, 1, 256, 1280, 64, 64), visible, (64, 128), torch.bfloat16)


@pytest.mark.parametrize("block_kv", [16, 32, 64])
@pytest.mark.parametrize("density", [0.2, 0.7])
def test_neighbours_with_lists_of_their_own(target: tuple[Any, str], block_kv: int, density: float) -> None:
    generator = torch.Generator().manual_seed(7)
    blocks = torch.rand(1, 1, 3, 800 // block_kv, generator=generator) < density
    visible = blocks.repeat_interleave(64, 2).repeat_interleave(block_kv, 3)
    visible[..., 9::17, 3::5] = False
    length = visible.shape[3]
    check(target, make(1, 1, 1, 192, length, 64, 64), visible, (64, block_kv), torch.bfloat16)


def test_nothing_visible(target: tuple[Any, str]) -> None:
    inputs = tuple(t.bfloat16() for t in make(1, 2, 2, 140, 40, 16, 16))
    out, lse = run(target, inputs, lists_of(torch.zeros(1, 1, 140, 40).bool(), 64, 16))
    assert (out == 0).all()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rising_scores(target: tuple[Any, str], dtype: torch.dtype) -> None:
    q, k, v = make(1, 1, 1, 70, 400, 16, 16)
    q = q.abs()
    k = (k.abs() * torch.linspace(0, 6, 400)[:, None]).bfloat16().double()
    visible = random_mask(1, 1, 70, 400, 64, 16, seed=5)
    check(target, (q, k, v), visible, (64, 16), dtype)
    check(target, (-q, k, v), visible, (64, 16), dtype)


def test_nan_stays_in_its_rows(target: tuple[Any, str]) -> None:
    q, k, v = (t.bfloat16() for t in make(1, 1, 1, 128, 128, 64, 64))
    mask = lists_of(torch.ones(1, 1, 128, 128, dtype=torch.bool), 64, 64)
    expected, _ = run(target, (q, k, v), mask)
    q[0, 0, 5, 3] = math.nan
    out, lse = run(target, (q, k, v), mask)
    others = torch.arange(128) != 5
    assert out[0, 0, 5].isnan().all()
    assert lse[0, 0, 5].isnan()
    assert torch.equal(out[0, 0, others], expected[0, 0, others])


def test_strides(target: tuple[Any, str]) -> None:
    """Heads inside of positions, wide rows, k and v the same for all heads and batch rows."""
    q, k, v = (t.bfloat16().to(target[1]) for t in make(2, 4, 4, 70, 70, 16, 24))
    mask = lists_of(random_mask(1, 1, 70, 70, 64, 16), 64, 16)
    k, v = k[:, :1].expand_as(k), v[:1].expand_as(v)
    expected, _ = run(target, (q.contiguous(), k.contiguous(), v.contiguous()), mask)
    inside = q.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.cat([q, q], -1)[..., :16]
    for view in (q, inside, wide):
        assert torch.equal(run(target, (view, k, v), mask)[0], expected)


def test_packed_sequences(target: tuple[Any, str]) -> None:
    bounds_q, bounds_k = [0, 20, 20, 61, 80, 197], [0, 35, 40, 40, 52, 220]
    seen = torch.zeros(197, 220, dtype=torch.bool)
    key_from, key_to = torch.zeros(2, 197, dtype=torch.int32)
    for a, b, c, d in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
        seen[a:b, c:d] = bottom_right(b - a, d - c)
        key_from[a:b] = c
        key_to[a:b] = (torch.arange(a, b) + 1 - b + d).clamp(c, d)
    visible = random_mask(1, 1, 197, 220, 64, 32)
    check(
        target, make(1, 1, 1, 197, 220, 16, 16), visible, (64, 32), torch.bfloat16,
        seen=seen, key_from=key_from, key_to=key_to,
    )  # fmt: skip


def test_many_items_in_any_order(emulator: Any) -> None:
    """More items than multiprocessors, so they are put in order; no result depends on who takes what."""
    inputs = tuple(t.half() for t in make(2, 2, 1, 300, 200, 16, 16))
    mask = lists_of(random_mask(2, 2, 300, 200, 64, 64, seed=2), 64, 64)
    found = set()
    for multiprocessors in (1, 2, 3, 100):
        for seed in range(2):
            emulator.emulator_set_seed(seed)
            emulator.emulator_set_threads(1 + seed)
            emulator.emulator_set_multiprocessors(multiprocessors)
            out, lse = run((emulator, "cpu"), inputs, mask)
            found.add((out.view(torch.int16).numpy().tobytes(), lse.numpy().tobytes()))
    assert len(found) == 1


def test_longest_lists_come_first(emulator: Any) -> None:
    heads, tiles, kv_blocks = 3, 100, 12
    lengths = torch.randint(0, kv_blocks + 1, (1, heads, tiles), generator=torch.Generator().manual_seed(0))
    indices = torch.arange(kv_blocks).int().expand(1, heads, tiles, kv_blocks).contiguous()
    unused = torch.zeros(1, 1, kv_blocks, 1, dtype=torch.int32)
    mask = BlockMask(
        lengths.int(), indices, None, unused[..., 0].contiguous(), unused, None,
        torch.empty(0, 128, 1, dtype=torch.int32),
        (128, 16), tiles * 128, kv_blocks * 16,
    )  # fmt: skip
    inputs = tuple(t.half() for t in make(1, heads, 1, tiles * 128, kv_blocks * 16, 8, 8))
    workspace = torch.empty(1 << 12, dtype=torch.uint8)
    run((emulator, "cpu"), inputs, mask, workspace=workspace)
    order = workspace[64 + 2048 :][: 4 * heads * tiles].view(torch.int32).long()
    assert sorted(order.tolist()) == list(range(heads * tiles))
    taken = lengths.flatten()[order]
    assert (taken[:-1] >= taken[1:]).all()


@pytest.mark.parametrize(
    ("sizes", "block", "dtype"),
    [
        ((1, 1, 1, 64, 64, 16, 16), (64, 64), torch.float32),
        ((1, 1, 1, 64, 64, 16, 16), (32, 64), torch.float16),
        ((1, 1, 1, 64, 64, 12, 16), (64, 64), torch.float16),
        ((1, 1, 1, 64, 64, 16, 136), (64, 64), torch.float16),
        ((1, 1, 1, 64, 0, 16, 16), (64, 64), torch.float16),
    ],
)
def test_what_does_not_fit(
    emulator: Any, sizes: tuple[int, ...], block: tuple[int, int], dtype: torch.dtype
) -> None:
    inputs = tuple(t.to(dtype) for t in make(*sizes))
    mask = lists_of(torch.ones(1, 1, sizes[3], sizes[4], dtype=torch.bool), *block)
    with pytest.raises(ValueError, match="block_sparse_fwd_sm90: takes 16-bit tensors"):
        run((emulator, "cpu"), inputs, mask)


def test_the_public_op_takes_this_kernel_on_hopper(emulator: Any) -> None:
    inputs = tuple(t.bfloat16() for t in make(1, 2, 1, 130, 200, 64, 64))
    mask = lists_of(random_mask(1, 2, 130, 200, 64, 32), 64, 32)
    direct = run((emulator, "cpu"), inputs, mask)
    found = {}
    for capability in (80, 90):
        with tilewright.testing.emulated(compute_capability=capability):
            found[capability] = block_sparse_attention(*inputs, mask, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(found[90], direct, strict=True))
    assert not torch.equal(found[80][1], found[90][1])
    torch.testing.assert_close(found[80], found[90], atol=2e-2, rtol=2e-2)


@pytest.mark.usefixtures("emulator")
def test_what_does_not_fit_takes_the_other_kernel_on_hopper() -> None:
    inputs = make(1, 2, 1, 70, 90, 160, 16)
    visible = window(70, 90, 30).expand(1, 1, -1, -1)
    low = tuple(t.half() for t in inputs)
    with tilewright.testing.emulated(compute_capability=90):
        out = block_sparse_attention(*low, lists_of(visible, 16, 16))
    exact, plain = (attention(*t, visible.expand(1, 2, -1, -1))[0] for t in (inputs, low))
    assert (out.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + 1e-6
