"""Help for tests of code that uses tilewright."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType

from . import _backend
from ._debug import replay

__all__ = ["emulated", "replay"]


@contextlib.contextmanager
def emulated(
    seed: int | None = None,
    multiprocessors: int | None = None,
    compute_capability: int | None = None,
) -> Iterator[ModuleType]:
    """Runs CUDA kernels on the CPU within the block: CPU tensors stand for device memory.

        with tilewright.testing.emulated(seed=1):
            optimizer.step()  # the CUDA kernel, on CPU tensors

    Args:
        seed: of the order in which the emulator resumes warps. A kernel without races gives the same bits for
            every seed. None leaves the order as it is.
        multiprocessors: how many the kernels are told there are, within the block. With many, for example,
            scans split long sequences. None leaves the number as it is.
        compute_capability: of the device that kernels are told they run on, within the block; 80, or 90 for
            Hopper. None leaves it as it is.

    Yields:
        The emulated extension.

    Raises:
        ImportError: the emulated extension was not built (TILEWRIGHT_EMULATED=ON).
    """
    module = importlib.import_module("tilewright._C_emulated")
    if seed is not None:
        module.emulator_set_seed(seed)
        _backend.emulator_seed = seed
    count = module.emulator_multiprocessors()
    module.emulator_set_multiprocessors(count if multiprocessors is None else multiprocessors)
    capability = module.emulator_compute_capability()
    module.emulator_set_compute_capability(capability if compute_capability is None else compute_capability)
    before = vars(_backend)["C"]
    vars(_backend)["C"] = module  # for mypy C is the product's own, whose signatures it knows
    try:
        yield module
    finally:
        vars(_backend)["C"] = before
        module.emulator_set_multiprocessors(count)
        module.emulator_set_compute_capability(capability)
