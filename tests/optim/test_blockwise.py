"""quantize_blockwise and dequantize_blockwise against exact arithmetic."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tilewright as tw
from reference import optim as reference
from tilewright.optim import QuantState, create_dynamic_map, dequantize_blockwise, quantize_blockwise

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [0, 1, 63, 64, 65, 127, 129, 255, 256, 257, 2047, 2049, 4095, 4096, 4097]
BLOCKSIZES = [64, 128, 256, 512, 1024, 2048, 4096]


def linear_map() -> Tensor:
    return torch.linspace(-1, 1, 256)


def fp8_map() -> Tensor:
    """Magnitudes of an e4m3 number, with zeros for the codes that are left over."""
    magnitudes = [(1 + m / 8) * 2.0**e for e in range(-8, 7) for m in range(8)]
    values = sorted([*magnitudes, *(-x for x in magnitudes)]) + [0.0] * 16
    return torch.tensor(sorted(values)) / max(values)


def old_unsigned_map() -> Tensor:
    """Half the range of today's unsigned map is missing: bitsandbytes 0.36 to 0.41.0 wrote such maps."""
    return torch.cat([torch.zeros(128), create_dynamic_map(True)[128:]])


MAPS = {"linear": linear_map, "fp8": fp8_map, "old_unsigned": old_unsigned_map}


def assert_nearest(x: Tensor, codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int) -> None:
    """No other code is nearer to x, but for what one rounding of x / absmax to float32 can hide."""
    expected, exact_absmax = reference.quantize(x.cpu(), code, blocksize)
    assert torch.equal(absmax.cpu().double(), exact_absmax)
    scale = reference.expand(exact_absmax, x.numel(), blocksize).view(x.shape)
    scaled = torch.where(scale > 0, x.cpu().double() / scale, 0.0)
    code = code.double()
    distance = (code[codes.cpu().long()] - scaled).abs()
    best = (code[expected.long()] - scaled).abs()
    assert bool((distance <= best + scaled.abs() * 2.0**-22 + 2.0**-149).all())


