"""mamba_inner against its formula: values, every gradient, layouts, options, autocast, what it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tilewright as tw
from backends import Backend
from reference.mamba_inner import mamba_inner as reference

REQUIRED = ("xz", "conv1d_weight", "x_proj_weight", "delta_proj_weight", "out_proj_weight", "A")
OPTIONAL = (
    "conv1d_bias", "out_proj_bias", "D", "delta_bias", "B_proj_bias", "C_proj_bias", "b_rms_weight",
    "c_rms_weight", "dt_rms_weight",
)  # fmt: skip
# float32 in half precision
WEIGHTS = ("A", "D", "delta_bias", "b_rms_weight", "c_rms_weight", "dt_rms_weight")


def problem(
    batch: int = 2,
    dim: int = 6,
    length: int = 7,
    states: int = 3,
    rank: int = 2,
    *,
    dtype: torch.dtype = torch.float32,
    optional: tuple[str, ...] = OPTIONAL,
    given: tuple[str, ...] = (),
    complex_A: bool = False,
    norm_before: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64) * scale

    numbers, features = states * (2 if complex_A else 1), 5
    A = -torch.rand(dim, states, generator=g, dtype=torch.float64) - 0.2
    arguments = {
        "xz": normal(batch, length, 2 * dim).transpose(1, 2),
        "conv1d_weight": normal(dim, 1, 4, scale=0.5),
        "conv1d_bias": normal(dim),
        "x_proj_weight": normal(rank + 2 * numbers, dim, scale=dim**-0.5),
        "delta_proj_weight": normal(dim, rank),
        "out_proj_weight": normal(features, dim, scale=dim**-0.5),
        "out_proj_bias": normal(features),
        "A": torch.complex(A, normal(dim, states)) if complex_A else A,
        "D": normal(dim),
        "delta_bias": normal(dim, scale=0.1),
        "B_proj_bias": normal(numbers),
        "C_proj_bias": normal(numbers),
        "b_rms_weight": normal(numbers) + 1,
        "c_rms_weight": normal(numbers) + 1,
        "dt_rms_weight": normal(rank if norm_before else dim) + 1,
    }
    for name in given:  # B or C from outside
        arguments[name] = normal(batch, states, length * (2 if complex_A else 1))
    names = (*REQUIRED, *optional, *given)
    found: dict[str, Any] = dict.fromkeys(("conv1d_bias", "out_proj_bias"))
    for name in names:
        value = arguments[name]
        kind = torch.promote_types(dtype, torch.float32) if name in WEIGHTS else dtype
        found[name] = value.to(kind.to_complex() if value.is_complex() else kind)
    return found


def results(run: Any, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The output and, of a sum with random weights, every gradient."""
    leaves = {k: v.detach().requires_grad_() for k, v in arguments.items() if isinstance(v, Tensor)}
    out = run(**{**arguments, **leaves})
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out.backward(cotangent.to(out))
    return {"out": out.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


def wide(arguments: dict[str, Any]) -> dict[str, Any]:
    kinds = {True: torch.complex128, False: torch.float64}
    return {k: v.to(kinds[v.is_complex()]) if isinstance(v, Tensor) else v for k, v in arguments.items()}


def shaken(arguments: dict[str, Any], seed: int) -> dict[str, Any]:
    """Each element of xz off by a few of float32's roundings."""
    xz = arguments["xz"]
    noise = torch.randn(xz.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {**arguments, "xz": (xz.double() + 4 * torch.finfo(torch.float32).eps * noise).to(xz)}


def largest_difference(exact: dict[str, Tensor], *others: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: max((other[name] - value).abs().max() for other in others) for name, value in exact.items()}


def check(arguments: dict[str, Any], terms: float = 1.0, **options: Any) -> None:
    """The rule of error, and twice what the exact result does when xz is rounded.

    Norms of small numbers magnify roundings. Terms as large as `terms` may cancel.
    """
    exact = results(lambda **a: reference(**a), wide(arguments))
    plain = largest_difference(exact, results(lambda **a: reference(**a), arguments))
    others = (results(lambda **a: reference(**a), shaken(wide(arguments), seed)) for seed in range(6))
    moved = largest_difference(exact, *others)
    actual = results(lambda **a: tw.scan.mamba_inner(**a, **options), arguments)
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        assert value is not None, name
        assert value.shape == exact[name].shape, name
        error = (value - exact[name]).abs().max()
        unit = torch.finfo(value.dtype).eps * max(exact[name].abs().max(), terms)
        assert error <= 2 * plain[name] + 32 * unit + 2 * moved[name], (
            f"{name}: off by {error:.2e}, plain PyTorch by {plain[name]:.2e}"
        )


def test_every_option_at_once(backend: Backend) -> None:
    check(problem())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    check(problem(dim=16, length=65, dtype=dtype))


@pytest.mark.parametrize("optional", [(), *((name,) for name in OPTIONAL)], ids=str)
def test_each_option_alone(optional: tuple[str, ...]) -> None:
    check(problem(optional=optional))


@pytest.mark.parametrize("length", [1, 2, 63, 65, 129])
@pytest.mark.parametrize("checkpoint_lvl", [0, 1])
def test_lengths(length: int, checkpoint_lvl: int) -> None:
    check(problem(length=length), checkpoint_lvl=checkpoint_lvl)


def test_norm_of_the_step_size_before_its_projection() -> None:
    check(problem(norm_before=True))


def test_complex_states() -> None:
    check(problem(complex_A=True))


@pytest.mark.parametrize("given", [("B",), ("C",), ("B", "C")])
@pytest.mark.parametrize("complex_A", [False, True])
def test_given_maps(given: tuple[str, ...], complex_A: bool) -> None:
    optional = ("D", "delta_bias", *(f"{name}_proj_bias" for name in ("B", "C") if name not in given))
    check(problem(given=given, optional=optional, complex_A=complex_A))


@pytest.mark.parametrize("seed", range(20))
def test_norms_of_one_number(seed: int) -> None:
    """What goes back through them is next to nothing, and all of it is left by terms that cancel."""
    check(problem(2, 1, 6, 1, 1, seed=seed), terms=100.0)


@given(
    batch=st.integers(1, 3), dim=st.integers(2, 9), length=st.integers(1, 20), states=st.integers(2, 5),
    rank=st.integers(1, 4), optional=st.sets(st.sampled_from(OPTIONAL)),
    layout=st.sampled_from(["last", "first"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_shapes_options_layouts(
    batch: int, dim: int, length: int, states: int, rank: int, optional: set[str], layout: str, seed: int
) -> None:
    arguments = problem(batch, dim, length, states, rank, optional=tuple(sorted(optional)), seed=seed)
    if layout == "first":
        arguments["xz"] = arguments["xz"].contiguous()
    check(arguments)


@pytest.mark.parametrize("complex_A", [False, True])
def test_gradcheck(complex_A: bool) -> None:
    arguments = problem(1, 3, 5, 2, dtype=torch.float64, complex_A=complex_A)
    names = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    leaves = [arguments[name].detach().requires_grad_() for name in names]
    torch.autograd.gradcheck(lambda *v: tw.scan.mamba_inner(**dict(zip(names, v, strict=True))), leaves)


def test_only_what_is_asked_for() -> None:
    arguments = problem()
    wanted = ("xz", "dt_rms_weight")
    leaves = {name: arguments[name].detach().requires_grad_() for name in wanted}
    tw.scan.mamba_inner(**{**arguments, **leaves}).sum().backward()
    every = {k: v.detach().requires_grad_() for k, v in arguments.items()}
    tw.scan.mamba_inner(**every).sum().backward()
    for name in wanted:
        assert torch.equal(leaves[name].grad, every[name].grad)


def test_no_gradient_wanted_is_the_same() -> None:
    arguments = problem(optional=("D",))
    with torch.no_grad():
        plain = tw.scan.mamba_inner(**arguments)
    assert torch.equal(plain, tw.scan.mamba_inner(**{**arguments, "D": arguments["D"].requires_grad_()}))


@pytest.mark.parametrize(("batch", "length"), [(0, 7), (2, 0)])
def test_empty(batch: int, length: int) -> None:
    found = results(tw.scan.mamba_inner, problem(batch=batch, length=length))
    assert found["out"].shape == (batch, length, 5)
    assert all(not value.any() for name, value in found.items() if name != "out")


def test_recomputing_keeps_less() -> None:
    def kept(checkpoint_lvl: int) -> int:
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        arguments = problem(dim=32, length=64)
        arguments["xz"].requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            tw.scan.mamba_inner(**arguments, checkpoint_lvl=checkpoint_lvl)
        return sum(seen.values())

    two_activations = 2 * 2 * 32 * 64 * 4
    assert kept(0) - kept(1) >= two_activations


def test_autocast_casts_what_the_incumbents_cast() -> None:
    arguments = problem(dim=16, length=33)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(tw.scan.mamba_inner, arguments)
    assert found["out"].dtype == torch.bfloat16
    assert all(found[f"d{name}"].dtype == value.dtype for name, value in arguments.items())
    exact = results(reference, wide(arguments))
    for name, value in found.items():
        assert (value - exact[name]).abs().max() <= 0.1 * exact[name].abs().max(), name


@pytest.mark.parametrize("threads", [1, 2])
def test_repeats_bit_for_bit(threads: int) -> None:
    """For a number of threads: torch's matrix products may differ between numbers."""
    arguments, before = problem(dim=33, length=129), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = [results(tw.scan.mamba_inner, arguments) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in found[0])


def test_compiles() -> None:
    arguments = problem()
    compiled = torch.compile(tw.scan.mamba_inner, fullgraph=True, backend="aot_eager")
    found, eager = results(compiled, arguments), results(tw.scan.mamba_inner, arguments)
    for name, value in eager.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_no_second_derivative() -> None:
    arguments = problem()
    arguments["xz"].requires_grad_()
    out = tw.scan.mamba_inner(**arguments).sum()
    with pytest.raises(NotImplementedError, match="twice"):
        torch.autograd.grad(out, arguments["xz"], create_graph=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"xz": torch.zeros(2, 5, 7)}, ValueError, r"xz must have shape \(batch, 2 \* dim, length\)"),
        ({"xz": "no"}, TypeError, "xz must be a tensor, got str"),
        ({"A": torch.zeros(5, 3)}, ValueError, r"A must have dim = 6 rows, got shape \(5, 3\)"),
        ({"x_proj_weight": torch.zeros(7, 6)}, ValueError, "x_proj_weight must have 8 rows"),
        ({"out_proj_weight": torch.zeros(5, 7)}, ValueError, "out_proj_weight must have dim = 6 columns"),
        ({"D": torch.zeros(5)}, ValueError, "D must have shape"),
        ({"dt_rms_weight": torch.zeros(5)}, ValueError, r"dt_rms_weight must have shape \(6,\) or \(2,\)"),
        ({"B": torch.zeros(2, 3, 7)}, ValueError, "B is given, so B_proj_bias"),
        ({"checkpoint_lvl": 2}, ValueError, "checkpoint_lvl must be 0 or 1, got 2"),
        ({"x_proj_weight": torch.zeros(8, 6).half()}, TypeError, "x_proj_weight must have dtype float32"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tw.scan.mamba_inner(**{**problem(), **change})
