"""BlockMask's builders and conversions against masks worked out element by element."""

import copy
import pickle

import pytest
import torch
from block_mask_cases import check, kinds_of, random_mask, read_lists
from torch.nn.attention import flex_attention

from reference import block_mask as reference
from tilewright.attention import BlockMask

LENGTHS = [1, 7, 63, 65, 127, 129]
BLOCKS = [16, (16, 48), (80, 32), 64]


def is_causal(q: int, k: int) -> bool:
    return k <= q


# ---- builders ----


@pytest.mark.parametrize("block_size", [*BLOCKS, 128, (256, 16)], ids=str)
@pytest.mark.parametrize(("q_len", "kv_len"), [(n, n) for n in LENGTHS] + [(1, 129), (129, 63), (65, 127)])
def test_causal(q_len: int, kv_len: int, block_size) -> None:
    mask = BlockMask.causal(q_len, kv_len, block_size=block_size)
    check(mask, reference.elements(lambda q, k: k <= q + kv_len - q_len, q_len, kv_len))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block_size", BLOCKS, ids=str)
@pytest.mark.parametrize(
    ("n", "window", "sink"), [(1, 1, 0), (65, 16, 0), (127, 33, 5), (129, 1, 70), (100, 99, 200)]
)
def test_sliding_window(n: int, window: int, sink: int, block_size, causal: bool) -> None:
    mask = BlockMask.sliding_window(n, window, sink=sink, causal=causal, block_size=block_size)

    def sees(q: int, k: int) -> bool:
        near = q - k < window and (causal or k - q < window)
        return (near or k < sink) and (k <= q or not causal)

    check(mask, reference.elements(sees, n, n))


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 129), (100, 129), (129, 100)])
def test_sliding_window_of_other_lengths(q_len: int, kv_len: int) -> None:
    mask = BlockMask.sliding_window(q_len, 20, sink=3, kv_len=kv_len, block_size=(16, 32))

    def sees(q: int, k: int) -> bool:
        distance = q + kv_len - q_len - k
        return distance >= 0 and (distance < 20 or k < 3)

    check(mask, reference.elements(sees, q_len, kv_len))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block_size", BLOCKS, ids=str)
@pytest.mark.parametrize(
    ("n", "window", "dilation"), [(1, 1, 1), (127, 5, 3), (129, 9, 16), (65, 200, 2), (129, 2, 100)]
)
def test_dilated(n: int, window: int, dilation: int, block_size, causal: bool) -> None:
    mask = BlockMask.dilated(n, window, dilation, causal=causal, block_size=block_size)

    def sees(q: int, k: int) -> bool:
        steps, rest = divmod(abs(q - k), dilation)
        return rest == 0 and steps < window and (k <= q or not causal)

    check(mask, reference.elements(sees, n, n))


@pytest.mark.parametrize("block_size", BLOCKS, ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 64, 100, 129, [0, 17, 129], torch.tensor([70, 70])], ids=str)
def test_prefix_lm(prefix, block_size) -> None:
    mask = BlockMask.prefix_lm(129, prefix, block_size=block_size)
    firsts = torch.as_tensor(prefix).reshape(-1).tolist()
    seen = [reference.elements(lambda q, k, first=first: k <= q or k < first, 129, 129) for first in firsts]
    check(mask, torch.stack(seen)[:, None])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block_size", BLOCKS, ids=str)
@pytest.mark.parametrize(
    "cu_seqlens",
    [
        [0, 1],
        [0, 127],
        [0, 3, 3, 20, 21, 64, 129],
        [0, 64, 128],
        [0, 0, 100, 129, 129],
        list(range(0, 66, 5)),
    ],
    ids=str,
)
def test_document(cu_seqlens: list[int], block_size, causal: bool) -> None:
    mask = BlockMask.document(torch.tensor(cu_seqlens), causal=causal, block_size=block_size)
    n = cu_seqlens[-1]
    owner = [sum(position >= start for start in cu_seqlens) for position in range(n)]
    seen = reference.elements(lambda q, k: owner[q] == owner[k] and (k <= q or not causal), n, n)
    check(mask, seen)
    assert mask == BlockMask.document(cu_seqlens, causal=causal, block_size=block_size)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("n", "chunk"), [(1, 1), (127, 32), (129, 64), (65, 7), (63, 100)])
