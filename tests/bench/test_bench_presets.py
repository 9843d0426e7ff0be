"""Presets: the table's facts, that every family's cases can be made from them, and that those cases run."""

from __future__ import annotations

import math
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright import _families
from tilewright.bench import attention, prune, scan, scan_blocks
from tilewright.bench.case import OURS, Case, Plan, Unavailable
from tilewright.bench.presets import MODELS, Attention, Mlp, Model, Scan

CPU = torch.device("cpu")
TINY = {
    "llama": Model("", 2, 128, Attention(4, 2, 32, 128, window=40), Mlp(192)),
    "encoder": Model("", 2, 128, Attention(4, 4, 32, 100, causal=False), Mlp(192, gated=False)),
    "mamba": Model("", 2, 64, scan=Scan(128, 16)),
    "mamba2": Model("", 2, 64, scan=Scan(128, 128, 2)),
}


@pytest.mark.parametrize(
    ("name", "embeddings", "published"),
    [
        ("llama-1b", 128256 * 2048, 1.236e9),
        ("llama-8b", 2 * 128256 * 4096, 8.030e9),
        ("mistral-7b", 2 * 32000 * 4096, 7.242e9),
        ("qwen-0.5b", 151936 * 896, 0.494e9),
        ("qwen-7b", 2 * 152064 * 3584, 7.616e9),
        ("bert-base", (30522 + 512 + 2) * 768 + 768**2, 109.5e6),
        ("vit-b", (16**2 * 3 + 197 + 1000) * 768, 86.6e6),
        ("mamba-130m", 50280 * 768, 129.1e6),
        ("mamba-2.8b", 50280 * 2560, 2.768e9),
        ("mamba2-130m", 50288 * 768, 129.0e6),
        ("mamba2-1.3b", 50288 * 2048, 1.344e9),
    ],
)
def test_the_layers_add_up_to_the_model(name: str, embeddings: int, published: float) -> None:
    """Sizes in the table are right if they give the number of parameters that the model is known to have."""
    model = MODELS[name]
    layers = model.layers * sum(map(math.prod, model.parameters()))
    assert layers + embeddings == pytest.approx(published, rel=0.002)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", MODELS)
def test_cases_of_a_model_have_names_of_their_own_and_its_sizes(name: str, device: str) -> None:
    model = MODELS[name]
    for family in _families.present("bench"):
        module = _families.load("bench", family)
        cases = module.cases(Plan(torch.device(device), model=model))
        assert bool(cases) == {"attention": bool(model.attention), "scan": bool(model.scan)}.get(family, True)
        assert len({case.name for case in cases}) == len(cases)
        assert all(case.group and case.contenders[0].name == OURS for case in cases)
        assert {c.owner for case in cases for c in case.contenders} <= {OURS, *module.PEERS}


def test_the_layers_of_a_preset_are_the_models() -> None:
    cases = prune.cases(Plan(CPU, model=MODELS["llama-8b"]))
    sizes = {(c.sizes["out"], c.sizes["in"]) for c in cases if c.name.startswith("bsr-b")}
    assert sizes == {(14336, 4096), (4096, 14336), (4096, 4096)}
    (case,) = (c for c in cases if c.name == "bsr-b32-90-1-fp32-14336x4096")
    kept = round(0.1 * 14336 * 4096)
    assert case.contenders[0].bytes == 4 * (kept + 14336 + 4096)
    assert case.flops == 2 * kept


def test_attention_of_a_model_has_its_heads_and_window() -> None:
    cases = {c.name: c for c in attention.cases(Plan(torch.device("cuda"), model=MODELS["mistral-7b"]))}
    assert cases["window-bf16"].sizes == {
        "shape": "1x32x32768x128", "kv heads": 8, "dtype": "bfloat16", "window": 4096
    }  # fmt: skip
    assert "causal-bf16-backward" in cases
    plain = attention.cases(Plan(CPU, model=MODELS["vit-b"]))
    assert {"full-fp32", "density-25-block-64"} <= {case.name for case in plain}
    assert not any(case.name.startswith(("causal", "window", "estimate")) for case in plain)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("family", _families.present("bench"))
def test_every_contender_of_a_model_runs_or_says_why_not(family: str, kind: str) -> None:
    for case in _families.load("bench", family).cases(Plan(CPU, model=TINY[kind])):
        for contender in case.contenders:
            if "compiled" in contender.name or contender.owner == "torchao":  # half a minute in a compiler
                continue
            try:
                contender.setup()()
            except Unavailable:
                assert contender.owner != OURS


@pytest.mark.parametrize("case", scan_blocks.cases(Plan(CPU, quick=True)), ids=lambda case: case.name)
def test_peers_of_a_block_do_the_same_work(case: Case) -> None:
    name = case.contenders[1].owner
    pytest.importorskip(name)
    ours, theirs = (contender.setup()() for contender in case.contenders[:2])
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_flops_of_a_block_are_those_of_its_parts() -> None:
    """Of mamba-130m's: nearly all lie in the projections, and training is three times as much."""
    forward, training, *_ = scan_blocks.cases(Plan(CPU))
    weights = 1536 * (80 + 48 + 768)
    assert forward.flops is not None
    assert 2 * 512 * weights < forward.flops < 1.2 * 2 * 512 * weights
    assert training.flops == pytest.approx(3 * forward.flops, rel=0.05)


def test_flash_attn_gets_our_layout_and_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with flash-attn's signature, which is no package for a CPU."""

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, causal: bool = False, window_size: tuple[int, int] = (-1, -1)
    ) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        seen = (distance >= 0) & (distance <= window_size[0] if window_size[0] >= 0 else True)
        mask = seen if causal else torch.ones_like(distance, dtype=torch.bool)
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)

    fake = ModuleType("flash_attn")
    fake.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    cases = {c.name: c for c in attention.cases(Plan(CPU, model=TINY["llama"]))}
    for name in ("window-fp32", "causal-fp32"):
        calls = {c.name: c.setup for c in cases[name].contenders}
        torch.testing.assert_close(calls["flash-attn"]()(), calls[OURS]()(), rtol=1e-4, atol=1e-5)


def test_a_models_blocks_are_its_own_kind() -> None:
    names = [case.name for case in scan.cases(Plan(CPU, model=MODELS["mamba2-1.3b"]))]
    assert "mamba-split-conv1d-scan-combined" in names
    assert not any("selective-scan" in name or name == "mamba-inner" for name in names)
