"""Swapped models of transformers beside the stock ones: values, gradients, caches, generation."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, MAMBA1, is_before, run_on, tiny, tokens, twins
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.utils import parametrize

import tilewright as tw
from ranks import run_ranks
from tilewright.swapping import transformers

pytest.importorskip("transformers", minversion="4.57")

FAMILIES = list(CONFIGS)
FEW = ["mamba", "falcon_mamba", "zamba", "mamba2"]


def logits(model: nn.Module, ids: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, **inputs).logits  # type: ignore[no-any-return]


def assert_rule(ours: Tensor, stock: Tensor, exact: Tensor, name: str = "") -> None:
    """No more than twice the stock model's error, and a few units of rounding."""
    error, allowed = (ours - exact).abs().max(), (stock - exact).abs().max()
    slack = 64 * torch.finfo(ours.dtype).eps * exact.abs().max()
    assert error <= 2 * allowed + slack, f"{name}: off by {error:.2e}, the stock model by {allowed:.2e}"


def of_both_or_none(ours: nn.Module, stock: nn.Module, run: Callable[[nn.Module], Tensor]) -> Tensor:
    """What `run` gives of our model. Where the stock model raises too the test is skipped."""
    try:
        return run(ours)
    except RuntimeError as error:  # attention masks of the wrong size, in releases before 5.23
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            run(stock)
        pytest.skip(f"the stock model raises: {error}")


