"""The selective scan held against itself: pieces against the whole, orders against permuted copies."""

import pytest
import torch
from selective_cases import Inputs, moved, ours, problem, results
from torch import Tensor

import tilewright.testing
from tilewright.scan import selective_scan

ALL = {"optional": ("all",), "delta_softplus": True}
STEPS = ("u", "delta", "z", "B", "C")


def cut(inputs: Inputs, start: int, end: int) -> Inputs:
    """The tokens from start to end."""
    width = 2 if inputs["A"].is_complex() else 1
    cut = dict(inputs)
    for name in STEPS:
        if name in inputs and (name not in ("B", "C") or inputs[name].dim() > 2):
            scale = width if name in ("B", "C") else 1
            cut[name] = inputs[name][..., scale * start : scale * end]
    return cut


def indexed(inputs: Inputs, tokens: Tensor) -> Inputs:
    """Copies of a real problem's inputs with the tokens (batch, length) in another order."""
    copies = dict(inputs)
    for name in STEPS:
        x = inputs[name]
        index = tokens.view(x.shape[0], *[1] * (x.dim() - 2), x.shape[-1]).expand(x.shape)
        copies[name] = x.gather(-1, index)
    return copies


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", [{}, {"complex_A": True}, {"B": None, "C": None}])
@pytest.mark.parametrize("pieces", [(64, 129), (1, 65, 129), (30, 129), (128, 129)])
def test_pieces_make_the_whole(backend, pieces: tuple[int, ...], kind: dict) -> None:
    """Feeding each piece's last states to the next as initial states."""
    inputs = moved(problem(length=129, **kind, **ALL), backend.device)
    whole, end = selective_scan(**inputs, return_last_state=True)
    state, outputs, start = inputs["initial_state"], [], 0
    for stop in pieces:
        piece = {**cut(inputs, start, stop), "initial_state": state}
        out, state = selective_scan(**piece, return_last_state=True)
        outputs.append(out)
        start = stop
    assert_close(torch.cat(outputs, -1), whole)
    assert_close(state, end)


