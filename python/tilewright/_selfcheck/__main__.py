"""`python -m tilewright._selfcheck sections|checks N`: the steps from number N on, in lines of JSON."""

from __future__ import annotations

import faulthandler
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from tilewright import _families, _info

from . import Probe

_LONGEST = 60  # seconds a step may take before it counts as hanging
Step = tuple[dict[str, str], Callable[[], Any]]


def probes() -> dict[str, Probe]:
    """The checks of all families."""
    modules = [_families.load("_selfcheck", family) for family in _families.present("_selfcheck")]
    return {name: probe for module in modules for name, probe in module.PROBES.items()}


def sections() -> Iterator[Step]:
    """A step for each section of `_info`."""
    for probe in _info.SECTIONS:
        yield {"section": probe.__name__}, partial(_info.guarded, probe)


def checks() -> Iterator[Step]:
    """A step for each op: on the CPU, and on the current GPU if torch and the extension can use one."""
    usable = _info.info()["verdict"]["cuda"].startswith("ok")
    for device in ["cpu", "cuda"] if usable else ["cpu"]:
        for name, probe in probes().items():
            yield {"name": name, "device": device}, partial(check, probe, device)


def check(probe: Probe, device: str) -> dict[str, Any]:
    """What came of one check; an op that raises has failed it."""
    import torch

    start = time.perf_counter()
    try:
        error, bound = probe(torch.device(device))
        passed, detail = error <= bound, f"error {error:.1e}, allowed {bound:.1e}"
    except Exception as problem:
        passed, detail = False, f"{type(problem).__name__}: {problem}"
    return {"passed": passed, "detail": detail, "seconds": time.perf_counter() - start}


def _say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def main(kind: str, first: int) -> None:
    """Goes through the steps of a kind from number `first` on."""
    for step, work in list({"sections": sections, "checks": checks}[kind]())[first:]:
        _say(begin=step)
        faulthandler.dump_traceback_later(_LONGEST, exit=True)
        found = work()
        faulthandler.cancel_dump_traceback_later()
        _say(found=found)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
