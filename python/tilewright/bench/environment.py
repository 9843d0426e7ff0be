"""On what a result was measured: enough to tell whether two results can be compared."""

from __future__ import annotations

import datetime
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tilewright import __version__, _info


def describe(device: torch.device, peers: Iterable[str] = ()) -> dict[str, Any]:
    """Device, versions (of torch, numpy and the peers), threads, commit and date, as plain data."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": _gpu(device) if device.type == "cuda" else _cpu(),
        "threads": torch.get_num_threads(),
        "versions": {
            "tilewright": __version__,
            **{name: _info.distribution_version(name) for name in ("torch", *peers, "numpy")},
        },
        "python": _info.versions()["python"],
        "commit": commit(),
    }


def commit() -> str | None:
    """The git commit of the source tree this package was imported from, `-dirty` if changed; None if unknown.

    An installed copy lies in no tree of ours, so the caller's working directory is asked next, and believed
    only if it is a tilewright checkout.
    """
    for folder in (Path(__file__).resolve().parent, Path.cwd()):
        root = _git(folder, "rev-parse", "--show-toplevel")
        if root and Path(root, "python", "tilewright", "bench").is_dir():
            # Results are written into the tree while they are being measured: they are no change.
            changed = _git(Path(root), "status", "--porcelain", "--", ".", ":!bench/results")
            head = _git(Path(root), "rev-parse", "--short=12", "HEAD")
            return f"{head}-dirty" if head and changed else head
    return None


def same_conditions(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Differences that make times incomparable, one sentence each."""
    differences = []
    for key in ("device", "threads"):
        if before.get(key) != after.get(key):
            differences.append(f"{key} differs: {_short(before.get(key))} and {_short(after.get(key))}")
    found = [record.get("versions", {}) for record in (before, after)]
    for name in sorted(set().union(*found) - {"tilewright", "numpy"}):
        versions = [each.get(name) for each in found]
        if versions[0] != versions[1]:
            differences.append(f"{name} differs: {versions[0]} and {versions[1]}")
    return differences


def device_name(environment: dict[str, Any]) -> str:
    """One line for a table's title."""
    name = _short(environment["device"])
    if environment["device"]["kind"] != "cpu":
        return name
    threads = environment["threads"]
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def _short(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    if value.get("kind") == "cpu":
        return f"{value.get('name')} ({value.get('cores')} cores, {value.get('level')})"
    return f"{value.get('name')} (driver {value.get('driver')})"


def _cpu() -> dict[str, Any]:
    facts = _info.cpu()
    level = facts["level"] if isinstance(facts["level"], str) else None
    known = {key: facts[key] for key in ("cores", "features")}
    return {"kind": "cpu", "name": facts["model"], "level": level, **known}


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    facts: dict[str, Any] = {
        "kind": "cuda",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
    # CUDA's numbering is not nvidia-smi's: the UUID names the same device to both.
    which = f"GPU-{properties.uuid}"
    answer = _run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", which])
    if answer:
        names = ("driver", "clock_sm", "clock_memory", "clock_sm_max", "clock_memory_max", "power_limit")
        facts.update(zip(names, (part.strip() for part in answer.split(",")), strict=False))
    return facts


def _git(folder: Path, *arguments: str) -> str | None:
    return _run(["git", "-C", str(folder), *arguments])


def _run(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
