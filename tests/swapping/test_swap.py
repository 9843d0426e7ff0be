"""tw.swap itself: reports, selection, dry runs, verification, what it refuses."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import subprocess
import sys
import types
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny, tokens
from torch import nn

import tilewright as tw
from tilewright import _C, swapping
from tilewright import nn as tw_nn
from tilewright.attention import BlockMask
from tilewright.nn.mamba2 import RMSNormGated
from tilewright.swapping import Skipped, Swapped, SwapReport

pytest.importorskip("transformers", minversion="4.57")


def mixers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ == "MambaMixer"]


def swapped(model: nn.Module) -> list[bool]:
    return [
        type(mixer).forward is not type(mixer).__mro__[-2].forward and len(type(mixer).__mro__) == 4
        for mixer in mixers(model)
    ]


def test_report() -> None:
    model = tiny("jamba")
    report = tw.swap(model)
    assert [entry.path for entry in report.swapped] == ["model.layers.0.mamba", "model.layers.2.mamba"]
    entry = report.swapped[0]
    assert (entry.layer, entry.op, entry.kernel) == (
        "JambaMambaMixer",
        "selective_scan",
        f"cpu-{_C.cpu_level()}",
    )
    lines = str(report).splitlines()
    assert lines[0] == "2 layers swapped, 0 layers left as they were."
    assert lines[4].split() == ["model.layers.{0,2}.mamba", "JambaMambaMixer", "selective_scan", entry.kernel]


def test_again_finds_nothing_new() -> None:
    model = tiny("mamba")
    tw.swap(model)
    classes = [type(mixer) for mixer in mixers(model)]
    report = tw.swap(model)
    assert not report.swapped
    assert [entry.why for entry in report.skipped] == ["swapped already"] * 2
    assert [type(mixer) for mixer in mixers(model)] == classes


def test_dry_run_changes_nothing() -> None:
    model = tiny("mamba")
    classes = [type(mixer) for mixer in mixers(model)]
    report = tw.swap(model, dry_run=True)
    assert len(report.swapped) == 2
    assert "2 layers would be swapped" in str(report)
    assert [type(mixer) for mixer in mixers(model)] == classes


@pytest.mark.parametrize(
    ("include", "paths"),
    [
        ("*.1.mixer", ["backbone.layers.1.mixer"]),
        (["*.1.mixer", "*.0.*"], ["backbone.layers.0.mixer", "backbone.layers.1.mixer"]),
        (lambda path, module: path.endswith("0.mixer"), ["backbone.layers.0.mixer"]),
        ("!*.0.mixer", ["backbone.layers.1.mixer"]),
        (["*.mixer", "!*.1.*"], ["backbone.layers.0.mixer"]),
        ([], []),
    ],
)
def test_include(include: Any, paths: list[str]) -> None:
    report = tw.swap(tiny("mamba"), include=include)
    assert [entry.path for entry in report.swapped] == paths
    assert {entry.why for entry in report.skipped} <= {"not included"}
    assert len(report.swapped) + len(report.skipped) == 2


def test_scan_off_and_strangers() -> None:
    report = tw.swap(tiny("mamba"), scan=False)
    assert not report.swapped
    assert [entry.why for entry in report.skipped] == ["scan is False"] * 2
    for scan in (False, True):
        report = tw.swap(nn.Sequential(nn.Linear(2, 2)), scan=scan)
        text = str(report)
        assert "1 linear layer left dense" in text
        assert "Nothing here is for tilewright's kernels. What it swaps:\n- Mamba layers" in text


def test_our_own_modules() -> None:
    report = tw.swap(nn.Sequential(nn.Linear(8, 8), tw.nn.Mamba(8), tw.nn.Mamba2(8, headdim=8)))
    assert not report.swapped
    assert [(entry.path, entry.layer, entry.why) for entry in report.skipped] == [
        ("1", "Mamba", "it is tilewright's own"),
        ("2", "Mamba2", "it is tilewright's own"),
    ]
    assert "Nothing here" not in str(report)


def test_with_takes_back_at_the_end() -> None:
    model = tiny("mamba")
    with tw.swap(model) as report:
        assert len(report.swapped) == 2
        assert swapped(model) == [True, True]
    assert swapped(model) == [False, False]
    with pytest.raises(KeyError), tw.swap(model):
        raise KeyError
    assert swapped(model) == [False, False]
    with tw.swap(model, dry_run=True):
        assert swapped(model) == [False, False]


def test_the_inner_one_takes_back_what_it_did() -> None:
    model = tiny("mamba")
    with tw.swap(model, include="*.0.mixer"):
        with tw.swap(model) as inner:
            assert [entry.path for entry in inner.swapped] == ["backbone.layers.1.mixer"]
            assert swapped(model) == [True, True]
        assert swapped(model) == [True, False]
        with tw.swap(model, include="*.0.mixer"):
            pass
        assert swapped(model) == [True, False]
    assert swapped(model) == [False, False]


def test_undo() -> None:
    model = tiny("mamba")
    outer, inner = tw.swap(model, include="*.0.mixer"), tw.swap(model)
    twin, record = copy.deepcopy(model), pickle.loads(pickle.dumps(inner))
    outer.undo()
    assert swapped(model) == [False, True]
    record.undo()
    outer.undo()
    assert swapped(model) == [False, True]
    assert str(record) == str(inner)
    inner.undo()
    assert swapped(model) == [False, False]
    assert swapped(twin) == [True, True]
    with tw.swap(model):
        assert tw.unswap(model) == 2
    report = tw.swap(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    report.undo()


def test_layers_alike_share_a_row() -> None:
    entries = [Swapped(f"m.{i}.e.{j}.w", "L", "op", "k") for i in range(3) for j in (0, 1, 2, 5)]
    entries += [
        Swapped("m.7.w", "L", "op", "k"),
        Swapped("m.9.w", "L", "op", "other"),
        Swapped("", "L", "o", "k"),
    ]
    entries += [Swapped(f"x.{i}.{j}", "L", "op", "k") for i, j in ((0, 1), (1, 0), (1, 1))]
    report = SwapReport(entries, [Skipped(f"l.{i}", "L", "why <not>") for i in range(40)])
    assert [line.split()[0] for line in str(report).splitlines()[4:-4]] == [
        "m.{0..2}.e.{0..2,5}.w", "m.7.w", "m.9.w", "L", "x.0.1", "x.1.{0,1}",
    ]  # fmt: skip
    assert str(report).splitlines()[-1].split()[0] == "l.{0..39}"
    html = report._repr_html_()
    assert html.count("<tr>") == 2 + 6 + 1
    assert "why &lt;not&gt;" in html


def test_report_as_data(tmp_path: Path) -> None:
    report = tw.swap(tiny("mamba"), include="*.0.mixer")
    path = tmp_path / "report.json"
    assert json.loads(report.to_json(path)) == json.loads(path.read_text()) == report.to_dict()
    assert report.to_dict()["skipped"] == [
        {"path": "backbone.layers.1.mixer", "layer": "MambaMixer", "why": "not included"}
    ]


def test_releases_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    model, ids = tiny("mamba"), tokens()
    monkeypatch.setattr(transformers, "__version__", "4.56.2")
    why = "it is of transformers 4.56.2; its kind is swapped from 4.57 on"
    assert {entry.why for entry in tw.swap(model).skipped} == {why}
    monkeypatch.setattr(transformers, "__version__", "99.0.0.dev0")
    report = tw.swap(model)
    assert len(report.swapped) == 2
    warning = "transformers 99.0.0.dev0 is newer than 5.23, the newest that tilewright was tested with"
    assert warning in str(report)
    assert warning in report.to_dict()["warnings"][0]
    report.undo()
    assert not tw.swap(model, verify=ids).warnings
    assert not tw.swap(nn.Sequential(nn.Linear(4, 4))).warnings


def test_one_layer_alone() -> None:
    mixer = mixers(tiny("mamba"))[0]
    assert [entry.path for entry in tw.swap(mixer).swapped] == [""]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"hidden_act": "gelu"}, "its activation is 'gelu'"),
        ({"conv_kernel": 9}, "its convolution is 9 wide"),
        ({"state_size": 257}, "it has 257 states a channel"),
    ],
)
def test_what_kernels_do_not_cover_is_left_alone(settings: dict[str, Any], why: str) -> None:
    model = tiny("mamba", **settings)
    report = tw.swap(model)
    assert not report.swapped
    assert all(why in entry.why for entry in report.skipped)
    assert model(tokens()).logits.isfinite().all()


def test_layers_that_differ_are_left_alone() -> None:
    model = tiny("mamba")
    first, second = mixers(model)

    class Mine(type(first)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
            return hidden_states

    first.__class__ = Mine
    second.forward = lambda *arguments, **options: arguments[0]  # type: ignore[method-assign]
    whys = [entry.why for entry in tw.swap(model).skipped]
    assert whys == [
        "its class overrides the forward of MambaMixer",
        "its forward was replaced on the instance",
    ]


def test_subclasses_that_do_not_override_are_swapped() -> None:
    model = tiny("mamba")
    first = mixers(model)[0]
    first.__class__ = type("MyMixer", (type(first),), {"extra": 1})
    assert len(tw.swap(model, verify=tokens()).swapped) == 2
    assert first.extra == 1
    assert tw.unswap(model) == 2
    assert type(first).__name__ == "MyMixer"


@pytest.mark.parametrize(
    "inputs", [tokens(), (tokens(),), {"input_ids": tokens(), "use_cache": False}], ids=type
)
def test_verify(inputs: Any) -> None:
    model = tiny("mamba").train()
    assert len(tw.swap(model, verify=inputs).swapped) == 2
    assert model.training
    assert all(module.training for module in model.modules())


def test_verify_undoes_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("mamba")
    before = model(tokens()).logits
    scan = tw.scan.selective_scan
    monkeypatch.setattr(tw.scan, "selective_scan", lambda *a, **k: tuple(1.2 * t for t in scan(*a, **k)))
    with pytest.raises(RuntimeError, match=r"verify: output.logits differs by .* The swap was undone"):
        tw.swap(model, verify=tokens())
    assert tw.unswap(model) == 0
    assert torch.equal(model(tokens()).logits, before)


def test_an_error_while_verifying_undoes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("mamba")

    def broken(*arguments: Any, **options: Any) -> None:
        raise KeyError("broken")

    monkeypatch.setattr(tw.scan, "selective_scan", broken)
    with pytest.raises(KeyError, match="broken"):
        tw.swap(model, verify=tokens())
    assert tw.unswap(model) == 0


def test_a_failure_halfway_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("mamba")
    exchange, calls = swapping.exchange, []

    def second_fails(module: nn.Module, methods: Any, note: object) -> None:
        calls.append(module)
        if len(calls) == 2:
            raise TypeError("cannot be")
        exchange(module, methods, note)

    monkeypatch.setattr(swapping, "exchange", second_fails)
    with pytest.raises(TypeError, match="cannot be"):
        tw.swap(model)
    assert tw.unswap(model) == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tw.swap("model"), TypeError, "model must be a torch.nn.Module, got str"),
        (lambda: tw.unswap(3), TypeError, "model must be a torch.nn.Module, got int"),
        (lambda: tw.swap(nn.Linear(1, 1), attention=object()), TypeError, "attention must be a tilewright"),
        (
            lambda: tw.swap(nn.Linear(1, 1), attention=BlockMask.causal(8)),
            TypeError,
            r"such as BlockSparse\(mask\), got BlockMask",
        ),
        (
            lambda: tw.swap(nn.Linear(1, 1), attention=BlockMask.sliding_window),
            TypeError,
            r"such as BlockSparse\(BlockMask.sliding_window, ...\), got function",
        ),
        (lambda: tw.swap(nn.Linear), TypeError, "model must be a torch.nn.Module, got the class Linear"),
        (lambda: tw.swap(nn.Linear(1, 1), scan="no"), TypeError, "scan must be True or False, got 'no'"),
        (lambda: tw.swap(nn.Linear(1, 1), include=3), TypeError, "include must be a pattern"),
        (
            lambda: tw.swap(tiny("mamba"), include="backbone.layer.1.*"),
            ValueError,
            "include: 'backbone.layer.1.*' matches no layer of the model; .* mean 'backbone.layers.1'",
        ),
        (lambda: tw.swap(tiny("mamba"), verify=3), TypeError, "verify must be a tensor, a tuple or a dict"),
        (lambda: tw.swap(nn.Linear(1, 1), verify=3), TypeError, "verify must be a tensor, .*, got int"),
        (lambda: tw.swap(tiny("mamba"), verify=3, dry_run=True), TypeError, "verify must be a tensor"),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_other_devices_are_left_alone() -> None:
    with torch.device("meta"):
        model = nn.ModuleList([tiny_meta_mixer()])
    assert tw.swap(model).swapped[0].kernel == "by device"


def tiny_meta_mixer() -> nn.Module:
    from transformers.models.mamba.modeling_mamba import MambaMixer

    return MambaMixer(tiny("mamba").config, layer_idx=0)  # type: ignore[no-any-return]


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> nn.ModuleList:
    """mamba_ssm needs a GPU to build: classes with its names and our parameters stand for it."""
    for package in (
        "mamba_ssm",
        "mamba_ssm.modules",
        "mamba_ssm.modules.mamba_simple",
        "mamba_ssm.modules.mamba2",
    ):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    model = nn.ModuleList()
    for name, module, base in (("Mamba", "mamba_simple", tw_nn.Mamba), ("Mamba2", "mamba2", tw_nn.Mamba2)):
        cls = type(name, (base,), {"__module__": f"mamba_ssm.modules.{module}", "process_group": None})
        cls.forward = lambda self, *arguments: 1 / 0
        setattr(sys.modules[f"mamba_ssm.modules.{module}"], name, cls)
        torch.manual_seed(0)
        model.append(cls(16, d_state=8, layer_idx=0, **({"headdim": 8} if name == "Mamba2" else {})))
    return model


def test_layers_of_mamba_ssm(theirs: nn.ModuleList) -> None:
    report = tw.swap(theirs)
    assert [(entry.layer, entry.op) for entry in report.swapped] == [
        ("Mamba", "selective_scan"),
        ("Mamba2", "ssd_chunk_scan"),
    ]
    hidden = torch.randn(2, 5, 16)
    for layer, base in zip(theirs, (tw_nn.Mamba, tw_nn.Mamba2), strict=True):
        assert torch.equal(layer(hidden), base.forward(layer, hidden))
    theirs[1].process_group = "a group"
    tw.unswap(theirs)
    assert tw.swap(theirs).skipped[0].why == "it is spread over a process group"


def test_mamba_ssm_layers_that_kernels_do_not_cover(theirs: nn.ModuleList) -> None:
    theirs[0].d_state = 257
    theirs[1].d_conv = 9
    assert [entry.why for entry in tw.swap(theirs).skipped] == [
        "it has 257 states a channel; the kernels have up to 256",
        "its convolution is 9 wide; the kernels have up to 8",
    ]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("group_size", [8, None])
def test_mamba_ssm_norm_is_not_called(theirs: nn.ModuleList, gradients: bool, group_size: int | None) -> None:
    """It is a Triton kernel, which fails on a CPU."""
    layer, hidden = theirs[1], torch.randn(2, 5, 16)
    layer.norm = RMSNormGated(32, group_size=group_size)
    nn.init.normal_(layer.norm.weight)
    expected = tw_nn.Mamba2.forward(layer, hidden)
    members = {"__module__": "mamba_ssm.ops.triton.layernorm_gated", "forward": lambda *arguments: 1 / 0}
    layer.norm.__class__, layer.norm.group_size = type("RMSNorm", (RMSNormGated,), members), group_size
    tw.swap(theirs)
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(layer(hidden), expected)
    with torch.no_grad():
        states = layer.allocate_inference_cache(2, 5)
        steps = [layer.step(hidden[:, t : t + 1], *states)[0] for t in range(5)]
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-5)


def test_transformers_is_not_imported_for_others() -> None:
    code = (
        "import sys, torch, tilewright as tw\n"
        "assert 'tilewright.swapping' not in sys.modules\n"
        "tw.swap(torch.nn.Linear(1, 1))\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
