"""The causal convolution: against float64, gradients, layouts, states, packed sequences, as a torch op."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tilewright.testing
from reference import causal_conv1d as reference
from tilewright.scan import causal_conv1d

HALVES = [torch.float16, torch.bfloat16]
FLOATS = [torch.float32, *HALVES]
LENGTHS = [1, 7, 63, 65, 127, 129]
LAYOUTS = ["rows", "columns", "sliced", "strided"]
# What rounding of a different order may add, per dtype, to values around one.
ATOL = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values in other places."""
    batch, dim, length = x.shape
    if layout == "rows":
        return x.contiguous()
    if layout == "columns":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":  # channel-last, a part of a wider tensor, as Mamba-2 splits its projection
        wide = x.new_zeros(batch, length, dim + 5)
        wide[..., 3 : 3 + dim] = x.transpose(1, 2)
        return wide[..., 3 : 3 + dim].transpose(1, 2)
    sparse = x.new_zeros(dim, batch, 2 * length + 1)
    sparse[..., 1::2] = x.transpose(0, 1)
    return sparse[..., 1::2].transpose(0, 1)


def make(
    batch: int,
    dim: int,
    length: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "rows",
    *,
    bias: bool = True,
    states: bool = False,
    packed: bool = False,
    weight_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    weight_dtype = weight_dtype or dtype
    found: dict[str, Any] = {
        "x": lay_out(normal(batch, dim, length).to(dtype), layout),
        "weight": (normal(dim, width) / width**0.5).to(weight_dtype),
    }
    if bias:
        found["bias"] = normal(dim).to(weight_dtype)
    if states:
        found["initial_states"] = normal(batch, dim, width - 1).to(dtype)
    if packed:
        starts = torch.rand(batch, length, generator=g) < 0.2
        found["seq_idx"] = starts.int().cumsum(1, dtype=torch.int32)
    return {name: tensor.to(device) for name, tensor in found.items()}


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    return {n: t.double() if t.is_floating_point() else t for n, t in arguments.items()}


def run(
    function: Any, arguments: dict[str, Any], grads: tuple[Tensor, Tensor], activation: str | None
) -> Any:
    """out, final_states and all gradients, by name."""
    leaves = {n: t.detach() for n, t in arguments.items()}  # detach keeps the strides
    for tensor in leaves.values():
        if tensor.is_floating_point():
            tensor.requires_grad_()
    if function is causal_conv1d:
        out, final = causal_conv1d(**leaves, return_final_states=True, activation=activation)
    else:
        out, final = function(**leaves, activation=activation)
    torch.autograd.backward([out, final], [grads[0].to(out.dtype), grads[1].to(out.dtype)])
    results = {"out": out.detach(), "final_states": final.detach()}
    results |= {f"d{n}": t.grad for n, t in leaves.items() if t.is_floating_point()}
    return results


def assert_close(arguments: dict[str, Any], activation: str | None) -> None:
    """The rule of error, against float64 and the same formula in the dtypes given."""
    x, width = arguments["x"], arguments["weight"].shape[1]
    g = torch.Generator().manual_seed(7)
    grads = (
        torch.randn(x.shape, generator=g, dtype=torch.float64).to(x),
        torch.randn(*x.shape[:2], width - 1, generator=g, dtype=torch.float64).to(x),
    )
    ours = run(causal_conv1d, arguments, grads, activation)
    exact = run(reference.causal_conv1d, widened(arguments), tuple(t.double() for t in grads), activation)
    plain = run(reference.causal_conv1d, arguments, grads, activation)
    for name, truth in exact.items():
        assert ours[name].shape == truth.shape, name
        assert ours[name].dtype == (x if name in ("out", "final_states") else arguments[name[1:]]).dtype
        if truth.numel() == 0:
            continue
        scale = max(1.0, float(truth.abs().max()))
        error = float((ours[name].double() - truth).abs().max())
        allowed = 2 * float((plain[name].double() - truth).abs().max()) + ATOL[ours[name].dtype] * scale
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def shape_for(backend: Any, batch: int, dim: int, length: int) -> tuple[int, int, int]:
    """The emulator runs a thread at a time: small tensors there."""
    return (
        (batch, dim, length) if backend.name != "emulated" else (min(batch, 2), min(dim, 5), min(length, 70))
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths_and_layouts(backend, length: int, layout: str) -> None:
    batch, dim, length = shape_for(backend, 2, 37, length)
    arguments = make(batch, dim, length, 4, layout=layout, states=length % 2 == 1, device=backend.device)
    assert_close(arguments, "silu")


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8])
def test_widths(backend, width: int, layout: str) -> None:
    for length in (3, 40):
        for packed in (False, True):
            arguments = make(
                2, 19, length, width, layout=layout, states=True, packed=packed, device=backend.device
            )
            assert_close(arguments, None if packed else "swish")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_types(backend, dtype: torch.dtype, layout: str) -> None:
    batch, dim, length = shape_for(backend, 2, 65, 127)
    for weight_dtype in (dtype, torch.float32):
        for packed in (False, True):
            arguments = make(
                batch, dim, length, 4, dtype, layout, states=True, packed=packed,
                weight_dtype=weight_dtype, device=backend.device,
            )  # fmt: skip
            assert_close(arguments, "silu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_sequences_with_states(backend, bias: bool, activation: str | None, layout: str) -> None:
    batch, dim, length = shape_for(backend, 3, 17, 129)
    for states in (False, True):
        arguments = make(batch, dim, length, 4, layout=layout, bias=bias, states=states, packed=True)
        arguments = {n: t.to(backend.device) for n, t in arguments.items()}
        assert_close(arguments, activation)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("length", [2047, 2049])
def test_long_sequences(layout: str, length: int) -> None:
    """Over several chunks."""
    assert_close(make(1, 35, length, 4, layout=layout, states=True, packed=length == 2049), "silu")


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_several_blocks_of_the_gpu_kernels(layout: str) -> None:
    with tilewright.testing.emulated():
        assert_close(make(1, 3, 700, 4, layout=layout, states=True, packed=True), "silu")
        assert_close(make(1, 140, 33, 4, torch.bfloat16, layout), "silu")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_whole_vectors_of_channels(backend, dtype: torch.dtype, packed: bool) -> None:
    for batch, dim, length in ((2, 16, 21), (1, 32, 3)):
        arguments = make(batch, dim, length, 4, dtype, "columns", states=True, packed=packed)
        assert_close({n: t.to(backend.device) for n, t in arguments.items()}, "silu")


def test_packed_equals_separate(backend) -> None:
    lengths = [1, 2, 30, 3, 8]
    total = sum(lengths)
    arguments = make(1, 6, total, 4, states=True, device=backend.device)
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seq_idx = numbers.to(torch.int32)[None].to(backend.device)
    out, final = causal_conv1d(**arguments, seq_idx=seq_idx, return_final_states=True, activation="silu")
    states, parts = arguments.pop("initial_states"), []
    for i, x in enumerate(arguments.pop("x").split(lengths, dim=2)):
        one, last = causal_conv1d(
            x,
            **arguments,
            initial_states=states if i == 0 else None,
            return_final_states=True,
            activation="silu",
        )
        parts.append(one)
    assert torch.equal(out, torch.cat(parts, dim=2))
    assert torch.equal(final, last)


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_in_pieces_equals_at_once(backend, layout: str) -> None:
    arguments = make(2, 5, 40, 4, layout=layout, states=True, device=backend.device)
    whole, whole_final = causal_conv1d(**arguments, return_final_states=True, activation="silu")
    states, parts = arguments.pop("initial_states"), []
    for x in arguments.pop("x").split([1, 2, 20, 17], dim=2):
        out, states = causal_conv1d(
            x, **arguments, initial_states=states, return_final_states=True, activation="silu"
        )
        parts.append(out)
    assert torch.equal(torch.cat(parts, dim=2), whole)
    assert torch.equal(states, whole_final)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_padding_is_zero_and_unseen(backend, dtype: torch.dtype) -> None:
    arguments = make(1, 5, 12, 3, device=backend.device)
    numbers = torch.tensor([[-1, 0, 0, 0, -1, -1, 0, 7, 7, 2**31 - 1, -1, -1]], dtype=dtype).to(
        backend.device
    )
    arguments["x"][:, :, numbers[0] < 0] = math.nan
    x = arguments["x"].requires_grad_()
    out, final = causal_conv1d(**arguments, seq_idx=numbers, return_final_states=True, activation="silu")
    assert bool((out[:, :, numbers[0] < 0] == 0).all())
    assert bool(out.isfinite().all())
    assert bool((final == 0).all())
    out.sum().backward()
    assert bool((x.grad[:, :, numbers[0] < 0] == 0).all())
    assert bool(x.grad.isfinite().all())


def test_numbers_wider_than_32_bits(backend) -> None:
    arguments = make(1, 3, 6, 3, device=backend.device)
    numbers = torch.tensor([[0, 0, 2**32, 2**32, 2**33, 0]], device=backend.device)
    small = torch.tensor([[0, 0, 1, 1, 2, 0]], device=backend.device)
    assert torch.equal(causal_conv1d(**arguments, seq_idx=numbers), causal_conv1d(**arguments, seq_idx=small))


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("states", [False, True])
def test_empty(backend, shape: tuple[int, int, int], states: bool) -> None:
    arguments = make(*shape, 4, states=states, device=backend.device)
    for tensor in arguments.values():
        tensor.requires_grad_()
    out, final = causal_conv1d(**arguments, return_final_states=True, activation="silu")
    assert out.shape == shape
    assert final.shape == (*shape[:2], 3)
    expected = arguments["initial_states"] if states else torch.zeros_like(final)
    assert torch.equal(final, expected) or shape[2] != 0
    (out.sum() + (2 * final).sum()).backward()
    assert bool((arguments["weight"].grad == 0).all())
    if states and shape[2] == 0:
        assert bool((arguments["initial_states"].grad == 2).all())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_has_the_layout_of_x(backend, layout: str) -> None:
    arguments = make(2, 6, 9, 4, layout=layout, device=backend.device)
    x = arguments["x"].requires_grad_()
    out = causal_conv1d(**arguments, activation="silu")
    assert out.is_contiguous() or layout in ("columns", "sliced")
    assert out.transpose(1, 2).is_contiguous() or layout in ("rows", "strided")
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert dx.stride() == out.stride()


def test_expanded_and_flipped_inputs_are_read_as_they_are(backend) -> None:
    base = make(1, 1, 20, 4, device=backend.device)
    x = base["x"].expand(2, 6, 20)
    weight, bias = base["weight"].expand(6, 4), base["bias"].expand(6)
    out = causal_conv1d(x, weight, bias, activation="silu")
    assert torch.equal(
        out, causal_conv1d(x.contiguous(), weight.contiguous(), bias.contiguous(), activation="silu")
    )
    half = torch.arange(20, device=backend.device)[None].expand(2, 20) // 4
    packed = causal_conv1d(x, weight, bias, seq_idx=half)
    assert torch.equal(packed, causal_conv1d(x.contiguous(), weight, bias, seq_idx=half.contiguous()))


def test_gradients_of_other_layouts(backend) -> None:
    """What comes back need not look like what went out."""
    arguments = make(2, 5, 21, 4, layout="columns", device=backend.device)
    grads = []
    for dout in (torch.ones(2, 5, 21), torch.ones(1, 1, 1).expand(2, 5, 21), torch.ones(2, 21, 5).mT):
        x = arguments["x"].detach().requires_grad_()
        causal_conv1d(x, arguments["weight"], activation="silu").backward(dout.to(backend.device))
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_infinity_and_nan_stay_where_they_belong(backend, layout: str) -> None:
    for bad in (math.inf, math.nan):
        arguments = make(1, 20, 40, 4, layout=layout, device=backend.device)
        x = arguments["x"].clone(memory_format=torch.preserve_format)
        clean = causal_conv1d(**arguments, activation="silu")
        x[0, 3, 10] = bad
        x[0, 4, 39] = bad
        x.requires_grad_()
        out = causal_conv1d(**(arguments | {"x": x}), activation="silu")
        touched = torch.zeros(40, dtype=torch.bool)
        touched[10:14] = True
        assert torch.equal(out[0, 3].cpu()[~touched], clean[0, 3].cpu()[~touched])
        assert torch.equal(out[0, 4].cpu()[:39], clean[0, 4].cpu()[:39])
        assert torch.equal(out[0, 5:], clean[0, 5:])
        reached = reference.causal_conv1d(
            x.double(), arguments["weight"].double(), arguments["bias"].double()
        )[0]
        assert torch.equal(out.isnan(), torch.nn.functional.silu(reached).isnan())
        out.backward(torch.ones_like(out))
        assert bool(x.grad[0, 5:].isfinite().all())
        assert bool(x.grad[0, 4, :36].isfinite().all())


def test_final_states_out(backend) -> None:
    arguments = make(2, 5, 9, 4, device=backend.device)
    target = torch.empty(2, 3, 5, device=backend.device).mT
    out, final = causal_conv1d(**arguments, return_final_states=True, final_states_out=target)
    assert final is target
    assert torch.equal(target, arguments["x"][:, :, -3:])
    assert torch.equal(out, causal_conv1d(**arguments))


def test_mixed_dtypes(backend) -> None:
    """A bias wider than the weight loses nothing; initial states take x's dtype."""
    arguments = make(2, 5, 9, 4, torch.bfloat16, states=True, device=backend.device)
    weight, bias = arguments["weight"], arguments["bias"].float() + 1e-4
    x, states = arguments["x"], arguments["initial_states"].float()
    out = causal_conv1d(x, weight, bias, initial_states=states)
    expected = causal_conv1d(x, weight.float(), bias, initial_states=states.bfloat16())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


def test_autocast_changes_nothing(backend) -> None:
    arguments = make(2, 5, 9, 4, device=backend.device)
    expected = causal_conv1d(**arguments, activation="silu")
    with torch.autocast(backend.device.type, dtype=torch.bfloat16):
        out = causal_conv1d(**arguments, activation="silu")
    assert torch.equal(out, expected)


# -- gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_gradcheck(length: int, activation: str | None, packed: bool) -> None:
    for layout in ("rows", "columns"):
        arguments = make(2, 2, length, 4, torch.float64, layout, states=True)
        leaves = [t.requires_grad_() for t in arguments.values()]
        seq_idx = (torch.arange(length)[None] // 3).expand(2, length) if packed else None

        def function(x: Tensor, weight: Tensor, bias: Tensor, states: Tensor, seq_idx: Any = seq_idx) -> Any:
            return causal_conv1d(x, weight, bias, seq_idx, states, True, activation=activation)

        assert torch.autograd.gradcheck(function, leaves)


def test_double_takes_every_width_and_layout() -> None:
    for width in (1, 2, 5, 8):
        for layout in LAYOUTS:
            assert_close(make(2, 5, 9, width, torch.float64, layout, states=True, packed=True), "silu")


def test_gradients_through_one_output_alone(backend) -> None:
    arguments = make(2, 5, 9, 4, states=True, device=backend.device)
    for tensor in arguments.values():
        tensor.requires_grad_()
    _, final = causal_conv1d(**arguments, return_final_states=True)
    final.sum().backward()
    expected = torch.zeros_like(arguments["x"])
    expected[:, :, -3:] = 1
    assert torch.equal(arguments["x"].grad, expected)
    assert bool((arguments["weight"].grad == 0).all())
    assert bool((arguments["initial_states"].grad == 0).all())


def test_no_second_derivative() -> None:
    x = torch.randn(1, 2, 5, requires_grad=True)
    out = causal_conv1d(x, torch.randn(2, 3))
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


# -- the same bits ----------------------------------------------------------------------------------------


def all_bits(arguments: dict[str, Any]) -> list[Tensor]:
    x, width = arguments["x"], arguments["weight"].shape[1]
    g = torch.Generator().manual_seed(3)
    grads = (torch.randn(x.shape, generator=g), torch.randn(*x.shape[:2], width - 1, generator=g))
    return list(run(causal_conv1d, arguments, grads, "silu").values())


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_same_bits_for_any_number_of_threads(layout: str) -> None:
    arguments = make(2, 70, 2100, 4, layout=layout, states=True, packed=True)
    expected = all_bits(arguments)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            for again, bits in zip(all_bits(arguments), expected, strict=True):
                assert torch.equal(again, bits)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_same_bits_for_any_seed_of_the_emulator(layout: str) -> None:
    arguments = make(2, 5, 300, 4, layout=layout, states=True, packed=True)
    with tilewright.testing.emulated(seed=1):
        expected = all_bits(arguments)
    for seed in (2, 3):
        with tilewright.testing.emulated(seed=seed):
            for again, bits in zip(all_bits(arguments), expected, strict=True):
                assert torch.equal(again, bits)


# -- any input ---------------------------------------------------------------------------------------------


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(0, 90)),
    width=st.integers(1, 8),
    dtypes=st.sampled_from([(torch.float64, torch.float64), *((x, w) for x in FLOATS for w in FLOATS)]),
    layout=st.sampled_from(LAYOUTS),
    flags=st.tuples(*[st.booleans()] * 4),
    seed=st.integers(0, 1000),
)
@settings(deadline=None)
def test_any_shape_dtype_and_option(
    shape: tuple[int, int, int],
    width: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    layout: str,
    flags: tuple[bool, bool, bool, bool],
    seed: int,
) -> None:
    bias, states, packed, silu = flags
    arguments = make(
        *shape,
        width,
        dtypes[0],
        layout,
        bias=bias,
        states=states,
        packed=packed,
        weight_dtype=dtypes[1],
        seed=seed,
    )
    assert_close_mixed(arguments, "silu" if silu else None)


