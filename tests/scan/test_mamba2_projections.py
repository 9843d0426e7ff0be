"""A Mamba-2 block with its projections as one op: what the projections and the block give one by one."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tilewright as tw
from dense_products import watched_products
from reference import mamba2 as reference
from tilewright import _C
from tilewright.scan import dense
from tilewright.scan.mamba2 import GatedNorm, Linear, mamba2_inner
from tilewright.testing import emulated

HEADS, GROUPS, HEAD_DIM, STATES, FEATURES = 4, 2, 6, 5, 7
DIM = HEADS * HEAD_DIM
CHANNELS = DIM + 2 * GROUPS * STATES


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the rows that our product got, which gets all that it can take."""
    monkeypatch.setattr(dense, "_WORTH_IT", 1)
    return watched_products(monkeypatch)


def make(dtype: torch.dtype, device: Any = "cpu", batch: int = 2, length: int = 70) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, to)

    real = torch.promote_types(dtype, torch.float32)
    return {
        "x": normal(batch, length, FEATURES),
        "in_weight": normal(DIM + CHANNELS + HEADS, FEATURES),
        "in_bias": normal(DIM + CHANNELS + HEADS),
        "conv_weight": normal(CHANNELS, 1, 4),
        "conv_bias": normal(CHANNELS),
        "A_log": normal(HEADS, to=real),
        "D": normal(HEADS, to=real),
        "dt_bias": normal(HEADS, to=real),
        "norm_weight": normal(DIM),
        "out_weight": normal(5, DIM),
        "out_bias": normal(5),
        "initial_states": normal(batch, HEADS, HEAD_DIM, STATES, to=real),
    }


def run(t: dict[str, Any], in_part: bool, out_part: bool, A_is_log: bool) -> tuple[Tensor, Tensor]:
    """The block with those projections as parts of it, the others around it."""
    in_proj, out_proj = Linear(t["in_weight"], t["in_bias"]), Linear(t["out_weight"], t["out_bias"])
    norm = None if t["norm_weight"] is None else GatedNorm(t["norm_weight"], 1e-5, None, False)
    weight = t["conv_weight"] if A_is_log else t["conv_weight"].squeeze(1)
    y, states = mamba2_inner(
        t["x"] if in_part else dense.linear(t["x"], *in_proj),
        weight, t["conv_bias"], t["A_log"] if A_is_log else -torch.exp(t["A_log"]), t["D"], t["dt_bias"],
        HEADS, GROUPS, norm, in_proj=in_proj if in_part else None, out_proj=out_proj if out_part else None,
        A_is_log=A_is_log, initial_states=t["initial_states"], return_final_states=True,
    )  # fmt: skip
    return y if out_part else dense.linear(y, *out_proj), states


def results(
    given: dict[str, Any], wanted: tuple[str, ...], *form: bool, states: bool = True
) -> dict[str, Tensor]:
    leaves = {name: given[name].detach().requires_grad_() for name in wanted if given[name] is not None}
    found = run(given | leaves, *form)[: 1 + states]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(t.shape, generator=generator).to(t) for t in found]
    gradients = torch.autograd.grad(found, list(leaves.values()), cotangents)
    return dict(zip(("out", "states"), found, strict=False)) | dict(zip(leaves, gradients, strict=True))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert value.shape == expected[name].shape, name
        assert torch.equal(value, expected[name]), name


FORMS = [(True, True), (True, False), (False, True), (False, False)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("without", [(), ("norm_weight", "initial_states")], ids=["norm", "gate"])
def test_the_formula(backend, without: tuple[str, ...], dtype: torch.dtype) -> None:
    """Of results and gradients, the largest error beside the largest entry."""
    if dtype == torch.float64 and not backend.is_cpu:
        return
    given = make(dtype, backend.device) | dict.fromkeys(without)
    found = results(given, tuple(given), True, True, True)
    leaves = {n: None if t is None else t.cpu().double().requires_grad_() for n, t in given.items()}
    expected = reference.mamba2_block(**leaves, groups=GROUPS, eps=1e-5)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(t.shape, generator=generator).to(dtype).double() for t in expected]
    present = [t for t in leaves.values() if t is not None]
    gradients = torch.autograd.grad(expected, present, cotangents)
    allowed = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    for (name, value), truth in zip(found.items(), [*expected, *gradients], strict=True):
        error = (value.cpu().double() - truth).abs().max() / truth.abs().max()
        assert error <= allowed, (name, float(error))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "without", [(), ("norm_weight",), ("in_bias", "out_bias", "initial_states")], ids=str
)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_same_bits(
    backend, form: tuple[bool, bool], without: tuple[str, ...], dtype: torch.dtype
) -> None:
    if dtype == torch.float64 and not backend.is_cpu:
        return
    given = make(dtype, backend.device) | dict.fromkeys(without)
    wanted = tuple(given)
    expected = results(given, wanted, False, False, False)
    assert_same(results(given, wanted, *form, True), expected)
    with torch.no_grad():
        out, states = run(given, *form, True)
    assert torch.equal(out, expected["out"])
    assert torch.equal(states, expected["states"])


