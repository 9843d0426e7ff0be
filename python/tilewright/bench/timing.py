"""How a case is timed: warm-up, then rounds in which every contender has its turn, then medians.

Contenders alternate because a machine's speed drifts; the order rotates because each leaves the caches to the
next. A slow contender sits out some of the rounds, evenly, so that it costs no more than its share.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Timing:
    """Seconds per call. `wall` includes launching and waiting; `device` is by CUDA events (None on a CPU)."""

    wall: list[float]
    device: list[float] | None

    @property
    def samples(self) -> list[float]:
        """The samples a ratio is built from: device time where there is one."""
        return self.wall if self.device is None else self.device


def summary(samples: list[float]) -> dict[str, float]:
    """Median and quartiles, in milliseconds."""
    if len(samples) == 1:
        quartiles = [samples[0]] * 3
    else:
        quartiles = statistics.quantiles(samples, n=4, method="inclusive")
    names = ("q1_ms", "median_ms", "q3_ms")
    return {name: value * 1e3 for name, value in zip(names, quartiles, strict=True)}


def measure(
    calls: dict[str, Callable[[], object]],
    device: torch.device,
    *,
    inner: int = 1,
    budget: float = 2.0,
    minimum: int = 5,
    maximum: int = 51,
    on_round: Callable[[float], None] = lambda fraction: None,
) -> dict[str, Timing]:
    """Times every call in `calls`, alternating.

    Args:
        calls: contender name to a function of no arguments.
        device: where the work happens; decides how it is timed.
        inner: calls per sample.
        budget: seconds each contender may take; with its warm-up time it decides its number of samples.
        minimum: samples a contender gets however slow it is.
        maximum: samples a contender gets however fast it is.
        on_round: told the finished fraction of the rounds.
    """
    sampler = _CudaSampler(device) if device.type == "cuda" else _CpuSampler()
    wanted = {}
    for name, call in calls.items():
        first = sampler.sample(call, inner)[0] * inner
        if first < budget:  # else it is so slow that another warm-up would only cost time
            first = sampler.sample(call, inner)[0] * inner
        wanted[name] = max(minimum, min(maximum, int(budget / max(first, 1e-9))))
    rounds = max(wanted.values(), default=0)
    found: dict[str, list[tuple[float, float | None]]] = {name: [] for name in calls}
    names = list(calls)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in range(rounds):
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                if len(found[name]) * rounds <= index * wanted[name]:
                    found[name].append(sampler.sample(calls[name], inner))
            on_round((index + 1) / rounds)
    finally:
        if collecting:
            gc.enable()
    return {name: _timing(samples) for name, samples in found.items()}


def copy_call(device: torch.device) -> tuple[Callable[[], object], int]:
    """torch's own copy of a buffer larger than every cache, and the bytes it reads and writes."""
    size = 2**31 if device.type == "cuda" else 2**27
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * size


def _timing(samples: list[tuple[float, float | None]]) -> Timing:
    on_device = [device for _, device in samples if device is not None]
    return Timing([wall for wall, _ in samples], on_device or None)


class _CpuSampler:
    def sample(self, call: Callable[[], object], inner: int) -> tuple[float, float | None]:
        start = time.perf_counter()
        for _ in range(inner):
            call()
        return (time.perf_counter() - start) / inner, None


class _CudaSampler:
    """Once by events with a cold L2 cache, once by wall clock around a call that finds the device idle."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def sample(self, call: Callable[[], object], inner: int) -> tuple[float, float | None]:
        return self._wall(call, inner), self._events(call, inner)

    def _wall(self, call: Callable[[], object], inner: int) -> float:
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        for _ in range(inner):
            call()
        torch.cuda.synchronize(self._device)
        return (time.perf_counter() - start) / inner

    def _events(self, call: Callable[[], object], inner: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._flush.zero_()
        begin.record()
        for _ in range(inner):
            call()
        end.record()
        torch.cuda.synchronize(self._device)
        return float(begin.elapsed_time(end)) / 1e3 / inner
