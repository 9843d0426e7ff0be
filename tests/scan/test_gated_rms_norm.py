"""The gated RMS norm: against float64, gradients, strides, groups, as a torch op."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tilewright.testing
from reference import gated_rms_norm as reference
from tilewright.scan import gated_rms_norm
from tilewright.scan.ops import norm as ops

HALVES = [torch.float16, torch.bfloat16]
FLOATS = [torch.float32, *HALVES]
LAYOUTS = ["contiguous", "sliced", "shifted", "transposed", "expanded"]
GATES = [None, False, True]  # no gate, or norm_before_gate
# What rounding of a different order may add, per dtype, to values around one.
ATOL = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values in other places."""
    dim = x.shape[-1]
    if layout == "contiguous":
        return x.contiguous()
    if layout in ("sliced", "shifted"):  # a part of a wider tensor, as Mamba-2 splits its projection
        start = 16 if layout == "sliced" else 3
        wide = x.new_zeros(*x.shape[:-1], (start + dim + 31) // 16 * 16)
        wide[..., start : start + dim] = x
        return wide[..., start : start + dim]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x[:1].expand(x.shape)


def make(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
    z: bool = True,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    found = {
        "x": lay_out(normal(*shape).to(dtype), layout if layout == "expanded" else "contiguous"),
        "weight": normal(shape[-1]).to(weight_dtype or dtype),
    }
    if layout == "transposed":
        found["x"] = lay_out(found["x"], layout)
    if z:
        found["z"] = lay_out((2 * normal(*shape)).to(dtype), layout)
    return {name: tensor.to(device) for name, tensor in found.items()}


def run(function: Any, arguments: dict[str, Any], dout: Tensor, **options: Any) -> dict[str, Tensor]:
    """out and all gradients, by name."""
    leaves = {n: t.detach().requires_grad_() for n, t in arguments.items()}  # detach keeps the strides
    out = function(**leaves, **options)
    gradients = torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype))
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), **named}