@pytest.mark.parametrize("without", [(), ("norm_weight",), ("in_bias", "out_bias")], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_same_bits_by_our_product(taken, form: tuple[bool, bool], without: tuple[str, ...]) -> None:
    given = make(torch.float32) | dict.fromkeys(without)
    expected = results(given, tuple(given), False, False, False)
    products = len(taken)
    taken.clear()
    assert_same(results(given, tuple(given), *form, True), expected)
    assert len(taken) == products == 6


@pytest.mark.parametrize("wanted", [(name,) for name in make(torch.float32)], ids="".join)
def test_only_wanted_gradients(taken, wanted: tuple[str, ...]) -> None:
    given = make(torch.float32)
    states = wanted[0] not in ("norm_weight", "out_weight", "out_bias")
    expected = results(given, wanted, False, False, False, states=states)
    products = len(taken)
    taken.clear()
    assert_same(results(given, wanted, True, True, True, states=states), expected)
    assert len(taken) == products, "no product is for nothing"


def test_frozen_projections(taken) -> None:
    """As under an adapter beside them: only the way through them is differentiated."""
    given = make(torch.float32)
    expected = results(given, ("x",), False, False, False)
    taken.clear()
    assert_same(results(given, ("x",), True, True, True), expected)
    assert len(taken) == 4


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0), (1, 1), (3, 2)])
def test_few_tokens(backend, batch: int, length: int) -> None:
    given = make(torch.float32, backend.device, batch, length)
    expected = results(given, tuple(given), False, False, False)
    assert_same(results(given, tuple(given), True, True, True), expected)
    out, states = mamba2_inner(
        given["x"], given["conv_weight"], None, given["A_log"], given["D"], None, HEADS, GROUPS, None,
        in_proj=Linear(given["in_weight"], None), initial_states=given["initial_states"], A_is_log=True,
    )  # fmt: skip
    assert out.shape == (batch, length, DIM)
    assert states.numel() == 0


def test_biases_of_any_stride(taken) -> None:
    given = make(torch.float32)
    names = ("in_bias", "conv_bias", "out_bias")
    strided = {name: torch.stack([given[name]] * 2, 1)[:, 0] for name in names}
    wanted = tuple(given)
    assert_same(results(given | strided, wanted, True, True, True), results(given, wanted, True, True, True))
    one = {name: torch.ones(1).expand(len(given[name])) for name in names}
    plain = {name: value.contiguous() for name, value in one.items()}
    rest = tuple(name for name in given if name not in names)
    assert_same(results(given | one, rest, True, True, True), results(given | plain, rest, True, True, True))


def test_an_expanded_gradient_and_one_of_the_states_alone(taken) -> None:
    given = make(torch.float32)
    found = []
    for form in ((False, False, False), (True, True, True)):
        leaves = {name: value.detach().requires_grad_() for name, value in given.items()}
        out, states = run(leaves, *form)
        for result in (out, states):
            found.append(
                torch.autograd.grad(
                    result.sum(), list(leaves.values()), retain_graph=True, materialize_grads=True
                )
            )
    for expected, one in zip(found[:2], found[2:], strict=True):
        assert_same(dict(zip(given, one, strict=True)), dict(zip(given, expected, strict=True)))


