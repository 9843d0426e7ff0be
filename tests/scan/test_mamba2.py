"""A Mamba-2 block between its projections: the three functions it is made of, and transformers' own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reference import ssd_chunk_scan as reference
from tilewright import _C
from tilewright.scan import causal_conv1d, gated_rms_norm, mamba_split_conv1d_scan_combined, ssd_chunk_scan

HALVES = [torch.float16, torch.bfloat16]
GIVEN = ("zxbcdt", "conv1d_weight", "conv1d_bias", "dt_bias", "A", "D", "rmsnorm_weight", "initial_states")


def composed(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    headdim: int,
    ngroups: int,
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    activation: str | None = "silu",
    norm_before_gate: bool = True,
    seq_idx: Tensor | None = None,
    **options: Any,
) -> Any:
    """The block as the three functions one after the other."""
    heads, convolved = A.shape[0], conv1d_weight.shape[0]
    dim, shape = heads * headdim, (ngroups, -1)
    z, xBC, dt = zxbcdt.split([dim, convolved, heads], dim=-1)
    xBC = causal_conv1d(xBC.mT, conv1d_weight, conv1d_bias, seq_idx, activation=activation).mT
    x, B, C = xBC.split([dim, (convolved - dim) // 2, (convolved - dim) // 2], dim=-1)
    scanned = ssd_chunk_scan(
        x.unflatten(-1, (heads, headdim)), dt, A, B.unflatten(-1, shape), C.unflatten(-1, shape), D=D,
        z=z.unflatten(-1, (heads, headdim)) if rmsnorm_weight is None else None, dt_bias=dt_bias,
        seq_idx=seq_idx, dt_softplus=True, **options,
    )  # fmt: skip
    out, *states = scanned if isinstance(scanned, tuple) else (scanned,)
    out = out.flatten(2)
    if rmsnorm_weight is not None:
        out = gated_rms_norm(out, rmsnorm_weight, z, rmsnorm_eps, dim // ngroups, norm_before_gate)
    return (out, *states)


def whole(**arguments: Any) -> Any:
    """The same in one."""
    found = mamba_split_conv1d_scan_combined(**arguments)
    return found if isinstance(found, tuple) else (found,)


def make(
    dtype: torch.dtype = torch.float32,
    device: Any = "cpu",
    batch: int = 2,
    length: int = 70,
    sizes: tuple[int, int, int, int] = (4, 6, 2, 5),
    wide: bool = False,
    without: tuple[str, ...] = (),
) -> dict[str, Any]:
    """As models hold them: what projections make, and the weights beside them, in `dtype`."""
    heads, head_dim, groups, states = sizes
    dim, convolved = heads * head_dim, heads * head_dim + 2 * groups * states
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, to)

    real = torch.promote_types(dtype, torch.float32)
    given = {
        "zxbcdt": normal(batch, length, dim + convolved + heads),
        "conv1d_weight": normal(convolved, 4),
        "conv1d_bias": normal(convolved),
        "dt_bias": normal(heads, to=real),
        "A": -normal(heads, to=real).abs(),
        "D": normal(*(heads, head_dim) if wide else (heads,), to=real),
        "rmsnorm_weight": normal(dim),
        "initial_states": normal(batch, heads, head_dim, states, to=real),
    }
    return {name: None if name in without else value for name, value in given.items()} | {
        "headdim": head_dim, "ngroups": groups, "chunk_size": 8, "rmsnorm_eps": 1e-5,
    }  # fmt: skip


def results(function: Any, arguments: dict[str, Any], wanted: tuple[str, ...] = GIVEN) -> dict[Any, Tensor]:
    """Outputs, and the gradients of the inputs wanted."""
    leaves = {
        name: arguments[name].detach().requires_grad_() for name in wanted if arguments[name] is not None
    }
    found = function(**arguments | leaves)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(t.shape, generator=generator).to(t) for t in found]
    gradients = torch.autograd.grad(found, list(leaves.values()), cotangents)
    return dict(enumerate(found)) | dict(zip(leaves, gradients, strict=True))  # type: ignore[arg-type]


def assert_same(found: dict[Any, Tensor], expected: dict[Any, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


def check(arguments: dict[str, Any], **options: Any) -> None:
    """Bit for bit: results, gradients, and results without gradients."""
    arguments |= options
    expected = results(composed, arguments)
    assert_same(results(whole, arguments), expected)
    with torch.no_grad():
        found = whole(**arguments)
    assert all(torch.equal(one, expected[number]) for number, one in enumerate(found))


# ---- the same bits as the three functions ----


SIZES = [(4, 6, 2, 5), (2, 32, 1, 16)]  # the second are what kernels move as vectors


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_dtypes_and_sizes(backend, sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    if dtype == torch.float64 and not backend.is_cpu:
        return
    check(make(dtype, backend.device, sizes=sizes))
    check(make(dtype, backend.device, sizes=sizes), return_final_states=True)


@pytest.mark.parametrize(
    "without",
    [("rmsnorm_weight",), ("conv1d_bias", "initial_states"), ("rmsnorm_weight", "initial_states", "dt_bias")],
    ids="-".join,
)
@pytest.mark.parametrize("final", [False, True])
def test_absent_inputs(backend, without: tuple[str, ...], final: bool) -> None:
    check(make(device=backend.device, without=without), return_final_states=final)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("before", [False, True])
def test_options(backend, before: bool, dtype: torch.dtype) -> None:
    options = {"activation": None, "norm_before_gate": before, "dt_limit": (0.1, 0.9)}
    check(make(dtype, backend.device, wide=True), **options)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_packed_sequences(backend, dtype: torch.dtype) -> None:
    seq_idx = torch.repeat_interleave(torch.arange(3), torch.tensor([3, 30, 37])).to(backend.device, dtype)
    check(make(device=backend.device), seq_idx=seq_idx.expand(2, -1), return_final_states=True)


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0), (0, 0), (1, 1), (3, 2)])
@pytest.mark.parametrize("without", [(), ("rmsnorm_weight",)], ids=["norm", "gate"])
def test_few_tokens(backend, batch: int, length: int, without: tuple[str, ...]) -> None:
    check(make(device=backend.device, batch=batch, length=length, without=without), return_final_states=True)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_of_another_dtype(dtype: torch.dtype, weights: torch.dtype) -> None:
    arguments = make(dtype)
    for name in GIVEN[1:]:
        arguments[name] = arguments[name].to(dtype if name == "conv1d_bias" else weights)
    check(arguments, return_final_states=True)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "columns of more": lambda t: F.pad(t, (3, 2))[..., 3:-2],
    "tokens of more": lambda t: F.pad(t, (0, 0, 1, 2))[:, 1:-2],
    "channels by row": lambda t: t.mT.contiguous().mT,
    "one token": lambda t: t[:, :1].expand(-1, 70, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("without", [(), ("rmsnorm_weight",)], ids=["norm", "gate"])
def test_layouts_of_the_input(backend, layout: str, without: tuple[str, ...]) -> None:
    def of(function: Any) -> Any:
        return lambda zxbcdt, **others: function(zxbcdt=LAYOUTS[layout](zxbcdt), **others)

    for sizes in SIZES:
        arguments = make(device=backend.device, sizes=sizes, without=without)
        found, expected = (results(of(function), arguments) for function in (whole, composed))
        if backend.is_cpu and layout != "channels by row":
            assert_same(found, expected)
        # Of channels by row the block takes a copy: the convolution sums up in the order of rows. On a GPU
        # the strides of z and of its gradient decide how many channels a thread of the norm adds up.
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], msg=name, rtol=1e-5, atol=1e-4)


def test_an_expanded_gradient(backend) -> None:
    for without in ((), ("rmsnorm_weight",)):
        arguments = make(device=backend.device, without=without)
        leaves = {name: arguments[name].requires_grad_() for name in GIVEN if arguments[name] is not None}
        found, expected = (
            torch.autograd.grad(function(**arguments)[0].sum(), list(leaves.values()))
            for function in (whole, composed)
        )
        assert_same(dict(zip(leaves, found, strict=True)), dict(zip(leaves, expected, strict=True)))


def test_a_gradient_of_the_states_alone(backend) -> None:
    """Of what has none from the states, there it is zero."""
    arguments = make(device=backend.device) | {"return_final_states": True}
    names = [name for name in GIVEN if name != "rmsnorm_weight"]
    leaves = [arguments[name].requires_grad_() for name in names]
    found, expected = (
        torch.autograd.grad(function(**arguments)[1].sum(), leaves, materialize_grads=True)
        for function in (whole, composed)
    )
    assert_same(dict(zip(names, found, strict=True)), dict(zip(names, expected, strict=True)))


@pytest.mark.parametrize("wanted", [(name,) for name in GIVEN], ids="".join)
@pytest.mark.parametrize("without", [(), ("rmsnorm_weight",)], ids=["norm", "gate"])
def test_only_wanted_gradients(wanted: tuple[str, ...], without: tuple[str, ...]) -> None:
    if wanted == without:
        return
    arguments = make(without=without)
    assert_same(results(whole, arguments, wanted), results(composed, arguments, wanted))


def test_kernels_that_no_wanted_gradient_needs_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extension leaves out the kernel of which it gets no weight's gradient to write."""
    backward, calls = _C.mamba2_inner_bwd, []

    def watched(tensors: dict[str, Any], *options: Any) -> None:
        calls.append(tensors)
        backward(tensors, *options)

    monkeypatch.setattr(_C, "mamba2_inner_bwd", watched)
    for wanted, written in (
        ("A", (False, True)),
        ("rmsnorm_weight", (False, False)),
        ("zxbcdt", (True, True)),
    ):
        calls.clear()
        results(whole, make(), (wanted,))
        (tensors,) = calls
        assert tuple(tensors[name] is not None for name in ("dconv_weight", "dA")) == written


