"""What is particular to the block-sparse linear layer's CUDA kernels: tiles, alignment, races, Hopper."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from tests.prune.block_sparse_cases import Layer, make_layer, random
from tests.prune.test_block_sparse_linear import check_layer

import tilewright.testing
from tilewright.prune.ops.block_sparse import ACTIVATIONS, _fwd, _input_gradient, _weight_gradient

SIZES = (8, 16, 32, 64, 128)
LARGE = [(64, 64), (64, 128), (128, 64), (128, 128)]
HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALVES]


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.cuda)])
def gpu(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where tensors have to be for the CUDA kernels; the shared tests run the CPU's."""
    with tilewright.testing.emulated() if request.param == "emulated" else nullcontext():
        yield torch.device("cuda" if request.param == "cuda" else "cpu")


def results(layer: Layer, tokens: int, activation: str = "gelu") -> list[torch.Tensor]:
    """y, z, dx and dW."""
    out, into = layer.weight.shape
    x, dz, bias = (
        random(*shape, dtype=layer.weight.dtype, seed=seed)
        for seed, shape in enumerate([(tokens, into), (tokens, out), (out,)])
    )
    y, z = _fwd(x, layer.values, layer.pattern, bias, out, activation, True)
    dx = _input_gradient(dz, layer.values, layer.pattern, into)
    return [y, z, dx, _weight_gradient(dz, x, layer.pattern, list(layer.values.shape))]


def misaligned(t: torch.Tensor) -> torch.Tensor:
    """The same numbers, dense, one element behind an aligned address."""
    buffer = t.new_zeros(t.numel() + 1)
    shifted = buffer[1:].view(t.shape)
    shifted.copy_(t)
    return shifted


