"""TILEWRIGHT_DEBUG=1: ops are watched, and a call that goes wrong is kept in a folder that makes it again.

A watched op waits for its device before and after it runs, so that an error of a kernel shows at the op that
launched it, and looks for NaN and infinity in its results. What is kept of a call: `tensors.pt` (each one's
stretch of memory, strides and alignment included), `call.json` (all else), `results.pt` where it had any,
`info.json` (as `tilewright info`), and `replay.py`. Unless the variable is set no op knows of this file.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _backend
from ._info import info

_LIMIT = 10  # folders in the directory: a training loop that goes on after an error must not fill the disk
_ALIGNMENT = 64  # bytes: where vectors begin decides which path of a kernel reads them

# What need not be finite by contract: results by number, arguments by name. "-inf": nothing else; "any": it
# has places that are nobody's. Of arguments it says that such a value does not explain one in a result.
_EXEMPT: dict[str, dict[int | str, str]] = {
    "block_sparse_fwd": {1: "-inf"},  # the logarithm of a query that sees no key
    "block_sparse_bwd": {"lse": "-inf"},
    "selective_scan_fwd": {2: "any"},  # states at chunks; packed sequences leave some numbers out
    "selective_scan_bwd": {"chunk_states": "any"},
    "ssd_chunk_scan_fwd": {2: "any"},
    "ssd_chunk_scan_bwd": {"chunk_states": "any"},
}
# Arguments that are only written to: what they held before the call was nobody's.
_UNREAD = {
    "quantize_blockwise_out": ("codes", "absmax"),
    "dequantize_blockwise_out": ("out",),
    "linear_scan_out": ("out",),
    "prune_obs_panel": ("errors",),
}

_REPLAY = '''"""{title}: `python replay.py` makes the call again, `python replay.py cpu` on a CPU."""

import os
import sys
from pathlib import Path

os.environ["TILEWRIGHT_DEBUG"] = "0"
from tilewright.testing import replay

sys.exit(not replay(Path(__file__).parent, *sys.argv[1:]))
'''


def watched(schema: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation of the op of this schema, watched."""
    parsed = torch._C.parse_schema(f"tilewright::{schema}")
    names = [argument.name for argument in parsed.arguments]
    written = {a.name for a in parsed.arguments if a.alias_info is not None and a.alias_info.is_write}
    return _watched(schema.partition("(")[0], implementation, names, written)


class WatchedPlan:
    """An `OptimizerPlan` whose steps are watched as ops are."""

    def __init__(self, kind: str) -> None:
        self._kind, self._plan = kind, _backend.C.OptimizerPlan(kind)
        self._bound: tuple[Any, ...] = ()

    def bind(self, *batch: Any) -> int:
        """As of the plan."""
        self._bound = batch
        size: int = self._plan.bind(*batch)
        return size

    def step(
        self, options: Any, workspace: Any, captured: bool, grad_scale: Any, found_inf: Any, *rest: Any
    ) -> None:
        """As of the plan, which alone has the memory that a captured step needs."""
        if captured:
            self._plan.step(options, workspace, captured, grad_scale, found_inf, *rest)
        else:
            _watched_step(self._kind, *self._bound, options, grad_scale, found_inf, *rest[:-1])


def optimizer_step(
    kind: str, params: Any, grads: Any, states: Any, groups: Any, ids: Any,
    options: Any, grad_scale: Any, found_inf: Any, max_grad_norm: float | None, seed: int,
) -> None:  # fmt: skip
    """One step of an optimizer, with a plan of its own, so that its arguments are all there is to it."""
    plan = _backend.C.OptimizerPlan(kind)
    size = plan.bind(params, grads, states, groups, ids)
    workspace = torch.empty(size, dtype=torch.uint8, device=params[0].device) if size else None
    threads = _backend.num_threads()
    plan.step(options, workspace, False, grad_scale, found_inf, max_grad_norm, seed, threads)