def left_padding(ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return mask


def continued(model: nn.Module, parts: list[Tensor]) -> Tensor:
    """Logits of a sequence that comes in parts."""
    found, done, out = [], 0, None
    with torch.no_grad():
        for part in parts:
            out = run_on(model, part, done, out)
            found.append(out.logits)
            done += part.shape[1]
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_gradients(family: str) -> None:
    exact, stock, ours = twins(family)
    report = tw.swap(ours)
    assert report.swapped
    assert not report.skipped
    ids = tokens()
    assert_rule(*(logits(model, ids) for model in (ours, stock, exact)))
    losses = []
    for model in (ours, stock, exact):
        model.train()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    assert_rule(*losses)
    for (name, a), b, c in zip(ours.named_parameters(), stock.parameters(), exact.parameters(), strict=True):
        if c.grad is None:
            assert a.grad is None, name
        else:
            assert_rule(a.grad, b.grad, c.grad, name)


def behind_padding(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of the tokens that are none, from a padded batch."""
    return model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]  # type: ignore[no-any-return]


def row_by_row(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """The same from each sequence alone, without padding."""
    rows = zip(ids, mask.bool(), strict=True)
    return torch.cat([model(row[kept][None], use_cache=False).logits[0] for row, kept in rows])


BIASES = {
    "use_bias": ["mamba", "falcon_mamba", "mamba2", "nemotron_h"],
    "mamba_proj_bias": ["jamba", "zamba", "bamba", "granitemoehybrid", "falcon_h1"],
    "add_bias_linear": ["zamba2"],
}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *(pytest.param(family, {}, id=family) for family in FAMILIES),
        *(pytest.param(f, {name: True}, id=f"{f}-biased") for name in BIASES for f in BIASES[name]),
    ],
)
def test_left_padding(family: str, changes: dict[str, Any]) -> None:
    exact, stock, ours = twins(family, **changes)
    tw.swap(ours)
    ids = tokens()
    mask = left_padding(ids)
    if behind_padding(stock, ids, mask).isnan().any():
        pytest.skip("the stock model gives NaN")  # Zamba's attention before transformers 5.15
    found = behind_padding(ours, ids, mask), row_by_row(stock, ids, mask), row_by_row(exact, ids, mask)
    assert_rule(*found)
    for logits in found:
        logits.square().sum().backward()
    for (name, a), b, c in zip(ours.named_parameters(), stock.parameters(), exact.parameters(), strict=True):
        if c.grad is not None:
            assert_rule(a.grad, b.grad, c.grad, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation(family: str) -> None:
    _, stock, ours = twins(family)
    tw.swap(ours)
    ids = tokens()
    options = {"attention_mask": left_padding(ids), "max_new_tokens": 8, "do_sample": False}
    found = of_both_or_none(ours, stock, lambda model: model.generate(ids, **options))
    try:
        expected = stock.generate(ids, **options)
    except RuntimeError as error:  # FalconH1 before 5.23
        pytest.skip(f"the stock model alone raises: {error}")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cuts", [[5, 4], [1, 1, 1, 6], [2, 1, 5, 1]], ids=str)
def test_in_parts_as_in_one(family: str, cuts: list[int]) -> None:
    """Prefill in chunks, and steps of one token: upstream's Mamba-1 layers forget the past at every chunk."""
    exact, stock, ours = twins(family)
    tw.swap(ours)
    ids = tokens()
    parts = list(ids.split(cuts, dim=1))
    if family == "granitemoehybrid" and max(cuts[1:]) > 1 and is_before("5.0"):
        pytest.skip("the model's attention is wrong in a second chunk")
    found = of_both_or_none(ours, stock, lambda model: continued(model, parts))
    assert_rule(found, *(logits(model, ids) for model in (stock, exact)))


@pytest.mark.parametrize("family", ["mamba", "zamba", "mamba2"])
def test_steps_with_gradients_go_the_long_way(family: str) -> None:
    model = tiny(family)
    tw.swap(model)
    ids = tokens()
    out = run_on(model, ids[:, 8:], 8, run_on(model, ids[:, :8], 0)).logits
    torch.testing.assert_close(out, logits(model, ids)[:, 8:], rtol=1e-4, atol=1e-5)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    exact, stock, ours = twins(family, dtype)
    tw.swap(ours)
    ids = tokens(length=33)
    found, plain, truth = (logits(model, ids) for model in (ours, stock, exact))
    slack = 4 * torch.finfo(dtype).eps * truth.abs().max()
    assert (found - truth).abs().max() <= 2 * (plain - truth).abs().max() + slack
    with torch.no_grad():
        parts = continued(ours, list(ids.split([20, 1, 12], dim=1)))
    assert (parts - truth).abs().max() <= 2 * (plain - truth).abs().max() + slack
    assert ours.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (2, 36)


@pytest.mark.parametrize("family", [*FEW, "jamba", "falcon_h1_norm"])
def test_autocast(family: str) -> None:
    exact, stock, ours = twins(family)
    tw.swap(ours)
    ids = tokens()
    truth = logits(exact, ids)
    ours.train()
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(ids, labels=ids, use_cache=False)
    out.loss.backward()
    assert (out.logits - truth).abs().max() < 0.1 * truth.abs().max()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters() if p.grad is not None)
    ours.eval()
    with torch.autocast("cpu", torch.bfloat16):
        parts = of_both_or_none(
            ours, stock, lambda model: continued(model, list(ids.split([5, 1, 3], dim=1)))
        )
    assert (parts - truth).abs().max() < 0.1 * truth.abs().max()


@pytest.mark.parametrize("family", FEW)
def test_decoding_under_autocast_from_a_wider_cache(family: str) -> None:
    model, ids = tiny(family), tokens()
    expected = logits(model, ids)[:, 8:]
    tw.swap(model)
    with torch.no_grad():
        before = run_on(model, ids[:, :8], 0)
        with torch.autocast("cpu", torch.bfloat16):
            out = run_on(model, ids[:, 8:], 8, before).logits
    assert (out - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("family", FEW)
def test_gradient_checkpointing(family: str) -> None:
    plain, checkpointed = tiny(family), tiny(family)
    for model in (plain, checkpointed):
        tw.swap(model)
        model.train()
    checkpointed.gradient_checkpointing_enable()
    ids = tokens()
    for model in (plain, checkpointed):
        model(ids, labels=ids, use_cache=False).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@pytest.mark.parametrize("family", ["mamba", "jamba", "mamba2", "bamba"])
def test_packed_sequences_do_not_see_each_other(family: str) -> None:
    """seq_idx, where the model hands it on: three sequences in one row are as each alone."""
    model = tiny(family)
    tw.swap(model)
    name = next(name for name, module in model.named_modules() if type(module).__name__.endswith(("Mixer",)))
    mixer = model.get_submodule(name)
    lengths = [4, 1, 7]
    hidden = torch.randn(1, sum(lengths), 16, generator=torch.Generator().manual_seed(0))
    seq_idx = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).to(torch.int32)[None]
    ends = torch.tensor([0, 4, 5, 12], dtype=torch.int32)
    alone = torch.cat([mixer(part) for part in hidden.split(lengths, dim=1)], dim=1)
    for packing in ({"seq_idx": seq_idx}, {"cu_seqlens": ends}):
        torch.testing.assert_close(mixer(hidden, **packing), alone, rtol=1e-4, atol=1e-5)
    if family in MAMBA1:
        with pytest.raises(NotImplementedError, match="seq_idx needs a batch of 1"):
            mixer(hidden.expand(2, -1, -1), seq_idx=seq_idx.expand(2, -1))
    for wrong in ([0, 4, 11], [0, 4, 13], [0, 6, 4, 12], [3, 12], [0, 4, 4, 12]):
        with pytest.raises(ValueError, match="cu_seqlens must increase strictly from 0 to the length 12"):
            mixer(hidden, cu_seqlens=torch.tensor(wrong))
    with pytest.raises(ValueError, match="give one of them, got both"):
        mixer(hidden, cu_seqlens=ends, seq_idx=seq_idx)
    with pytest.raises(TypeError, match="seq_idx must have dtype int32, int64, got float32"):
        mixer(hidden, seq_idx=seq_idx.float())
    with pytest.raises(TypeError, match="cu_seqlens must be a tensor, got list"):
        mixer(hidden, cu_seqlens=[0, 12])


def test_masks_that_cover_the_past_too() -> None:
    model = tiny("mamba")
    tw.swap(model)
    ids = tokens()
    mask = left_padding(ids)
    with torch.no_grad():
        before = run_on(model, ids[:, :5], 0, attention_mask=mask[:, :5])
        found = run_on(model, ids[:, 5:], 5, before, attention_mask=mask).logits
    torch.testing.assert_close(found, logits(model, ids, attention_mask=mask)[:, 5:], rtol=1e-4, atol=1e-5)


def test_adapters_and_hooks_on_projections_are_heard() -> None:
    model = tiny("mamba").train()
    tw.swap(model)
    mixer = model.backbone.layers[0].mixer
    calls: list[str] = []
    mixer.x_proj.register_forward_hook(lambda *_: calls.append("x_proj"))

    class Adapted(nn.Module):
        """As an adapter library wraps a projection."""

        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.extra = base, nn.Linear(base.in_features, base.out_features, bias=False)
            self.bias = base.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.extra(x)  # type: ignore[no-any-return]

    mixer.dt_proj = Adapted(mixer.dt_proj)
    model(tokens(), use_cache=False).logits.sum().backward()
    assert calls == ["x_proj"]
    assert mixer.dt_proj.extra.weight.grad.abs().sum() > 0


def test_only_this_model_changes() -> None:
    stock, ours = tiny("mamba"), tiny("mamba")
    cls = type(stock.backbone.layers[0].mixer)
    before, state = cls.forward, copy.deepcopy(ours.state_dict())
    tw.swap(ours)
    assert cls.forward is before
    assert type(stock.backbone.layers[0].mixer) is cls
    assert isinstance(ours.backbone.layers[0].mixer, cls)
    assert list(ours.state_dict()) == list(state)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), state.values(), strict=True))
    assert repr(ours) == repr(stock)