def assert_close(arguments: dict[str, Any], **options: Any) -> None:
    """The rule of error, against float64 and the same formula in the dtypes given."""
    x = arguments["x"]
    dout = torch.randn(x.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(x)
    ours = run(gated_rms_norm, arguments, dout, **options)
    exact = run(
        reference.gated_rms_norm, {n: t.double() for n, t in arguments.items()}, dout.double(), **options
    )
    plain = run(reference.gated_rms_norm, arguments, dout, **options)
    for name, truth in exact.items():
        assert ours[name].shape == truth.shape, name
        assert ours[name].dtype == (x if name == "out" else arguments[name[1:]]).dtype, name
        if truth.numel() == 0:
            continue
        scale = max(1.0, float(truth.abs().max()))
        error = float((ours[name].double() - truth).abs().max())
        allowed = 2 * float((plain[name].double() - truth).abs().max()) + ATOL[ours[name].dtype] * scale
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_close_in_each_order(arguments: dict[str, Any], **options: Any) -> None:
    for norm_before_gate in (False, True):
        assert_close(arguments, norm_before_gate=norm_before_gate, **options)


@pytest.mark.parametrize("dim", [1, 7, 16, 63, 64, 65, 129, 257])
@pytest.mark.parametrize("gate", GATES)
def test_sizes(backend, gate: bool | None, dim: int) -> None:
    for rows in (1, 5):
        arguments = make(rows, dim, z=gate is not None, device=backend.device)
        assert_close(arguments, norm_before_gate=bool(gate), eps=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_layouts(backend, dtype: torch.dtype, layout: str) -> None:
    for dim in (32, 37):
        arguments = make(2, 3, dim, dtype=dtype, layout=layout, device=backend.device)
        assert_close_in_each_order(arguments)


@pytest.mark.parametrize("weight_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes(backend, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    for dim in (48, 21):
        arguments = make(9, dim, dtype=dtype, weight_dtype=weight_dtype, device=backend.device)
        assert_close_in_each_order(arguments)
        del arguments["z"]
        assert_close(arguments)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("dim", "group_size"), [(6, 1), (21, 3), (64, 8), (96, 32), (120, 40), (70, 35)])
def test_groups(backend, dim: int, group_size: int, dtype: torch.dtype) -> None:
    arguments = make(4, dim, dtype=dtype, device=backend.device)
    assert_close_in_each_order(arguments, group_size=group_size)


def test_groups_are_norms_of_their_own(backend) -> None:
    arguments = make(3, 48, device=backend.device)
    whole = gated_rms_norm(**arguments, group_size=16)
    parts = [
        gated_rms_norm(**{n: t[..., i : i + 16] for n, t in arguments.items()}) for i in range(0, 48, 16)
    ]
    torch.testing.assert_close(whole, torch.cat(parts, -1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gate", GATES)
def test_groups_wider_than_what_is_kept(gate: bool | None) -> None:
    """CPU kernels compute the gate of others again; those of a GPU have their dweight in memory."""
    for dim in (4095, 4097, 10001):
        assert_close(make(2, dim, z=gate is not None), norm_before_gate=bool(gate))
    with tilewright.testing.emulated():
        for dim, rows, dtype in (
            (1025, 3, torch.float32),
            (5000, 2, torch.float32),
            (9000, 2, torch.bfloat16),
        ):
            arguments = make(rows, dim, dtype=dtype, z=gate is not None)
            assert_close(arguments, norm_before_gate=bool(gate))


def test_many_rows(backend) -> None:
    """Several parts of dweight, and on a GPU rows that one block takes in turn."""
    rows = 70 if backend.name == "emulated" else 600
    for dim, group_size in ((8, 8), (24, 3)):
        assert_close_in_each_order(make(rows, dim, device=backend.device), group_size=group_size)


def test_rows_that_a_block_takes_in_turn() -> None:
    with tilewright.testing.emulated():
        assert_close_in_each_order(make(1100, 4))
        assert_close_in_each_order(make(130, 140), group_size=10)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (0, 1)])
def test_no_rows(backend, shape: tuple[int, ...]) -> None:
    arguments = {n: t.requires_grad_() for n, t in make(*shape, device=backend.device).items()}
    out = gated_rms_norm(**arguments)
    assert out.shape == shape
    out.sum().backward()
    assert bool((arguments["weight"].grad == 0).all())
    assert arguments["x"].grad.shape == arguments["z"].grad.shape == shape


def test_any_number_of_axes(backend) -> None:
    arguments = make(12, 10, device=backend.device)
    expected = gated_rms_norm(**arguments)
    x, z, weight = arguments["x"], arguments["z"], arguments["weight"]
    for shape in ((2, 6, 10), (3, 1, 2, 2, 10), (12, 1, 10)):
        assert torch.equal(gated_rms_norm(x.view(shape), weight, z.view(shape)), expected.view(shape))
    assert torch.equal(gated_rms_norm(x[3], weight, z[3]), expected[3])


def test_strided_rows_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "contiguous", lambda x: 1 / 0)
    wide = torch.randn(2, 5, 40)
    for x in (wide[..., 3:19], wide[:, :1, 3:19], wide[:1, ::2, :16], wide[0, 0, :7], wide[:, 2:3, 4:5]):
        assert ops.in_rows(x) is x
    assert ops.in_rows(torch.zeros(1, 1, 4).expand(2, 5, 4)).stride() == (0, 0, 1)


def test_z_takes_the_dtype_of_x(backend) -> None:
    arguments = make(4, 20, dtype=torch.bfloat16, device=backend.device)
    expected = gated_rms_norm(**arguments)
    arguments["z"] = arguments["z"].float()
    assert torch.equal(gated_rms_norm(**arguments), expected)


def test_autocast_changes_nothing(backend) -> None:
    arguments = make(4, 20, device=backend.device)
    expected = gated_rms_norm(**arguments)
    with torch.autocast(backend.device.type, dtype=torch.bfloat16):
        out = gated_rms_norm(**arguments)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_stay_in_their_group(backend, bad: float, norm_before_gate: bool) -> None:
    for name in ("x", "z"):
        for at in (1, 17):  # in a whole vector, and behind the last one
            arguments = make(3, 36, device=backend.device)
            options = {"group_size": 18, "norm_before_gate": norm_before_gate}
            dout = torch.ones_like(arguments["x"])
            clean = run(gated_rms_norm, arguments, dout, **options)
            arguments[name][1, at] = bad
            found = run(gated_rms_norm, arguments, dout, **options)
            truth = run(reference.gated_rms_norm, arguments, dout, **options)
            assert torch.equal(found["out"].isnan(), truth["out"].isnan())
            for key in ("out", "dx", "dz"):
                assert torch.equal(found[key][[0, 2]], clean[key][[0, 2]])
                assert torch.equal(found[key][:, 18:], clean[key][:, 18:])
            assert bool(found["dweight"][18:].isfinite().all())


def test_rows_of_zeros(backend) -> None:
    arguments = make(3, 20, device=backend.device)
    arguments["x"][1] = 0
    assert_close_in_each_order(arguments, eps=1e-5)
    assert bool((gated_rms_norm(**arguments, eps=1e-5)[1] == 0).all())


def test_gates_far_from_zero(backend) -> None:
    """Where the exponential of one sign overflows."""
    arguments = make(2, 64, device=backend.device)
    arguments["z"] = torch.linspace(-200, 200, 128, device=backend.device).view(2, 64)
    assert_close_in_each_order(arguments)


def test_the_gate_opens_by_halves() -> None:
    """silu(z) is z to the last bit for large z: the norm alone is left."""
    x, weight = torch.randn(4, 50), torch.randn(50)
    out = gated_rms_norm(x, weight, torch.full_like(x, 64.0))
    torch.testing.assert_close(out, 64 * F.rms_norm(x, (50,), weight, 1e-6), rtol=1e-6, atol=1e-5)


# -- gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("dim", "group_size"), [(1, 1), (6, 6), (6, 3), (5, 1)])
def test_gradcheck(dim: int, group_size: int, gate: bool | None) -> None:
    for layout in ("contiguous", "sliced"):
        arguments = make(3, dim, dtype=torch.float64, z=gate is not None, layout=layout)
        leaves = [t.requires_grad_() for t in arguments.values()]

        def function(x: Tensor, weight: Tensor, z: Tensor | None = None) -> Tensor:
            return gated_rms_norm(x, weight, z, 1e-3, group_size, bool(gate))

        assert torch.autograd.gradcheck(function, leaves)


def test_double_takes_every_layout() -> None:
    for layout in LAYOUTS:
        assert_close_in_each_order(make(3, 2, 10, dtype=torch.float64, layout=layout), group_size=5)


def test_gradients_of_other_layouts(backend) -> None:
    """What comes back need not look like what went out."""
    arguments = make(2, 5, 21, device=backend.device)
    grads = []
    for dout in (torch.ones(2, 5, 21), torch.ones(1).expand(2, 5, 21), torch.ones(2, 21, 5).mT):
        grads.append(run(gated_rms_norm, arguments, dout.to(backend.device)))
    for other in grads[1:]:
        assert all(torch.equal(other[name], grads[0][name]) for name in other)


def test_gradients_of_some_inputs(backend) -> None:
    arguments = make(3, 20, device=backend.device)
    everything = run(gated_rms_norm, arguments, torch.ones(3, 20, device=backend.device))
    for name in arguments:
        given = dict(arguments)
        given[name] = given[name].detach().requires_grad_()
        gated_rms_norm(**given).sum().backward()
        assert torch.equal(given[name].grad, everything[f"d{name}"])


def test_no_second_derivative() -> None:
    x = torch.randn(2, 5, requires_grad=True)
    out = gated_rms_norm(x, torch.randn(5))
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_stale_inputs_are_noticed() -> None:
    arguments = {n: t.requires_grad_() for n, t in make(2, 5).items()}
    out = gated_rms_norm(**arguments)
    with torch.no_grad():
        arguments["z"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# -- the same bits ----------------------------------------------------------------------------------------


def all_bits(arguments: dict[str, Any], **options: Any) -> list[Tensor]:
    dout = torch.randn(arguments["x"].shape, generator=torch.Generator().manual_seed(3))
    return list(run(gated_rms_norm, arguments, dout.to(arguments["x"].dtype), **options).values())


@pytest.mark.parametrize("options", [{}, {"group_size": 35}, {"norm_before_gate": False}], ids=str)
def test_same_bits_for_any_number_of_threads(options: dict[str, Any]) -> None:
    arguments = make(300, 70)
    expected = all_bits(arguments, **options)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            for again, bits in zip(all_bits(arguments, **options), expected, strict=True):
                assert torch.equal(again, bits)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_seed_of_the_emulator(dtype: torch.dtype) -> None:
    arguments = make(20, 600, dtype=dtype)
    with tilewright.testing.emulated(seed=1):
        expected = all_bits(arguments)
    for seed in (2, 3):
        with tilewright.testing.emulated(seed=seed):
            for again, bits in zip(all_bits(arguments), expected, strict=True):
                assert torch.equal(again, bits)


def test_same_bits_wherever_the_rows_lie(backend) -> None:
    arguments = make(2, 6, 40, device=backend.device)
    expected = all_bits({n: t.cpu() for n, t in arguments.items()}) if backend.name != "cuda" else None
    sliced = {n: t if n == "weight" else lay_out(t, "sliced") for n, t in arguments.items()}
    if expected is not None:
        for again, bits in zip(all_bits(sliced), expected, strict=True):
            assert torch.equal(again, bits)


# -- any input ---------------------------------------------------------------------------------------------


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 20)),
    groups=st.tuples(st.integers(1, 5), st.integers(1, 60)),
    dtypes=st.sampled_from([(torch.float64, torch.float64), *((x, w) for x in FLOATS for w in FLOATS)]),
    layout=st.sampled_from(LAYOUTS),
    gate=st.sampled_from(GATES),
    eps=st.sampled_from([0.0, 1e-6, 1.0]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None)