def test_nothing_is_copied_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the block is one step for: autograd would concatenate the parts' gradients."""
    arguments = make()
    arguments["zxbcdt"].requires_grad_()
    counts = {}
    for function in (whole, composed):
        out = function(**arguments)[0]
        with torch.profiler.profile() as profile:
            out.sum().backward()
        counts[function] = sum(event.count for event in profile.key_averages() if event.key == "aten::cat")
    assert counts == {whole: 0, composed: 2}


# ---- the rest that holds for every op ----


def test_gradcheck(poisoned: None) -> None:
    for without in ((), ("rmsnorm_weight",)):
        arguments = make(torch.float64, batch=1, length=5, sizes=(2, 2, 1, 2), without=without)
        names = [name for name in GIVEN if arguments[name] is not None]

        def run(*tensors: Tensor) -> Any:
            given = arguments | dict(zip(names, tensors, strict=True))  # noqa: B023
            return whole(**given, return_final_states=True)

        assert torch.autograd.gradcheck(run, [arguments[name].requires_grad_() for name in names])


def test_no_second_derivative() -> None:
    arguments = make()
    arguments["zxbcdt"].requires_grad_()
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(whole(**arguments)[0].sum(), arguments["zxbcdt"], create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "without", [(), ("rmsnorm_weight", "conv1d_bias", "dt_bias", "initial_states")], ids=["", "bare"]
)
def test_opcheck(dtype: torch.dtype, without: tuple[str, ...]) -> None:
    given = make(dtype, length=9, without=without)
    forward, backward = (
        getattr(torch.ops.tilewright, f"mamba2_inner_{way}").default for way in ("fwd", "bwd")
    )
    order = ("conv1d_weight", "conv1d_bias", "A", "D", "dt_bias", "rmsnorm_weight", "initial_states")
    seq_idx = None if without else torch.zeros(2, 9, dtype=torch.int64)
    columns, dim = given["zxbcdt"].shape[2], 24
    projections = [(given["zxbcdt"], *[None] * 4)]
    if not without:
        weights = [torch.randn(columns, 3), torch.randn(columns), torch.randn(5, dim), torch.randn(5)]
        projections.append((torch.randn(2, 9, 3).to(dtype), *[weight.to(dtype) for weight in weights]))
    for projection in projections:
        tensors = [*projection, *[given[name] for name in order], seq_idx]
        for A_is_log in (False, True):
            inputs = (*tensors, 2, A_is_log, True, 0.0, math.inf, 12, False)
            for everything in (False, True):
                torch.library.opcheck(forward, (*inputs, 1e-5, everything, everything))
            out, states, *kept = forward(*inputs, 1e-5, True, True)
            present = [tensor is not None for tensor in tensors[:12]]
            for needed in (present, [*present[:1], *[False] * 11], [False] * 12):
                torch.library.opcheck(backward, (out, states, *inputs, *kept, needed))
            torch.library.opcheck(backward, (out, None, *inputs, *kept, present))


