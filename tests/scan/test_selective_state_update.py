"""The decode step of a selective scan: against float64, strides, dtypes, slots, as a torch op."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tilewright.testing
from reference import selective_state_update as reference
from tilewright.scan import selective_state_update

HALVES = [torch.float16, torch.bfloat16]
FLOATS = [torch.float32, *HALVES]
ATOL = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
OPTIONS = ("D", "z", "dt_bias")


def make(
    batch: int,
    heads: int | None,
    dim: int,
    states: int,
    dtype: torch.dtype = torch.float32,
    *,
    state_dtype: torch.dtype | None = None,
    groups: int | None = None,
    tied: bool = False,
    options: tuple[str, ...] = OPTIONS,
    slots: int | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments as Mamba-1 (heads None) or Mamba-2 makes them; weights are float32 unless all is float64."""
    g = torch.Generator().manual_seed(seed)
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(to).to(device)

    channels = (dim,) if heads is None else (heads, dim)
    projection = (batch, states) if groups is None else (batch, groups, states)
    found: dict[str, Any] = {
        "state": normal(slots or batch, *channels, states, to=state_dtype or weight_dtype),
        "x": normal(batch, *channels),
        "B": normal(*projection),
        "C": normal(*projection),
    }
    per_channel = {"D": weight_dtype, "dt_bias": weight_dtype}
    if tied:
        assert heads is not None
        found["dt"] = normal(batch, heads)[..., None].expand(batch, heads, dim)
        found["A"] = -normal(heads, to=weight_dtype).exp()[:, None, None].expand(heads, dim, states)
        found |= {n: normal(heads, to=to)[:, None].expand(heads, dim) for n, to in per_channel.items()}
    else:
        found["dt"] = normal(batch, *channels)
        found["A"] = -normal(*channels, states, to=weight_dtype).exp()
        found |= {n: normal(*channels, to=to) for n, to in per_channel.items()}
    found["z"] = normal(batch, *channels)
    return {n: t for n, t in found.items() if n not in OPTIONS or n in options}


def assert_close(arguments: dict[str, Any], dt_softplus: bool = True) -> None:
    """The rule of error, for out and the new state."""
    exact = reference.selective_state_update(
        **{n: t.double() for n, t in arguments.items()}, dt_softplus=dt_softplus
    )
    plain = reference.selective_state_update(**arguments, dt_softplus=dt_softplus)
    state = arguments["state"].detach().clone()
    out = selective_state_update(**(arguments | {"state": state}), dt_softplus=dt_softplus)
    assert out.shape == arguments["x"].shape
    assert out.dtype == arguments["x"].dtype
    for ours, truth, usual in zip((out, state), exact, plain, strict=True):
        if truth.numel() == 0:
            continue
        scale = max(1.0, float(truth.abs().max()))
        error = float((ours.double() - truth).abs().max())
        allowed = 2 * float((usual.to(ours.dtype).double() - truth).abs().max()) + ATOL[ours.dtype] * scale
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("states", [1, 7, 8, 16, 17, 63, 64, 65, 128, 129])
def test_numbers_of_states(backend, states: int) -> None:
    assert_close(make(2, None, 19, states, device=backend.device))
    assert_close(make(2, 4, 5, states, groups=2, tied=True, device=backend.device))


def test_more_states_than_a_block(backend) -> None:
    assert_close(make(1, None, 3, 300, device=backend.device))
    assert_close(make(1, 2, 3, 515, tied=True, device=backend.device))


@pytest.mark.parametrize("dim", [1, 7, 63, 65, 127, 129, 300])
def test_numbers_of_channels(backend, dim: int) -> None:
    if backend.name == "emulated":
        dim = min(dim, 65)
    assert_close(make(3, None, dim, 16, device=backend.device))
    assert_close(make(1, 2, dim, 32, device=backend.device))


