"""Registration of torch ops: one call gives an op its schema, its implementation and its fake kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library: Any = torch.library.Library("tilewright", "FRAGMENT")  # type: ignore[no-untyped-call]


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers ``torch.ops.tilewright.<name in the schema>`` for CPU and CUDA tensors."""
    name = schema.partition("(")[0]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"tilewright::{name}", fake, lib=_library)


def nothing(*arguments: Any) -> None:
    """The fake kernel of an op that only writes into its arguments."""
    return None
