"""The selective scan against its formula in float64: output, last states and every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selective_cases import (
    HALF,
    assert_results,
    backward,
    check,
    check_inputs,
    moved,
    ours,
    problem,
    references,
    results,
)
from torch import Tensor

import tilewright.testing
from reference import selective_scan as reference
from tilewright import _C
from tilewright.scan import selective_scan

CPU = torch.device("cpu")
ALL = {"optional": ("all",), "delta_softplus": True}

CASES = {
    "bare": {},
    "no_softplus": {"optional": ("all",)},
    "everything": ALL,
    "D": {"optional": ("D",)},
    "z": {"optional": ("z",)},
    "bias": {"optional": ("delta_bias",)},
    "initial_state": {"optional": ("initial_state",)},
    "one_channel": {"dim": 1, **ALL},
    "a_vector_of_channels": {"dim": 16, "length": 7, **ALL},
    "channels_and_one": {"dim": 33, "length": 7, **ALL},
    "tiles_of_channels": {"batch": 1, "dim": 300, "length": 7, **ALL},
    "tiles_of_channels_usual": {"batch": 1, "dim": 150, "length": 9, "states": 16, **ALL},
    "stages_usual": {"dim": 40, "length": 137, "states": 16, **ALL},
    "tiles_of_channels_complex": {"batch": 1, "dim": 150, "length": 7, "complex_A": True, **ALL},
    "tiles_of_channels_constant": {"batch": 1, "dim": 150, "length": 7, "B": None, "C": None, **ALL},
    "tiles_of_grouped_channels": {"batch": 1, "dim": 260, "length": 7, "B": 2, "C": 2, **ALL},
    "parts_of_a_sequence": {"batch": 1, "dim": 2, "length": 263, **ALL},
    "parts_of_a_sequence_usual": {
        "batch": 1,
        "dim": 2,
        "length": 200,
        "states": 16,
        "order": "batched",
        **ALL,
    },
    "parts_of_a_sequence_constant": {"batch": 1, "dim": 2, "length": 200, "B": None, "C": None, **ALL},
    "parts_of_a_packed_sequence": {"batch": 1, "dim": 2, "length": 200, "cu_seqlens": (0, 200), **ALL},
    "parts_of_a_sequence_complex": {
        "batch": 1,
        "dim": 2,
        "length": 200,
        "complex_A": True,
        "reverse": True,
        **ALL,
    },
    "grouped": {"dim": 6, "B": 2, "C": 2, **ALL},
    "many_channels_a_group": {"dim": 34, "B": 2, "C": 2, "length": 7, **ALL},
    "a_group_each": {"dim": 5, "B": 5, "C": 5, "length": 7, **ALL},
    "rank_three": {"B": 0, "C": 0, **ALL},
    "B_of_one_group": {"dim": 6, "B": 0, "C": 3, **ALL},
    "C_of_one_group": {"dim": 6, "B": 2, "C": 1, **ALL},
    "constant_B": {"B": None, "C": 0, **ALL},
    "constant_B_grouped_C": {"dim": 6, "B": None, "C": 3, **ALL},
    "constant_C": {"B": 1, "C": None, **ALL},
    "grouped_B_constant_C": {"dim": 6, "B": 3, "C": None, **ALL},
    "constant": {"B": None, "C": None, **ALL},
    "complex": {"complex_A": True, **ALL},
    "complex_bare": {"complex_A": True, "B": 0, "C": 0},
    "complex_grouped": {"complex_A": True, "dim": 6, "B": 2, "C": 2, **ALL},
    "complex_constant": {"complex_A": True, "B": None, "C": None, **ALL},
    "complex_constant_B": {"complex_A": True, "dim": 6, "B": None, "C": 2, **ALL},
    "complex_constant_C": {"complex_A": True, "B": 1, "C": None, **ALL},
    "complex_vector_of_channels": {"complex_A": True, "dim": 17, "length": 7, "states": 5, **ALL},
    "reverse": {"reverse": True, **ALL},
    "order": {"order": "shared", **ALL},
    "order_of_each_row": {"order": "batched", **ALL},
    "order_reverse": {"order": "batched", "reverse": True, **ALL},
    "complex_order_reverse": {"complex_A": True, "order": "batched", "reverse": True, **ALL},
    "packed": {"batch": 1, "length": 200, "cu_seqlens": (0, 1, 64, 130, 200), **ALL},
    "packed_reverse": {"batch": 1, "length": 70, "cu_seqlens": (0, 3, 68, 70), "reverse": True, **ALL},
    "packed_order": {"batch": 1, "length": 70, "cu_seqlens": (0, 3, 68, 70), "order": "shared", **ALL},
    "packed_order_reverse": {
        **{"batch": 1, "length": 70, "cu_seqlens": (0, 3, 68, 70), "order": "batched", "reverse": True},
        **ALL,
    },
    "packed_complex": {"complex_A": True, "batch": 1, "length": 70, "cu_seqlens": (0, 65, 70), **ALL},
    "packed_constant": {"B": None, "C": None, "batch": 1, "length": 70, "cu_seqlens": (0, 65, 70), **ALL},
    "packed_tokens": {"batch": 1, "length": 9, "cu_seqlens": tuple(range(10)), **ALL},
}


@pytest.mark.parametrize("case", CASES)
def test_options(backend, case: str) -> None:
    check(backend.device, **CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_parts_of_every_sequence(case: str) -> None:
    """On a GPU that the work does not fill: sequences are split, in every tile, group and batch row."""
    longer = {} if "cu_seqlens" in CASES[case] else {"length": 150}
    with tilewright.testing.emulated(multiprocessors=132):
        check(CPU, **{**CASES[case], **longer})


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "case",
    [
        *("bare", "everything", "grouped", "constant", "complex", "packed_order_reverse"),
        *("tiles_of_channels_usual", "stages_usual"),
    ],
)
def test_half_precision(backend, case: str, dtype: torch.dtype) -> None:
    check(backend.device, dtype=dtype, **CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_double_precision(case: str) -> None:
    check(CPU, dtype=torch.float64, **CASES[case])


@pytest.mark.parametrize("length", [1, 7, 63, 64, 127, 128, 129])
@pytest.mark.parametrize("case", ["everything", "complex"])
def test_lengths(backend, case: str, length: int) -> None:
    check(backend.device, **{**CASES[case], "length": length})


@pytest.mark.parametrize("states", [1, 2, 4, 15, 16, 17, 64, 256])
@pytest.mark.parametrize("case", ["everything", "complex", "constant"])
def test_states(backend, case: str, states: int) -> None:
    check(backend.device, **{**CASES[case], "states": states, "batch": 1, "length": 5})


@pytest.mark.cuda
@pytest.mark.parametrize("case", ["everything", "complex", "constant", "tiles_of_channels_usual"])
def test_sequences_that_no_gpu_splits(case: str) -> None:
    """Channels for all multiprocessors of a large GPU: else it splits even short sequences."""
    check(torch.device("cuda"), **{**CASES[case], "batch": 4, "dim": 2400, "length": 200})


@pytest.mark.slow
@pytest.mark.parametrize("length", [2047, 2049])
def test_long(length: int) -> None:
    check(CPU, batch=1, dim=17, length=length, states=4, **ALL)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", [128, 372, 784, 1134])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_shapes_mamba_tests(dtype: torch.dtype, length: int, groups: int) -> None:
    """The sizes and tolerances of mamba_ssm's own test, also those it has commented out."""
    inputs = problem(dim=4, states=8, length=length, B=groups, C=groups, dtype=dtype, seed=length, **ALL)
    inputs.pop("initial_state")
    actual, expected = results(ours, inputs), results(reference.selective_scan, inputs)
    tolerances = {torch.float32: (6e-4, 2e-3), torch.float16: (3e-3, 5e-3), torch.bfloat16: (3e-2, 5e-2)}
    rtol, atol = tolerances[dtype]
    scale = {"du": (2, 2), "ddelta": (5, 10), "dA": (1, 5)}
    for name in actual:
        r, a = scale.get(name, (1, 1))
        torch.testing.assert_close(actual[name], expected[name], rtol=rtol * r, atol=atol * a)