def heavy_tailed(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp(2 * torch.randn(shape, generator=generator))
    return x.clamp(-6e4, 6e4).to(device, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("numel", SIZES)
def test_codes_are_nearest(backend, numel: int, dtype: torch.dtype) -> None:
    x = heavy_tailed((numel,), dtype, backend.device)
    codes, state = quantize_blockwise(x)
    assert codes.dtype == torch.uint8
    assert codes.shape == x.shape
    assert_nearest(x, codes, state.absmax, create_dynamic_map(), 256)
    back = dequantize_blockwise(codes, state)
    assert back.dtype == dtype
    exact = reference.dequantize(codes.cpu(), create_dynamic_map(), state.absmax.cpu(), 256)
    assert torch.equal(back.cpu(), exact.float().to(dtype))


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_blocksizes(backend, blocksize: int) -> None:
    x = heavy_tailed((2 * blocksize + 17,), torch.float32, backend.device)
    codes, state = quantize_blockwise(x, blocksize=blocksize)
    assert state.blocksize == blocksize
    assert state.absmax.shape == (3,)
    assert_nearest(x, codes, state.absmax, create_dynamic_map(), blocksize)
    out = torch.empty_like(x)
    assert dequantize_blockwise(codes, absmax=state.absmax, out=out, blocksize=blocksize) is out
    assert torch.equal(out, dequantize_blockwise(codes, state))


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("numel", [1, 257, 4097])
def test_foreign_maps(backend, name: str, numel: int) -> None:
    code = MAPS[name]()
    x = heavy_tailed((numel,), torch.float32, backend.device)
    if name == "old_unsigned":
        x = x.abs()
    codes, state = quantize_blockwise(x, code.to(backend.device))
    assert_nearest(x, codes, state.absmax, code, 256)
    exact = reference.dequantize(codes.cpu(), code, state.absmax.cpu(), 256)
    assert torch.equal(dequantize_blockwise(codes, state).cpu(), exact.float())


@pytest.mark.parametrize("signed", [True, False])
def test_the_built_in_maps_given_as_code(backend, signed: bool) -> None:
    x = heavy_tailed((1000,), torch.float32, backend.device).abs()
    code = create_dynamic_map(signed).to(backend.device)
    codes, state = quantize_blockwise(x, code)
    assert_nearest(x, codes, state.absmax, code.cpu(), 256)
    if signed:
        assert torch.equal(codes, quantize_blockwise(x)[0])


@pytest.mark.parametrize("signed", [True, False])
def test_midpoints_go_toward_zero_and_their_neighbours_to_their_side(backend, signed: bool) -> None:
    """Every decision the encoder can take, at the place where it takes it and one float to either side."""
    code = create_dynamic_map(signed)
    exact_middle = (code[1:].double() + code[:-1].double()) / 2
    middle = exact_middle.float()
    infinity = torch.tensor(math.inf)
    points = torch.cat([middle, torch.nextafter(middle, infinity), torch.nextafter(middle, -infinity)])
    x = torch.ones(len(points) // 255 * 256).view(
        -1, 256
    )  # a 1 in each block makes absmax 1: nothing is rounded
    x[:, :255] = points.view(-1, 255)
    codes, state = quantize_blockwise(x.to(backend.device), code.to(backend.device))
    assert bool((state.absmax == 1).all())
    assert torch.equal(codes.cpu().long(), reference.nearest_codes(x.double(), code).long())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("scale", [1.0, 3.7e-3, 1e30, 2.0**-100])
def test_every_code_round_trips(backend, signed: bool, scale: float) -> None:
    code = create_dynamic_map(signed).to(backend.device)
    codes = torch.arange(256, dtype=torch.uint8, device=backend.device)
    absmax = torch.tensor([scale], device=backend.device)
    values = dequantize_blockwise(codes, absmax=absmax, code=code)
    again, state = quantize_blockwise(values, code)
    assert torch.equal(again, codes)
    assert torch.equal(state.absmax, absmax)


def test_zero_stays_zero(backend) -> None:
    x = torch.randn(512, generator=torch.Generator().manual_seed(0))
    x[::3] = 0.0
    x[1::6] = -0.0
    x = x.to(backend.device)
    back = dequantize_blockwise(*quantize_blockwise(x))
    assert bool((back[x == 0] == 0).all())


def test_a_block_of_zeros(backend) -> None:
    x = torch.zeros(256 + 100, device=backend.device)
    x[-1] = 2.0
    codes, state = quantize_blockwise(x)
    assert state.absmax.tolist() == [0.0, 2.0]
    assert bool((codes[:256] == 127).all())
    assert torch.equal(dequantize_blockwise(codes, state), x)


@pytest.mark.parametrize("scale", [1e-37, 1e-38, 1e-39, 1e-42, 2.0**-149])
def test_tiny_blocks(backend, scale: float) -> None:
    """Blocks whose reciprocal overflows, of normal, mixed and denormal numbers."""
    x = torch.randn(700, generator=torch.Generator().manual_seed(0)).double() * scale
    x = x.float()
    codes, state = quantize_blockwise(x.to(backend.device))
    _, absmax = reference.quantize(x, create_dynamic_map(), 256)
    assert torch.equal(state.absmax.cpu().double(), absmax)
    assert_nearest(x, codes, state.absmax, create_dynamic_map(), 256)
    exact = reference.dequantize(codes.cpu(), create_dynamic_map(), absmax, 256)
    assert torch.equal(dequantize_blockwise(codes, state).cpu(), exact.float())


def test_huge_blocks(backend) -> None:
    x = heavy_tailed((300,), torch.float32, backend.device)
    x = x / x.abs().max() * torch.finfo(torch.float32).max
    codes, state = quantize_blockwise(x)
    assert_nearest(x, codes, state.absmax, create_dynamic_map(), 256)
    assert bool(torch.isfinite(dequantize_blockwise(codes, state)).all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_block_that_is_not_finite_decodes_to_nan_and_its_neighbours_do_not_notice(
    backend, bad: float, dtype: torch.dtype
) -> None:
    x = heavy_tailed((3 * 256 + 5,), dtype, backend.device)
    clean, clean_state = quantize_blockwise(x)
    x[256 + 100] = bad
    codes, state = quantize_blockwise(x)
    if math.isnan(bad):
        assert math.isnan(state.absmax[1])
    else:
        assert state.absmax[1] == math.inf
    back = dequantize_blockwise(codes, state)
    assert bool(back[256:512].isnan().all())
    others = torch.tensor([0, 2, 3])
    assert torch.equal(state.absmax.cpu()[others], clean_state.absmax.cpu()[others])
    keep = torch.ones_like(codes, dtype=torch.bool)
    keep[256:512] = False
    assert torch.equal(codes[keep], clean[keep])


def test_a_nan_wins_over_an_infinity(backend) -> None:
    x = torch.zeros(256, device=backend.device)
    x[3], x[200] = math.inf, math.nan
    assert math.isnan(quantize_blockwise(x)[1].absmax)
    x[3], x[200] = math.nan, math.inf
    assert math.isnan(quantize_blockwise(x)[1].absmax)


def strided_inputs(device: torch.device) -> dict[str, Tensor]:
    base = heavy_tailed((6, 10, 8, 9), torch.float32, device)
    return {
        "transposed": base.transpose(0, 3),
        "channels_last": base.to(memory_format=torch.channels_last),
        "every second": base[:, ::2],
        "expanded": base[:1].expand(6, 10, 8, 9),
        "offset": base.flatten()[1:],
        "flipped": base.flip(0),
        "scalar": base[0, 0, 0, 0],
    }


@pytest.mark.parametrize("name", strided_inputs(torch.device("cpu")))
def test_strides_are_honoured(backend, name: str) -> None:
    """Blocks run in row-major order whatever the strides."""
    x = strided_inputs(backend.device)[name]
    codes, state = quantize_blockwise(x)
    plain, plain_state = quantize_blockwise(x.contiguous())
    assert torch.equal(codes, plain)
    assert torch.equal(state.absmax, plain_state.absmax)
    spread = torch.empty(*codes.shape, 2, dtype=torch.uint8, device=codes.device)[..., 0]
    spread.copy_(codes)
    assert torch.equal(dequantize_blockwise(spread, state), dequantize_blockwise(codes, state))


def test_out_and_absmax_may_have_strides(backend) -> None:
    x = heavy_tailed((40, 30), torch.float32, backend.device)
    codes, state = quantize_blockwise(x)
    out = torch.zeros(30, 40, dtype=torch.uint8, device=x.device).t()
    absmax = torch.zeros(5, 2, device=x.device)[:, 0]
    given, given_state = quantize_blockwise(x, out=out, absmax=absmax)
    assert given is out
    assert given_state.absmax is absmax
    assert torch.equal(out, codes)
    assert torch.equal(absmax, state.absmax)
    values = torch.zeros(30, 40, dtype=torch.bfloat16, device=x.device).t()
    dequantize_blockwise(codes, state, out=values)
    assert torch.equal(values, dequantize_blockwise(codes, state).bfloat16())


def test_either_of_out_and_absmax_alone(backend) -> None:
    x = heavy_tailed((300,), torch.float32, backend.device)
    codes, state = quantize_blockwise(x)
    out = torch.empty_like(codes)
    assert torch.equal(quantize_blockwise(x, out=out)[1].absmax, state.absmax)
    assert torch.equal(out, codes)
    absmax = torch.empty_like(state.absmax)
    assert torch.equal(quantize_blockwise(x, absmax=absmax)[0], codes)
    assert torch.equal(absmax, state.absmax)


def test_nothing_is_written_outside(backend) -> None:
    """Sentinels around every output."""
    x = heavy_tailed((257,), torch.float32, backend.device)
    codes = torch.full((257 + 256,), 77, dtype=torch.uint8, device=x.device)
    absmax = torch.full((2 + 64,), 7.0, device=x.device)
    values = torch.full((257 + 256,), 7.0, device=x.device)
    _, state = quantize_blockwise(x, out=codes[128:385], absmax=absmax[32:34])
    dequantize_blockwise(codes[128:385], state, out=values[128:385])
    assert bool((codes[:128] == 77).all() and (codes[385:] == 77).all())
    assert bool((absmax[:32] == 7).all() and (absmax[34:] == 7).all())
    assert bool((values[:128] == 7).all() and (values[385:] == 7).all())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bits_for_any_number_of_threads(threads: int) -> None:
    x = heavy_tailed((300_001,), torch.float32, torch.device("cpu"))
    codes, state = quantize_blockwise(x)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        again, again_state = quantize_blockwise(x)
        assert torch.equal(again, codes)
        assert torch.equal(again_state.absmax, state.absmax)
        assert torch.equal(dequantize_blockwise(again, state), dequantize_blockwise(codes, state))
    finally:
        torch.set_num_threads(before)


@given(
    numel=st.integers(0, 700),
    blocksize=st.sampled_from(BLOCKSIZES),
    dtype=st.sampled_from(FLOATS),
    exponent=st.integers(-40, 30),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_error_is_at_most_half_a_gap(
    numel: int, blocksize: int, dtype: torch.dtype, exponent: int, seed: int
) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2.0**exponent
    x = x.to(dtype)
    x = torch.where(torch.isfinite(x), x, 0)
    codes, state = quantize_blockwise(x, blocksize=blocksize)
    assert_nearest(x, codes, state.absmax, create_dynamic_map(), blocksize)
    again, again_state = quantize_blockwise(
        dequantize_blockwise(codes, absmax=state.absmax, blocksize=blocksize)
    )
    assert again.shape == codes.shape
    assert again_state.absmax.numel() == -(-numel // 256)


@given(values=st.lists(st.floats(width=32), min_size=1, max_size=300))
@settings(deadline=None, max_examples=100)
def test_any_floats_at_all(values: list[float]) -> None:
    x = torch.tensor(values)
    codes, state = quantize_blockwise(x)
    back = dequantize_blockwise(codes, state)
    finite = torch.isfinite(reference.expand(state.absmax, len(values), 256))
    assert torch.equal(torch.isfinite(back), finite)
    if bool(finite.all()):
        assert_nearest(x, codes, state.absmax, create_dynamic_map(), 256)


# -- bad input --------------------------------------------------------------------------------------

X = torch.zeros(300)
CODES = torch.zeros(300, dtype=torch.uint8)
STATE = QuantState(torch.zeros(2), X.shape)
ROOM = torch.zeros(307, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"A": [1.0]}, TypeError, "A must be a tensor, got list"),
        ({"A": X.double()}, ValueError, "A must be float32, float16 or bfloat16, got torch.float64"),
        ({"A": X.to(torch.complex64)}, ValueError, "got torch.complex64"),
        ({"A": X.int()}, ValueError, "got torch.int32"),
        ({"A": X.to_sparse()}, ValueError, "A must be a dense tensor"),
        ({"A": X.to("meta")}, ValueError, "A must be on a CPU or CUDA device, got meta"),
        ({"blocksize": 100}, ValueError, "blocksize must be one of 64, 128, .*, got 100"),
        ({"blocksize": 0}, ValueError, "got 0"),
        ({"blocksize": 8192}, ValueError, "got 8192"),
        (
            {"code": torch.zeros(16)},
            ValueError,
            r"code must hold 256 float32 values, got torch.float32 of shape \(16,\)",
        ),
        ({"code": torch.zeros(256).double()}, ValueError, "got torch.float64"),
        ({"code": list(range(256))}, TypeError, "code must be a tensor"),
        ({"absmax": torch.zeros(3)}, ValueError, r"absmax must be float32 of shape \(2,\) for 300 elements"),
        ({"absmax": torch.zeros(2).double()}, ValueError, "got torch.float64"),
        ({"out": X}, ValueError, "out must be torch.uint8, got torch.float32"),
        ({"out": CODES[:299]}, ValueError, r"out has shape \(299,\), A has \(300,\)"),
        ({"out": CODES.to("meta")}, ValueError, "out must be on a CPU or CUDA device"),
        ({"out": X.view(torch.uint8)[900:]}, ValueError, "out must not share memory with A"),
        ({"absmax": X[298:]}, ValueError, "absmax must not share memory with A"),
        ({"absmax": ROOM[:8].view(torch.float32), "out": ROOM[7:]}, ValueError, "memory with absmax"),
    ],
)
def test_quantize_refuses(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        quantize_blockwise(**{"A": X, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"A": X}, ValueError, "A must hold uint8 codes, got torch.float32"),
        ({"quant_state": None}, ValueError, "absmax or quant_state must be given, got neither"),
        ({"quant_state": torch.zeros(2)}, TypeError, "quant_state must be a QuantState, got Tensor"),
        ({"absmax": torch.zeros(2)}, ValueError, "do not go together: give one"),
        ({"code": torch.zeros(256)}, ValueError, "do not go together: give one"),
        ({"blocksize": 512}, ValueError, "blocksize is 512, but quant_state has 256"),
        ({"A": CODES[:10]}, ValueError, r"absmax must be float32 of shape \(1,\) for 10 elements"),
        ({"quant_state": None, "absmax": torch.zeros(1)}, ValueError, r"shape \(2,\) for 300 elements"),
        ({"quant_state": None, "absmax": [0.0, 1.0]}, TypeError, "absmax must be a tensor"),
        ({"out": X.double()}, ValueError, "out must be torch.float32 or torch.float16 or torch.bfloat16"),
        ({"out": X[:10]}, ValueError, "out has shape"),
        ({"A": X.view(torch.uint8)[900:], "out": X}, ValueError, "out must not share memory with A"),
    ],
)
def test_dequantize_refuses(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        dequantize_blockwise(**{"A": CODES, "quant_state": STATE, **arguments})


def negated(numel: int) -> Tensor:
    """A view with torch's lazy negation bit: the memory holds the other sign."""
    return torch.complex(torch.zeros(numel), -torch.ones(numel)).conj().imag


def test_negated_views_are_read_and_not_written() -> None:
    assert negated(300).is_neg()
    codes, state = quantize_blockwise(negated(300))
    assert bool((codes == 255).all())
    for arguments in ({"absmax": negated(2)}, {"absmax": negated(2), "out": CODES.clone()}):
        with pytest.raises(ValueError, match="absmax is a negated view"):
            quantize_blockwise(X, **arguments)
    with pytest.raises(ValueError, match="out is a negated view"):
        dequantize_blockwise(codes, state, out=negated(300))


def test_state_moves_and_describes_itself() -> None:
    _, state = quantize_blockwise(X)
    state.to("cpu")
    assert torch.equal(state.code, create_dynamic_map())
    assert state.shape == X.shape
    assert "blocks=2" in repr(state)
    assert tw.optim.QuantState is QuantState
