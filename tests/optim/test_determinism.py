"""The same bits every time: repeated, on any number of threads, for every order of the emulator's warps."""

import pytest
import torch
from optim_cases import CASES, FLOATS, assert_same_bits, make, parameters, run, snapshot

import tilewright as tw
from tilewright import _C, _backend
from tilewright.testing import emulated

CPU = torch.device("cpu")
NAMES = ["adamw", "lion", "sgd_nesterov"]
SIZES = [1, 300, 4097, 9000]


def result(
    name: str, dtype: torch.dtype, device: torch.device, sizes=SIZES, steps: int = 3
) -> list[torch.Tensor]:
    params = parameters(sizes, dtype, device)
    optimizer = make(CASES[name], params, param_precision="stochastic", seed=0, max_grad_norm=0.5)
    run(optimizer, steps)
    return snapshot(optimizer)


@pytest.mark.parametrize("name", NAMES)
def test_repeating(backend, name: str) -> None:
    first = result(name, torch.bfloat16, backend.device)
    for _ in range(2 if backend.name == "emulated" else 9):
        assert_same_bits(result(name, torch.bfloat16, backend.device), first)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads(name: str, threads: int) -> None:
    sizes = [*SIZES, 300_000, 100_001]
    before = torch.get_num_threads()
    first = result(name, torch.float32, CPU, sizes)
    torch.set_num_threads(threads)
    try:
        assert_same_bits(result(name, torch.float32, CPU, sizes), first)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_emulator_seeds(name: str, dtype: torch.dtype) -> None:
    """A missing barrier would show as bits that change with the order of warps."""
    results = []
    for seed in range(4):
        with emulated(seed):
            results.append(result(name, dtype, CPU, [1, 257, 4097], steps=2))
    for other in results[1:]:
        assert_same_bits(other, results[0])


def test_emulator_seeds_of_quantization() -> None:
    x = torch.randn(4097, generator=torch.Generator().manual_seed(0))
    code = torch.linspace(-1, 1, 256)
    for blocksize in (64, 256, 4096):
        for own in (None, code):
            results = []
            for seed in range(3):
                with emulated(seed):
                    codes, state = tw.optim.quantize_blockwise(x, own, blocksize=blocksize)
                    results.append([codes, state.absmax, tw.optim.dequantize_blockwise(codes, state)])
            for other in results[1:]:
                assert_same_bits(other, results[0])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_backend_agrees(backend, name: str, dtype: torch.dtype) -> None:
    """CPU levels and GPU code may differ by the last bit of a product, and so by one code in a great many."""
    actual = result(name, dtype, backend.device, [300, 9000], steps=1)
    before, _backend.C = _backend.C, _C
    try:
        expected = result(name, dtype, CPU, [300, 9000], steps=1)
    finally:
        _backend.C = before
    for a, b in zip(actual, expected, strict=True):
        if a.dtype == torch.uint8:
            difference = (a.cpu().int() - b.int()).abs()
            assert int(difference.max()) <= 1
            assert float((difference > 0).double().mean()) < 1e-3
        else:
            rtol = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(a.dtype, 0.0)
            torch.testing.assert_close(a.cpu(), b, rtol=rtol, atol=1e-6)
