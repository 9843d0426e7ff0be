"""Which memory a captured step uses. (What a graph does with it, only a GPU can show: test_cuda.py.)"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from optim_cases import OPTIMIZERS, assert_same_bits, parameters, run, set_grads, snapshot

import tilewright as tw
from tilewright.optim import optimizer as implementation
from tilewright.testing import emulated

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _emulated() -> Iterator[None]:
    with emulated():
        yield


@contextmanager
def capturing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(implementation, "_is_capturing", lambda device: True)
        yield


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_captured_step_has_memory_of_its_own(monkeypatch, name: str) -> None:
    params, plain = (parameters([300, 4097, 10], torch.float32, CPU) for _ in range(2))
    optimizer, eager = OPTIMIZERS[name](params), OPTIMIZERS[name](plain)
    run(optimizer, 1)
    shared = optimizer._workspaces[CPU]
    rows = shared.clone()
    for step in (1, 2):
        set_grads(params, step)
        params[step].grad = None
        with capturing(monkeypatch):
            optimizer.step()
    first, second = optimizer._captured
    assert len({t.data_ptr() for t in (shared, first, second)}) == 3
    assert torch.equal(shared, rows), "a captured step leaves the others' memory alone"
    kept = [first.clone(), second.clone()]
    set_grads(params, 3)
    optimizer.step()
    assert_same_bits([first, second], kept)
    assert optimizer._workspaces[CPU] is shared
    run(eager, 1)
    for step in (1, 2, 3):
        set_grads(plain, step)
        if step < 3:
            plain[step].grad = None
        eager.step()
    assert_same_bits(snapshot(optimizer), snapshot(eager))


def test_a_captured_step_may_be_the_first_one_launched(monkeypatch) -> None:
    params = parameters([5000], torch.float32, CPU)
    trained = tw.optim.AdamW8bit(parameters([5000], torch.float32, CPU))
    run(trained, 1)
    optimizer = tw.optim.AdamW8bit(params)
    optimizer.load_state_dict(trained.state_dict())
    set_grads(params, 1)
    with capturing(monkeypatch):
        optimizer.step()
    assert int(optimizer.state[params[0]]["step"]) == 2
    assert CPU not in optimizer._workspaces


def test_states_made_by_a_graph_are_refused_before_anything_changes(monkeypatch) -> None:
    params = parameters([5000], torch.float32, CPU)
    optimizer = tw.optim.AdamW8bit(params)
    set_grads(params, 0)
    before = snapshot(optimizer)
    with capturing(monkeypatch), pytest.raises(RuntimeError, match="take one step before the capture"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)
    assert len(optimizer.state) == 0


def test_captured_memory_outlives_what_is_only_a_cache(monkeypatch) -> None:
    params = parameters([5000], torch.float32, CPU)
    optimizer = tw.optim.AdamW8bit(params)
    run(optimizer, 1)
    set_grads(params, 1)
    with capturing(monkeypatch):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(optimizer._captured) == 1
