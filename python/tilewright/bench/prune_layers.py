"""What the cases of all sparse linear layers share: sizes, inputs, and the calls that are timed."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor, nn

from .case import Call, Contender, Plan, Unavailable

_TIMED = ("o", "up", "down", "in", "out")  # of a model's layers; the others are like one of these
_WEIGHTS, _MOST_COPIES = 2**28, 128  # bytes of the layers that take turns, and their number
_MULTIPLE = 64  # what both sides must divide by, so that every block and pattern fits


@dataclass(frozen=True)
class Size:
    """(out, in) of a linear layer. `tag` tells the names of a model's cases apart, which have several."""

    out: int
    into: int
    tag: str = ""

    @property
    def weights(self) -> int:
        """Elements of the dense weight."""
        return self.out * self.into


def sizes(plan: Plan, *usual: tuple[int, int]) -> list[Size]:
    """The layers of the plan's model, largest first; without one the usual (out, in)."""
    if plan.model is None:
        return [Size(*each) for each in usual]
    layers = plan.model.linear_layers()
    timed = dict.fromkeys(layers[name] for name in _TIMED if name in layers)
    fitting = [each for each in timed if each[0] % _MULTIPLE == each[1] % _MULTIPLE == 0]
    return [Size(*each, f"-{each[0]}x{each[1]}") for each in sorted(fitting, reverse=True)]


def random(device: torch.device, rows: int, columns: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """The same numbers on every device."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def forward(layer: nn.Module, x: Tensor) -> Call:
    """One forward pass as in inference; a context manager around each would be timed with it."""
    layer.requires_grad_(False)
    return lambda: layer(x)


def decoding(layer: nn.Module, x: Tensor, weight_bytes: float) -> Call:
    """The same as in a model that decodes: layers take turns, together larger than any cache."""
    layer.requires_grad_(False)
    layers = cycle([deepcopy(layer) for _ in range(_copies(weight_bytes))])
    return lambda: next(layers)(x)


def reading(device: torch.device, weight_bytes: float) -> Contender:
    """What a sum over as many bytes takes, of tensors that take turns: no layer can be faster."""

    def setup() -> Call:
        shape = _copies(weight_bytes), round(weight_bytes / 4)
        weights = cycle(torch.ones(shape, device=device).unbind())
        return lambda: next(weights).sum()

    return Contender("torch, a sum of as much", setup, weight_bytes, yardstick=True)


def _copies(weight_bytes: float) -> int:
    return max(2, min(_MOST_COPIES, round(_WEIGHTS / weight_bytes)))


def gradients(layer: nn.Module, x: Tensor) -> Call:
    """One backward pass of a graph that is kept: gradients of x and of the parameters."""
    y = layer.requires_grad_()(x.requires_grad_())
    inputs, dy = [x, *layer.parameters()], random(x.device, x.shape[0], y.shape[1], y.dtype, seed=2)
    return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)


def by_onednn(
    device: torch.device, dtype: torch.dtype, setup: Callable[[], Call], size: float | None = None
) -> list[Contender]:
    """The dense layer once more where torch's product is not oneDNN's: float32 on a CPU, which is MKL's."""
    if device.type == "cpu" and dtype == torch.float32:
        return [Contender("torch, oneDNN", setup, size)]
    return []


def onednn_forward(layer: nn.Linear, x: Tensor) -> Call:
    """As `forward`, of a layer without a bias."""
    weight = _for_onednn(layer.weight)
    return lambda: _onednn(x, weight)


def onednn_gradients(layer: nn.Linear, x: Tensor) -> Call:
    """As `gradients`, without a graph."""
    weight = _for_onednn(layer.weight)
    dy = random(x.device, x.shape[0], layer.out_features, x.dtype, seed=2)
    return lambda: (_onednn(dy, weight.t()), _onednn(dy.t(), x.t()))


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


def _for_onednn(weight: Tensor) -> Tensor:
    """The weight, where this torch has the product: it is an internal op, which may change."""
    weight = weight.detach()
    try:
        _onednn(weight[:1], weight)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise Unavailable(f"not in this torch: {error}") from None
    return weight
