"""What the selective scan's tests share: inputs of all kinds, and the comparison with the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from reference import selective_scan as reference
from tilewright.scan import selective_scan

Inputs = dict[str, Any]
HALF = (torch.float16, torch.bfloat16)
DIFFERENTIABLE = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def problem(
    batch: int = 2,
    dim: int = 5,
    length: int = 65,
    states: int = 3,
    *,
    dtype: torch.dtype = torch.float32,
    complex_A: bool = False,
    B: int | None = 1,
    C: int | None = 1,
    optional: Sequence[str] = (),
    cu_seqlens: Sequence[int] | None = None,
    order: str | None = None,
    seed: int = 0,
    **options: bool,
) -> Inputs:
    """Keyword arguments of selective_scan.

    `B` and `C` say how many groups each has: None is constant, 0 is (batch, states, length). `optional` names
    those of D, z, delta_bias and initial_state to give, or is ("all",); `order` is "shared" or "batched".
    """
    g = torch.Generator().manual_seed(seed)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    weight = real.to_complex() if complex_A else real

    def normal(*shape: int, dtype: torch.dtype = real) -> Tensor:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(shape, generator=g, dtype=wide).to(dtype)

    def projection(groups: int | None) -> Tensor:
        if groups is None:
            return normal(dim, states, dtype=weight)
        numbers = 2 * length if complex_A else length
        middle = (groups,) if groups else ()
        return normal(batch, *middle, states, numbers, dtype=dtype)

    softplus = options.get("delta_softplus", False)
    A = -torch.rand((dim, states), generator=g, dtype=torch.float64).mul(2).exp().to(real)
    inputs: Inputs = {
        "u": normal(batch, dim, length, dtype=dtype),
        "delta": normal(batch, dim, length, dtype=dtype) - 1
        if softplus
        else (torch.rand((batch, dim, length), generator=g, dtype=torch.float64) * 0.5).to(dtype),
        "A": torch.complex(A, normal(dim, states)) if complex_A else A,
        "B": projection(B),
        "C": projection(C),
    }
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    given = ("D", "z", "delta_bias", "initial_state") if "all" in optional else optional
    extras: dict[str, Callable[[], Tensor]] = {
        "D": lambda: normal(dim),
        "z": lambda: normal(batch, dim, length, dtype=dtype),
        "delta_bias": lambda: torch.rand(dim, generator=g).to(real) * 0.1,
        "initial_state": lambda: normal(sequences, dim, states, dtype=weight),
    }
    inputs |= {name: extras[name]() for name in given}
    if cu_seqlens is not None:
        inputs["cu_seqlens"] = torch.tensor(cu_seqlens)
    if order is not None:
        rows = [torch.randperm(length, generator=g) for _ in range(batch if order == "batched" else 1)]
        inputs["order"] = torch.stack(rows) if order == "batched" else rows[0]
    return inputs | options


def moved(inputs: Inputs, device: torch.device) -> Inputs:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def wide(inputs: Inputs) -> Inputs:
    """The same numbers in float64 and complex128."""
    kinds = {True: torch.complex128, False: torch.float64}
    return {
        k: v.to(kinds[v.is_complex()]) if isinstance(v, Tensor) and k in DIFFERENTIABLE else v
        for k, v in inputs.items()
    }


def results(
    run: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs, gradients: bool = True
) -> dict[str, Tensor]:
    """out, last_state and, of a sum of both with random weights, all gradients, on the CPU."""
    inputs = dict(inputs)
    leaves = {}
    if gradients:
        for name in DIFFERENTIABLE:
            if name in inputs:
                leaves[name] = inputs[name] = inputs[name].detach().requires_grad_()
    out, last_state = run(**inputs)
    found = {"out": out, "last_state": last_state}
    if gradients:
        backward(out, last_state)
        for name, leaf in leaves.items():
            found[f"d{name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return {name: value.detach().cpu() for name, value in found.items()}


def backward(out: Tensor, last_state: Tensor) -> None:
    """From the same random weights for each element, whatever the dtypes."""
    g = torch.Generator().manual_seed(1)
    kinds = {True: torch.complex128, False: torch.float64}
    outputs = (out, last_state)
    weights = [torch.randn(t.shape, generator=g, dtype=kinds[t.is_complex()]).to(t) for t in outputs]
    # The reference's last state of no tokens needs no gradient.
    needed = [(t, weight) for t, weight in zip(outputs, weights, strict=True) if t.requires_grad]
    torch.autograd.backward(*zip(*needed, strict=True))


def ours(**inputs: Any) -> tuple[Tensor, Tensor]:
    return selective_scan(return_last_state=True, **inputs)


def assert_error_rule(name: str, actual: Tensor, exact: Tensor, plain: Tensor) -> None:
    """At most twice plain PyTorch's error and a few roundings of terms, of the size of 1 or more."""
    assert actual.shape == exact.shape, name
    assert actual.dtype == plain.dtype, name
    if actual.numel() == 0:
        return
    error, allowed = (actual - exact).abs().max(), (plain - exact).abs().max()
    roundings = {2: 0.5, 4: 8, 8: 200}[torch.finfo(actual.dtype).bits // 8]
    unit = torch.finfo(actual.dtype).eps * exact.abs().max().clamp(min=1)
    assert error <= 2 * allowed + roundings * unit, (
        f"{name}: off by {error:.3e}, plain PyTorch by {allowed:.3e}, one unit is {unit:.3e}"
    )


@functools.cache
def expected(**case: Any) -> tuple[Inputs, dict[str, Tensor], dict[str, Tensor]]:
    """The inputs of a case, the exact results, and those of plain PyTorch in the inputs' precision."""
    inputs = problem(**case)
    return inputs, *references(inputs)


def references(inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return results(reference.selective_scan, wide(inputs)), results(reference.selective_scan, inputs)


def assert_results(actual: dict[str, Tensor], exact: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        assert_error_rule(name, value, exact[name], plain[name])


def check(device: torch.device, **case: Any) -> None:
    """Holds output, last states and all gradients of a case against the reference."""
    inputs, exact, plain = expected(**case)
    assert_results(results(ours, moved(inputs, device)), exact, plain)


def check_inputs(device: torch.device, inputs: Inputs) -> None:
    """As `check`, with inputs of one's own."""
    assert_results(results(ours, moved(inputs, device)), *references(inputs))
