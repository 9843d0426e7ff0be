"""The optimal brain surgeon's step as a torch op: schema, implementation, fake kernel.

    tilewright::prune_obs_panel  removes weights of a panel of columns; the others of a row make up for them

Not differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backend
from .._library import define, nothing


def _panel(weight: Tensor, factor: Tensor, mask: Tensor, errors: Tensor, n: int, m: int) -> None:
    _backend.C.prune_obs_panel(weight, factor, mask, errors, n, m, _backend.num_threads())
    for written in (weight, errors, *([mask] if m else [])):
        torch.autograd.graph.increment_version(written)


define(
    "prune_obs_panel(Tensor(a!) weight, Tensor factor, Tensor(b!) mask, Tensor(c!) errors, int n, int m)"
    " -> ()",
    _panel,
    nothing,
)

prune_obs_panel = torch.ops.tilewright.prune_obs_panel.default
