"""The cases of `tilewright bench` under pytest-benchmark, at their quick sizes.

pytest bench --benchmark-group-by=group --benchmark-columns=median,iqr,rounds
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tilewright import _families
from tilewright.bench.case import Case, Contender, Plan, Unavailable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODULES = [_families.load("bench", family) for family in _families.present("bench")]
CASES = [case for module in MODULES for case in module.cases(Plan(DEVICE, quick=True))]
PAIRS = [(case, contender) for case in CASES for contender in case.contenders]


@pytest.mark.parametrize(("case", "contender"), PAIRS, ids=[f"{a.name}-{b.name}" for a, b in PAIRS])
def test_case(benchmark: Any, case: Case, contender: Contender) -> None:
    benchmark.group = case.title
    try:
        call = contender.setup()
    except Unavailable as reason:
        pytest.skip(str(reason))

    def finished() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(bytes=contender.bytes, flops=case.flops)
    benchmark.pedantic(finished, rounds=5, iterations=case.calls, warmup_rounds=1)