def test_block_diagonal(n: int, chunk: int, causal: bool) -> None:
    for block_size in BLOCKS:
        mask = BlockMask.block_diagonal(n, chunk, causal=causal, block_size=block_size)
        seen = reference.elements(lambda q, k: q // chunk == k // chunk and (k <= q or not causal), n, n)
        check(mask, seen)


@pytest.mark.parametrize("n", [1, 63, 300])
def test_bigbird(n: int) -> None:
    mask = BlockMask.bigbird(n, window=3, global_blocks=2, random_blocks=4, heads=3, seed=5, block_size=16)
    mask.validate()
    blocks = mask.to_dense()
    size = -(-n // 16)
    assert mask.shape == (1, 3, size, size)
    index = torch.arange(size)
    fixed = ((index[:, None] - index).abs() <= 1) | (index < 2) | (index[:, None] < 2)
    assert bool(blocks[:, :, fixed].all())
    extra = (blocks & ~fixed).sum(-1)
    assert torch.equal(extra, (~fixed).sum(-1).clamp(max=4).expand(1, 3, -1))
    assert mask.q2k_bits is None
    arguments = {"window": 3, "global_blocks": 2, "random_blocks": 4, "heads": 3, "block_size": 16}
    assert mask == BlockMask.bigbird(n, seed=5, **arguments)
    if n == 300:
        assert mask != BlockMask.bigbird(n, seed=6, **arguments)
        assert not torch.equal(blocks[0, 0], blocks[0, 1])


@pytest.mark.parametrize(
    "make",
    [
        lambda: BlockMask.causal(0),
        lambda: BlockMask.causal(0, 20),
        lambda: BlockMask.causal(20, 0),
        lambda: BlockMask.sliding_window(0, 3, sink=2),
        lambda: BlockMask.sliding_window(20, 3, sink=2, kv_len=0),
        lambda: BlockMask.dilated(0, 1, 1),
        lambda: BlockMask.prefix_lm(0, 0),
        lambda: BlockMask.document([0]),
        lambda: BlockMask.document([0, 0]),
        lambda: BlockMask.block_diagonal(0, 5),
        lambda: BlockMask.bigbird(0),
        lambda: BlockMask.from_dense(torch.ones(0, 0, dtype=torch.bool), 16),
        lambda: BlockMask.from_dense(torch.ones(0, 3, dtype=torch.bool), 16),
    ],
)
def test_empty(make) -> None:
    mask = make().validate()
    assert mask.to_mask().shape == (1, 1, mask.q_len, mask.kv_len)
    assert mask.to_mask().numel() == 0
    assert mask.density == 0.0
    assert mask == mask & ~mask | mask
    assert "BlockMask(" in repr(mask)


# ---- tables ----


def test_tables_are_shared() -> None:
    for mask, tables in [
        (BlockMask.causal(1 << 15), 1),
        (BlockMask.causal(1 << 15, block_size=(64, 128)), 2),
        (BlockMask.sliding_window(1 << 15, 1000), 3),  # the diagonal, and two where the window ends
        (BlockMask.sliding_window(1 << 15, 1024), 2),
        (BlockMask.sliding_window(1 << 15, 1024, sink=64), 4),
        (BlockMask.prefix_lm(1 << 15, 100), 2),
        (BlockMask.block_diagonal(1 << 15, 1 << 10), 0),
        (BlockMask.block_diagonal(1 << 15, 1 << 10, causal=True), 1),
        (BlockMask.dilated(1 << 12, 1 << 12, 4), 2),
    ]:
        assert len(mask.tables) == tables
        assert (mask.q2k_bits is None) == (tables == 0)
    documents = BlockMask.document(list(range(0, (1 << 15) + 1, 1 << 12)))
    assert len(documents.tables) == 0
    ragged = BlockMask.document([0, 5000, 20000, 1 << 15])
    assert len(ragged.tables) == 12  # for each boundary inside a block five, and two where their blocks cross


def test_memory_is_that_of_the_lists() -> None:
    mask = BlockMask.sliding_window(1 << 17, 512, block_size=128)
    blocks, tables = 5, 2
    per_row = 4 * (1 + 2 * blocks)
    assert mask.q2k_indices.shape == mask.k2q_indices.shape == (1, 1, 1024, blocks)
    assert mask.nbytes == 2 * 1024 * per_row + tables * 128 * 4 * 4


def test_many_tables_need_wide_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    n = 320
    tables = torch.rand(n, 16, 16, generator=generator) < 0.5
    order = torch.arange(n).view(1, 1, 20, 16)
    counts = torch.full((20,), 16)
    indices = torch.arange(16).expand(20, 16)
    mask = BlockMask.from_lists(counts, indices, 16, kv_len=256, bits=order[0, 0], tables=tables)
    expected = tables.view(20, 16, 16, 16).transpose(1, 2).reshape(320, 256)
    check(mask, expected)
    assert len((mask & mask).tables) == n
    assert (mask | ~mask).density == 1.0
    assert len((mask | ~mask).tables) == 0


# ---- from what there is ----


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (2, 2, 3, 5)], ids=str)
def test_from_dense(backend, shape: tuple[int, ...]) -> None:
    blocks = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    mask = BlockMask.from_dense(blocks.to(backend.device), (32, 48), q_len=90, kv_len=193)
    four = blocks[(None,) * (4 - len(shape))]
    assert torch.equal(mask.to_dense().cpu(), four)
    elements = four.repeat_interleave(32, 2).repeat_interleave(48, 3)[:, :, :90, :193]
    assert torch.equal(mask.to_mask().cpu(), elements)
    assert mask.q2k_bits is None
    assert mask.validate().density == pytest.approx(float(blocks.float().mean()))
    if backend.is_cpu:
        assert mask.q2k_indices.shape[3] == max(1, int(blocks.sum(-1).max()))


