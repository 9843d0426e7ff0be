"""Build, test and time one family on this machine's GPU, without a network and without installing anything.

Usage: python scripts/gpu.py --family optim --stages build,test,bench --out bench/results/h200

Uses the python that runs it: that one needs torch, pybind11, cmake, ninja, pytest and hypothesis. Each stage
is stopped after nine minutes and leaves OUT/<family>-<stage>.json at once. Without a GPU only `build` runs.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

from build_tree import ROOT, commands, environment, lay_out

VERBATIM = argparse.RawDescriptionHelpFormatter
STAGE_SECONDS = 9 * 60
TREE = ROOT / "build" / "gpu"
TAIL_LINES = 60


def device() -> dict[str, str] | None:
    """Name, capability and driver of the first GPU, or None."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
    return dict(zip(("name", "capability", "driver"), line.split(", "), strict=True))


def architecture(gpu: dict[str, str] | None) -> str:
    """The one architecture to build for: that of the GPU; Hopper's own instructions need the `a`."""
    capability = gpu["capability"] if gpu else "9.0"
    return capability.replace(".", "") + ("a" if int(capability.split(".")[0]) >= 9 else "") + "-real"


def run(command: list[str], deadline: float) -> tuple[int, list[str]]:
    """Run a command, echoing it; return its status (124: out of time) and the last lines it printed."""
    print("+", " ".join(command), flush=True)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = environment(TREE)
    env["PYTHONPATH"] += os.pathsep + str(ROOT / "scripts")  # the recorder of the support matrix
    process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipes)
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(process.pid, signal.SIGKILL))
    signal.alarm(max(1, int(deadline - time.monotonic())))
    lines = []
    for line in process.stdout or ():
        print(line, end="", flush=True)
        lines = [*lines[1 - TAIL_LINES :], line.rstrip()]
    status = process.wait()
    signal.alarm(0)
    return (124 if status == -signal.SIGKILL else status), lines


def build(family: str, gpu: dict[str, str] | None, out: Path) -> list[list[str]]:
    chosen = {"CUDA": "ON", "CUDA_ARCHS": architecture(gpu), "FAMILIES": family}
    return commands(TREE, [f"-DTILEWRIGHT_{name}={value}" for name, value in chosen.items()])


def test(family: str, gpu: dict[str, str] | None, out: Path) -> list[list[str]]:
    record = ["-p", "support_matrix", "--support", str(out / f"{family}-support.json")]
    return [[sys.executable, "-m", "pytest", "-q", "-m", "cuda and not nightly", *record, f"tests/{family}"]]


def bench(family: str, gpu: dict[str, str] | None, out: Path) -> list[list[str]]:
    return [[sys.executable, "-m", "tilewright", "bench", family, "--device", "cuda", "--out", str(out)]]


STAGES = {"build": build, "test": test, "bench": bench}


def commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def versions() -> dict[str, str | None]:
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "commit": commit(),
    }


def run_stage(stage: str, family: str, gpu: dict[str, str] | None, out: Path) -> bool:
    """Run one stage, write its record, and say whether it succeeded."""
    begin = time.monotonic()
    status, tail = 0, []
    for command in STAGES[stage](family, gpu, out):
        status, lines = run(command, begin + STAGE_SECONDS)
        tail += lines
        if status:
            break
    if stage == "build" and not status:
        lay_out(TREE)
    seconds = round(time.monotonic() - begin, 1)
    record = {"family": family, "stage": stage, "status": status, "seconds": seconds, "device": gpu}
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{family}-{stage}.json"
    path.write_text(json.dumps({**record, **versions(), "tail": tail[-TAIL_LINES:]}, indent=1) + "\n")
    verdict = {0: "done", 124: "ran out of time"}.get(status, "failed")
    print(f"gpu: {stage} {verdict} in {seconds} s; record: {path}", flush=True)
    return status == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=VERBATIM)
    parser.add_argument("--family", default="optim")
    parser.add_argument("--stages", default="build,test,bench", help="comma-separated (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "h200")
    options = parser.parse_args()
    if not (ROOT / "csrc" / options.family).is_dir():
        parser.error(f"unknown family {options.family}: there is no csrc/{options.family}")
    stages = options.stages.split(",")
    if unknown := set(stages) - set(STAGES):
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    gpu = device()
    if gpu is None:
        stages = [stage for stage in stages if stage == "build"]
        rest = "only the build runs, for sm_90a" if stages else "there is nothing to do"
        print(f"gpu: this machine has no GPU; {rest}", flush=True)
    for stage in stages:
        if stage != "build" and not (TREE / "tilewright").is_dir():
            sys.exit(f"gpu: nothing is built in {TREE}; run the stage `build` first")
        if not run_stage(stage, options.family, gpu, options.out.resolve()):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
