"""Mamba-2's scan against its recurrence in float64, on every backend."""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reference import ssd_chunk_scan as reference
from tilewright import _C
from tilewright.scan import ssd_chunk_scan
from tilewright.testing import emulated

HALVES = [torch.float16, torch.bfloat16]
INPUTS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")


def make(
    batch: int,
    length: int,
    heads: int,
    head_dim: int,
    groups: int,
    states: int,
    *,
    wide: bool = False,
    sequences: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Inputs in float64, with values that half types and float32 hold exactly."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().to(torch.float16).double()

    return {
        "x": normal(batch, length, heads, head_dim),
        "dt": normal(batch, length, heads) - 1,
        "A": -normal(heads).abs() * 2,
        "B": normal(batch, length, groups, states),
        "C": normal(batch, length, groups, states),
        "D": normal(heads, head_dim) if wide else normal(heads),
        "z": normal(batch, length, heads, head_dim),
        "dt_bias": normal(heads),
        "initial_states": normal(sequences or batch, heads, head_dim, states),
    }


def in_dtype(
    inputs: dict[str, Tensor], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """As models hold them: activations in `dtype`, weights and states in float32 (float64)."""
    wide = torch.promote_types(dtype, torch.float32)
    narrow = ("x", "B", "C", "z")
    return {name: t.to(device, dtype if name in narrow else wide) for name, t in inputs.items()}


def ours(**inputs: Any) -> tuple[Tensor, Tensor]:
    return ssd_chunk_scan(**inputs, chunk_size=64, return_final_states=True)


def plain(dtype: torch.dtype, chunked: bool) -> Any:
    """The same by plain PyTorch in float32, rounded where tensors of `dtype` are made."""

    def run(**inputs: Any) -> tuple[Tensor, Tensor]:
        z = inputs.pop("z", None)
        wide = {
            k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()
        }
        y, states = (reference.chunked if chunked else reference.ssd_chunk_scan)(**wide)
        y = y.to(dtype)
        return (y if z is None else (y.float() * torch.nn.functional.silu(z.float())).to(dtype)), states

    return run


def results(
    function: Any, inputs: dict[str, Tensor], grads: tuple[Tensor, Tensor], **options: Any
) -> dict[str, Tensor]:
    """Outputs and the gradient of every input."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    out, states = function(**leaves, **options)
    found = torch.autograd.grad(
        [out, states], list(leaves.values()), [g.to(t) for g, t in zip(grads, (out, states), strict=True)],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    return {"out": out.detach(), "states": states.detach()} | dict(zip(leaves, found, strict=True))


def assert_close(found: dict[str, Tensor], exact: dict[str, Tensor], *plain_ones: dict[str, Tensor]) -> None:
    """The rule of error; sums of few elements, where luck decides, are held to a share of their size."""
    for name, value in found.items():
        if value.numel() == 0:
            continue
        error = (value.cpu().double() - exact[name]).abs().max().item()
        allowed = max((p[name].double() - exact[name]).abs().max().item() for p in plain_ones)
        size = exact[name].abs().max().item()
        assert error <= 2 * allowed + 3e-6 * size + 1e-6, f"{name}: {error} > 2 * {allowed}"


def output_grads(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, B = inputs["x"], inputs["B"]
    sequences = inputs["initial_states"].shape[0] if "initial_states" in inputs else x.shape[0]
    shape = (sequences, x.shape[2], x.shape[3], B.shape[3])
    return (
        torch.randn(x.shape, generator=generator).bfloat16().half().double(),
        torch.randn(shape, generator=generator).double(),
    )


_known: dict[str, list[dict[str, Tensor]]] = {}


def known_results(inputs: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> list[dict[str, Tensor]]:
    """The exact results and those of plain PyTorch, which are the same for every backend."""
    sums = {name: (tuple(t.shape), t.sum().item()) for name, t in inputs.items()}
    key = f"{sums} {dtype} {options}"
    if key not in _known:
        grads, low = output_grads(inputs), in_dtype(inputs, dtype)
        found = [results(reference.ssd_chunk_scan, inputs, grads, **options)]
        found.append(results(plain(dtype, False), low, grads, **options))
        if not {"seq_idx", "cu_seqlens"} & set(options):
            found.append(results(plain(dtype, True), low, grads, **options))
        _known[key] = found
    return _known[key]


def check(
    backend: Any, inputs: dict[str, Tensor], dtype: torch.dtype, without: tuple[str, ...] = (), **options: Any
) -> None:
    inputs = {name: t for name, t in inputs.items() if name not in without}
    on_device = {k: v.to(backend.device) if torch.is_tensor(v) else v for k, v in options.items()}
    found = results(ours, in_dtype(inputs, dtype, backend.device), output_grads(inputs), **on_device)
    assert_close(found, *known_results(inputs, dtype, **options))


SHAPES = [
    (2, 1, 2, 1, 1, 1),
    (1, 7, 4, 3, 2, 5),
    (2, 63, 3, 17, 3, 16),
    (1, 65, 2, 64, 1, 33),
    (1, 127, 2, 8, 1, 64),
    (2, 129, 4, 20, 2, 17),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_recurrence(backend, shape: tuple[int, ...]) -> None:
    check(backend, make(*shape), torch.float32, dt_softplus=True, dt_limit=(0.05, 2.0))


HALF_SHAPES = [(1, 7, 4, 3, 2, 5), (2, 65, 4, 16, 2, 17), (1, 129, 2, 64, 1, 64), (1, 66, 1, 130, 1, 129)]


def exactly(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Values that take all bits of `dtype`; bfloat16's would be half of float16's."""
    return {name: (t * 1.2345).to(dtype).double() for name, t in inputs.items()}


@pytest.mark.parametrize("without", [(), ("z",)], ids=["gated", "plain"])
@pytest.mark.parametrize("shape", HALF_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_activations_with_float32_weights(
    backend, dtype: torch.dtype, shape: tuple[int, ...], without: tuple[str, ...]
) -> None:
    check(backend, exactly(make(*shape, wide=True), dtype), dtype, without, dt_softplus=True)


@pytest.mark.parametrize("seed", [7, 8, 181])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sums_that_cancel(backend, dtype: torch.dtype, seed: int) -> None:
    """Of what goes into dA and ddt_bias a thousandth is left: 16 bits of it would not be enough."""
    inputs = exactly(make(1, 64, 2, 8, 2, 24, seed=seed), dtype)
    for without in ((), ("z",)):
        check(backend, inputs, dtype, without, dt_softplus=True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_several_heads_share_a_sum(backend, dtype: torch.dtype) -> None:
    """So many chunks that a block takes all heads of a group."""
    inputs = exactly(make(520, 2, 3, 4, 1, 5), dtype)
    check(backend, inputs, dtype, ("z", "initial_states"), dt_softplus=True)


@pytest.mark.parametrize(
    "without", [("z",), ("D", "dt_bias"), ("initial_states",), ("D", "z", "dt_bias", "initial_states")]
)
def test_optional_arguments(backend, without: tuple[str, ...]) -> None:
    inputs = make(2, 70, 2, 5, 1, 3)
    inputs["dt"] = inputs["dt"].abs()  # without softplus
    check(backend, inputs, torch.float32, without)


def test_wide_states_and_heads(backend) -> None:
    check(backend, make(1, 66, 1, 130, 1, 129), torch.float32, dt_softplus=True)


@pytest.mark.slow
@pytest.mark.parametrize("length", [2047, 2049])
def test_long_sequences(length: int) -> None:
    inputs = make(1, length, 2, 4, 1, 3)
    exact, _ = reference.ssd_chunk_scan(**inputs, dt_softplus=True)
    low = in_dtype(inputs, torch.float32)
    found, _ = ours(**low, dt_softplus=True)
    allowed, _ = reference.ssd_chunk_scan(**low, dt_softplus=True)
    assert (found - exact).abs().max() <= 2 * (allowed - exact).abs().max() + 1e-6


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_nothing_to_do(backend, shape: tuple[int, int]) -> None:
    inputs = in_dtype(make(*shape, 2, 3, 1, 4), torch.float32, backend.device)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    out, states = ours(**leaves)
    assert out.shape == (*shape, 2, 3)
    assert torch.equal(states, leaves["initial_states"])
    grads = torch.autograd.grad(out.sum() + (2 * states).sum(), list(leaves.values()))
    assert torch.equal(grads[-1], torch.full_like(grads[-1], 2.0))
    assert not any(bool(g.any()) for g in grads[:-1])


@pytest.mark.parametrize("without", [(), ("initial_states",)], ids=str)
def test_no_sequences(backend, without: tuple[str, ...]) -> None:
    inputs = in_dtype(make(1, 0, 2, 3, 1, 4), torch.float32, backend.device)
    inputs["initial_states"] = inputs["initial_states"][:0]
    leaves = {name: t.requires_grad_() for name, t in inputs.items() if name not in without}
    out, states = ours(**leaves, cu_seqlens=torch.zeros(1, dtype=torch.int64, device=backend.device))
    assert out.shape == (1, 0, 2, 3)
    assert states.shape == (0, 2, 3, 4)
    grads = torch.autograd.grad(out.sum() + states.sum(), list(leaves.values()))
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(grads, leaves.values(), strict=True))
    with pytest.raises(ValueError, match=r"increase strictly from 0 to the length 0, got \[0, 0\]"):
        ssd_chunk_scan(
            **{k: v for k, v in leaves.items() if k != "initial_states"}, chunk_size=8,
            cu_seqlens=torch.zeros(2, dtype=torch.int64, device=backend.device),
        )  # fmt: skip


# ---- sequences ----


CUTS = [0, 3, 4, 68, 70, 140]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_sequences(backend, dtype: torch.dtype) -> None:
    inputs = make(1, CUTS[-1], 2, 5, 1, 6, sequences=len(CUTS) - 1)
    check(backend, inputs, dtype, cu_seqlens=torch.tensor(CUTS), dt_softplus=True)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_packed_equals_separate(backend, dtype: torch.dtype) -> None:
    inputs = in_dtype(make(1, CUTS[-1], 2, 5, 1, 6, sequences=len(CUTS) - 1), dtype, backend.device)
    cu_seqlens = torch.tensor(CUTS, dtype=torch.int32, device=backend.device)
    out, states = ours(**inputs, cu_seqlens=cu_seqlens)
    for i, (a, b) in enumerate(pairwise(CUTS)):
        part = {k: v[:, a:b] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}
        part["initial_states"] = inputs["initial_states"][i : i + 1]
        one, state = ours(**part)
        assert torch.equal(out[:, a:b], one)
        assert torch.equal(states[i : i + 1], state)


@pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_seq_idx(backend, dtype: torch.dtype, activations: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    seq_idx = torch.randint(0, 12, (2, 140), generator=generator) // 11
    seq_idx[0, :70] = 5  # the first sequence needs not be number 0
    seq_idx[1, 64:] = 7
    check(backend, make(2, 140, 2, 5, 1, 6), activations, seq_idx=seq_idx.to(dtype), dt_softplus=True)


def test_seq_idx_within_packed_sequences(backend) -> None:
    seq_idx = torch.zeros(1, 140, dtype=torch.int64)
    seq_idx[0, 30:100] = 1
    inputs = make(1, 140, 2, 5, 1, 6, sequences=len(CUTS) - 1)
    check(backend, inputs, torch.float32, seq_idx=seq_idx, cu_seqlens=torch.tensor(CUTS), dt_softplus=True)


def test_one_initial_state_is_the_first_sequences(backend) -> None:
    inputs = in_dtype(make(1, 20, 2, 3, 1, 4), torch.float32, backend.device)
    cu_seqlens = torch.tensor([0, 8, 20], device=backend.device)
    one = ours(**inputs, cu_seqlens=cu_seqlens)
    state = inputs.pop("initial_states")
    two = ours(**inputs, initial_states=torch.cat([state, torch.zeros_like(state)]), cu_seqlens=cu_seqlens)
    seq_idx = (torch.arange(20, device=backend.device) >= 8).long()[None]
    three = ours(**inputs, initial_states=state, seq_idx=seq_idx)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    torch.testing.assert_close(one[0], three[0])
    torch.testing.assert_close(one[1][1:], three[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wrong_positions_on_a_device_stay_within_the_tensors(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """While a graph is captured nobody looks at them beforehand; they may give wrong numbers only."""
    monkeypatch.setattr("tilewright.scan.ops.ssd.check_boundaries", lambda *arguments: None)
    inputs = in_dtype(make(1, 100, 2, 3, 1, 4, sequences=4), dtype)
    positions_given = ([-5, 90, 3, 1000, 7], [99, 98, 97, 96, 95], [2**62, -(2**62), 0, 100, 2**40])
    for positions, multiprocessors in product(positions_given, (FEW, MANY)):
        with emulated(multiprocessors=multiprocessors):
            found = results(ours, inputs, output_grads(inputs), cu_seqlens=torch.tensor(positions))
        assert found["out"].shape == (1, 100, 2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_parts_equals_whole(backend, dtype: torch.dtype) -> None:
    """Multiples of the chunk give the same bits, other cuts the same numbers."""
    inputs = in_dtype(make(1, 200, 2, 5, 1, 6), dtype, backend.device)
    whole, last = ours(**inputs)
    for cuts, same_bits in (([0, 64, 192, 200], True), ([0, 1, 50, 199, 200], False)):
        state, outs = inputs["initial_states"], []
        for a, b in pairwise(cuts):
            part = {k: v[:, a:b] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}
            out, state = ours(**part | {"initial_states": state})
            outs.append(out)
        compare = torch.equal if same_bits else lambda a, b: torch.testing.assert_close(a, b) is None
        assert compare(torch.cat(outs, 1), whole)
        assert compare(state, last)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_a_nan_stays_where_it_belongs(backend, packed: bool, dtype: torch.dtype) -> None:
    """It reaches later steps of its sequence, and of gradients the earlier ones, and nothing else."""
    inputs = in_dtype(make(1, 100, 1, 3, 1, 4), dtype, backend.device)
    del inputs["initial_states"]
    inputs["x"][0, 40, 0, 1] = math.nan
    boundaries = torch.tensor([0, 20, 60, 100], device=backend.device)
    steps = torch.arange(100, device=backend.device)
    seq_idx = torch.bucketize(steps, boundaries, right=True)[None]
    options: dict[str, Any] = {"cu_seqlens": boundaries} if packed else {"seq_idx": seq_idx}
    inputs = {name: t.requires_grad_() for name, t in inputs.items()}
    out, _ = ours(**inputs, dt_softplus=True, **options)
    touched = out.isnan().any(-1).any(-1)[0]
    assert torch.equal(touched, (steps >= 40) & (steps < 60))
    dB, dC = torch.autograd.grad(out, [inputs["B"], inputs["C"]], torch.ones_like(out))
    assert torch.equal(dC.isnan().any(-1).any(-1)[0], (steps >= 40) & (steps < 60))
    assert not bool(dB.isnan().any(-1).any(-1)[0][(steps < 20) | (steps >= 60)].any())


def assert_as_float32(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """An infinity is close to itself alone, a NaN to NaN."""
    for name, one in found.items():
        other = expected[name].to(one.dtype)
        precision = max(torch.finfo(one.dtype).eps, 1e-4)
        size = other[other.isfinite()].abs().max().item() if bool(other.isfinite().any()) else 0.0
        torch.testing.assert_close(
            one,
            other,
            rtol=precision,
            atol=precision * size,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


FEW, MANY = 1, 10**6  # multiprocessors: states run through a kernel, or from kernel to kernel


@pytest.mark.parametrize("multiprocessors", [FEW, MANY])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", [*INPUTS, "dout", "dfinal"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_is_not_finite_is_the_formulas(
    dtype: torch.dtype, name: str, value: float, multiprocessors: int
) -> None:
    """Where tensor cores would mix infinities and the zeros of a mask: all is what float32 makes of it."""
    inputs = make(1, 150, 2, 70, 1, 6)
    dout, dfinal = output_grads(inputs)
    named = inputs | {"dout": dout, "dfinal": dfinal}
    places = {"x": (0, slice(None, None, 40), 1), "z": (0, slice(None, None, 40), 1), "dout": (0, 75, 1)}
    places |= {
        "dt": (0, slice(None, None, 40)),
        "B": (0, slice(None, None, 40)),
        "C": (0, slice(None, None, 40)),
    }
    named[name][places.get(name, ())][..., -1] = value
    grads = (named.pop("dout"), named.pop("dfinal"))
    low = in_dtype(named, dtype)
    high = {key: t.float() for key, t in low.items()}
    options = {"dt_softplus": True, "seq_idx": (torch.arange(150) // 70)[None]}
    with emulated(multiprocessors=multiprocessors):
        found, expected = (results(ours, inputs, grads, **options) for inputs in (low, high))
    assert_as_float32(found, expected)


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("x", (0, 10, 0), 1e30),
        ("initial_states", (0, 0), 6e37),
        ("dfinal", (0, 0), 1e38),
        ("dt", (0, 0, 1), 100.0),
    ],
)
def test_what_overflows_is_the_formulas(name: str, place: tuple[int, ...], value: float) -> None:
    """Finite numbers, whose sums of pieces have infinities of both signs where float32 has one, or none."""
    inputs = make(1, 70, 2, 5, 1, 6)
    del inputs["z"]  # through it, y of 16 bits
    inputs["dt"] = inputs["dt"].abs()
    dout, dfinal = output_grads(inputs)
    named = inputs | {"dout": dout, "dfinal": dfinal}
    named[name][place] = value
    if name == "x":
        named["B"][0, 10, 0] = 1e20
    elif name == "dt":
        named["A"][1] = 1.0
    else:
        named["A"] *= 1e-3
    grads = (named.pop("dout"), named.pop("dfinal"))
    low = in_dtype(named, torch.bfloat16)
    with emulated():
        found = results(ours, low, grads)
        expected = results(ours, {key: t.float() for key, t in low.items()}, grads)
    assert not all(bool(t.isfinite().all()) for t in expected.values())
    for key, exact in results(reference.ssd_chunk_scan, named, grads).items():
        if key in ("dt", "A", "dt_bias"):  # sums so large that float32 overflows too
            found[key][exact.isfinite()] = expected[key][exact.isfinite()] = 0
    assert_as_float32(found, expected)


@pytest.mark.parametrize("variant", ["whole", "bare", "packed", "resets"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_any_size_of_device_gives_the_same_bits(dtype: torch.dtype, variant: str) -> None:
    sequences = 3 if variant == "packed" else None
    inputs = make(1 if sequences else 2, 600, 2, 70, 1, 66, sequences=sequences)
    options: dict[str, Any] = {"dt_softplus": True}
    if variant == "packed":
        options["cu_seqlens"] = torch.tensor([0, 5, 450, 600])
    elif variant == "resets":
        options["seq_idx"] = (torch.arange(600) // 90).expand(2, 600)
    elif variant == "bare":
        del inputs["initial_states"]
    grads, low, found = output_grads(inputs), in_dtype(inputs, dtype), []
    for multiprocessors in (FEW, MANY):
        with emulated(multiprocessors=multiprocessors):
            found.append(results(ours, low, grads, **options))
    assert_same(*found)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_values_that_bfloat16_would_round_to_infinity(dtype: torch.dtype) -> None:
    """Finite in float32, so they give what float32 gives; C does not look at them."""
    inputs = in_dtype(make(1, 70, 2, 5, 1, 6), dtype)
    inputs["initial_states"][..., 0] = 3.4e38
    inputs["C"][..., 0] = 0
    with emulated():
        out, states = ours(**inputs, dt_softplus=True)
        expected, _ = ours(**{k: v.float() for k, v in inputs.items()}, dt_softplus=True)
    torch.testing.assert_close(out, expected.to(dtype))
    assert bool(states.isfinite().all())


def test_strong_decay_and_growth(backend) -> None:
    inputs = make(1, 130, 2, 4, 1, 3)
    inputs["dt"] = inputs["dt"].abs()
    inputs["dt"][0, ::5] *= 40
    inputs["A"] = torch.tensor([-30.0, 0.005], dtype=torch.float64)
    check(backend, inputs, torch.float32)


def test_decay_that_leaves_nothing(backend) -> None:
    """Infinite rates, and steps so long that their decay is no float32: the state is dropped, no more."""
    inputs = make(1, 200, 3, 4, 1, 3)
    inputs["dt"][0, 10::20] = 1e36
    inputs["x"][0, 10::20] = 0
    inputs["A"] = torch.tensor([-math.inf, -1e4, -1e30], dtype=torch.float64)
    inputs["initial_states"][:] = 1
    exact = reference.ssd_chunk_scan(**inputs, dt_softplus=True)
    assert all(bool(t.isfinite().all()) for t in exact)
    low = in_dtype(inputs, torch.float32, backend.device)
    out, states = ours(**low, dt_softplus=True)
    for found, expected in zip((out, states), exact, strict=True):
        torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-5, atol=1e-5)


# ---- what goes in and what comes out ----


@pytest.mark.parametrize("shape", [(2, 70, 4, 8, 2, 6), (1, 66, 2, 16, 2, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_strides(backend, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Any layout gives the bits of the contiguous one, for the result and every gradient."""
    inputs = in_dtype(make(*shape), dtype, backend.device)
    inputs["C"] = inputs["C"][:, :, :1].expand_as(inputs["B"])
    inputs["D"] = inputs["D"][:1].expand(shape[2])
    dense = {name: t.contiguous() for name, t in inputs.items()}
    views = dict(inputs)
    for name in ("x", "B"):
        views[name] = inputs[name].permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    views["dt"] = inputs["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    views["z"] = torch.stack([inputs["z"]] * 2, -1).flatten(-2)[..., ::2]
    grads = tuple(g.to(backend.device).float() for g in output_grads(inputs))
    odd_grads = (grads[0].transpose(1, 3).contiguous().transpose(1, 3), grads[1].mT.contiguous().mT)
    expected = results(ours, dense, grads, dt_softplus=True)
    found = results(ours, views, odd_grads, dt_softplus=True)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_what_is_kept_for_backward(backend) -> None:
    """On a GPU no states: they are four times x in 16 bits, and quickly computed again."""
    inputs = in_dtype(make(1, 130, 2, 3, 1, 4), torch.bfloat16, backend.device)
    out, _ = ours(**{name: t.requires_grad_() for name, t in inputs.items()})
    kept = [t for t in out.grad_fn.saved_tensors if t is not None]
    ours_alone = {t.data_ptr() for t in kept if t.numel()} - {t.data_ptr() for t in inputs.values()}
    assert len(ours_alone) == (2 if backend.is_cpu else 1)  # y, which the gate needs, and the states


def test_a_gpus_backward_pass_made_again_on_a_cpu() -> None:
    """As replay.py does with a call that TILEWRIGHT_DEBUG kept; the other way round too."""
    inputs = in_dtype(make(1, 70, 2, 5, 2, 6), torch.float32)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    grads = tuple(g.float() for g in output_grads(inputs))
    with emulated():
        on_gpu = ours(**leaves)
    on_cpu = ours(**leaves)
    expected = torch.autograd.grad(ours(**leaves), list(leaves.values()), grads)
    with emulated():
        there = torch.autograd.grad(on_cpu, list(leaves.values()), grads)
    for found in (torch.autograd.grad(on_gpu, list(leaves.values()), grads), there):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_an_expanded_gradient(backend) -> None:
    inputs = in_dtype(make(1, 9, 2, 3, 1, 4), torch.float32, backend.device)
    leaf = inputs["x"].requires_grad_()
    out, _ = ours(**inputs)
    (found,) = torch.autograd.grad(out.sum(), leaf)
    out, _ = ours(**inputs)
    (expected,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    assert torch.equal(found, expected)


def test_returned_states(backend) -> None:
    inputs = in_dtype(make(1, 20, 2, 3, 1, 4), torch.bfloat16, backend.device)
    cu_seqlens = torch.tensor([0, 8, 20], device=backend.device)
    del inputs["initial_states"]
    out = ssd_chunk_scan(**inputs, chunk_size=1, cu_seqlens=cu_seqlens)
    assert isinstance(out, Tensor)
    assert out.dtype == torch.bfloat16
    two = ssd_chunk_scan(**inputs, chunk_size=256, cu_seqlens=cu_seqlens, return_varlen_states=True)
    three = ssd_chunk_scan(
        **inputs, chunk_size=7, cu_seqlens=cu_seqlens, return_final_states=True, return_varlen_states=True,
        state_dtype=torch.float16,
    )  # fmt: skip
    assert len(two) == 2
    assert len(three) == 3
    assert two[1].dtype == torch.float32
    assert two[1].shape == (2, 2, 3, 4)
    assert torch.equal(three[1], two[1].half())
    assert torch.equal(three[2], two[1].half())
    assert torch.equal(three[0], out)


def test_chunk_size_changes_nothing() -> None:
    inputs = in_dtype(make(1, 150, 2, 3, 1, 4), torch.float32)
    first = ssd_chunk_scan(**inputs, chunk_size=64)
    assert all(torch.equal(first, ssd_chunk_scan(**inputs, chunk_size=size)) for size in (1, 17, 256, 4096))


def test_mixed_dtypes_follow_x() -> None:
    inputs = in_dtype(make(1, 9, 2, 3, 1, 4), torch.float32)
    mixed = inputs | {"x": inputs["x"].bfloat16(), "A": inputs["A"].double(), "dt": inputs["dt"].half()}
    out, states = ours(**mixed)
    same, _ = ours(**in_dtype(inputs, torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert states.dtype == torch.float32
    assert torch.equal(out, same)


def test_autocast_changes_nothing() -> None:
    inputs = in_dtype(make(1, 9, 2, 3, 1, 4), torch.float32)
    plain_out, plain_states = ours(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out, states = ours(**inputs)
    assert torch.equal(out, plain_out)
    assert torch.equal(states, plain_states)


# ---- gradients and torch ----


@pytest.mark.parametrize("variant", ["whole", "packed", "resets"])
def test_gradcheck(variant: str, poisoned: None) -> None:
    options: dict[str, Any] = {"dt_softplus": variant != "whole"}
    inputs = make(1 if variant == "packed" else 2, 5, 2, 2, 1, 2, wide=variant == "resets",
                  sequences=2 if variant == "packed" else None)  # fmt: skip
    if variant == "packed":
        options["cu_seqlens"] = torch.tensor([0, 2, 5])
    elif variant == "resets":
        options["seq_idx"] = torch.tensor([[0, 0, 1, 1, 1], [3, 3, 3, 3, 2]])
    else:
        inputs["dt"] = inputs["dt"].abs() + 0.1
    leaves = [inputs[name].requires_grad_() for name in INPUTS]
    assert torch.autograd.gradcheck(lambda *t: ours(**dict(zip(INPUTS, t, strict=True)), **options), leaves)


def test_float64_is_exact_over_chunks() -> None:
    inputs = make(2, 200, 4, 9, 2, 11)
    grads = output_grads(inputs)
    expected = results(reference.ssd_chunk_scan, inputs, grads, dt_softplus=True, dt_limit=(0.1, 1.0))
    found = results(ours, inputs, grads, dt_softplus=True, dt_limit=(0.1, 1.0))
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10, msg=name)


def test_only_wanted_gradients() -> None:
    inputs = in_dtype(make(1, 9, 2, 3, 1, 4), torch.float32)
    inputs["B"].requires_grad_()
    out = ssd_chunk_scan(**inputs, chunk_size=8)
    out.sum().backward()
    assert inputs["B"].grad is not None
    assert inputs["x"].grad is None
    assert inputs["initial_states"].grad is None


def test_no_second_derivative() -> None:
    inputs = in_dtype(make(1, 9, 2, 3, 1, 4), torch.float32)
    inputs["x"].requires_grad_()
    out = ssd_chunk_scan(**inputs, chunk_size=8)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(out.sum(), inputs["x"], create_graph=True)


def test_opcheck() -> None:
    inputs = in_dtype(make(1, 9, 2, 3, 1, 4, sequences=2), torch.float32)
    cu_seqlens = torch.tensor([0, 4, 9])
    arguments = [*[inputs[name] for name in INPUTS], None, cu_seqlens]
    options = (True, 0.0, math.inf)
    bare = [*[inputs[name] for name in INPUTS[:5]], None, None, None, None, None, None]
    forward, backward = (
        getattr(torch.ops.tilewright, f"ssd_chunk_scan_{way}").default for way in ("fwd", "bwd")
    )
    for given_arguments, everything in ((arguments, True), (bare, False)):
        wanted = (everything, everything)  # the final states, y
        torch.library.opcheck(forward, (*given_arguments, *options, *wanted))
        out, states, kept, y = forward(*given_arguments, *options, *wanted)
        given = (out, states if everything else None)
        torch.library.opcheck(backward, (*given, *given_arguments, *options, kept, y if everything else None))


@pytest.mark.parametrize("lengths", [(64,), (200,), (30, 128, 65)])
def test_states_that_nobody_asks_for(lengths: tuple[int, ...]) -> None:
    """What is left out then is additions of zeros: not a bit changes."""
    inputs = in_dtype(make(1, sum(lengths), 4, 8, 2, 16, sequences=len(lengths)), torch.float32)
    inputs["initial_states"] = torch.zeros_like(inputs["initial_states"])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)

    def run(left_out: bool) -> list[Tensor]:
        given = {name: t.clone().requires_grad_() for name, t in inputs.items()}
        if left_out:
            given["initial_states"] = None
        out = ssd_chunk_scan(
            **given, chunk_size=64, cu_seqlens=cu_seqlens, dt_softplus=True, return_final_states=not left_out
        )
        out, states = (out, None) if left_out else out
        loss = out.square().sum() if left_out else out.square().sum() + 0 * states.sum()
        wanted = [t for name, t in given.items() if name != "initial_states"]
        return [out, *torch.autograd.grad(loss, wanted)]

    for found, expected in zip(run(True), run(False), strict=True):
        assert torch.equal(found, expected)


def test_compile() -> None:
    inputs = in_dtype(make(1, 70, 2, 3, 1, 4, sequences=2), torch.float32)
    grads = output_grads(inputs)
    options = {"cu_seqlens": torch.tensor([0, 30, 70]), "dt_softplus": True}
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    expected, found = (results(function, inputs, grads, **options) for function in (ours, compiled))
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_training_compiled_without_the_states() -> None:
    """Compilers hand on zeros for results that are not differentiable, here of no elements."""
    inputs = {
        k: v.requires_grad_()
        for k, v in in_dtype(make(1, 9, 2, 3, 1, 4), torch.float32).items()
        if v is not None
    }
    compiled = torch.compile(ssd_chunk_scan, fullgraph=True, backend="aot_eager")
    x, dt, A, B, C = (inputs[name] for name in ("x", "dt", "A", "B", "C"))
    found, expected = (
        torch.autograd.grad(function(x, dt, A, B, C, 64).sum(), (x, dt, A, B, C))
        for function in (compiled, ssd_chunk_scan)
    )
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


# ---- the same bits ----


def many(
    dtype: torch.dtype = torch.float32, device: Any = "cpu", shape: Any = (2, 140, 6, 9, 2, 11)
) -> dict[str, Tensor]:
    inputs = make(*shape)
    grads = output_grads(inputs)
    seq_idx = (torch.arange(shape[1]) // 50).expand(shape[0], shape[1])
    return results(ours, in_dtype(inputs, dtype, device), grads, seq_idx=seq_idx.to(device), dt_softplus=True)


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_repeating(backend) -> None:
    first = many(device=backend.device)
    for _ in range(1 if backend.name == "emulated" else 9):
        assert_same(many(device=backend.device), first)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads: int) -> None:
    before = torch.get_num_threads()
    first = many()
    torch.set_num_threads(threads)
    try:
        assert_same(many(), first)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_emulator_seeds(dtype: torch.dtype) -> None:
    """A missing barrier would show as bits that change with the order of warps."""
    found = []
    for seed in range(3):
        with emulated(seed):
            found.append(many(dtype, shape=(1, 66, 2, 5, 1, 66)))
    for other in found[1:]:
        assert_same(other, found[0])


@pytest.mark.parametrize("level", _C.cpu_levels())
@given(data=st.data())
def test_any_shape_layout_and_option(level: str, data: Any) -> None:
    size = st.integers(1, 9)
    batch, heads, groups = (
        data.draw(st.integers(0, 3)),
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 2)),
    )
    length, head_dim, states = data.draw(st.integers(0, 150)), data.draw(size), data.draw(size)
    dtype = data.draw(st.sampled_from([torch.float32, *HALVES]))
    packed = length > 0 and data.draw(st.booleans())
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4))) if packed and length > 1 else []
    batch = 1 if packed else batch
    inputs = make(batch, length, heads * groups, head_dim, groups, states, wide=data.draw(st.booleans()),
                  sequences=len(cuts) + 1 if packed else None, seed=length)  # fmt: skip
    options: dict[str, Any] = {
        "dt_softplus": True,
        "dt_limit": data.draw(st.sampled_from([(0.0, math.inf), (0.2, 0.6)])),
    }
    if packed:
        options["cu_seqlens"] = torch.tensor([0, *cuts, length])
    if data.draw(st.booleans()):
        options["seq_idx"] = (
            torch.arange(length).div(max(1, length // 3), rounding_mode="floor").expand(batch, length)
        )
    without = tuple(name for name in ("D", "z", "dt_bias", "initial_states") if data.draw(st.booleans()))
    chosen = {name: t for name, t in inputs.items() if name not in without}
    axes = data.draw(st.permutations(range(4)))
    for name in ("x", "B", "z"):
        if name in chosen:
            inverse = [axes.index(i) for i in range(4)]
            chosen[name] = chosen[name].permute(axes).contiguous().permute(inverse)
    before = _C.cpu_level()
    _C.set_cpu_level(level)
    try:
        low = in_dtype(chosen, dtype)
        found, states_found = ours(**low, **options)
    finally:
        _C.set_cpu_level(before)
    exact, exact_states = reference.ssd_chunk_scan(**chosen, **options)
    allowed, _ = plain(dtype, False)(**low, **options)
    torch.testing.assert_close(states_found.double(), exact_states, rtol=1e-4, atol=1e-4)
    if length * batch:
        error = (found.double() - exact).abs().max()
        assert error <= 2 * (allowed.double() - exact).abs().max() + 1e-5 * exact.abs().max() + 1e-6


# ---- wrong arguments ----


def wrong(**changes: Any) -> dict[str, Any]:
    inputs: dict[str, Any] = in_dtype(make(1, 6, 4, 3, 2, 5), torch.float32)
    return inputs | {"chunk_size": 8} | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.zeros(1, 6, 4)}, ValueError, r"x must have shape \(batch, length, heads, head_dim\)"),
        ({"x": torch.zeros(1, 6, 4, 3, dtype=torch.int32)}, TypeError, "x must have dtype .*got int32"),
        ({"x": torch.zeros(1, 6, 4, 0)}, ValueError, "head_dim at least 1"),
        ({"x": torch.zeros(1, 6, 4, 3, device="meta")}, ValueError, "x must be on a CPU or CUDA device"),
        ({"x": torch.zeros(1, 6, 4, 3).to_sparse()}, ValueError, "x must be a dense tensor"),
        ({"dt": torch.zeros(1, 5, 4)}, ValueError, r"dt must have shape .* = \(1, 6, 4\), got \(1, 5, 4\)"),
        ({"A": torch.zeros(4, 5)}, ValueError, r"A must have shape \(heads,\) = \(4,\), got \(4, 5\)"),
        ({"A": torch.zeros(4, dtype=torch.complex64)}, TypeError, "A must have dtype .*got complex64"),
        ({"B": torch.zeros(1, 6, 5)}, ValueError, r"B must have shape \(batch, length, groups, state\)"),
        ({"B": torch.zeros(1, 6, 3, 5)}, ValueError, "B has 3 groups, which do not divide the 4 heads of x"),
        ({"C": torch.zeros(1, 6, 2, 4)}, ValueError, r"C must have shape that of B = \(1, 6, 2, 5\)"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be a positive int, got 0"),
        ({"chunk_size": 2.5}, TypeError, "chunk_size must be a positive int, got 2.5"),
        ({"D": torch.zeros(3)}, ValueError, r"D must have shape \(heads,\) = \(4,\) or"),
        ({"z": torch.zeros(1, 6, 4, 2)}, ValueError, "z must have shape that of x"),
        ({"dt_bias": torch.zeros(1)}, ValueError, r"dt_bias must have shape \(heads,\)"),
        ({"initial_states": torch.zeros(2, 4, 3, 5)}, ValueError, "initial_states must have shape"),
        ({"seq_idx": torch.zeros(1, 6)}, TypeError, "seq_idx must have dtype int32, int64, got float32"),
        ({"seq_idx": torch.zeros(6, dtype=torch.int32)}, ValueError, "seq_idx must have shape"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError, "cu_seqlens must have dtype int32, int64"),
        ({"cu_seqlens": torch.tensor([[0, 6]])}, ValueError, r"shape \(sequences \+ 1,\), got \(1, 2\)"),
        ({"cu_seqlens": torch.tensor([0]), "initial_states": None}, ValueError, r"length 6, got \[0\]"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, r"to the length 6, got \[0, 5\]"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 6])}, ValueError, "cu_seqlens must increase strictly from 0"),
        ({"cu_seqlens": torch.tensor([0, 4, 4, 6])}, ValueError, r"got \[0, 4, 4, 6\]"),
        ({"return_varlen_states": True}, ValueError, "return_varlen_states needs cu_seqlens"),
        ({"dt_limit": (1.0, 0.5)}, ValueError, r"dt_limit must be \(smallest, largest\)"),
        ({"dt_limit": 3.0}, ValueError, "dt_limit must be two numbers, got 3.0"),
        ({"state_dtype": torch.int32}, TypeError, "state_dtype must be a floating-point dtype or None"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ssd_chunk_scan(**wrong(**changes))


def test_packing_needs_batch_1() -> None:
    with pytest.raises(ValueError, match="cu_seqlens needs batch 1"):
        ssd_chunk_scan(
            **in_dtype(make(2, 6, 2, 3, 1, 4), torch.float32), chunk_size=8, cu_seqlens=torch.tensor([0, 6])
        )


# ---- beside transformers ----


def test_transformers_chunk_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same meaning, in float64: its slow path with its casts to float32 lifted."""
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    inputs = make(2, 75, 4, 6, 2, 8)
    del inputs["z"]
    options = {"chunk_size": 32, "dt_softplus": True, "dt_limit": (0.01, 3.0), "return_final_states": True}
    out, states = ssd_chunk_scan(**inputs, **options)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    renamed = {"hidden_states" if name == "x" else name: t for name, t in inputs.items()}
    their_out, their_states = modeling.mamba2_chunk_scan(**renamed, **options)
    torch.testing.assert_close(out, their_out, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(states, their_states, rtol=1e-11, atol=1e-11)
