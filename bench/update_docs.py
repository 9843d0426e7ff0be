"""Puts the results under bench/results/ into README.md and docs/: no number there is typed by hand.

    python bench/update_docs.py           rewrite what lies between the markers
    python bench/update_docs.py --check   exit with 1 if that would change anything

A marker names a result file and what to show of it:

    <!-- result: cpu/optim-cpu.json table -->
    <!-- end -->
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from tilewright import _families
from tilewright.bench import report

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BLOCK = re.compile(r"(<!-- result: (\S+) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rendered(name: str, what: str) -> str:
    """The Markdown that stands between the markers."""
    path = RESULTS / name
    if not path.exists():
        if name.startswith("h200/"):
            return "Not yet measured on a GPU.\n"
        return f"Not measured yet: `{how_to_measure(path)}`, then `python bench/update_docs.py`.\n"
    record = json.loads(path.read_text(encoding="utf-8"))
    return VIEWS[what](record)


def how_to_measure(path: Path) -> str:
    """The command that writes a result file made on a CPU."""
    family, _, device = path.stem.partition("-")
    out = path.parent.relative_to(ROOT)
    if device:
        return f"tilewright bench {family} --device {device} --out {out}"
    seeds = " --seeds 5" if path.parent.name == "demo-seeds" else ""
    return f"tilewright demo {family}{seeds} --out {out}"


def table(record: dict[str, Any]) -> str:
    """A benchmark's table."""
    return report.markdown(record)


def output(record: dict[str, Any]) -> str:
    """What the demo printed at its end."""
    console = Console(width=100, color_system=None)
    with console.capture() as captured:
        _families.load("demo", record["demo"]).print_table(record, console)
    text = "\n".join(line.rstrip() for line in captured.get().strip("\n").splitlines())
    return f"```text\n{text}\n```\n\n{measured_on(record)}\n"


def spread(record: dict[str, Any]) -> str:
    """Final validation losses, a row a seed, and what they say."""
    demo = _families.load("demo", record["demo"])
    lines = [f"| seed | {demo.THEIRS} | {demo.OURS} | difference |", "| --: | --: | --: | --: |"]
    for run in record["runs"]:
        theirs, ours = (run[name]["validation_loss"] for name in (demo.THEIRS, demo.OURS))
        lines.append(f"| {run['seed']} | {theirs:.4f} | {ours:.4f} | {ours - theirs:+.4f} |")
    found = record["spread"]
    stds = [f"{found['std'][name]:.4f}" for name in (demo.THEIRS, demo.OURS)]
    lines.append(f"| std | {stds[0]} | {stds[1]} | {found['gap_std']:.4f} |")
    mean = f"The mean difference at the same seed is {found['gap_mean']:+.4f} nats per byte."
    return "\n".join(lines) + f"\n\n{mean} {measured_on(record)}\n"


def measured_on(record: dict[str, Any]) -> str:
    """One sentence: what was run, on what."""
    took = f"{record['seconds']:.0f} s in all. {report.conditions(record)}"
    if "parameters" not in record:  # several models
        return took
    return f"{record['parameters'] / 1e6:.2f}M parameters, {record['steps']} steps, {took}"


# The kernels that docs/kernels/README.md sets under the roofline, a family each.
ROOFLINE = {
    "optim": ("adamw8bit-fp32", "adamw8bit-bf16", "lion8bit-fp32", "quantize-fp32", "dequantize-fp32"),
    "scan": (
        "selective-scan-1x1536x2048", "selective-scan-training-1x1536x2048", "ssd-chunk-scan-forward-float32",
        "linear-scan-3d-dim2-fp32", "causal-conv1d-rows", "gated-rms-norm", "selective-state-update-mamba2",
        "mamba-step", "dense-product",
    ),
    "attention": ("full-fp32", "full-bf16", "density-25-block-64", "window-fp32", "full-fp32-backward"),
    "prune": (
        "bsr-b32-90-1-fp32", "bsr-b32-90-64-fp32", "bsr-b32-90-512-fp32", "bsr-b32-90-512-bf16",
        "prune-2to4-1-float32", "prune-2to4-512-float32", "activation-sparse-4096x11008-75-1-fp32",
    ),
}  # fmt: skip


