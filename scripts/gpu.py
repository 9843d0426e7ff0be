"""Build, test and time families on this machine's GPU, without a network and without installing anything.

Usage: python scripts/gpu.py --family optim,scan --stages build,check,test,bench --out bench/results/h200

    build     for this GPU's architecture alone (sm_90a where there is none), these families alone
    check     `tilewright info --check`: each op once
    test      the tests marked `cuda`, by four processes, the first case of each test first; after a hang, a
              crash or a lost context a process goes on behind the test that caused it; then those whose
              tensors fill the GPU (`nightly`), by one
    sanitize  the first case of each test under compute-sanitizer's memcheck and racecheck, where it is
    bench     `tilewright bench`, a JSON that grows case by case
    variants  kernels with other constants (gpu_variants.py): built, held against the default's results,
              timed beside it in turn; predictions stand beside the outcome in the JSON

Uses the python that runs it: to build, that one needs pybind11, cmake and ninja; for the rest torch, numpy,
rich, pytest and hypothesis. What was built travels: build/gpu/tilewright, made elsewhere by a python of the
same version, does here in the same place, and then there is nothing to build; so does build/gpu/variants.

A run ends within --minutes, and what prints nothing for two minutes is killed. Each stage leaves
OUT/<family>-<stage>.json, and what it printed beside it in .log.
"""

import argparse
import json
import os
import platform
import selectors
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TextIO

from build_tree import ROOT, commands, environment, lay_out
from gpu_variants import VARIANTS, Variant

VERBATIM = argparse.RawDescriptionHelpFormatter
FAMILIES = ("optim", "attention", "prune", "scan")
TREE = ROOT / "build" / "gpu"
TAIL_LINES = 60
QUIET_SECONDS = 120
TEST_SECONDS = 60  # then the test is given up; compiling what it tests is counted in
SHARDS = 4  # that a family's tests are dealt out to: references in Python leave a GPU idle
SHARED = "cuda and not nightly"  # the tests that this is for
STARTS = 12  # of a shard, or of the process that times variants
BUILD_STAGES = ("build", "variants")  # what is of use without a GPU
OUT_OF_TIME = 124


class Run:
    """What a stage needs to know, and how it runs its commands: echoed, logged, never beyond the end."""

    def __init__(self, family: str, gpu: dict[str, str] | None, out: Path, end: float) -> None:
        self.family, self.gpu, self.out, self.end = family, gpu, out, end
        self.name = family
        self.tail: list[str] = []
        self.log: TextIO | None = None
        self.echoes = True
        self.found: dict[str, object] = {}  # goes into the stage's record

    def part(self, name: str) -> "Run":
        """One of several that run side by side: what they print goes into their logs alone."""
        run = Run(self.family, self.gpu, self.out, self.end)
        run.name = f"{self.family}-{name}"
        run.log = (self.out / f"{run.name}.log").open("w")
        run.echoes = False
        return run

    def command(self, command: list[str], **variables: str) -> int:
        """Its status; OUT_OF_TIME if it was killed at the end of the time, or having been quiet too long."""
        self.say("+ " + " ".join(command))
        env = {**environment(TREE), **variables}
        env["PYTHONPATH"] += os.pathsep + str(ROOT / "scripts")  # the plugins of pytest
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipes)
        if self._echo(process):
            return process.wait()
        os.killpg(process.pid, signal.SIGKILL)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            self.say("gpu: it does not die: the driver holds it")
        return OUT_OF_TIME

    def _echo(self, process: subprocess.Popen) -> bool:
        """Whether the output came to its end."""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                left = self.end - time.monotonic()
                if left <= 0 or not selector.select(min(left, QUIET_SECONDS)):
                    self.say("gpu: " + ("no time is left" if left <= QUIET_SECONDS else "too long quiet"))
                    return False
                piece = os.read(process.stdout.fileno(), 1 << 16)
                if not piece:
                    return True
                self.say(piece.decode(errors="replace"), end="")

    def say(self, text: str, end: str = "\n") -> None:
        if self.echoes:
            print(text, end=end, flush=True)
        self.log.write(text + end)
        self.log.flush()
        self.tail = ("\n".join(self.tail) + text + end).split("\n")[-TAIL_LINES:]


def device() -> dict[str, str] | None:
    """Name, capability and driver of the first GPU, or None."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)
        return dict(
            zip(("name", "capability", "driver"), done.stdout.splitlines()[0].split(", "), strict=True)
        )
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None


def architecture(gpu: dict[str, str] | None) -> str:
    """The one architecture to build for: that of the GPU; Hopper's own instructions need the `a`."""
    capability = gpu["capability"] if gpu else "9.0"
    return capability.replace(".", "") + ("a" if int(capability.split(".")[0]) >= 9 else "") + "-real"


