"""Each public op, given each of its arguments wrong in many ways, answers in the words of `_checks`.

An answer names an argument of the op, comes from this package and not from torch, and from its Python: the
compiled extension checks again, for callers of `torch.ops`, in words of its own. Decode steps are the
exception: a check costs them as much as the work, so the extension's are the only ones, in the same words.
"""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tilewright as tw
from tilewright import _backend
from tilewright.attention import BlockMask, estimate

REFUSALS = (TypeError, ValueError, NotImplementedError)
PACKAGE = str(Path(tw.__file__).parent)


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def scan_inputs() -> dict[str, Any]:
    x, maps = rand(2, 4, 6), rand(2, 3, 6)
    return {
        "u": x, "delta": x, "A": -rand(4, 3), "B": maps, "C": maps, "D": rand(4), "z": x,
        "delta_bias": rand(4), "initial_state": rand(2, 4, 3), "order": torch.arange(6),
    }  # fmt: skip


def packed_scan_inputs() -> dict[str, Any]:
    x = rand(1, 4, 6)
    return {"u": x, "delta": x, "A": -rand(4, 3), "B": rand(4, 3), "C": rand(1, 2, 3, 6),
            "cu_seqlens": torch.tensor([0, 2, 6])}  # fmt: skip


def inner_inputs() -> dict[str, Any]:
    return {
        "xz": rand(2, 8, 6), "conv1d_weight": rand(4, 1, 3), "conv1d_bias": rand(4),
        "x_proj_weight": rand(8, 4), "delta_proj_weight": rand(4, 2), "out_proj_weight": rand(5, 4),
        "out_proj_bias": rand(5), "A": -rand(4, 3), "D": rand(4), "delta_bias": rand(4),
        "B_proj_bias": rand(3), "C_proj_bias": rand(3),
        "b_rms_weight": rand(3), "c_rms_weight": rand(3), "dt_rms_weight": rand(2),
    }  # fmt: skip


def step_inputs() -> dict[str, Any]:
    return {
        "hidden_states": rand(2, 5), "conv_state": rand(2, 4, 3), "ssm_state": rand(2, 4, 3),
        "in_proj_weight": rand(8, 5), "in_proj_bias": rand(8), "conv1d_weight": rand(4, 3),
        "conv1d_bias": rand(4), "x_proj_weight": rand(8, 4), "dt_proj_weight": rand(4, 2),
        "dt_proj_bias": rand(4), "A_log": rand(4, 3), "D": rand(4), "out_proj_weight": rand(5, 4),
        "out_proj_bias": rand(5), "b_rms_weight": rand(3), "c_rms_weight": rand(3), "dt_rms_weight": rand(2),
        "b_c_dt_rms_eps": 1e-6,
    }  # fmt: skip


def ssd_inputs() -> dict[str, Any]:
    x, maps = rand(1, 6, 2, 4), rand(1, 6, 1, 3)
    return {
        "x": x, "dt": rand(1, 6, 2), "A": -rand(2), "B": maps, "C": maps, "chunk_size": 4, "D": rand(2),
        "z": x, "dt_bias": rand(2), "initial_states": rand(1, 2, 4, 3),
        "seq_idx": torch.zeros(1, 6, dtype=torch.int32), "cu_seqlens": torch.tensor([0, 6]),
        "dt_limit": (0.0, 1.0), "state_dtype": torch.float32,
    }  # fmt: skip


def split_inputs() -> dict[str, Any]:
    return {
        "zxbcdt": rand(1, 6, 2 * 8 + 2 * 3 + 2), "conv1d_weight": rand(14, 3), "conv1d_bias": rand(14),
        "dt_bias": rand(2), "A": -rand(2), "D": rand(2), "chunk_size": 4, "initial_states": rand(1, 2, 4, 3),
        "seq_idx": torch.zeros(1, 6, dtype=torch.int32), "activation": "silu", "rmsnorm_weight": rand(8),
        "rmsnorm_eps": 1e-6, "outproj_weight": rand(5, 8), "outproj_bias": rand(5), "headdim": 4,
        "ngroups": 1,
    }  # fmt: skip


def update_inputs() -> dict[str, Any]:
    x, maps = rand(2, 4), rand(2, 3)
    return {"state": rand(2, 4, 3), "x": x, "dt": x, "A": -rand(4, 3), "B": maps, "C": maps, "D": rand(4),
            "z": x, "dt_bias": rand(4), "state_batch_indices": torch.tensor([1, 0])}  # fmt: skip


def norm_inputs() -> dict[str, Any]:
    x = rand(2, 6, 8)
    return {"x": x, "weight": rand(8), "z": x, "eps": 1e-5, "group_size": 4, "norm_before_gate": True}


def conv_inputs() -> dict[str, Any]:
    return {"x": rand(2, 4, 6), "weight": rand(4, 3), "bias": rand(4),
            "seq_idx": torch.zeros(2, 6, dtype=torch.int32), "initial_states": rand(2, 4, 2),
            "activation": "silu"}  # fmt: skip


