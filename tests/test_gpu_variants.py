"""Variants of CUDA kernels: the table, what their measuring does with wrong ones, by night each of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tilewright import _C, _backend, _families
from tilewright.attention import BlockMask
from tilewright.bench.case import Case, Changing, Contender, Plan
from tilewright.optim import quantize_blockwise

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
TREE = ROOT / "build" / str(sys.implementation.cache_tag)
sys.path.insert(0, str(SCRIPTS))
from gpu_variants import VARIANTS, Variant  # noqa: E402

sys.path.remove(str(SCRIPTS))
ALL = [pytest.param(variant, id=variant.name) for listed in VARIANTS.values() for variant in listed]
DECLARED = {
    name: int(usual)
    for path in (ROOT / "csrc").rglob("*.*")
    for name, usual in re.findall(r"\bTW_TUNED\((\w+),\s*(\d+)\)", path.read_text(encoding="utf-8"))
}


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(SCRIPTS)
    import build_variants
    import measure_variants

    yield SimpleNamespace(build=build_variants, measure=measure_variants)
    for module in ("build_variants", "measure_variants", "ptxas_report"):
        sys.modules.pop(module, None)


# ---- The table -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", VARIANTS)
def test_table(family: str) -> None:
    listed = VARIANTS[family]
    assert len({variant.name for variant in listed}) == len(listed)
    assert [variant.predicted for variant in listed] == sorted(variant.predicted for variant in listed)
    known = {case.name for case in _families.load("bench", family).cases(Plan(torch.device("cuda")))}
    assert {case for variant in listed for case in variant.cases} <= known


@pytest.mark.parametrize("variant", ALL)
def test_a_variant_differs_from_the_default(variant: Variant) -> None:
    assert variant.constants.items() - DECLARED.items()
    assert variant.constants.keys() <= DECLARED.keys()
    assert variant.why
    assert variant.cases


@pytest.mark.parametrize(("define", "fine"), [("", True), ("=32", True), ("=x", False), ("=-1", False)])
def test_what_a_build_may_give_a_constant(define: str, fine: bool, tmp_path: Path) -> None:
    source = tmp_path / "tuned.cpp"
    expected = 32 if define else 16
    source.write_text(
        f'#include "core/tune.h"\nstatic_assert(TW_TUNED(SOMETHING, 16) == {expected});\n', encoding="utf-8"
    )
    flags = [f"-DTW_TUNE_SOMETHING{define}"] if define else []
    compiler = [os.environ.get("CXX", "c++"), "-std=c++20", "-fsyntax-only", f"-I{ROOT / 'csrc'}"]
    done = subprocess.run([*compiler, *flags, str(source)], capture_output=True, text=True)
    assert (done.returncode == 0) == fine, done.stderr


# ---- Measuring -----------------------------------------------------------------------------------


def variant_of(name: str, *cases: str) -> Variant:
    return Variant(name, {}, 1.0, "a test", cases, ())


def measured(
    scripts: Any, monkeypatch: pytest.MonkeyPatch, folder: Path, factors: dict[str, Any], setup: Any = None
) -> Any:
    """The report on variants that multiply by these factors where the default multiplies by 2."""
    for name in factors:
        (folder / f"{name}.so").touch()
        (folder / f"{name}.json").write_text("{}", encoding="utf-8")
    modules = {name: SimpleNamespace(factor=factor) for name, factor in factors.items()}
    measure = scripts.measure
    monkeypatch.setattr(measure, "load", lambda path: modules[path.name.partition(".")[0]])
    monkeypatch.setattr(_backend, "C", SimpleNamespace(factor=2.0))
    ones = torch.ones(4)
    contender = Contender("tilewright", setup or (lambda: lambda: ones * vars(_backend)["C"].factor))
    cases = [Case(name, name, [contender]) for name in ("first", "second")]
    variants = [variant_of(name, "first", "second") for name in factors]
    progress = measure.Progress(folder / "progress.jsonl")
    measure.run(cases, variants, folder, progress, torch.device("cpu"), 0.2)
    found = measure.report(variants, folder, progress)
    assert found["defaults"].keys() <= {"first", "second"}
    return {row["name"]: row for row in found["variants"]}


def test_an_extension_beside_the_one_in_use(
    scripts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(_backend, "C", _C)
    copies = [Path(shutil.copy(_C.__file__, tmp_path / f"{name}.so")) for name in ("one", "other")]
    modules = [_C, *map(scripts.measure.load, copies)]
    assert len({id(module) for module in modules}) == 3
    assert [module.__file__ for module in modules[1:]] == list(map(str, copies))
    values, expected = torch.randn(4096), None
    for module in modules:
        found = scripts.measure.on(module, lambda: quantize_blockwise(values)[0])()
        assert vars(_backend)["C"] is module
        assert expected is None or torch.equal(found, expected)
        expected = found


def changing() -> Changing:
    weights = torch.full((4,), 1.0)
    mine = vars(_backend)["C"]  # as a step of an optimizer, which stays with the extension it began with
    return Changing(lambda: weights.mul_(mine.factor), lambda: [weights])


def test_calls_that_change_their_inputs(
    scripts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = measured(scripts, monkeypatch, tmp_path, {"wrong": 3.0, "same": 2.0}, changing)
    assert rows["same"]["outcome"] == "measured"
    assert rows["wrong"]["outcome"].startswith("refused: first: result 0 is off by 5.000e+00")


def test_calls_that_give_nothing(scripts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = measured(scripts, monkeypatch, tmp_path, {"some": 2.0}, lambda: lambda: None)
    assert rows["some"]["outcome"] == "refused: first: there is nothing to compare"


def test_steps_say_what_they_change(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "C", _C)
    listed = _families.load("bench", "optim").cases(Plan(torch.device("cpu"), quick=True))
    call = next(case for case in listed if case.group == "steps").contenders[0].setup()
    first, second = (scripts.measure.outcome(_C, call) for _ in range(2))
    changed = {a.dtype for a, b in zip(first, second, strict=True) if not torch.equal(a, b)}
    assert changed == {torch.float32, torch.uint8, torch.int64}  # parameters and scales, codes, steps


def test_numbers_of_blocks_have_to_be_the_same(scripts: Any) -> None:
    blocks = torch.rand(1, 1, 9, 40, generator=torch.Generator().manual_seed(0)) < 0.3
    first, other = (BlockMask.from_dense(blocks, 16) for _ in range(2))
    for mask in (first, other):  # what is beyond the end of a list
        beyond = torch.arange(mask.q2k_indices.shape[3]) >= mask.q2k_counts[..., None]
        mask.q2k_indices[beyond] = torch.randint(99, (int(beyond.sum()),), dtype=torch.int32)
    expected = scripts.measure.tensors(first)
    assert len(expected) == 5
    assert scripts.measure.difference(scripts.measure.tensors(other), expected) == ""
    other.k2q_indices[0, 0, 39, 0] += 1
    found = scripts.measure.difference(scripts.measure.tensors(other), expected)
    assert found == f"result 3 differs in 1 of {other.k2q_indices.numel()} places"


def test_variants_are_timed_beside_the_default(
    scripts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = measured(scripts, monkeypatch, tmp_path, {"same": 2.0, "nearly": 2.0001})
    assert [row["outcome"] for row in rows.values()] == ["measured", "measured"]
    for row in rows.values():
        assert row["cases"].keys() == {"first", "second"}
        assert all(times["ratio"] > 0 for times in row["cases"].values())


@pytest.mark.parametrize("factor", [2.01, float("nan"), float("inf")])
def test_a_wrong_variant_is_not_timed(
    scripts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, factor: float
) -> None:
    rows = measured(scripts, monkeypatch, tmp_path, {"wrong": factor, "same": 2.0})
    assert rows["wrong"]["outcome"].startswith("refused: first: result 0 is")
    assert rows["wrong"]["cases"] == {}
    assert rows["same"]["outcome"] == "measured"


def test_what_took_the_process_with_it_is_passed_over(
    scripts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    progress = tmp_path / "progress.jsonl"
    progress.write_text('{"begins": "fatal", "case": "first"}\n{"timing": "second"}\n{"ti', encoding="utf-8")
    rows = measured(scripts, monkeypatch, tmp_path, {"fatal": 2.0, "same": 2.0})
    assert rows["fatal"]["outcome"] == "refused: the process ended in first"
    assert rows["same"]["outcome"] == "not all of it measured"  # the second case was tried already
    assert rows["same"]["cases"].keys() == {"first"}


# ---- By night: each variant, compiled, and run on the emulator -----------------------------------


def built(scripts: Any, module: str, folder: Path) -> Path:
    """The tree with all variants of this module, CUDA for Hopper alone; ninja leaves what is up to date."""
    out = folder / module
    variants = [variant for listed in VARIANTS.values() for variant in listed]
    scripts.build.write_ninja(TREE, module, variants, out)
    ninja = out / "build.ninja"
    ninja.write_text(re.sub(r' "--generate-code=arch=compute_80,[^"]*"', "", ninja.read_text()))
    done = subprocess.run(scripts.build.build_command(TREE, out), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    return out


@pytest.fixture(scope="module")
def folder() -> Path:
    return ROOT / "build" / "variants"  # not in the tree, of which other checks take each object


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("variant", ALL)
def test_a_variant_passes_its_tests_on_the_emulator(scripts: Any, folder: Path, variant: Variant) -> None:
    out = built(scripts, "_C_emulated", folder)
    tree = out / variant.name
    package = tree / "tilewright"
    package.mkdir(exist_ok=True)
    for source in (ROOT / "python" / "tilewright").iterdir():
        link = package / source.name
        if source.name != "__pycache__" and "_C_emulated" not in source.name and not link.exists():
            link.symlink_to(source)
    module = next(tree.glob("_C_emulated.*.so"))
    link = package / module.name
    link.unlink(missing_ok=True)
    link.symlink_to(module)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *variant.tests]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("variant", ALL)
def test_a_variant_spills_no_more_than_it_says(scripts: Any, folder: Path, variant: Variant) -> None:
    if not list((TREE / "CMakeFiles").rglob("*.cu.o.log")):
        pytest.skip("built without nvcc")
    from ptxas_report import ADVICE

    out = built(scripts, "_C", folder)
    texts = [log.read_text() for log in (out / variant.name).glob("*.cu.o.log")]
    found = scripts.build.kernels((out / variant.name).glob("*.cu.o.log"))
    hopper = {name: numbers for name, numbers in found.items() if name.endswith(" sm_90a")}
    assert hopper
    assert max(numbers["spilled"] for numbers in hopper.values()) == variant.spilled, hopper
    assert not [line for text in texts for line in text.splitlines() if ADVICE.search(line)]
