"""State of one parameter: making it, moving it, and reading and writing checkpoints.

In memory the state of a parameter is, under the names bitsandbytes gave them,

    step                 int64 scalar on the parameter's device, advanced by the kernel
    state1 [state2]      uint8 codes or float32 values, in the parameter's own layout (shape and strides)
    absmax1 [absmax2]    float32 (ceil(numel / 256),), blocks run along the parameter's memory; 8 bits only
    qmap1 [qmap2]        float32 (256,), the map of the codes; 8 bits only

In a checkpoint `step` is a Python int and the rest lies in a nested dict, so that FSDP leaves it alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .blockwise import dequantize_blockwise
from .maps import is_shared_map, resolve_map, shared_map

BLOCKSIZE = 256
NESTED_KEY = "__bnb_optimizer_quant_state__"

_CHECKPOINT_BLOCKSIZES = (256, 2048)

# Written by old versions of bitsandbytes next to a blockwise state, which does not need them.
_IGNORED_KEYS = frozenset(("gnorm_vec", "unorm_vec", "max1", "max2", "new_max1", "new_max2"))


class Moment(NamedTuple):
    """One of the running averages an optimizer keeps for each element."""

    suffix: str  # of the keys state1, absmax1, qmap1
    signed: bool  # which of the two maps
    torch_name: str  # its key in the state of torch.optim

    @property
    def state(self) -> str:
        """Key of the values or codes."""
        return "state" + self.suffix

    @property
    def absmax(self) -> str:
        """Key of the blocks' scales."""
        return "absmax" + self.suffix

    @property
    def qmap(self) -> str:
        """Key of the map."""
        return "qmap" + self.suffix


class _Stored(NamedTuple):
    """A moment as a checkpoint holds it: float values, or codes with what decodes them."""

    values: Tensor
    absmax: Tensor | None = None
    qmap: Tensor | None = None
    blocksize: int = BLOCKSIZE


def new_state(p: Tensor, moments: Iterable[Moment], bits: int) -> dict[str, Any]:
    """The state of a parameter before its first step."""
    state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.int64, device=p.device)}
    for moment in moments:
        if bits == 32:
            state[moment.state] = torch.zeros_like(p, dtype=torch.float32)
            continue
        blocks = ops.block_count(p.numel(), BLOCKSIZE)
        state[moment.state] = torch.zeros_like(p, dtype=torch.uint8)
        state[moment.absmax] = torch.zeros(blocks, dtype=torch.float32, device=p.device)
        state[moment.qmap] = shared_map(p.device, moment.signed)
    return state


def bits_of(state: Mapping[str, Any]) -> int:
    """8 or 32, what a state is stored in."""
    return 8 if state["state1"].dtype == torch.uint8 else 32


def is_misplaced(state: Mapping[str, Any], p: Tensor, moments: Iterable[Moment]) -> bool:
    """Whether a state of p's shape lies on another device or in another layout than p."""
    values = [state[moment.state] for moment in moments if isinstance(state.get(moment.state), Tensor)]
    if not isinstance(state.get("step"), Tensor) or any(value.shape != p.shape for value in values):
        return False
    fits = all(value.device == p.device and same_layout(value, p) for value in values)
    return not fits or state["step"].device != p.device


def refit(state: Mapping[str, Any], p: Tensor, moments: Iterable[Moment], bits: int) -> dict[str, Any]:
    """The same state on p's device, in p's layout and with `bits`; what fits already is taken as it is."""
    fitted: dict[str, Any] = {"step": state["step"].to(p.device)}
    for moment in moments:
        stored = _Stored(state[moment.state], state.get(moment.absmax), state.get(moment.qmap))
        fitted.update(_place(stored, moment, p, bits))
    return fitted


def share_maps(states: Iterable[dict[str, Any]], moments: Iterable[Moment]) -> None:
    """Replaces copies of the built-in map, as unpickling and copying make them, by the shared tensor."""
    resolved: dict[tuple[int, bool], Tensor] = {}
    for state in states:
        for moment in moments:
            qmap = state.get(moment.qmap)
            if qmap is None or is_shared_map(qmap, moment.signed):
                continue
            key = (id(qmap), moment.signed)
            if key not in resolved:
                resolved[key] = resolve_map(qmap, moment.signed, qmap.device)
            state[moment.qmap] = resolved[key]


