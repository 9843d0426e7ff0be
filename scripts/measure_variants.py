"""Time variants of a family's CUDA kernels beside the default, all in one process, alternating.

Each variant is an extension of its own (build_variants.py), loaded beside the product's. In each case that
judges it, it must first give the default's results; then all that did are timed in turn, as `tilewright
bench` does it. Where calls change their inputs, as steps of an optimizer do, each variant has its own.

What is found is a line in --progress at once. A variant that takes the process with it is passed over when
the process is started again with the same file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gpu_variants import VARIANTS, Variant
from tilewright import _backend, _families
from tilewright.attention import BlockMask
from tilewright.bench.case import Case, Changing, Plan
from tilewright.bench.timing import measure, summary

DEFAULT = "default"
MOST_SECONDS = 2.0  # for a contender of a case
STEPS = 2  # of a call that changes its inputs, before they are compared: the first one begins with zeros
# Of the largest number: two roundings of 16 bits; else what sums in another order, or another power of two,
# make of a long sequence. The tests hold variants to the rule of error; this is for what only a GPU shows.
ALLOWED = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
ALLOWED_ELSE = 1e-4


class Progress:
    """Lines of JSON, one for each thing found; half a line, of a process that was killed, is none."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, **found: Any) -> None:
        print(json.dumps(found), flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(found))  # behind half a line, too

    def read(self) -> list[dict[str, Any]]:
        lines = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
        return lines

    def refused(self) -> dict[str, str]:
        """The variants that are wrong, or began something and did not come back, and why."""
        found, begun = {}, {}
        for line in self.read():
            if "begins" in line:
                begun[line["begins"]] = f"the process ended in {line['case']}"
            elif "ends" in line:
                begun.pop(line["ends"], None)
            elif "refused" in line:
                found[line["refused"]] = line["why"]
        return {**begun, **found}

    def times(self) -> dict[str, dict[str, dict[str, float]]]:
        """Of each case that was timed: of each contender median and quartiles in milliseconds."""
        return {line["case"]: line["times"] for line in self.read() if "times" in line}

    def tried(self) -> set[str]:
        """Cases that were timed, or died of it."""
        return {line["timing"] for line in self.read() if "timing" in line}


def load(path: Path) -> ModuleType:
    """This extension, beside those that are loaded: under the same name it would be the one that is."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}._C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on(module: ModuleType, call: Callable[[], object]) -> Callable[[], object]:
    """The call, by this extension's kernels."""

    def run() -> object:
        vars(_backend)["C"] = module
        return call()

    return run


def outcome(module: ModuleType, call: Callable[[], object]) -> list[Tensor]:
    """What the call gives, or what it changes, as it is now: the next call may write to the same memory."""
    if not isinstance(call, Changing):
        return tensors(on(module, call)())
    for _ in range(STEPS):
        on(module, call)()
    return tensors(call.changed())


def tensors(result: object) -> list[Tensor]:
    if isinstance(result, BlockMask):
        result = [mask_lists(result, way) for way in ("q2k", "k2q")] + [result.tables]
    if isinstance(result, (tuple, list)):
        return [tensor for value in result for tensor in tensors(value)]
    return [result.detach().clone()] if isinstance(result, Tensor) else []


def mask_lists(mask: BlockMask, way: str) -> list[Tensor]:
    """What lies behind the end of a list is undefined."""
    counts = getattr(mask, f"{way}_counts")
    listed = [getattr(mask, f"{way}_{part}") for part in ("indices", "bits")]
    places = torch.arange(listed[0].shape[-1], device=counts.device)
    inside = places < counts[..., None]
    return [counts, *(entries.where(inside, -1) for entries in listed if entries is not None)]


def difference(actual: list[Tensor], expected: list[Tensor]) -> str:
    """What is wrong with these results; nothing: ''."""
    if not expected:
        return "there is nothing to compare"
    for number, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"result {number} has another shape or dtype"
        if not (ours.is_floating_point() or ours.is_complex()):
            if wrong := int((ours != theirs).sum()):
                return f"result {number} differs in {wrong} of {ours.numel()} places"
            continue
        if not torch.equal(ours.isfinite(), theirs.isfinite()):
            return f"result {number} is finite elsewhere"
        if ours.numel() == 0:
            continue
        # In the wider of the two dtypes the difference of neighbours does not vanish.
        error = (ours.float() - theirs.float()).nan_to_num(0, 0, 0).abs().max().item()
        largest = theirs.float().nan_to_num(0, 0, 0).abs().max().item()
        if error > ALLOWED.get(ours.dtype, ALLOWED_ELSE) * largest:
            return f"result {number} is off by {error:.3e}, the largest number is {largest:.3e}"
    return ""