def build(run: Run) -> int:
    chosen = {"CUDA": "ON", "CUDA_ARCHS": architecture(run.gpu), "FAMILIES": run.family.replace("-", ";")}
    for command in commands(TREE, [f"-DTILEWRIGHT_{name}={value}" for name, value in chosen.items()]):
        if status := run.command(command):
            return status
    lay_out(TREE)
    return 0


def check(run: Run) -> int:
    return run.command([sys.executable, "-m", "tilewright", "info", "--check"])


def pytest(*options: str, marked: str = SHARED) -> list[str]:
    """The limit of a test is faulthandler's: a thread of C, which nothing that Python waits for holds up."""
    limit = ["-o", f"faulthandler_timeout={TEST_SECONDS}", "-o", "faulthandler_exit_on_timeout=true"]
    usual = ["-m", marked, "--tb=short", "-v", "-p", "no:cacheprovider", "-p", "gpu_tests"]
    return [sys.executable, "-m", "pytest", *limit, *usual, *options]


def test(run: Run) -> int:
    from gpu_tests import read

    each = [["--shard", f"{number}/{SHARDS}"] for number in range(SHARDS)]
    with ThreadPoolExecutor(SHARDS) as pool:
        statuses = list(pool.map(lambda i: run_part(run.part(str(i)), each[i], SHARED), range(SHARDS)))
    statuses.append(run_part(run.part("large"), [], "cuda and nightly"))
    found = [read(path) for path in sorted(run.out.glob(f"{run.family}-*-tests.jsonl"))]
    return summarise(run, {name: entry for tests in found for name, entry in tests.items()}, max(statuses))