def replay(folder: str | os.PathLike[str], device: str | torch.device | None = None) -> bool:
    """Makes the call again that TILEWRIGHT_DEBUG=1 kept, with as many threads and at the same CPU level.

    Prints the call, what became of it then, and what became of it now.

    Args:
        folder: that the error named.
        device: instead of the one that the call was made on. With "cpu", a call made on a GPU runs on the CPU
            kernels, or, within `emulated()`, on the emulator.

    Returns:
        Whether it ended the same: with the same error, or with the same bits.

    Raises:
        FileNotFoundError: the folder holds no call.
        RuntimeError: the device is not here.
    """
    folder = Path(folder)
    call = json.loads((folder / "call.json").read_text())
    print(f"tilewright::{call['op']}")
    print(*(line for item in call["arguments"].items() for line in _lines(*item)), sep="\n")
    with _circumstances(call, device):
        tensors = torch.load(folder / "tensors.pt", weights_only=True)
        arguments = {key: _restored(value, tensors, device) for key, value in call["arguments"].items()}
        operation = _operation(call["module"], call["op"])
        try:
            result = operation(*arguments.values())
            _wait(arguments)
        except Exception as error:
            now = _raised(error)
            same = bool(now == call["outcome"])
        else:
            found, then = _results(result, arguments, call["written"]), folder / "results.pt"
            same = then.exists() and _same_bits(found, torch.load(then, weights_only=True))
            now = "the same results, bit for bit" if same else "other results"
    print(f"then: {call['outcome']}\nnow:  {now}")
    return same


# ---- watching -------------------------------------------------------------------------------------------


def _watched(
    name: str, implementation: Callable[..., Any], names: Sequence[str], written: set[str]
) -> Callable[..., Any]:
    @wraps(implementation)
    def call(*arguments: Any) -> Any:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return implementation(*arguments)  # nothing runs now, and waiting would end the capture
        given, kept = dict(zip(names, arguments, strict=True)), _Kept()
        keep = partial(_keep, name, implementation.__module__, kept, written)
        ran = False
        try:
            _wait(arguments)
            ran = True
            for key, value in given.items():
                kept.add(key, value, key in written)
            result = implementation(*arguments)
            _wait(arguments)
        except Exception as error:
            text = keep(_raised(error), None) if ran else "an earlier kernel failed, not this op"
            _add(error, f"tilewright::{name}: {text}")
            raise
        results = _results(result, given, written)
        problem = _not_finite(name, results, kept)
        if problem:
            raise FloatingPointError(f"tilewright::{name}: {problem}; {keep(problem, results)}")
        return result

    return call


def _wait(arguments: Any) -> None:
    for device in {tensor.device for _, tensor in _tensors("", arguments) if tensor.is_cuda}:
        torch.cuda.synchronize(device)


def _results(result: Any, given: Mapping[str, Any], written: Sequence[str] | set[str]) -> dict[str, Tensor]:
    """What a call returned, by number, and what it wrote to, by name."""
    returned = result if isinstance(result, (tuple, list)) else [result]
    found = dict(pair for number, value in enumerate(returned) for pair in _tensors(f"{number}", value))
    return found | dict(pair for key in sorted(written) for pair in _tensors(key, given[key]))


def _not_finite(name: str, results: Mapping[str, Tensor], kept: _Kept) -> str:
    """What results hold that is neither finite nor explained by what the call was given."""
    exempt, unread = _EXEMPT.get(name, {}), _UNREAD.get(name, ())
    for key, tensor in results.items():
        rule = exempt.get(int(key) if key.isdigit() else key, "")
        bad = _unexplained(tensor, rule)
        if not bad.any():
            continue
        for source, value in kept.strided():
            argument = source.partition("[")[0]
            if argument not in unread and _unexplained(value, exempt.get(argument, "")).any():
                return ""
        label = f"result {key}" if key.isdigit() else key
        nans = int(tensor.isnan().sum())
        counts = {"NaN": nans, "infinite": int(bad.sum()) - nans}
        found = " and ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        first = tuple(bad.nonzero()[0].tolist())
        return f"{label} holds {found} values, the first at {first}, though all it was given is finite"
    return ""


