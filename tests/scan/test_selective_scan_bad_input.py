"""What the selective scan refuses, and in which words."""

import pytest
import torch
from selective_cases import problem

import tilewright.testing
from tilewright import _C
from tilewright.scan import selective_scan

GOOD = problem(dim=6, length=8, states=4, B=2, C=2, optional=("all",))
PACKED = problem(batch=1, dim=6, length=8, states=4, B=2, C=2, optional=("all",), cu_seqlens=[0, 3, 8])
COMPLEX = problem(dim=6, length=8, states=4, B=2, C=2, complex_A=True, optional=("all",))


def like(name: str, *shape: int, of: dict = GOOD) -> dict:
    return {name: of[name].new_zeros(shape)}


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"])
def test_refuses_what_is_no_dense_tensor(name: str) -> None:
    for value, error, message in (
        ([1.0], TypeError, f"{name} must be a tensor, got list"),
        (GOOD[name].to_sparse(), ValueError, f"{name} must be a dense tensor, got layout"),
        (GOOD[name].to("meta"), ValueError, f"{name} must be on a CPU or CUDA device, got meta"),
        (GOOD[name].int(), TypeError, f"{name} must have dtype .*, got int32"),
        (GOOD[name].bool(), TypeError, f"{name} must have dtype .*, got bool"),
    ):
        with pytest.raises(error, match=message):
            selective_scan(**{**GOOD, name: value})


@pytest.mark.parametrize("name", ["delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"])
def test_refuses_to_mix_with_double_precision(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must have dtype .*, got float64"):
        selective_scan(**{**GOOD, name: GOOD[name].double()})
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in GOOD.items()}
    with pytest.raises(TypeError, match=f"{name} must have dtype float64.*, got float32"):
        selective_scan(**{**wide, name: GOOD[name]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (like("u", 6, 8), r"u must have shape \(batch, dim, length\), dim > 0, got \(6, 8\)"),
        (like("u", 2, 0, 8), r"dim > 0, got \(2, 0, 8\)"),
        (
            like("delta", 2, 6, 7),
            r"delta must have shape \(batch, dim, length\) = \(2, 6, 8\), got \(2, 6, 7\)",
        ),
        (like("delta", 1, 6, 8), r"got \(1, 6, 8\)"),
        (like("z", 2, 8, 6), r"z must have shape \(batch, dim, length\) = \(2, 6, 8\), got \(2, 8, 6\)"),
        (like("A", 5, 4), r"A must have shape \(dim, states\) = \(6, states\), got \(5, 4\)"),
        (like("A", 6), r"A must have shape .*, got \(6,\)"),
        (like("A", 6, 0), "A must have 1 to 256 states a channel, got 0"),
        (like("A", 6, 257), "A must have 1 to 256 states a channel, got 257"),
        (like("B", 6, 5), r"B must have shape \(dim, states\) = \(6, 4\), got \(6, 5\)"),
        (like("B", 2, 5, 8), r"B must have shape \(batch, states, length\) = \(2, 4, 8\), got \(2, 5, 8\)"),
        (like("B", 2, 4, 16), r"got \(2, 4, 16\)"),
        (like("B", 6), r"B must have shape .*, got \(6,\)"),
        (like("C", 2, 2, 4, 9), r"C must have shape \(batch, groups, states, length\) = \(2, 2, 4, 8\)"),
        (like("C", 2, 2, 4, 8, 1), r"got \(2, 2, 4, 8, 1\)"),
        (like("B", 2, 4, 4, 8), "B has 4 groups, which do not divide the 6 channels of u"),
        (like("C", 2, 0, 4, 8), "C has 0 groups"),
        (like("C", 2, 3, 4, 8), "B and C must have equally many groups, or one of them 1, got 2 and 3"),
        (like("D", 5), r"D must have shape \(dim,\) = \(6,\), got \(5,\)"),
        (like("D", 6, 1), r"got \(6, 1\)"),
        (like("delta_bias", 1), r"delta_bias must have shape \(dim,\) = \(6,\), got \(1,\)"),
        (
            like("initial_state", 1, 6, 4),
            r"initial_state must have shape \(sequences, dim, states\) = \(2, 6, 4\), got \(1, 6, 4\)",
        ),
        (
            {"order": torch.arange(7)},
            r"order must have shape \(length,\) = \(8,\) or .* = \(2, 8\), got \(7,\)",
        ),
        ({"order": torch.arange(8).expand(3, 8)}, r"got \(3, 8\)"),
        ({"order": torch.tensor([0, 1, 2, 3, 4, 5, 6, 6])}, "order must hold every token of 0 to 7 once"),
        ({"order": torch.tensor([1, 2, 3, 4, 5, 6, 7, 8])}, "order must hold every token"),
        ({"order": torch.tensor([0, 1, 2, 3, 4, 5, 6, -1])}, "order must hold every token"),
        ({"order": torch.zeros(2, 8, dtype=torch.int64)}, "order must hold every token"),
        ({"order": torch.tensor(2**62).expand(8)}, "order must hold every token"),
        (
            {"cu_seqlens": torch.tensor([0, 8])},
            "cu_seqlens needs a batch of 1, .*, got 2",
        ),
    ],
)
def test_refuses_shapes_and_values(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**GOOD, **arguments})


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([0, 3, 9], r"cu_seqlens must increase strictly from 0 to the length 8, got \[0, 3, 9\]"),
        ([0, 3, 7], r"got \[0, 3, 7\]"),
        ([1, 3, 8], r"got \[1, 3, 8\]"),
        ([0, 8, 8], "cu_seqlens must increase strictly"),
        ([0, -3, 8], "cu_seqlens must increase strictly"),
        ([0, 8], r"initial_state must have shape \(sequences, dim, states\) = \(1, 6, 4\), got \(2, 6, 4\)"),
        ([[0, 3, 8]], r"cu_seqlens must have shape \(sequences \+ 1,\), got \(1, 3\)"),
        ([], r"got \(0,\)"),
    ],
)
def test_refuses_ends_of_sequences(ends: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**PACKED, "cu_seqlens": torch.tensor(ends, dtype=torch.int64)})