def test_unswap_restores() -> None:
    model = tiny("mamba")
    ids, cls = tokens(), type(model.backbone.layers[0].mixer)
    before = logits(model, ids)
    assert tw.unswap(model) == 0
    tw.swap(model)
    assert tw.unswap(model) == 2
    assert type(model.backbone.layers[0].mixer) is cls
    assert vars(model.backbone.layers[0].mixer).keys() == vars(tiny("mamba").backbone.layers[0].mixer).keys()
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_copies_and_pickles_stay_swapped(family: str) -> None:
    model = tiny(family)
    tw.swap(model)
    ids = tokens()
    expected = logits(model, ids)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(logits(other, ids), expected)
        assert tw.unswap(other) == 2
    assert tw.unswap(model) == 2, "copies are independent"


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


ORDERS = [
    ("swap", "A_log", "unswap"),
    ("A_log", "swap", "unswap"),
    ("A_log", "swap", "D", "unswap"),
    ("swap", "A_log", "unswap", "D", "swap", "unswap"),
    ("swap", "A_log", "copy", "unswap"),
    ("A_log", "swap", "copy", "unswap"),
]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_parametrizations_before_and_after(order: tuple[str, ...]) -> None:
    """Their classes outlive a swap and its end, and can be taken away after it, and between."""
    model, swapped = tiny("mamba"), False
    stock, ids = type(model.backbone.layers[0].mixer), tokens()
    expected, others = logits(model, ids), []
    for what in order:
        mixers = [layer.mixer for layer in model.backbone.layers]
        if what == "swap":
            assert len(tw.swap(model).swapped) == 2
        elif what == "unswap":
            assert tw.unswap(model) == 2
        elif what == "copy":
            others, model = [*others, model], copy.deepcopy(model)
        else:
            for mixer in mixers:
                parametrize.register_parametrization(mixer, what, Doubled())
        swapped = what == "swap" or (swapped and what != "unswap")
        assert bool(tw.swap(model, dry_run=True).swapped) != swapped
        torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-5)
    for other in others:
        assert not tw.swap(other, dry_run=True).swapped, "copies are independent"
        torch.testing.assert_close(logits(other, ids), expected, rtol=1e-4, atol=1e-5)
    for layer in model.backbone.layers:
        for name in {"A_log", "D"} & set(order):
            parametrize.remove_parametrizations(layer.mixer, name)
        assert type(layer.mixer) is stock
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("first", ["A_log", "swap"])
def test_parametrizations_end_before_the_swap_does(first: str) -> None:
    model = tiny("mamba")
    mixer = model.backbone.layers[0].mixer
    expected = logits(model, tokens())
    if first == "swap":
        tw.swap(model)
    parametrize.register_parametrization(mixer, "A_log", Doubled())
    tw.swap(model)
    parametrize.remove_parametrizations(mixer, "A_log")
    torch.testing.assert_close(logits(model, tokens()), expected, rtol=1e-4, atol=1e-5)
    assert tw.unswap(model) == 2
    assert torch.equal(logits(model, tokens()), expected)


