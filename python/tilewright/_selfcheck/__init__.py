"""What `tilewright info` asks, in a process of its own: the sections of `_info`, then every op once.

A family's module here has `PROBES`: each op on small data against a few lines of plain torch, by the name it
is reported under. The process (`__main__.py`) says when it begins a step and what came of it, so that a crash
or a hang costs that step and not the report. Here, nothing but the standard library is imported.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import torch

# Returns the error found and the bound it must keep.
Probe: TypeAlias = "Callable[[torch.device], tuple[float, float]]"

# The parent's sys.path: the package asked about is this one, wherever it was imported from.
_START = (
    "import runpy, sys; sys.path[:] = {!r}; runpy.run_module('tilewright._selfcheck', run_name='__main__')"
)


def sections() -> Iterator[tuple[str, Any]]:
    """The sections of `tilewright.info`, each as soon as it is known."""
    for step, found in _steps("sections"):
        if "section" in step:
            yield step["section"], found


def checks() -> Iterator[dict[str, Any]]:
    """A result for each op and device: `name`, `device`, `passed`, `detail`, `seconds`.

    `detail` holds the error found and the bound, or why it did not run.
    """
    for step, found in _steps("checks"):
        died = {"passed": False, "detail": found.get("error"), "seconds": 0.0}
        yield {**step, **(died if "error" in found else found)}


def _steps(kind: str) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Each step and what came of it; after a crash, the steps behind it go on in another process."""
    done = 0
    while True:
        script = _START.format(sys.path)
        with subprocess.Popen(
            [sys.executable, "-c", script, kind, str(done)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        ) as process:
            begun, said = None, ""
            for line in process.stdout or ():
                event = _event(line)
                if event is None:
                    said = line.strip() or said
                elif "begin" in event:
                    begun = event["begin"]
                elif begun is not None:
                    yield begun, event["found"]
                    begun, done = None, done + 1
        if process.returncode == 0:
            return
        yield begun or {"name": "import", "device": "-"}, {"error": _end_of(process.returncode, said)}
        if begun is None:
            return
        done += 1


def _event(line: str) -> dict[str, Any] | None:
    """What `__main__` said; None for anything else that is printed there."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and event.keys() <= {"begin", "found"} else None


def _end_of(status: int, said: str) -> str:
    """How a process ended that did not get to its end."""
    if status < 0:
        return f"the process was ended by {signal.Signals(-status).name}: {signal.strsignal(-status)}"
    return said or f"the process ended with status {status}"
