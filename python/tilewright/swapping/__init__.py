"""`tilewright.swap`: this package's kernels in a model that exists already.

report.py        what was swapped, what was not and why, and the way back
instances.py     how one module gets other methods
verify.py        whether a swapped model still computes the same
linear.py        linear layers whose weights have zeros
attention.py     the attention layers of Hugging Face transformers
model_mask.py    what such a model lets its attention see
transformers.py  its Mamba layers
states.py        what these keep between calls
releases.py      which releases of transformers all this is for
mamba_ssm.py     the layers of mamba_ssm
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .. import _backend
from .._checks import came, check_flag, check_matches, check_type, suggests_keywords
from .._models import ORIGINAL, check_inputs, original_class
from ..attention import BlockMask, BlockSparse
from ..nn import Mamba, Mamba2
from ..prune.compressing import observe, reason_of
from . import attention as attention_layers
from . import linear as linear_layers
from .instances import Methods, exchange, is_swapped, replaced_forward, restore
from .releases import newer
from .report import Measured, Skipped, Swapped, SwapReport
from .verify import compare, outputs_of, tolerance_of

__all__ = ["Measured", "Skipped", "SwapReport", "Swapped", "swap", "unswap"]

_HOSTS = ("transformers", "mamba_ssm")
Include = str | Sequence[str] | Callable[[str, nn.Module], bool] | None


@dataclass(frozen=True)
class _Change:
    """A module that is to get other methods, and what these keep in it."""

    module: nn.Module
    methods: Methods
    note: object = None


@suggests_keywords
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
    :func:`unswap` takes it all back, and the report's ``undo()``, or the end of a ``with`` block, what this
    call did. Training, evaluation, ``generate``, gradient checkpointing, autocast, ``copy.deepcopy`` and
    ``torch.save`` of the model work as before.

    Args:
        model: any module; the layers to swap are searched in it and its children.
        attention: a `tilewright.attention.BlockSparse`: the mask that the attention layers of a model of
            transformers (5.4 or newer) get, besides the model's own. None: attention stays as it is.
        scan: swap Mamba layers: those of transformers 4.57 or newer (mamba, falcon_mamba, mamba2, jamba,
            bamba, zamba, zamba2, falcon_h1, granitemoehybrid, nemotron_h), with the RMS norms of their
            models, and of mamba_ssm (Mamba, Mamba2).
        linear: swap linear layers (`torch.nn.Linear`, `Conv1D` of transformers) whose weights have zeros that
            a kernel can skip, where that is faster by measurements here: at 1 and 512 tokens and, with
            `verify`, at those that the layers see on it. These forms serve inference; wherever a gradient is
            wanted the layer is dense. Also large float32 `torch.nn.Linear` layers without zeros, on a CPU
            with AVX-512 that is not Intel's: our dense product serves them in training too.
        include: which layers, by their names in ``model.named_modules()``: a pattern such as
            ``"backbone.layers.1?.*"``, several of them, or a function of name and module. A pattern after
            ``!`` excludes. None: all.
        dry_run: change nothing, and report what would be done. `verify` only tells numbers of tokens then.
        verify: example inputs: a tensor, a tuple of positional or a dict of keyword arguments. The model runs
            on them before and after, in evaluation mode and without gradients; if the outputs differ by more
            than rounding, the swap is undone and an error is raised. Attention is compared with torch's
            under the same mask: what the mask itself changes is wanted.

    Returns:
        What was swapped and what was left alone, with the reason; ``print`` it.

    Raises:
        TypeError: an argument of a type that cannot be used.
        ValueError: no pattern of `include` matches a layer.
        RuntimeError: `verify` found a difference. The model is as it was; so it is after any other error.
    """
    _check_arguments(model, attention, include, verify, scan=scan, linear=linear, dry_run=dry_run)
    chosen = _chooser(model, include)
    report = SwapReport(dry_run=dry_run)
    changes = _plan(model, scan, chosen, report)
    norms = _plan_norms(model, chosen, report) if changes else []
    attending = [] if attention is None else _plan_attention(model, attention, chosen, report)
    if verify is None and any(map(_is_of_transformers, [*(change.module for change in changes), *attending])):
        report.warnings.extend(newer())
    if linear:
        mixers = {
            module for module in model.modules() if isinstance(module, (Mamba, Mamba2)) or is_swapped(module)
        }
        mixers.update(change.module for change in changes)
        changes += _plan_linear(model, chosen, report, verify, mixers)
    changes += norms
    if dry_run or not (changes or attending):
        return report
    done: list[nn.Module] = []
    undo = attention_layers.install(model, attending, attention) if attention and attending else None
    try:
        attention_layers.compare_by_elements(attending, verify is not None)
        before = {} if verify is None else outputs_of(model, verify)
        attention_layers.compare_by_elements(attending, False)
        for change in changes:
            exchange(change.module, change.methods, change.note)
            done.append(change.module)
        if verify is not None:
            compare(before, outputs_of(model, verify), tolerance_of(model))
    except BaseException:
        restore(done)
        if undo is not None:
            undo()
        raise
    report._undo.append(_taking_back(model, done, attending))
    return report