def test_a_frozen_projection_keeps_nothing_for_its_weight() -> None:
    def kept(frozen: tuple[str, ...]) -> int:
        given = make(torch.bfloat16)
        leaves = {n: t.requires_grad_(n not in frozen) for n, t in given.items()}
        count = 0

        def pack(t: Tensor) -> Tensor:
            nonlocal count
            count += t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out, _ = run(leaves, True, True, True)
        if "in_weight" in frozen:
            with torch.no_grad():
                leaves["x"].add_(1)  # it is not looked at
        torch.autograd.grad(out.sum(), [leaves["conv_weight"], leaves["x"]])
        return count

    x, inner = 2 * 70 * FEATURES * 2, 2 * 70 * DIM * 2
    everything = kept(())
    assert kept(("in_weight",)) <= everything - x + 2
    assert kept(("out_weight",)) == everything - inner
    assert kept(("in_weight", "out_weight")) <= everything - x - inner + 2


def test_a_backward_pass_under_autocast() -> None:
    given = make(torch.float32)
    leaves = [given[name].requires_grad_() for name in given]
    expected = torch.autograd.grad(run(given, True, True, True)[0].sum(), leaves[:-1])
    out = run(given, True, True, True)[0].sum()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(out, leaves[:-1])
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_gradcheck(poisoned: None) -> None:
    given = make(torch.float64, batch=1, length=3)

    def block(*tensors: Tensor) -> Any:
        return run(dict(zip(given, tensors, strict=True)), True, True, True)

    assert torch.autograd.gradcheck(block, [value.requires_grad_() for value in given.values()])


# ---- when they are parts ----


def layer() -> tw.nn.Mamba2:
    torch.manual_seed(0)
    return tw.nn.Mamba2(32, d_state=8, headdim=16)


def parts(layer: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[bool, bool]:
    """Whether in_proj and out_proj are part of the op."""
    seen: list[tuple[bool, bool]] = []
    from tilewright.nn import mamba2

    def watched(*arguments: Any, in_proj: Any, out_proj: Any, **options: Any) -> Any:
        seen.append((in_proj is not None, out_proj is not None))
        return mamba2_inner(*arguments, in_proj=in_proj, out_proj=out_proj, **options)

    with monkeypatch.context() as patch:
        patch.setattr(mamba2, "mamba2_inner", watched)
        layer(x)
    return seen[0]


def test_a_layer_that_is_looked_at_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    x, calls = torch.randn(2, 9, 32), []
    assert parts(layer(), x, monkeypatch) == (True, True)
    for name, expected in (("in_proj", (False, True)), ("out_proj", (True, False))):
        watched = layer()
        before = watched(x)
        getattr(watched, name).register_forward_hook(lambda *arguments: calls.append(1))
        assert parts(watched, x, monkeypatch) == expected
        assert calls == [1]
        torch.testing.assert_close(watched(x), before)
        calls.clear()


def test_other_layers_and_dtypes_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 9, 32)
    parametrized = layer()
    nn.utils.parametrizations.weight_norm(parametrized.in_proj)
    assert parts(parametrized, x, monkeypatch) == (False, True)
    another = layer()
    another.out_proj = type("Other", (nn.Linear,), {})(64, 32, bias=False)
    assert parts(another, x, monkeypatch) == (True, False)


