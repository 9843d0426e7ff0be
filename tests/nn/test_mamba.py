"""tw.nn.Mamba and Mamba2 against plain torch of the same: values, gradients, caches, initial weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tilewright as tw
from reference.causal_conv1d import causal_conv1d
from reference.mamba_inner import mamba_inner
from reference.selective_scan import selective_scan
from tilewright.nn.inference import InferenceParams
from tilewright.nn.mamba2 import RMSNormGated


def mamba(**options: Any) -> tw.nn.Mamba:
    torch.manual_seed(0)
    return shaken(tw.nn.Mamba(12, **{"d_state": 5, "layer_idx": 0, **options}))


def mamba2(**options: Any) -> tw.nn.Mamba2:
    torch.manual_seed(0)
    return shaken(
        tw.nn.Mamba2(16, **{"d_state": 6, "headdim": 8, "chunk_size": 4, "layer_idx": 0, **options})
    )


def shaken(module: Any) -> Any:
    """Random weights where initial ones are trivial."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def plain_mamba(m: tw.nn.Mamba, x: Tensor) -> Tensor:
    return mamba_inner(
        m.in_proj(x).transpose(1, 2), m.conv1d.weight, m.conv1d.bias, m.x_proj.weight, m.dt_proj.weight,
        m.out_proj.weight, m.out_proj.bias, -m.A_log.exp(), D=m.D, delta_bias=m.dt_proj.bias,
    )  # fmt: skip


