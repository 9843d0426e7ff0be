"""`tilewright bench`: runs the cases, shows progress, keeps the results on disk as they come."""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tilewright import _families, _info

from . import environment, report
from .case import OURS, Case, Contender, Unavailable
from .timing import Timing, copy_call, measure, summary

SCHEMA = 1
_COPY = "copy"


@dataclass(frozen=True)
class Setting:
    """Where and how thoroughly the cases run, and beside which peers (None: all)."""

    device: torch.device
    quick: bool = False
    peers: tuple[str, ...] | None = None


def run(
    families: Sequence[str],
    device: str | None = None,
    quick: bool = False,
    peers: list[str] | None = None,
    only: list[str] | None = None,
    threads: int | None = None,
    list_only: bool = False,
    out: Path = Path("bench-out"),
) -> int:
    """Runs the families' cases; writes `<family>-<device>.json` and `.png` into `out` for each.

    Args:
        families: names of modules here that have `PEERS` and `cases`.
        device: "cpu", "cuda", or None for CUDA where it works.
        quick: smaller tensors and fewer samples.
        peers: contenders to keep besides ours (None: all; `["none"]`: ours alone).
        only: keep cases whose name contains one of these.
        threads: CPU threads for torch and for us.
        list_only: print the cases and return.
        out: folder for the results, made if missing.

    Returns:
        0, or 1 if something of ours failed or the run was interrupted.
    """
    console = Console()
    modules = {family: _families.load("bench", family) for family in families}
    known = dict.fromkeys(peer for module in modules.values() for peer in module.PEERS)
    setting = Setting(_device(device), quick, _known_peers(peers, tuple(known)))
    if threads is not None:
        torch.set_num_threads(threads)
    cases = {family: module.cases(setting.device, quick) for family, module in modules.items()}
    chosen = select(cases, only)
    if list_only:
        for case in (case for found in chosen.values() for case in found):
            console.print(f"{case.name:<36}{case.title}", highlight=False, soft_wrap=True)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    failed = False
    for family, found in chosen.items():
        record = {"schema": SCHEMA, "family": family, "quick": quick, "complete": False, "cases": []}
        record.update(environment.describe(setting.device, modules[family].PEERS))
        _run_family(found, setting, record, out / f"{family}-{setting.device.type}.json", console)
        failed |= not record["complete"] or _ours_failed(record)
        if not record["complete"]:
            break
    return int(failed)


def run_case(
    case: Case, setting: Setting, on_round: Callable[[float], None] = lambda fraction: None
) -> dict[str, Any]:
    """Times one case; the record holds a row per contender, ours first, failed ones with the reason.

    A plain copy takes its turn among the contenders of a case that moves memory: it is the yardstick of
    `roofline`, and on a shared machine that yardstick changes from minute to minute.
    """
    contenders = [c for c in case.contenders if _wanted(c, setting.peers)]
    calls, status = _set_up(contenders)
    copied_bytes = 0
    if calls and contenders[0].bytes:
        calls[_COPY], copied_bytes = copy_call(setting.device)
    budget, minimum = (0.6, 2) if setting.quick else (6.0, 5)
    timings = measure(
        calls, setting.device, inner=case.calls, budget=budget, minimum=minimum, on_round=on_round
    )
    copy_time = summary(timings[_COPY].samples)["median_ms"] if _COPY in timings else None
    copied = copied_bytes / copy_time / 1e6 if copy_time else None
    rows = {
        c.name: _row(c, timings[c.name], copied) if c.name in timings else {"status": status[c.name]}
        for c in contenders
    }
    _add_ratios(rows)
    facts = {"name": case.name, "title": case.title, "sizes": case.sizes, "flops": case.flops}
    return {**facts, "copy_gb_per_s": copied and round(copied, 2), "contenders": rows}


def select(cases: dict[str, list[Case]], only: list[str] | None) -> dict[str, list[Case]]:
    """The cases whose name contains one of `only`, and the families that have such.

    Raises:
        ValueError: if there is none.
    """
    chosen = {
        family: [case for case in found if only is None or any(part in case.name for part in only)]
        for family, found in cases.items()
    }
    if not any(chosen.values()):
        names = ", ".join(case.name for found in cases.values() for case in found)
        raise ValueError(f"no case matches {', '.join(only or [])}; there are: {names}")
    return {family: found for family, found in chosen.items() if found}