def test_a_class_of_ones_own_over_a_swapped_one() -> None:
    model = tiny("mamba")
    tw.swap(model)
    mixer, ids = model.backbone.layers[0].mixer, tokens()
    before = type(mixer)
    mixer.__class__ = type("Named", (before,), {"extra": 1})
    assert copy.deepcopy(mixer).extra == 1
    assert tw.unswap(model) == 2
    assert mixer.extra == 1
    assert tw.swap(model).swapped

    class Loud(type(mixer)):  # type: ignore[misc]
        def forward(self, *arguments: Any, **options: Any) -> Tensor:
            return -super().forward(*arguments, **options)

    mixer.__class__ = Loud
    found = logits(model, ids)
    with pytest.raises(
        TypeError, match=r"Loud was derived from the class of a swapped layer and calls super"
    ):
        tw.unswap(model)
    assert torch.equal(logits(model, ids), found)
    assert tw.swap(model).skipped[1].why == "swapped already", "none of the layers was unswapped"


def _sharded(_rank: int, first: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model, ids = tiny("mamba"), tokens()
    expected, mesh = logits(model, ids), init_device_mesh("cpu", (1,))
    mixers = [layer.mixer for layer in model.backbone.layers]
    if first == "swap":
        tw.swap(model)
    for mixer in mixers:
        fully_shard(mixer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if first == "shard":
        assert len(tw.swap(model, verify=ids).swapped) == 2
    assert type(mixers[0]) is type(mixers[1])
    model(ids, use_cache=False).logits.square().sum().backward()
    assert all(mixer.A_log.grad is not None for mixer in mixers)
    assert tw.unswap(model) == 2
    assert all(isinstance(mixer, FSDPModule) and type(mixer) is type(mixers[0]) for mixer in mixers)
    mixers[0].reshard()
    torch.testing.assert_close(logits(model, ids), expected)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize("first", ["swap", "shard"])
def test_fully_shard(tmp_path: Path, first: str) -> None:
    run_ranks(_sharded, tmp_path, first)


def test_save_pretrained_is_as_before(tmp_path: Any) -> None:
    stock, ours = tiny("mamba"), tiny("mamba")
    tw.swap(ours)
    ours.save_pretrained(tmp_path)
    again = type(stock).from_pretrained(tmp_path).eval()
    assert tw.unswap(again) == 0
    assert torch.equal(logits(again, tokens()), logits(stock, tokens()))


def test_accelerate_hooks_keep_working() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny("mamba")
    ids, before = tokens(), logits(model, tokens())
    mixer = model.backbone.layers[0].mixer
    hooks.add_hook_to_module(mixer, hooks.ModelHook())
    assert not tw.swap(model).skipped
    torch.testing.assert_close(logits(model, ids), before)
    assert "_mamba_forward" in mixer._old_forward.__func__.__name__
    tw.unswap(model)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("family", FEW)
def test_offloaded_weights_are_fetched(family: str) -> None:
    """accelerate keeps weights elsewhere between calls of their modules; ours are read without a call."""
    accelerate = pytest.importorskip("accelerate")
    model, ids = tiny(family), tokens()
    before = logits(model, ids)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert not tw.swap(model).skipped
    for _ in range(2):
        torch.testing.assert_close(logits(model, ids), before, rtol=1e-4, atol=1e-5)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    torch.testing.assert_close(
        continued(model, list(ids.split([5, 1, 3], dim=1))), before, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_compiles_without_a_break(family: str) -> None:
    model = tiny(family).train()
    tw.swap(model)
    mixer = next(m for m in model.modules() if type(m).__name__.endswith("Mixer"))
    hidden = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden), mixer(hidden))


GATED_NORMS = ["mamba2", "bamba", "zamba2", "falcon_h1_norm", "granitemoehybrid", "nemotron_h"]


def gated_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNormGated")]


@pytest.mark.parametrize("family", GATED_NORMS)
def test_gated_norms_are_one_op(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, stock, ours = twins(family)
    tw.swap(ours)
    norms = gated_norms(ours)
    assert norms
    for norm in norms:
        monkeypatch.setattr(type(norm), "forward", lambda *arguments: 1 / 0)
    logits(ours, tokens())
    with pytest.raises(ZeroDivisionError):
        logits(stock, tokens())


def test_gated_norms_with_hooks_or_methods_of_their_own_are_called() -> None:
    model, ids, calls = tiny("mamba2"), tokens(), []
    tw.swap(model)
    expected = logits(model, ids)
    first, *others = gated_norms(model)
    first.register_forward_hook(lambda *arguments: calls.append("hook"))
    assert torch.allclose(logits(model, ids), expected, atol=1e-5)
    assert calls == ["hook"]
    own = others[0] if others else first
    own.__class__ = type("Other", (type(own),), {"forward": lambda self, y, z: y.new_zeros(y.shape)})
    assert not torch.allclose(logits(model, ids), expected, atol=1e-5)


@pytest.mark.parametrize("family", [*GATED_NORMS, "falcon_h1"])
def test_between_the_projections_is_one_step(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But where someone looks at the norm, it is called."""
    model, ids = tiny(family).train(), tokens()
    tw.swap(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    one_step, taken = transformers.mamba2_inner, []

    def counted(*arguments: Any, **options: Any) -> Any:
        taken.append(1)
        return one_step(*arguments, **options)

    def run() -> list[Tensor]:
        taken.clear()
        out = model(ids, use_cache=False).logits
        return [out, *torch.autograd.grad(out.square().sum(), parameters, materialize_grads=True)]

    monkeypatch.setattr(transformers, "mamba2_inner", counted)
    expected, norms = run(), gated_norms(model)
    mixers = len(taken)
    assert mixers == sum(hasattr(module, "A_log") for module in model.modules())
    for norm in norms:
        norm.register_forward_hook(lambda *arguments: None)
    found = run()
    assert len(taken) == mixers - len(norms)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-4 * max(other.abs().max(), 1)


def plain_norms(model: nn.Module) -> dict[str, nn.Module]:
    return {path: m for path, m in model.named_modules() if type(m).__name__.endswith("RMSNorm")}


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_beside_the_layers_are_one_op(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, stock, ours = twins(family)
    report = tw.swap(ours)
    wanted = {path: m for path, m in plain_norms(stock).items() if "Weightless" not in type(m).__name__}
    assert report.norms == list(wanted)
    assert report.norms
    assert f"{len(wanted)} RMS norms beside them in one pass" in str(report)
    for norm in wanted.values():
        monkeypatch.setattr(type(norm), "forward", lambda *arguments: 1 / 0)
    for path, norm in plain_norms(ours).items():
        if path in wanted:
            norm(torch.randn(2, 3, norm.weight.shape[0]))
    logits(ours, tokens())
    assert tw.unswap(ours) == len(report.swapped)
    with pytest.raises(ZeroDivisionError):
        logits(ours, tokens())


def test_which_norms_stay_torchs() -> None:
    model = tiny("mamba")
    assert not tw.swap(model, include="*.mixer").norms
    assert not tw.swap(model).norms, "nothing new to stand beside"
    tw.unswap(model)
    assert tw.swap(model, include=["*.0.mixer", "*.norm_f"]).norms == ["backbone.norm_f"]
    tw.unswap(model)
    first = model.backbone.layers[0].norm
    first.__class__ = type("Mine", (type(first),), {"forward": lambda self, x: x})
    report = tw.swap(model)
    assert report.norms == ["backbone.layers.1.norm", "backbone.norm_f"]
    norm, x = model.backbone.norm_f, torch.randn(3, 16, dtype=torch.bfloat16)
    assert norm(x).dtype == torch.float32, "as it was: the weight's dtype decides"
    exact = norm.double()(x.double())
    assert exact.dtype == torch.float64
