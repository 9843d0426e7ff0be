"""The decode step of the causal convolution: against float64, rings, slots, strides, as a torch op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tilewright.testing
from reference import causal_conv1d as reference
from tilewright.scan import causal_conv1d, causal_conv1d_update

HALVES = [torch.float16, torch.bfloat16]
FLOATS = [torch.float32, *HALVES]
ATOL = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def make(
    batch: int,
    dim: int,
    steps: int | None,
    width: int,
    state_length: int,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    ring: bool = False,
    weight_dtype: torch.dtype | None = None,
    slots: int | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(to)

    found: dict[str, Any] = {
        "x": normal(batch, dim) if steps is None else normal(batch, dim, steps),
        "conv_state": normal(slots or batch, dim, state_length),
        "weight": normal(dim, width, to=weight_dtype or dtype) / width**0.5,
    }
    if bias:
        found["bias"] = normal(dim, to=weight_dtype or dtype)
    if ring:
        found["cache_seqlens"] = torch.randint(0, 20, (batch,), generator=g, dtype=torch.int32)
    return {n: t.to(device) for n, t in found.items()}


def expected(arguments: dict[str, Any], activation: str | None, widen: bool) -> tuple[Tensor, Tensor]:
    """By the reference, in float64 or in the dtypes given."""
    a = {n: t.double() if widen and t.is_floating_point() else t for n, t in arguments.items()}
    flat = a["x"].ndim == 2
    out, state = reference.causal_conv1d_update(
        a.pop("x")[..., None] if flat else a.pop("x"), **a, activation=activation
    )
    return out[..., 0] if flat else out, state


def assert_close(arguments: dict[str, Any], activation: str | None = "silu") -> None:
    exact, exact_state = expected(arguments, activation, True)
    plain, _ = expected(arguments, activation, False)
    state = arguments["conv_state"].clone()
    out = causal_conv1d_update(**(arguments | {"conv_state": state}), activation=activation)
    assert out.shape == arguments["x"].shape
    assert out.dtype == arguments["x"].dtype
    assert torch.equal(state.double(), exact_state)
    if out.numel():
        error = float((out.double() - exact).abs().max())
        allowed = 2 * float((plain.double() - exact).abs().max())
        assert error <= allowed + ATOL[out.dtype] * max(1.0, float(exact.abs().max()))


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("extra", [0, 1, 5])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
def test_widths_and_state_lengths(backend, width: int, extra: int, ring: bool) -> None:
    for steps in (None, 1, 2, 9):
        if width - 1 + extra or not ring:
            assert_close(make(3, 19, steps, width, width - 1 + extra, ring=ring, device=backend.device))


@pytest.mark.parametrize("dim", [1, 7, 63, 65, 127, 129, 1100])
def test_numbers_of_channels(backend, dim: int) -> None:
    for bias in (False, True):
        assert_close(make(2, dim, None, 4, 4, bias=bias, device=backend.device), "swish" if bias else None)


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_types(backend, dtype: torch.dtype, ring: bool) -> None:
    for weight_dtype in (dtype, torch.float32):
        for steps in (None, 3):
            arguments = make(
                2, 33, steps, 4, 4, dtype, weight_dtype=weight_dtype, ring=ring, device=backend.device
            )
            assert_close(arguments)


def test_many_steps(backend) -> None:
    assert_close(make(1, 5, 70, 4, 5, device=backend.device))
    assert_close(make(1, 5, 70, 4, 5, ring=True, device=backend.device))


def test_step_numbers_of_64_bits(backend) -> None:
    """The position in the ring is the step number modulo its length, beyond 32 bits too."""
    arguments = make(6, 5, 3, 4, 7, ring=True, device=backend.device)
    seen = [2**31, 2**33 + 5, 2**62 + 1, 7 * 2**40, 6, 0]
    arguments["cache_seqlens"] = torch.tensor(seen, device=backend.device)
    assert_close(arguments)
    small = arguments | {"cache_seqlens": torch.tensor([s % 7 for s in seen], device=backend.device)}
    small["conv_state"] = arguments["conv_state"].clone()
    assert torch.equal(causal_conv1d_update(**arguments), causal_conv1d_update(**small))
    assert torch.equal(arguments["conv_state"], small["conv_state"])


def test_double() -> None:
    for steps in (None, 1, 5):
        for ring in (False, True):
            assert_close(make(2, 5, steps, 4, 4, torch.float64, ring=ring))


@pytest.mark.parametrize("name", ["x", "conv_state", "weight", "bias"])
def test_strides_are_honoured(backend, name: str) -> None:
    plain = make(2, 20, 3, 4, 5, device=backend.device)
    other = plain[name]
    spread = torch.zeros(*[2 * s + 1 for s in other.shape], device=other.device)
    strided = spread[tuple(slice(1, None, 2) for _ in other.shape)].copy_(other)
    turned = other.permute(*reversed(range(other.ndim))).contiguous().permute(*reversed(range(other.ndim)))
    state = plain["conv_state"].clone()
    out = causal_conv1d_update(**(plain | {"conv_state": state}))
    for view in (strided, turned):
        arguments = {n: t.clone() for n, t in plain.items()} | {name: view}
        assert torch.equal(causal_conv1d_update(**arguments), out)
        assert torch.equal(arguments["conv_state"], state)
    assert float(spread.sum() - strided.sum()) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("ring", [False, True])
def test_slots(backend, ring: bool, dtype: torch.dtype) -> None:
    arguments = make(4, 20, 2, 4, 4, ring=ring, slots=7, device=backend.device)
    if ring:
        arguments["cache_seqlens"] = arguments["cache_seqlens"].to(dtype)
    state = arguments["conv_state"]
    before = state.clone()
    slots = torch.tensor([5, -1, 0, 3], dtype=dtype, device=backend.device)
    out = causal_conv1d_update(**arguments, conv_state_indices=slots, activation="silu")
    assert bool((out[1] == 0).all())
    for b in (0, 2, 3):
        slot = int(slots[b])
        own = before[slot : slot + 1].clone()
        alone = {n: t[b : b + 1] if n in ("x", "cache_seqlens") else t for n, t in arguments.items()}
        assert torch.equal(
            out[b : b + 1], causal_conv1d_update(**(alone | {"conv_state": own}), activation="silu")
        )
        assert torch.equal(state[slot : slot + 1], own)
    assert torch.equal(state[[1, 2, 4, 6]], before[[1, 2, 4, 6]])


def test_a_slot_that_does_not_exist(backend) -> None:
    arguments = make(2, 20, None, 4, 4, slots=3, device=backend.device)
    before = arguments["conv_state"].clone()
    slots = torch.tensor([1, 3], device=backend.device)
    if backend.is_cpu:
        with pytest.raises(
            ValueError, match="conv_state_indices must be below 3, the slots of conv_state, got 3"
        ):
            causal_conv1d_update(**arguments, conv_state_indices=slots)
        assert torch.equal(arguments["conv_state"], before)
    else:
        out = causal_conv1d_update(**arguments, conv_state_indices=slots)
        assert bool(out[1].isnan().all())
        assert bool(out[0].isfinite().all())
        assert torch.equal(arguments["conv_state"][[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("ring", [False, True])
def test_token_by_token_equals_the_convolution(backend, ring: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=g).to(backend.device) for s in ((2, 20, 30), (20, 4), (20,)))
    whole = causal_conv1d(x, weight, bias, activation="silu")
    state = torch.zeros(2, 20, 5, device=backend.device)
    done = 0
    for steps in (1, 1, 4, 1, 23):
        seen = torch.full((2,), done, dtype=torch.int32, device=backend.device) if ring else None
        piece = x[:, :, done : done + steps]
        out = causal_conv1d_update(piece, state, weight, bias, "silu", cache_seqlens=seen)
        assert torch.allclose(out, whole[:, :, done : done + steps], rtol=1e-5, atol=1e-5)
        done += steps


@pytest.mark.parametrize("shape", [(0, 5, 2), (2, 0, 2), (2, 5, 0), (0, 5, None)])
def test_empty(backend, shape: tuple[int, int, int | None]) -> None:
    assert_close(make(*shape, 4, 4, device=backend.device))


def test_autocast_changes_nothing(backend) -> None:
    arguments = make(2, 9, None, 4, 4, device=backend.device)
    out = causal_conv1d_update(**(arguments | {"conv_state": arguments["conv_state"].clone()}))
    with torch.autocast(backend.device.type, dtype=torch.bfloat16):
        assert torch.equal(causal_conv1d_update(**arguments), out)


def test_same_bits(backend) -> None:
    """Again, for any number of threads, for any seed of the emulator."""
    arguments = make(3, 2000 if backend.is_cpu else 40, 3, 4, 4)
    results = []
    before = torch.get_num_threads()
    for turn in (1, 2, 3, 2):
        if backend.is_cpu:
            torch.set_num_threads(turn)
        elif backend.name == "emulated":
            tilewright._backend.C.emulator_set_seed(turn)
        there = {n: t.to(backend.device, copy=True) for n, t in arguments.items()}
        results.append((causal_conv1d_update(**there, activation="silu"), there["conv_state"]))
    torch.set_num_threads(before)
    for out, state in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(state, results[0][1])


@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(0, 40), st.sampled_from([None, 0, 1, 2, 5, 40])),
    width=st.integers(1, 8),
    extra=st.integers(0, 6),
    dtypes=st.sampled_from([(torch.float64, torch.float64), *((x, w) for x in FLOATS for w in FLOATS)]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 1000),
)
@settings(deadline=None)
def test_any_shape_dtype_and_option(
    sizes: tuple[int, int, int | None],
    width: int,
    extra: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    flags: tuple[bool, bool, bool],
    seed: int,
) -> None:
    bias, ring, silu = flags
    length = width - 1 + extra
    arguments = make(
        *sizes,
        width,
        length,
        dtypes[0],
        weight_dtype=dtypes[1],
        bias=bias,
        ring=ring and length > 0,
        seed=seed,
    )
    exact, exact_state = expected(arguments, "silu" if silu else None, True)
    out = causal_conv1d_update(**arguments, activation="silu" if silu else None)
    assert torch.equal(arguments["conv_state"].double(), exact_state)
    eps = torch.finfo(dtypes[0]).eps
    torch.testing.assert_close(out, exact.to(out.dtype), rtol=2 * eps, atol=1e-5)


# -- as a torch op -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [False, True])
def test_opcheck(backend, options: bool) -> None:
    a = make(2, 5, 3 if options else None, 4, 4, bias=options, ring=options, device=backend.device)
    slots = torch.tensor([1, -1], device=backend.device) if options else None
    arguments = (a["x"], a["conv_state"], a["weight"], a.get("bias"), options, a.get("cache_seqlens"), slots)
    torch.library.opcheck(torch.ops.tilewright.causal_conv1d_update.default, arguments)


@pytest.mark.slow
def test_compiles_without_graph_breaks() -> None:
    def step(a: dict[str, Tensor]) -> Tensor:
        return causal_conv1d_update(**a, activation="silu") + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    arguments = make(2, 5, None, 4, 4)
    copied = arguments | {"conv_state": arguments["conv_state"].clone()}
    with torch.no_grad():
        assert torch.equal(compiled(arguments), step(copied))
    assert torch.equal(arguments["conv_state"], copied["conv_state"])


def test_the_state_counts_as_modified(backend) -> None:
    arguments = make(2, 9, None, 4, 4, device=backend.device)
    scale = torch.ones(4, requires_grad=True, device=backend.device)
    loss = (arguments["conv_state"] * scale).sum()
    causal_conv1d_update(**arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_mixed_weight_and_bias(backend) -> None:
    a = make(2, 9, None, 4, 4, torch.bfloat16, device=backend.device)
    state = a["conv_state"].clone()
    out = causal_conv1d_update(**(a | {"bias": a["bias"].float()}))
    assert torch.equal(out, causal_conv1d_update(a["x"], state, a["weight"].float(), a["bias"].float()))


# -- bad input -----------------------------------------------------------------------------------------------

GOOD = make(2, 6, 3, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"conv_state": None}, TypeError, "conv_state must be a tensor, got NoneType"),
        ({"bias": 0.0}, TypeError, "bias must be a tensor, got float"),
        ({"weight": GOOD["weight"].to_sparse()}, ValueError, "weight must be a dense tensor"),
        ({"x": GOOD["x"].int()}, TypeError, "x must have dtype float32.*, got int32"),
        ({"x": GOOD["x"][0, 0]}, ValueError, r"x must have shape \(batch, dim\) or .*, got \(3,\)"),
        (
            {"conv_state": GOOD["conv_state"][0]},
            ValueError,
            r"conv_state must have shape \(batch, dim, state_length",
        ),
        (
            {"conv_state": GOOD["conv_state"].half()},
            TypeError,
            "conv_state must have dtype float32, got float16",
        ),
        ({"conv_state": GOOD["conv_state"][:, :, :2]}, ValueError, r"width = 4, got \(2, 6, 2\)"),
        (
            {"conv_state": GOOD["conv_state"][:, :5]},
            ValueError,
            r"with dim = 6 and width = 4, got \(2, 5, 4\)",
        ),
        (
            {"conv_state": torch.zeros(3, 6, 4)},
            ValueError,
            "one entry a sequence, batch = 2, got 3; or give conv_st",
        ),
        ({"weight": GOOD["weight"][:5]}, ValueError, r"weight must have shape \(dim, width\) with dim = 6"),
        ({"weight": torch.zeros(6, 9)}, ValueError, "weight must have a width of 1 to 8, got 9"),
        ({"weight": GOOD["weight"].double()}, TypeError, "weight must have dtype .*, got float64"),
        ({"bias": torch.zeros(5)}, ValueError, "bias must have .* elements, got 5"),
        (
            {"cache_seqlens": torch.zeros(2)},
            TypeError,
            "cache_seqlens must have dtype int32, int64.*, got float32",
        ),
        ({"cache_seqlens": torch.zeros(3).int()}, ValueError, "cache_seqlens must have .* elements, got 3"),
        (
            {"conv_state_indices": torch.zeros(2)},
            TypeError,
            "conv_state_indices must have dtype int32, int64, got",
        ),
        (
            {"conv_state_indices": torch.tensor([0, 2])},
            ValueError,
            "must be below 2, the slots of conv_state, got 2 for sequence 1",
        ),
        (
            {"conv_state": GOOD["conv_state"][:1].clone().expand(2, 6, -1)},
            ValueError,
            "conv_state must have a place of its own for each entry, since it is written to, got 2 entries",
        ),
        ({"activation": "gelu"}, ValueError, "activation must be 'silu', 'swish' or None, got 'gelu'"),
        (
            {"weight": GOOD["weight"].clone().requires_grad_()},
            NotImplementedError,
            "weight requires a gradient, but a decode step has none",
        ),
    ],
)
def test_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    state = GOOD["conv_state"].clone()
    with pytest.raises(error, match=message):
        causal_conv1d_update(**({**GOOD, "conv_state": state} | arguments))
    assert torch.equal(state, GOOD["conv_state"])
