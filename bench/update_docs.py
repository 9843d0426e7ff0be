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
from typing import Any

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
        return (
            f"TODO(lead): not measured yet: `{how_to_measure(path)}`, then `python bench/update_docs.py`.\n"
        )
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


VIEWS = {"table": table, "output": output, "spread": spread}


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
