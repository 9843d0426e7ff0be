"""The incumbents' names: signatures, submodules, and transformers finding them in a fresh process."""

from __future__ import annotations

import inspect
import subprocess
import sys
import types

import pytest
import torch

import tilewright as tw
from tilewright.swapping.transformers import MODELS as SWAPPABLE

POSITIONAL = {
    "selective_scan_fn": "u delta A B C D z delta_bias delta_softplus return_last_state",
    "mamba_inner_fn": (
        "xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight out_proj_weight out_proj_bias A B C D "
        "delta_bias B_proj_bias C_proj_bias delta_softplus checkpoint_lvl b_rms_weight c_rms_weight "
        "dt_rms_weight b_c_dt_rms_eps"
    ),
    "selective_state_update": "state x dt A B C D z dt_bias dt_softplus state_batch_indices",
    "mamba_chunk_scan_combined": (
        "x dt A B C chunk_size D z dt_bias initial_states seq_idx cu_seqlens dt_softplus dt_limit "
        "return_final_states return_varlen_states state_dtype"
    ),
    "mamba_split_conv1d_scan_combined": (
        "zxbcdt conv1d_weight conv1d_bias dt_bias A D chunk_size initial_states seq_idx dt_limit "
        "return_final_states activation rmsnorm_weight rmsnorm_eps outproj_weight outproj_bias headdim "
        "ngroups norm_before_gate state_dtype"
    ),
    "rmsnorm_fn": "x weight bias z eps group_size norm_before_gate",
    "causal_conv1d_fn": (
        "x weight bias seq_idx initial_states return_final_states final_states_out activation"
    ),
    "causal_conv1d_update": "x conv_state weight bias activation cache_seqlens conv_state_indices",
}  # fmt: skip
WHERE = {
    "selective_scan_fn": "mamba_ssm.ops.selective_scan_interface",
    "mamba_inner_fn": "mamba_ssm.ops.selective_scan_interface",
    "selective_state_update": "mamba_ssm.ops.triton.selective_state_update",
    "mamba_chunk_scan_combined": "mamba_ssm.ops.triton.ssd_combined",
    "mamba_split_conv1d_scan_combined": "mamba_ssm.ops.triton.ssd_combined",
    "rmsnorm_fn": "mamba_ssm.ops.triton.layernorm_gated",
    "causal_conv1d_fn": "causal_conv1d",
    "causal_conv1d_update": "causal_conv1d",
}
ONE_LINE = "import sys, tilewright.compat; sys.modules['mamba_ssm'] = tilewright.compat.mamba_ssm; " + (
    "sys.modules['causal_conv1d'] = tilewright.compat.causal_conv1d\n"
)
WAYS = {"one line": ONE_LINE, "install": "import tilewright as tw; tw.compat.install()\n"}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", POSITIONAL)
def test_signatures(name: str) -> None:
    module = tw.compat
    for part in WHERE[name].split("."):
        module = getattr(module, part)
    parameters = inspect.signature(getattr(module, name)).parameters.values()
    positional = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert positional == POSITIONAL[name].split()
    assert all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters)


@pytest.mark.parametrize("way", WAYS)
def test_imports_as_people_write_them(way: str) -> None:
    run(WAYS[way] + (
        "import importlib.util\n"
        "from mamba_ssm import Mamba, Mamba2, selective_scan_fn, mamba_inner_fn\n"
        "from mamba_ssm.modules.mamba_simple import Mamba as M1\n"
        "from mamba_ssm.modules.mamba2 import Mamba2 as M2\n"
        "from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as fn\n"
        "from mamba_ssm.ops.triton.selective_state_update import selective_state_update\n"
        "from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined\n"
        "from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined\n"
        "from mamba_ssm.ops.triton.layernorm_gated import RMSNorm, rmsnorm_fn\n"
        "from mamba_ssm.utils.generation import InferenceParams\n"
        "from causal_conv1d import causal_conv1d_fn, causal_conv1d_update\n"
        "from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn as conv\n"
        "import mamba_ssm.ops.triton.ssd_combined as module\n"
        "import tilewright as tw\n"
        "assert Mamba is M1 is tw.nn.Mamba and Mamba2 is M2\n"
        "assert fn is selective_scan_fn is tw.scan.selective_scan\n"
        "assert conv is causal_conv1d_fn is tw.scan.causal_conv1d and module.mamba_chunk_scan_combined\n"
        "assert importlib.util.find_spec('mamba_ssm') is not None\n"
    ))  # fmt: skip