def test_more_channels_than_a_grid_has_rows() -> None:
    check(CPU, batch=1, dim=65537, length=2, states=1, **ALL)


@pytest.mark.parametrize(
    "empty", [{"batch": 0}, {"length": 0}, {"batch": 1, "length": 0, "cu_seqlens": (0,)}]
)
@pytest.mark.parametrize("case", ["everything", "constant", "complex", "complex_constant"])
def test_nothing_to_scan(backend, case: str, empty: dict) -> None:
    check(backend.device, **{**CASES[case], **empty})


def test_no_tokens_leave_the_states_as_they_were(backend) -> None:
    inputs = moved(problem(length=0, **ALL), backend.device)
    out, last_state = selective_scan(return_last_state=True, **inputs)
    assert out.shape == (2, 5, 0)
    assert torch.equal(last_state, inputs["initial_state"])


def test_returns_a_tensor_or_a_pair(backend) -> None:
    inputs = moved(problem(length=7), backend.device)
    out, last_state = selective_scan(**inputs, return_last_state=True)
    alone = selective_scan(**inputs)
    assert isinstance(alone, Tensor)
    assert torch.equal(alone, out)
    assert last_state.shape == (2, 5, 3)


def test_arguments_by_position() -> None:
    inputs = problem(**ALL)
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    expected = selective_scan(**inputs, return_last_state=True)
    initial_state = inputs["initial_state"]
    actual = selective_scan(*(inputs[n] for n in names), True, True, initial_state=initial_state)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