def unswap(model: nn.Module) -> int:
    """Gives every swapped layer of the model its own code back; returns how many there were, norms aside.

    What else was done to the layers since then, parametrizations and FSDP included, stays.

    Raises:
        TypeError: `model` is no module, or the class of a layer was derived from the swapped one and calls
            ``super()``. The model is as it was.
    """
    check_type("model", model, nn.Module, "torch.nn.Module")
    swapped = [module for module in model.modules() if is_swapped(module)]
    norms = sum(_is_norm(getattr(type(module), ORIGINAL)) for module in swapped)
    restore(swapped)
    return len(swapped) - norms + attention_layers.remove(model)


def methods_for(cls: type) -> Methods:
    """The methods that a class of a known library gets; LookupError for others."""
    if linear_layers.is_linear(cls):
        return linear_layers.METHODS
    if _is_norm(cls):
        return _norm_methods()
    for known, host in _known_bases(cls):
        return host.layer_of(known).methods  # type: ignore[no-any-return]
    raise LookupError(f"tilewright has no replacement for {cls.__module__}.{cls.__qualname__}")


def _check_arguments(model: Any, attention: Any, include: Any, verify: Any, **flags: Any) -> None:
    check_type("model", model, nn.Module, "torch.nn.Module")
    if not (attention is None or isinstance(attention, BlockSparse)):
        example = "BlockSparse(BlockMask.sliding_window, window=512)"
        if isinstance(attention, BlockMask):
            example = "BlockSparse(mask)"
        elif callable(attention):
            example = f"BlockSparse({getattr(attention, '__qualname__', type(attention).__name__)}, ...)"
        raise TypeError(
            f"attention must be a tilewright.attention.BlockSparse, such as {example}, got {came(attention)}"
        )
    for name, value in flags.items():
        check_flag(name, value)
    patterns = isinstance(include, Sequence) and all(isinstance(pattern, str) for pattern in include)
    if not (include is None or callable(include) or patterns):
        raise TypeError(f"include must be a pattern, patterns or a function (name, module), got {include!r}")
    if verify is not None:
        check_inputs("verify", verify)


Chooser = Callable[[str, nn.Module], bool]


def _chooser(model: nn.Module, include: Include) -> Chooser:
    """Which layers to take, by name and module."""
    if include is None:
        return lambda path, module: True
    if not isinstance(include, (str, Sequence)):
        return include
    patterns = [include] if isinstance(include, str) else include
    wanted = [pattern for pattern in patterns if not pattern.startswith("!")]
    barred = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    names = [name for name, _ in model.named_modules()]
    check_matches("include", [*wanted, *barred], names, "layer of the model")

    def chosen(path: str, module: nn.Module) -> bool:
        found = (not wanted and bool(barred)) or any(fnmatchcase(path, pattern) for pattern in wanted)
        return found and not any(fnmatchcase(path, pattern) for pattern in barred)

    return chosen


def _plan(model: nn.Module, scan: bool, chosen: Chooser, report: SwapReport) -> list[_Change]:
    """Decides about every layer of a host library, and changes none."""
    changes = []
    for path, module in model.named_modules():
        original, host = next(_known_bases(type(module)), (None, None))
        name = type(module).__name__
        if original is None or host is None:
            if isinstance(module, (Mamba, Mamba2)):
                report.skipped.append(Skipped(path, name, "it is tilewright's own"))
            continue
        layer = host.layer_of(original)
        why = _obstacle(path, module, original, scan, chosen) or layer.obstacle(module)
        if why is None:
            report.swapped.append(Swapped(path, name, layer.op, _kernel(module)))
            changes.append(_Change(module, layer.methods))
        else:
            report.skipped.append(Skipped(path, name, why))
    return changes


def _plan_norms(model: nn.Module, chosen: Chooser, report: SwapReport) -> list[_Change]:
    """The RMS norms beside Mamba layers."""
    changes = []
    for path, module in model.named_modules():
        if not _is_norm(type(module)) or not chosen(path, module):
            continue
        if replaced_forward(module) is None and _device_obstacle(module) is None:
            report.norms.append(path)
            changes.append(_Change(module, _norm_methods()))
    return changes


def _is_of_transformers(module: nn.Module) -> bool:
    return any(base.__module__.startswith("transformers.") for base in type(module).__mro__)


def _is_norm(cls: type) -> bool:
    known = cls.__module__.startswith("transformers.models.")
    return known and bool(import_module(".transformers", __name__).is_norm(cls))


