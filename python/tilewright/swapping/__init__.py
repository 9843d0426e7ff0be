"""`tilewright.swap`: this package's kernels in a model that exists already.

report.py        what was swapped, what was not and why
instances.py     how one module gets other methods
verify.py        whether a swapped model still computes the same
attention.py     the attention layers of Hugging Face transformers
model_mask.py    what such a model lets its attention see
transformers.py  its Mamba layers
mamba_ssm.py     the layers of mamba_ssm
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .. import _backend
from .._checks import check_type
from .._models import check_inputs
from ..attention import BlockSparse
from ..nn import Mamba, Mamba2
from . import attention as attention_layers
from .instances import Methods, exchange, is_swapped, replaced_forward, restore
from .report import Skipped, Swapped, SwapReport
from .verify import compare, outputs_of, tolerance_of

__all__ = ["Skipped", "SwapReport", "Swapped", "swap", "unswap"]

_HOSTS = ("transformers", "mamba_ssm")
Include = str | Sequence[str] | Callable[[str, nn.Module], bool] | None


def swap(
    model: nn.Module,
    *,
    attention: BlockSparse | None = None,
    scan: bool = True,
    linear: bool = True,
    include: Include = None,
    dry_run: bool = False,
    verify: Any = None,
) -> SwapReport:
    """Puts this package's kernels into an existing model, in place.

    Only the layers of this model change: other models of the same class, and the library it comes from, stay
    as they are. Parameters, buffers and ``state_dict`` are untouched. Calling it again swaps what is new;
    :func:`unswap` takes it all back. Training, evaluation, ``generate``, gradient checkpointing, autocast,
    ``copy.deepcopy`` and ``torch.save`` of the model work as before.

    Args:
        model: any module; the layers to swap are searched in it and its children.
        attention: a `tilewright.attention.BlockSparse`: the mask that the attention layers of a model of
            transformers 5 get, besides the model's own. None: attention stays as it is.
        scan: swap Mamba layers: those of transformers (mamba, falcon_mamba, mamba2, jamba, bamba, zamba,
            zamba2, falcon_h1, granitemoehybrid, nemotron_h) and of mamba_ssm (Mamba, Mamba2).
        linear: swap linear layers whose weights are sparse. This version finds none.
        include: which layers, by their names in ``model.named_modules()``: a pattern such as
            ``"backbone.layers.1?.*"``, several of them, or a function of name and module. None: all.
        dry_run: change nothing, and report what would be done.
        verify: example inputs: a tensor, a tuple of positional or a dict of keyword arguments. The model runs
            on them before and after, in evaluation mode and without gradients; if the outputs differ by more
            than rounding, the swap is undone and an error is raised. Attention is compared with torch's
            under the same mask: what the mask itself changes is wanted.

    Returns:
        What was swapped and what was left alone, with the reason; ``print`` it.

    Raises:
        TypeError: an argument of a type that cannot be used.
        RuntimeError: `verify` found a difference. The model is as it was; so it is after any other error.
    """
    _check_arguments(model, attention, include, verify)
    report, changes = _plan(model, scan, include, dry_run)
    attending = [] if attention is None else _plan_attention(model, include, report)
    if dry_run or not (changes or attending):
        return report
    done: list[nn.Module] = []
    undo = attention_layers.install(model, attending, attention) if attention and attending else None
    try:
        attention_layers.compare_by_elements(attending, verify is not None)
        before = {} if verify is None else outputs_of(model, verify)
        attention_layers.compare_by_elements(attending, False)
        for module, methods in changes:
            exchange(module, methods)
            done.append(module)
        if verify is not None:
            compare(before, outputs_of(model, verify), tolerance_of(model))
    except BaseException:
        restore(done)
        if undo is not None:
            undo()
        raise
    return report


def unswap(model: nn.Module) -> int:
    """Gives every swapped layer of the model its own code back; returns how many there were.

    What else was done to the layers since then, parametrizations and FSDP included, stays.

    Raises:
        TypeError: `model` is no module, or the class of a layer was derived from the swapped one and calls
            ``super()``. The model is as it was.
    """
    check_type("model", model, nn.Module, "torch.nn.Module")
    swapped = [module for module in model.modules() if is_swapped(module)]
    restore(swapped)
    return len(swapped) + attention_layers.remove(model)


def methods_for(cls: type) -> Methods:
    """The methods that a class of a known library gets; LookupError for others."""
    for known, host in _known_bases(cls):
        return host.layer_of(known).methods  # type: ignore[no-any-return]
    raise LookupError(f"tilewright has no replacement for {cls.__module__}.{cls.__qualname__}")


def _check_arguments(model: Any, attention: Any, include: Any, verify: Any) -> None:
    check_type("model", model, nn.Module, "torch.nn.Module")
    if not (attention is None or isinstance(attention, BlockSparse)):
        raise TypeError(
            "attention must be a tilewright.attention.BlockSparse, such as "
            f"BlockSparse(BlockMask.sliding_window, window=512), got {type(attention).__name__}"
        )
    patterns = isinstance(include, Sequence) and all(isinstance(pattern, str) for pattern in include)
    if not (include is None or callable(include) or patterns):
        raise TypeError(f"include must be a pattern, patterns or a function (name, module), got {include!r}")
    if verify is not None:
        check_inputs("verify", verify)


def _plan(
    model: nn.Module, scan: bool, include: Include, dry_run: bool
) -> tuple[SwapReport, list[tuple[nn.Module, Methods]]]:
    """Decides about every module, and changes none."""
    report, changes = SwapReport(dry_run=dry_run), []
    for path, module in model.named_modules():
        original, host = next(_known_bases(type(module)), (None, None))
        name = type(module).__name__
        if original is None or host is None:
            if isinstance(module, (Mamba, Mamba2)):
                report.skipped.append(Skipped(path, name, "it is tilewright's own"))
            continue
        layer = host.layer_of(original)
        why = _obstacle(path, module, original, scan, include) or layer.obstacle(module)
        if why is None:
            report.swapped.append(Swapped(path, name, layer.op, _kernel(module)))
            changes.append((module, layer.methods))
        else:
            report.skipped.append(Skipped(path, name, why))
    return report, changes


def _plan_attention(model: nn.Module, include: Include, report: SwapReport) -> list[nn.Module]:
    """The attention layers to swap; the report is told of them and of the others."""
    owners = {path: module for path, module in model.named_modules() if hasattr(module, "_supports_sdpa")}
    chosen = []
    for path, module in attention_layers.layers(model):
        names = [name for name in owners if not name or path == name or path.startswith(f"{name}.")]
        owner = owners[max(names, key=len)] if names else None
        why = attention_layers.obstacle(module, owner)
        if why is None:
            why = None if _included(path, module, include) else "not included"
        why = why or replaced_forward(module) or _device_obstacle(module)
        if why is None:
            report.swapped.append(Swapped(path, type(module).__name__, attention_layers.OP, _kernel(module)))
            chosen.append(module)
        else:
            report.skipped.append(Skipped(path, type(module).__name__, why))
    return chosen


def _known_bases(cls: type) -> Iterator[tuple[type, ModuleType]]:
    """The classes this one is made from that a host module knows; a host loads when its library shows up."""
    for base in cls.__mro__:
        library = base.__module__.partition(".")[0]
        if library in _HOSTS:
            host = import_module(f".{library}", __name__)
            if host.layer_of(base) is not None:
                yield base, host


def _obstacle(path: str, module: nn.Module, original: type, scan: bool, include: Include) -> str | None:
    """What keeps a module of a known kind from being swapped, whatever its kind."""
    if is_swapped(module):
        return "swapped already"
    if not scan:
        return "scan is False"
    if not _included(path, module, include):
        return "not included"
    if type(module).forward is not original.forward:  # type: ignore[attr-defined]
        return f"its class overrides the forward of {original.__name__}"
    return replaced_forward(module) or _device_obstacle(module)


def _included(path: str, module: nn.Module, include: Include) -> bool:
    if include is None or callable(include):
        return include is None or bool(include(path, module))
    return any(fnmatchcase(path, pattern) for pattern in ([include] if isinstance(include, str) else include))


def _device_obstacle(module: nn.Module) -> str | None:
    device = _device(module)
    if device.type not in ("cpu", "cuda", "meta"):
        return f"its weights are on {device}; kernels are for cpu and cuda"
    if device.type == "cuda" and not dict(_backend.C.build_info()).get("cuda"):
        return "its weights are on cuda, and this build has no CUDA kernels: see `tilewright info`"
    return None


def _device(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def _kernel(module: nn.Module) -> str:
    """What will run the op where the weights are now."""
    device = _device(module)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda-sm{major}{minor}"
    return f"cpu-{_backend.C.cpu_level()}" if device.type == "cpu" else "by device"