# -- memory layouts ---------------------------------------------------------------------------------


def channel_last(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def with_gaps(x: Tensor) -> Tensor:
    room = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 3), float("nan"))
    view = room[..., 1 : 2 * x.shape[-1] + 1 : 2]
    return view.copy_(x)


def batch_inside(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def shared_by_all(x: Tensor) -> Tensor:
    return x[..., :1].expand(x.shape)


def one_row(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


LAYOUTS = [channel_last, with_gaps, batch_inside, shared_by_all, one_row]
TENSORS = ("u", "delta", "z", "B", "C", "A", "D", "delta_bias", "initial_state")


@pytest.mark.parametrize("case", ["everything", "complex_grouped", "constant", "order_reverse"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(backend, layout, case: str) -> None:
    inputs = problem(**CASES[case])
    for name in TENSORS:
        if inputs[name].dim() > 1 or layout not in (channel_last, batch_inside):
            inputs[name] = layout(inputs[name])
    check_inputs(backend.device, inputs)


@pytest.mark.parametrize("name", ["u", "delta", "z", "B", "C"])
def test_layouts_that_differ(backend, name: str) -> None:
    """One tensor channel-last, the others not: as Hugging Face's mixers have it."""
    inputs = problem(dim=34, length=65, B=0, C=0, **ALL)
    inputs[name] = channel_last(inputs[name])
    check_inputs(backend.device, inputs)


def test_slices_of_one_projection(backend) -> None:
    """delta, B and C as they lie behind one linear layer: channel-last views into one tensor."""
    inputs = problem(dim=5, length=9, B=0, C=0, optional=("z",))
    parts = torch.cat([inputs[n].transpose(1, 2) for n in ("delta", "B", "C")], dim=-1)
    slices = parts.split([5, 3, 3], dim=-1)
    inputs |= {n: s.transpose(1, 2) for n, s in zip(("delta", "B", "C"), slices, strict=True)}
    check_inputs(backend.device, inputs)


def test_outputs_and_gradients_are_laid_out_like_their_inputs(backend) -> None:
    inputs = moved(problem(**ALL), backend.device)
    for name in ("u", "delta", "z", "B", "C"):
        inputs[name] = channel_last(inputs[name]).requires_grad_()
    out = selective_scan(**inputs)
    assert out.stride() == inputs["u"].stride()
    names = ("u", "delta", "z", "B", "C")
    for name, gradient in zip(names, torch.autograd.grad(out.sum(), [inputs[n] for n in names]), strict=True):
        assert gradient.stride() == inputs[name].stride(), name


def test_an_expanded_input_gets_the_sum_of_its_gradients(backend) -> None:
    inputs = moved(problem(**ALL), backend.device)
    row = inputs["delta"][:1, :1].detach().requires_grad_()
    shared = {**inputs, "delta": row.expand(inputs["delta"].shape)}
    copied = inputs["delta"][:1, :1].detach().requires_grad_()
    own = {**inputs, "delta": copied.repeat(2, 5, 1)}
    for arguments in (shared, own):
        selective_scan(**arguments).square().sum().backward()
    torch.testing.assert_close(row.grad, copied.grad)


# -- gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        "everything",
        "no_softplus",
        "grouped",
        "constant",
        "complex",
        "complex_constant",
        "packed_order_reverse",
    ],
)
def test_gradcheck(case: str) -> None:
    options = {**CASES[case], "dtype": torch.float64, "dim": 2, "states": 2, "batch": 1, "length": 4}
    if "cu_seqlens" in options:
        options["cu_seqlens"] = (0, 1, 4)
    inputs = problem(**options)
    names = [n for n in TENSORS if n in inputs]
    others = {k: v for k, v in inputs.items() if k not in names}
    leaves = [inputs[n].requires_grad_() for n in names]
    assert torch.autograd.gradcheck(
        lambda *values: ours(**dict(zip(names, values, strict=True)), **others), leaves
    )


@pytest.mark.parametrize("case", ["everything", "constant", "complex"])
def test_a_gradient_alone_is_the_same(backend, case: str) -> None:
    inputs = moved(problem(length=9, **CASES[case]), backend.device)
    full = results(ours, inputs)
    for name in TENSORS:
        leaf = inputs[name].detach().requires_grad_()
        out, last_state = ours(**{**inputs, name: leaf})
        assert out.requires_grad
        backward(out, last_state)
        torch.testing.assert_close(leaf.grad.cpu(), full[f"d{name}"])


@pytest.mark.parametrize("complex_A", [False, True])
def test_gradient_through_one_output(backend, complex_A: bool) -> None:
    """Of the last states alone, and of the output alone, they add up to that of both."""
    inputs = moved(problem(length=9, complex_A=complex_A, **ALL), backend.device)
    leaves = {n: inputs[n].requires_grad_() for n in TENSORS}
    out, last_state = ours(**inputs)
    end = torch.view_as_real(last_state) if complex_A else last_state

    def gradients(loss: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(loss, leaves.values(), retain_graph=True, materialize_grads=True)
        return list(found)

    both = gradients(out.sum() + end.square().sum())
    apart = zip(gradients(out.sum()), gradients(end.square().sum()), strict=True)
    for name, whole, (a, b) in zip(leaves, both, apart, strict=True):
        torch.testing.assert_close(whole, a + b, msg=lambda m, name=name: f"{name}: {m}")


def test_without_gradient_nothing_is_kept(backend) -> None:
    inputs = moved(problem(**ALL), backend.device)
    with_gradient = selective_scan(**{**inputs, "u": inputs["u"].clone().requires_grad_()})
    without = selective_scan(**inputs)
    assert not without.requires_grad
    assert torch.equal(with_gradient, without)
    with torch.no_grad():
        assert not selective_scan(**{**inputs, "u": inputs["u"].clone().requires_grad_()}).requires_grad


def test_the_gradient_of_a_gradient_is_refused() -> None:
    inputs = problem(length=3)
    u = inputs["u"].requires_grad_()
    with pytest.raises(NotImplementedError, match="selective_scan cannot be differentiated twice"):
        torch.autograd.grad(selective_scan(**inputs).sum(), u, create_graph=True)


# -- special values ---------------------------------------------------------------------------------


def test_steps_of_zero_leave_the_state_alone(backend) -> None:
    """Padding with delta = 0 changes no bit of the last states."""
    inputs = problem(length=70, optional=("D", "z", "initial_state"))
    short = {**inputs, **{n: inputs[n][..., :66] for n in ("u", "delta", "z", "B", "C")}}
    inputs["delta"][..., 66:] = 0
    padded = selective_scan(**moved(inputs, backend.device), return_last_state=True)[1]
    assert torch.equal(padded, selective_scan(**moved(short, backend.device), return_last_state=True)[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"])
def test_nan_and_infinity_spread_as_the_formula_says(backend, name: str, value: float) -> None:
    inputs = problem(dim=18, length=9, **ALL)
    inputs[name].view(-1)[inputs[name].numel() // 2] = value
    out, last_state = ours(**moved(inputs, backend.device))
    expected = reference.selective_scan(**inputs)
    for actual, plain in zip((out.cpu(), last_state.cpu()), expected, strict=True):
        torch.testing.assert_close(actual, plain, equal_nan=True)


def test_growing_states_overflow_to_infinity(backend) -> None:
    inputs = problem(length=40)
    inputs["A"] = -inputs["A"] * 20
    actual = ours(**moved(inputs, backend.device))
    for a, plain in zip(actual, reference.selective_scan(**inputs), strict=True):
        assert torch.equal(torch.isfinite(a.cpu()), torch.isfinite(plain))
        assert not bool(torch.isfinite(plain).all())


def test_large_steps_forget_everything(backend) -> None:
    """exp underflows to zero: no trace of the state before, no NaN, also in the gradients."""
    inputs = problem(length=40, optional=("initial_state",))
    inputs["delta"][..., 20] = 1e6
    check_inputs(backend.device, inputs)


# -- anything goes ----------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> dict:
    groups = draw(st.sampled_from([1, 2, 3]))
    kinds = [None, 0, 1, groups]
    case = {
        "dim": groups * draw(st.integers(1, 12)),
        "length": draw(st.sampled_from([0, 1, 2, 7, 63, 64, 65, 129])),
        "states": draw(st.sampled_from([1, 2, 3, 5, 8, 17])),
        "dtype": draw(st.sampled_from([torch.float32, *HALF, torch.float64])),
        "complex_A": draw(st.booleans()),
        "B": draw(st.sampled_from(kinds)),
        "C": draw(st.sampled_from(kinds)),
        "optional": draw(st.lists(st.sampled_from(["D", "z", "delta_bias", "initial_state"]), unique=True)),
        "order": draw(st.sampled_from([None, "shared", "batched"])),
        "seed": draw(st.integers(0, 100)),
        "delta_softplus": draw(st.booleans()),
        "reverse": draw(st.booleans()),
    }
    if draw(st.booleans()):
        inner = draw(st.sets(st.integers(1, max(1, case["length"] - 1)), max_size=4))
        ends = sorted(t for t in inner if t < case["length"])
        case |= {"batch": 1, "cu_seqlens": [0, *ends, *([case["length"]] if case["length"] else [])]}
    else:
        case["batch"] = draw(st.integers(0, 3))
    return case


@given(
    case=problems(),
    layouts=st.lists(st.sampled_from([None, channel_last, with_gaps, one_row]), min_size=5, max_size=5),
)
@settings(deadline=None)
def test_any_combination(case: dict, layouts: list) -> None:
    inputs = problem(**case)
    for name, layout in zip(("u", "delta", "B", "C", "z"), layouts, strict=True):
        if layout is not None and name in inputs:
            inputs[name] = layout(inputs[name])
    exact, plain = references(inputs)
    level = _C.cpu_level()
    try:
        for name in _C.cpu_levels():
            _C.set_cpu_level(name)
            assert_results(results(ours, inputs), exact, plain)
    finally:
        _C.set_cpu_level(level)
    if case["dtype"] != torch.float64:
        with tilewright.testing.emulated():
            assert_results(results(ours, inputs), exact, plain)