def _norm_methods() -> Methods:
    methods: Methods = import_module(".transformers", __name__).NORM_METHODS
    return methods


def _plan_attention(
    model: nn.Module, attention: BlockSparse, chosen: Chooser, report: SwapReport
) -> list[nn.Module]:
    """The attention layers to swap; the report is told of them and of the others."""
    owners = {path: module for path, module in model.named_modules() if hasattr(module, "_supports_sdpa")}
    attending = []
    for path, module in attention_layers.layers(model):
        names = [name for name in owners if not name or path == name or path.startswith(f"{name}.")]
        owner = owners[max(names, key=len)] if names else None
        why = attention_layers.obstacle(module, owner, attention)
        if why is None:
            why = None if chosen(path, module) else "not included"
        why = why or replaced_forward(module) or _device_obstacle(module)
        if why is None:
            report.swapped.append(Swapped(path, type(module).__name__, attention_layers.OP, _kernel(module)))
            attending.append(module)
        else:
            report.skipped.append(Skipped(path, type(module).__name__, why))
    return attending


def _plan_linear(
    model: nn.Module, chosen: Chooser, report: SwapReport, verify: Any, mixers: set[nn.Module]
) -> list[_Change]:
    """Decides about the linear layers, by measuring those with zeros; dense ones of mixers are theirs."""
    modules = dict(model.named_modules())
    candidates: list[tuple[str, nn.Module]] = []
    changes = []

    def take_dense(path: str, module: nn.Module, why: str = "") -> None:
        kernel = f"{_kernel(module)}, dense{why}"
        report.swapped.append(Swapped(path, type(module).__name__, linear_layers.DENSE_OP, kernel))
        changes.append(_Change(module, linear_layers.METHODS))

    for path, module in modules.items():
        if is_swapped(module) and linear_layers.is_linear(original_class(module)):
            report.skipped.append(Skipped(path, type(module).__name__, "swapped already"))
        if not linear_layers.is_linear(type(module)):
            continue
        parent = modules.get(path.rpartition(".")[0]) if path else None
        why = None if chosen(path, module) else "not included"
        why = why or linear_layers.obstacle(module, parent) or replaced_forward(module)
        why = why or _device_obstacle(module)
        if not linear_layers.has_zeros(module):
            if why is None and parent not in mixers and linear_layers.gains_dense(module):
                take_dense(path, module)
            else:
                report.dense.append(path)
        elif why is None:
            candidates.append((path, module))
        else:
            report.skipped.append(Skipped(path, type(module).__name__, why))
    if not candidates:
        return changes
    seen = {} if verify is None else observe(model, verify)[1]
    for (path, module), work in zip(candidates, linear_layers.decide(candidates, seen), strict=True):
        name = type(module).__name__
        if work.made is None and linear_layers.gains_dense(module):
            take_dense(path, module, f": {reason_of(work)}")
            continue
        if work.made is None:
            report.skipped.append(Skipped(path, name, f"dense: {reason_of(work)}"))
            continue
        note = linear_layers.note_of(work)
        note.watch(module)
        kernel = f"{_kernel(module)}, {linear_layers.forms_of(note)}"
        times = tuple(linear_layers.measured(work))
        report.swapped.append(Swapped(path, name, linear_layers.op_of(note), kernel, times))
        changes.append(_Change(module, linear_layers.METHODS, note))
    return changes


def _taking_back(
    model: nn.Module, exchanged: Iterable[nn.Module], attending: Iterable[nn.Module]
) -> Callable[[], None]:
    """Undoes a swap that was finished; it keeps no module alive."""
    weak_model, modules = weakref.ref(model), [weakref.ref(module) for module in exchanged]
    choices = [(weakref.ref(module), attention_layers.choice_of(module)) for module in attending]

    def undo() -> None:
        still = (module() for module in modules)
        restore([module for module in still if module is not None and is_swapped(module)])
        here = weak_model()
        if here is not None:
            attention_layers.take_back(here, [(module(), choice) for module, choice in choices])

    return undo


def _known_bases(cls: type) -> Iterator[tuple[type, ModuleType]]:
    """The classes this one is made from that a host module knows; a host loads when its library shows up."""
    for base in cls.__mro__:
        library = base.__module__.partition(".")[0]
        if library in _HOSTS:
            host = import_module(f".{library}", __name__)
            if host.layer_of(base) is not None:
                yield base, host


def _obstacle(path: str, module: nn.Module, original: type, scan: bool, chosen: Chooser) -> str | None:
    """What keeps a module of a known kind from being swapped, whatever its kind."""
    if is_swapped(module):
        return "swapped already"
    if not scan:
        return "scan is False"
    if not chosen(path, module):
        return "not included"
    if type(module).forward is not original.forward:  # type: ignore[attr-defined]
        return f"its class overrides the forward of {original.__name__}"
    return replaced_forward(module) or _device_obstacle(module)


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