@pytest.mark.parametrize("without", [(), ("rmsnorm_weight",)], ids=["norm", "gate"])
def test_compile(without: tuple[str, ...]) -> None:
    arguments = make(without=without) | {"return_final_states": True}
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    assert_same(results(compiled, arguments), results(whole, arguments))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads: int) -> None:
    before, first = torch.get_num_threads(), results(whole, make())
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            assert_same(results(whole, make()), first)
    finally:
        torch.set_num_threads(before)


# ---- the block of transformers, and its parts ----


def plain_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    width = weight.shape[1]
    out = F.conv1d(x, weight[:, None], bias, padding=width - 1, groups=x.shape[1])
    out = out[..., : x.shape[2]]
    return out if activation is None else F.silu(out)


def block_inputs(heads: int, head_dim: int, groups: int, states: int, extra: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).double()

    dim, convolved = heads * head_dim, heads * head_dim + 2 * groups * states
    return {
        "zxbcdt": normal(2, 70, 2 * extra + dim + convolved + heads),
        "conv1d_weight": normal(convolved, 4),
        "conv1d_bias": normal(convolved),
        "dt_bias": normal(heads),
        "A": -normal(heads).abs(),
        "D": normal(heads),
        "chunk_size": 16,
        "rmsnorm_weight": normal(dim),
        "outproj_weight": normal(7, extra + dim),
        "outproj_bias": normal(7),
        "headdim": head_dim,
        "ngroups": groups,
    }