class Point(NamedTuple):
    """A kernel of ours under the roofline."""

    title: str
    dtype: str
    flops: float
    bytes: float
    intensity: float  # FLOPs a byte
    rate: float  # GFLOP/s
    copy: float | None  # GB/s of a plain copy, timed in the same rounds
    reached: float | None  # bytes per second over the copy's


def dtype_of(case: dict[str, Any]) -> str:
    """The dtype of a case, which its sizes, its name or its title tells."""
    words = f"{case['sizes'].get('dtype', '')} {case['name']} {case['title']}"
    return "bfloat16" if re.search("bf16|bfloat16", words) else "float32"


def attention_bytes(case: dict[str, Any]) -> float:
    """q, k, v and out once, and backward their gradients; the lse in float32."""
    batch, heads, length, dim = map(int, case["sizes"]["shape"].split("x"))
    tensors = 8 if case["name"].endswith("backward") else 4
    return batch * heads * length * (tensors * dim * (2 if dtype_of(case) == "bfloat16" else 4) + 4)


def roofline_points(record: dict[str, Any]) -> list[Point]:
    """The main kernels of a benchmark's family, in the order of `ROOFLINE`."""
    cases = {case["name"]: case for case in record["cases"]}
    points = []
    for name in ROOFLINE[record["family"]]:
        case, ours = cases[name], cases[name]["contenders"]["tilewright"]
        moved = ours.get("bytes") or attention_bytes(case)
        rate = case["flops"] / ours["median_ms"] / 1e6
        facts = (
            case["flops"],
            moved,
            case["flops"] / moved,
            rate,
            case["copy_gb_per_s"],
            ours.get("roofline"),
        )
        points.append(Point(case["title"], dtype_of(case), *facts))
    return points


def best_rates() -> dict[str, float]:
    """GFLOP/s of the fastest of all families' main kernels in each dtype."""
    files = [RESULTS / "cpu" / f"{family}-cpu.json" for family in ROOFLINE]
    points = [p for file in files for p in roofline_points(json.loads(file.read_text(encoding="utf-8")))]
    return {dtype: max(p.rate for p in points if p.dtype == dtype) for dtype in ("float32", "bfloat16")}


def roofline(record: dict[str, Any]) -> str:
    """Bytes, FLOPs and what is reached of both bounds, a row a main kernel."""
    lines = ["| | kernel | MB | MFLOP | FLOPs a byte | of the copy's GB/s | GFLOP/s | of the best rate |"]
    lines += ["| --: | :-- | --: | --: | --: | --: | --: | --: |"]
    best = best_rates()
    for number, p in enumerate(roofline_points(record), 1):
        reached = "-" if p.reached is None else f"{p.reached:.0%}"
        sizes = [f"{p.bytes / 1e6:.1f}", f"{p.flops / 1e6:,.1f}", f"{p.intensity:,.1f}"]
        values = [*sizes, reached, f"{p.rate:.3g}"]
        lines.append(f"| {number} | {p.title} | {' | '.join(values)} | {p.rate / best[p.dtype]:.1%} |")
    return "\n".join(lines) + f"\n\n{report.conditions(record)}\n"


VIEWS = {"table": table, "output": output, "spread": spread, "roofline": roofline}


def updated(text: str) -> str:
    """The document with every block rendered anew."""
    return BLOCK.sub(lambda m: m[1] + "\n" + rendered(m[2], m[3]) + "\n" + m[4], text)


def main(arguments: list[str]) -> int:
    """Rewrites, or with --check only reports."""
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        before = path.read_text(encoding="utf-8")
        after = updated(before)
        if after != before:
            stale.append(path.relative_to(ROOT))
            if "--check" not in arguments:
                path.write_text(after, encoding="utf-8")
    print(*stale or ["nothing to do"], sep="\n")
    return int("--check" in arguments and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