def test_gradients_pass_through_states_between_pieces(backend) -> None:
    """Backpropagation through pieces that hand their states on is that through the whole."""
    inputs = moved(problem(length=70, **ALL), backend.device)

    def in_pieces(**arguments: Tensor) -> tuple[Tensor, Tensor]:
        state, outputs = arguments["initial_state"], []
        for start, stop in ((0, 33), (33, 70)):
            out, state = ours(**{**cut(arguments, start, stop), "initial_state": state})
            outputs.append(out)
        return torch.cat(outputs, -1), state

    whole, pieces = results(ours, inputs), results(in_pieces, inputs)
    for name, value in pieces.items():
        torch.testing.assert_close(
            value, whole[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("complex_A", [False, True])
def test_packed_sequences_are_separate_ones(backend, complex_A: bool, reverse: bool) -> None:
    ends = [0, 5, 6, 70, 135]
    options = {"batch": 1, "length": 135, "cu_seqlens": ends, "complex_A": complex_A, "reverse": reverse}
    inputs = moved(problem(**options, **ALL), backend.device)
    packed, states = ours(**inputs)
    for i in range(4):
        own = {**cut(inputs, ends[i], ends[i + 1]), "initial_state": inputs["initial_state"][i : i + 1]}
        del own["cu_seqlens"]
        out, state = ours(**own)
        assert_close(packed[..., ends[i] : ends[i + 1]], out)
        assert_close(states[i : i + 1], state)


def test_gradients_of_packed_sequences_do_not_mix(backend) -> None:
    inputs = moved(problem(batch=1, length=90, cu_seqlens=[0, 10, 80, 90], **ALL), backend.device)
    u, start = inputs["u"].requires_grad_(), inputs["initial_state"].requires_grad_()
    du, dstart = torch.autograd.grad(selective_scan(**inputs)[..., 10:80].sum(), (u, start))
    assert not bool(torch.cat((du[..., :10], du[..., 80:]), -1).any())
    assert not bool(dstart[[0, 2]].any())
    assert bool(du[..., 10:80].all())
    assert bool(dstart[1].any())


def test_one_packed_sequence_is_a_batch_of_one(backend) -> None:
    inputs = moved(problem(batch=1, length=70, **ALL), backend.device)
    packed = {**inputs, "cu_seqlens": torch.tensor([0, 70], device=backend.device)}
    expected = results(ours, inputs)
    for name, value in results(ours, packed).items():
        assert torch.equal(value, expected[name]), name


def test_int32_positions(backend) -> None:
    inputs = moved(problem(batch=1, length=70, cu_seqlens=[0, 3, 70], order="shared", **ALL), backend.device)
    narrow = {**inputs, "cu_seqlens": inputs["cu_seqlens"].int(), "order": inputs["order"].int()}
    expected = results(ours, inputs)
    for name, value in results(ours, narrow).items():
        assert torch.equal(value, expected[name]), name


def test_reverse_is_a_scan_of_flipped_copies(backend) -> None:
    inputs = moved(problem(length=70, **ALL), backend.device)
    flipped = {**inputs, **{n: inputs[n].flip(-1) for n in STEPS}}
    (out, state), (expected, expected_state) = ours(**inputs, reverse=True), ours(**flipped)
    assert torch.equal(out, expected.flip(-1))
    assert torch.equal(state, expected_state)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("order", ["shared", "batched"])
def test_an_order_is_a_scan_of_permuted_copies(backend, order: str, reverse: bool) -> None:
    inputs = moved(problem(length=70, order=order, reverse=reverse, **ALL), backend.device)
    out, state = ours(**inputs)
    tokens = inputs.pop("order").expand(2, 70)
    permuted, expected_state = ours(**indexed(inputs, tokens))
    expected = torch.empty_like(permuted).scatter_(-1, tokens[:, None].expand(2, 5, 70), permuted)
    assert torch.equal(out, expected)
    assert torch.equal(state, expected_state)


@pytest.mark.parametrize("case", [{}, {"reverse": True}])
def test_the_order_of_a_plain_scan(backend, case: dict) -> None:
    inputs = moved(problem(length=70, **ALL, **case), backend.device)
    ordered = {**inputs, "order": torch.arange(70, device=backend.device)}
    expected = results(ours, inputs)
    for name, value in results(ours, ordered).items():
        assert torch.equal(value, expected[name]), name


def test_batch_rows_do_not_depend_on_each_other(backend) -> None:
    inputs = moved(problem(batch=3, length=70, **ALL), backend.device)
    whole = ours(**inputs)
    batched = (*STEPS, "initial_state")
    for i in range(3):
        row = {**inputs, **{n: inputs[n][i : i + 1] for n in batched}}
        for actual, expected in zip(ours(**row), whole, strict=True):
            assert torch.equal(actual, expected[i : i + 1])


# -- the same bits ----------------------------------------------------------------------------------

REPEATED = [
    {"dim": 40, "B": 2, "C": 2},
    {"B": None, "C": None, "dim": 40},
    {"complex_A": True},
    {"batch": 1, "cu_seqlens": [0, 3, 130]},
    {"dtype": torch.bfloat16, "dim": 40},
]


@pytest.mark.parametrize("case", REPEATED)
def test_every_run_gives_the_same_bits(backend, case: dict) -> None:
    inputs = moved(problem(length=130, **case, **ALL), backend.device)
    first = results(ours, inputs)
    for _ in range(9 if backend.name != "emulated" else 2):
        for name, value in results(ours, inputs).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("case", REPEATED)
def test_threads_do_not_change_a_bit(backend, case: dict) -> None:
    inputs = moved(problem(length=130, **case, **ALL), backend.device)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(results(ours, inputs))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        for name, value in run.items():
            assert torch.equal(value, runs[0][name]), name


@pytest.mark.parametrize("case", REPEATED)
def test_the_order_of_warps_does_not_change_a_bit(case: dict) -> None:
    inputs = problem(
        length=70, **{**case, **({"cu_seqlens": [0, 3, 70]} if "cu_seqlens" in case else {})}, **ALL
    )
    runs = []
    for seed in (0, 1, 2):
        with tilewright.testing.emulated(seed=seed):
            runs.append(results(ours, inputs))
    for run in runs[1:]:
        for name, value in run.items():
            assert torch.equal(value, runs[0][name]), name