def test_from_dense_takes_any_strides(backend) -> None:
    blocks = (torch.rand(2, 9, 3, 8, generator=torch.Generator().manual_seed(2)) < 0.5).to(backend.device)
    for view in (blocks.transpose(2, 3), blocks[:, ::2, :, 1::2], blocks[:, :1].expand(2, 4, 3, 8)):
        assert torch.equal(BlockMask.from_dense(view, 16).to_dense(), view)


def test_from_lists_of_a_mask_is_that_mask(backend) -> None:
    mask = random_mask(3, 100, 150, 16, 32, heads=2).to(backend.device)
    lists = (mask.q2k_counts, mask.q2k_indices)
    for counts, indices in (lists, (lists[0].long(), lists[1].long())):
        again = BlockMask.from_lists(
            counts, indices, (16, 32), kv_len=150, q_len=100, bits=mask.q2k_bits, tables=mask.tables
        )
        assert again.validate() == mask
        for name in ("q2k", "k2q"):
            parts = [
                [getattr(m, f"{name}_{part}").cpu() for part in ("counts", "indices", "bits")]
                for m in (mask, again)
            ]
            assert read_lists(*parts[0]) == read_lists(*parts[1])


def test_gpu_lists_have_room_for_all_blocks(backend) -> None:
    mask = BlockMask.from_dense(torch.eye(5, 7, dtype=torch.bool, device=backend.device), 16)
    expected = (1, 1) if backend.is_cpu else (7, 5)
    assert (mask.q2k_indices.shape[3], mask.k2q_indices.shape[3]) == expected


def flex(mod, batch, heads, q_len, kv_len, block) -> flex_attention.BlockMask:
    return flex_attention.create_block_mask(mod, batch, heads, q_len, kv_len, device="cpu", BLOCK_SIZE=block)


@pytest.mark.parametrize("block", [16, 64, (32, 80)], ids=str)
@pytest.mark.parametrize(("q_len", "kv_len"), [(128, 128), (129, 63), (65, 200), (1, 7)])
def test_from_torch(q_len: int, kv_len: int, block) -> None:
    owner = torch.arange(max(q_len, kv_len)) // 37
    slopes = torch.tensor([3, 11])

    def mod(b, h, q, k):
        return (owner[q] == owner[k]) | (k < slopes[h]) | (q == b)

    theirs = flex(mod, 3, 2, q_len, kv_len, block)
    mask = BlockMask.from_torch(theirs)
    check(mask, flex_attention.create_mask(mod, 3, 2, q_len, kv_len, device="cpu"))
    assert torch.equal(mask.to_dense(), theirs.to_dense().bool())


