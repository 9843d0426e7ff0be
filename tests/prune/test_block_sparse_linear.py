"""The ops of the block-sparse linear layer against float64, on every level and emulated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.prune.block_sparse_cases import Layer, make_layer, random
from tests.reference import block_sparse_linear as reference

from backends import Backend
from tilewright import _C
from tilewright.prune.ops.block_sparse import ACTIVATIONS, _fwd, _input_gradient, _weight_gradient

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCKS = [(8, 8), (16, 16), (32, 32), (64, 64), (128, 128), (8, 128), (128, 8), (16, 64), (32, 16)]


def allowed_error(plain: torch.Tensor, exact: torch.Tensor) -> float:
    """Twice the error of plain PyTorch in the dtype, and a little of the result's size."""
    if exact.numel() == 0:
        return 0.0
    atol = 4 * torch.finfo(plain.dtype).eps * exact.abs().max().item()
    return 2 * (plain.double() - exact).abs().max().item() + atol


def check(found: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, what: str = "") -> None:
    """The rule of error."""
    assert found.shape == exact.shape
    assert found.dtype == plain.dtype
    if exact.numel():
        error = (found.double() - exact).abs().max().item()
        assert error <= allowed_error(plain, exact), (what, error, allowed_error(plain, exact))


def check_layer(layer: Layer, tokens: int, activation: str, with_bias: bool, what: str = "") -> None:
    """All three products of one layer."""
    w, dtype, device = layer.weight, layer.weight.dtype, layer.weight.device
    out, into = w.shape
    x = random(tokens, into, dtype=dtype, device=device)
    bias = random(out, dtype=dtype, device=device, seed=2) if with_bias else None
    y, z = _fwd(x, layer.values, layer.pattern, bias, out, activation, True)
    plain_y, plain_z = reference.linear(x, w, bias, activation)
    wide_bias = bias.double() if bias is not None else None
    exact_y, exact_z = reference.linear(x.double(), w.double(), wide_bias, activation)
    check(z, plain_z, exact_z, f"{what} z")
    check(y, plain_y, exact_y, f"{what} y")
    dz = random(tokens, out, dtype=dtype, device=device, seed=3)
    dx = _input_gradient(dz, layer.values, layer.pattern, into)
    check(dx, dz @ w, dz.double() @ w.double(), f"{what} dx")
    dvalues = _weight_gradient(dz, x, layer.pattern, list(layer.values.shape))
    plain, exact = dz.T @ x, dz.double().T @ x.double()
    check(
        dvalues,
        reference.blocks(plain, layer.present, layer.block),
        reference.blocks(exact, layer.present, layer.block),
        f"{what} dW",
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: f"{b[0]}x{b[1]}")
def test_products(backend: Backend, block: tuple[int, int], dtype: torch.dtype) -> None:
    """Ragged sizes and empty block rows, from no token to more than a panel."""
    wide = max(block) + 9 if not backend.is_cpu else 2 * max(block) + 41
    layer = make_layer(wide + 4, wide, block, 0.5, dtype, backend.device)
    for tokens in (0, 1, 7, 17, 65) if backend.is_cpu else (1, 9, 65):
        check_layer(layer, tokens, "none", True, f"{tokens} tokens")


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 31, 32, 33, 63, 64, 127, 129])
def test_numbers_of_tokens(backend: Backend, tokens: int) -> None:
    """Every remainder of a panel and of the path for few tokens."""
    for dtype in DTYPES:
        check_layer(make_layer(40, 56, (16, 8), 0.6, dtype, backend.device), tokens, "none", False)


