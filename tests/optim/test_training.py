"""Whole training runs: convergence, long runs, data parallelism, transformers' Trainer."""

import copy
import dataclasses
import math
import os
from pathlib import Path

import pytest
import torch
from optim_cases import CASES, OPTIMIZERS, assert_same_bits, make, snapshot
from torch import Tensor

import tilewright as tw
from ranks import run_ranks
from reference import optim as reference


@pytest.fixture(autouse=True)
def _one_thread():
    """These models are too small for more, and waiting for a busy second core takes longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(optimizer_of, steps: int = 150, dtype: torch.dtype = torch.float32, seed: int = 0) -> float:
    """The loss at which a small network fits a fixed nonlinear function."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 128),
        torch.nn.GELU(),
        torch.nn.Linear(128, 128),
        torch.nn.GELU(),
        torch.nn.Linear(128, 8),
    ).to(dtype)
    teacher = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8))
    optimizer = optimizer_of(model.parameters())
    losses = []
    for _ in range(steps):
        x = torch.randn(128, 16)
        loss = (model(x.to(dtype)).float() - teacher(x).detach()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


PAIRS = {
    "AdamW8bit": (
        lambda p: tw.optim.AdamW8bit(p, lr=3e-3, min_8bit_size=0),
        lambda p: torch.optim.AdamW(p, lr=3e-3),
    ),
    "Adam8bit": (
        lambda p: tw.optim.Adam8bit(p, lr=3e-3, weight_decay=1e-4, min_8bit_size=0),
        lambda p: torch.optim.Adam(p, lr=3e-3, weight_decay=1e-4),
    ),
    "SGD8bit": (
        lambda p: tw.optim.SGD8bit(p, lr=0.1, momentum=0.9, nesterov=True, min_8bit_size=0),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    ),
    "Lion8bit": (
        lambda p: tw.optim.Lion8bit(p, lr=5e-4, min_8bit_size=0),
        lambda p: tw.optim.Lion(p, lr=5e-4),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_8_bits_train_as_well_as_32(name: str) -> None:
    eight, thirty_two = (sum(train(make, seed=seed) for seed in range(3)) / 3 for make in PAIRS[name])
    assert eight <= 1.1 * thirty_two


def test_bf16_with_stochastic_rounding_trains_better_than_without() -> None:
    def loss(precision: str) -> float:
        def make(p):
            return tw.optim.AdamW8bit(p, lr=3e-4, param_precision=precision, min_8bit_size=0)

        torch.manual_seed(1)
        return train(make, 300, torch.bfloat16)

    assert loss("stochastic") < loss("nearest")


def noisy_descent(step) -> tuple[Tensor, float]:
    """A thousand steps toward a minimum with noisy gradients: the end, and the mean distance near it."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(4096, generator=generator)
    p = target + torch.randn(4096, generator=generator)
    total = 0.0
    for t in range(1, 1001):
        p = step(t, p, (p - target).float() + 0.3 * torch.randn(4096, generator=generator))
        total += float((p - target).square().mean()) / 100 if t > 900 else 0.0
    return p.double(), math.sqrt(total)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "lion", "sgd_nesterov"])
def test_a_thousand_steps_do_not_drift(name: str) -> None:
    """From the same arithmetic in float64, with the same quantization of states after every step."""
    o = dataclasses.replace(CASES[name], lr=3e-3)
    p = torch.nn.Parameter(torch.zeros(4096))
    optimizer = make(o, [p])

    def ours(t: int, at: Tensor, grad: Tensor) -> Tensor:
        p.data, p.grad = at.clone(), grad
        optimizer.step()
        return p.detach()

    state = [torch.zeros(4096).double()] * 2

    def exact(t: int, at: Tensor, grad: Tensor) -> Tensor:
        at, *moments = reference.update(o, t, at.double(), grad.double(), *state)
        for i, moment in enumerate(moments):
            code = tw.optim.create_dynamic_map(i == 0)
            codes, absmax = reference.quantize(moment, code, 256)
            if i == 1:
                codes = reference.keep_positive(codes, moment)
            state[i] = reference.dequantize(codes, code, absmax, 256)
        return at

    (end, distance), (exact_end, exact_distance) = noisy_descent(ours), noisy_descent(exact)
    assert distance == pytest.approx(exact_distance, rel=0.02)
    assert abs(float((end - exact_end).mean())) <= 0.02 * exact_distance


# -- data parallelism -------------------------------------------------------------------------------


def _replica(rank: int, folder: Path, name: str) -> None:
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    with pytest.raises(ValueError, match="needs a seed in a distributed run"):
        OPTIMIZERS[name]([torch.nn.Parameter(torch.ones(3))], param_precision="stochastic")
    model, data = _model_and_data(torch.bfloat16)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = OPTIMIZERS[name](parallel.parameters(), lr=1e-2, param_precision="stochastic", seed=3)
    for x in data:
        parallel(x[rank::2]).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save([t.cpu() for t in snapshot(optimizer)], folder / f"{rank}.pt")
    mesh = DeviceMesh("cpu", [0, 1])
    sharded = torch.nn.Parameter(distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)]))
    sharded.grad = distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)])
    with pytest.raises(NotImplementedError, match=r"param 0: .*DTensor"):
        OPTIMIZERS[name]([sharded]).step()


def _model_and_data(dtype: torch.dtype) -> tuple[torch.nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 8)).to(dtype)
    return model, [torch.randn(16, 64).to(dtype) for _ in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdamW8bit", "SGD8bit"])
def test_two_ranks_stay_the_same(tmp_path: Path, name: str) -> None:
    """Replicas must not drift apart, stochastic rounding included; DTensors are refused in words."""
    run_ranks(_replica, tmp_path, tmp_path, name, ranks=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert_same_bits(*ranks)
    model, _ = _model_and_data(torch.bfloat16)
    assert not torch.equal(ranks[0][0], next(model.parameters()))


# -- transformers -----------------------------------------------------------------------------------


class Sums(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = torch.randn(8, generator=torch.Generator().manual_seed(index))
        return {"x": x, "labels": x.sum(0, keepdim=True)}


class Regression(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 600), torch.nn.Tanh(), torch.nn.Linear(600, 1))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.layers(x)
        return {"loss": (out - labels).square().mean(), "logits": out}


def trainer(folder: Path, steps: int, chosen: tuple):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=5,
        per_device_train_batch_size=8,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        lr_scheduler_type="constant",
    )
    return transformers.Trainer(
        Regression(), arguments, train_dataset=Sums(), optimizer_cls_and_kwargs=chosen
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen",
    [
        (tw.optim.AdamW8bit, {"lr": 3e-3}),
        (
            tw.optim.AdamW,
            {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8, "optim_bits": 8, "is_paged": False},
        ),
        (tw.optim.Lion8bit, {"lr": 1e-3}),
    ],
    ids=["AdamW8bit", "AdamW", "Lion8bit"],
)
def test_transformers_trainer(tmp_path: Path, chosen: tuple) -> None:
    """Training, and resuming from the trainer's own checkpoint to the same weights."""
    whole = trainer(tmp_path / "whole", 10, chosen)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert all(math.isfinite(loss) for loss in losses)
    trainer(tmp_path / "parts", 5, chosen).train()
    resumed = trainer(tmp_path / "parts", 10, chosen)
    resumed.train(resume_from_checkpoint=os.fspath(tmp_path / "parts" / "checkpoint-5"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_deepcopied_models_train_apart() -> None:
    model = torch.nn.Linear(70, 70)
    optimizer = tw.optim.AdamW8bit(model.parameters())
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    twin(torch.ones(1, 70)).sum().backward()
    before = model.weight.detach().clone()
    twin_optimizer.step()
    assert torch.equal(model.weight, before)
    assert not torch.equal(twin.weight, before)
