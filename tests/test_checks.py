"""tilewright._checks, and that each family answers to a wrong word with the nearest right one."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import tilewright as tw
from tilewright import _checks
from tilewright.attention import BlockMask, BlockSparse

X = torch.ones(2, 8, 16)
MODEL = torch.nn.Sequential(torch.nn.Linear(16, 16))


@pytest.mark.parametrize(
    ("call", "ending"),
    [
        (lambda: BlockSparse(BlockMask.causal, decode="spars"), "got 'spars': did you mean 'sparse'?"),
        (
            lambda: BlockSparse(BlockMask.sliding_window, widow=3),
            "causal, kv_len, block_size, device: did you mean 'window'?",
        ),
        (
            lambda: tw.optim.AdamW8bit(MODEL.parameters(), param_precision="Stochastic"),
            "param_precision must be 'nearest' or 'stochastic', got 'Stochastic': did you mean 'stochastic'?",
        ),
        (
            lambda: tw.optim.GlobalOptimManager.get_instance().override_config(MODEL[0].weight, "beta", 1),
            "weight_decay, min_8bit_size: did you mean 'betas'?",
        ),
        (
            lambda: tw.prune.mask(X[0], "element", 0.5, "magnitud"),
            "got 'magnitud': did you mean 'magnitude'?",
        ),
        (lambda: tw.prune.mask(X[0], "colum", 0.5), "got 'colum': did you mean 'column'?"),
        (lambda: tw.prune.prune(MODEL, "row", 0.5, allocation="edk"), ": did you mean 'erk'?"),
        (lambda: tw.prune.shrink(MODEL, X, 0.5, "taylr"), "got 'taylr': did you mean 'taylor'?"),
        (
            lambda: tw.scan.causal_conv1d(X, torch.ones(8, 4), activation="silo"),
            "activation must be 'silu', 'swish' or None, got 'silo': did you mean 'silu'?",
        ),
        (
            lambda: tw.nn.ActivationSparseLinear(8, 8, method="tael"),
            "method must be 'wina' or 'teal', got 'tael': did you mean 'teal'?",
        ),
        (lambda: tw.swap(MODEL, atention=None), "include, dry_run, verify: did you mean 'attention'?"),
        (lambda: tw.swap(MODEL, include="lm_haed"), "matches no layer of the model; there are 0"),
        (lambda: tw.swap(MODEL, include="00"), "there are 0: did you mean '0'?"),
        (lambda: tw.prune.prune(MODEL, "row", 0.5, exlude="0"), ": did you mean 'exclude'?"),
        (lambda: tw.prune.mask(X[0], "row", sparsty=0.5), ": did you mean 'sparsity'?"),
        (lambda: tw.prune.compress(MODEL, X, token=1), ": did you mean 'tokens'?"),
        (lambda: tw.prune.compress(MODEL, X, exclude="00"), ": did you mean '0'?"),
        (lambda: tw.prune.shrink(MODEL, X, 0.5, includes="0"), ": did you mean 'include'?"),
        (lambda: tw.prune.shrink(MODEL, X, {"00": 0.5}), ": did you mean '0'?"),
        (lambda: tw.prune.repair(MODEL, X, stepps=1), ": did you mean 'steps'?"),
        (lambda: tw.prune.Cubic(3, evry=2), "steps, start, begin, every: did you mean 'every'?"),
        (lambda: tw.optim.AdamW8bit(MODEL.parameters(), wieght_decay=0), "did you mean 'weight_decay'?"),
        (lambda: tw.nn.Mamba(16, dstate=4), "did you mean 'd_state'?"),
    ],
)
def test_each_family_names_the_nearest(call: Callable[[], Any], ending: str) -> None:
    with pytest.raises((TypeError, ValueError)) as raised:
        call()
    assert str(raised.value).endswith(ending)


@pytest.mark.parametrize("value", ["magnitude", "nothing like it", 3, True, torch.ones(2), ["a"]])
def test_what_is_near_nothing_gets_no_guess(value: object) -> None:
    with pytest.raises(ValueError, match="by must be 'a' or None, got ") as raised:
        _checks.check_choice("by", value, ("a", None))
    assert "did you mean" not in str(raised.value)


def test_the_nearest_keyword_leaves_signatures_and_calls_as_they_are() -> None:
    assert list(inspect.signature(tw.swap).parameters)[:2] == ["model", "attention"]
    assert list(inspect.signature(tw.optim.AdamW8bit).parameters)[:2] == ["params", "lr"]
    with pytest.raises(TypeError, match=r"^AdamW8bit has no argument 'betta'; it has params, lr, "):
        tw.optim.AdamW8bit(MODEL.parameters(), betta=1)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'model'"):
        tw.swap()


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1)", [0, 0.5, math.nextafter(1, 0)], [-1, 1, math.nan, math.inf]),
        ("(0, 1]", [1e-9, 1], [0, 1.1, math.nan]),
        ("(0, inf)", [5e-324, 1e300], [0, math.inf, -1.0]),
        ("(0, inf]", [2, math.inf], [0.0, math.nan]),
    ],
)
def test_intervals(interval: str, inside: list[float], outside: list[float]) -> None:
    for value in inside:
        assert _checks.check_number("p", value, interval) == value
    for value in outside:
        with pytest.raises(ValueError, match="p must be a number in ") as raised:
            _checks.check_number("p", value, interval)
        assert str(raised.value) == f"p must be a number in {interval}, got {value!r}"


@pytest.mark.parametrize("value", [True, "1", None, 1j, [1.0]])
def test_what_is_no_number(value: object) -> None:
    with pytest.raises(TypeError, match=r"p must be a number in \[0, 2\], got "):
        _checks.check_number("p", value, "[0, 2]")


@pytest.mark.parametrize(
    ("value", "highest", "lowest", "error", "allowed"),
    [
        (0, None, 1, ValueError, "a positive int"),
        (1.0, None, 1, TypeError, "a positive int"),
        (True, None, 1, TypeError, "a positive int"),
        (-1, None, 0, ValueError, "an int of at least 0"),
        (9, 8, 1, ValueError, "an int from 1 to 8"),
        ("9", 8, 0, TypeError, "an int from 0 to 8"),
    ],
)
def test_counts(value: Any, highest: int | None, lowest: int, error: type[Exception], allowed: str) -> None:
    with pytest.raises(error, match=f"n must be {allowed}, got {value!r}"):
        _checks.check_count("n", value, highest, lowest=lowest)


class Subclass(torch.Tensor):
    """A tensor that is refused as any other."""


def test_memory_is_shared_or_not() -> None:
    room = torch.zeros(10)
    for value, given in (
        (room[:6], room[5:]),
        (room[::2], room[1::2]),
        (room, room[3].as_subclass(Subclass)),
    ):
        with pytest.raises(ValueError, match="out must not share memory with b"):
            _checks.check_apart("out", value, a=None, b=given)
        with pytest.raises(ValueError, match="out must not share memory with b"):
            _checks.check_apart("out", given, b=value)
    with FakeTensorMode() as mode:
        fakes = mode.from_tensor(room), mode.from_tensor(room)
    for value, given in (
        (room[:5], room[5:]),
        (room[5:5], room),
        (room.to("meta"), room.to("meta")),
        (room, room.to("meta")),
        fakes,
    ):
        _checks.check_apart("out", value, b=given)