def _unexplained(tensor: Tensor, rule: str) -> Tensor:
    if rule == "any" or not (tensor.is_floating_point() or tensor.is_complex()):
        return torch.zeros((), dtype=torch.bool)
    bad = ~tensor.isfinite()
    return bad & (tensor != -torch.inf) if rule == "-inf" else bad


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value.detach()
    elif isinstance(value, (tuple, list)):
        for index, entry in enumerate(value):
            yield from _tensors(f"{name}[{index}]", entry)
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _tensors(f"{name}[{key}]", entry)


# ---- keeping --------------------------------------------------------------------------------------------


class _Kept:
    """The arguments of a call as they were before it: as JSON takes them, and stretches of memory."""

    def __init__(self) -> None:
        self.arguments: dict[str, Any] = {}
        self.memory: dict[str, Tensor] = {}
        self._layouts: dict[str, tuple[torch.Size, tuple[int, ...]]] = {}

    def add(self, name: str, value: Any, written: bool) -> None:
        self.arguments[name] = self._plain(name, value, written)

    def strided(self) -> Iterator[tuple[str, Tensor]]:
        for name, memory in self.memory.items():
            yield name, memory.as_strided(*self._layouts[name], memory.storage_offset())

    def _plain(self, name: str, value: Any, written: bool) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(name, value.detach(), written)
        if isinstance(value, (tuple, list)):
            return [self._plain(f"{name}[{index}]", entry, written) for index, entry in enumerate(value)]
        if isinstance(value, Mapping):
            return {"dict": {k: self._plain(f"{name}[{k}]", entry, written) for k, entry in value.items()}}
        return {"dtype": str(value)} if isinstance(value, torch.dtype) else value

    def _tensor(self, name: str, value: Tensor, written: bool) -> dict[str, Any]:
        shape, stride = value.shape, value.stride()
        reach = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        memory = value.as_strided((reach if value.numel() else 0,), (1,))
        # After an error of a kernel nothing can be read from a GPU any more.
        self.memory[name] = memory.clone() if written and value.is_cpu else memory.cpu()
        self._layouts[name] = shape, stride
        return {
            "tensor": name,
            "shape": list(shape),
            "stride": list(stride),
            "dtype": str(value.dtype),
            "device": str(value.device),
            "alignment": value.data_ptr() % _ALIGNMENT,
        }


def _keep(
    name: str, module: str, kept: _Kept, written: set[str], outcome: str, results: dict[str, Tensor] | None
) -> str:
    """Writes a call down; returns where, or why not."""
    root = Path(os.environ.get("TILEWRIGHT_DEBUG_DIR") or "tilewright-debug")
    try:
        root.mkdir(parents=True, exist_ok=True)
        if len(os.listdir(root)) >= _LIMIT:
            return f"the call was not kept, because {root} holds {_LIMIT} already"
        folder = _new_folder(root, name)
        call = {
            "op": name,
            "module": module,
            "arguments": kept.arguments,
            "written": sorted(written),
            "outcome": outcome,
            "threads": _backend.num_threads(),
            "cpu_level": _backend.C.cpu_level(),
            "emulated": _emulator(),
            "stack": traceback.format_stack()[:-2],
        }
        torch.save({key: memory.clone() for key, memory in kept.memory.items()}, folder / "tensors.pt")
        if results is not None:
            copies = {key: value.to("cpu", copy=True) for key, value in results.items()}
            torch.save(copies, folder / "results.pt")
        (folder / "call.json").write_text(json.dumps(call, indent=1))
        (folder / "info.json").write_text(json.dumps(info(), indent=1))
        (folder / "replay.py").write_text(_REPLAY.format(title=f"tilewright::{name}"))
    except Exception as failure:
        return f"the call was not kept in {root}: {_raised(failure)}"
    return f"`python {folder / 'replay.py'}` makes the call again"


