"""The torch ops under the functional API: schemas, fake kernels, torch.compile, version counters."""

import pytest
import torch
from torch import Tensor

from tilewright.optim import create_dynamic_map, dequantize_blockwise, quantize_blockwise

ops = torch.ops.tilewright
NUMEL = [0, 1, 300]


def samples(device: torch.device, numel: int, own_map: bool) -> dict[str, tuple]:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(device)
    code = create_dynamic_map(False).to(device) if own_map else None
    codes, absmax = ops.quantize_blockwise(x, code, True, 64)
    return {
        "quantize_blockwise": (x, code, True, 64),
        "quantize_blockwise_out": (x, code, True, 64, torch.zeros_like(codes), torch.zeros_like(absmax)),
        "dequantize_blockwise": (codes, absmax, code, True, 64, torch.float16),
        "dequantize_blockwise_out": (codes, absmax, code, True, 64, torch.zeros_like(x)),
    }


@pytest.mark.parametrize("own_map", [False, True])
@pytest.mark.parametrize("numel", NUMEL)
@pytest.mark.parametrize("name", sorted(samples(torch.device("cpu"), 1, False)))
def test_opcheck(backend, name: str, numel: int, own_map: bool) -> None:
    torch.library.opcheck(getattr(ops, name).default, samples(backend.device, numel, own_map)[name])


def round_trip(x: Tensor, code: Tensor | None = None) -> tuple[Tensor, Tensor]:
    codes, state = quantize_blockwise(x * 2, code, blocksize=128)
    return codes, dequantize_blockwise(codes, state) + 1


def round_trip_in_place(x: Tensor, codes: Tensor, absmax: Tensor, out: Tensor) -> Tensor:
    _, state = quantize_blockwise(x, absmax=absmax, out=codes)
    dequantize_blockwise(codes, state, out=out)
    return out * 2


@pytest.mark.slow
@pytest.mark.parametrize("own_map", [False, True])
def test_compiles_without_graph_breaks(own_map: bool) -> None:
    code = torch.linspace(-1, 1, 256) if own_map else None
    compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager")
    for x in (torch.randn(300), torch.randn(20, 30).bfloat16(), torch.randn(10, requires_grad=True)):
        for actual, expected in zip(compiled(x, code), round_trip(x, code), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.slow
def test_the_mutating_forms_compile_without_graph_breaks() -> None:
    x = torch.randn(300)
    arguments = x, torch.empty(300, dtype=torch.uint8), torch.empty(2), torch.empty(300)
    expected = round_trip_in_place(*(t.clone() for t in arguments))
    compiled = torch.compile(round_trip_in_place, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), expected)
    assert torch.equal(arguments[3] * 2, expected)


def test_a_compiled_call_returns_a_state() -> None:
    compiled = torch.compile(lambda x: quantize_blockwise(x), fullgraph=True, backend="eager")
    x = torch.randn(300)
    codes, state = compiled(x)
    assert torch.equal(dequantize_blockwise(codes, state), dequantize_blockwise(*quantize_blockwise(x)))


def test_writing_to_a_saved_tensor_is_noticed() -> None:
    """Autograd must not go on with a value that an op overwrote."""
    x = torch.randn(300)
    codes, state = quantize_blockwise(x)
    for write in (
        lambda t: dequantize_blockwise(codes, state, out=t),
        lambda t: quantize_blockwise(x[:64], absmax=t[:1]),
    ):
        weight = torch.randn(300, requires_grad=True)
        saved = torch.randn(300)
        result = (weight * saved).sum()
        write(saved)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.backward()


def test_every_output_counts_as_modified(backend) -> None:
    x = torch.randn(300).to(backend.device)
    codes = torch.empty(300, dtype=torch.uint8, device=x.device)
    absmax, out = torch.empty(2, device=x.device), torch.empty_like(x)
    _, state = quantize_blockwise(x, out=codes, absmax=absmax)
    dequantize_blockwise(codes, state, out=out)
    assert [t._version for t in (x, codes, absmax, out)] == [0, 1, 1, 1]


def test_gradients_do_not_flow() -> None:
    x = torch.randn(300, requires_grad=True)
    codes, state = quantize_blockwise(x)
    assert not state.absmax.requires_grad
    assert not dequantize_blockwise(codes, state).requires_grad


def test_fake_tensors_have_the_shapes_of_real_ones() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        codes, absmax = ops.quantize_blockwise(torch.empty(3, 100, dtype=torch.bfloat16), None, True, 64)
        assert (codes.shape, codes.dtype) == ((3, 100), torch.uint8)
        assert (absmax.shape, absmax.dtype) == ((5,), torch.float32)
        values = ops.dequantize_blockwise(codes, absmax, None, True, 64, torch.float16)
        assert (values.shape, values.dtype) == ((3, 100), torch.float16)