def plain_mamba2(m: tw.nn.Mamba2, u: Tensor) -> Tensor:
    """Mamba-2 as a selective scan in which all channels of a head share A and dt."""
    mlp, states = m.d_inner - m.d_ssm, m.ngroups * m.d_state
    z0, x0, z, xbc, dt = m.in_proj(u).split([mlp, mlp, m.d_ssm, m.d_ssm + 2 * states, m.nheads], -1)
    xbc, _ = causal_conv1d(xbc.transpose(1, 2), m.conv1d.weight.squeeze(1), m.conv1d.bias, activation="silu")
    x, B, C = xbc.split([m.d_ssm, states, states], dim=1)
    dt = F.softplus(dt + m.dt_bias).clamp(*m.dt_limit).transpose(1, 2).repeat_interleave(m.headdim, dim=1)
    A = -m.A_log.exp().repeat_interleave(m.headdim)[:, None].expand(-1, m.d_state)
    D = m.D if m.D_has_hdim else m.D.repeat_interleave(m.headdim)
    shape = (m.ngroups, m.d_state)
    y, _ = selective_scan(x, dt, A, B.unflatten(1, shape), C.unflatten(1, shape), D)
    y = y.transpose(1, 2)
    if not m.rmsnorm:
        y = y * F.silu(z)
    else:
        y = y if m.norm_before_gate else y * F.silu(z)
        groups = y.unflatten(-1, (m.ngroups, -1))
        y = (groups / (groups.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * m.norm.weight
        y = y * F.silu(z) if m.norm_before_gate else y
    return m.out_proj(torch.cat([F.silu(z0) * x0, y], dim=-1))  # type: ignore[no-any-return]


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "mamba": (mamba, plain_mamba),
    "mamba-bias": (lambda: mamba(bias=True, conv_bias=False, dt_rank=3, expand=3), plain_mamba),
    "mamba-slow": (lambda: mamba(use_fast_path=False, d_conv=2), plain_mamba),
    "mamba2": (mamba2, plain_mamba2),
    "mamba2-groups": (lambda: mamba2(ngroups=2, bias=True, dt_limit=(0.05, 0.5)), plain_mamba2),
    "mamba2-mlp": (lambda: mamba2(d_ssm=16, D_has_hdim=True, norm_before_gate=True), plain_mamba2),
    "mamba2-no-norm": (lambda: mamba2(rmsnorm=False, use_mem_eff_path=False, conv_bias=False), plain_mamba2),
}


def inputs(module: Any, batch: int = 2, length: int = 9) -> Tensor:
    return torch.randn(batch, length, module.d_model, generator=torch.Generator().manual_seed(1))


def assert_near(actual: Tensor, exact: Tensor, name: str = "") -> None:
    assert (actual - exact).abs().max() <= 2e-5 * max(exact.abs().max(), 1e-2), name


@pytest.mark.parametrize("kind", MODULES)
def test_values_and_gradients(kind: str) -> None:
    make, plain = MODULES[kind]
    module = make()
    exact = copy.deepcopy(module).double()
    x, wide = inputs(module).requires_grad_(), inputs(module).double().requires_grad_()
    out, truth = module(x), plain(exact, wide)
    assert_near(out, truth)
    cotangent = torch.randn_like(out)
    out.backward(cotangent)
    truth.backward(cotangent.double())
    assert_near(x.grad, wide.grad, "input")
    for (name, a), b in zip(module.named_parameters(), exact.parameters(), strict=True):
        assert_near(a.grad, b.grad, name)
    with torch.no_grad():
        assert_near(module(x), truth, "without gradients")


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("cuts", [[9], [4, 5], [1] * 9, [2, 1, 5, 1], [3, 2, 1, 3]], ids=str)
@pytest.mark.parametrize("gradients", [False, True])
def test_in_parts_as_in_one(kind: str, cuts: list[int], gradients: bool) -> None:
    module = MODULES[kind][0]()
    x, cache = inputs(module), InferenceParams(max_seqlen=9, max_batch_size=2)
    whole, parts = module(x), []
    with torch.set_grad_enabled(gradients):
        for part in x.split(cuts, dim=1):
            parts.append(module(part, inference_params=cache))
            cache.seqlen_offset += part.shape[1]
    found = torch.cat(parts, dim=1)
    assert_near(found, whole)
    if gradients:
        expected = torch.autograd.grad(whole.sum(), module.in_proj.weight)[0]
        last = torch.autograd.grad(parts[-1].sum(), module.in_proj.weight)[0]
        assert expected.shape == last.shape
    cache.reset(9, 2)
    with torch.no_grad():
        assert_near(module(x, inference_params=cache), whole, "a cache that starts anew")


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    make, plain = MODULES[kind]
    module = make().to(dtype)
    truth = plain(copy.deepcopy(module).double(), inputs(module).to(dtype).double())
    x, cache = inputs(module).to(dtype), InferenceParams(9, 2)
    assert (module(x) - truth).abs().max() < 30 * torch.finfo(dtype).eps * truth.abs().max()
    with torch.no_grad():
        first = module(x[:, :8], inference_params=cache)
        cache.seqlen_offset = 8
        last = module(x[:, 8:], inference_params=cache)
    assert (torch.cat([first, last], 1) - truth).abs().max() < 30 * torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_autocast(kind: str) -> None:
    make, plain = MODULES[kind]
    module = make()
    truth = plain(copy.deepcopy(module).double(), inputs(module).double())
    with torch.autocast("cpu", torch.bfloat16):
        out = module(inputs(module))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert (out - truth).abs().max() < 0.1 * truth.abs().max()


@pytest.mark.parametrize("kind", MODULES)
def test_packed_sequences(kind: str) -> None:
    module = MODULES[kind][0]()
    lengths = [4, 1, 7]
    x = inputs(module, 1, 12)
    alone = torch.cat([module(part) for part in x.split(lengths, dim=1)], dim=1)
    numbers = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    ends = torch.tensor([0, 4, 5, 12])
    assert_near(module(x, seq_idx=numbers), alone)
    assert_near(module(x, cu_seqlens=ends), alone)
    assert_near(module(x, seq_idx=numbers.int()), alone)
    with torch.no_grad():
        assert_near(module(x, cu_seqlens=ends.int()), alone)
    with pytest.raises(NotImplementedError, match="inference_params"):
        module(x, cu_seqlens=ends, inference_params=InferenceParams(9, 1))


@pytest.mark.parametrize("kind", ["mamba", "mamba-slow", "mamba2"])
@pytest.mark.parametrize(
    ("packing", "error", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 4, 9])}, ValueError, r"to the length 10, got \[0, 4, 9\]"),
        ({"cu_seqlens": torch.tensor([0, 4, 11])}, ValueError, r"to the length 10, got \[0, 4, 11\]"),
        ({"cu_seqlens": torch.tensor([0, 6, 4, 10])}, ValueError, "cu_seqlens must increase strictly from 0"),
        ({"cu_seqlens": torch.tensor([3, 10])}, ValueError, r"got \[3, 10\]"),
        ({"cu_seqlens": torch.tensor([0, 4, 4, 10])}, ValueError, r"got \[0, 4, 4, 10\]"),
        ({"cu_seqlens": torch.tensor([0])}, ValueError, r"got \[0\]"),
        ({"cu_seqlens": torch.tensor([[0, 10]])}, ValueError, r"must have shape \(sequences \+ 1,\)"),
        ({"cu_seqlens": torch.tensor([0.0, 10.0])}, TypeError, "cu_seqlens must have dtype int32, int64"),
        ({"cu_seqlens": [0, 10]}, TypeError, "cu_seqlens must be a tensor, got list"),
        ({"seq_idx": torch.zeros(1, 10)}, TypeError, "seq_idx must have dtype int32, int64, got float32"),
        ({"seq_idx": [0] * 10}, TypeError, "seq_idx must be a tensor, got list"),
        ({"seq_idx": torch.zeros(1, 9).int()}, ValueError, r"seq_idx must have shape .* = \(1, 10\), got"),
        (
            {"seq_idx": torch.zeros(1, 10).int(), "cu_seqlens": torch.tensor([0, 10])},
            ValueError, "seq_idx and cu_seqlens say the same: give one of them, got both",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("gradients", [False, True])
def test_bad_packing(
    kind: str, packing: dict[str, Any], error: type[Exception], message: str, gradients: bool
) -> None:
    module = MODULES[kind][0]()
    with torch.set_grad_enabled(gradients), pytest.raises(error, match=message):
        module(inputs(module, 1, 10), **packing)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_packing_of_many_rows(kind: str) -> None:
    module = MODULES[kind][0]()
    with pytest.raises(ValueError, match="cu_seqlens needs a batch of 1, which holds all sequences, got 2"):
        module(inputs(module), cu_seqlens=torch.tensor([0, 9]))


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_nothing_packed(kind: str) -> None:
    module = MODULES[kind][0]()
    for packing in (
        {"cu_seqlens": torch.tensor([0])},
        {"seq_idx": torch.zeros(1, 0, dtype=torch.int32)},
    ):
        assert module(inputs(module, 1, 0), **packing).shape == (1, 0, module.d_model)


def test_sequence_numbers_as_an_op() -> None:
    op, ends = torch.ops.tilewright.sequence_numbers.default, torch.tensor([0, 3, 4, 9])
    assert op(ends, 9).tolist() == [[0, 0, 0, 1, 2, 2, 2, 2, 2]]
    torch.library.opcheck(op, (ends, 9))
    torch.library.opcheck(op, (ends.int(), 9))


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_compiles_without_a_break(kind: str) -> None:
    module = MODULES[kind][0]()
    x, packing = inputs(module, 1, 12), {"cu_seqlens": torch.tensor([0, 4, 5, 12])}
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, **packing), module(x, **packing))
    with pytest.raises(ValueError, match="cu_seqlens must increase strictly"):
        compiled(x, cu_seqlens=torch.tensor([0, 5, 4, 12]))


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@pytest.mark.parametrize("cuts", [[8, 1], [7, 1, 1], [1] * 9], ids=str)
def test_decoding_under_autocast(kind: str, cuts: list[int]) -> None:
    make, plain = MODULES[kind]
    module = make()
    truth = plain(copy.deepcopy(module).double(), inputs(module).double())
    cache, parts = InferenceParams(9, 2), []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for part in inputs(module).split(cuts, dim=1):
            parts.append(module(part, inference_params=cache))
            cache.seqlen_offset += part.shape[1]
    assert {part.dtype for part in parts} == {torch.bfloat16}
    assert {state.dtype for state in cache.key_value_memory_dict[0]} == {torch.float32}
    assert (torch.cat(parts, 1) - truth).abs().max() < 0.1 * truth.abs().max()


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_of_another_dtype(kind: str, dtype: torch.dtype) -> None:
    """Wider or narrower than the model's."""
    make, plain = MODULES[kind]
    own = torch.bfloat16 if dtype == torch.float32 else torch.float32
    module = make().to(own)
    x = inputs(module).to(own)
    truth = plain(copy.deepcopy(module).double(), x.double())
    states = module.allocate_inference_cache(2, 9, dtype=dtype)
    with torch.no_grad():
        steps = [module.step(x[:, t : t + 1], *states)[0] for t in range(9)]
    assert {state.dtype for state in states} == {dtype}
    assert {out.dtype for out in steps} == {own}
    assert (torch.cat(steps, 1) - truth).abs().max() < 0.1 * truth.abs().max()