def conv_update_inputs() -> dict[str, Any]:
    return {"x": rand(2, 4), "conv_state": rand(2, 4, 3), "weight": rand(4, 3), "bias": rand(4),
            "activation": "silu", "cache_seqlens": torch.zeros(2, dtype=torch.int32),
            "conv_state_indices": torch.tensor([1, 0])}  # fmt: skip


def attention_inputs() -> dict[str, Any]:
    return {"q": rand(1, 4, 32, 8), "k": rand(1, 2, 32, 8), "v": rand(1, 2, 32, 16)}


def masked_inputs() -> dict[str, Any]:
    ends = torch.tensor([0, 10, 32])
    mask = BlockMask.causal(32, block_size=16)
    return {**attention_inputs(), "block_mask": mask, "scale": 0.5, "softcap": 1.0, "cu_seqlens_q": ends,
            "cu_seqlens_k": ends}  # fmt: skip


def dequantize_inputs() -> dict[str, Any]:
    codes, state = tw.optim.quantize_blockwise(rand(8, 64), blocksize=64)
    return {"A": codes, "absmax": state.absmax, "code": state.code, "blocksize": 64}


def permuted_inputs() -> dict[str, Any]:
    return {**attention_inputs(), "block_size": 16, "segment_size": 32, "threshold": 0.9, "scale": 0.5}


def estimator_inputs(**options: Any) -> dict[str, Any]:
    both = attention_inputs()
    del both["v"]
    return {**both, "block_size": 16, "sink_blocks": 1, "local_blocks": 1, **options}


def kept_mass_inputs() -> dict[str, Any]:
    both = attention_inputs()
    return {"q": both["q"], "k": both["k"], "block_mask": BlockMask.causal(32, block_size=16), "scale": 1.0}


def linear_inputs() -> dict[str, Any]:
    x = rand(1, 6, 4)
    return {"a": x, "b": x, "h0": rand(2, 4), "dim": 1, "cu_seqlens": torch.tensor([0, 2, 6])}


def quantize_inputs() -> dict[str, Any]:
    return {"A": rand(8, 64), "code": tw.optim.create_dynamic_map(), "blocksize": 64}


def mask_inputs() -> dict[str, Any]:
    return {"weight": rand(8, 8), "pattern": "element", "sparsity": 0.5, "criterion": "wanda",
            "activation_norm": rand(8), "scope": "row"}  # fmt: skip


def half_zero(*zero: slice) -> nn.Linear:
    linear = nn.Linear(32, 32)
    with torch.no_grad():
        linear.weight[zero] = 0
    return linear


BLOCK_SPARSE = tw.nn.BlockSparseLinear.from_linear(half_zero(slice(16)), block=16)
SEMI_STRUCTURED = tw.nn.SemiStructuredLinear.from_linear(half_zero(slice(None), slice(0, None, 2)), "2:4")
ACTIVATION_SPARSE = tw.nn.ActivationSparseLinear.from_linear(nn.Linear(32, 32), 0.5)


OPS: list[tuple[str, Callable[..., Any], Callable[[], dict[str, Any]]]] = [
    ("linear_scan", tw.scan.linear_scan, linear_inputs),
    ("selective_scan", tw.scan.selective_scan, scan_inputs),
    ("selective_scan, packed", tw.scan.selective_scan, packed_scan_inputs),
    ("causal_conv1d", tw.scan.causal_conv1d, conv_inputs),
    ("gated_rms_norm", tw.scan.gated_rms_norm, norm_inputs),
    ("mamba_inner", tw.scan.mamba_inner, inner_inputs),
    ("ssd_chunk_scan", tw.scan.ssd_chunk_scan, ssd_inputs),
    ("mamba_split_conv1d_scan_combined", tw.scan.mamba_split_conv1d_scan_combined, split_inputs),
    ("block_sparse_attention", tw.attention.block_sparse_attention, masked_inputs),
    ("permuted", tw.attention.permuted_block_sparse_attention, permuted_inputs),
    ("mean_pool_top_p", estimate.mean_pool_top_p, partial(estimator_inputs, threshold=0.5, scale=1.0)),
    ("max_pool_top_k", estimate.max_pool_top_k, partial(estimator_inputs, count=1)),
    ("antidiagonal", estimate.antidiagonal, partial(estimator_inputs, threshold=0.5, stride=8, scale=1.0)),
    ("top_k", estimate.top_k, partial(estimator_inputs, count=1)),
    ("kept_mass", estimate.kept_mass, kept_mass_inputs),
    ("causal", BlockMask.causal, lambda: {"q_len": 40, "kv_len": 50, "block_size": 16}),
    (
        "sliding_window",
        BlockMask.sliding_window,
        lambda: {"seq_len": 40, "window": 8, "sink": 1, "block_size": 16},
    ),
    ("document", BlockMask.document, lambda: {"cu_seqlens": torch.tensor([0, 10, 40]), "block_size": 16}),
    ("quantize_blockwise", tw.optim.quantize_blockwise, quantize_inputs),
    ("dequantize_blockwise", tw.optim.dequantize_blockwise, dequantize_inputs),
    ("mask", tw.prune.mask, mask_inputs),
    ("scores", tw.prune.scores, lambda: {"weight": rand(8, 8), "criterion": "random", "seed": 1}),
    (
        "sparsegpt",
        tw.prune.sparsegpt,
        lambda: {"weight": rand(8, 8), "hessian": torch.eye(8), "pattern": "2:4"},
    ),
    ("BlockSparseLinear", BLOCK_SPARSE.forward, lambda: {"x": rand(2, 32)}),
    ("SemiStructuredLinear", SEMI_STRUCTURED.forward, lambda: {"x": rand(2, 32)}),
    ("ActivationSparseLinear", ACTIVATION_SPARSE.forward, lambda: {"x": rand(2, 32)}),
]
STEPS: list[tuple[str, Callable[..., Any], Callable[[], dict[str, Any]]]] = [
    ("selective_state_update", tw.scan.selective_state_update, update_inputs),
    ("causal_conv1d_update", tw.scan.causal_conv1d_update, conv_update_inputs),
    ("mamba_step", tw.scan.mamba_step, step_inputs),
]