def assert_close_mixed(arguments: dict[str, Any], activation: str | None) -> None:
    """The forward pass against float64, whose result is rounded to x's dtype."""
    x = arguments["x"]
    out, final = causal_conv1d(**arguments, return_final_states=True, activation=activation)
    exact, last = reference.causal_conv1d(**widened(arguments), activation=activation)
    torch.testing.assert_close(out, exact.to(x.dtype), rtol=2 * torch.finfo(x.dtype).eps, atol=1e-5)
    assert torch.equal(final, last.to(x.dtype))


# -- as a torch op -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("options", [False, True])
def test_opcheck(backend, options: bool, layout: str) -> None:
    a = make(2, 5, 9, 4, layout=layout, bias=options, states=options, packed=options, device=backend.device)
    common = (a["x"], a["weight"], a.get("bias"), a.get("seq_idx"), a.get("initial_states"), options)
    torch.library.opcheck(torch.ops.tilewright.causal_conv1d_fwd.default, (*common, options))
    dfinal = torch.randn(2, 5, 3, device=backend.device) if options else None
    dout = torch.randn_like(a["x"])
    torch.library.opcheck(torch.ops.tilewright.causal_conv1d_bwd.default, (dout, dfinal, *common))


@pytest.mark.slow
@pytest.mark.parametrize("states", [False, True])
def test_compiles_without_graph_breaks(states: bool) -> None:
    def step(x: Tensor, weight: Tensor, bias: Tensor, initial_states: Tensor | None) -> tuple[Tensor, ...]:
        found = causal_conv1d(
            x * 2, weight, bias, initial_states=initial_states, return_final_states=states, activation="silu"
        )
        return tuple(t + 1 for t in found) if states else (found + 1,)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (9, 20):
        results = []
        for function in (step, compiled):
            a = make(2, 5, length, 4, layout="columns", states=states)
            leaves = [t.requires_grad_() for t in a.values()]
            found = function(a["x"], a["weight"], a["bias"], a.get("initial_states"))
            sum(t.square().sum() for t in found).backward()
            results.append([*found, *(t.grad for t in leaves)])
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