def run_case(
    case: Case,
    modules: dict[str, ModuleType],
    device: torch.device,
    budget: float,
    progress: Progress,
) -> None:
    """Check the variants in a case, and time those that are right."""
    default = modules[DEFAULT]
    shared = case.contenders[0].setup()
    expected = outcome(default, shared)
    right = {DEFAULT: on(default, shared)}
    for name, module in modules.items():
        if name == DEFAULT:
            continue
        progress.note(begins=name, case=case.name)
        # Set up under this extension, since an optimizer stays with the one that it began with.
        call = on(module, case.contenders[0].setup)() if isinstance(shared, Changing) else shared
        why = difference(outcome(module, call), expected)
        progress.note(ends=name, case=case.name)
        if why:
            progress.note(refused=name, case=case.name, why=f"{case.name}: {why}")
        else:
            right[name] = on(module, call)
    del expected
    progress.note(timing=case.name)
    found = measure(right, device, inner=case.calls, budget=budget)
    times = {name: summary(timing.samples) for name, timing in found.items()}
    progress.note(case=case.name, times=times)
    vars(_backend)["C"] = default


def run(
    cases: list[Case],
    variants: list[Variant],
    folder: Path,
    progress: Progress,
    device: torch.device,
    seconds: float,
) -> None:
    """All cases that judge a variant, in the order of the table, those left out that are done."""
    end = time.monotonic() + seconds
    names = dict.fromkeys(name for variant in variants for name in variant.cases)
    known = {case.name: case for case in cases}
    left = [known[name] for name in names if name not in progress.tried()]
    loaded: dict[str, ModuleType] = {DEFAULT: _backend.C}
    for number, case in enumerate(left):
        judged = [variant.name for variant in variants if case.name in variant.cases]
        for name in judged:
            if name not in loaded and (folder / f"{name}.so").exists():
                loaded[name] = load(folder / f"{name}.so")
        modules = {
            name: loaded[name]
            for name in [DEFAULT, *judged]
            if name in loaded and name not in progress.refused()
        }
        share = (end - time.monotonic()) / (len(left) - number)
        # Each sample is taken twice, by events and by the clock; inputs and checks take a share too.
        budget = max(0.0, min(MOST_SECONDS, share / (3 * len(modules))))
        run_case(case, modules, device, budget, progress)


def report(variants: list[Variant], folder: Path, progress: Progress) -> dict[str, Any]:
    """The predictions beside what came of them; ratios are to the default's median, below 1 is faster."""
    times, refused = progress.times(), progress.refused()
    rows = []
    for variant in variants:
        described = folder / f"{variant.name}.json"
        measured = {
            name: {**times[name][variant.name], "ratio": ratio_of(times[name], variant.name)}
            for name in variant.cases
            if variant.name in times.get(name, {})
        }
        outcome = "measured" if len(measured) == len(variant.cases) else "not all of it measured"
        if variant.name in refused:
            outcome = f"refused: {refused[variant.name]}"
        elif not described.exists():
            outcome = "not built"
        rows.append(
            {
                **{"name": variant.name, "constants": variant.constants, "outcome": outcome},
                **{"predicted": variant.predicted, "why": variant.why, "cases": measured},
                "kernels": json.loads(described.read_text()) if described.exists() else {},
            }
        )
    return {"defaults": {name: found[DEFAULT] for name, found in times.items()}, "variants": rows}


def ratio_of(times: dict[str, dict[str, float]], name: str) -> float:
    return round(times[name]["median_ms"] / times[DEFAULT]["median_ms"], 4)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", required=True, choices=list(VARIANTS))
    parser.add_argument("--folder", type=Path, required=True, help="where build_variants.gather put them")
    parser.add_argument("--progress", type=Path, required=True, help="JSONL; what it has is not done again")
    parser.add_argument("--seconds", type=float, required=True, help="that the measuring may take")
    options = parser.parse_args()
    device = torch.device("cuda")
    cases = _families.load("bench", options.family).cases(Plan(device))
    run(cases, VARIANTS[options.family], options.folder, Progress(options.progress), device, options.seconds)


if __name__ == "__main__":
    main()