@pytest.mark.parametrize("size", [(1, 1), (7, 129), (63, 65), (65, 7), (127, 8), (129, 127)])
def test_ragged_sizes(backend: Backend, size: tuple[int, int]) -> None:
    """Weights that end inside a block."""
    for dtype in DTYPES:
        check_layer(make_layer(*size, (16, 32), 1.0, dtype, backend.device), 5, "none", True)
        check_layer(make_layer(*size, (16, 32), 1.0, dtype, backend.device), 19, "none", True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(backend: Backend, activation: str, dtype: torch.dtype) -> None:
    """In the epilogue of both paths, z kept and not."""
    layer = make_layer(48, 40, (16, 16), 0.7, dtype, backend.device)
    for tokens in (3, 21):
        check_layer(layer, tokens, activation, True)
        x = random(tokens, 40, dtype=dtype, device=backend.device)
        with_z, _ = _fwd(x, layer.values, layer.pattern, None, 48, activation, True)
        without, none = _fwd(x, layer.values, layer.pattern, None, 48, activation, False)
        assert torch.equal(with_z, without)
        assert none.shape == (0, 48)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_no_block_and_all_blocks(backend: Backend, density: float) -> None:
    """An empty weight gives activation(bias) and zero gradients; a full one is a dense layer."""
    for dtype in DTYPES:
        for tokens in (2, 20):
            check_layer(make_layer(33, 24, (8, 16), density, dtype, backend.device), tokens, "silu", True)


def test_strides(backend: Backend) -> None:
    """Transposed, stepped and expanded matrices are read as they are."""
    for dtype in DTYPES:
        layer = make_layer(40, 48, (16, 16), 0.6, dtype, backend.device)
        for tokens in (3, 37):
            plain = random(tokens, 48, dtype=dtype, device=backend.device)
            dz = random(tokens, 40, dtype=dtype, device=backend.device, seed=5)
            shape = list(layer.values.shape)
            for change in (
                lambda t: t.T.contiguous().T,
                lambda t: torch.stack([t, t], 2)[:, :, 0],
                lambda t: t[:1].expand(t.shape),
            ):
                x, d = change(plain), change(dz)
                same_x, same_d = x.contiguous(), d.contiguous()
                y, _ = _fwd(x, layer.values, layer.pattern, None, 40, "none", False)
                assert torch.equal(y, _fwd(same_x, layer.values, layer.pattern, None, 40, "none", False)[0])
                dx = _input_gradient(d, layer.values, layer.pattern, 48)
                assert torch.equal(dx, _input_gradient(same_d, layer.values, layer.pattern, 48))
                dw = _weight_gradient(d, x, layer.pattern, shape)
                assert torch.equal(dw, _weight_gradient(same_d, same_x, layer.pattern, shape))


def test_not_a_number_stays_in_its_token(backend: Backend) -> None:
    """NaN and infinity go where the formula sends them, and what sticks out of a weight is never read."""
    for dtype in DTYPES:
        layer = make_layer(20, 27, (8, 8), 1.0, dtype, backend.device)
        for tokens in (4, 33):
            x = random(tokens, 27, dtype=dtype, device=backend.device)
            x[1, 26], x[2, 0] = float("nan"), float("inf")
            for activation in ("none", "relu", "gelu"):
                y, _ = _fwd(x, layer.values, layer.pattern, None, 20, activation, False)
                assert bool(y[1].isnan().all())
                assert bool(y[0].isfinite().all())
                assert bool(y[3:].isfinite().all())
                assert not bool(y[2].isfinite().all())


def test_what_sticks_out_has_no_gradient(backend: Backend) -> None:
    """dW is zero outside of the weight, even where x or dz holds NaN."""
    for dtype in DTYPES:
        layer = make_layer(20, 27, (16, 16), 1.0, dtype, backend.device)
        x, dz = (random(9, n, dtype=dtype, device=backend.device) for n in (27, 20))
        x[3, 5], dz[2, 1] = float("nan"), float("inf")
        dw = _weight_gradient(dz, x, layer.pattern, list(layer.values.shape))
        assert dw.shape == (4, 16, 16)
        assert bool((dw[1::2, :, 11:] == 0).all())
        assert bool((dw[2:, 4:] == 0).all())
        assert bool(dw[0, :, 5].isnan().all())


def test_the_same_bits_every_time(backend: Backend) -> None:
    """Repeated, and with any number of threads."""
    layer = make_layer(96, 80, (16, 16), 0.5, torch.float32, backend.device)
    x, dz = (random(70, n, dtype=torch.float32, device=backend.device) for n in (80, 96))
    threads = torch.get_num_threads()

    def results() -> list[torch.Tensor]:
        few, _ = _fwd(x[:3], layer.values, layer.pattern, None, 96, "gelu", False)
        y, _ = _fwd(x, layer.values, layer.pattern, None, 96, "gelu", False)
        dx = _input_gradient(dz, layer.values, layer.pattern, 80)
        return [few, y, dx, _weight_gradient(dz, x, layer.pattern, list(layer.values.shape))]

    first = results()
    try:
        for count in (1, 2, 3) * (3 if backend.is_cpu else 1):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("block", [(8, 8), (16, 64)])
def test_float64(block: tuple[int, int]) -> None:
    """On the CPU, as exact as plain PyTorch."""
    for level in _C.cpu_levels():
        before = _C.cpu_level()
        _C.set_cpu_level(level)
        try:
            for activation in ACTIVATIONS:
                check_layer(make_layer(40, 70, block, 0.5, torch.float64), 9, activation, True)
        finally:
            _C.set_cpu_level(before)


@given(
    out=st.integers(1, 70),
    into=st.integers(1, 70),
    tokens=st.integers(0, 40),
    block=st.tuples(st.sampled_from([8, 16, 32]), st.sampled_from([8, 16, 64])),
    density=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
)
def test_any_layer(
    out: int, into: int, tokens: int, block: tuple[int, int], density: float, dtype: torch.dtype,
    activation: str, bias: bool,
) -> None:  # fmt: skip
    """Whatever the sizes."""
    check_layer(make_layer(out, into, block, density, dtype), tokens, activation, bias)


def test_ops_are_registered_properly() -> None:
    """Schemas, fake kernels, no hidden aliasing."""
    layer = make_layer(24, 32, (8, 16), 0.7, torch.float32)
    x, dz, bias = (random(*s, dtype=torch.float32) for s in ((5, 32), (5, 24), (24,)))
    ops = torch.ops.tilewright
    for keep in (False, True):
        torch.library.opcheck(
            ops.block_sparse_linear_fwd.default, (x, layer.values, layer.pattern, bias, 24, "gelu", keep)
        )
    torch.library.opcheck(ops.block_sparse_linear_dx.default, (dz, layer.values, layer.pattern, 32))
    torch.library.opcheck(
        ops.block_sparse_linear_dw.default, (dz, x, layer.pattern, list(layer.values.shape))
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(2, 12, 8)}, "values: 12 rows a block, allowed: 8, 16, 32, 64, 128"),
        ({"values": torch.zeros(2, 8)}, "values: must have shape"),
        ({"x": torch.zeros(3, 16, dtype=torch.float64)}, "x"),
        ({"pattern": torch.zeros(3, dtype=torch.int32)}, "pattern"),
        ({"bias": torch.zeros(7)}, "bias"),
    ],
)
def test_wrong_arguments(change: dict[str, torch.Tensor], message: str) -> None:
    """The op names what does not fit."""
    layer = make_layer(16, 16, (8, 8), 1.0, torch.float32)
    arguments = {"x": torch.zeros(3, 16), "values": layer.values, "pattern": layer.pattern, "bias": None}
    arguments |= change
    with pytest.raises((ValueError, TypeError), match=message):
        _fwd(*arguments.values(), 16, "none", False)
