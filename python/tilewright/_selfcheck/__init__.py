"""`tilewright info --check`: every op once, on small data, against a few lines of plain torch.

A family's module here has `PROBES`: what is checked, by the name it is reported under.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tilewright import _families, _info

# Returns the error found and the bound it must keep.
Probe = Callable[[torch.device], tuple[float, float]]


@dataclass(frozen=True)
class Check:
    """One op on one device: `detail` holds the error found and the bound, or why it failed to run."""

    name: str
    device: str
    passed: bool
    detail: str
    seconds: float


def probes() -> dict[str, Probe]:
    """All that can be checked here. Raises ImportError where the package cannot be used at all."""
    families = _families.present("_selfcheck")
    return {
        name: probe
        for family in families
        for name, probe in _families.load("_selfcheck", family).PROBES.items()
    }


def run_checks(chosen: dict[str, Probe], devices: list[str]) -> Iterator[Check]:
    """Yields one result per op and device; an op that raises is a failed check, not an exception."""
    for device in devices:
        for name, probe in chosen.items():
            start = time.perf_counter()
            try:
                error, bound = probe(torch.device(device))
                passed, detail = error <= bound, f"error {error:.1e}, allowed {bound:.1e}"
            except Exception as problem:
                passed, detail = False, f"{type(problem).__name__}: {problem}"
            yield Check(name, device, passed, detail, time.perf_counter() - start)


def usable_devices() -> list[str]:
    """The CPU, and the current GPU where both torch and the extension can use one."""
    usable = _info.info()["verdict"]["cuda"].startswith("ok")
    return ["cpu", "cuda"] if usable else ["cpu"]