def _emulator() -> dict[str, Any] | None:
    if not _backend.is_emulated():
        return None
    emulator: Any = _backend.C
    return {
        "seed": _backend.emulator_seed,
        "multiprocessors": emulator.emulator_multiprocessors(),
        "compute_capability": emulator.emulator_compute_capability(),
    }


def _new_folder(root: Path, name: str) -> Path:
    for number in itertools.count():
        folder = root / f"{name}-{os.getpid()}-{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError


def _raised(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _add(error: Exception, text: str) -> None:
    """Adds a line to the message of an exception, whose type stays."""
    if error.args and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]}\n{text}", *error.args[1:])
    elif sys.version_info >= (3, 11):
        error.add_note(text)


def _lines(name: str, value: Any) -> Iterator[str]:
    """A kept argument in words, a line a tensor."""
    if isinstance(value, dict) and "tensor" in value:
        dtype = value["dtype"].removeprefix("torch.")
        yield f"  {name}: {dtype} {value['shape']}, strides {value['stride']}, on {value['device']}"
    elif isinstance(value, dict) and "dict" in value:
        for key, entry in value["dict"].items():
            yield from _lines(f"{name}[{key}]", entry)
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        for index, entry in enumerate(value):
            yield from _lines(f"{name}[{index}]", entry)
    else:
        yield f"  {name} = {value['dtype'] if isinstance(value, dict) else value!r}"


# ---- making a call again --------------------------------------------------------------------------------


def _operation(module: str, op: str) -> Callable[..., Any]:
    if module == __name__:
        return optimizer_step
    import_module(module)  # registers it
    operation: Callable[..., Any] = getattr(torch.ops.tilewright, op)
    return operation


@contextmanager
def _circumstances(call: Mapping[str, Any], device: Any) -> Iterator[None]:
    """The threads, CPU level and emulator of a call, for the time being."""
    from .testing import emulated

    stand_in = call["emulated"] if device is None else None
    with nullcontext() if stand_in is None else emulated(**stand_in):
        threads, level = torch.get_num_threads(), _backend.C.cpu_level()
        try:
            torch.set_num_threads(call["threads"])
            if call["cpu_level"] in _backend.C.cpu_levels():
                _backend.C.set_cpu_level(call["cpu_level"])
            else:
                print(f"made at CPU level {call['cpu_level']}, which this machine lacks: now {level}")
            yield
        finally:
            torch.set_num_threads(threads)
            _backend.C.set_cpu_level(level)


def _restored(argument: Any, tensors: Mapping[str, Tensor], device: Any) -> Any:
    if isinstance(argument, list):
        return [_restored(entry, tensors, device) for entry in argument]
    if not isinstance(argument, dict):
        return argument
    if "dict" in argument:
        return {key: _restored(entry, tensors, device) for key, entry in argument["dict"].items()}
    if "tensor" not in argument:
        return getattr(torch, argument["dtype"].removeprefix("torch."))
    memory, target = tensors[argument["tensor"]], torch.device(device or argument["device"])
    if target.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f'the call was made on {target}, which is not here: give device="cpu"')
    room = torch.empty(memory.numel() + _ALIGNMENT, dtype=memory.dtype, device=target)
    shift = (argument["alignment"] - room.data_ptr()) % _ALIGNMENT // room.itemsize
    room[shift : shift + memory.numel()].copy_(memory)
    return room.as_strided(argument["shape"], argument["stride"], shift)


def _same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        value.dtype == expected[key].dtype and torch.equal(_bits(value.cpu()), _bits(expected[key]))
        for key, value in found.items()
    )


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)


_STEP = list(inspect.signature(optimizer_step).parameters)
_watched_step = _watched("optimizer_step", optimizer_step, _STEP, {"params", "states"})