def export_states(states: Mapping[Any, Any]) -> dict[Any, Any]:
    """The checkpoint form of states: steps as ints, read at once for each device, and the rest nested."""
    steps: dict[torch.device, list[Tensor]] = {}
    for state in states.values():
        if "step" in state:
            steps.setdefault(state["step"].device, []).append(state["step"])
    numbers = {device: iter(torch.stack(tensors).tolist()) for device, tensors in steps.items()}
    exported: dict[Any, Any] = {}
    for key, state in states.items():
        if "step" not in state:
            exported[key] = dict(state)
            continue
        nested = {name: value for name, value in state.items() if name != "step"}
        exported[key] = {"step": next(numbers[state["step"].device]), NESTED_KEY: nested}
    return exported


def import_state(
    saved: Mapping[str, Any], p: Tensor, moments: tuple[Moment, ...], bits: int, own_layout: bool, label: str
) -> dict[str, Any]:
    """The state of `p` from a checkpoint of this package, bitsandbytes or torch.optim; {} if it holds none.

    Args:
        saved: the parameter's entry in the checkpoint, nested or flat.
        p: the parameter.
        moments: what the optimizer keeps.
        bits: 8 or 32, what the optimizer wants; a state of the other kind is converted.
        own_layout: the checkpoint says that blocks run along memory, whatever the strides.
        label: names the parameter in messages.

    Raises:
        ValueError: something is missing, unknown or of the wrong shape or length. Nothing is changed.
    """
    entries = _flatten(saved)
    if not entries or all(value is None for value in entries.values()):
        return {}
    known = {"step"}.union(*((m.state, m.absmax, m.qmap, m.torch_name) for m in moments))
    unknown = sorted(set(entries) - known - _IGNORED_KEYS)
    if unknown:
        raise ValueError(
            f"{label}: the checkpoint holds {', '.join(unknown)}, which this optimizer does not have"
        )
    stored = [_read_moment(entries, moment, p, own_layout, label) for moment in moments]
    step = _read_step(entries, len(moments) == 1, label)
    state: dict[str, Any] = {"step": torch.tensor(step, dtype=torch.int64, device=p.device)}
    for moment, values in zip(moments, stored, strict=True):
        try:
            state.update(_place(values, moment, p, bits, fresh=True))
        except ValueError as error:
            raise ValueError(f"{label}: {moment.state}: {error}") from None
    return state


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill one gapless range of memory, in any order of the axes."""
    expected = 1
    for stride, size in sorted(
        (stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size != 1
    ):
        if stride != expected:
            return t.numel() == 0
        expected *= size
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether equal indices are equal places in memory."""
    return a.shape == b.shape and all(
        size == 1 or x == y for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


def _flatten(saved: Mapping[str, Any]) -> dict[str, Any]:
    entries = {key: value for key, value in saved.items() if key != NESTED_KEY}
    entries.update(saved.get(NESTED_KEY, {}))
    return entries


def _read_step(entries: Mapping[str, Any], optional: bool, label: str) -> int:
    """Steps taken. torch.optim.SGD and most Lions store none: all that matters is that the first is over."""
    step = entries.get("step")
    if step is None and optional:
        return 1
    if isinstance(step, Tensor) and step.numel() == 1:
        step = step.item()
    if isinstance(step, bool) or not isinstance(step, (int, float)) or step != int(step) or step < 0:
        raise ValueError(f"{label}: step must be a whole number of at least 0, got {step!r}")
    return int(step)


def _read_moment(
    entries: Mapping[str, Any], moment: Moment, p: Tensor, own_layout: bool, label: str
) -> _Stored:
    names = [name for name in (moment.state, moment.torch_name) if entries.get(name) is not None]
    if len(names) != 1:
        raise ValueError(
            f"{label}: the checkpoint holds {' and '.join(names) or 'neither'} "
            f"of {moment.state} and {moment.torch_name}, expected one"
        )
    name = names[0]
    values = entries[name]
    if type(values) not in (Tensor, torch.nn.Parameter):
        raise ValueError(f"{label}: {name} must be a plain tensor, got {type(values).__name__}")
    if values.shape != p.shape:
        raise ValueError(f"{label}: {name} has shape {tuple(values.shape)}, the parameter {tuple(p.shape)}")
    values = values.detach()
    if name == moment.torch_name:
        if not values.is_floating_point():
            raise ValueError(f"{label}: {name} must hold real numbers, got {values.dtype}")
        return _Stored(values)
    if not (own_layout or values.is_contiguous()):
        raise ValueError(
            f"{label}: {name} is not contiguous and the checkpoint does not say how its blocks run "
            "(bitsandbytes lays them out one way on a CPU and another on a GPU)"
        )
    if values.dtype == torch.float32:
        return _Stored(values)
    if values.dtype != torch.uint8:
        raise ValueError(f"{label}: {name} must be uint8 or float32, got {values.dtype}")
    return _read_codes(values, entries, moment, label)


def _read_codes(codes: Tensor, entries: Mapping[str, Any], moment: Moment, label: str) -> _Stored:
    absmax, qmap = entries.get(moment.absmax), entries.get(moment.qmap)
    if not isinstance(absmax, Tensor) or not isinstance(qmap, Tensor):
        raise ValueError(
            f"{label}: {moment.state} has no {moment.absmax} or no {moment.qmap}; "
            "8-bit states without blocks, as bitsandbytes once wrote them, are not supported"
        )
    if absmax.dtype != torch.float32 or absmax.dim() != 1:
        raise ValueError(f"{label}: {moment.absmax} must be float32 of one dimension, got {absmax.dtype}")
    for blocksize in _CHECKPOINT_BLOCKSIZES:
        if absmax.numel() == ops.block_count(codes.numel(), blocksize):
            return _Stored(codes, absmax.detach(), qmap, blocksize)
    raise ValueError(
        f"{label}: {moment.absmax} has {absmax.numel()} blocks, which fits {codes.numel()} elements "
        f"in blocks of neither {' nor '.join(map(str, _CHECKPOINT_BLOCKSIZES))}"
    )


def _place(stored: _Stored, moment: Moment, p: Tensor, bits: int, fresh: bool = False) -> dict[str, Tensor]:
    """A stored moment as part of p's state. Codes stay as they are if layout, blocks and bits are right."""
    values, absmax, qmap = stored.values, stored.absmax, stored.qmap
    if absmax is not None and qmap is not None:
        qmap = resolve_map(qmap, moment.signed, p.device)
        if bits == 8 and stored.blocksize == BLOCKSIZE and same_layout(values, p):
            return {
                moment.state: _copy_like(values, p, torch.uint8, fresh),
                moment.absmax: absmax.to(p.device, copy=fresh),
                moment.qmap: qmap,
            }
        values = _decode(values.to(p.device), absmax.to(p.device), qmap, stored.blocksize)
    if bits == 32:
        return {moment.state: _copy_like(values, p, torch.float32, fresh)}
    return _encode(values, moment, p)


def _copy_like(values: Tensor, p: Tensor, dtype: torch.dtype, fresh: bool) -> Tensor:
    if not fresh and values.device == p.device and values.dtype == dtype and same_layout(values, p):
        return values
    return torch.empty_like(p, dtype=dtype, requires_grad=False).copy_(values)


def _decode(codes: Tensor, absmax: Tensor, qmap: Tensor, blocksize: int) -> Tensor:
    flat = dequantize_blockwise(_along_memory(codes), absmax=absmax, code=qmap, blocksize=blocksize)
    return flat.as_strided(codes.shape, codes.stride())


def _encode(values: Tensor, moment: Moment, p: Tensor) -> dict[str, Tensor]:
    if not bool(torch.isfinite(values).all()):
        raise ValueError("values that are not finite cannot be stored in 8 bits")
    placed = torch.empty_like(p, dtype=torch.float32, requires_grad=False).copy_(values)
    codes, absmax = torch.ops.tilewright.quantize_blockwise(
        _along_memory(placed), None, moment.signed, BLOCKSIZE
    )
    return {
        moment.state: codes.as_strided(placed.shape, placed.stride()),
        moment.absmax: absmax,
        moment.qmap: shared_map(p.device, moment.signed),
    }


def _along_memory(t: Tensor) -> Tensor:
    """The elements of a dense tensor in the order they lie in memory, as a view."""
    if not is_dense(t):
        raise ValueError("the tensor has gaps or overlaps in memory")
    return t.as_strided((t.numel(),), (1,))
