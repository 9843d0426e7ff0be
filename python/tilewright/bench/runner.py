"""`tilewright bench`: runs the cases, shows progress, keeps the results on disk as they come."""

from __future__ import annotations

import difflib
import gc
import json
import shlex
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tilewright import _families, _info
from tilewright._results import check_writable, write

from . import chart, environment, page, report
from .case import OURS, Call, Case, Contender, Plan, Unavailable
from .presets import MODELS
from .timing import Timing, copy_call, measure, summary

SCHEMA = 1
INTERRUPTED = 130
_COPY = "copy"
_QUICK_SECONDS = 12.0  # that a quick run spends on measuring; imports and setting up take longer


@dataclass(frozen=True)
class Setting:
    """Where the cases run, beside which peers (None: all), and how thoroughly.

    `budget` is the seconds a contender may take, `minimum` the samples it gets however slow it is.
    """

    device: torch.device
    peers: tuple[str, ...] | None = None
    budget: float = 6.0
    minimum: int = 5


def run(
    families: Sequence[str],
    device: str | None = None,
    quick: bool = False,
    peers: list[str] | None = None,
    only: list[str] | None = None,
    preset: str | None = None,
    threads: int | None = None,
    list_only: bool = False,
    out: Path = Path("bench-out"),
) -> int:
    """Runs the families' cases; writes into `out` a JSON and a PNG a family, and one HTML page.

    Args:
        families: names of modules here that have `PEERS`, `GPU_PEERS` and `cases`.
        device: "cpu", "cuda", or None for CUDA where it works.
        quick: a few small cases of each family, a minute in all.
        peers: contenders to keep besides ours (None: all; `["none"]`: ours alone).
        only: keep cases whose name contains one of these.
        preset: the sizes of a model of `presets.MODELS`; not with quick.
        threads: CPU threads for torch and for us.
        list_only: print the cases and return.
        out: folder for the results, made if missing.

    Returns:
        0, or 1 if something of ours failed, or 130 if the run was interrupted.

    Raises:
        ValueError: an unknown peer, preset or case, or a preset that has nothing for these families.
        OSError: `out` cannot be written to.
    """
    console = Console()
    if quick and preset:
        raise ValueError(f"--quick has small sizes and --preset {preset} its own: give one of them")
    plan = Plan(_device(device), quick, _known_model(preset))
    modules = {family: _families.load("bench", family) for family in families}
    chosen_peers = _known_peers(peers, modules.values())
    if threads is not None:
        torch.set_num_threads(threads)
    chosen = select(_all_cases(modules, plan, preset, console), only)
    if list_only:
        for case in (case for found in chosen.values() for case in found):
            console.print(f"{case.name:<36} {case.title}", highlight=False, soft_wrap=True)
        return 0
    check_writable(out)
    records = []
    for family, found in chosen.items():
        cases, needs_gpu = _for_device(found, plan, modules[family].GPU_PEERS, chosen_peers)
        setting = _setting(plan, chosen_peers, chosen)
        tag = "-".join([*([preset] if preset else []), *(["quick"] if quick else []), plan.device.type])
        record: dict[str, Any] = {
            "schema": SCHEMA,
            "family": family,
            "quick": quick,
            "preset": preset,
            "command": _command(families, plan, peers, only, preset, threads),
            **environment.describe(plan.device, modules[family].PEERS),
            "complete": False,
            "needs_gpu": needs_gpu,
            "cases": [],
        }
        records.append(record)
        _run_family(cases, setting, record, out / f"{family}-{tag}.json", console)
        if not record["complete"]:
            break
    write(out / f"report-{tag}.html", page.html(records).encode())
    console.print(f"report   {out / f'report-{tag}.html'}", highlight=False, soft_wrap=True)
    if not records[-1]["complete"]:
        return INTERRUPTED
    return int(any(map(_ours_failed, records)))


def run_case(
    case: Case, setting: Setting, on_round: Callable[[float], None] = lambda fraction: None
) -> dict[str, Any]:
    """Times one case; the record holds a row per contender, ours first, failed ones with the reason.

    A plain copy takes its turn among the contenders of a case that moves memory: it is the yardstick of
    `roofline`, and on a shared machine that yardstick changes from minute to minute.
    """
    contenders = case.contenders
    calls, status = _set_up(contenders)
    copied_bytes = 0
    if calls and contenders[0].bytes:
        calls[_COPY], copied_bytes = copy_call(setting.device)
    timings = measure(
        calls, setting.device, inner=case.calls, budget=setting.budget, minimum=setting.minimum,
        on_round=on_round,
    )  # fmt: skip
    copy_time = summary(timings[_COPY].samples)["median_ms"] if _COPY in timings else None
    copied = copied_bytes / copy_time / 1e6 if copy_time else None
    rows: dict[str, dict[str, Any]] = {
        c.name: _row(c, timings[c.name], copied) if c.name in timings else {"status": status[c.name]}
        for c in contenders
    }
    _add_ratios(rows)
    for contender in contenders:
        if contender.yardstick:
            rows[contender.name]["yardstick"] = True
    facts = {"name": case.name, "title": case.title, "group": case.group, "sizes": case.sizes}
    return {**facts, "flops": case.flops, "copy_gb_per_s": copied and round(copied, 2), "contenders": rows}


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
        names = [case.name for found in cases.values() for case in found]
        asked = only or []
        raise ValueError(
            f"no case matches {', '.join(asked)}{_nearest(asked, names)}; there are: {', '.join(names)}"
        )
    return {family: found for family, found in chosen.items() if found}