def _run_family(
    cases: list[Case], setting: Setting, record: dict[str, Any], path: Path, console: Console
) -> None:
    try:
        _run_cases(cases, setting, record, path, console)
        record["complete"] = True
    except KeyboardInterrupt:
        console.print("interrupted: these are the cases that were finished")
    _write(path, record)
    report.print_table(record, console)
    picture = report.plot(record, path.with_suffix(".png"))
    console.print(f"results  {path}\n{picture}", highlight=False, soft_wrap=True)


def _run_cases(
    cases: list[Case], setting: Setting, record: dict[str, Any], path: Path, console: Console
) -> None:
    bar = (BarColumn(bar_width=30), TextColumn("{task.percentage:>3.0f}%"))
    columns = (*bar, TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cases))

        def on_round(fraction: float) -> None:
            progress.update(task, completed=len(record["cases"]) + fraction)

        while cases:
            progress.update(task, description=cases[0].title)
            record["cases"].append(run_case(cases[0], setting, on_round))
            _write(path, record)
            # A case owns the tensors its contenders share: they go before the next one allocates its own.
            del cases[0]
            gc.collect()
            if setting.device.type == "cuda":
                torch.cuda.empty_cache()


def _ours_failed(record: dict[str, Any]) -> bool:
    rows = (pair for case in record["cases"] for pair in case["contenders"].items())
    return any(name.startswith(OURS) and row["status"] != "ok" for name, row in rows)


def _set_up(contenders: list[Contender]) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    calls, status = {}, {}
    for contender in contenders:
        try:
            with warnings.catch_warnings():
                if not contender.name.startswith(OURS):
                    warnings.simplefilter("ignore")
                call = contender.setup()
                call()
            calls[contender.name], status[contender.name] = call, "ok"
        except Unavailable as reason:
            status[contender.name] = f"not available: {reason}"
        except Exception as error:
            status[contender.name] = f"failed: {type(error).__name__}: {error}"
    return calls, status


def _row(contender: Contender, timing: Timing, copy_gb_per_s: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "status": "ok",
        "samples": len(timing.samples),
        **_rounded(summary(timing.samples)),
    }
    if timing.device is not None:
        row["wall_median_ms"] = _rounded(summary(timing.wall))["median_ms"]
    if contender.bytes is not None and copy_gb_per_s is not None:
        row["bytes"] = round(contender.bytes)
        row["gb_per_s"] = round(contender.bytes / row["median_ms"] / 1e6, 2)
        row["roofline"] = round(row["gb_per_s"] / copy_gb_per_s, 4)
    return row


def _add_ratios(rows: dict[str, dict[str, Any]]) -> None:
    ours = rows.get(OURS, {"status": "absent"})
    for row in rows.values():
        if ours["status"] == row["status"] == "ok":
            row["ours_over_this"] = float(f"{ours['median_ms'] / row['median_ms']:.4g}")


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.5g}") for name, value in values.items()}


def _wanted(contender: Contender, peers: tuple[str, ...] | None) -> bool:
    return peers is None or contender.name.startswith(OURS) or contender.name.partition(",")[0] in peers


def _known_peers(peers: list[str] | None, known: tuple[str, ...]) -> tuple[str, ...] | None:
    if peers is None:
        return None
    unknown = set(peers) - set(known) - {"none", OURS}
    if unknown:
        raise ValueError(f"unknown peer {', '.join(sorted(unknown))}; there are: {', '.join(known)}, none")
    return tuple(peers)


def _device(name: str | None) -> torch.device:
    if name == "cpu":
        return torch.device("cpu")
    facts = _info.info()
    usable = facts["verdict"]["cuda"].startswith("ok")
    if name == "cuda" and not usable:
        raise ValueError(f"--device cuda: {facts['verdict']['cuda']}")
    return torch.device("cuda", torch.cuda.current_device()) if usable else torch.device("cpu")


def _write(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