class Wrapped(Tensor):
    """A weight that says itself what torch's functions make of it, as quantized ones do."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [t.as_subclass(Tensor) if isinstance(t, Wrapped) else t for t in args]
        calls.append(function) if function is F.linear else None
        return function(*plain, **(kwargs or {}))


calls: list[Any] = []


def test_weights_of_other_classes_are_asked() -> None:
    given = make(torch.float32)
    arguments = {
        "zxbcdt": F.linear(given["x"], given["in_weight"]),
        "conv1d_weight": given["conv_weight"][:, 0], "conv1d_bias": None, "dt_bias": given["dt_bias"],
        "A": -given["A_log"].exp(), "D": given["D"], "chunk_size": 8, "headdim": HEAD_DIM, "ngroups": GROUPS,
    }  # fmt: skip
    found, expected = (
        tw.scan.mamba_split_conv1d_scan_combined(**arguments, outproj_weight=weight)
        for weight in (given["out_weight"].as_subclass(Wrapped), given["out_weight"])
    )
    torch.testing.assert_close(found, expected)
    assert calls


def test_a_compiled_layer_is_trained() -> None:
    block, x = layer(), torch.randn(2, 9, 32, requires_grad=True)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    wanted = [x, *block.parameters()]
    found, expected = (torch.autograd.grad(f(x).square().sum(), wanted) for f in (compiled, block))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_where_torchs_own_products_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = layer(), torch.randn(2, 9, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert parts(block, x, monkeypatch) == (False, False)
    with dense.by_torch():
        assert parts(block, x, monkeypatch) == (False, False)
    with FlopCounterMode(display=False) as counter:
        block(x)
    products = 2 * 18 * 32 * (block.in_proj.out_features + block.out_proj.in_features)
    assert counter.get_total_flops() == products


# ---- what the extension refuses ----


def forward_tensors() -> dict[str, Any]:
    given = make(torch.float32)
    tokens = (2, 70)
    return {
        "input": given["x"], "in_weight": given["in_weight"], "in_bias": given["in_bias"],
        "zxbcdt": torch.empty(*tokens, DIM + CHANNELS + HEADS), "dt": None,
        "conv_weight": given["conv_weight"], "conv_bias": given["conv_bias"], "A": -given["A_log"].exp(),
        "D": given["D"], "dt_bias": given["dt_bias"], "norm_weight": given["norm_weight"],
        "initial_states": None, "seq_idx": None, "xBC": torch.empty(*tokens, CHANNELS),
        "chunk_states": torch.empty(4, HEADS, STATES, HEAD_DIM), "final_states": None,
        "y": torch.empty(*tokens, DIM), "rstd": torch.empty(140), "inner": torch.empty(*tokens, DIM),
        "out_weight": given["out_weight"], "out_bias": given["out_bias"], "out": torch.empty(*tokens, 5),
    }  # fmt: skip


def allocate(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8)


OPTIONS = (1, 1e-5, GROUPS, True, 0.0, float("inf"), DIM, False)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("zxbcdt", torch.empty(2, 70, 9), "do not fit together"),
        ("zxbcdt", torch.empty(0, 70, 81), "zxbcdt must have elements"),
        ("xBC", torch.empty(2, CHANNELS, 70).mT, "xBC must have rows at one distance"),
        ("inner", None, "inner must be a tensor"),
        ("y", None, "y must be a tensor"),
        ("rstd", torch.empty(3), "rstd must have 140 elements"),
        ("in_weight", torch.empty(DIM + CHANNELS + HEADS, 8), r"input must have shape \(2, 70, 8\)"),
        ("out_weight", torch.empty(5, 9), "out_weight of shape"),
        ("out", torch.empty(2, 70, 4), "out must have shape"),
        ("out_bias", torch.empty(4), "out_bias must have 5 elements"),
        ("conv_weight", torch.empty(CHANNELS, 2, 4), "conv_weight must have shape"),
        ("conv_weight", torch.empty(CHANNELS, 9), "conv_weight must have a width of 1 to 8"),
        ("A", torch.empty(5), "do not fit together"),
        ("chunk_states", torch.empty(4), "chunk_states must have"),
        ("in_bias", torch.empty(81, dtype=torch.float64), "in_bias must have dtype float32"),
        ("seq_idx", torch.zeros(2, 70), "seq_idx must have dtype int64"),
    ],
)
def test_what_the_extension_refuses(name: str, value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        _C.mamba2_inner_fwd(forward_tensors() | {name: value}, allocate, *OPTIONS)


def test_too_small_a_workspace_is_refused() -> None:
    _C.mamba2_inner_fwd(forward_tensors(), allocate, *OPTIONS)
    with pytest.raises(ValueError, match="workspace: got 3 bytes"):
        _C.mamba2_inner_fwd(forward_tensors(), lambda count: allocate(3), *OPTIONS)
    with pytest.raises(ValueError, match="workspace must be contiguous"):
        _C.mamba2_inner_fwd(forward_tensors(), lambda count: allocate(1).expand(count), *OPTIONS)


def test_a_gpus_backward_pass_made_again_on_a_cpu() -> None:
    """A GPU keeps no states before chunks, a CPU does; calls that TILEWRIGHT_DEBUG kept run on either."""

    def grads(forward_emulated: bool, backward_emulated: bool) -> tuple[Tensor, ...]:
        t = {name: value.requires_grad_() for name, value in make(torch.float32).items()}
        with emulated() if forward_emulated else nullcontext():
            y, states = run(t, True, True, True)
        with emulated() if backward_emulated else nullcontext():
            return torch.autograd.grad(y.square().sum() + states.sum(), list(t.values()))

    expected = grads(False, False)
    for ways in ((True, False), (False, True)):
        for one, other in zip(grads(*ways), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())
