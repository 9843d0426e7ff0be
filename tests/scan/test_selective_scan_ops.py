"""The selective scan inside torch: registered ops, torch.compile, autocast, mixed dtypes."""

import pytest
import torch
from selective_cases import moved, ours, problem, results
from torch import Tensor

from tilewright.scan import selective_scan

ops = torch.ops.tilewright
ALL = {"optional": ("all",), "delta_softplus": True}
NAMES = (
    *("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state", "cu_seqlens", "order"),
    *("delta_softplus", "reverse"),
)
CASES = {
    "bare": {},
    "everything": ALL,
    "packed": {"batch": 1, "cu_seqlens": [0, 3, 9], "order": "shared", **ALL},
    "constant": {"B": None, "C": None},
    "complex": {"complex_A": True, **ALL},
    "empty": {"batch": 0, **ALL},
}


def operands(device: torch.device, case: str) -> list:
    inputs = moved(problem(length=9, **CASES[case]), device)
    return [inputs.get(name, False if name in NAMES[-2:] else None) for name in NAMES]


# What opcheck looks at does not depend on the kernels: one CPU level will do.
DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.cuda)]


@pytest.mark.parametrize("flags", [(False, False), (True, True)])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_forward(device: torch.device, case: str, flags: tuple[bool, bool]) -> None:
    torch.library.opcheck(ops.selective_scan_fwd.default, (*operands(device, case), *flags))


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_backward(device: torch.device, case: str, every: bool) -> None:
    *inputs, softplus, reverse = operands(device, case)
    _, last_state, starts = ops.selective_scan_fwd(*inputs, softplus, reverse, True, True)
    dout = torch.ones_like(inputs[0])
    needed = [value is not None and (every or i % 2 == 1) for i, value in enumerate(inputs[:9])]
    arguments = (dout, torch.ones_like(last_state), *inputs, starts, softplus, reverse, needed)
    torch.library.opcheck(ops.selective_scan_bwd.default, arguments)
    assert len(ops.selective_scan_bwd(*arguments)) == sum(needed)


def test_fake_tensors_have_the_shapes_of_real_ones() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        u = torch.empty(1, 6, 100, dtype=torch.bfloat16)
        A, B = torch.empty(6, 4), torch.empty(1, 2, 4, 100, dtype=torch.bfloat16)
        ends = torch.empty(4, dtype=torch.int32)
        out, last_state = selective_scan(u, u, A, B, B, return_last_state=True, cu_seqlens=ends)
        assert (out.shape, out.dtype) == ((1, 6, 100), torch.bfloat16)
        assert (last_state.shape, last_state.dtype) == ((3, 6, 4), torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["bare", "everything", "packed", "constant", "complex"])
def test_compiles_without_graph_breaks(case: str) -> None:
    inputs = problem(length=9, **CASES[case])

    def run(**arguments: Tensor) -> tuple[Tensor, Tensor]:
        out, last_state = ours(**arguments)
        return out * 2, last_state

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = results(run, inputs)
    for name, value in results(compiled, inputs).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.slow
def test_compiles_for_any_length() -> None:
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (9, 64, 130):
        inputs = problem(length=length, **ALL)
        inputs["u"].requires_grad_()
        actual, expected = compiled(**inputs), selective_scan(**inputs)
        assert torch.equal(actual, expected)
        gradients = [torch.autograd.grad(out.sum(), inputs["u"])[0] for out in (actual, expected)]
        assert torch.equal(*gradients)


@pytest.mark.slow
def test_compiles_without_gradient() -> None:
    inputs = problem(length=9, **ALL)
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(**inputs), selective_scan(**inputs))


# -- dtypes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_precisions_are_cast_to_that_of_u(backend, dtype: torch.dtype) -> None:
    """As if the caller had cast them; gradients come back in each tensor's own dtype."""
    mixed = moved(problem(length=9, **ALL), backend.device)
    mixed |= {"u": mixed["u"].to(dtype), "z": mixed["z"].half(), "D": mixed["D"].bfloat16()}
    mixed |= {"A": mixed["A"].half(), "initial_state": mixed["initial_state"].half()}
    cast = {n: mixed[n].to(dtype) for n in ("delta", "z", "B", "C")}
    cast = {**mixed, **cast, **{n: mixed[n].float() for n in ("A", "D", "initial_state")}}
    actual, expected = results(ours, mixed), results(ours, cast)
    assert actual["out"].dtype == dtype
    assert actual["last_state"].dtype == torch.float32
    for name, value in actual.items():
        if name.startswith("d"):
            assert value.dtype == mixed[name[1:]].dtype, name
        assert torch.equal(value, expected[name].to(value.dtype)), name


def test_a_constant_map_may_be_real_under_a_complex_A(backend) -> None:
    inputs = moved(problem(length=9, complex_A=True, B=None, C=None), backend.device)
    inputs |= {n: inputs[n].real.clone() for n in ("B", "C")}
    cast = {**inputs, **{n: inputs[n].to(torch.complex64) for n in ("B", "C")}}
    actual, expected = results(ours, inputs), results(ours, cast)
    assert torch.equal(actual["out"], expected["out"])
    assert torch.equal(actual["dB"], expected["dB"].real)


def test_conjugated_and_negated_views(backend) -> None:
    """torch's lazy conjugation: the memory holds something else."""
    inputs = moved(problem(length=9, complex_A=True, B=None, C=1), backend.device)
    lazy = {**inputs, "A": inputs["A"].conj(), "B": inputs["B"].conj()}
    lazy["u"] = torch.complex(torch.zeros_like(inputs["u"]), -inputs["u"]).conj().imag
    assert lazy["A"].is_conj()
    assert lazy["u"].is_neg()
    own = {**inputs, "A": inputs["A"].conj().resolve_conj(), "B": inputs["B"].conj().resolve_conj()}
    actual, expected = results(ours, lazy), results(ours, own)
    for name in actual:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_leaves_the_scan_to_the_dtype_of_u(backend, dtype: torch.dtype) -> None:
    """Under autocast linear layers hand on half precision, which decides; the states stay float32."""
    inputs = moved(problem(length=9, **ALL), backend.device)
    with torch.autocast(backend.device.type, dtype=dtype):
        u = torch.nn.functional.linear(inputs["u"], torch.eye(9, device=backend.device))
        assert u.dtype == dtype
        out, last_state = selective_scan(**{**inputs, "u": u}, return_last_state=True)
        full = selective_scan(**inputs)
    assert (out.dtype, last_state.dtype, full.dtype) == (dtype, torch.float32, torch.float32)
    expected = selective_scan(**{**inputs, "u": u})
    assert torch.equal(out, expected)
    assert torch.equal(full, selective_scan(**inputs))


def test_writing_to_a_saved_input_is_noticed() -> None:
    inputs = problem(length=9, **ALL)
    inputs["u"].requires_grad_()
    out = selective_scan(**inputs)
    inputs["delta"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_inputs_are_not_written_to(backend) -> None:
    inputs = moved(problem(length=70, **ALL), backend.device)
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, Tensor)}
    results(ours, inputs)
    for name, value in before.items():
        assert torch.equal(inputs[name], value), name


@pytest.mark.cuda
def test_runs_on_the_current_stream_and_in_a_graph() -> None:
    device = torch.device("cuda")
    inputs = moved(problem(batch=1, length=70, cu_seqlens=[0, 3, 70], order="shared", **ALL), device)
    expected = selective_scan(**inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = selective_scan(**inputs)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(aside, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = selective_scan(**inputs)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)
