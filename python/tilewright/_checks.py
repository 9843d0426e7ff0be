"""What public functions say about a wrong argument: its name, what is allowed, what came, what was meant."""

from __future__ import annotations

import difflib
import inspect
import operator
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import wraps
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int32, torch.int64)

PLAIN = (Tensor, torch.nn.Parameter)  # whose memory is their own, and which torch's functions do not ask
_Callable = TypeVar("_Callable", bound=Callable[..., Any])


def check_choice(name: str, value: Any, allowed: Sequence[str | None]) -> None:
    """Refuses what is none of these words."""
    if not (value is None or isinstance(value, str)) or value not in allowed:
        words = [repr(word) for word in allowed]
        listed = f"{', '.join(words[:-1])} or {words[-1]}"
        meant = nearest(value, (word for word in allowed if word is not None))
        raise ValueError(f"{name} must be {listed}, got {value!r}{meant}")


def nearest(value: Any, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: which of the known ones was meant, if one is near."""
    lowered = {word.lower(): word for word in known}
    found = difflib.get_close_matches(str(value).lower(), lowered, n=1)
    return f": did you mean {lowered[found[0]]!r}?" if found else ""


def check_matches(name: str, patterns: Iterable[str], known: Sequence[str], called: str) -> None:
    """Refuses a pattern that matches none of these names of `called`, such as "linear layer"."""
    for pattern in patterns:
        if not any(fnmatchcase(word, pattern) for word in known):
            named = [word for word in known if word]
            shown = ", ".join(named if len(named) <= 6 else [*named[:3], "...", *named[-3:]]) or "none"
            meant = nearest(pattern, named)
            raise ValueError(f"{name}: {pattern!r} matches no {called}; there are {shown}{meant}")


def suggests_keywords(function: _Callable) -> _Callable:
    """Decorates a function or class: a misspelt keyword gets an answer that names the one that was meant.

    Python's own does from 3.13 on. It costs a microsecond a call, so the ops do without.
    """
    if isinstance(function, type):
        function.__init__ = suggests_keywords(function.__init__)  # type: ignore[misc]
        return function
    known = [name for name in inspect.signature(function).parameters if name != "self"]

    @wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        for word in keywords:
            if word not in known:
                made = type(arguments[0]) if function.__name__ == "__init__" else function
                listed = f"it has {', '.join(known)}{nearest(word, known)}"
                raise TypeError(f"{made.__name__} has no argument {word!r}; {listed}")
        return function(*arguments, **keywords)

    return call  # type: ignore[return-value]


def check_count(name: str, value: Any, highest: int | None = None, *, lowest: int = 1) -> None:
    """Refuses what is no integer from `lowest` to `highest`."""
    integral = isinstance(value, (int, torch.SymInt, Integral)) and not isinstance(value, bool)
    if not integral or value < lowest or (highest is not None and value > highest):
        allowed = "a positive int" if lowest == 1 else f"an int of at least {lowest}"
        if highest is not None:
            allowed = f"an int from {lowest} to {highest}"
        raise (ValueError if integral else TypeError)(f"{name} must be {allowed}, got {value!r}")


def check_number(name: str, value: Any, interval: str) -> float:
    """The number as a float; refuses what does not lie in the interval, such as "[0, 1)"."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    low, high = (float(end) for end in interval[1:-1].split(","))
    if (
        real
        and low <= value <= high
        and (value != low or "[" in interval)
        and (value != high or "]" in interval)
    ):
        return float(value)
    raise (ValueError if real else TypeError)(f"{name} must be a number in {interval}, got {value!r}")


def check_seed(name: str, value: Any) -> None:
    """Refuses what no kernel takes for a seed."""
    check_count(name, value, 2**63 - 1, lowest=0)


def check_flag(name: str, value: Any) -> None:
    """Refuses what is neither True nor False: 0 and "no" may well be mistakes."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_type(name: str, value: Any, expected: type, called: str) -> None:
    """Refuses another type; `called` is the one expected as users write it, such as "torch.nn.Module"."""
    if not isinstance(value, expected):
        raise TypeError(f"{name} must be a {called}, got {came(value)}")


def came(value: Any) -> str:
    """What a message says came where another type was expected; a class itself is a frequent slip."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def check_tensor(name: str, value: Any) -> None:
    """Refuses what no kernel can read: other types, other devices, sparse and quantized layouts."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not (value.is_cpu or value.is_cuda):
        raise ValueError(f"{name} must be on a CPU or CUDA device, got {value.device}")
    if value.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {value.layout}")


def fits(value: Any, dtypes: Sequence[torch.dtype], shape: Sequence[int], device: torch.device) -> bool:
    """Whether check_tensor, check_dtype, check_shape and check_device would pass; they say what is wrong."""
    return (
        type(value) in PLAIN
        and value.layout is torch.strided
        and value.dtype in dtypes
        and value.shape == shape
        and value.device == device
    )


def check_dtype(name: str, value: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Refuses dtypes other than those allowed."""
    if value.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{name} must have dtype {names}, got {str(value.dtype).removeprefix('torch.')}")


def check_shape(name: str, value: Tensor, expected: Sequence[int], meaning: str) -> None:
    """Refuses another shape; `meaning` names the axes, such as "(batch, dim, length)"."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {meaning} = {tuple(expected)}, got {tuple(value.shape)}")


def check_device(name: str, value: Tensor, expected: torch.device, owner: str) -> None:
    """Refuses another device than that of the argument called `owner`."""
    if value.device != expected:
        raise ValueError(f"{name} is on {value.device}, but {owner} is on {expected}: move one of them")


def check_apart(name: str, value: Tensor, **others: Tensor | None) -> None:
    """Refuses a tensor to be written to that lies between the ends of one that is read."""
    if torch.compiler.is_compiling():
        return  # it has no address there
    first, last = _span(value)
    for other, given in others.items():
        if given is None or given.device != value.device:
            continue
        begin, end = _span(given)
        if begin < last and first < end:
            raise ValueError(f"{name} must not share memory with {other}")


def _span(t: Tensor) -> tuple[int, int]:
    """The addresses between which a tensor lies; of one without memory of its own, as in fake mode, none."""
    if t.numel() == 0 or t.is_meta or isinstance(t, FakeTensor):
        return 0, 0
    begin = t.data_ptr()
    reach = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return begin, begin + (reach + 1) * t.element_size()


def check_cu_seqlens(value: Any, expected: torch.device, owner: str) -> None:
    """Refuses what cannot say where packed sequences lie; its values are for `check_boundaries`."""
    check_tensor("cu_seqlens", value)
    check_dtype("cu_seqlens", value, INTEGERS)
    check_device("cu_seqlens", value, expected, owner)
    if value.dim() != 1 or value.shape[0] == 0:
        raise ValueError(f"cu_seqlens must have shape (sequences + 1,), got {tuple(value.shape)}")


def check_boundaries(cu_seqlens: Tensor, length: int) -> None:
    """Looks at the values, which waits for the device; not while a CUDA graph is captured."""
    if cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    ends = cu_seqlens.tolist()
    if ends[:1] != [0] or ends[-1] != length or not all(map(operator.lt, ends, ends[1:])):
        shown = ", ".join(map(str, ends if len(ends) <= 8 else [*ends[:4], "...", *ends[-4:]]))
        raise ValueError(f"cu_seqlens must increase strictly from 0 to the length {length}, got [{shown}]")
