"""Cases of the dense float32 product: a Mamba block's input projection, beside torch's product and oneDNN's.

On the CPU alone. FLOPs are those of the products, bytes those of their operands and results, each once: one
product forward, three with the gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import OURS, Call, Case, Contender, Plan
from .presets import MODELS
from .prune_layers import onednn_forward, onednn_gradients


def cases(plan: Plan) -> list[Case]:
    """The projection of mamba2-130m, or of the model."""
    model = plan.model or MODELS["mamba2-130m"]
    scan = model.scan
    if plan.on_gpu or scan is None:
        return []
    outputs = 2 * scan.inner + (2 * scan.states + scan.heads if scan.heads else 0)  # x, z; B, C and dt
    grads = (False,) if plan.quick else (False, True)
    return [_case(512, model.hidden, outputs, grad) for grad in grads]


def _case(tokens: int, inputs: int, outputs: int, grad: bool) -> Case:
    layer = torch.nn.Linear(inputs, outputs, bias=False)
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(0))

    def step(function: Callable[[Tensor, Tensor], Tensor]) -> Call:
        if not grad:
            return torch.inference_mode()(lambda: function(x, layer.weight))
        wanted, dy = x.clone().requires_grad_(), torch.ones(tokens, outputs)
        return lambda: torch.autograd.grad(function(wanted, layer.weight), (wanted, layer.weight), dy)

    def ours() -> Call:
        from tilewright.scan.dense import multiply

        return step(multiply)

    def theirs() -> Call:
        forward, backward = onednn_forward(layer, x), onednn_gradients(layer, x)
        return (lambda: (forward(), backward())) if grad else torch.inference_mode()(forward)

    name = "dense-product" + ("-grad" if grad else "")
    title = f"dense product, {tokens} x {inputs} x {outputs}" + (", with gradients" if grad else "")
    moved = 4.0 * (tokens * inputs + inputs * outputs + tokens * outputs) * (3 if grad else 1)
    contenders = [
        Contender(OURS, ours, moved),
        Contender("torch", lambda: step(F.linear), moved),
        Contender("torch, oneDNN", theirs, moved),
    ]
    sizes = {"tokens": tokens, "inputs": inputs, "outputs": outputs, "dtype": "float32"}
    return Case(name, title, contenders, 2.0 * tokens * inputs * outputs * (3 if grad else 1), sizes=sizes)