def run_part(run: Run, options: list[str], marked: str) -> int:
    from gpu_tests import read

    progress = run.out / f"{run.name}-tests.jsonl"
    progress.unlink(missing_ok=True)
    threads = str(max(1, (os.cpu_count() or 1) // SHARDS))
    for start in range(STARTS):
        record = ["--progress", str(progress), "-p", "support_matrix"]
        record += ["--support", str(run.out / f"{run.name}-{start}-support.json")]
        before = len(read(progress))
        command = pytest(*record, *options, f"tests/{run.family}", marked=marked)
        status = run.command(command, OMP_NUM_THREADS=threads)
        # What pytest itself has to say ends in one of these; "tests failed" is also how a hung test ends it.
        ended = status in (0, 2, 3, 4, 5) or (status == 1 and not stuck(read(progress)))
        if ended or time.monotonic() >= run.end or len(read(progress)) == before:
            break
    return 0 if status == 5 else status  # 5: none were left


def stuck(tests: dict[str, dict]) -> list[str]:
    """Tests that began and never ended."""
    return [name for name, entry in tests.items() if entry["outcome"] == "started"]


def summarise(run: Run, tests: dict[str, dict], status: int) -> int:
    """Prints what failed and why, and the counts, last; the stage's status."""
    outcomes = [entry["outcome"] for entry in tests.values()]
    bad = {name: entry for name, entry in tests.items() if entry["outcome"] in ("failed", "started")}
    for name, entry in bad.items():
        why = [line for line in entry["why"].splitlines() if line.startswith("E ")] or ["hung or crashed"]
        run.say(f"gpu: {name}: {why[0][:200]}")
    counts = ", ".join(
        f"{outcomes.count(word)} {word}" for word in ("passed", "skipped", "failed", "started")
    )
    run.say(f"gpu: {run.family}: {counts}; pytest ended with {status}")
    return 1 if bad else status


def sanitize(run: Run) -> int:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        run.say("gpu: no compute-sanitizer here")
        return 0
    status = 0
    for check in ("memcheck", "racecheck"):
        progress = run.out / f"{run.family}-{check}.jsonl"
        progress.unlink(missing_ok=True)
        # Torch's kernels are not ours to check. Without its cache each tensor is an allocation of its own.
        words = [tool, "--tool", check, "--kernel-name", "kns=tilewright", "--report-api-errors", "no"]
        words += [
            "--print-limit",
            "20",
            "--error-exitcode",
            "99",
            *pytest("--progress", str(progress), "--cases", "1"),
        ]
        found = run.command([*words, f"tests/{run.family}"], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        status = status or found
    return status


def bench(run: Run) -> int:
    return run.command(
        [sys.executable, "-m", "tilewright", "bench", run.family, "--device", "cuda", "--out", str(run.out)]
    )


def variants(run: Run) -> int:
    from build_variants import pack, packed, unpack

    listed, folder = VARIANTS.get(run.family, []), TREE / "variants" / run.family
    if not listed:
        run.say(f"gpu: {run.family} has no variants")
        return 0
    status = 0
    if (TREE / "cmake" / "build.ninja").exists():
        status = build_variants(run, listed, folder)
    elif packed(folder).exists():
        unpack(folder)
    if run.gpu is None:
        pack(folder)
        return status
    from measure_variants import Progress, report

    progress = Progress(run.out / f"{run.family}-variants.jsonl")
    progress.path.unlink(missing_ok=True)
    for _ in range(STARTS):
        before = len(progress.read())
        files = ["--folder", str(folder), "--progress", str(progress.path)]
        words = ["--family", run.family, *files, "--seconds", str(max(1, run.end - time.monotonic()))]
        measured = run.command([sys.executable, str(ROOT / "scripts" / "measure_variants.py"), *words])
        if measured == 0 or time.monotonic() >= run.end or len(progress.read()) == before:
            break
    run.found = report(listed, folder, progress)
    return status or measured


def build_variants(run: Run, listed: list[Variant], folder: Path) -> int:
    from build_variants import build_command, gather, write_ninja

    tree = TREE / "cmake"
    objects = tree / "variants" / run.family
    write_ninja(tree, "_C", listed, objects)
    status = run.command(build_command(tree, objects))
    for name in gather(tree, listed, objects, folder):
        run.say(f"gpu: {name} was not built")
    return status


STAGES = {
    "build": build,
    "check": check,
    "test": test,
    "sanitize": sanitize,
    "bench": bench,
    "variants": variants,
}


def head() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def stamp(run: Run, commit: str | None) -> None:
    """Names the commit in results whose own process could not: a copy of the sources has no history."""
    for path in run.out.glob(f"{run.family}-*.json"):
        record = json.loads(path.read_text())
        if commit and record.get("commit", "") is None:
            path.write_text(json.dumps({**record, "commit": commit}, indent=1) + "\n")


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def run_stage(stage: str, run: Run, commit: str | None) -> bool:
    """Run one stage, write its record, and say whether it succeeded."""
    begin = time.monotonic()
    run.out.mkdir(parents=True, exist_ok=True)
    with (run.out / f"{run.family}-{stage}.log").open("w") as run.log:
        status = STAGES[stage](run)
    seconds = round(time.monotonic() - begin, 1)
    facts = {"python": platform.python_version(), "torch": installed("torch"), "commit": commit}
    record = {"family": run.family, "stage": stage, "status": status, "seconds": seconds, "device": run.gpu}
    path = run.out / f"{run.family}-{stage}.json"
    path.write_text(json.dumps({**record, **facts, **run.found, "tail": run.tail}, indent=1) + "\n")
    stamp(run, commit)
    verdict = {0: "done", OUT_OF_TIME: "was stopped"}.get(status, "failed")
    print(f"gpu: {stage} of {run.family} {verdict} in {seconds} s; record: {path}", flush=True)
    return status == 0


def chosen(parser: argparse.ArgumentParser, what: str, names: str, known: list[str]) -> list[str]:
    found = names.split(",")
    if unknown := set(found) - set(known):
        parser.error(f"unknown {what} {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=VERBATIM)
    parser.add_argument("--family", default="optim", help="comma-separated, or all")
    parser.add_argument("--stages", default="build,check,test,bench", help="comma-separated")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "h200")
    parser.add_argument("--minutes", type=float, default=9, help="for all of it (default: 9)")
    parser.add_argument("--commit", default=head(), help="of these sources (default: what git says)")
    options = parser.parse_args()
    names = ",".join(FAMILIES) if options.family == "all" else options.family
    families = chosen(parser, "family", names, list(FAMILIES))
    stages = chosen(parser, "stage", options.stages, list(STAGES))
    end = time.monotonic() + 60 * options.minutes
    gpu = device()
    if gpu is None:
        stages = [stage for stage in stages if stage in BUILD_STAGES]
        rest = f"only {' and '.join(stages)} run, to build for sm_90a" if stages else "there is nothing to do"
        print(f"gpu: this machine has no GPU; {rest}", flush=True)
    fine = True
    for stage in stages:
        if stage != "build" and not (TREE / "tilewright").is_dir():
            sys.exit(f"gpu: nothing is built in {TREE}; run the stage `build` first")
        for family in ["-".join(families)] if stage in ("build", "check") else families:
            good = run_stage(stage, Run(family, gpu, options.out.resolve(), end), options.commit)
            fine = fine and good
            if stage == "build" and not good:
                return 1
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