def test_any_shape_dtype_and_option(
    shape: tuple[int, int],
    groups: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    layout: str,
    gate: bool | None,
    eps: float,
    seed: int,
) -> None:
    arguments = make(
        *shape, groups[0] * groups[1], dtype=dtypes[0], weight_dtype=dtypes[1], layout=layout,
        z=gate is not None, seed=seed,
    )  # fmt: skip
    options = {"eps": eps, "group_size": groups[1], "norm_before_gate": bool(gate)}
    out = gated_rms_norm(**arguments, **options)
    exact = reference.gated_rms_norm(**{n: t.double() for n, t in arguments.items()}, **options)
    rtol = 2 * torch.finfo(dtypes[0]).eps + 1e-6
    torch.testing.assert_close(out, exact.to(dtypes[0]), rtol=rtol, atol=1e-5)


# -- as a torch op -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
def test_opcheck(backend, gate: bool | None) -> None:
    a = make(2, 3, 12, z=gate is not None, layout="sliced", device=backend.device)
    common = (a["x"], a["weight"], a.get("z"))
    forward = torch.ops.tilewright.gated_rms_norm_fwd.default
    torch.library.opcheck(forward, (*common, 1e-5, 4, bool(gate)))
    rstd = forward(*common, 1e-5, 4, bool(gate))[1]
    backward = torch.ops.tilewright.gated_rms_norm_bwd.default
    torch.library.opcheck(backward, (torch.randn_like(a["x"]), *common, rstd, 4, bool(gate)))