def test_refuses_ends_without_tokens() -> None:
    inputs = {k: v for k, v in problem(batch=1, length=0).items() if k != "initial_state"}
    with pytest.raises(ValueError, match="cu_seqlens must increase strictly"):
        selective_scan(**inputs, cu_seqlens=torch.tensor([0, 0]))


@pytest.mark.parametrize("name", ["cu_seqlens", "order"])
def test_refuses_positions_that_are_no_integers(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
        selective_scan(**{**PACKED, name: [0, 8]})
    for dtype in (torch.float32, torch.int16, torch.bool):
        with pytest.raises(TypeError, match=f"{name} must have dtype int32, int64, got"):
            selective_scan(**{**PACKED, name: torch.zeros(8, dtype=dtype)})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (like("B", 2, 2, 4, 8), ValueError, r"\(batch, groups, states, 2 \* length\) = \(2, 2, 4, 16\), got"),
        (
            {"C": torch.zeros(2, 2, 4, 8, dtype=torch.complex64)},
            TypeError,
            r"C must be real where it changes with the token.* torch.view_as_real\(C\).flatten\(-2\)",
        ),
        ({"A": COMPLEX["A"].to(torch.complex128)}, TypeError, "A must have dtype .*, got complex128"),
        ({"u": COMPLEX["A"].expand(2, 6, 4)}, TypeError, "u must have dtype .*, got complex64"),
        ({"D": torch.zeros(6, dtype=torch.complex64)}, TypeError, "D must have dtype .*, got complex64"),
    ],
)
def test_refuses_for_complex_A(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        selective_scan(**{**COMPLEX, **arguments})


def test_refuses_complex_maps_and_states_for_real_A() -> None:
    for name, shape in (("B", (6, 4)), ("C", (6, 4)), ("initial_state", (2, 6, 4))):
        value = torch.zeros(shape, dtype=torch.complex64)
        with pytest.raises(TypeError, match=f"{name} must have dtype .*, got complex64"):
            selective_scan(**{**GOOD, name: value})


def test_gpus_take_no_double_precision() -> None:
    with tilewright.testing.emulated(), pytest.raises(TypeError, match="float64, which has CPU kernels only"):
        selective_scan(**problem(length=3, dtype=torch.float64))


# -- the extension looks again, whoever calls it ----------------------------------------------------


def bound(**changes: object) -> list:
    """Arguments of the extension's forward function, some of them exchanged."""
    u = torch.zeros(2, 6, 8)
    arguments = {"u": u, "delta": u, "A": torch.zeros(6, 4), "B": torch.zeros(2, 2, 4, 8)}
    arguments |= {"C": torch.zeros(2, 2, 4, 8), "D": None, "z": None, "delta_bias": None}
    arguments |= {"initial_state": None, "cu_seqlens": None, "order": None, "softplus": False}
    arguments |= {"reverse": False, "out": torch.empty_like(u), "last_state": None, "chunk_states": None}
    arguments |= {"workspace": None, "threads": 1}
    assert arguments.keys() >= changes.keys()
    return list((arguments | changes).values())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"u": [1.0]}, TypeError, "u must be a tensor, got list"),
        ({"u": torch.zeros(6, 8)}, ValueError, r"u: got shape \(6, 8\), expected \(batch, dim, length\)"),
        ({"u": torch.zeros(2, 0, 8)}, ValueError, "expected at least one channel"),
        ({"u": torch.zeros(2, 6, 8).int()}, TypeError, "u: got dtype int32, allowed: float32, float16"),
        ({"u": torch.zeros(2, 6, 8).half()}, TypeError, "delta must have dtype float16, got float32"),
        ({"A": torch.zeros(6)}, ValueError, r"A: got shape \(6,\), expected \(dim, states\)"),
        ({"A": torch.zeros(6, 300)}, ValueError, "A: got 300 states a channel, allowed: 1 to 256"),
        ({"A": torch.zeros(6, 4).half()}, TypeError, "A: got dtype float16, allowed: float32, complex64"),
        ({"A": torch.zeros(5, 4)}, ValueError, r"A: got shape \(5, 4\), expected \(dim, states\) = \(6, 4\)"),
        ({"delta": torch.zeros(2, 6, 9)}, ValueError, r"delta: got shape .* = \(2, 6, 8\)"),
        ({"B": torch.zeros(2, 4, 4, 8)}, ValueError, "B, C: got 4 groups for 6 channels"),
        ({"B": torch.zeros(2, 4, 8)}, ValueError, "B, C: got shapes .*, whose groups differ"),
        (
            {"B": torch.zeros(2, 3, 4, 8)},
            ValueError,
            r"C: got shape .*, expected .* = \(2, 3, 4, 8\)",
        ),
        ({"B": torch.zeros(6, 5)}, ValueError, r"B: got shape \(6, 5\), expected \(dim, states\) = \(6, 4\)"),
        ({"C": torch.zeros(2, 2, 4, 9)}, ValueError, "C: got shape"),
        ({"D": torch.zeros(6).half()}, TypeError, "D must have dtype float32, got float16"),
        ({"D": torch.zeros(12)[::2]}, ValueError, "D must be contiguous"),
        ({"z": torch.zeros(2, 6, 1)}, ValueError, "z: got shape"),
        (
            {"delta_bias": torch.zeros(5)},
            ValueError,
            r"delta_bias: got shape .* = \(6,\)",
        ),
        ({"initial_state": torch.zeros(3, 6, 4)}, ValueError, r"initial_state: got shape .* = \(2, 6, 4\)"),
        ({"cu_seqlens": torch.tensor([0, 8])}, ValueError, "cu_seqlens: packed sequences need a batch of 1"),
        (
            {"cu_seqlens": torch.tensor([0, 8]).int()},
            TypeError,
            "cu_seqlens must have dtype int64, got int32",
        ),
        ({"order": torch.arange(9)}, ValueError, r"order: got shape \(9,\), expected \(length,\) = \(8,\)"),
        ({"order": torch.arange(8).expand(2, 8)}, ValueError, "order must be contiguous"),
        ({"out": torch.zeros(2, 6, 7)}, ValueError, "out: got shape"),
        ({"out": torch.zeros(2, 6, 8).half()}, TypeError, "out must have dtype float32, got float16"),
        ({"last_state": torch.zeros(2, 6, 5)}, ValueError, "last_state: got shape"),
        ({"chunk_states": torch.zeros(2, 6, 4)}, ValueError, r"chunk_states: got shape .* = \(2, 4, 6\)"),
    ],
)
def test_the_extension_refuses(changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        _C.selective_scan_fwd(*bound(**changes))


def test_the_extension_counts_gradients() -> None:
    *inputs, out, _, _, workspace, threads = bound()
    starts = torch.zeros(2, 4, 6)
    with pytest.raises(ValueError, match="gradients: got 3 entries, expected 9"):
        _C.selective_scan_bwd(out, None, *inputs[:11], starts, False, False, [None] * 3, workspace, threads)