def in_wider_rows(t: torch.Tensor) -> torch.Tensor:
    """The same numbers in rows that a multiple of 16 bytes separates."""
    buffer = t.new_full((t.shape[0], (t.shape[1] + 23) // 8 * 8), float("nan"))
    buffer[:, : t.shape[1]] = t
    return buffer[:, : t.shape[1]]


@pytest.mark.parametrize("block", list(itertools.product(SIZES, SIZES)), ids=lambda b: f"{b[0]}x{b[1]}")
def test_every_pair_of_block_sizes(gpu: torch.device, block: tuple[int, int]) -> None:
    """Two block rows and columns and a bit, so that both end inside a block."""
    for dtype, tokens in ((torch.float32, 5), (torch.float32, 35), (torch.float16, 5), (torch.bfloat16, 35)):
        layer = make_layer(block[0] + 12, block[1] + 20, block, 1.0, dtype, gpu)
        check_layer(layer, tokens, "relu", True)


@pytest.mark.parametrize("tokens", [6, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_alignment_does_not_show(gpu: torch.device, dtype: torch.dtype, tokens: int) -> None:
    """Values, inputs and gradients at any address and in any rows: the same bits."""
    layer = make_layer(72, 88, (16, 32), 0.7, dtype, gpu)
    x, dz = (random(tokens, n, dtype=dtype, device=gpu) for n in (88, 72))
    shape = list(layer.values.shape)

    def run(values: torch.Tensor, x: torch.Tensor, dz: torch.Tensor) -> list[torch.Tensor]:
        y, _ = _fwd(x, values, layer.pattern, None, 72, "none", False)
        return [
            y,
            _input_gradient(dz, values, layer.pattern, 88),
            _weight_gradient(dz, x, layer.pattern, shape),
        ]

    expected = run(layer.values, x, dz)
    changes: list[Callable[[torch.Tensor], torch.Tensor]] = [misaligned, in_wider_rows]
    for change in changes:
        found = run(misaligned(layer.values), change(x), change(dz))
        assert all(map(torch.equal, found, expected))


def test_rows_that_end_inside_of_a_vector(gpu: torch.device) -> None:
    """In wider rows, what lies behind a row's end is not read; NaN is there."""
    for dtype in DTYPES:
        layer = make_layer(45, 51, (16, 16), 1.0, dtype, gpu)
        for tokens in (7, 35):
            x, dz = (in_wider_rows(random(tokens, n, dtype=dtype, device=gpu)) for n in (51, 45))
            y, _ = _fwd(x, layer.values, layer.pattern, None, 45, "none", False)
            dx = _input_gradient(dz, layer.values, layer.pattern, 51)
            dw = _weight_gradient(dz, x, layer.pattern, list(layer.values.shape))
            assert all(bool(t.isfinite().all()) for t in (y, dx, dw))


@pytest.mark.parametrize("block", [(128, 16), (64, 32), (16, 128)], ids=lambda b: f"{b[0]}x{b[1]}")
def test_tiles_do_not_show(block: tuple[int, int]) -> None:
    """Large tiles, or small ones for many multiprocessors: the same bits."""
    layer = make_layer(150, 140, block, 0.8, torch.float16)
    found = []
    for multiprocessors in (1, 4, 40):
        with tilewright.testing.emulated(multiprocessors=multiprocessors):
            found.append(results(layer, 300))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("dtype", DTYPES)
def test_short_and_long_lists(dtype: torch.dtype) -> None:
    """Neighbours that share a tile are cut where block rows end, wherever that is."""
    with tilewright.testing.emulated(multiprocessors=1):
        for seed in range(2):
            check_layer(
                make_layer(100, 200, (8, 8), 0.3, dtype, seed=seed), 33, "none", False, f"seed {seed}"
            )
            check_layer(
                make_layer(90, 600, (32, 64), 0.6, dtype, seed=seed), 33, "none", False, f"seed {seed}"
            )


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES)
def test_seeds_of_the_emulator_give_the_same_bits(dtype: torch.dtype, capability: int) -> None:
    """Whatever the order of warps and thread blocks."""
    layer = make_layer(160, 210, (64, 64), 0.7, dtype)
    found = []
    for seed in range(3):
        with tilewright.testing.emulated(seed=seed, compute_capability=capability):
            found.append([*results(layer, 3), *results(layer, 140)])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize(
    "block", [(64, 64), (64, 128), (128, 64), (128, 128)], ids=lambda b: f"{b[0]}x{b[1]}"
)
@pytest.mark.parametrize("dtype", HALVES)
def test_hopper(dtype: torch.dtype, block: tuple[int, int]) -> None:
    """The copy engine and warpgroups, at sizes that end inside of blocks and tiles."""
    with tilewright.testing.emulated(compute_capability=90):
        layer = make_layer(3 * block[0] - 24, 2 * block[1] + 40, block, 0.7, dtype)
        check_layer(layer, 140, "silu", True)
        check_layer(layer, 300, "none", False)


@pytest.mark.cuda
@pytest.mark.parametrize("block", LARGE, ids=lambda b: f"{b[0]}x{b[1]}")
@pytest.mark.parametrize("dtype", HALVES)
def test_sizes_that_hopper_is_for(dtype: torch.dtype, block: tuple[int, int]) -> None:
    """Work for 132 multiprocessors in each of the products; what is smaller, other kernels do there too."""
    layer = make_layer(24 * block[0] - 24, 24 * block[1] + 40, block, 0.7, dtype, "cuda")
    check_layer(layer, 1300, "silu", True)
    check_layer(layer, 140 + 20 * 256, "none", False)


@pytest.mark.parametrize("multiprocessors", [1, 3])
def test_hopper_takes_several_items(multiprocessors: int) -> None:
    """Thread blocks that go from one result to the next, some without any block."""
    with tilewright.testing.emulated(compute_capability=90, multiprocessors=multiprocessors):
        check_layer(make_layer(5 * 64, 7 * 64, (64, 64), 0.6, torch.bfloat16), 270, "gelu", True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hopper_activations(activation: str) -> None:
    """The same function of the same z as on other GPUs."""
    layer = make_layer(130, 70, (64, 64), 1.0, torch.float16)
    with tilewright.testing.emulated(compute_capability=90):
        y, z, *_ = results(layer, 140, activation)
    with tilewright.testing.emulated():
        other_y, other_z, *_ = results(layer, 140, activation)
    same = z == other_z
    assert bool(same.float().mean() > 0.9)
    assert torch.equal(y[same], other_y[same])


def test_hopper_leaves_what_it_cannot_address() -> None:
    """Columns, expanded rows and odd addresses take the other kernels and give what they give."""
    layer = make_layer(128, 136, (64, 64), 1.0, torch.bfloat16)
    x = random(140, 136, dtype=torch.bfloat16)
    changes: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda t: t.T.contiguous().T,
        lambda t: t[:1].expand(t.shape),
        misaligned,
    ]
    for change in changes:
        with tilewright.testing.emulated(compute_capability=90):
            y, _ = _fwd(change(x), layer.values, layer.pattern, None, 128, "none", False)
        with tilewright.testing.emulated():
            expected, _ = _fwd(change(x), layer.values, layer.pattern, None, 128, "none", False)
        assert torch.equal(y, expected)


def test_no_multiprocessor_idles_for_want_of_tiles() -> None:
    """Many block rows of tokens: the walk that tiles share has a ragged end."""
    layer = make_layer(64, 64, (64, 64), 1.0, torch.bfloat16)
    for capability in (80, 90):
        with tilewright.testing.emulated(compute_capability=capability, multiprocessors=1):
            check_layer(layer, 9 * 256 + 5, "none", False)