# -- bad input -----------------------------------------------------------------------------------------------

X, W = torch.zeros(2, 6, 9), torch.zeros(6, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": X.int()}, TypeError, "x must have dtype float32, float16, bfloat16, float64, got int32"),
        ({"x": X[0]}, ValueError, r"x must have shape \(batch, dim, length\), got \(6, 9\)"),
        ({"x": X.to_sparse()}, ValueError, "x must be a dense tensor"),
        ({"x": X.to("meta")}, ValueError, "x must be on a CPU or CUDA device, got meta"),
        ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
        ({"weight": W[:5]}, ValueError, r"weight must have shape \(dim, width\) with dim = 6, got \(5, 4\)"),
        ({"weight": W[:, None]}, ValueError, r"got \(6, 1, 4\)"),
        ({"weight": W.double()}, TypeError, "weight must have dtype float32, float16, bfloat16, got float64"),
        ({"weight": torch.zeros(6, 9)}, ValueError, r"weight must have 1 to 8 taps \(width\), got 9"),
        ({"weight": torch.zeros(6, 0)}, ValueError, "got 0"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must have shape \(dim,\) = \(6,\), got \(5,\)"),
        ({"bias": torch.zeros(6).long()}, TypeError, "bias must have dtype"),
        ({"x": X.double()}, TypeError, "weight must have dtype float64, got float32"),
        ({"seq_idx": torch.zeros(2, 9)}, TypeError, "seq_idx must have dtype int32, int64, got float32"),
        (
            {"seq_idx": torch.zeros(2, 8).int()},
            ValueError,
            r"seq_idx must have shape \(batch, length\) = \(2, 9\)",
        ),
        (
            {"initial_states": X},
            ValueError,
            r"initial_states must have shape .* = \(2, 6, 3\), got \(2, 6, 9\)",
        ),
        ({"initial_states": X[..., :3].int()}, TypeError, "initial_states must have dtype"),
        (
            {"final_states_out": X[..., :3]},
            ValueError,
            "return_final_states is False: nothing would be",
        ),
        (
            {"final_states_out": X, "return_final_states": True},
            ValueError,
            "final_states_out must have shape",
        ),
        (
            {"final_states_out": X[..., :3].half(), "return_final_states": True},
            TypeError,
            "final_states_out must have dtype float32, got float16",
        ),
        ({"activation": "relu"}, ValueError, "activation must be 'silu', 'swish' or None, got 'relu'"),
        ({"activation": True}, ValueError, "got True"),
    ],
)
def test_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        causal_conv1d(**({"x": X, "weight": W} | arguments))


def test_negated_views_are_read() -> None:
    x = torch.complex(torch.zeros(2, 6, 9), -torch.randn(2, 6, 9)).conj().imag
    assert x.is_neg()
    assert torch.equal(causal_conv1d(x, W + 1), causal_conv1d(x.clone(), W + 1))