def wrong_tensors(value: Tensor) -> Iterator[Any]:
    """What is not that tensor, though some of it may pass."""
    yield from (value.tolist(), "x", None, value.to("meta"), value.to_sparse(), value[None], value[..., None])
    yield value.reshape(-1)
    for dtype in (torch.int32, torch.int64, torch.bool, torch.complex64, torch.float64, torch.bfloat16):
        yield value.to(dtype)
    for axis in range(value.dim()):
        yield torch.cat([value, value.narrow(axis, 0, 1)], axis)
        yield value.narrow(axis, 0, 0)


def wrong_values(value: Any) -> Iterator[Any]:
    if isinstance(value, Tensor):
        return wrong_tensors(value)
    return iter((-1, 0, 1.5, float("nan"), "x", None, (1, "x"), torch.ones(2), object()))


def problem(error: Exception, arguments: list[str]) -> str:
    """What is wrong with an answer, if something is."""
    if not isinstance(error, REFUSALS):
        return "is no refusal"
    frames = traceback.extract_tb(error.__traceback__)
    if not frames[-1].filename.startswith(PACKAGE):
        return f"comes from {frames[-1].filename}"
    named = "|".join(map(re.escape, arguments))
    if not re.match(rf"({named})\b.* (must|has|is|are|needs|go|do) ", str(error)):
        return "does not begin with an argument"
    return "comes from a call that torch refused" if "\n" in str(error) else ""


def answers(
    function: Callable[..., Any], make: Callable[[], dict[str, Any]]
) -> Iterator[tuple[str, Exception]]:
    """What the function says to each argument wrong in each way."""
    function(**make())
    for name, value in make().items():
        for wrong in wrong_values(value):
            try:
                function(**(make() | {name: wrong}))
            except Exception as error:
                yield f"{name}={str(wrong)[:40]}", error


@pytest.fixture
def extension_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns a refusal of the compiled extension into another error."""

    class Sound:
        def __getattr__(self, name: str) -> Any:
            found = getattr(original, name)
            if not callable(found):
                return found

            def call(*arguments: Any) -> Any:
                try:
                    return found(*arguments)
                except REFUSALS as error:
                    raise AssertionError(f"the extension refused: {error}") from error

            return call

    original, watched = _backend.C, Sound()
    monkeypatch.setattr(_backend, "C", watched)
    monkeypatch.setattr(_backend, "_C", watched)  # not emulated


@pytest.mark.usefixtures("extension_is_sound")
@pytest.mark.parametrize(("function", "make"), [op[1:] for op in OPS], ids=[op[0] for op in OPS])
def test_python_refuses_in_its_words(
    function: Callable[..., Any], make: Callable[[], dict[str, Any]]
) -> None:
    assert_good_answers(function, make)


@pytest.mark.parametrize(("function", "make"), [op[1:] for op in STEPS], ids=[op[0] for op in STEPS])
def test_decode_steps_refuse_in_the_same_words(
    function: Callable[..., Any], make: Callable[[], dict[str, Any]]
) -> None:
    assert_good_answers(function, make)


def assert_good_answers(function: Callable[..., Any], make: Callable[[], dict[str, Any]]) -> None:
    arguments = list(inspect.signature(function).parameters)
    count, bad = 0, []
    for given, error in answers(function, make):
        count += 1
        what = problem(error, arguments)
        if what:
            bad.append(f"{given}: {what}: {type(error).__name__}: {str(error)[:200]}")
    assert count > 4
    assert not bad, "\n".join(bad)
