"""Process groups of gloo, each rank a process of its own.

A group must not live in the process of the tests: when Python frees it, torch waits for the group's threads
while it holds the interpreter's lock, and now and then one of them is waiting for that lock (about one run in
five thousand). Here a rank leaves without freeing anything, and whoever hangs all the same is ended.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing


def run_ranks(
    work: Callable[..., None], folder: Path, *arguments: Any, ranks: int = 1, seconds: float = 240
) -> None:
    """Calls ``work(rank, *arguments)`` in `ranks` processes that form a group, and raises as one of them did.

    Args:
        work: a function of a module's top level.
        folder: an empty one, where the ranks find each other.
        arguments: what `work` takes; they are pickled.
        ranks: how many processes.
        seconds: after these the processes are killed, and the test fails.
    """
    started = multiprocessing.start_processes(
        _rank, (ranks, folder, work, arguments), nprocs=ranks, join=False, start_method="spawn"
    )
    end = time.monotonic() + seconds
    while not started.join(timeout=1):
        if time.monotonic() > end:
            for process in started.processes:
                process.kill()
            raise TimeoutError(f"{work.__name__} on {ranks} ranks took more than {seconds:g} s")


def _rank(rank: int, ranks: int, folder: Path, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks
    )
    work(rank, *arguments)
    distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