def test_gated_norm_has_no_bias() -> None:
    norm = tw.compat.mamba_ssm.ops.triton.layernorm_gated
    x, z, weight = torch.randn(2, 8), torch.randn(2, 8), torch.randn(8)
    expected = tw.scan.gated_rms_norm(x, weight, z, 1e-5, 4, False)
    assert torch.equal(norm.rmsnorm_fn(x, weight, None, z, 1e-5, 4, False), expected)
    with pytest.raises(NotImplementedError, match="bias must be None"):
        norm.rmsnorm_fn(x, weight, weight)


LOGITS = """
import torch, transformers
def logits(name, **settings):
    torch.manual_seed(0)
    settings |= {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2}
    config = getattr(transformers, name + "Config")(**settings)
    model = getattr(transformers, name + "ForCausalLM")(config)
    ids = torch.arange(18).view(2, 9)
    train = model.train()(ids).logits
    with torch.no_grad():
        generated = model.eval().generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        return torch.cat([train.flatten(), model(ids).logits.flatten(), generated.flatten()]).tolist()
found = [
    logits("Mamba", state_size=5),
    logits("Mamba2", state_size=6, num_heads=4, head_dim=8, n_groups=2, chunk_size=4),
]
print(found)
"""


@pytest.mark.slow
def test_transformers_finds_them() -> None:
    pytest.importorskip("transformers", minversion="5.23")  # Mamba-2's norm is by groups, as mamba_ssm's
    plain = eval(run(LOGITS).splitlines()[-1])
    used = (
        "import tilewright.scan as scan\n"
        "calls = []\n"
        "for name in ('mamba_inner', 'selective_scan', 'selective_state_update', 'causal_conv1d',\n"
        "             'ssd_chunk_scan', 'causal_conv1d_update', 'mamba_split_conv1d_scan_combined'):\n"
        "    import functools\n"
        "    def counted(*a, _f=getattr(scan, name), _n=name, **k):\n"
        "        calls.append(_n)\n"
        "        return _f(*a, **k)\n"
        "    setattr(scan, name, functools.wraps(getattr(scan, name))(counted))\n"
    )
    lines = run(used + ONE_LINE + LOGITS + "print(sorted(set(calls)))").splitlines()
    ours, calls = eval(lines[-2]), eval(lines[-1])
    assert len(calls) == 7, "transformers calls every one of them"
    for ours_of, plain_of in zip(ours, plain, strict=True):
        assert ours_of == pytest.approx(plain_of, rel=1e-4, abs=1e-5)


def test_install_says_what_is_in_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"names must be among \['causal_conv1d', 'mamba_ssm'\], got 'mamba'"
    ):
        tw.compat.install("mamba")
    monkeypatch.setitem(sys.modules, "mamba_ssm", types.ModuleType("mamba_ssm"))
    with pytest.raises(RuntimeError, match="mamba_ssm is imported already"):
        tw.compat.install("mamba_ssm")


MODELS = sorted({*SWAPPABLE, "lfm2"})
WARNINGS = """
import sys, types, warnings, tilewright as tw
def warned(*names):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tw.compat.install(*names)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("mamba_ssm", "causal_conv1d")]:
        del sys.modules[name]
    return [str(w.message) for w in caught]
"""


def test_too_late_for_transformers() -> None:
    pytest.importorskip("transformers", minversion="5.0")
    imports = "\n".join(f"import transformers.models.{name}.modeling_{name}" for name in MODELS)
    every, mamba_alone = eval(run(
        f"import sys\n{imports}\n{WARNINGS}"
        "found = [warned(), warned('mamba_ssm')]\n"
        "tw.compat.install()\n"
        "import transformers.models.mamba.modeling_mamba\n"
        "with warnings.catch_warnings():\n"
        "    warnings.simplefilter('error')\n"
        "    tw.compat.install()\n"
        "print(found)\n"
    ).splitlines()[-1])  # fmt: skip
    assert "use tilewright.swap" in every[0]
    assert ", ".join(MODELS) in every[0]
    assert "lfm2" not in mamba_alone[0]


@pytest.mark.parametrize("model", MODELS)
def test_too_late_for_one_of_them(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType(f"transformers.models.{model}.modeling_{model}")
    module.causal_conv1d_fn = print
    monkeypatch.setattr(sys, "modules", {**sys.modules, module.__name__: module})
    with pytest.warns(UserWarning, match=model):
        tw.compat.install()


@pytest.mark.filterwarnings("ignore:transformers':UserWarning")
def test_versions_are_what_transformers_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    imports = pytest.importorskip("transformers.utils.import_utils")
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    tw.compat.install()
    monkeypatch.setattr(imports, "is_torch_cuda_available", lambda: True)
    for name in ("is_mamba_ssm_available", "is_mamba_2_ssm_available", "is_causal_conv1d_available"):
        available = getattr(imports, name)
        available.cache_clear()
        assert available(), name
        available.cache_clear()