@pytest.mark.parametrize("state_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes(backend, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    for states in (16, 20):
        assert_close(make(2, None, 33, states, dtype, state_dtype=state_dtype, device=backend.device))
        arguments = make(
            2, 4, 9, states, dtype, state_dtype=state_dtype, groups=2, tied=True, device=backend.device
        )
        assert_close(arguments)


def test_every_tensor_may_have_its_own_dtype(backend) -> None:
    arguments = make(2, None, 33, 16, device=backend.device)
    for i, name in enumerate(arguments):
        arguments[name] = arguments[name].to(FLOATS[i % 3])
    assert_close(arguments)


@pytest.mark.parametrize("dt_softplus", [False, True])
@pytest.mark.parametrize("options", [(), ("D",), ("z",), ("dt_bias",), ("D", "z"), OPTIONS], ids=str)
def test_options(backend, options: tuple[str, ...], dt_softplus: bool) -> None:
    assert_close(make(2, None, 9, 16, options=options, device=backend.device), dt_softplus)
    assert_close(make(2, 2, 5, 16, options=options, tied=True, device=backend.device), dt_softplus)


@pytest.mark.parametrize("groups", [None, 1, 2, 3, 6])
def test_groups(backend, groups: int | None) -> None:
    assert_close(make(2, 6, 5, 16, groups=groups, device=backend.device))


def test_large_steps(backend) -> None:
    """softplus is its argument above 20, and the exponential vanishes."""
    arguments = make(1, None, 9, 16, device=backend.device)
    arguments["dt"] = torch.linspace(-90, 90, 9, device=backend.device)[None]
    assert_close(arguments)


@pytest.mark.parametrize("name", ["state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias"])
def test_strides_are_honoured(backend, name: str) -> None:
    plain = make(2, 3, 5, 16, groups=3, device=backend.device)
    other = plain[name]
    spread = torch.zeros(*[2 * s + 1 for s in other.shape], device=other.device)
    strided = spread[tuple(slice(1, None, 2) for _ in other.shape)].copy_(other)
    turned = other.permute(*reversed(range(other.ndim))).contiguous().permute(*reversed(range(other.ndim)))
    expected_state = plain["state"].clone()
    expected = selective_state_update(**(plain | {"state": expected_state}), dt_softplus=True)
    for view in (strided, turned):
        arguments = {n: t.clone() if n == "state" else t for n, t in plain.items()} | {name: view}
        out = selective_state_update(**arguments, dt_softplus=True)
        assert torch.allclose(out, expected, rtol=1e-5, atol=1e-5)
        assert torch.allclose(arguments["state"], expected_state, rtol=1e-5, atol=1e-5)
    assert float(spread.sum() - strided.sum()) == pytest.approx(0, abs=1e-3)  # nothing beside it was written


@pytest.mark.parametrize("axes", [(), (-1,), (-1, -2), (-2,)])
def test_expanded_views_equal_their_copies(backend, axes: tuple[int, ...]) -> None:
    arguments = make(2, 3, 20, 16, device=backend.device)
    for axis in axes:
        arguments["A"] = arguments["A"].narrow(axis, 0, 1).expand(3, 20, 16)
    dense = arguments | {"A": arguments["A"].contiguous(), "state": arguments["state"].clone()}
    out, expected = selective_state_update(**arguments), selective_state_update(**dense)
    assert torch.allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(arguments["state"], dense["state"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_slots(backend, dtype: torch.dtype) -> None:
    arguments = make(4, None, 20, 16, slots=7, device=backend.device)
    state = arguments["state"]
    slots = torch.tensor([5, -1, 0, 3], dtype=dtype, device=backend.device)
    before = state.clone()
    out = selective_state_update(**arguments, state_batch_indices=slots)
    for b, slot in enumerate(slots.tolist()):
        if slot < 0:
            assert bool((out[b] == 0).all())
            continue
        own = before[slot : slot + 1].clone()
        alone = {n: t[b : b + 1] if n in ("x", "dt", "B", "C", "z") else t for n, t in arguments.items()}
        assert torch.equal(out[b : b + 1], selective_state_update(**(alone | {"state": own})))
        assert torch.equal(state[slot : slot + 1], own)
    assert torch.equal(state[[1, 2, 4, 6]], before[[1, 2, 4, 6]])


def test_a_slot_that_does_not_exist(backend) -> None:
    arguments = make(2, None, 20, 16, slots=3, device=backend.device)
    before = arguments["state"].clone()
    slots = torch.tensor([1, 3], device=backend.device)
    if backend.is_cpu:
        with pytest.raises(
            ValueError, match="state_batch_indices must be below 3, the slots of state, got 3"
        ):
            selective_state_update(**arguments, state_batch_indices=slots)
        assert torch.equal(arguments["state"], before)
    else:
        out = selective_state_update(**arguments, state_batch_indices=slots)
        assert bool(out[1].isnan().all())
        assert bool(out[0].isfinite().all())
        assert torch.equal(arguments["state"][[0, 2]], before[[0, 2]])


@pytest.mark.parametrize(
    "shape", [(0, None, 5, 16), (2, None, 0, 16), (2, None, 5, 0), (2, 0, 5, 16), (0, 2, 3, 4)]
)
def test_empty(backend, shape: tuple[int, Any, int, int]) -> None:
    arguments = make(*shape, device=backend.device)
    out = selective_state_update(**arguments)
    assert out.shape == arguments["x"].shape
    if shape[3] == 0:
        expected = arguments["D"] * arguments["x"] * torch.nn.functional.silu(arguments["z"])
        assert torch.allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_infinity_and_nan_stay_in_their_channel(backend) -> None:
    for bad in (math.inf, math.nan):
        arguments = make(1, None, 20, 16, device=backend.device)
        arguments["state"][0, 7, 3] = bad
        arguments["A"][7] = -1
        out = selective_state_update(**arguments, dt_softplus=True)
        assert not bool(out[0, 7].isfinite())
        assert bool(out[0, [*range(7), *range(8, 20)]].isfinite().all())


def test_steps_equal_a_scan() -> None:
    """Token by token is what the recurrence over a sequence gives."""
    arguments = make(2, None, 20, 16, torch.float64)
    state = torch.zeros_like(arguments["state"])
    expected = state.clone()
    for _ in range(5):
        out = selective_state_update(**(arguments | {"state": state}), dt_softplus=True)
        truth, expected = reference.selective_state_update(
            **(arguments | {"state": expected}), dt_softplus=True
        )
        assert torch.allclose(out, truth)
    assert torch.allclose(state, expected)


def test_autocast_changes_nothing(backend) -> None:
    arguments = make(2, None, 9, 16, device=backend.device)
    expected = selective_state_update(**(arguments | {"state": arguments["state"].clone()}))
    with torch.autocast(backend.device.type, dtype=torch.bfloat16):
        assert torch.equal(selective_state_update(**arguments), expected)


def test_same_bits(backend) -> None:
    """Again, for any number of threads, for any seed of the emulator."""
    arguments = make(3, 4, 40, 64, tied=True) if backend.is_cpu else make(2, 2, 9, 20)
    results = []
    before = torch.get_num_threads()
    for turn in (1, 2, 3, 2):
        state = arguments["state"].to(backend.device, copy=True)
        if backend.is_cpu:
            torch.set_num_threads(turn)
        elif backend.name == "emulated":
            tilewright._backend.C.emulator_set_seed(turn)
        given_there = {n: t.to(backend.device) for n, t in arguments.items()} | {"state": state}
        results.append((selective_state_update(**given_there, dt_softplus=True), state))
    torch.set_num_threads(before)
    for out, state in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(state, results[0][1])


@given(
    sizes=st.tuples(
        st.integers(0, 3), st.sampled_from([None, 1, 2, 4]), st.integers(0, 40), st.integers(0, 70)
    ),
    dtypes=st.sampled_from([(torch.float64, torch.float64), *((x, s) for x in FLOATS for s in FLOATS)]),
    options=st.sets(st.sampled_from(OPTIONS)),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 1000),
)
@settings(deadline=None)
def test_any_shape_dtype_and_option(
    sizes: tuple[int, int | None, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    options: set[str],
    flags: tuple[bool, bool, bool],
    seed: int,
) -> None:
    dt_softplus, tied, grouped = flags
    heads = sizes[1]
    groups = None if not grouped else 1 if heads is None else heads // 2 or 1
    arguments = make(
        *sizes, dtypes[0], state_dtype=dtypes[1], groups=groups, tied=tied and heads is not None,
        options=tuple(sorted(options)), seed=seed,
    )  # fmt: skip
    assert_close(arguments, dt_softplus)


# -- as a torch op -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), OPTIONS], ids=str)
def test_opcheck(backend, options: tuple[str, ...]) -> None:
    a = make(2, 2, 5, 16, options=options, tied=True, device=backend.device)
    slots = torch.tensor([1, -1], device=backend.device) if options else None
    positional = [a[n] for n in ("state", "x", "dt", "A", "B", "C")]
    positional += [a.get("D"), a.get("z"), a.get("dt_bias"), bool(options), slots]
    torch.library.opcheck(torch.ops.tilewright.selective_state_update.default, tuple(positional))


@pytest.mark.slow
def test_compiles_without_graph_breaks() -> None:
    def step(a: dict[str, Tensor]) -> Tensor:
        return selective_state_update(**a, dt_softplus=True) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    arguments = make(2, 2, 5, 16, tied=True)
    copied = arguments | {"state": arguments["state"].clone()}
    with torch.no_grad():
        assert torch.equal(compiled(arguments), step(copied))
    assert torch.equal(arguments["state"], copied["state"])


def test_the_state_counts_as_modified(backend) -> None:
    arguments = make(2, None, 9, 16, device=backend.device)
    weight = torch.ones(16, requires_grad=True, device=backend.device)
    loss = (arguments["state"] * weight).sum()
    selective_state_update(**arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- bad input -----------------------------------------------------------------------------------------------

GOOD = make(2, 6, 5, 16, groups=2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"state": [1.0]}, TypeError, "state must be a tensor, got list"),
        ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
        ({"D": 1.0}, TypeError, "D must be a tensor, got float"),
        ({"z": GOOD["z"].to_sparse()}, ValueError, "z must be a dense tensor"),
        ({"state": GOOD["state"].int()}, TypeError, "state must have dtype float32.*, got int32"),
        (
            {"state": GOOD["state"][0, 0]},
            ValueError,
            r"state must have shape \(batch, dim, N\) or .*, got \(5, 16\)",
        ),
        (
            {"x": GOOD["x"][:, 0]},
            ValueError,
            r"x must have shape \(batch, heads, dim\) to go with a state of 4 axes",
        ),
        ({"x": GOOD["x"][..., :4]}, ValueError, r"x must have shape \(2, 6, 5\) to go with state and x"),
        ({"dt": GOOD["dt"][..., :1]}, ValueError, r"dt must have shape \(2, 6, 5\) .*, got \(2, 6, 1\)"),
        ({"dt": GOOD["dt"].long()}, TypeError, "dt must have dtype .*, got int64"),
        ({"dt": GOOD["dt"].double()}, TypeError, "dt must have dtype .*, got float64"),
        ({"A": GOOD["A"][0]}, ValueError, r"A must have shape \(6, 5, 16\) .*, got \(5, 16\)"),
        (
            {"B": GOOD["B"][..., :3]},
            ValueError,
            r"B must have shape \(batch, N\) or .* N = 16, got \(2, 2, 3\)",
        ),
        (
            {"B": torch.zeros(2, 4, 16)},
            ValueError,
            "B must have groups that divide the heads, got 4 groups for 6 heads",
        ),
        ({"B": torch.zeros(2, 0, 16)}, ValueError, "got 0 groups"),
        ({"C": torch.zeros(2, 3, 16)}, ValueError, "C must have as many groups as B, 2, got 3"),
        ({"D": torch.zeros(6)}, ValueError, r"D must have shape \(6, 5\) .*, got \(6,\)"),
        ({"z": torch.zeros(1, 6, 5)}, ValueError, r"z must have shape \(2, 6, 5\)"),
        ({"dt_bias": torch.zeros(5)}, ValueError, r"dt_bias must have shape \(6, 5\)"),
        (
            {"state": torch.zeros(3, 6, 5, 16)},
            ValueError,
            "one entry a sequence, batch = 2, got 3; or give state_ba",
        ),
        (
            {"state_batch_indices": torch.zeros(2)},
            TypeError,
            "indices must have dtype int32, int64, got",
        ),
        (
            {"state_batch_indices": torch.zeros(3).int()},
            ValueError,
            r"must have shape \(batch,\) = \(2,\), got",
        ),
        (
            {"state_batch_indices": torch.tensor([0, 2])},
            ValueError,
            "must be below 2, the slots of state, got 2 for sequence 1",
        ),
        (
            {"A": GOOD["A"].clone().requires_grad_()},
            NotImplementedError,
            "A requires a gradient, but a decode step",
        ),
    ],
)
def test_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    state = GOOD["state"].clone()
    with pytest.raises(error, match=message):
        selective_state_update(**({**GOOD, "state": state} | arguments))
    assert torch.equal(state, GOOD["state"])


@pytest.mark.parametrize("axis", range(4))
def test_an_expanded_state_cannot_be_written(axis: int) -> None:
    """Rows would read what others had written."""
    state = GOOD["state"]
    message = f"state must have a place .* got {state.shape[axis]} entries in one place along axis {axis}"
    with pytest.raises(ValueError, match=message):
        selective_state_update(**{**GOOD, "state": state.narrow(axis, 0, 1).clone().expand_as(state)})


def test_without_grad_mode_parameters_are_welcome() -> None:
    arguments = make(2, None, 9, 16)
    arguments["A"].requires_grad_()
    with torch.no_grad():
        assert not selective_state_update(**arguments).requires_grad