class Adapted(nn.Module):
    """As an adapter library wraps a projection: `weight` is still the frozen one's."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.extra = base, nn.Linear(base.in_features, base.out_features, bias=False)
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.extra(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "name"),
    [("mamba", "x_proj"), ("mamba", "dt_proj"), ("mamba", "out_proj"), ("mamba2", "out_proj")],
)
def test_adapters_on_projections_train(kind: str, name: str) -> None:
    module = MODULES[kind][0]()
    setattr(module, name, Adapted(getattr(module, name)))
    out = module(inputs(module))
    out.square().sum().backward()
    assert getattr(module, name).extra.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert_near(module(inputs(module)), out)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_step_by_hand(kind: str) -> None:
    module = MODULES[kind][0]()
    x = inputs(module)
    conv_state, ssm_state = module.allocate_inference_cache(2, 9)
    with torch.no_grad():
        steps = [module.step(x[:, t : t + 1], conv_state, ssm_state) for t in range(9)]
    assert_near(torch.cat([out for out, _, _ in steps], 1), module(x))
    assert steps[0][1] is conv_state
    assert steps[0][2] is ssm_state
    with pytest.raises(ValueError, match="step takes one token, got 9"):
        module.step(x, conv_state, ssm_state)


def test_mamba2_takes_rows_of_all_sequences() -> None:
    module = mamba2()
    x = inputs(module)
    assert torch.equal(module(x.flatten(0, 1), seqlen=9), module(x).flatten(0, 1))


def test_names_and_shapes_are_those_of_mamba_ssm() -> None:
    shapes = {name: tuple(p.shape) for name, p in tw.nn.Mamba(48).named_parameters()}
    assert shapes == {
        "A_log": (96, 16), "D": (96,), "in_proj.weight": (192, 48), "conv1d.weight": (96, 1, 4),
        "conv1d.bias": (96,), "x_proj.weight": (35, 96), "dt_proj.weight": (96, 3), "dt_proj.bias": (96,),
        "out_proj.weight": (48, 96),
    }  # fmt: skip
    shapes = {name: tuple(p.shape) for name, p in tw.nn.Mamba2(64).named_parameters()}
    assert shapes == {
        "dt_bias": (2,), "A_log": (2,), "D": (2,), "in_proj.weight": (514, 64), "conv1d.weight": (384, 1, 4),
        "conv1d.bias": (384,), "norm.weight": (128,), "out_proj.weight": (64, 128),
    }  # fmt: skip


def test_initial_weights() -> None:
    module = tw.nn.Mamba(64, dt_min=0.01, dt_max=0.1)
    dt = F.softplus(module.dt_proj.bias)
    assert dt.min() >= 0.0099
    assert dt.max() <= 0.1001
    assert dt.log().std() > 0.4, "spread over the whole range"
    assert module.dt_proj.weight.abs().max() <= module.dt_rank**-0.5
    torch.testing.assert_close(module.A_log.exp(), torch.arange(1.0, 17).expand(128, 16))
    assert torch.equal(module.D, torch.ones(128))
    assert module.dt_proj.bias._no_reinit
    constant = tw.nn.Mamba(64, dt_init="constant", dt_scale=2.0)
    assert torch.equal(constant.dt_proj.weight, torch.full((128, 4), 1.0))
    second = tw.nn.Mamba2(512, A_init_range=(2, 3), conv_init=0.01)
    assert math.log(2) <= second.A_log.min() <= second.A_log.max() <= math.log(3)
    assert second.conv1d.weight.abs().max() <= 0.01
    assert second.A_log._no_weight_decay
    half = tw.nn.Mamba(32, dtype=torch.bfloat16)
    assert half.A_log.dtype == half.D.dtype == torch.float32
    assert half.x_proj.weight.dtype == torch.bfloat16
    assert tw.nn.Mamba2(64, device="meta").A_log.is_meta


@pytest.mark.parametrize("kind", ["mamba2", "mamba2-mlp"])
def test_a_norm_that_someone_looks_at_is_called(kind: str) -> None:
    """Else it is one step with convolution and scan: the same bits, gradients included."""
    module, calls = MODULES[kind][0](), []
    x = inputs(module)

    def run() -> list[Tensor]:
        out = module(x)
        return [out, *torch.autograd.grad(out.square().sum(), list(module.parameters()))]

    in_one = run()
    module.norm.register_forward_hook(lambda *arguments: calls.append("hook"))
    assert all(torch.equal(a, b) for a, b in zip(run(), in_one, strict=True))
    assert calls == ["hook"]
    module.norm.__class__ = type(
        "Other", (RMSNormGated,), {"forward": lambda self, y, z: torch.zeros_like(y)}
    )
    assert not module(x)[0].equal(in_one[0][0])


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_gated_norm(norm_before_gate: bool) -> None:
    norm = shaken(RMSNormGated(12, group_size=4, norm_before_gate=norm_before_gate))
    x, z = torch.randn(3, 5, 12), torch.randn(3, 5, 12)
    y = x if norm_before_gate else x * F.silu(z)
    groups = y.unflatten(-1, (3, 4))
    y = F.rms_norm(groups, (4,), eps=1e-5).flatten(-2) * norm.weight
    torch.testing.assert_close(norm(x, z), y * F.silu(z) if norm_before_gate else y)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: tw.nn.Mamba(8, dt_init="zero"), ValueError, 'dt_init must be "random" or "constant"'),
        (lambda: tw.nn.Mamba2(8, headdim=5), ValueError, "d_ssm must be a multiple of headdim = 5"),
        (lambda: tw.nn.Mamba2(8, headdim=8, ngroups=3), ValueError, "ngroups must divide the 2 heads, got 3"),
        (
            lambda: tw.nn.Mamba2(8, headdim=8, A_init_range=(0, 1)),
            ValueError, "A_init_range must be positive",
        ),
        (
            lambda: tw.nn.Mamba2(8, headdim=8, process_group="g"),
            NotImplementedError, "process_group must be None",
        ),
        (
            lambda: tw.nn.Mamba2(8, headdim=8, sequence_parallel=False),
            NotImplementedError, "sequence_parallel True",
        ),
        (
            lambda: mamba(layer_idx=None)(torch.zeros(1, 2, 12), inference_params=InferenceParams(2, 1)),
            ValueError, "needs a layer with layer_idx",
        ),
        (
            lambda: mamba()(torch.zeros(2, 3, 12), seq_idx=torch.zeros(2, 3, dtype=torch.int32)),
            NotImplementedError, "seq_idx needs a batch of 1 in a Mamba-1 layer, got 2",
        ),
        (lambda: tw.nn.Mamba(8, d_state=300), ValueError, "d_state must be an int from 1 to 256, got 300"),
        (lambda: tw.nn.Mamba(8, d_conv=9), ValueError, "d_conv must be an int from 1 to 8, got"),
        (lambda: tw.nn.Mamba2(8, headdim=8, d_conv=9), ValueError, "d_conv must be an int from 1 to 8, got"),
        (lambda: tw.nn.Mamba(0), ValueError, "d_model must be a positive int, got 0"),
        (lambda: tw.nn.Mamba(8.0), TypeError, "d_model must be a positive int, got 8.0"),
        (lambda: tw.nn.Mamba(8, expand="2"), ValueError, "expand must be a number .*, got '2'"),
        (lambda: tw.nn.Mamba2(8, headdim=8, expand=0), ValueError, "expand must be .* one channel, got 0"),
        (lambda: tw.nn.Mamba(8, dt_rank="x"), ValueError, "dt_rank must be .* or a positive int, got 'x'"),
        (lambda: tw.nn.Mamba(8, dt_rank=0), ValueError, "dt_rank must be a positive int, got 0"),
        (lambda: tw.nn.Mamba(8, dt_min=0), ValueError, "dt_min and dt_max must be .*, got 0 and 0.1"),
        (lambda: tw.nn.Mamba2(8, headdim=0), ValueError, "headdim must be a positive int, got 0"),
        (lambda: tw.nn.Mamba2(8, headdim=8, ngroups=0), ValueError, "ngroups must be a positive int, got 0"),
        (lambda: tw.nn.Mamba2(8, headdim=8, d_ssm=0), ValueError, "d_ssm must be a positive int, got 0"),
        (lambda: tw.nn.Mamba2(8, headdim=8, chunk_size=0), ValueError, "chunk_size must be a positive int"),
        (lambda: tw.nn.Mamba2(8, headdim=8, dt_limit=3), ValueError, "dt_limit must be two numbers, got 3"),
        (
            lambda: mamba()(torch.zeros(3, 12)),
            ValueError, r"hidden_states must have shape .* = \(batch, length, 12\), got \(3, 12\)",
        ),
        (lambda: mamba()(torch.zeros(1, 3, 11)), ValueError, r"\(batch, length, 12\), got \(1, 3, 11\)"),
        (lambda: mamba()([1.0]), TypeError, "hidden_states must be a tensor, got list"),
        (
            lambda: mamba().step(torch.zeros(1, 12), torch.zeros(1), torch.zeros(1)),
            ValueError, "hidden_states must have shape",
        ),
        (
            lambda: mamba().step(torch.zeros(1, 1, 12), [0.0], torch.zeros(1, 24, 5)),
            TypeError, "conv_state must be a tensor, got list",
        ),
        (
            lambda: mamba().step(torch.zeros(1, 1, 12), torch.zeros(1, 24, 4).double(), None),
            TypeError, "conv_state must have dtype float32, float16, bfloat16, got float64",
        ),
        (lambda: mamba2()(torch.zeros(3, 16)), ValueError, r"u must have shape .*, 16\), got \(3, 16\)"),
        (
            lambda: mamba2()(torch.zeros(20, 16), seqlen=7),
            ValueError, "seqlen must divide the 20 rows of u, got 7",
        ),
        (lambda: mamba2()(torch.zeros(20, 16), seqlen=0), ValueError, "seqlen must be a positive int, got 0"),
        (
            lambda: mamba2()(torch.zeros(2, 10, 16), seqlen=10),
            ValueError, r"u must have shape \(batch \* seqlen, d_model\) with seqlen, got \(2, 10, 16\)",
        ),
    ],
)  # fmt: skip
def test_bad_arguments(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_cache_of_another_batch_is_refused() -> None:
    module, cache = mamba(), InferenceParams(9, 2)
    module(inputs(module), inference_params=cache)
    cache.seqlen_offset = 9
    with pytest.raises(ValueError, match="the cache holds 2 rows, and the input has 1"):
        module(inputs(module, 1, 1), inference_params=cache)