@pytest.mark.slow
@pytest.mark.parametrize("gate", GATES)
def test_compiles_without_graph_breaks(gate: bool | None) -> None:
    def step(x: Tensor, weight: Tensor, z: Tensor | None = None) -> Tensor:
        return gated_rms_norm(x * 2, weight, z, 1e-5, 4, bool(gate)) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (9, 20):
        results = []
        for function in (step, compiled):
            leaves = {
                n: t.requires_grad_()
                for n, t in make(2, length, 12, z=gate is not None, layout="sliced").items()
            }
            found = function(**leaves)
            results.append([found, *torch.autograd.grad(found.square().sum(), list(leaves.values()))])
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


# -- bad input -----------------------------------------------------------------------------------------------

X, W = torch.zeros(2, 6), torch.zeros(6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": X.int()}, TypeError, "x must have dtype float32, float16, bfloat16, float64, got int32"),
        ({"x": X[0, 0]}, ValueError, r"x must have shape \(..., dim\) with dim at least 1, got \(\)"),
        ({"x": X[:, :0]}, ValueError, r"x must have shape .*, got \(2, 0\)"),
        ({"x": X.to_sparse()}, ValueError, "x must be a dense tensor"),
        ({"x": X.to("meta")}, ValueError, "x must be on a CPU or CUDA device, got meta"),
        ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
        ({"weight": W[:5]}, ValueError, r"weight must have shape \(dim,\) = \(6,\), got \(5,\)"),
        ({"weight": W.int()}, TypeError, "weight must have dtype"),
        ({"z": X[:1]}, ValueError, r"z must have shape that of x = \(2, 6\), got \(1, 6\)"),
        ({"z": X.bool()}, TypeError, "z must have dtype"),
        ({"eps": -1.0}, ValueError, r"eps must be a number in \[0, inf\), got -1.0"),
        ({"eps": "small"}, TypeError, "eps must be a number"),
        ({"group_size": 4}, ValueError, "group_size must divide the 6 channels of x, got 4"),
        ({"group_size": 0}, ValueError, "group_size must be a positive int, got 0"),
        ({"group_size": 2.0}, TypeError, "group_size must be a positive int, got 2.0"),
        ({"norm_before_gate": 1}, TypeError, "norm_before_gate must be True or False, got 1"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gated_rms_norm(**({"x": X, "weight": W, "z": X} | arguments))


def test_float64_is_refused_on_cuda() -> None:
    with (
        tilewright.testing.emulated(),
        pytest.raises(TypeError, match="bfloat16 on a CUDA device, got float64"),
    ):
        gated_rms_norm(X.double(), W.double())


def test_the_extension_checks_too() -> None:
    forward = torch.ops.tilewright.gated_rms_norm_fwd.default
    with pytest.raises(TypeError, match="weight must have dtype float32 or x's, got bfloat16"):
        forward(X, W.bfloat16(), None, 1e-6, 6, True)
    with pytest.raises(TypeError, match="z must have dtype float32, got float16"):
        forward(X, W, X.half(), 1e-6, 6, True)
    with pytest.raises(ValueError, match=r"z must have the shape of x: 2 rows of 6, got \(2, 5\)"):
        forward(X, W, X[:, :5].contiguous(), 1e-6, 6, True)
    with pytest.raises(ValueError, match="weight must have 6 elements"):
        forward(X, W[:5], None, 1e-6, 6, True)