@pytest.mark.parametrize(
    ("mask", "mod"),
    [
        (BlockMask.causal(300, block_size=64), lambda b, h, q, k: q >= k),
        (BlockMask.sliding_window(300, 90, block_size=64), lambda b, h, q, k: (q >= k) & (q - k < 90)),
        (BlockMask.prefix_lm(300, 70, block_size=64), lambda b, h, q, k: (q >= k) | (k < 70)),
        (BlockMask.dilated(300, 400, 7, block_size=64), lambda b, h, q, k: (q >= k) & ((q - k) % 7 == 0)),
        (BlockMask.block_diagonal(300, 100, block_size=64), lambda b, h, q, k: q // 100 == k // 100),
    ],
    ids=["causal", "window", "prefix", "dilated", "diagonal"],
)
def test_builders_are_flex_attentions(mask: BlockMask, mod) -> None:
    theirs = BlockMask.from_torch(flex(mod, None, None, 300, 300, 64))
    assert mask == theirs
    assert len(mask.tables) <= len(theirs.tables)  # the last blocks have tables of their own there


def test_from_torch_of_lists_without_a_mod() -> None:
    counts, indices = (
        torch.tensor([[[1, 2]]], dtype=torch.int32),
        torch.tensor([[[[1, 0], [0, 1]]]], dtype=torch.int32),
    )
    theirs = flex_attention.BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=32)
    mask = BlockMask.from_torch(theirs)
    assert mask.to_dense().tolist() == [[[[False, True], [True, True]]]]
    assert bool((kinds_of(mask) < 2).all())


def test_the_mod_sees_partial_blocks_alone() -> None:
    calls = []

    def mod(b, h, q, k):
        calls.append(1)
        return q >= k

    theirs = flex(lambda b, h, q, k: q >= k, None, None, 512, 512, 64)
    full_only = copy.copy(theirs)
    full_only.kv_num_blocks, full_only.mask_mod = torch.zeros_like(theirs.kv_num_blocks), mod
    mask = BlockMask.from_torch(full_only)
    assert not calls
    assert int(mask.q2k_counts.sum()) == 28


# ---- the object ----


def test_copies_are_equal(backend) -> None:
    mask = random_mask(5, 70, 90, 16, 32, heads=2).to(backend.device)
    for copied in (pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask), copy.copy(mask), mask.to("cpu")):
        assert copied == mask
        assert copied.validate().block_size == (16, 32)
    assert mask.to(backend.device) is mask


def test_equality() -> None:
    mask = BlockMask.causal(100, block_size=16)
    assert mask == BlockMask.causal(100, block_size=16)
    assert mask != BlockMask.causal(101, block_size=16)
    assert mask != BlockMask.causal(100, block_size=32)
    assert mask != ~mask
    assert mask != "mask"
    assert BlockMask.prefix_lm(100, [0, 0], block_size=16) != mask
    with pytest.raises(TypeError, match="unhashable"):
        hash(mask)
    # Bits of elements that do not exist say nothing.
    seen = torch.ones(1, 16, 16, dtype=torch.bool)
    seen[:, 10:] = False
    partial = BlockMask.from_lists(
        torch.tensor([1]), torch.tensor([[0]]), 16, q_len=10, kv_len=16, bits=torch.tensor([[0]]), tables=seen
    )
    assert partial == BlockMask.from_dense(torch.ones(1, 1, dtype=torch.bool), 16, q_len=10)


def test_repr() -> None:
    assert repr(BlockMask.causal(256, block_size=64)) == (
        "BlockMask(batch=1, heads=1, q_len=256, kv_len=256, block_size=(64, 64), density=0.6250, "
        "blocks=6 full + 4 partial, tables=1, 0.8 KiB, device=cpu)"
    )


def test_plot(tmp_path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    mask = BlockMask.sliding_window(500, 90, sink=10, block_size=32)
    axes = mask.plot()
    axes.figure.savefig(tmp_path / "mask.png")
    assert axes.get_xlim() == (0, 500)
    assert axes.images[0].get_array().shape == (16, 16)
    assert mask.plot(ax=axes) is axes
    plt.close("all")
    with pytest.raises(IndexError, match="1 batches and 1 heads, got 0, 1"):
        mask.plot(head=1)