def test_the_mixer_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a Mamba-2 block behind its in_proj, result and gradients, in float64."""
    pytest.importorskip("transformers", minversion="5.23")  # whose norm is by groups, as mamba_ssm's
    from transformers.models.mamba2 import modeling_mamba2 as modeling

    config = modeling.Mamba2Config(
        hidden_size=16, num_heads=4, head_dim=8, expand=2, state_size=8, n_groups=2, chunk_size=16,
        num_hidden_layers=1, vocab_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    mixer = modeling.Mamba2Mixer(config, 0).double()
    hidden = torch.randn(2, 70, 16, dtype=torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    to = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to",
        lambda t, *a, **k: to(t, *[torch.float64 if i == torch.float32 else i for i in a], **k),
    )  # fmt: skip
    expected = mixer(hidden)
    found = mamba_split_conv1d_scan_combined(
        mixer.in_proj(hidden), mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, mixer.dt_bias,
        -torch.exp(mixer.A_log), mixer.D, chunk_size=16, dt_limit=mixer.time_step_limit,
        rmsnorm_weight=mixer.norm.weight, rmsnorm_eps=mixer.norm.variance_epsilon,
        outproj_weight=mixer.out_proj.weight, outproj_bias=mixer.out_proj.bias, headdim=8, ngroups=2,
        norm_before_gate=False,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    parameters = list(mixer.parameters())
    weight = torch.randn_like(expected)
    for a, b in zip(
        *(torch.autograd.grad(out, parameters, weight) for out in (found, expected)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_the_block_without_its_options() -> None:
    inputs = block_inputs(2, 3, 1, 4, extra=5)
    for name in ("rmsnorm_weight", "outproj_weight", "outproj_bias"):
        del inputs[name]
    out, states = mamba_split_conv1d_scan_combined(**inputs, return_final_states=True)
    mlp, z, xBC, dt = inputs["zxbcdt"].split([10, 6, 14, 2], dim=-1)
    xBC = plain_conv(xBC.mT, inputs["conv1d_weight"], inputs["conv1d_bias"], activation="silu").mT
    x, B, C = xBC.split([6, 4, 4], dim=-1)
    y, expected_states = reference.ssd_chunk_scan(
        x.unflatten(-1, (2, 3)), dt, inputs["A"], B[:, :, None], C[:, :, None], inputs["D"],
        z.unflatten(-1, (2, 3)), inputs["dt_bias"], dt_softplus=True,
    )  # fmt: skip
    expected = torch.cat([F.silu(mlp[..., :5]) * mlp[..., 5:], y.flatten(-2)], -1)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(states, expected_states)
    normed = mamba_split_conv1d_scan_combined(
        **inputs, rmsnorm_weight=torch.ones(6).double(), norm_before_gate=True
    )
    assert normed.shape == out.shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"headdim": None}, "D must have shape"),
        ({"headdim": 5, "D": torch.zeros(2, 3)}, r"D must have shape \(heads, headdim\)"),
        ({"ngroups": 3}, "conv1d_weight must have heads"),
        ({"zxbcdt": torch.zeros(1, 4, 21)}, "zxbcdt must have 22 columns"),
        ({"zxbcdt": torch.zeros(4, 21)}, "zxbcdt must have 3 axes"),
    ],
)
def test_wrong_arguments_of_the_block(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mamba_split_conv1d_scan_combined(**block_inputs(2, 3, 1, 4) | changes)