def _all_cases(
    modules: dict[str, Any], plan: Plan, preset: str | None, console: Console
) -> dict[str, list[Case]]:
    cases = {family: module.cases(plan) for family, module in modules.items()}
    empty = [family for family, found in cases.items() if not found]
    if len(empty) == len(cases):
        known = _families.present("bench")
        others = [family for family in known if _families.load("bench", family).cases(plan)]
        raise ValueError(
            f"{preset} has nothing for {', '.join(empty)}; it has cases for: {', '.join(others)}"
        )
    for family in empty:
        console.print(f"{family}: {preset} has nothing for it", style="yellow", highlight=False)
    return {family: found for family, found in cases.items() if found}


def _for_device(
    cases: list[Case], plan: Plan, gpu_peers: Sequence[str], peers: tuple[str, ...] | None
) -> tuple[list[Case], list[str]]:
    """The cases with the contenders that were asked for and can run here, and the peers that cannot."""
    wanted = [
        replace(case, contenders=[c for c in case.contenders if peers is None or c.owner in (OURS, *peers)])
        for case in cases
    ]
    if plan.on_gpu:
        return wanted, []
    left = [
        replace(case, contenders=[c for c in case.contenders if c.owner not in gpu_peers]) for case in wanted
    ]
    there = {contender.owner for case in wanted for contender in case.contenders}
    return left, [peer for peer in gpu_peers if peer in there]


def _setting(plan: Plan, peers: tuple[str, ...] | None, chosen: dict[str, list[Case]]) -> Setting:
    if not plan.quick:
        return Setting(plan.device, peers)
    contenders = sum(len(case.contenders) for cases in chosen.values() for case in cases)
    return Setting(plan.device, peers, budget=min(0.6, _QUICK_SECONDS / contenders), minimum=2)


def _command(
    families: Sequence[str], plan: Plan, peers: list[str] | None, only: list[str] | None, preset: str | None,
    threads: int | None,
) -> str:  # fmt: skip
    """What repeats a run; of all options but the folder."""
    words = ["tilewright", "bench", *(families if len(families) == 1 else []), "--device", plan.device.type]
    for option, values in (("--peers", peers), ("--cases", only)):
        words += [option, ",".join(values)] if values else []
    words += ["--quick"] if plan.quick else []
    words += ["--preset", preset] if preset else []
    return shlex.join([*words, *(["--threads", str(threads)] if threads else [])])


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
    console.print(f"results  {path}\n{_plot(record, path)}", highlight=False, soft_wrap=True)


def _plot(record: dict[str, Any], path: Path) -> str:
    """Draws the chart beside the result; returns the line to print: where it is, or why there is none."""
    if not chart.shown(record):
        return "no plot: nothing was timed beside tilewright"
    try:
        write(path.with_suffix(".png"), chart.png(record))
    except ImportError:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    return f"plot     {path.with_suffix('.png')}"


def _run_cases(
    cases: list[Case], setting: Setting, record: dict[str, Any], path: Path, console: Console
) -> None:
    bar = (BarColumn(bar_width=30), TextColumn("{task.percentage:>3.0f}%"))
    columns = (*bar, TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        total = len(cases)
        task = progress.add_task("", total=total)

        def on_round(fraction: float) -> None:
            progress.update(task, completed=len(record["cases"]) + fraction)

        while cases:
            progress.update(task, description=cases[0].title)
            record["cases"].append(run_case(cases[0], setting, on_round))
            _write(path, record)
            if not console.is_terminal:  # where there is no bar, whoever waits sees that it goes on
                console.print(f"{len(record['cases'])}/{total} {cases[0].name}", highlight=False)
            # A case owns the tensors its contenders share: they go before the next one allocates its own.
            del cases[0]
            gc.collect()
            if setting.device.type == "cuda":
                torch.cuda.empty_cache()


def _ours_failed(record: dict[str, Any]) -> bool:
    rows = (pair for case in record["cases"] for pair in case["contenders"].items())
    return any(name.startswith(OURS) and row["status"] != "ok" for name, row in rows)


def _set_up(contenders: list[Contender]) -> tuple[dict[str, Call], dict[str, str]]:
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


def _known_model(preset: str | None) -> Any:
    _check_known("preset", [preset] if preset else [], MODELS)
    return MODELS[preset] if preset else None


def _known_peers(peers: list[str] | None, modules: Iterable[Any]) -> tuple[str, ...] | None:
    if peers is None:
        return None
    known = dict.fromkeys(peer for module in modules for peer in module.PEERS)
    _check_known("peer", [peer for peer in peers if peer != OURS], [*known, "none"])
    return tuple(peers)


def _check_known(kind: str, names: Sequence[str], known: Iterable[str]) -> None:
    known = list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        guess = _nearest(unknown, known)
        raise ValueError(f"unknown {kind} {', '.join(unknown)}{guess}; there are: {', '.join(known)}")


def _nearest(names: Sequence[str], known: Sequence[str]) -> str:
    found = [near for name in names for near in difflib.get_close_matches(name, known, n=1)]
    return f" (did you mean {', '.join(found)}?)" if found else ""


def _device(name: str | None) -> torch.device:
    if name == "cpu":
        return torch.device("cpu")
    facts = _info.info()
    usable = facts["verdict"]["cuda"].startswith("ok")
    if name == "cuda" and not usable:
        raise ValueError(f"--device cuda: {facts['verdict']['cuda']}")
    return torch.device("cuda", torch.cuda.current_device()) if usable else torch.device("cpu")


def _write(path: Path, record: dict[str, Any]) -> None:
    write(path, (json.dumps(record, indent=1) + "\n").encode())
